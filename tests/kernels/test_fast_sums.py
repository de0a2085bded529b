"""Sums without careful norms: as the whole program's, or with the word that they need care."""

from functools import cache, partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dpkernels
import oracles
from dpkernels import clipped_grad, clipped_vjp
from kernel_checks import quick_jit
from kernel_linear import (
    EXTREMES,
    LINEAR,
    WIDE,
    WIDTH,
    cancelling_data,
    convolution,
    dense,
    make_data,
    make_params,
    opposed,
    recurrent,
    scaled,
    wide,
)
from kernel_models import BATCH

every_linear = pytest.mark.parametrize("loss", LINEAR, ids=lambda loss: loss.__name__)
every_strategy = pytest.mark.parametrize(
    "strategy",
    ["auto", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gram", "product"))],
)
NOBODY = np.zeros(BATCH, bool)


def contrast(p, x, v):
    """Of any size: its parameters come with the data."""
    return jnp.sum((x @ p["w"]) * v)


@cache
def compiled(loss, strategy, *, is_fast, microbatch_size=None):
    """Compiled once: the clip norm and the mask are arguments."""

    def total(clip_norm, padding, *args):
        function = clipped_grad(
            loss,
            l2_clip_norm=clip_norm,
            batch_argnums=(1, 2),
            keep_batch_dim=False,
            return_values=True,
            strategy=strategy,
            microbatch_size=microbatch_size,
        )
        function = function.fast_fun if is_fast else function
        return function(*args, is_padding_example=padding)

    return quick_jit(total)


def needs_care(
    loss, x, v, *, clip_norm=1.0, padding=NOBODY, params=None, strategy="auto", **options
):
    """Runs both ways, and holds the fast one to the careful one unless it asks for care."""
    args = np.float32(clip_norm), padding, make_params(loss) if params is None else params, x, v
    (found, aux), needs_care = compiled(loss, strategy, is_fast=True, **options)(*args)
    if needs_care:
        return True
    expected, expected_aux = compiled(loss, strategy, is_fast=False, **options)(*args)
    found, expected = oracles.by_path(found), oracles.by_path(expected)
    distance = oracles.norm({path: found[path] - expected[path] for path in found})
    assert distance <= 1e-5 * clip_norm
    np.testing.assert_allclose(aux.values, expected_aux.values, rtol=1e-5, atol=1e-6)
    return False


@every_strategy
@pytest.mark.parametrize("clip_norm", [0.1, 1.0, 1e4])
@every_linear
def test_ordinary_examples_need_no_care(loss, clip_norm, strategy):
    assert not needs_care(loss, *make_data(), clip_norm=clip_norm, strategy=strategy)


sizes = st.sampled_from([0.0, 1e-25, 1e-12, 1e-6, 1.0, 1e3, 1e6, -1e12, 1e25, np.nan, np.inf])


@every_strategy
@pytest.mark.parametrize("loss", [*LINEAR, wide], ids=lambda loss: loss.__name__)
def test_a_fast_sum_is_the_careful_one_or_asks_for_care(loss, strategy):
    @settings(max_examples=40)
    @given(
        st.lists(st.booleans(), min_size=BATCH, max_size=BATCH),
        st.integers(0, BATCH - 1),
        sizes,
        sizes,
        st.sampled_from([1.0, 1e6]),
        st.sampled_from([1e-12, 1e-6, 0.1, 1.0, 1e4]),
    )
    def check(padding, index, x_size, v_size, everyone, clip_norm):
        x, v = make_data(WIDE if loss is wide else WIDTH)
        x *= np.float32(everyone)
        with np.errstate(invalid="ignore"):
            x[index] *= np.float32(x_size)
            v[index] *= np.float32(v_size)
        padding = np.array(padding)
        asks = needs_care(loss, x, v, clip_norm=clip_norm, padding=padding, strategy=strategy)
        assert asks or (np.isfinite(x).all() and np.isfinite(v).all())

    check()


@pytest.mark.parametrize("is_padding", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@every_linear
def test_examples_that_are_not_finite_need_care(loss, bad, is_padding):
    """Padding too: zero times NaN is none."""
    for side in (0, 1):
        data = make_data()
        data[side, 2, 0, 1] = bad
        assert needs_care(loss, *data, padding=is_padding & (np.arange(BATCH) == 2))


@pytest.mark.parametrize("loss", [*LINEAR, wide], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("size", [1e10, 1e15])
def test_norms_whose_squares_overflow_need_care(loss, size):
    x, v = make_data(WIDE if loss is wide else WIDTH)
    x[1] *= np.float32(size)
    v[1] *= np.float32(size)
    assert needs_care(loss, x, v)


@pytest.mark.parametrize(("x_size", "v_size"), EXTREMES)
@pytest.mark.parametrize("loss", [*LINEAR, wide], ids=lambda loss: loss.__name__)
def test_extremes_are_right_or_need_care(loss, x_size, v_size):
    for clip_norm in (1e-30, 1e-12, 1e-6, 1.0):
        x, v = make_data(WIDE if loss is wide else WIDTH)
        x[1] *= np.float32(x_size)
        v[1] *= np.float32(v_size)
        needs_care(loss, x, v, clip_norm=clip_norm)


@pytest.mark.parametrize("loss", [*LINEAR, wide], ids=lambda loss: loss.__name__)
def test_small_norms_under_a_tiny_clip_norm_need_care(loss):
    x, v = make_data(WIDE if loss is wide else WIDTH)
    assert needs_care(loss, x, v * np.float32(1e-12), clip_norm=1e-15)


@pytest.mark.parametrize("rest", [0.0, 1e-6, 1e-4])
def test_a_gram_that_rounding_spoils_needs_care(rest):
    x, v = cancelling_data(1e3, rest, 0, WIDE)
    assert needs_care(wide, x, v, clip_norm=1e-3)


@pytest.mark.parametrize("loss", [dense, wide, recurrent, scaled], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("size", [1.0, 1e6])
@pytest.mark.parametrize("rest", [0.0, 1e-6, 1e-2])
def test_rows_that_cancel_keep_the_bound_or_need_care(loss, size, rest):
    """Norm and sum must be of one gradient, in the program that has no border between them."""
    alone = np.arange(BATCH) != 1
    for seed in range(4):
        x, v = cancelling_data(size, rest, seed, WIDE if loss is wide else WIDTH)
        for clip_norm in (1e-3, 1.0):
            args = np.float32(clip_norm), alone, make_params(loss), x, v
            (found, _), needs_care = compiled(loss, "auto", is_fast=True)(*args)
            assert needs_care or oracles.norm(oracles.by_path(found)) <= clip_norm * (1 + 1e-5)


@pytest.mark.parametrize("strategy", ["auto", "gram"])
def test_uses_that_cancel_keep_the_bound_or_need_care(strategy):
    x, v = make_data()
    params = {"w": np.zeros((WIDTH, WIDTH), np.float32)}
    for i in range(BATCH):
        args = np.float32(1e-4), np.arange(BATCH) != i, params, x * np.float32(1e3), v
        (found, _), needs_care = compiled(opposed, strategy, is_fast=True)(*args)
        assert needs_care or oracles.norm(oracles.by_path(found)) <= 1e-4 * (1 + 1e-5)


@pytest.mark.parametrize(
    ("rows", "left", "right", "ratio"),
    [(512, 256, 2, 2e-2), (1024, 64, 4, 1.6)],
)
def test_an_example_that_a_gram_understates_stays_within_the_clip_norm(rows, left, right, ratio):
    a = (np.random.default_rng(1).random(left) + 0.5).astype(np.float32)
    signs = np.where(np.arange(rows) < rows // 2, 1.0, -1.0)
    x = np.where(signs[:, None] > 0, a, np.nextafter(a, np.float32(9)))[None]
    v = np.broadcast_to((signs + np.sqrt(ratio / rows))[:, None], (rows, right))[None]
    v = v.astype(np.float32)
    clip_norm = np.linalg.norm(x[0].astype(float).T @ v[0].astype(float)) / 2
    args = np.float32(clip_norm), np.zeros(1, bool), {"w": np.zeros((left, right), np.float32)}
    (found, _), needs_care = compiled(contrast, "gram", is_fast=True)(*args, x, v)
    assert needs_care or oracles.norm(oracles.by_path(found)) <= clip_norm * (1 + 2e-5)


@pytest.mark.parametrize("index", [0, BATCH - 1])
def test_one_microbatch_that_needs_care_is_enough(index):
    x, v = make_data()
    assert not needs_care(dense, x, v, microbatch_size=2)
    x[index] = np.nan
    assert needs_care(dense, x, v, microbatch_size=2)


def test_a_microbatch_of_padding_alone_is_skipped_whatever_it_holds():
    x, v = make_data()
    x[2:4] = np.nan
    padding = np.isin(np.arange(BATCH), (2, 3))
    assert not needs_care(dense, x, v, padding=padding, microbatch_size=2)


def test_no_examples_need_no_care():
    x, v = make_data()
    assert not needs_care(dense, x[:0], v[:0], padding=NOBODY[:0])


@pytest.mark.parametrize("bad", [1.0, np.nan, 1e25])
def test_halves_are_right_or_need_care(bad):
    x, v = make_data()
    v[3] *= np.float32(bad)
    halves = clipped_vjp(lambda p, x: x @ p["w"], l2_clip_norm=0.3, keep_batch_dim=False)
    params = {"w": np.ones((WIDTH, WIDTH), np.float32)}
    _, kept = quick_jit(halves.forward)(params, x)
    found, needs_care = quick_jit(halves.backward.fast_fun)(kept, v)
    assert bool(needs_care) == (bad != 1)
    if not needs_care:
        expected = quick_jit(halves.backward.bounded_sensitivity_fun)(kept, v)
        np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-5, atol=1e-6)


def conditionals(jaxpr):
    """The number of conds, at any depth."""
    inner = [
        sub
        for eqn in jaxpr.eqns
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        )
        if hasattr(sub := getattr(value, "jaxpr", value), "eqns")
    ]
    own = sum(eqn.primitive is jax.extend.core.primitives.cond_p for eqn in jaxpr.eqns)
    return own + sum(conditionals(sub) for sub in inner)


@pytest.mark.parametrize("loss", [dense, wide, convolution], ids=lambda loss: loss.__name__)
def test_fast_sums_have_no_careful_branches(loss):
    x, v = make_data(WIDE if loss is wide else WIDTH)
    function = clipped_grad(loss, l2_clip_norm=1.0, batch_argnums=(1, 2), keep_batch_dim=False)
    careful, fast = (
        jax.make_jaxpr(way)(make_params(loss), x, v).jaxpr for way in (function, function.fast_fun)
    )
    assert conditionals(careful) > 0
    assert conditionals(fast) == 0


@pytest.mark.parametrize(
    "make",
    [
        partial(dpkernels.clipped_grad, strategy="materialize"),
        partial(dpkernels.clipped_grad, pre_clipping_transform=lambda g: g),
        partial(dpkernels.clipped_grad, dtype=jnp.float32),
        dpkernels.clipped_fun,
    ],
    ids=["materialize", "transform", "dtype", "clipped_fun"],
)
def test_what_forms_every_gradient_has_one_way_alone(make):
    assert make(lambda p, x: jnp.sum(p * x), l2_clip_norm=1.0).fast_fun is None
