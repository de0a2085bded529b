"""Every model of `kernel_models` against a float64 loop over single examples."""

from functools import cache

import numpy as np
import pytest

from kernel_checks import STRATEGIES, assert_norms_close, assert_sums_close, make_sum, truth
from kernel_models import MODELS


@cache
def result(name, strategy):
    model = MODELS[name]
    function = make_sum(model, l2_clip_norm=truth(name).clip_norm, strategy=strategy)
    return function(*model.args)


def mark(name, *strategy):
    """By default only what has no near relative, with the strategy that is the default."""
    slow = MODELS[name].slow or strategy not in ((), ("auto",))
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


@pytest.mark.parametrize("name", [mark(name) for name, model in MODELS.items() if model.spreads])
def test_models_have_gradients_of_different_size(name):
    """So that the clip norm clips some examples and not others."""
    norms, clip_norm = truth(name).norms, truth(name).clip_norm
    assert min(norms) < 0.999 * clip_norm < 1.001 * clip_norm < max(norms)


def test_there_are_enough_models():
    assert sum(not model.slow for model in MODELS.values()) >= 60
