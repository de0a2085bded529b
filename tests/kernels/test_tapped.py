"""What the tapped kernel computes and, above all, what it does not."""

import jax
import jax.extend.core as jexc
import jax.numpy as jnp
import numpy as np
import pytest

import dpkernels
from dpkernels.tapped import step

BATCH = 6


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def two_layers(params, x):
    return jnp.sum(jnp.tanh(x @ params["first"] + params["bias"]) @ params["second"])


TWO_LAYERS = {"first": normal(5, 7), "bias": normal(7), "second": normal(7, 3)}


def equations(jaxpr):
    """All equations, those of inner programs included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                if isinstance(inner, jexc.ClosedJaxpr):
                    yield from equations(inner.jaxpr)
                elif isinstance(inner, jexc.Jaxpr):
                    yield from equations(inner)


def largest(function, *args):
    """The size of the largest array in the program."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return max(var.aval.size for eqn in equations(jaxpr) for var in eqn.outvars)


def count(primitive, function, *args):
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return sum(eqn.primitive is primitive for eqn in equations(jaxpr))


def test_dense_layers_form_no_gradient_per_example():
    function = dpkernels.clipped_grad(two_layers, l2_clip_norm=1.0, keep_batch_dim=False)
    params = {"first": normal(40, 50), "bias": normal(50), "second": normal(50, 3)}
    assert largest(function, params, normal(BATCH, 40)) < BATCH * 40 * 50


def test_embeddings_form_no_table_per_example():
    def loss(table, tokens):
        return jnp.sum(jnp.tanh(table[tokens]))

    table, tokens = normal(500, 8), jnp.arange(BATCH * 10).reshape(BATCH, 10)
    function = dpkernels.clipped_grad(loss, l2_clip_norm=1.0)
    assert largest(function, table, tokens) < BATCH * table.size


def test_recurrence_forms_no_gradient_per_turn():
    turns, width = 20, 12

    def loss(weight, x):
        def turn(state, x):
            return jnp.tanh(state @ weight + x), None

        return jnp.sum(jax.lax.scan(turn, jnp.zeros(width), x)[0])

    function = dpkernels.clipped_grad(loss, l2_clip_norm=1.0, keep_batch_dim=False)
    args = normal(width, width), normal(BATCH, turns, width)
    assert largest(function, *args) < BATCH * turns * width**2


def test_recurrence_is_not_unrolled():
    def loss(weight, x):
        turn = lambda state, x: (jnp.tanh(state @ weight + x), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(turn, jnp.zeros(3), x)[0])

    def dots(turns):
        function = dpkernels.clipped_grad(loss, l2_clip_norm=1.0, keep_batch_dim=False)
        args = normal(3, 3), normal(BATCH, turns, 3)
        return count(jax.extend.core.primitives.dot_general_p, function, *args)

    assert dots(50) == dots(5)


def test_frozen_parameters_cost_nothing():
    """Those before the first trainable one need no gradient, so only the forward pass is left."""

    def loss(trainable, frozen, x):
        return two_layers({**frozen, **trainable}, x)

    frozen = {name: TWO_LAYERS[name] for name in ("first", "bias")}
    function = dpkernels.clipped_grad(loss, l2_clip_norm=1.0, batch_argnums=2, keep_batch_dim=False)
    args = {"second": TWO_LAYERS["second"]}, frozen, normal(BATCH, 5)
    report = function.explain(*args)
    assert [row.parameters for row in report.rows] == [("['second']",)]
    # Forward: two products. Norms: one with ones a side. Clipped sum: one, fast and carefully.
    assert count(jax.extend.core.primitives.dot_general_p, function, *args) == 6


def test_unused_parameters_get_zeros():
    params = {**TWO_LAYERS, "unused": normal(4, 4)}
    function = dpkernels.clipped_grad(two_layers, l2_clip_norm=1.0, keep_batch_dim=False)
    assert not jax.jit(function)(params, normal(BATCH, 5))["unused"].any()
    assert function.explain(params, normal(BATCH, 5)).unused == ("['unused']",)


def predicate(monkeypatch, loss, params, x):
    """Whether the norms of a batch, and of blocks that may lose digits, were taken for safe."""
    seen = []
    cond = step.lax.cond

    def record(is_safe, *args):
        if not isinstance(is_safe, jax.core.Tracer):
            seen.append(bool(is_safe))
        return cond(is_safe, *args)

    monkeypatch.setattr(step.lax, "cond", record)
    dpkernels.clipped_grad(loss, l2_clip_norm=1.0, keep_batch_dim=False)(params, x)
    return seen


def rows_of(params, x):
    return jnp.sum(jnp.tanh(x @ params))


