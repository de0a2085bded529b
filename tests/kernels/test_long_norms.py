"""Norms of large gradients: adding many squares up must not lose digits.

Numbers that repeat are the worst case, because every addition then rounds the same way.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpkernels import clipped_grad
from dpkernels.tapped import rows

VALUES = np.linspace(1.05, 2.0, 20, dtype=np.float32)
# What the slack of a clip norm leaves: squares are twice as far off as norms.
RTOL = 1e-5
SHORT, LONG = 3, 2**17 + 5


def repeated(*shape, value=1.7):
    return np.full(shape, value, np.float32)


def squared(value):
    return float(np.float32(value)) ** 2


@pytest.mark.parametrize("size", [1, 31, 33, 2**14, LONG, 2**22])
def test_squared_norms_of_repeated_numbers_keep_their_digits(size):
    count = max(1, min(len(VALUES), 2**24 // size))
    array = np.broadcast_to(VALUES[-count:, None], (count, size))
    found = jax.jit(rows.squared_norms)(array)
    exact = np.array([size * squared(value) for value in VALUES[-count:]])
    np.testing.assert_allclose(np.asarray(found, float), exact, rtol=2e-6)


def test_squared_norms_of_ordinary_numbers_keep_their_digits():
    array = np.random.default_rng(0).normal(size=(2, 2**20 + 1)).astype(np.float32)
    found = jax.jit(rows.squared_norms)(array)
    np.testing.assert_allclose(found, np.sum(np.square(array, dtype=float), 1), rtol=2e-6)


@pytest.mark.parametrize("size", [0, 1, 33, 5000])
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("kind", [np.float64, np.float16])
def test_squared_norms_take_any_shape_and_kind(batch, size, kind):
    with jax.enable_x64():
        found = jax.jit(rows.squared_norms)(np.ones((batch, size), kind))
    assert found.dtype == kind
    np.testing.assert_array_equal(found, np.full(batch, size, kind))


@pytest.mark.parametrize("count", [1, 2, 8, 32, 128])
@pytest.mark.parametrize("size", [16, 2048, 2**15])
def test_grams_of_repeated_rows_keep_their_digits(count, size):
    """Rounding of both sides, and of the sum of their products."""

    values = VALUES[::5]
    side = np.broadcast_to(values[:, None, None, None], (len(values), 1, count, size))

    @jax.jit
    def squares(side):
        gram = rows.products(side, side)
        return rows.own_sum(gram, gram).total

    exact = [(count * size * squared(value)) ** 2 for value in values]
    np.testing.assert_allclose(np.asarray(squares(side), float), exact, rtol=2 * RTOL)


def parameter(p, x):
    return jnp.sum(p * x)


def outer(p, x):
    return jnp.sum(x @ p)


def used_twice(p, x):
    return jnp.sum(x @ p) + jnp.sum((x * x) @ p)


def looked_up(p, x):
    return jnp.sum(p[x])


def bag(p, x):
    return jnp.sum(p[x].sum(0))


@cache
def norm_and_sum(loss, strategy):
    return jax.jit(
        clipped_grad(
            loss,
            l2_clip_norm=1.0,
            keep_batch_dim=False,
            strategy=strategy,
            return_grad_norms=True,
        )
    )


@pytest.mark.parametrize("strategy", ["auto", "gram", "product", "materialize"])
@pytest.mark.parametrize(
    ("loss", "shape", "x"),
    [
        (parameter, (LONG,), repeated(1, LONG)),
        (outer, (LONG, SHORT), repeated(1, LONG)),
        (outer, (SHORT, LONG), repeated(1, SHORT)),
        (outer, (LONG, SHORT), repeated(1, 2, LONG)),
        (outer, (SHORT, LONG), repeated(1, 4, SHORT)),
        (used_twice, (LONG, SHORT), repeated(1, LONG)),
        (looked_up, (SHORT, LONG), np.array([[1, 1, 2]])),
        (bag, (SHORT, LONG), np.array([[1, 1, 2]])),
    ],
    ids=["parameter", "left", "right", "rows", "wide rows", "twice", "looked up", "bag"],
)
def test_one_example_with_a_long_gradient_stays_within_the_clip_norm(loss, shape, x, strategy):
    params = jnp.zeros(shape)
    total, aux = norm_and_sum(loss, strategy)(params, x)
    exact = np.linalg.norm(np.asarray(jax.grad(loss)(params, x[0]), float))
    np.testing.assert_allclose(np.asarray(aux.grad_norms, float), exact, rtol=RTOL)
    assert np.linalg.norm(np.asarray(total, float)) <= 1 + RTOL
