"""What changes no result, and what changes it in a known way, under every strategy."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from kernel_checks import (
    REPRESENTATIVE,
    Truth,
    assert_norms_close,
    assert_sums_close,
    clipped_grad,
    make_sum,
    quick_jit,
    rows,
    strategies,
    truth,
    with_batch,
)
from kernel_models import BATCH, MODELS, Model

every_strategy = strategies("auto")
every_representative = pytest.mark.parametrize("name", REPRESENTATIVE)


def mixed_loss(p, tokens, x, y):
    """An embedding, a convolution, a norm, a recurrence and a tied head in a dozen lines."""
    h = p["table"][tokens] + x
    layout = ("NWC", "WIO", "NWC")
    h = jnp.tanh(jax.lax.conv_general_dilated(h[None], p["conv"], (1,), "SAME", None, None, layout))
    h = h[0] * jax.lax.rsqrt(jnp.square(h[0]).mean(-1, keepdims=True) + 0.1) * p["norm"]["g"]

    def cell(state, row):
        state = jnp.tanh(row @ p["rnn"]["w"] + state @ p["rnn"]["u"] + p["rnn"]["b"])
        return state, state

    _, states = jax.lax.scan(cell, jnp.zeros(3, h.dtype), h)
    logits = jax.nn.log_softmax(states @ p["table"].T + p["head"])
    return -jnp.sum(logits * y)


def mixed_args(dtype=np.float32):
    rng = np.random.default_rng(0)
    params = {
        "table": rng.normal(size=(7, 3)),
        "conv": rng.normal(size=(3, 3, 3)),
        "norm": {"g": rng.normal(size=3)},
        "rnn": {"w": rng.normal(size=(3, 3)), "u": rng.normal(size=(3, 3)), "b": np.ones(3)},
        "head": rng.normal(size=7),
    }
    x, y = rng.normal(size=(BATCH, 4, 3)), rng.normal(size=(BATCH, 4, 7))
    tokens = rng.integers(0, 7, (BATCH, 4), dtype=np.int32)
    params, x, y = jax.tree.map(lambda a: np.asarray(a, dtype), (params, x, y))
    return params, tokens, x, y


def mixed(dtype=np.float32):
    return Model("mixed", mixed_loss, mixed_args(dtype), batch_argnums=(1, 2, 3))


@pytest.fixture(scope="module")
def mixed_truth():
    return Truth(mixed())


@cache
def mixed_sum(strategy):
    """Compiled once for what needs no other options: takes the clip norm and a mask as well."""

    def total(clip_norm, is_padding, *args):
        function = clipped_grad(
            mixed_loss,
            l2_clip_norm=clip_norm,
            batch_argnums=(1, 2, 3),
            keep_batch_dim=False,
            return_grad_norms=True,
            spmd_axis_name=None,
            strategy=strategy,
        )
        return function(*args, is_padding_example=is_padding)

    return quick_jit(total)


NO_PADDING = np.zeros(BATCH, bool)


def in_turn(*strategies):
    """Parametrizes each representative by one of the strategies, in turn; the others are slow."""
    marked = [
        pytest.param(name, strategy, marks=[] if (i + j) % 2 == 0 else [pytest.mark.slow])
        for i, name in enumerate(REPRESENTATIVE)
        for j, strategy in enumerate(strategies)
    ]
    return pytest.mark.parametrize(("name", "strategy"), marked)


@in_turn("gram", "product")
def test_strategies_agree(name, strategy):
    model, expected = MODELS[name], truth(name)
    function = make_sum(model, l2_clip_norm=expected.clip_norm, strategy=strategy)
    total, aux = function(*model.args)
    assert_sums_close(total, expected.clipped_sum())
    assert_norms_close(aux.grad_norms, expected.norms, expected.clip_norm)


@every_strategy
@pytest.mark.parametrize(
    "microbatch_size",
    [pytest.param(n, marks=[] if n == 2 else [pytest.mark.slow]) for n in (1, 2, 3, 4, 5, 9)],
)
def test_microbatch_size_changes_nothing(strategy, microbatch_size, mixed_truth):
    clip_norm = mixed_truth.clip_norm
    function = make_sum(
        mixed(), l2_clip_norm=clip_norm, strategy=strategy, microbatch_size=microbatch_size
    )
    total, aux = function(*mixed().args)
    assert_sums_close(total, mixed_truth.clipped_sum())
    assert_norms_close(aux.grad_norms, mixed_truth.norms, clip_norm)
    np.testing.assert_allclose(aux.values, mixed_truth.values, rtol=1e-5, atol=1e-5)


@every_strategy
def test_padding_examples_contribute_nothing(strategy, mixed_truth):
    padding = np.array([False, True, False, True, True])
    total, _ = mixed_sum(strategy)(mixed_truth.clip_norm, padding, *mixed().args)
    kept = [g for g, drop in zip(mixed_truth.gradients, padding, strict=True) if not drop]
    assert_sums_close(total, oracles.clipped_sum(kept, mixed_truth.clip_norm))


@every_strategy
def test_order_changes_nothing(strategy, mixed_truth):
    order = np.array([3, 0, 4, 1, 2])
    args = with_batch(mixed(), lambda arg: rows(arg, order))
    total, aux = mixed_sum(strategy)(mixed_truth.clip_norm, NO_PADDING, *args)
    assert_sums_close(total, mixed_truth.clipped_sum())
    assert_norms_close(aux.grad_norms, np.array(mixed_truth.norms)[order], mixed_truth.clip_norm)


@every_strategy
def test_a_traced_clip_norm_is_taken(strategy, mixed_truth):
    for clip_norm in (0.0, 0.3, mixed_truth.clip_norm, np.inf):
        total, _ = mixed_sum(strategy)(clip_norm, NO_PADDING, *mixed().args)
        assert_sums_close(total, mixed_truth.clipped_sum(clip_norm))


@pytest.mark.slow
@every_strategy
@every_representative
@pytest.mark.parametrize("microbatch_size", [2, 3])
def test_microbatches_with_padding_agree(name, strategy, microbatch_size):
    model, expected = MODELS[name], truth(name)
    function = make_sum(
        model,
        l2_clip_norm=expected.clip_norm,
        strategy=strategy,
        microbatch_size=microbatch_size,
    )
    padding = np.arange(BATCH) == 3
    total, _ = function(*model.args, is_padding_example=padding)
    kept = [gradient for i, gradient in enumerate(expected.gradients) if i != 3]
    assert_sums_close(total, oracles.clipped_sum(kept, expected.clip_norm))


@pytest.mark.slow
@every_strategy
def test_one_example_alone_is_clipped(strategy, mixed_truth):
    args = with_batch(mixed(), lambda arg: rows(arg, slice(1, 2)))
    clip_norm = mixed_truth.norms[1] / 2
    total, _ = make_sum(mixed(), l2_clip_norm=clip_norm, strategy=strategy)(*args)
    assert_sums_close(total, oracles.clipped_sum(mixed_truth.gradients[1:2], clip_norm))
    assert oracles.norm(oracles.by_path(total)) == pytest.approx(clip_norm, rel=1e-5)


@every_strategy
def test_layers_are_clipped_each_by_itself(strategy, mixed_truth):
    """Among them one subtree with a norm of its own, and one that shares a norm inside."""
    clip = {"table": 0.5, "conv": 0.1, "norm": {"g": 1e-3}, "rnn": 0.4, "head": 1e6}
    function = make_sum(mixed(), l2_clip_norm=clip, strategy=strategy)
    total, aux = function(*mixed().args)
    for name, bound in clip.items():
        parts = [
            {path: a for path, a in gradient.items() if path.startswith(f"['{name}']")}
            for gradient in mixed_truth.gradients
        ]
        found = {path: a for path, a in oracles.by_path(total).items() if path in parts[0]}
        bound = bound["g"] if name == "norm" else bound
        oracles.assert_close(found, oracles.clipped_sum(parts, bound), rtol=1e-5)
    assert_norms_close(aux.grad_norms, mixed_truth.norms, mixed_truth.clip_norm)


@every_strategy
def test_rescaled_and_normalized(strategy, mixed_truth):
    clip_norm = mixed_truth.clip_norm
    function = make_sum(
        mixed(),
        l2_clip_norm=clip_norm,
        strategy=strategy,
        rescale_to_unit_norm=True,
        normalize_by=8.0,
    )
    expected = mixed_truth.clipped_sum(rescale=True, normalize_by=8.0)
    assert_sums_close(function(*mixed().args)[0], expected)


@pytest.mark.parametrize("microbatch_size", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_pre_clipping_transform_comes_before_clipping(microbatch_size, mixed_truth):
    """A transform that is not linear, and returns another tree."""
    function = make_sum(
        mixed(),
        l2_clip_norm=0.5,
        pre_clipping_transform=lambda g: {"w": jnp.tanh(g["rnn"]["w"]), "head": 3.0 * g["head"]},
        microbatch_size=microbatch_size,
    )
    total, aux = function(*mixed().args)
    transformed = [
        {"['w']": np.tanh(g["['rnn']['w']"]), "['head']": 3 * g["['head']"]}
        for g in mixed_truth.gradients
    ]
    assert_sums_close(total, oracles.clipped_sum(transformed, 0.5))
    assert_norms_close(aux.grad_norms, mixed_truth.norms, mixed_truth.clip_norm)


@every_strategy
def test_float64_is_exact_to_float64(strategy, mixed_truth):
    with jax.enable_x64(True):
        model = mixed(np.float64)
        expected = Truth(model)
        function = make_sum(model, l2_clip_norm=expected.clip_norm, strategy=strategy)
        total, aux = function(*model.args)
        assert aux.grad_norms.dtype == np.float64
        assert_sums_close(total, expected.clipped_sum(), rtol=1e-12)
        assert_norms_close(aux.grad_norms, expected.norms, expected.clip_norm, rtol=1e-12)


@every_strategy
@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_half_precision_is_summed_in_float32(dtype, strategy):
    model = mixed(dtype)
    expected = Truth(model)
    function = make_sum(model, l2_clip_norm=expected.clip_norm, strategy=strategy)
    total, aux = function(*model.args)
    assert {leaf.dtype for leaf in jax.tree.leaves(total)} == {jnp.dtype(jnp.float32)}
    assert aux.grad_norms.dtype == jnp.float32
    assert_sums_close(total, expected.clipped_sum(), rtol=0.1 if dtype == jnp.bfloat16 else 0.01)


def half_precision_linear(w, x, v):
    return jnp.sum((x @ w) * v)


@every_strategy
def test_norms_of_half_precision_do_not_overflow(strategy):
    """Coordinates of 4000 or so, whose squares are beyond float16."""
    rng = np.random.default_rng(0)
    w = np.zeros((8, 8), np.float16)
    x, v = rng.normal(size=(2, BATCH, 6, 8)).astype(np.float16) * np.float16(50)
    function = clipped_grad(
        half_precision_linear,
        l2_clip_norm=1.0,
        batch_argnums=(1, 2),
        keep_batch_dim=False,
        return_grad_norms=True,
        strategy=strategy,
    )
    total, aux = quick_jit(function)(w, x, v)
    gradients = [{"": a.T @ b} for a, b in zip(x.astype(float), v.astype(float), strict=True)]
    np.testing.assert_allclose(
        aux.grad_norms, [oracles.norm(gradient) for gradient in gradients], rtol=2e-3
    )
    assert_sums_close(total, oracles.clipped_sum(gradients, 1.0), rtol=2e-3)


@every_strategy
def test_one_example_in_half_precision_keeps_the_bound(strategy):
    """Rounding of a gradient in half precision must not carry it beyond the clip norm."""
    rng = np.random.default_rng(1)
    w = np.zeros((40, 40), jnp.bfloat16)
    x, v = rng.normal(size=(2, 1, 6, 40)).astype(jnp.bfloat16)
    function = clipped_grad(
        half_precision_linear,
        l2_clip_norm=1.0,
        batch_argnums=(1, 2),
        keep_batch_dim=False,
        strategy=strategy,
    )
    assert np.linalg.norm(np.asarray(quick_jit(function)(w, x, v), np.float64)) <= 1 + 1e-5


@every_strategy
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_cast_to_the_dtype_and_summed_in_float32(dtype, strategy):
    model = MODELS["dense-rows_times_weight"]
    expected = truth(model.name)
    function = make_sum(model, l2_clip_norm=expected.clip_norm, strategy=strategy, dtype=dtype)
    total, _ = function(*model.args)
    assert total["w"].dtype == jnp.float32
    rtol = 1e-5 if dtype == jnp.float32 else 2e-2
    assert_sums_close(total, expected.clipped_sum(), rtol=rtol)


@every_strategy
def test_dtype_may_be_wider_than_the_parameters(strategy):
    with jax.enable_x64(True):
        model = MODELS["dense-rows_times_weight"]
        function = make_sum(model, l2_clip_norm=1.0, strategy=strategy, dtype=jnp.float64)
        total, _ = function(*model.args)
        assert total["w"].dtype == jnp.float64
        assert_sums_close(total, truth(model.name).clipped_sum(1.0))


@every_strategy
def test_a_frozen_argument_gets_no_gradient(strategy):
    """The same loss, once with all parameters and once with half of them held."""
    model = MODELS["derived-low_rank_unmerged"]
    held = dataclasses.replace(
        model,
        loss=lambda p, x, b: model.loss({"a": p["a"], "b": b}, x),
        args=({"a": model.args[0]["a"]}, model.args[1], model.args[0]["b"]),
    )
    total, _ = make_sum(held, l2_clip_norm=1.0, strategy=strategy)(*held.args)
    parts = [{"['a']": g["['a']"]} for g in truth(model.name).gradients]
    assert_sums_close(total, oracles.clipped_sum(parts, 1.0))
