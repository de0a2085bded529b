"""Scale-then-privatize: which scale, wherever the second moment is kept, never an overflow."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpkernels import clipped_fun, clipped_grad
from dpkernels.optimizers import (
    AugmentedGradientTransformation,
    as_augmented_optimizer,
    scale_then_privatize,
)

EPS = 1e-3
PARAMS = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(3, np.float32)}
GRADS = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3) - 2,
    "b": np.array([0.5, -4.0, 0.0], np.float32),
}
CLIP = 2.0


@pytest.fixture
def loose():
    """Optax corrects biases with mixed types."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def filled(base, **options):
    """An optimizer, and a state of it in which every moment is another number."""
    optimizer = scale_then_privatize(base, **{"eps": EPS, **options})
    rng = np.random.default_rng(0)

    def fill(leaf):
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return rng.uniform(0.01, 1, leaf.shape).astype(np.float32) if is_float else leaf

    return optimizer, jax.tree.map(fill, optimizer.init(PARAMS))


def scales(optimizer, state, params=PARAMS):
    return optimizer.pre_clipping_transform(state)(jax.tree.map(np.ones_like, params))


def expected_scales(v, eps=EPS, eps_root=0.0):
    return jax.tree.map(
        lambda x: 1 / (np.sqrt(np.asarray(x, np.float64) + eps_root) + eps), jax.device_get(v)
    )


def assert_close(actual, expected, rtol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol), actual, expected)


ADAPTIVE = {
    "adam": (optax.adam(0.1), "nu"),
    "adamw": (optax.adamw(0.1), "nu"),
    "nadam": (optax.nadam(0.1), "nu"),
    "lamb": (optax.lamb(0.1), "nu"),
    "yogi": (optax.yogi(0.1), "nu"),
    "adabelief": (optax.adabelief(0.1), "nu"),
    "amsgrad": (optax.amsgrad(0.1), "nu_max"),
    "rmsprop": (optax.rmsprop(0.1), "nu"),
    "rmsprop-corrected": (optax.rmsprop(0.1, bias_correction=True), "nu"),
    "adagrad": (optax.adagrad(0.1), "sum_of_squares"),
}


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_scale_is_that_of_the_second_moment(name):
    base, field = ADAPTIVE[name]
    optimizer, state = filled(base, eps_root=0.01)
    v = optax.tree.get(state, field)
    assert_close(scales(optimizer, state), expected_scales(v, eps_root=0.01))


def test_the_scale_before_the_first_step_is_one_over_eps():
    optimizer = scale_then_privatize(optax.rmsprop(0.1))
    assert_close(
        scales(optimizer, optimizer.init(PARAMS)), jax.tree.map(lambda x: 1e8 + 0 * x, PARAMS)
    )


def test_inverse_takes_back():
    optimizer, state = filled(optax.rmsprop(0.1))
    transform = optimizer.pre_clipping_transform(state)
    assert_close(transform(transform(GRADS), inverse=True), GRADS)


