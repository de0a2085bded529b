"""Clipped sums against a float64 loop, their sensitivity, and the arguments that are refused."""

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracles
from dpkernels import clipped_fun, clipped_grad

Relation = dp_accounting.NeighboringRelation
BATCH, FEATURES, HIDDEN = 7, 5, 4


def mlp_loss(params, x, y):
    """Sees one example with a leading axis of 1."""
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    return jnp.mean((hidden @ params["w2"] - y) ** 2)


def make_problem(dtype=np.float32, batch=BATCH, seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "w1": rng.normal(size=(FEATURES, HIDDEN)),
        "b1": rng.normal(size=HIDDEN),
        "w2": rng.normal(size=(HIDDEN, 1)),
    }
    x, y = rng.normal(size=(batch, FEATURES)), 3 * rng.normal(size=(batch, 1))
    cast = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)  # noqa: E731
    return cast(params), cast(x), cast(y)


@jax.jit
def wide_gradient(params, x, y):
    return jax.grad(mlp_loss)(params, x, y)


def loop_gradients(params, x, y):
    """Per-example gradients in float64, one at a time."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), (params, x, y))
        params, x, y = wide
        return [
            jax.tree.map(np.asarray, wide_gradient(params, x[i : i + 1], y[i : i + 1]))
            for i in range(len(x))
        ]


def make_sum(**options):
    """Jitted: eager JAX compiles each op of the problem by itself."""
    return jax.jit(clipped_grad(mlp_loss, batch_argnums=(1, 2), **options))


def flat(tree):
    leaves = [np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves)


def assert_trees_close(found, expected, rtol=1e-5):
    assert found.keys() == expected.keys()
    size = np.linalg.norm(flat(expected))
    assert np.linalg.norm(flat(found) - flat(expected)) <= rtol * size


def microbatch_sizes(*quick, slow):
    """Parametrizes by microbatch size; 2 and 3 both leave a rest of 1 of 7 examples."""
    marked = [pytest.param(size, marks=pytest.mark.slow) for size in slow]
    return pytest.mark.parametrize("microbatch_size", [*quick, *marked])


@microbatch_sizes(None, 1, 3, 50, slow=(2, 7))
def test_clipped_grad_equals_a_float64_loop(microbatch_size):
    params, x, y = make_problem()
    function = make_sum(l2_clip_norm=8.0, microbatch_size=microbatch_size)
    found = function(params, x, y)
    assert_trees_close(found, oracles.clipped_sum(loop_gradients(params, x, y), 8.0))


@pytest.mark.parametrize("clip_norm", [0.1, 1e6])
def test_clipped_grad_that_clips_all_or_none_equals_a_float64_loop(clip_norm):
    params, x, y = make_problem()
    found = make_sum(l2_clip_norm=clip_norm)(params, x, y)
    assert_trees_close(found, oracles.clipped_sum(loop_gradients(params, x, y), clip_norm))


def test_clipped_grad_clips_some_and_not_others():
    norms = [np.linalg.norm(flat(g)) for g in loop_gradients(*make_problem())]
    assert min(norms) < 8.0 < max(norms)


def test_clipped_grad_in_float64_is_exact_to_float64():
    with jax.enable_x64(True):
        params, x, y = make_problem(np.float64)
        found = make_sum(l2_clip_norm=8.0)(params, x, y)
        expected = oracles.clipped_sum(loop_gradients(params, x, y), 8.0)
        assert_trees_close(found, expected, rtol=1e-12)


def test_clipped_grad_rescales_and_normalizes():
    params, x, y = make_problem()
    function = make_sum(l2_clip_norm=8.0, rescale_to_unit_norm=True, normalize_by=4.0)
    expected = oracles.clipped_sum(
        loop_gradients(params, x, y), 8.0, rescale=True, normalize_by=4.0
    )
    assert_trees_close(function(params, x, y), expected)


@microbatch_sizes(None, 3, slow=(2,))
def test_clipped_grad_ignores_padding_rows_whatever_they_hold(microbatch_size):
    params, x, y = make_problem()
    function = make_sum(l2_clip_norm=8.0, microbatch_size=microbatch_size)
    expected = oracles.clipped_sum(loop_gradients(params, x[:4], y[:4]), 8.0)
    garbage = x.at[4:].set(jnp.array([[jnp.nan], [jnp.inf], [1e30]]))
    mask = jnp.arange(BATCH) >= 4
    found = function(params, garbage, y, is_padding_example=mask)
    assert_trees_close(found, expected)


def test_clipped_grad_ignores_padding_without_nan_safe():
    params, x, y = make_problem()
    function = make_sum(l2_clip_norm=8.0, nan_safe=False)
    found = function(params, x * jnp.nan, y, is_padding_example=jnp.ones(BATCH, bool))
    np.testing.assert_array_equal(flat(found), 0)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_clipped_grad_drops_an_example_that_is_not_finite(bad):
    params, x, y = make_problem()
    gradients = loop_gradients(params, x, y)
    expected = oracles.clipped_sum(gradients[:2] + gradients[3:], 8.0)
    function = make_sum(l2_clip_norm=8.0)
    assert_trees_close(function(params, x.at[2, 1].set(bad), y), expected)


def test_clipped_grad_keeps_an_example_whose_square_overflows():
    linear = clipped_grad(lambda w, x: jnp.sum(w * x), l2_clip_norm=1.0)
    found = linear(jnp.zeros(2), jnp.array([[3e25, 4e25]], jnp.float32))
    np.testing.assert_allclose(found, [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize("microbatch_size", [None, 3])
def test_clipped_grad_of_an_empty_batch_is_zero(microbatch_size):
    params, x, y = make_problem()
    function = make_sum(l2_clip_norm=8.0, return_values=True, microbatch_size=microbatch_size)
    total, aux = function(params, x[:0], y[:0])
    np.testing.assert_array_equal(flat(total), 0)
    assert aux.values.shape == (0,)


@jax.jit
def masked_sum(params, x, y, is_real, clip_norm):
    function = clipped_grad(mlp_loss, l2_clip_norm=clip_norm, batch_argnums=(1, 2))
    return function(params, x, y, is_padding_example=~is_real)


examples = st.integers(0, BATCH - 1)
sizes = st.sampled_from([1e-6, 1.0, 1e6, np.nan, np.inf])


@given(st.sets(examples), examples, sizes, st.floats(0.01, 100))
def test_clipped_grad_moves_by_at_most_its_sensitivity(chosen, extra, size, clip_norm):
    params, x, y = make_problem()
    x = x.at[extra].multiply(size)
    mask = np.isin(np.arange(BATCH), list(chosen - {extra}))
    without = masked_sum(params, x, y, mask, clip_norm)
    added = masked_sum(params, x, y, mask | (np.arange(BATCH) == extra), clip_norm)
    bound = clipped_grad(mlp_loss, l2_clip_norm=clip_norm).sensitivity(Relation.ADD_OR_REMOVE_ONE)
    rounding = 1e-6 * clip_norm * BATCH
    assert np.linalg.norm(flat(added) - flat(without)) <= bound * (1 + 1e-5) + rounding


@given(examples, sizes, st.floats(0.01, 100))
def test_clipped_grad_moves_by_at_most_twice_the_bound_when_replaced(index, size, clip_norm):
    params, x, y = make_problem()
    everyone = np.ones(BATCH, bool)
    before = masked_sum(params, x, y, everyone, clip_norm)
    after = masked_sum(params, x.at[index].multiply(-size), y, everyone, clip_norm)
    bound = clipped_grad(mlp_loss, l2_clip_norm=clip_norm).sensitivity(Relation.REPLACE_ONE)
    rounding = 1e-6 * clip_norm * BATCH
    assert np.linalg.norm(flat(after) - flat(before)) <= bound * (1 + 1e-5) + rounding


@pytest.mark.parametrize(
    ("relation", "factor"),
    [
        (Relation.ADD_OR_REMOVE_ONE, 1),
        (Relation.REPLACE_SPECIAL, 1),
        (Relation.REPLACE_ONE, 2),
    ],
)
@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"l2_clip_norm": 2.0}, 2.0),
        ({"l2_clip_norm": 2.0, "normalize_by": 4.0}, 0.5),
        ({"l2_clip_norm": 2.0, "rescale_to_unit_norm": True, "normalize_by": 4.0}, 0.25),
        ({"l2_clip_norm": {"a": 3.0, "b": 4.0}}, 5.0),
        ({"l2_clip_norm": {"a": 3.0, "b": 4.0}, "rescale_to_unit_norm": True}, 2**0.5),
    ],
)
def test_sensitivity_is_the_bound_times_the_relation(options, bound, relation, factor):
    function = clipped_grad(mlp_loss, **options)
    assert function.sensitivity(relation) == pytest.approx(factor * bound)


def test_sensitivity_refuses_an_unknown_relation():
    with pytest.raises(ValueError, match="`neighboring_relation` must be one of"):
        clipped_grad(mlp_loss, l2_clip_norm=1.0).sensitivity("add")


def test_clipped_grad_returns_values_norms_and_aux_per_example():
    params, x, y = make_problem()
    function = clipped_grad(
        lambda p, x, y: (mlp_loss(p, x, y), {"first": x[:, 0]}),
        has_aux=True,
        l2_clip_norm=8.0,
        batch_argnums=(1, 2),
        return_values=True,
        return_grad_norms=True,
        microbatch_size=2,
    )
    _, aux = jax.jit(function)(params, x, y)
    gradients = loop_gradients(params, x, y)
    np.testing.assert_allclose(
        aux.grad_norms, [np.linalg.norm(flat(g)) for g in gradients], rtol=1e-5
    )
    values = [mlp_loss(params, x[i : i + 1], y[i : i + 1]) for i in range(BATCH)]
    np.testing.assert_allclose(aux.values, values, rtol=1e-5)
    np.testing.assert_array_equal(aux.aux["first"], x[:, 0])


def test_clipped_grad_reports_norms_before_the_transform():
    function = clipped_grad(
        lambda w, x: jnp.sum(w * x),
        l2_clip_norm=100.0,
        pre_clipping_transform=lambda g: 10 * g,
        return_grad_norms=True,
    )
    total, aux = function(jnp.zeros(2), jnp.array([[3.0, 4.0]]))
    np.testing.assert_allclose(total, [30.0, 40.0], rtol=1e-6)
    np.testing.assert_allclose(aux.grad_norms, [5.0], rtol=1e-6)


def test_clipped_grad_clips_users_without_the_batch_axis():
    function = clipped_grad(
        lambda w, group: jnp.mean(group @ w), l2_clip_norm=1.0, keep_batch_dim=False
    )
    users = jnp.array([[[2.0, 0.0], [4.0, 0.0]], [[0.0, 0.25], [0.0, 0.25]]])
    np.testing.assert_allclose(function(jnp.zeros(2), users), [1.0, 0.25], rtol=1e-6)


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_clipped_grad_splits_its_key_once_an_example(microbatch_size):
    def loss(w, x, key):
        return jnp.sum(w) * jax.random.normal(key) * jnp.sum(x) ** 0

    function = clipped_grad(
        loss,
        l2_clip_norm=1e6,
        prng_argnum=2,
        return_grad_norms=True,
        microbatch_size=microbatch_size,
    )
    key = jax.random.key(1)
    _, aux = function(jnp.zeros(()), jnp.ones((5, 1)), key)
    expected = [abs(jax.random.normal(k)) for k in jax.random.split(key, 5)]
    np.testing.assert_allclose(aux.grad_norms, expected, rtol=1e-6)
    assert len(set(np.asarray(aux.grad_norms).tolist())) == 5


def test_clipped_grad_sums_half_precision_in_float32():
    function = clipped_grad(lambda w, x: jnp.sum(w * x), l2_clip_norm=1e6)
    found = function(jnp.zeros(1, jnp.bfloat16), jnp.full((2048, 1), 1.0, jnp.bfloat16))
    assert found.dtype == jnp.float32
    assert found.item() == 2048  # One by one in bfloat16 the sum sticks at 256.


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_clipped_grad_moves_by_its_sensitivity_in_half_precision(dtype):
    function = jax.jit(clipped_grad(lambda w, x: jnp.sum(w * x), l2_clip_norm=1.0))
    x = jnp.full((258, 4096), 1 / 64, dtype)
    more, fewer = function(jnp.zeros(4096, dtype), x), function(jnp.zeros(4096, dtype), x[1:])
    assert jnp.linalg.norm(more - fewer) <= 1 + 1e-5


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_clipped_grad_moves_by_its_sensitivity_when_cast_to_half_precision(dtype):
    # Summed in bfloat16, the 257th of these rows moves the sum by 2, or by nothing.
    function = jax.jit(clipped_grad(lambda w, x: jnp.sum(w * x), l2_clip_norm=1.0, dtype=dtype))
    x = jnp.full((258, 4096), 1 / 64)
    more, fewer = function(jnp.zeros(4096), x), function(jnp.zeros(4096), x[1:])
    assert more.dtype == jnp.float32
    assert jnp.linalg.norm(more - fewer) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_clipped_fun_clips_in_float32_what_it_casts_to_half_precision(dtype):
    # Cast first: 0.1 is not a number of half precision. Clipped in float32: neither is 1 / 3.
    cast = float(jnp.asarray(0.1, dtype))
    assert abs(cast - 0.1) > 1e-6
    assert clipped_fun(lambda x: x, dtype=dtype)(jnp.full((1, 1), 0.1)).item() == cast
    clipped = clipped_fun(lambda x: x, dtype=dtype, l2_clip_norm=1 / 3)(jnp.ones((1, 1)))
    assert clipped.item() == pytest.approx(1 / 3, rel=1e-6)


def test_clipped_fun_refuses_to_cast_to_complex_values():
    with pytest.raises(TypeError, match="What is clipped must be real, got float32 as complex64"):
        clipped_fun(lambda x: x, dtype=jnp.complex64)(jnp.ones(3))


def test_clipped_fun_does_not_wrap_small_integers():
    function = clipped_fun(lambda x: x, keep_batch_dim=False, l2_clip_norm=100.0)
    assert function(jnp.array([100, 100], jnp.int8)).item() == 200


def test_clipped_fun_refuses_complex_values():
    with pytest.raises(TypeError, match="What is clipped must be real, got complex64"):
        clipped_fun(lambda x: jax.lax.complex(x, x), l2_clip_norm=1.0)(jnp.ones(3))


def test_clipped_grad_casts_before_clipping():
    function = clipped_grad(lambda w, x: jnp.sum(w * x), l2_clip_norm=1.0, dtype=jnp.float32)
    found = function(jnp.zeros(2, jnp.float16), jnp.full((1, 2), 3e4, jnp.float16))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.full(2, 0.5**0.5), rtol=1e-3)


def test_clipped_grad_takes_a_traced_clip_norm():
    params, x, y = make_problem()
    traced = jax.jit(
        lambda clip: clipped_grad(mlp_loss, l2_clip_norm=clip, batch_argnums=(1, 2))(params, x, y)
    )
    expected = oracles.clipped_sum(loop_gradients(params, x, y), 8.0)
    assert_trees_close(traced(8.0), expected)
    unclipped = oracles.clipped_sum(loop_gradients(params, x, y), np.inf)
    assert_trees_close(traced(jnp.inf), unclipped)


def test_clipped_grad_clips_layers_each_by_itself():
    params, x, y = make_problem()
    clip = {"w1": 0.5, "b1": 0.1, "w2": 2.0}
    found = make_sum(l2_clip_norm=clip)(params, x, y)
    gradients = loop_gradients(params, x, y)
    for name, bound in clip.items():
        expected = oracles.clipped_sum([{name: g[name]} for g in gradients], bound)
        assert_trees_close({name: found[name]}, expected)


def test_clipped_grad_per_layer_drops_all_of_an_example_that_is_not_finite():
    loss = lambda p, x: p["a"] * jnp.sum(x) + p["b"] * 2.0  # noqa: E731
    function = clipped_grad(loss, l2_clip_norm={"a": 1.0, "b": 1.0})
    found = function({"a": 0.0, "b": 0.0}, jnp.array([[jnp.nan]]))
    assert (float(found["a"]), float(found["b"])) == (0.0, 0.0)


def test_clipped_grad_rounds_to_a_grid():
    with jax.enable_x64(True):
        function = clipped_grad(lambda w, x: jnp.sum(w * x), l2_clip_norm=1.0, grid_scale=1000.0)
        found = function(jnp.zeros(2), jnp.array([[0.1, 0.2], [0.3, 0.0]]))
        assert found.dtype == jnp.int64
        assert found.tolist() == [400, 200]
        assert function.sensitivity() == 1000.0


@pytest.mark.parametrize(
    ("has_aux", "return_norms", "parts"),
    [(False, False, 0), (True, False, 2), (False, True, 2), (True, True, 2)],
)
def test_clipped_fun_returns_what_is_asked_for(has_aux, return_norms, parts):
    fun = (lambda x: (jnp.mean(x), x)) if has_aux else jnp.mean
    result = clipped_fun(fun, has_aux, l2_clip_norm=1.0, return_norms=return_norms)(
        jnp.ones((3, 2))
    )
    assert (len(result) if parts else 0) == parts
    if has_aux and return_norms:
        assert len(result[1]) == 2


def test_clipped_fun_clips_gradients_from_elsewhere():
    gradients = {"w": jnp.array([[3.0, 4.0], [0.3, 0.4]])}
    function = clipped_fun(lambda g: g, keep_batch_dim=False, l2_clip_norm=1.0)
    np.testing.assert_allclose(function(gradients)["w"], [0.9, 1.2], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize_by": 0.0}, "`normalize_by` must be positive"),
        ({"normalize_by": float("nan")}, "`normalize_by` must be positive"),
        ({"l2_clip_norm": -1.0}, "`l2_clip_norm` must be non-negative"),
        ({"l2_clip_norm": float("nan")}, "`l2_clip_norm` must be non-negative"),
        ({"microbatch_size": 0}, "`microbatch_size` must be at least 1"),
        ({"argnums": (0, 1)}, "nothing in common"),
        ({"argnums": ()}, "must be non-empty"),
        ({"batch_argnums": -1}, "non-negative"),
        ({"grid_scale": 10.0, "normalize_by": 2.0}, "`grid_scale` must come with one clip norm"),
        ({"grid_scale": 10.0}, "64-bit types"),
        ({"grid_scale": -1.0}, "`grid_scale` must be positive"),
    ],
)
def test_clipped_grad_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        clipped_grad(mlp_loss, **{"l2_clip_norm": 1.0, **options})


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, FEATURES), (2, 1)), "one size on axis 0"),
        (((), (2, 1)), "leading batch axis"),
    ],
)
def test_clipped_grad_refuses_a_batch(shapes, message):
    params, *_ = make_problem()
    function = clipped_grad(mlp_loss, l2_clip_norm=1.0, batch_argnums=(1, 2))
    with pytest.raises(ValueError, match=message):
        function(params, *[jnp.zeros(shape) for shape in shapes])


@pytest.mark.parametrize(
    "mask", [jnp.zeros(3, bool), jnp.zeros(BATCH), jnp.zeros((BATCH, 1), bool)]
)
def test_clipped_grad_refuses_a_mask(mask):
    function = clipped_grad(mlp_loss, l2_clip_norm=1.0, batch_argnums=(1, 2))
    with pytest.raises(ValueError, match="`is_padding_example` must be bools of shape"):
        function(*make_problem(), is_padding_example=mask)


# Code that sees a whole batch


@jax.custom_batching.custom_vmap
def centred(x):
    return x


@centred.def_vmap
def _over_the_batch(size, is_batched, x):
    return x - x.mean(0), is_batched[0]


def called_back(x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(lambda y: y - y.mean(0), shape, x, vmap_method="expand_dims")


@jax.custom_vjp
def mixed_backward(x):
    return x


mixed_backward.defvjp(lambda x: (x, None), lambda _, g: (centred(g),))


@pytest.mark.parametrize("strategy", ["auto", "materialize"])
@pytest.mark.parametrize("loss", [
    lambda w, x: jnp.sum((w * centred(x)) ** 2),
    lambda w, x: jnp.sum((w * called_back(x)) ** 2),
    lambda w, x: jnp.sum((w * jax.jit(centred)(x)) ** 2),
    lambda w, x: jnp.sum(mixed_backward(w * x) ** 2),
], ids=["custom_vmap", "callback", "inside jit", "in backward"])  # fmt: skip
def test_losses_that_see_a_whole_batch_are_refused(loss, strategy):
    function = clipped_grad(loss, l2_clip_norm=1.0, strategy=strategy)
    with pytest.raises(NotImplementedError, match="`fun` must keep examples apart, got"):
        function(jnp.ones(3), jnp.arange(6.0).reshape(2, 3))


def test_callbacks_one_by_one_are_let_in():
    def loss(w, x):
        shape = jax.ShapeDtypeStruct((), x.dtype)
        scale = jax.pure_callback(
            lambda y: np.float32(2.0), shape, jnp.sum(x), vmap_method="sequential"
        )
        return jnp.sum(w * x) * scale

    total = clipped_grad(loss, l2_clip_norm=10.0)(jnp.ones(2), jnp.ones((3, 2)))
    np.testing.assert_allclose(total, [6.0, 6.0])