def test_ordinary_batches_take_the_fast_way(monkeypatch):
    assert predicate(monkeypatch, two_layers, TWO_LAYERS, normal(BATCH, 5)) == [True]
    # Few rows of many coordinates: inner products of rows.
    seen = predicate(monkeypatch, rows_of, normal(64, 64), normal(BATCH, 4, 64))
    assert seen == [True, True]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e25], ids=["nan", "infinite", "huge"])
def test_batches_out_of_the_ordinary_take_the_careful_way(monkeypatch, value):
    x = normal(BATCH, 5).at[2, 3].set(value)

    def loss(params, x):
        return jnp.sum(x @ params["first"] @ params["second"])

    assert predicate(monkeypatch, loss, TWO_LAYERS, x) == [False]


def test_rows_that_cancel_have_their_gradients_formed(monkeypatch):
    def loss(weight, x):
        y = x @ weight
        return jnp.sum(y[0] - y[1])

    x = normal(BATCH, 1, 64) * jnp.ones((1, 2, 1)) + 1e-4 * normal(BATCH, 2, 64, seed=1)
    assert predicate(monkeypatch, loss, normal(64, 64), x) == [False, True]


def test_explain_names_form_sites_and_cost():
    function = dpkernels.clipped_grad(two_layers, l2_clip_norm=1.0)
    report = function.explain(TWO_LAYERS, normal(BATCH, 5))
    rows = {row.parameters: row for row in report.rows}
    first = rows["['first']",]
    assert (first.form, first.sites, first.shapes) == ("outer", ("dot_general",), ((5, 7),))
    assert first.flops >= 2 * BATCH * 5 * 7
    assert rows["['bias']",].bytes == BATCH * 7 * 4


def test_explain_prints_a_table():
    report = dpkernels.clipped_grad(two_layers, l2_clip_norm=1.0).explain(
        TWO_LAYERS, normal(BATCH, 5)
    )
    lines = str(report).splitlines()
    assert lines[0].split() == ["parameter", "shape", "sites", "form", "MFLOP", "MB"]
    assert len(lines) == 2 + len(TWO_LAYERS)
    assert len({len(line) for line in lines}) == 1


def test_explain_counts_the_turns_of_loops():
    def loss(weight, x):
        return jnp.sum(jax.lax.scan(lambda c, x: (jnp.tanh(c @ weight + x), None), x[0], x)[0])

    function = dpkernels.clipped_grad(loss, l2_clip_norm=1.0, keep_batch_dim=False)
    (row,) = function.explain(normal(3, 3), normal(BATCH, 9, 3)).rows
    assert row.sites == ("dot_general × 9 turns",)


@pytest.mark.parametrize(
    "options",
    [{"strategy": "materialize"}, {"dtype": jnp.float32}, {"pre_clipping_transform": lambda g: g}],
    ids=["materialize", "dtype", "transform"],
)
def test_explain_refuses_what_is_materialised(options):
    function = dpkernels.clipped_grad(two_layers, l2_clip_norm=1.0, **options)
    with pytest.raises(NotImplementedError, match="forms the value of every example"):
        function.explain(TWO_LAYERS, normal(BATCH, 5))


@pytest.mark.slow
def test_transforms_form_gradients_in_microbatches(monkeypatch):
    params = {"first": normal(40, 50), "bias": normal(50), "second": normal(50, 3)}
    monkeypatch.setattr(dpkernels.clipping, "_MATERIALIZED_AT_ONCE", 4 * 2 * 40 * 60)
    x, options = normal(BATCH, 40), {"l2_clip_norm": 1.0, "keep_batch_dim": False}
    function = dpkernels.clipped_grad(two_layers, pre_clipping_transform=lambda g: g, **options)
    assert largest(function, params, x) <= 2 * 40 * 50
    expected = jax.jit(dpkernels.clipped_grad(two_layers, **options))(params, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        jax.jit(function)(params, x),
        expected,
    )


def test_unknown_strategies_are_refused():
    with pytest.raises(ValueError, match="`strategy` must be one of 'auto'"):
        dpkernels.clipped_grad(two_layers, l2_clip_norm=1.0, strategy="fast")


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda p, x: x @ p, "must be a real scalar, got float32 of shape"),
        (lambda p, x: jnp.sum(x @ p).astype(jnp.complex64), "must be a real scalar"),
        (lambda p, x: jnp.sum(x @ p).astype(jnp.int32), "must be a real scalar"),
    ],
    ids=["vector", "complex", "integer"],
)
def test_losses_that_are_no_real_scalar_are_refused(loss, message):
    with pytest.raises(TypeError, match=message):
        dpkernels.clipped_grad(loss, l2_clip_norm=1.0)(normal(5, 2), normal(BATCH, 5))


def test_integer_parameters_are_refused():
    with pytest.raises(TypeError, match="must be of a floating type, got int32"):
        dpkernels.clipped_grad(lambda p, x: jnp.sum(x) * p.sum(), l2_clip_norm=1.0)(
            jnp.arange(3), normal(BATCH, 5)
        )
