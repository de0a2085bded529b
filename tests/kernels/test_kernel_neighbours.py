"""Datasets that differ in one example: how far the sum moves, whatever the example holds."""

from functools import cache

import dp_accounting
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from kernel_checks import clipped_grad, quick_jit, strategies
from kernel_linear import (
    EXTREMES,
    LINEAR,
    WIDE,
    WIDTH,
    cancelling_data,
    dense,
    make_data,
    make_params,
    opposed,
    recurrent,
    scaled,
    wide,
)
from kernel_models import BATCH, MODELS

Relation = dp_accounting.NeighboringRelation
every_strategy = strategies("auto")
every_linear = pytest.mark.parametrize("loss", LINEAR, ids=lambda loss: loss.__name__)


@cache
def compiled(loss, batch_argnums, strategy):
    """Compiled once: the clip norm and the mask are arguments."""

    def total(clip_norm, is_padding, *args):
        function = clipped_grad(
            loss,
            l2_clip_norm=clip_norm,
            batch_argnums=batch_argnums,
            keep_batch_dim=False,
            return_grad_norms=True,
            strategy=strategy,
        )
        return function(*args, is_padding_example=is_padding)

    return quick_jit(total)


def linear_sum(loss, x, v, *, clip_norm=1.0, padding=None, strategy):
    """The clipped sum as a dict by path, and the norms of the examples."""
    padding = np.zeros(BATCH, bool) if padding is None else padding
    function = compiled(loss, (1, 2), strategy)
    total, aux = function(np.float32(clip_norm), padding, make_params(loss), x, v)
    return oracles.by_path(total), np.asarray(aux.grad_norms, np.float64)


def linear_gradients(loss, x, v):
    """The gradients of a linear loss in float64, one example at a time."""
    with jax.enable_x64(True):
        params, x, v = jax.tree.map(np.float64, (make_params(loss), x, v))
        gradient = wide_gradient(loss)
        return [oracles.by_path(gradient(params, *row)) for row in zip(x, v, strict=True)]


@cache
def wide_gradient(loss):
    return quick_jit(jax.grad(loss))


def distance(one, other):
    return oracles.norm({path: one[path] - other[path] for path in one})


def sensitivity(clip_norm, relation=Relation.ADD_OR_REMOVE_ONE):
    """The claim that is tested, and what rounding may add to it."""
    function = clipped_grad(dense, l2_clip_norm=float(np.float32(clip_norm)))
    return function.sensitivity(relation) * (1 + 1e-5)


def assert_bounded(total, clip_norm, padding, index):
    """Removes, adds and replaces the example at `index`.

    Args:
        total: Called as `total(padding, replaced)`, returns the sum of one of the datasets.
        clip_norm: That of the sum.
        padding: A mask of the other examples.
        index: Which example goes.
    """
    absent = np.array(padding) | (np.arange(BATCH) == index)
    present = absent & (np.arange(BATCH) != index)
    without, before, after = total(absent, False), total(present, False), total(present, True)
    assert distance(before, without) <= sensitivity(clip_norm)
    assert distance(after, without) <= sensitivity(clip_norm)
    assert distance(before, after) <= sensitivity(clip_norm, Relation.REPLACE_ONE)


sizes = st.sampled_from([0.0, 1e-12, 1e-6, 1.0, 1e3, 1e6, -1e6, 1e12, np.nan, np.inf])
masks = st.lists(st.booleans(), min_size=BATCH, max_size=BATCH)
indices = st.integers(0, BATCH - 1)
clip_norms = st.sampled_from([1e-6, 0.1, 1.0, 1e4])


@every_strategy
@every_linear
def test_sum_moves_by_at_most_its_sensitivity(loss, strategy):
    @settings(max_examples=15)
    @given(masks, indices, sizes, sizes, st.sampled_from([1.0, 1e6]), clip_norms)
    def check(padding, index, x_size, v_size, everyone, clip_norm):
        x, v = make_data()
        x *= np.float32(everyone)
        other = x.copy()
        with np.errstate(invalid="ignore"):
            x[index] *= np.float32(x_size)
            other[index] = v[index] * np.float32(v_size)

        def total(mask, replaced):
            rows = other if replaced else x
            options = {"clip_norm": clip_norm, "padding": mask, "strategy": strategy}
            return linear_sum(loss, rows, v, **options)[0]

        assert_bounded(total, clip_norm, padding, index)

    check()


NETWORKS = ["dense-three_layers", "conv-patch_embedding", "scaling-layer_norm", "loops-lstm"]


@strategies("auto")
@pytest.mark.parametrize(
    "name", [NETWORKS[0], *(pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS[1:])]
)
def test_sum_of_a_network_moves_by_at_most_its_sensitivity(name, strategy):
    """With inputs and with parameters that are a million times as large."""
    model = MODELS[name]
    function = compiled(model.loss, model.batch_argnums, strategy)

    @settings(max_examples=15)
    @given(masks, indices, sizes, sizes, st.sampled_from([1.0, 1e3, 1e6, 1e12]), clip_norms)
    def check(padding, index, size, other_size, params_size, clip_norm):
        params = jax.tree.map(lambda a: a * np.float32(params_size), model.args[0])

        def total(mask, replaced):
            factor = np.ones(BATCH, np.float32)
            factor[index] = other_size if replaced else size
            with np.errstate(invalid="ignore"):
                batch = [(arg.T * factor).T for arg in model.args[1:]]
            return oracles.by_path(function(np.float32(clip_norm), mask, params, *batch)[0])

        assert_bounded(total, clip_norm, padding, index)

    check()