def test_inverse_keeps_the_type():
    optimizer, state = filled(optax.rmsprop(0.1))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), GRADS)
    back = optimizer.pre_clipping_transform(state)(half, inverse=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {jnp.dtype(jnp.bfloat16)}


def adam_oracle(gradients, steps, learning_rate=0.1, b1=0.9, b2=0.999, eps_adam=1e-8):
    """Algorithm 8 on one vector in float64: scale by the v before, clip, sum, scale back, Adam."""
    params = mean = v = np.zeros(gradients.shape[-1])
    path = []
    for step in range(1, steps + 1):
        s = 1 / (np.sqrt(v) + EPS)
        scaled = gradients[step - 1] * s
        norms = np.linalg.norm(scaled, axis=1, keepdims=True)
        noised = (scaled * np.minimum(1, CLIP / norms)).sum(0) / s
        mean, v = b1 * mean + (1 - b1) * noised, b2 * v + (1 - b2) * noised**2
        corrected = mean / (1 - b1**step) / (np.sqrt(v / (1 - b2**step)) + eps_adam)
        params = params - learning_rate * corrected
        path.append(params)
    return np.stack(path)


@pytest.mark.usefixtures("loose")
def test_steps_are_those_of_algorithm_8():
    gradients = np.random.default_rng(0).normal(size=(5, 4, 6)) * 10.0 ** np.arange(-3, 3)
    optimizer = scale_then_privatize(optax.adam(0.1), eps=EPS)

    def step(carry, batch):
        params, state = carry
        clipped = clipped_fun(
            optimizer.pre_clipping_transform(state), keep_batch_dim=False, l2_clip_norm=CLIP
        )
        updates, state = optimizer.update(clipped(batch), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    start = (jnp.zeros(6), optimizer.init(jnp.zeros(6)))
    _, path = jax.lax.scan(step, start, jnp.asarray(gradients, jnp.float32))
    np.testing.assert_allclose(path, adam_oracle(gradients, 5), rtol=1e-4)


WRAPPERS = {
    "after": lambda base: optax.chain(optax.clip(100.0), base),
    "between": lambda base: optax.chain(
        optax.clip(100.0), optax.trace(0.0), base, optax.scale(0.5)
    ),
    "nested": lambda base: optax.chain(
        optax.chain(optax.identity(), optax.chain(base)), optax.scale(1)
    ),
    "named": lambda base: optax.named_chain(("clip", optax.clip(100.0)), ("adaptive", base)),
    "masked": lambda base: optax.masked(base, True),
    "after-masked": lambda base: optax.chain(
        optax.masked(optax.clip(100.0), {"w": True, "b": False}), base
    ),
    "if-finite": lambda base: optax.apply_if_finite(base, 3),
    "partition": lambda base: optax.partition({"all": base}, "all"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_second_moment_is_found_inside(name):
    optimizer, state = filled(WRAPPERS[name](optax.scale_by_rms()))
    assert_close(scales(optimizer, state), expected_scales(optax.tree.get(state, "nu")))


@pytest.mark.usefixtures("loose")
def test_the_second_moment_is_found_behind_injected_hyperparameters():
    optimizer, state = filled(
        optax.inject_hyperparams(optax.adam)(learning_rate=lambda step: 0.1 / (1 + step))
    )
    assert_close(scales(optimizer, state), expected_scales(optax.tree.get(state, "nu")))


@pytest.mark.parametrize("mask", [{"w": True, "b": False}, lambda _: {"w": True, "b": False}])
def test_masked_parameters_are_not_scaled(mask):
    optimizer, state = filled(optax.masked(optax.scale_by_rms(), mask))
    actual = scales(optimizer, state)
    assert_close(actual["w"], expected_scales(optax.tree.get(state, "nu")["w"]))
    assert_close(actual["b"], np.ones(3))
    assert_close(optimizer.pre_clipping_transform(state)(actual, inverse=True)["b"], np.ones(3))


def test_a_mask_may_stand_for_a_subtree():
    params = {"trunk": PARAMS, "head": jnp.zeros(2)}
    base = optax.masked(optax.scale_by_rms(), {"trunk": False, "head": True})
    optimizer = scale_then_privatize(base, eps=0.5)
    actual = scales(optimizer, optimizer.init(params), params)
    assert_close(actual, {"trunk": jax.tree.map(np.ones_like, PARAMS), "head": np.full(2, 2.0)})


def test_partitions_scale_each_by_its_own():
    optimizer, state = filled(
        optax.partition(
            {"rms": optax.rmsprop(0.1), "ada": optax.adagrad(0.1)}, {"w": "rms", "b": "ada"}
        )
    )
    v = {
        "w": optax.tree.get(state, "nu")["w"],
        "b": optax.tree.get(state, "sum_of_squares")["b"],
    }
    assert_close(scales(optimizer, state), expected_scales(v))


def test_a_partition_without_adaptive_part_is_not_scaled():
    optimizer, state = filled(
        optax.partition(
            {"rms": optax.rmsprop(0.1), "sgd": optax.sgd(0.1)}, {"w": "rms", "b": "sgd"}
        )
    )
    actual = scales(optimizer, state)
    assert_close(actual["w"], expected_scales(optax.tree.get(state, "nu")["w"]))
    assert_close(actual["b"], np.ones(3))


@pytest.mark.usefixtures("loose")
def test_multi_steps_scales_all_its_parts_alike():
    optimizer = scale_then_privatize(optax.MultiSteps(optax.rmsprop(0.1), 2), eps=EPS)
    update = jax.jit(optimizer.update)
    state = optimizer.init(PARAMS)
    before = scales(optimizer, state)
    half = jax.tree.map(lambda g, s: g * s, GRADS, before)  # What a noised sum of GRADS would be.
    updates, state = update(half, state)
    assert_close(updates, jax.tree.map(np.zeros_like, PARAMS))
    assert_close(scales(optimizer, state), before, rtol=0)
    updates, state = update(half, state)
    plain = optax.rmsprop(0.1)
    expected, plain_state = plain.update(GRADS, plain.init(PARAMS))
    assert_close(updates, expected, rtol=1e-5)
    v = optax.tree.get(plain_state, "nu")
    assert_close(scales(optimizer, state), expected_scales(v), rtol=1e-5)


def test_a_second_moment_may_be_extracted():
    def variance(state):
        return jax.tree.map(lambda nu, mu: np.abs(nu - mu**2), state.nu, state.mu)

    optimizer, state = filled(
        optax.scale_by_stddev(), extract_preconditioner_from_state_fn=variance
    )
    assert_close(scales(optimizer, state), expected_scales(variance(state)), rtol=1e-5)


def test_a_second_moment_that_rounds_below_zero_counts_as_zero():
    optimizer = scale_then_privatize(
        optax.sgd(0.1), eps=0.5, extract_preconditioner_from_state_fn=lambda _: jnp.full(2, -1e-9)
    )
    assert_close(scales(optimizer, (), jnp.zeros(2)), np.full(2, 2.0))


def test_an_extracted_second_moment_may_be_one_of_each_layer():
    def per_layer(state):
        return state[0].nu

    optimizer, state = filled(optax.novograd(0.1), extract_preconditioner_from_state_fn=per_layer)
    expected = jax.tree.map(lambda s, p: np.full(p.shape, s), expected_scales(state[0].nu), PARAMS)
    assert_close(scales(optimizer, state), expected)


class Named(NamedTuple):
    mu: jax.Array
    nu: jax.Array


def test_parameters_called_nu_are_not_taken_for_a_second_moment():
    params = Named(jnp.zeros(2), jnp.zeros(3))
    with pytest.raises(ValueError, match="must keep a second moment"):
        scale_then_privatize(optax.sgd(0.1, momentum=0.9)).init(params)
    optimizer = scale_then_privatize(optax.rmsprop(0.1), eps=0.5)
    assert_close(
        scales(optimizer, optimizer.init(params), params), Named(np.full(2, 2.0), np.full(3, 2.0))
    )


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), optax.lion(0.1), optax.adafactor(0.1)])
def test_an_optimizer_without_second_moment_is_refused(optimizer):
    with pytest.raises(ValueError, match="without any of ScaleByAdamState"):
        scale_then_privatize(optimizer).init(PARAMS)


def test_several_second_moments_of_one_parameter_are_refused():
    base = optax.chain(optax.masked(optax.scale_by_rms(), {"w": False, "b": True}), optax.adam(0.1))
    with pytest.raises(ValueError, match=r"got 2 of \['b'\], in its state at \[0\].*, \[1\]\[0\]"):
        scale_then_privatize(base).init(PARAMS)


@pytest.mark.parametrize(
    ("extract", "message"),
    [
        (lambda _: {"w": jnp.zeros((2, 3))}, "structure and the shapes"),
        (lambda _: {"w": jnp.zeros((2, 3)), "b": jnp.zeros(4)}, r"shape \(4,\) for one of \(3,\)"),
    ],
)
def test_a_second_moment_of_another_shape_is_refused(extract, message):
    optimizer = scale_then_privatize(optax.sgd(0.1), extract_preconditioner_from_state_fn=extract)
    with pytest.raises(ValueError, match=message):
        optimizer.init(PARAMS)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"eps": -1.0}, "eps"), ({"eps": 0.0}, "eps"), ({"eps_root": float("nan")}, "eps_root")],
)
def test_scale_then_privatize_refuses_a_value(options, name):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        scale_then_privatize(optax.adam(0.1), **options)


