"""Programs and data that norms without gradients are easily wrong about."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dpkernels import clipped_grad
from dpkernels.tapped import cost

TAPPED = ("auto", "gram", "product")
SLACK = 1 + 1e-5


def clipped(loss, strategy, clip_norm=1.0, **options):
    return jax.jit(
        clipped_grad(
            loss, l2_clip_norm=clip_norm, keep_batch_dim=False, strategy=strategy, **options
        )
    )


def assert_same(loss, params, *batch, clip_norm=1.0, strategies=TAPPED, rtol=1e-5):
    """Every strategy gives what forming all gradients gives."""
    options = {"batch_argnums": tuple(range(1, 1 + len(batch))), "return_grad_norms": True}
    expected, aux = clipped(loss, "materialize", clip_norm, **options)(params, *batch)
    for strategy in strategies:
        found, found_aux = clipped(loss, strategy, clip_norm, **options)(params, *batch)
        np.testing.assert_allclose(found_aux.grad_norms, aux.grad_norms, rtol=rtol)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), found, expected
        )


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(np.asarray(x, float))) for x in jax.tree.leaves(tree)))


@pytest.fixture
def nothing_stored(monkeypatch):
    """As if the model were too large for the gradients of all examples to be kept."""
    monkeypatch.setattr(cost, "_STORE_AT_MOST", 0)


@pytest.mark.parametrize("second", ["a", "c"])
def test_parameter_concatenated_twice_counts_twice(second):
    def loss(p, x):
        first = jnp.concatenate([p["a"], p["b"]])
        rest = jnp.concatenate([p["a"], p["c"]]) if second == "c" else p["a"]
        return jnp.sum(jnp.concatenate([first, rest]) * x)

    params = {"a": normal(3), "b": normal(1), "c": normal(1)}
    width = 8 if second == "c" else 7
    assert_same(loss, params, normal(4, width))


def rows_in_balance(count, features, extra):
    """Examples whose rows nearly cancel, and perhaps one more."""
    signs = (np.where(np.arange(16) % 2 == 0, 1.0, -1.0) + 0.01).astype(np.float32)
    r = np.broadcast_to(signs[None, :, None], (count, 16, features))
    x = np.ones((count, 16, features), np.float32)
    if extra is not None:
        x = np.concatenate([x, x[:1]])
        r = np.concatenate([r, np.full((1, 16, features), extra, np.float32)])
    return jnp.asarray(x), jnp.asarray(r)


NOBODY = jnp.zeros(501, bool)


def contrast(p, x, r):
    return jnp.sum((x @ p) * r)


@cache
def contrast_sum(strategy):
    """Compiled once: data and mask are arguments."""
    return clipped(contrast, strategy, batch_argnums=(1, 2))


@pytest.mark.parametrize(
    "strategy",
    [s if s == "auto" else pytest.param(s, marks=pytest.mark.slow) for s in TAPPED],
)
@pytest.mark.parametrize("extra", [np.nan, 1e15])
@pytest.mark.parametrize("is_padding", [False, True])
def test_no_example_changes_how_others_are_clipped(strategy, extra, is_padding):
    count = 500
    total = contrast_sum(strategy)
    weight = jnp.zeros((16, 16))
    alone = total(weight, *rows_in_balance(count, 16, None), is_padding_example=NOBODY[:count])
    mask = jnp.arange(count + 1) == count if is_padding else NOBODY
    beside = total(weight, *rows_in_balance(count, 16, extra), is_padding_example=mask)
    allowed = 0 if is_padding or np.isnan(extra) else 1
    assert norm(beside - alone) <= allowed * SLACK + 1e-6 * norm(alone)


@pytest.mark.parametrize(
    ("rows", "left", "right", "ratio", "strategy"),
    [(512, 256, 2, 2e-2, "gram"), (256, 512, 512, 4e-3, "auto"), (1024, 64, 4, 1.6, "gram")],
)
def test_one_example_stays_within_the_clip_norm(rows, left, right, ratio, strategy):
    a = (np.random.default_rng(1).random(left) + 0.5).astype(np.float32)
    b = np.nextafter(a, np.float32(9))
    signs = np.where(np.arange(rows) < rows // 2, 1.0, -1.0)
    x = np.where(signs[:, None] > 0, a, b)
    r = np.broadcast_to((signs + np.sqrt(ratio / rows))[:, None], (rows, right))
    r = r.astype(np.float32)
    clip_norm = np.linalg.norm(x.astype(float).T @ r.astype(float)) / 2
    total = clipped(contrast, strategy, clip_norm, batch_argnums=(1, 2))
    found = total(jnp.zeros((left, right)), jnp.asarray(x)[None], jnp.asarray(r)[None])
    assert norm(found) <= clip_norm * (1 + 2e-5)


def stacked_layers(p, x):
    def layer(state, weight):
        return jnp.tanh(state @ weight.astype(jnp.bfloat16)), None

    state, _ = lax.scan(layer, x.astype(jnp.bfloat16), p)
    return jnp.sum(jnp.square(state.astype(jnp.float32)))


@jax.custom_vjp
def dense_with_clipped_gradient(weight, x):
    return x @ weight


dense_with_clipped_gradient.defvjp(
    lambda weight, x: (x @ weight, (weight, x)),
    lambda kept, dy: (kept[1].T @ jnp.clip(dy, -0.01, 0.01), dy @ kept[0].T),
)


@pytest.mark.parametrize(
    ("loss", "params"),
    [
        (stacked_layers, normal(2, 8, 8)),
        (lambda p, x: jnp.sum(jnp.square(dense_with_clipped_gradient(p, x))), normal(8, 8)),
    ],
    ids=["half precision inside", "derivative that is not linear"],
)
@pytest.mark.usefixtures("nothing_stored")
def test_sums_are_of_the_gradients_that_norms_were_taken_of(loss, params):
    mask = jnp.arange(3) != 0
    total = clipped(loss, "auto", 1e-3)(params, normal(3, 4, 8), is_padding_example=mask)
    assert norm(total) <= 1e-3 * SLACK


@pytest.mark.parametrize("strategy", ["auto", "product"])
@pytest.mark.usefixtures("nothing_stored")
def test_rows_that_cancel_hold_where_nothing_is_stored(strategy):
    rows = np.random.default_rng(0).normal(size=(1, 64, 8)) * 1e6
    x = jnp.asarray(rows - rows.mean(1, keepdims=True), jnp.float32)
    total = clipped(lambda p, x: jnp.sum(x @ p), strategy, 1e-2)(normal(8, 8), x)
    assert norm(total) <= 1e-2 * SLACK


@pytest.mark.parametrize("is_padding", [False, True])
@pytest.mark.usefixtures("nothing_stored")
def test_dropped_examples_leave_the_others_finite(is_padding):
    """Also where the gradient is singular at the zeros that one might put in their place."""
    x = jnp.array([[1.0], [np.nan], [2.0]])
    total = clipped(lambda p, x: jnp.sum(p / x), "auto", 0.1)
    mask = jnp.array([False, is_padding, False])
    found = total(jnp.ones(4), x, is_padding_example=mask)
    np.testing.assert_allclose(found, np.full(4, 0.1), rtol=1e-6)


LOOK_UPS = {
    "dynamic_slice": lambda table, i: lax.dynamic_slice_in_dim(table, i, 1),
    "take": lambda table, i: jnp.take(table, i[None], axis=0, mode="clip"),
}


@pytest.mark.parametrize(
    ("look_up", "dtype"),
    [
        ("dynamic_slice", jnp.int8),
        pytest.param("take", jnp.uint8, marks=pytest.mark.slow),
        pytest.param("dynamic_slice", jnp.uint8, marks=pytest.mark.slow),
        pytest.param("take", jnp.int8, marks=pytest.mark.slow),
    ],
)
def test_indices_of_a_small_type_find_their_row(look_up, dtype):
    def loss(table, i):
        return jnp.sum(LOOK_UPS[look_up](table, i))

    assert_same(loss, jnp.zeros((300, 2)), jnp.array([90, 3], dtype), clip_norm=1e9)


@jax.custom_vjp
def with_clipped_gradient(weight):
    return weight


with_clipped_gradient.defvjp(
    lambda weight: (weight, None), lambda _, dy: (jnp.clip(dy, -0.01, 0.01),)
)


def test_derivative_rules_inside_loops_are_asked_at_every_turn():
    def loss(weight, x):
        def turn(state, x):
            return jnp.tanh(state @ with_clipped_gradient(weight) + x), None

        return jnp.sum(lax.scan(turn, jnp.zeros(3), x)[0])

    assert_same(loss, normal(3, 3), normal(4, 5, 3), clip_norm=0.01)


def test_parameter_made_complex():
    def loss(p, x):
        return jnp.sum(jnp.tanh(jnp.fft.irfft(jnp.fft.rfft(x) * p.astype(jnp.complex64))))

    assert_same(loss, normal(4), normal(3, 6))


def test_two_look_ups_one_of_them_transposed():
    def loss(p, a, b):
        return jnp.sum(jnp.tanh(p[a] @ p.T[b].T))

    a, b = jnp.array([[0, 1, 1], [2, 2, 0]]), jnp.array([[1, 4, 0], [3, 3, 3]])
    assert_same(loss, normal(5, 5), a, b)


@pytest.mark.parametrize(
    ("loss", "shapes"),
    [
        (lambda p, x: jnp.sum(x @ p["w"]) + jnp.sum(x @ p["e"]), {"w": (3, 3), "e": (3, 0)}),
        (lambda p, x: jnp.sum(x[:0] @ p["w"]) + jnp.sum(x @ p["w"]), {"w": (3, 2)}),
        (lambda p, x: jnp.sum(x[:, :0] @ p["e"]) + jnp.sum(x * p["b"]), {"e": (0, 2), "b": (3,)}),
        (
            lambda p, x: jnp.sum(
                lax.scan(lambda c, y: (jnp.tanh(c @ p["w"] + y), None), x[0], x[:0])[0] * p["b"]
            ),
            {"w": (3, 3), "b": (3,)},
        ),
    ],
    ids=["no features out", "no rows", "no features in", "no turns"],
)
@pytest.mark.slow
def test_parts_of_no_size(loss, shapes):
    params = {name: normal(*shape) for name, shape in shapes.items()}
    assert_same(loss, params, normal(4, 2, 3))


def test_stopped_loops_may_be_of_a_kind_without_derivative():
    def loss(p, x):
        steps = lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p)), (0, x))
        return jnp.sum((x @ p) * lax.stop_gradient(steps[1]))

    assert_same(loss, normal(3, 3), normal(4, 3))


def test_weak_types_compute_as_they_do_elsewhere():
    def loss(p, x):
        return jnp.sum((x.astype(jnp.bfloat16) * p["scale"]).astype(jnp.float32) ** 2)

    assert_same(loss, {"scale": 0.3}, normal(4, 5), rtol=1e-3)
