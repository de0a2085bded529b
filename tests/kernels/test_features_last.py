"""Programs rewritten so that features stay last between convolutions."""

import jax
import jax.extend.core as jexc
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import primitives

from dpkernels.tapped.features_last import features_last
from dpkernels.tapped.layout import bind_for

NUMBERS = np.random.default_rng(0)
SAME = ((1, 1), (1, 1))
FIRST = ("NCHW", "OIHW", "NCHW")


def normal(*shape):
    return jnp.asarray(NUMBERS.normal(size=shape), jnp.float32)


X, W, BIAS = normal(1, 3, 8, 8), normal(8, 3, 3, 3), normal(8)


def conv(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), SAME, dimension_numbers=FIRST)


def group_norm(x):
    grouped = x.reshape(1, 2, 4, *x.shape[2:])
    centered = grouped - grouped.mean((2, 3, 4), keepdims=True)
    return (centered * lax.rsqrt(jnp.square(centered).mean((2, 3, 4), keepdims=True))).reshape(
        x.shape
    )


@jax.custom_jvp
def opaque(x):
    return jnp.sin(x)


opaque.defjvp(lambda x, t: (opaque(*x), t[0] * jnp.cos(x[0])))

# What may follow a convolution of 8 features on 8 by 8.
TAILS = {
    "nothing": lambda y: y,
    "elementwise": lambda y: jnp.where(y <= 0, 0, y) * 2 + jnp.clip(y, -1, 1),
    "bias and scale": lambda y: (y + BIAS.reshape(1, -1, 1, 1)) * BIAS.reshape(1, -1, 1, 1),
    "scale by position": lambda y: y * y[:, :1] * y[:, :, :1, :1],
    "odd sizes": lambda y: y[:, :, 1:, :5] * BIAS.reshape(1, -1, 1, 1),
    "group norm": group_norm,
    "reductions": lambda y: [y.sum(2), y.max((0, 3)), (y > 0).any((1, 2, 3)), y.min(1), y.prod()],
    "split": lambda y: y.reshape(1, 8, 4, 2, 2, 4).max((3, 5)),
    "merge beside each other": lambda y: y.reshape(8, 64),
    "merge with features": lambda y: y.reshape(1, -1, 8),
    "flatten": lambda y: y.reshape(-1),
    "transpose": lambda y: [y.transpose(0, 2, 3, 1), y.transpose(3, 1, 0, 2) + 1],
    "slice": lambda y: y[:, 1:7:2, ::3, 2:],
    "pad": lambda y: lax.pad(y, 1.0, [(0, 0, 0), (1, 2, 0), (0, 1, 1), (-1, 0, 0)]),
    "pad by a pixel": lambda y: lax.pad(
        X, lax.stop_gradient(y[0, 0, 0, 0]), [(0, 0, 0), (0, 0, 0), (1, 1, 0), (0, 0, 0)]
    ),
    "concatenate": lambda y: jnp.concatenate([y, 2 * y, X], 1),
    "squeeze": lambda y: jnp.squeeze(y[:, :, :1], (0, 2)),
    "second convolution": lambda y: conv(jnp.tanh(y), W.transpose(1, 0, 2, 3)),
    "product": lambda y: jnp.einsum("nchw,cd->ndhw", y, jnp.ones((8, 2))),
    "custom derivative": opaque,
    "loop": lambda y: lax.scan(lambda c, x: (c + x.sum(), x * 2), 0.0, y),
}


def leaves(function):
    return lambda *args: jax.tree.leaves(function(*args))


@pytest.mark.parametrize("name", TAILS)
def test_rewritten_program_returns_the_same(name):
    function = leaves(lambda x, w: TAILS[name](conv(x, w)))
    found = jexc.jaxpr_as_fun(features_last(jax.make_jaxpr(function)(X, W)))(X, W)
    for one, other in zip(found, function(X, W), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


# Of the others the derivative is for `make test-slow`: they are moves of the same kinds.
QUICK = {"group norm", "split", "pad", "concatenate", "second convolution", "loop"}


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TAILS]
)
def test_rewritten_program_has_the_same_derivative(name):
    function = leaves(lambda x, w: TAILS[name](conv(x, w)))
    rewritten = jexc.jaxpr_as_fun(features_last(jax.make_jaxpr(function)(X, W)))

    def total(function):
        # Weighted, so that no two entries could be exchanged.
        return lambda x, w: sum(
            (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype).reshape(y.shape))).sum()
            for y in function(x, w)
            if jnp.issubdtype(y.dtype, jnp.inexact)
        )

    pairs = zip(*(jax.grad(total(f), (0, 1))(X, W) for f in (rewritten, function)), strict=True)
    for one, other in pairs:
        scale = jnp.abs(other).max()
        np.testing.assert_allclose(one / scale, other / scale, atol=1e-5)


def test_nothing_is_transposed_between_convolutions():
    def function(x, w, v):
        y = group_norm(conv(x, w) + BIAS.reshape(1, -1, 1, 1))
        y = jnp.where(y <= 0, 0, y).reshape(1, 8, 4, 2, 4, 2).max((3, 5))
        return conv(y, v).mean((2, 3))

    closed = features_last(jax.make_jaxpr(function)(X, W, normal(4, 8, 3, 3)))
    moved = [
        eqn.invars[0].aval.size
        for eqn in closed.jaxpr.eqns
        if eqn.primitive is primitives.transpose_p
        and max(eqn.invars[0].aval.shape) < eqn.invars[0].aval.size
        and eqn.invars[0] not in closed.jaxpr.constvars
    ]
    # Of the input, and of what is broadcast from a number: zeros that ReLU compares with.
    assert moved.count(X.size) == 1
    assert closed.jaxpr.eqns[-1].outvars[0].aval.shape == (1, 4)


@pytest.mark.parametrize("batch_size", [1, 10_000])
def test_evaluated_convolution_is_the_same_for_every_batch_size(batch_size):
    w = normal(64, 3, 3, 2)

    def function(x):
        return lax.conv_general_dilated(
            x, w, (3, 4), ((1, 0), (-1, 2)), (1, 2), (2, 1), dimension_numbers=FIRST
        )

    (eqn,) = jax.make_jaxpr(function)(X).jaxpr.eqns
    found, pull_back = jax.vjp(lambda x: bind_for("cpu", batch_size)(eqn, [x, w])[0], X)
    expected, expected_pull_back = jax.vjp(function, X)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    dy = jnp.cos(jnp.arange(found.size, dtype=found.dtype)).reshape(found.shape)
    np.testing.assert_allclose(*pull_back(dy), *expected_pull_back(dy), rtol=1e-4, atol=1e-4)


def test_program_without_convolution_stays_as_it_is():
    closed = jax.make_jaxpr(lambda x: jnp.sin(x).transpose(0, 2, 3, 1))(X)
    assert features_last(closed) is closed


def test_program_with_features_last_stays_so():
    def function(x, w):
        layout = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(x, w, (1, 1), SAME, dimension_numbers=layout)
        return jnp.tanh(y)

    args = X.transpose(0, 2, 3, 1), W.transpose(2, 3, 1, 0)
    closed = features_last(jax.make_jaxpr(function)(*args))
    assert not any(eqn.primitive is primitives.transpose_p for eqn in closed.jaxpr.eqns)
