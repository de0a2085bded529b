"""Gradients at residual connections, which XLA would compute anew at every layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import dpkernels
from dpkernels.tapped.graph import read
from dpkernels.tapped.once import gradient_once, mark_skips, once

WIDTH = 16
on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA does on a CPU")


def normalized(x):
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)


def residual_loss(params, x):
    for w in params:
        x = x + jnp.tanh(normalized(x) @ w) @ w.T
    return jnp.square(x).sum()


def make(depth, rows=16, batch_size=8):
    key = jax.random.key(depth)
    params = list(0.1 * jax.random.normal(key, (depth, WIDTH, WIDTH)))
    return params, jax.random.normal(key, (batch_size, rows, WIDTH))


def clipped(params, x):
    return dpkernels.clipped_grad(residual_loss, l2_clip_norm=1.0, batch_argnums=1)(params, x)


def operations(depth):
    """Operations of the compiled program, those that it has in several copies counted each time."""
    params, x = make(depth)
    return jax.jit(clipped).lower(params, x).compile().cost_analysis()["flops"]


@on_cpu
def test_a_layer_costs_the_same_at_any_depth():
    counts = [operations(depth) for depth in (4, 8, 12)]
    first, second = np.diff(counts)
    assert abs(second - first) < 0.01 * first


@on_cpu
@pytest.mark.parametrize(
    "function", [once, lambda x: jax.grad(lambda y: (gradient_once(y) * x).sum())(x)]
)
def test_floats_stay_what_they_are(function):
    x = np.array([0.0, -0.0, 1e-30, 3.7, -1e38, np.inf, -np.inf, np.nan], np.float32)
    for fun in (function, jax.jit(function), jax.jit(jax.vmap(function))):
        found = np.asarray(fun(x[None] if fun is not function else x)).ravel()
        np.testing.assert_array_equal(found.view(np.int32)[:-1], x.view(np.int32)[:-1])
        assert np.isnan(found[-1])


def skips_of(loss):
    params, x = make(2)
    program = jax.make_jaxpr(lambda a, b, x: loss([a, b], x))(*params, x[0])
    graph = read(
        program, num_trainable=2, num_differentiated=1, keeps_site=lambda eqn, weights: False
    )
    return mark_skips(graph.top)


def test_what_goes_past_a_layer_is_marked_and_nothing_else():
    # The input, and the first of two sums.
    assert len(skips_of(residual_loss).skips) == 2
    assert not skips_of(lambda params, x: (x @ params[0] + jnp.sin(x) @ params[1]).sum()).skips


def test_skips_inside_loops_are_marked():
    def loss(params, x):
        def turn(h, t):
            return h + jnp.tanh(normalized(h + t) @ params[0]), None

        return (lax.scan(turn, x[0] @ params[1], x)[0]).sum()

    level = skips_of(loss)
    (loop,) = [step for step in level.steps if hasattr(step, "body")]
    assert not level.skips
    assert loop.body.skips == {loop.body.inputs[0]}
