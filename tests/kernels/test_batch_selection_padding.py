"""Padding: what comes first, what comes after, and that the kernel's microbatches fit it."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpkernels.batch_selection import (
    CyclicPoissonSampling,
    UserSelectionStrategy,
    pad_to_multiple_of,
    split_and_pad_global_batch,
)
from dpkernels.per_example import sum_over_microbatches

flat = hnp.array_shapes(min_dims=1, max_dims=1, min_side=0, max_side=40)
rows = st.tuples(st.integers(0, 20), st.integers(1, 3))
batches = st.sampled_from([np.int8, np.int32, np.int64]).flatmap(
    lambda dtype: hnp.arrays(dtype, flat | rows, elements=st.integers(0, 100))
)


@hypothesis.given(indices=batches, multiple=st.integers(1, 50))
def test_pad_appends_as_little_as_it_takes(indices, multiple):
    padded = pad_to_multiple_of(indices, multiple)
    assert len(padded) % multiple == 0
    assert 0 <= len(padded) - len(indices) < multiple
    assert padded.dtype == indices.dtype
    np.testing.assert_array_equal(padded[: len(indices)], indices)
    assert (padded[len(indices) :] == -1).all()
    np.testing.assert_array_equal(pad_to_multiple_of(padded, multiple), padded)


@hypothesis.given(indices=batches, size=st.integers(1, 50))
def test_split_joins_to_the_batch_and_its_padding(indices, size):
    parts = split_and_pad_global_batch(indices, size)
    assert len(parts) == max(1, -(-len(indices) // size))
    assert {len(part) for part in parts} == {size}
    assert {part.dtype for part in parts} == {indices.dtype}
    joined = np.concatenate(parts)
    np.testing.assert_array_equal(joined[: len(indices)], indices)
    assert (joined[len(indices) :] == -1).all()
    assert all((part != -1).all() for part in parts[:-1])


@hypothesis.given(
    indices=batches, microbatch_size=st.integers(1, 8), count=st.integers(1, 6), split=st.booleans()
)
def test_padding_fills_the_last_contiguous_microbatches(indices, microbatch_size, count, split):
    size = microbatch_size * count
    if split:
        parts = split_and_pad_global_batch(indices, size, microbatch_size)
    else:
        parts = [pad_to_multiple_of(indices, size, microbatch_size)]
    padded = np.concatenate(parts)
    is_real = (padded if padded.ndim == 1 else padded[:, 0]) != -1
    real_in_each = is_real.reshape(-1, microbatch_size).sum(1)
    assert (np.diff(real_in_each) <= 0).all()
    assert sum(0 < n < microbatch_size for n in real_in_each) <= 1


def test_empty_batch_stays_empty_when_padded_but_is_a_step_when_split():
    empty = np.zeros(0, np.int64)
    assert pad_to_multiple_of(empty, 4).shape == (0,)
    (only,) = split_and_pad_global_batch(empty, 4)
    np.testing.assert_array_equal(only, [-1] * 4)


def test_kernel_skips_the_microbatches_that_padding_fills():
    padded = pad_to_multiple_of(np.array([3, 1, 4, 1, 5]), 12, microbatch_size=2)
    data = jnp.arange(8.0)[padded]

    def together(rows, is_padding):
        return jnp.sum(jnp.where(is_padding, 0.0, rows)), jnp.ones_like(rows)

    total, ran = jax.jit(lambda x, p: sum_over_microbatches(together, x, p, 2))(data, padded == -1)
    assert float(total) == 3 + 1 + 4 + 1 + 5
    np.testing.assert_array_equal(ran, [1] * 6 + [0] * 6)


def test_batches_of_users_are_padded_by_rows():
    base = CyclicPoissonSampling(1.0, 1)
    (users,) = UserSelectionStrategy(base, 2).batch_iterator([1, 2, 1, 3], rng=0)
    padded = pad_to_multiple_of(users, 4)
    assert padded.shape == (4, 2)
    np.testing.assert_array_equal(padded[3], [-1, -1])


FUNCTIONS = [pad_to_multiple_of, split_and_pad_global_batch]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("size", [0, -2, 1.5])
def test_padding_refuses_a_size(function, size):
    with pytest.raises((ValueError, TypeError), match=r"(multiple|minibatch_size)` must be"):
        function(np.arange(3), size)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("indices", "error"),
    [
        (np.arange(3, dtype=np.uint8), TypeError),
        (np.arange(3.0), TypeError),
        (np.ones(3, bool), TypeError),
        (np.int64(3), ValueError),
        (np.zeros((2, 2, 2), int), ValueError),
    ],
)
def test_padding_refuses_indices(function, indices, error):
    with pytest.raises(error, match="`indices` must be"):
        function(indices, 4)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("microbatch_size", [3, 0, 16])
def test_padding_refuses_a_microbatch_size(function, microbatch_size):
    with pytest.raises(ValueError, match="`microbatch_size` must"):
        function(np.arange(7), 8, microbatch_size)