@pytest.mark.parametrize("optimizer", [0.1, scale_then_privatize(optax.adam(0.1)), optax.adam])
def test_scale_then_privatize_refuses_what_is_no_optimizer(optimizer):
    with pytest.raises(TypeError, match="`base_optimizer` must be an optax gradient"):
        scale_then_privatize(optimizer)


def test_as_augmented_optimizer_changes_nothing():
    plain = optax.sgd(0.1)
    optimizer = as_augmented_optimizer(plain)
    assert isinstance(optimizer, AugmentedGradientTransformation)
    assert as_augmented_optimizer(optimizer) is optimizer
    state = optimizer.init(PARAMS)
    transform = optimizer.pre_clipping_transform(state)
    assert transform(GRADS) is GRADS
    assert transform(GRADS, inverse=True) is GRADS
    assert optimizer.update is plain.update


def test_as_augmented_optimizer_refuses_what_is_no_optimizer():
    with pytest.raises(TypeError, match="`optimizer` must be an optax gradient"):
        as_augmented_optimizer(None)


# Numbers at the edge of their types.


@functools.partial(jax.jit, static_argnames="l2_clip_norm")
def clipped_by(v, gradients, l2_clip_norm=1.0):
    """The sum of `gradients` clipped in the space of second moments `v`."""
    optimizer = scale_then_privatize(
        optax.sgd(0.1), extract_preconditioner_from_state_fn=lambda state: state
    )
    transform = optimizer.pre_clipping_transform(v)
    return clipped_fun(transform, keep_batch_dim=False, l2_clip_norm=l2_clip_norm)(gradients)


