"""What all sampling strategies promise: shapes and types, where randomness comes from, refusals."""

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest

from dpkernels.batch_selection import (
    BallsInBinsSampling,
    BatchSelectionStrategy,
    BMinSepSampling,
    CyclicPoissonSampling,
    FixedBatchSampling,
    PartitionType,
    RandomAllocationSampling,
    UserSelectionStrategy,
)

INDEPENDENT = PartitionType.INDEPENDENT
STRATEGIES = [
    CyclicPoissonSampling(0.3, 6),
    CyclicPoissonSampling(0.9, 6, truncated_batch_size=2, cycle_length=2),
    CyclicPoissonSampling(0.5, 6, cycle_length=2, partition_type=INDEPENDENT),
    BallsInBinsSampling(6, cycle_length=4),
    RandomAllocationSampling(2, iterations=6),
    FixedBatchSampling(3, iterations=6),
    FixedBatchSampling(3, iterations=6, replace=True),
    BMinSepSampling(0.5, 6, min_sep=3),
    BMinSepSampling(0.5, 6, min_sep=3, warm_start=False, truncated_batch_size=2),
]
SIZES = [4, 127, 128, 129, 300]  # around where 8 bits end
OWNERS = np.array([7, 3, 7, 7, 9, 3])
all_strategies = pytest.mark.parametrize("strategy", STRATEGIES, ids=str)


def same(first, second):
    pairs = itertools.zip_longest(first, second)
    return all(a is not None and np.array_equal(a, b) for a, b in pairs)


@all_strategies
def test_batches_are_int64_indices_of_the_dataset(strategy):
    for num_examples in SIZES:
        drawn = list(strategy.batch_iterator(num_examples, rng=0))
        assert len(drawn) == strategy.iterations
        for indices in drawn:
            assert indices.dtype == np.int64
            assert indices.ndim == 1
            assert np.isin(indices, np.arange(num_examples)).all()


@all_strategies
def test_batches_do_not_repeat_an_example_unless_with_replacement(strategy):
    repeats = any(
        np.unique(indices).size < indices.size for indices in strategy.batch_iterator(5, rng=0)
    )
    assert repeats == getattr(strategy, "replace", False)


@all_strategies
def test_empty_dataset_gives_empty_int64_batches(strategy):
    if isinstance(strategy, FixedBatchSampling):
        strategy = dataclasses.replace(strategy, batch_size=0)
    drawn = list(strategy.batch_iterator(0, rng=0))
    assert [(b.shape, b.dtype) for b in drawn] == [((0,), np.int64)] * 6
    assert strategy.expected_batch_size(0) == 0


@all_strategies
def test_no_iterations_give_no_batches(strategy):
    changes = {"total_participations": 0} if hasattr(strategy, "total_participations") else {}
    strategy = dataclasses.replace(strategy, iterations=0, **changes)
    assert list(strategy.batch_iterator(10, rng=0)) == []
    assert np.isfinite(strategy.expected_batch_size(10))


@all_strategies
def test_seed_decides_the_batches(strategy):
    first, again = strategy.batch_iterator(50, rng=5), strategy.batch_iterator(50, rng=np.int32(5))
    assert same(first, again)
    assert not same(strategy.batch_iterator(50, rng=5), strategy.batch_iterator(50, rng=6))


@all_strategies
def test_generator_is_advanced(strategy):
    rng = np.random.default_rng(5)
    first, second = list(strategy.batch_iterator(50, rng)), list(strategy.batch_iterator(50, rng))
    assert same(first, strategy.batch_iterator(50, rng=5))
    assert not same(first, second)


@all_strategies
def test_without_rng_batches_differ_each_time(strategy):
    # 300 examples: two runs agree with a probability below 1e-12 under every strategy here.
    assert not same(strategy.batch_iterator(300), strategy.batch_iterator(300))


@all_strategies
def test_global_random_state_is_not_touched(strategy):
    np.random.seed(3)  # same global seed, other draws; and the state stays as it is
    first = list(strategy.batch_iterator(300))
    np.random.seed(3)
    second = list(strategy.batch_iterator(300))
    assert not same(first, second)
    assert np.random.random() == np.random.RandomState(3).random_sample()


@all_strategies
def test_writing_into_a_batch_changes_no_later_one(strategy):
    expected = list(strategy.batch_iterator(50, rng=0))
    for indices, kept in zip(strategy.batch_iterator(50, rng=0), expected, strict=True):
        np.testing.assert_array_equal(indices, kept)
        indices[:] = 0


@all_strategies
def test_strategies_are_frozen_and_hashable(strategy):
    with pytest.raises(dataclasses.FrozenInstanceError):
        strategy.iterations = 1
    assert {strategy, dataclasses.replace(strategy)} == {strategy}


