"""`clipped_vjp`: the clipped sum in two halves equals that of a float64 loop over examples."""

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpkernels import clipped_grad, clipped_vjp
from kernel_checks import REPRESENTATIVE, assert_sums_close, quick_jit, truth
from kernel_models import MODELS

RNG = np.random.default_rng(5)
WEIGHTS = {
    "first": jnp.asarray(RNG.normal(size=(4, 6)), jnp.float32),
    "scale": jnp.asarray(RNG.normal(size=6), jnp.float32),
    "second": jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32),
}
X = jnp.asarray(RNG.normal(size=(7, 4)), jnp.float32)
COTANGENTS = {
    "logits": jnp.asarray(RNG.normal(size=(7, 1, 3)), jnp.float32),
    "size": jnp.asarray(RNG.normal(size=(7,)), jnp.float32),
}


def network(weights, x):
    hidden = jnp.tanh(x @ weights["first"]) * weights["scale"]
    return {"logits": hidden @ weights["second"], "size": jnp.sum(weights["second"] ** 2)}


def inner_product(weights, x, cotangents):
    outputs = network(weights, x)
    # Of an example, which has an axis of 1 before its rows.
    return sum(jnp.sum(outputs[name] * cotangents[name][0]) for name in outputs)


def in_halves(fun, *args, cotangents, is_padding_example=None, **options):
    """Compiled each by itself, as a bridge between two frameworks does."""
    halves = clipped_vjp(fun, **options)
    outputs, kept = quick_jit(halves.forward)(*args)
    cotangents = cotangents(outputs) if callable(cotangents) else cotangents
    backward = quick_jit(halves.backward.bounded_sensitivity_fun)
    return outputs, backward(kept, cotangents, is_padding_example=is_padding_example)


def fits(model):
    options = {name for name, _ in model.options} - {"keep_batch_dim", "prng_argnum"}
    return model.argnums == 0 and not options


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in REPRESENTATIVE[::2] else [pytest.mark.slow])
        for name, model in MODELS.items()
        if fits(model)
    ],
)
def test_halves_equal_a_float64_loop(name):
    model = MODELS[name]
    options = {**model.clipped_grad_options}
    options.pop("argnums", None)
    _, total = in_halves(
        model.loss,
        *model.args,
        cotangents=jnp.ones_like,
        l2_clip_norm=truth(name).clip_norm,
        **options,
    )
    assert_sums_close(total, truth(name).clipped_sum(), rtol=model.rtol)


@pytest.mark.parametrize(
    "strategy",
    ["auto", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gram", "product"))],
)
def test_halves_equal_the_gradient_of_the_inner_product(strategy):
    expected = clipped_grad(inner_product, l2_clip_norm=2.0, batch_argnums=(1, 2))
    outputs, found = in_halves(
        network, WEIGHTS, X, cotangents=COTANGENTS, l2_clip_norm=2.0, strategy=strategy
    )
    assert outputs["logits"].shape == (7, 1, 3)
    for name, value in expected(WEIGHTS, X, COTANGENTS).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)


def test_forward_returns_the_functions_values():
    outputs, _ = in_halves(network, WEIGHTS, X, cotangents=COTANGENTS, l2_clip_norm=1.0)
    for i, x in enumerate(X):
        np.testing.assert_allclose(
            outputs["logits"][i], network(WEIGHTS, x[None])["logits"], rtol=1e-5
        )


def test_constants_of_forwards_trace_reach_backward():
    @jax.jit
    def forward(weights, x, frozen):
        halves = clipped_vjp(
            lambda w, row: (row @ frozen) @ w.T, l2_clip_norm=1.0, keep_batch_dim=False
        )
        return halves.forward(weights, x)

    weights = WEIGHTS["second"]
    outputs, kept = forward(weights, X, WEIGHTS["first"][:, :3])
    backward = clipped_vjp(lambda w, row: None, l2_clip_norm=1.0).backward
    found = jax.jit(backward.bounded_sensitivity_fun)(kept, jnp.ones_like(outputs))
    expected = clipped_grad(
        lambda w, row: jnp.sum((row @ WEIGHTS["first"][:, :3]) @ w.T),
        l2_clip_norm=1.0,
        keep_batch_dim=False,
    )
    np.testing.assert_allclose(found, expected(weights, X), rtol=1e-5, atol=1e-6)


def test_padding_and_examples_that_are_not_finite_contribute_zero():
    bad = X.at[2].set(jnp.nan).at[4].set(jnp.inf)
    is_padding = jnp.arange(7) == 6
    keep = np.array([0, 1, 3, 5])
    _, found = in_halves(
        network,
        WEIGHTS,
        bad,
        cotangents={**COTANGENTS, "size": jnp.where(jnp.isnan(bad[:, 0]), jnp.nan, 0.0)
                    .at[4].set(jnp.inf)},
        l2_clip_norm=1.0,
        is_padding_example=is_padding,
    )  # fmt: skip
    _, expected = in_halves(
        network,
        WEIGHTS,
        X[keep],
        cotangents={"logits": COTANGENTS["logits"][keep], "size": jnp.zeros(4)},
        l2_clip_norm=1.0,
    )
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)


def test_norm_of_one_example_is_at_most_the_bound():
    for scale in (1e-3, 1.0, 1e4):
        cotangents = jax.tree.map(lambda x, s=scale: s * x[:1], COTANGENTS)
        _, total = in_halves(network, WEIGHTS, X[:1], cotangents=cotangents, l2_clip_norm=0.7)
        norm = np.sqrt(sum(np.sum(np.float64(x) ** 2) for x in total.values()))
        assert norm <= 0.7 * (1 + 1e-5)


def test_sensitivity_is_that_of_clipped_grad():
    relation = dp_accounting.NeighboringRelation.REPLACE_ONE
    halves = clipped_vjp(network, l2_clip_norm=3.0, normalize_by=2.0)
    assert halves.backward.sensitivity(relation) == 3.0


@pytest.mark.slow
def test_normalize_by_divides():
    _, one = in_halves(network, WEIGHTS, X, cotangents=COTANGENTS, l2_clip_norm=1.0)
    _, two = in_halves(
        network, WEIGHTS, X, cotangents=COTANGENTS, l2_clip_norm=1.0, normalize_by=2.0
    )
    np.testing.assert_allclose(one["first"], 2 * two["first"], rtol=1e-6)


def test_cotangents_of_another_structure_are_refused():
    halves = clipped_vjp(network, l2_clip_norm=1.0)
    _, kept = halves.forward(WEIGHTS, X)
    with pytest.raises(ValueError, match="`cotangents` must have the structure of the outputs"):
        halves.backward(kept, {"logits": COTANGENTS["logits"]})


def test_outputs_that_have_no_gradient_are_refused():
    halves = clipped_vjp(lambda w, x: jnp.argmax(x), l2_clip_norm=1.0)
    with pytest.raises(TypeError, match="must be of a floating type, got int"):
        halves.forward(WEIGHTS, X)


@pytest.mark.slow
def test_auxiliary_outputs_come_back():
    halves = clipped_vjp(
        lambda w, x: (network(w, x), jnp.argmax(x)), has_aux=True, l2_clip_norm=1.0
    )
    _, aux, _ = halves.forward(WEIGHTS, X)
    np.testing.assert_array_equal(aux, jnp.argmax(X, axis=1))
