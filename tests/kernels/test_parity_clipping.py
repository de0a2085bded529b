"""Clipped gradients and noise on the same inputs as JAX Privacy 2.0.0, and where they differ."""

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpkernels
from dpkernels import accounting

jax_privacy = pytest.importorskip("jax_privacy")
clipping = pytest.importorskip("jax_privacy.clipping")

Relation = dp_accounting.NeighboringRelation
# Their code under the optax that is tested here, which warns of a name that they use.
pytestmark = pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated")


def loss(params, x, y):
    return jnp.sum(jnp.square(jnp.tanh(x @ params["w"]) + params["b"] - y))


def inputs(size=6):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"w": jax.random.normal(keys[0], (3, 2)), "b": jax.random.normal(keys[1], (2,))}
    x, y = jax.random.normal(keys[2], (size, 3)), jax.random.normal(keys[3], (size, 2))
    return params, x, y


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rescale_to_unit_norm": True, "normalize_by": 4.0},
        {"keep_batch_dim": False},
        {"microbatch_size": 2},
        {"return_values": True, "return_grad_norms": True},
        pytest.param({"l2_clip_norm": 1e6}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_clipped_gradients_agree(options):
    arguments = {"l2_clip_norm": 1.5, "batch_argnums": (1, 2)} | options
    ours, theirs = (
        dpkernels.clipped_grad(loss, **arguments),
        clipping.clipped_grad(loss, **arguments),
    )
    for relation in (Relation.ADD_OR_REMOVE_ONE, Relation.REPLACE_SPECIAL, Relation.REPLACE_ONE):
        assert ours.sensitivity(relation) == pytest.approx(theirs.sensitivity(relation))
    found = ours(*inputs())
    with jax.numpy_dtype_promotion("standard"):
        expected = theirs(*inputs())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
        jax.tree.leaves(found),
        jax.tree.leaves(expected),
    )


def test_padding_agrees():
    is_padding = jnp.array([False, True, False, False, True, False])
    arguments = {"l2_clip_norm": 1.5, "batch_argnums": (1, 2)}
    found, expected = (
        library.clipped_grad(loss, **arguments)(*inputs(), is_padding_example=is_padding)
        for library in (dpkernels, clipping)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), found, expected)


def test_example_that_is_not_finite_is_dropped_whole():
    """2.0.0 zeroes the entries and keeps the rest; its later releases do as we do."""

    def linear(w, x):
        return jnp.sum(w * x)

    x = jnp.array([[jnp.nan, 1.0, 1.0], [0.5, 0.0, 0.0]])
    found, expected = (
        library.clipped_grad(linear, l2_clip_norm=1.0)(jnp.zeros(3), x)
        for library in (dpkernels, clipping)
    )
    np.testing.assert_allclose(found, [0.5, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(expected, [0.5, 0.7071068, 0.7071068], rtol=1e-6)


def test_empty_batch_is_a_sum_of_nothing():
    """2.0.0 raises; an empty draw is a step like any other."""
    params, x, y = inputs()
    total = dpkernels.clipped_grad(loss, l2_clip_norm=1.0, batch_argnums=(1, 2), microbatch_size=2)
    found = total(params, x[:0], y[:0])
    assert all(not leaf.any() for leaf in jax.tree.leaves(found))


def test_half_precision_is_summed_in_float32():
    """2.0.0 sums in half precision, whose rounding can exceed the clip norm."""

    def linear(w, x):
        return jnp.sum(w * x)

    x = jnp.full((300, 1), 1.0, jnp.bfloat16)
    found = dpkernels.clipped_grad(linear, l2_clip_norm=1.0)(jnp.zeros(1, jnp.bfloat16), x)
    expected = clipping.clipped_grad(linear, l2_clip_norm=1.0)(jnp.zeros(1, jnp.bfloat16), x)
    assert found.dtype == jnp.float32
    assert float(found[0]) == 300
    assert expected.dtype == jnp.bfloat16


def test_events_agree():
    theirs = pytest.importorskip("jax_privacy.experimental.accounting")
    assert accounting.dpsgd_event(1.5, 7, sampling_prob=0.25) == theirs.dpsgd_event(
        1.5, 7, sampling_prob=0.25
    )
    ours = accounting.truncated_dpsgd_event(
        1.5, 7, sampling_prob=0.25, num_examples=40, truncated_batch_size=12
    )
    assert ours == theirs.truncated_dpsgd_event(
        1.5, 7, sampling_prob=0.25, num_examples=40, truncated_batch_size=12
    )
    ours = accounting.amplified_bandmf_event(1.5, 8, num_bands=3, sampling_prob=0.25)
    assert ours == theirs.amplified_bandmf_event(1.5, 8, num_bands=3, sampling_prob=0.25)