@all_strategies
@pytest.mark.parametrize(
    ("rng", "error"),
    [
        (-1, ValueError),
        (1.5, TypeError),
        (True, TypeError),
        ("0", TypeError),
        (np.random.RandomState(0), TypeError),
        (np.random, TypeError),
        (np.random.PCG64(0), TypeError),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_rng_is_refused_at_once(strategy, rng, error):
    with pytest.raises(error, match="`rng` must be"):
        strategy.batch_iterator(50, rng)


@all_strategies
@pytest.mark.parametrize(("num_examples", "error"), [(-1, ValueError), (2.0, TypeError)])
def test_num_examples_is_refused_at_once(strategy, num_examples, error):
    with pytest.raises(error, match="`num_examples` must be"):
        strategy.batch_iterator(num_examples)
    with pytest.raises(error, match="`num_examples` must be"):
        strategy.expected_batch_size(num_examples)


POISSON, _, _, BINS, ALLOCATION, FIXED, _, MIN_SEP, _ = STRATEGIES


@pytest.mark.parametrize(
    ("strategy", "field", "value", "error"),
    [
        (POISSON, "sampling_prob", -0.1, ValueError),
        (POISSON, "sampling_prob", 1.1, ValueError),
        (POISSON, "sampling_prob", np.nan, ValueError),
        (POISSON, "sampling_prob", "1", TypeError),
        (POISSON, "truncated_batch_size", -1, ValueError),
        (POISSON, "truncated_batch_size", 2.0, TypeError),
        (POISSON, "cycle_length", 0, ValueError),
        (POISSON, "partition_type", 2, TypeError),
        (BINS, "cycle_length", 0, ValueError),
        (ALLOCATION, "total_participations", -1, ValueError),
        (ALLOCATION, "total_participations", 7, ValueError),
        (ALLOCATION, "total_participations", 1.0, TypeError),
        (FIXED, "batch_size", -3, ValueError),
        (FIXED, "replace", "no", TypeError),
        (MIN_SEP, "sampling_prob", 2, ValueError),
        (MIN_SEP, "min_sep", 0, ValueError),
        (MIN_SEP, "warm_start", "no", TypeError),
        (MIN_SEP, "truncated_batch_size", -1, ValueError),
    ],
    ids=str,
)
def test_fields_out_of_range_are_refused(strategy, field, value, error):
    with pytest.raises(error, match=f"`{field}` must be"):
        dataclasses.replace(strategy, **{field: value})


@all_strategies
@pytest.mark.parametrize(("iterations", "error"), [(-1, ValueError), (5.5, TypeError)])
def test_iterations_are_refused(strategy, iterations, error):
    with pytest.raises(error, match="`iterations` must be"):
        dataclasses.replace(strategy, iterations=iterations)


def test_fixed_batch_larger_than_the_dataset_is_refused():
    strategy = FixedBatchSampling(4, iterations=1)
    with pytest.raises(ValueError, match="`batch_size` must be at most `num_examples`, got 4 of 3"):
        strategy.batch_iterator(3)
    with pytest.raises(ValueError, match="`num_examples` must be positive, got 0"):
        dataclasses.replace(strategy, replace=True).batch_iterator(0)


def test_equal_split_into_more_groups_than_examples_is_refused():
    strategy = CyclicPoissonSampling(0.5, 2, cycle_length=4)
    for call in (strategy.batch_iterator, strategy.expected_batch_size):
        with pytest.raises(ValueError, match="`cycle_length` must be at most `num_examples`"):
            call(3)
    independent = dataclasses.replace(strategy, partition_type=INDEPENDENT)
    assert len(list(independent.batch_iterator(3))) == 2


def test_a_strategy_that_does_not_know_its_size_says_so():
    class Everything(BatchSelectionStrategy):
        iterations = 1

        def batch_iterator(self, num_examples, rng=None):
            yield np.arange(num_examples)

    with pytest.raises(NotImplementedError, match="Everything does not say how large"):
        Everything().expected_batch_size(3)


# Users


def by_users(base, *, each=1, owners=OWNERS, shuffle=False, rng=0):
    strategy = UserSelectionStrategy(base, each, shuffle)
    return list(strategy.batch_iterator(owners, rng))


@all_strategies
@pytest.mark.parametrize("each", [1, 2, 4])
def test_users_are_those_that_the_base_strategy_draws(strategy, each):
    owners = np.repeat(np.arange(10, 16), [1, 2, 3, 4, 5, 1])
    drawn = by_users(strategy, each=each, owners=owners)
    # Without a shuffle the generator is only used for the users.
    for rows, users in zip(drawn, strategy.batch_iterator(6, rng=0), strict=True):
        assert rows.shape == (users.size, each)
        assert rows.dtype == np.int64
        expected = np.broadcast_to(users[:, None] + 10, rows.shape)
        np.testing.assert_array_equal(owners[rows], expected)


@pytest.mark.parametrize("each", [1, 2, 3])
def test_empty_draw_of_users_has_rows_of_integers(each):
    (rows,) = by_users(CyclicPoissonSampling(0.0, 1), each=each)
    assert rows.shape == (0, each)
    assert rows.dtype == np.int64


def test_no_users_at_all_give_empty_batches():
    drawn = by_users(CyclicPoissonSampling(0.5, 2), each=2, owners=[])
    assert [rows.shape for rows in drawn] == [(0, 2), (0, 2)]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("each", [1, 2, 3, 5])
def test_users_bring_their_examples_in_turns(each, shuffle):
    counts = Counter()
    for rows in by_users(CyclicPoissonSampling(0.6, 40), each=each, shuffle=shuffle):
        counts.update(rows.ravel().tolist())
        for user in (3, 7, 9):
            taken = [counts[i] for i in np.flatnonzero(user == OWNERS)]
            assert max(taken) - min(taken) <= 1


def test_users_bring_their_examples_in_the_order_of_the_dataset():
    drawn = by_users(CyclicPoissonSampling(1.0, 3), each=2)
    rows_of_7 = [next(row.tolist() for row in rows if OWNERS[row[0]] == 7) for rows in drawn]
    assert rows_of_7 == [[0, 2], [3, 0], [2, 3]]


@pytest.mark.parametrize(("each", "iterations"), [(2, 1), (1, 2)])
def test_a_user_drawn_twice_in_a_batch_brings_other_examples(each, iterations):
    base = FixedBatchSampling(3, iterations, replace=True)
    drawn = by_users(base, each=each, owners=[1] * 6)
    np.testing.assert_array_equal(np.sort(np.concatenate(drawn), axis=None), np.arange(6))


def test_users_examples_are_shuffled_uniformly():
    # 6 orders, 6000 runs: all within 5.5 standard deviations (38 each) of 1000.
    rng, base = np.random.default_rng(0), CyclicPoissonSampling(1.0, 1)
    strategy = UserSelectionStrategy(base, 3, shuffle_per_user=True)
    owners = ["b", "a", "b", "b"]
    orders = Counter()
    for _ in range(6000):
        (rows,) = strategy.batch_iterator(owners, rng)
        orders[tuple(next(row for row in rows.tolist() if 1 not in row))] += 1
    assert sorted(orders) == sorted(itertools.permutations([0, 2, 3]))
    sigma = (6000 * (1 / 6) * (5 / 6)) ** 0.5
    assert max(abs(n - 1000) for n in orders.values()) < 5.5 * sigma


def test_other_users_examples_do_not_change_a_users_rows():
    # User 5 has two more examples in the second dataset, at its end; user 1's rows stay.
    base = CyclicPoissonSampling(0.5, 20)
    small = by_users(base, each=2, owners=[1, 5, 1, 1])
    large = by_users(base, each=2, owners=[1, 5, 1, 1, 5, 5])
    for one, two in zip(small, large, strict=True):
        np.testing.assert_array_equal(one[one[:, 0] != 1], two[~np.isin(two[:, 0], [1, 4, 5])])


def test_users_have_the_iterations_and_sizes_of_the_base_strategy():
    strategy = UserSelectionStrategy(CyclicPoissonSampling(0.5, 7), 3)
    assert strategy.iterations == 7
    assert strategy.expected_batch_size(10) == 5


@pytest.mark.parametrize(
    ("owners", "error"),
    [
        ([[1, 2]], ValueError),
        (3, ValueError),
        ([1.0, np.nan], TypeError),
        ([None, "ann"], TypeError),
    ],
)
def test_user_ids_are_refused_at_once(owners, error):
    strategy = UserSelectionStrategy(CyclicPoissonSampling(0.5, 1))
    with pytest.raises(error, match="`user_ids` must"):
        strategy.batch_iterator(owners)


@pytest.mark.parametrize(
    ("fields", "error", "name"),
    [
        ((3,), TypeError, "base_strategy"),
        ((CyclicPoissonSampling(0.5, 1), 0), ValueError, "examples_per_user_per_batch"),
        ((CyclicPoissonSampling(0.5, 1), 1.5), TypeError, "examples_per_user_per_batch"),
        ((CyclicPoissonSampling(0.5, 1), 1, "no"), TypeError, "shuffle_per_user"),
    ],
)
def test_user_selection_refuses_fields(fields, error, name):
    with pytest.raises(error, match=f"`{name}` must be"):
        UserSelectionStrategy(*fields)


def test_user_selection_refuses_a_random_state():
    with pytest.raises(TypeError, match="`rng` must be"):
        UserSelectionStrategy(CyclicPoissonSampling(0.5, 1)).batch_iterator([1], np.random.mtrand)
