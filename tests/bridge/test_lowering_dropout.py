"""Dropout: a mask of its own for each example, the same in backward, none without randomness."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpbridge.lowering.table import Run
from lowering_checks import (
    BATCH,
    QUICKEST_TO_COMPILE,
    assert_same,
    compare,
    lower_function,
    normal,
)

RANDOM = {
    "dropout": lambda x: F.dropout(x, 0.3),
    "dropout in place": lambda x: F.dropout(x * 1, 0.3, inplace=True),
    "feature dropout": lambda x: F.dropout2d(x, 0.3),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.3, training=True),
    "feature alpha dropout": lambda x: F.feature_alpha_dropout(x, 0.3, training=True),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.3),
}
OFF = {
    "dropout": nn.Dropout().eval(),
    "dropout, p = 0": nn.Dropout(0.0),
    "dropout2d": nn.Dropout2d().eval(),
    "alpha dropout": nn.AlphaDropout().eval(),
    "feature alpha dropout": nn.FeatureAlphaDropout().eval(),
    "rrelu": nn.RReLU().eval(),
}


def drawing(function, x):
    """Returns what draws outputs of `function` for the examples of `x`, each with its own key."""
    lowered = lower_function(function, [x[0]])

    def one(key, randomness, row):
        return lowered(row, run=Run(key, randomness))[0]

    run = jax.jit(jax.vmap(one, in_axes=(0, None, 0)), compiler_options=QUICKEST_TO_COMPILE)

    def draw(seed=0, *, randomness=True):
        keys = jax.random.split(jax.random.key(seed), len(x))
        return np.asarray(run(keys, jnp.array(randomness), x.numpy()))

    return draw


def draw(function, x, **options):
    return drawing(function, x)(**options)


def ones(*shape):
    return torch.ones(BATCH, *shape)


@pytest.mark.parametrize("name", RANDOM)
def test_mask_differs_between_examples_and_steps(name):
    x = torch.randn(1, 2, 32, 2, 2).expand(BATCH, -1, -1, -1, -1).contiguous()
    draw = drawing(RANDOM[name], x)
    first, second = draw(0), draw(1)
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], second[0])
    np.testing.assert_array_equal(first, draw(0))


def test_two_dropouts_of_a_program_draw_different_masks():
    out = draw(lambda x: torch.stack([F.dropout(x, 0.5), F.dropout(x, 0.5)]), ones(100))
    assert not np.array_equal(out[0][0], out[0][1])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean(p):
    out = draw(lambda x: F.dropout(x, p), ones(100, 100))
    values = np.unique(out)
    np.testing.assert_allclose(values, [0, 1 / (1 - p)], rtol=1e-6)
    sigma = (p / (1 - p) / out.size) ** 0.5
    assert abs(out.mean() - 1) < 4 * sigma


def test_feature_dropout_drops_whole_channels():
    out = draw(lambda x: F.dropout2d(x, 0.5), ones(4, 16, 3, 3))
    assert np.all(out == out[..., :1, :1])
    assert 0.3 < (out[..., 0, 0] == 0).mean() < 0.7


def test_alpha_dropout_keeps_mean_and_variance():
    x = torch.randn(BATCH, 200, 200)
    out = draw(lambda x: F.alpha_dropout(x, 0.3, training=True), x)
    assert abs(out.mean()) < 0.02
    assert abs(out.var() - 1) < 0.02


def test_alpha_dropout_has_the_values_of_torch():
    torch.manual_seed(0)
    expected = F.alpha_dropout(torch.ones(100), 0.3, training=True).unique()
    out = draw(lambda x: F.alpha_dropout(x, 0.3, training=True), ones(100))
    np.testing.assert_allclose(np.unique(out), expected.numpy(), rtol=1e-5)


def test_rrelu_draws_slopes_between_its_bounds():
    out = -draw(lambda x: F.rrelu(x, 0.1, 0.3, training=True), -ones(1000))
    assert 0.1 <= out.min() < 0.11
    assert 0.29 < out.max() <= 0.3


def test_everything_is_dropped_at_p_of_1():
    x = torch.randn(BATCH, 2, 3, 4, 5)
    for function in (F.dropout, F.dropout2d, F.alpha_dropout):
        out = draw(lambda x, drop=function: drop(x, 1.0, training=True), x)
        assert not out.any()


def test_gradient_passes_through_the_mask_of_forward():
    lowered = lower_function(lambda x: F.dropout(x, 0.5), [torch.ones(200)])
    run_key = jax.random.key(0)

    def total(x):
        (out,) = lowered(x, run=Run(run_key, jnp.array(True)))
        return jnp.sum(out), out

    gradient, out = jax.grad(total, has_aux=True)(jnp.ones(200))
    np.testing.assert_array_equal(gradient, out)


@pytest.mark.parametrize("name", [*RANDOM, "rrelu"])
def test_without_randomness_is_torch_without_training(name):
    function = {**RANDOM, "rrelu": lambda x: F.rrelu(x, training=True)}[name]
    plain = {
        "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
        "rrelu": lambda x: F.rrelu(x, training=False),
    }.get(name, lambda x: x)
    x = torch.randn(BATCH, 2, 3, 4, 4)
    found = draw(function, x, randomness=False)
    expected = torch.stack([plain(row) for row in x])
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def results():
    return compare({name: (module, normal(1, 2, 3, 4)) for name, module in OFF.items()})


@pytest.mark.parametrize("name", OFF)
def test_off_is_the_identity(results, name):
    assert_same(results[name])


def test_dropout_that_is_off_returns_its_own_input():
    def write(x):
        x = x * 1
        F.dropout(x, 0.5, training=False).mul_(2)
        return x

    np.testing.assert_array_equal(draw(write, ones(2)), 2 * ones(2))