def clipped_oracle(v, gradients, l2_clip_norm=1.0, eps=1e-8):
    v, gradients = np.asarray(v, np.float64), np.asarray(gradients, np.float64)
    scaled = gradients / (np.sqrt(v) + eps)
    norms = np.linalg.norm(scaled, axis=1, keepdims=True)
    return (scaled * np.minimum(1, l2_clip_norm / norms)).sum(0)


@pytest.mark.parametrize("exponent", [-38, -30, -12, -8, 0, 8, 19, 21, 22, 28, 30, 38])
def test_a_gradient_of_any_size_is_clipped_and_not_dropped(exponent):
    # The scaled gradient ends at 1e46; float32 at 3e38.
    v = jnp.array([0.0, 0.0, 1e-10, 1.0, 1e30])
    gradients = (np.array([[3.0, -2.0, 1.0, 1.0, 1.0]]) * 10.0**exponent).astype(np.float32)
    np.testing.assert_allclose(
        clipped_by(v, jnp.asarray(gradients)), clipped_oracle(v, gradients), rtol=2e-6, atol=1e-30
    )


def test_a_large_coordinate_of_small_scale_does_not_shrink_the_others():
    # The product of the largest scale and the largest coordinate is 1e38, but 1 the largest of
    # the products: what decides is the products.
    v, gradients = jnp.array([0.0, 1e36]), jnp.array([[1e-9, 1e17]])
    np.testing.assert_allclose(clipped_by(v, gradients), clipped_oracle(v, gradients), rtol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_gradients_in_half_precision_do_not_overflow(dtype):
    gradients = jnp.array([[3.0, -4.0]], dtype)
    actual = clipped_by(jnp.zeros(2, dtype), gradients)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, [0.6, -0.8], rtol=1e-6)


@pytest.mark.parametrize("v", [0.0, 1e-45, 1e-38, 3e38, float("inf")])
@pytest.mark.parametrize("eps", [1e-8, 1e-30, 1e-300])
def test_any_second_moment_has_a_finite_scale_and_inverse(v, eps):
    optimizer = scale_then_privatize(
        optax.sgd(0.1), eps=eps, extract_preconditioner_from_state_fn=lambda state: jnp.full(2, v)
    )
    transform = optimizer.pre_clipping_transform(())
    gradient = jnp.array([1.0, -2.0])
    scaled = transform(gradient)
    assert jnp.isfinite(scaled).all()
    assert (jnp.sign(scaled) == jnp.sign(gradient)).all()
    np.testing.assert_allclose(transform(scaled, inverse=True), gradient, rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_non_finite_gradient_contributes_zero(bad):
    gradients = jnp.array([[3.0, 4.0], [bad, 1.0]])
    np.testing.assert_allclose(clipped_by(jnp.zeros(2), gradients), [0.6, 0.8], rtol=1e-6)


def test_a_scaled_gradient_in_float64_stays_in_float64():
    with jax.enable_x64(True):
        v = jnp.array([0.25, 1e-6], jnp.float64)
        gradients = jnp.array([[1.0, 1e-3]], jnp.float64)
        actual = clipped_by(v, gradients, l2_clip_norm=10.0)
        assert actual.dtype == jnp.float64
        np.testing.assert_allclose(
            actual, clipped_oracle(v, gradients, l2_clip_norm=10.0), rtol=1e-14
        )


def test_one_example_moves_the_sum_by_no_more_than_the_sensitivity():
    def loss(w, x):
        return jnp.sum(w * x)

    rng = np.random.default_rng(0)
    sizes = 10.0 ** rng.uniform(-20, 38, (12, 1))
    batch = jnp.asarray(rng.uniform(-1, 1, (12, 5)) * sizes, jnp.float32)
    state = (jnp.asarray(10.0 ** rng.uniform(-20, 20, 5), jnp.float32),)
    optimizer = scale_then_privatize(
        optax.sgd(0.1), extract_preconditioner_from_state_fn=lambda state: state[0]
    )
    total = clipped_grad(
        loss, l2_clip_norm=CLIP, pre_clipping_transform=optimizer.pre_clipping_transform(state)
    )
    without = jax.jit(lambda mask: total(jnp.zeros(5), batch, is_padding_example=mask))
    whole = np.asarray(without(np.zeros(12, bool)), np.float64)
    moves = [np.linalg.norm(whole - np.asarray(without(np.arange(12) == i))) for i in range(12)]
    assert max(moves) <= total.sensitivity() * (1 + 1e-5)
    assert np.sum(np.array(moves) > 0.99 * CLIP) > 6  # Large ones are clipped, not dropped.
