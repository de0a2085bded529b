"""One pytree's clipping: its edge table, its norms, its grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dpkernels.tree_clipping import clip_and_round_to_grid, clip_pytree, l2_norm

GRADIENT = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
finite = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
arrays = hnp.arrays(np.float32, hnp.array_shapes(max_dims=2, max_side=4), elements=finite)


@pytest.mark.parametrize(
    ("clip_norm", "rescale", "factor"),
    [
        (0.0, False, 0.0),
        (1.0, False, 0.2),
        (10.0, False, 1.0),
        (jnp.inf, False, 1.0),
        (0.0, True, 0.2),
        (1.0, True, 0.2),
        (10.0, True, 0.1),
        (jnp.inf, True, 0.0),
    ],
)
def test_clip_pytree_follows_its_edge_table(clip_norm, rescale, factor):
    clipped, norm = clip_pytree(GRADIENT, clip_norm, rescale)
    assert norm == 5.0
    np.testing.assert_allclose(clipped["a"], [3 * factor, 0], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], [[4 * factor]], rtol=1e-6)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0, jnp.inf])
def test_clip_pytree_leaves_zeros_zero(clip_norm, rescale):
    clipped, norm = clip_pytree({"a": jnp.zeros(3)}, clip_norm, rescale)
    assert norm == 0
    np.testing.assert_array_equal(clipped["a"], np.zeros(3))


@pytest.mark.parametrize("clip_norm", [-1.0, float("nan")])
def test_clip_pytree_refuses_a_clip_norm(clip_norm):
    with pytest.raises(ValueError, match="`l2_clip_norm` must be non-negative"):
        clip_pytree(GRADIENT, clip_norm)


def test_clip_pytree_takes_a_traced_negative_norm_as_zero():
    clipped, _ = jax.jit(clip_pytree)(GRADIENT, -1.0)
    np.testing.assert_array_equal(clipped["a"], np.zeros(2))


@given(arrays, st.floats(1e-3, 1e3))
def test_clip_pytree_bounds_the_norm(array, clip_norm):
    clipped, _ = clip_pytree({"x": jnp.asarray(array)}, clip_norm)
    norm = np.linalg.norm(np.asarray(clipped["x"], np.float64).reshape(-1))
    assert norm <= clip_norm * (1 + 1e-5)


@given(arrays, st.floats(1e-3, 1e3))
def test_clip_pytree_rescaled_is_clipped_over_clip_norm(array, clip_norm):
    clipped, _ = clip_pytree({"x": jnp.asarray(array)}, clip_norm)
    rescaled, _ = clip_pytree({"x": jnp.asarray(array)}, clip_norm, rescale_to_unit_norm=True)
    expected = np.asarray(clipped["x"], np.float64) / clip_norm
    np.testing.assert_allclose(rescaled["x"], expected, rtol=1e-5, atol=1e-35)


def test_clip_pytree_clips_subtrees_by_a_prefix():
    tree = {"a": {"w": jnp.array([3.0]), "b": jnp.array([4.0])}, "c": jnp.array([8.0])}
    clipped, norms = clip_pytree(tree, {"a": 1.0, "c": 2.0})
    np.testing.assert_allclose(clipped["a"]["w"], [0.6], rtol=1e-6)
    np.testing.assert_allclose(clipped["c"], [2.0], rtol=1e-6)
    assert (norms["a"], norms["c"]) == (5.0, 8.0)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_clip_pytree_keeps_the_dtype(dtype):
    clipped, norm = clip_pytree({"x": jnp.ones(3, dtype)}, 1.0)
    assert clipped["x"].dtype == dtype
    assert norm.dtype == jnp.float32


def test_clip_pytree_does_not_underflow_in_half_precision():
    clipped, _ = clip_pytree({"x": jnp.full(3, 6e4, jnp.float16)}, 1e-3)
    np.testing.assert_allclose(clipped["x"], np.full(3, 1e-3 / 3**0.5), rtol=2e-3)


@given(arrays)
def test_l2_norm_equals_float64(array):
    expected = np.linalg.norm(array.astype(np.float64).reshape(-1))
    np.testing.assert_allclose(l2_norm([jnp.asarray(array)]), expected, rtol=1e-5, atol=1e-44)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_l2_norm_survives_the_range_of_squares(size):
    np.testing.assert_allclose(l2_norm([jnp.full(4, size, jnp.float32)]), 2 * size, rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_l2_norm_is_not_finite_where_an_entry_is_not(bad):
    assert not jnp.isfinite(l2_norm([jnp.array([1.0, bad])]))


@given(hnp.arrays(np.float32, 6, elements=finite), st.floats(10, 1e4))
def test_clip_and_round_to_grid_bounds_the_integer_norm(array, grid_scale):
    with jax.enable_x64(True):
        rounded, _ = clip_and_round_to_grid({"x": jnp.asarray(array)}, 0.7, grid_scale)
        assert rounded["x"].dtype == jnp.int64
        norm = np.linalg.norm(np.asarray(rounded["x"], np.float64))
    assert norm <= grid_scale * (1 + 1e-9)


def test_clip_and_round_to_grid_rounds_to_the_nearest_step():
    with jax.enable_x64(True):
        rounded, _ = clip_and_round_to_grid({"x": jnp.array([0.104, -0.096])}, 1.0, 100.0)
    assert rounded["x"].tolist() == [10, -10]


def test_clip_and_round_to_grid_refuses_a_coarse_grid():
    with jax.enable_x64(True), pytest.raises(ValueError, match="`grid_scale` must exceed"):
        clip_and_round_to_grid({"x": jnp.ones(100)}, 1.0, 5.0)


def test_clip_and_round_to_grid_needs_64_bit_types():
    with pytest.raises(ValueError, match="64-bit types"):
        clip_and_round_to_grid({"x": jnp.ones(2)}, 1.0, 5.0)
