"""Every model of `kernel_models` against a float64 loop over single examples."""

from functools import cache

import jax
import numpy as np
import pytest

from kernel_checks import (
    REPRESENTATIVE,
    STRATEGIES,
    assert_norms_close,
    assert_sums_close,
    make_sum,
    rows,
    strategies,
    truth,
    with_batch,
)
from kernel_models import BATCH, MODELS


@cache
def clipped_sum(name, strategy):
    return make_sum(MODELS[name], l2_clip_norm=truth(name).clip_norm, strategy=strategy)


@cache
def result(name, strategy):
    return clipped_sum(name, strategy)(*MODELS[name].args)


# By default one in three of those that have no near relative: to compile all takes a minute.
QUICK = {
    name
    for index, name in enumerate(name for name, model in MODELS.items() if not model.slow)
    if index % 3 == 0
}


def mark(name, *strategy):
    """By default the quick ones, with the strategy that is the default."""
    slow = name not in QUICK or strategy not in ((), ("auto",))
    return pytest.param(name, *strategy, marks=[pytest.mark.slow] if slow else [])


everything = pytest.mark.parametrize(
    ("name", "strategy"), [mark(name, strategy) for name in MODELS for strategy in STRATEGIES]
)


@everything
def test_sum_equals_a_float64_loop(name, strategy):
    total, _ = result(name, strategy)
    assert_sums_close(total, truth(name).clipped_sum(), rtol=MODELS[name].rtol)


@everything
def test_grad_norms_equal_a_float64_loop(name, strategy):
    norms, clip_norm = truth(name).norms, truth(name).clip_norm
    assert_norms_close(
        result(name, strategy)[1].grad_norms, norms, clip_norm, rtol=MODELS[name].rtol
    )


@everything
def test_values_equal_a_float64_loop(name, strategy):
    rtol = MODELS[name].rtol
    np.testing.assert_allclose(
        result(name, strategy)[1].values, truth(name).values, rtol=rtol, atol=rtol
    )


@strategies("auto")
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_no_example_sees_another(name, strategy):
    """Nor its own place in the batch: norms and losses move with the example alone."""
    before = result(name, strategy)[1]

    # The last example into the place of the first, and nonsense into its own.
    def change(arg):
        def leaf(a):
            odd = np.nan if np.issubdtype(a.dtype, np.floating) else 10_000
            return np.concatenate([a[-1:], a[1:-1], np.full_like(a[:1], odd)])

        return jax.tree.map(leaf, arg)

    _, after = clipped_sum(name, strategy)(*with_batch(MODELS[name], change))
    expected = rows(before, np.array([BATCH - 1, *range(1, BATCH - 1)]))
    np.testing.assert_allclose(after.grad_norms[:-1], expected.grad_norms, rtol=1e-6)
    np.testing.assert_allclose(after.values[:-1], expected.values, rtol=1e-6)


@pytest.mark.parametrize("name", [mark(name) for name, model in MODELS.items() if model.spreads])
def test_models_have_gradients_of_different_size(name):
    """So that the clip norm clips some examples and not others."""
    norms, clip_norm = truth(name).norms, truth(name).clip_norm
    assert min(norms) < 0.999 * clip_norm < 1.001 * clip_norm < max(norms)


def test_there_are_enough_models():
    assert len(MODELS) >= 120
    assert len(QUICK) >= 30