@every_strategy
@every_linear
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_example_that_is_not_finite_contributes_zero(loss, strategy, bad):
    x, v = make_data()
    absent = np.arange(BATCH) == 2
    expected, norms = linear_sum(loss, x, v, padding=absent, strategy=strategy)
    # In the first row, which is all that some of these losses see.
    x[2, 0, 1] = bad
    found, found_norms = linear_sum(loss, x, v, strategy=strategy)
    assert distance(found, expected) <= 1e-6 * oracles.norm(expected)
    np.testing.assert_allclose(found_norms[~absent], norms[~absent], rtol=1e-6)


@every_strategy
@every_linear
def test_a_cotangent_that_is_not_finite_contributes_zero(loss, strategy):
    x, v = make_data()
    expected, _ = linear_sum(loss, x, v, padding=np.arange(BATCH) == 2, strategy=strategy)
    v[2, 0, 1] = np.nan
    found, _ = linear_sum(loss, x, v, strategy=strategy)
    assert distance(found, expected) <= 1e-6 * oracles.norm(expected)


@every_strategy
@every_linear
def test_nothing_but_examples_that_are_not_finite_is_exactly_zero(loss, strategy):
    x, v = make_data()
    found, _ = linear_sum(loss, x * np.float32(np.nan), v, strategy=strategy)
    assert all(not array.any() for array in found.values())


@every_strategy
@every_linear
def test_padding_is_exactly_zero_whatever_it_holds(loss, strategy):
    """Beside others it may pick how these are computed, and so their last bits, but no more."""
    x, v = make_data()
    padding = np.array([True, True, True, False, True])
    expected, _ = linear_sum(loss, x, v, padding=padding, strategy=strategy)
    for garbage in (0, np.nan, np.inf, 1e38):
        x[padding] = garbage
        v[padding] = garbage
        found, _ = linear_sum(loss, x, v, padding=padding, strategy=strategy)
        assert distance(found, expected) <= 2e-6 * oracles.norm(expected)
        found, _ = linear_sum(loss, x, v, padding=np.ones(BATCH, bool), strategy=strategy)
        assert all(not array.any() for array in found.values())


@every_strategy
@every_linear
@pytest.mark.parametrize(("x_size", "v_size"), EXTREMES)
def test_norms_beyond_the_range_of_squares_are_clipped(loss, strategy, x_size, v_size):
    """One example of extreme size among others: reported as it is, clipped and not dropped."""
    x, v = make_data()
    x[1] *= np.float32(x_size)
    v[1] *= np.float32(v_size)
    gradients = linear_gradients(loss, x, v)
    true_norms = [oracles.norm(gradient) for gradient in gradients]
    clip_norm = min(1.0, true_norms[1] / 2)
    found, norms = linear_sum(loss, x, v, clip_norm=clip_norm, strategy=strategy)
    np.testing.assert_allclose(norms, true_norms, rtol=1e-5)
    expected = oracles.clipped_sum(gradients, clip_norm)
    assert distance(found, expected) <= 1e-5 * oracles.norm(expected)


@every_strategy
@pytest.mark.parametrize("loss", [dense, wide, recurrent, scaled], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("rest", [0.0, 1e-6, 1e-4, 1e-2])
def test_rows_that_cancel_keep_the_bound(loss, strategy, size, rest):
    """A norm that is a small difference of large terms: rounding must not hide it.

    Neither from the norm, nor, where the sum is computed another way than the norm, from the sum.
    """
    alone = np.arange(BATCH) != 1
    for seed in range(4):
        x, v = cancelling_data(size, rest, seed, WIDE if loss is wide else WIDTH)
        for clip_norm in (1e-3, 1.0):
            found, _ = linear_sum(loss, x, v, clip_norm=clip_norm, padding=alone, strategy=strategy)
            assert oracles.norm(found) <= sensitivity(clip_norm)


@every_strategy
def test_rows_that_cancel_are_not_dropped(strategy):
    """A squared norm that rounding makes negative is no reason to call the example broken."""
    x, v = cancelling_data(1.0, 1e-2, 0)
    found, norms = linear_sum(dense, x, v, clip_norm=1e3, strategy=strategy)
    gradients = linear_gradients(dense, x, v)
    np.testing.assert_allclose(norms, [oracles.norm(g) for g in gradients], rtol=1e-3)
    assert distance(found, oracles.clipped_sum(gradients, 1e3)) <= 1e-5 * oracles.norm(found)


@every_strategy
@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
def test_uses_that_cancel_keep_the_bound(strategy, size):
    x, v = make_data()
    function = compiled(opposed, (1, 2), strategy)
    params = {"w": np.zeros((WIDTH, WIDTH), np.float32)}
    for i in range(BATCH):
        alone = np.arange(BATCH) != i
        total, _ = function(np.float32(1e-4), alone, params, x * np.float32(size), v)
        assert oracles.norm(oracles.by_path(total)) <= sensitivity(1e-4)


@every_strategy
def test_tokens_of_padding_may_be_out_of_range(strategy):
    model = MODELS["sharing-tied_embedding_with_a_layer_between"]
    function = compiled(model.loss, model.batch_argnums, strategy)
    params, tokens = model.args
    padding = np.arange(BATCH) >= 3
    expected, _ = function(np.float32(0.1), padding, params, tokens)
    tokens = np.where(padding[:, None], np.int32(10**9), tokens)
    found, _ = function(np.float32(0.1), padding, params, tokens)
    assert distance(oracles.by_path(found), oracles.by_path(expected)) == 0
