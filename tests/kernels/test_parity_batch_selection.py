"""The same names, fields and laws as JAX Privacy, where that is installed."""

import inspect
import itertools
from collections import Counter

import numpy as np
import pytest
from scipy import stats

import dpkernels.batch_selection as ours

theirs = pytest.importorskip("jax_privacy.batch_selection")
pytestmark = pytest.mark.slow

NAMES = [
    "BMinSepSampling",
    "BallsInBinsSampling",
    "CyclicPoissonSampling",
    "FixedBatchSampling",
    "RandomAllocationSampling",
    "UserSelectionStrategy",
    "pad_to_multiple_of",
    "split_and_pad_global_batch",
]


def counterpart(name):
    if not hasattr(theirs, name):
        pytest.skip(f"this release has no {name}")
    return getattr(theirs, name)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_and_defaults_are_the_same(name):
    def arguments(function):
        return [
            (p.name, str(p.default), p.kind)
            for p in inspect.signature(function).parameters.values()
        ]

    expected = arguments(counterpart(name))
    # Release 2.0.0 has fewer arguments for padding.
    assert arguments(getattr(ours, name))[: len(expected)] == expected


def test_partition_types_are_the_same():
    assert ours.PartitionType.__members__.keys() == theirs.PartitionType.__members__.keys()


def both(name, *args):
    if name == "CyclicPoissonSampling" and len(args) == 5:
        split = args[4]
        return [
            getattr(m, name)(*args[:4], getattr(m.PartitionType, split)) for m in (ours, theirs)
        ]
    counterpart(name)
    return [getattr(m, name)(*args) for m in (ours, theirs)]


STRATEGIES = [
    ("CyclicPoissonSampling", 0.3, 3),
    ("CyclicPoissonSampling", 0.6, 2, 2),
    ("CyclicPoissonSampling", 0.6, 2, 1, 2),
    ("CyclicPoissonSampling", 0.6, 2, None, 2, "EQUAL_SPLIT"),
    ("CyclicPoissonSampling", 0.6, 2, None, 2, "INDEPENDENT"),
    ("BallsInBinsSampling", 3, 2),
    ("RandomAllocationSampling", 2, 3),
    ("FixedBatchSampling", 2, 2),
    ("FixedBatchSampling", 2, 2, True),
    ("BMinSepSampling", 0.5, 3, 2),
    ("BMinSepSampling", 0.5, 3, 2, False),
    ("BMinSepSampling", 0.5, 3, 2, False, 1),
]


@pytest.mark.parametrize("case", STRATEGIES, ids=str)
def test_batches_have_the_same_law(case):
    # 4000 runs each over 3 examples, whole runs compared: of an outcome of probability 0.1 a
    # deviation by 30% is seen. By chance a case fails with probability 1e-7.
    counts = []
    for strategy in both(*case):
        rng = np.random.default_rng(0)
        counts.append(
            Counter(
                tuple(tuple(sorted(b.tolist())) for b in strategy.batch_iterator(3, rng))
                for _ in range(4000)
            )
        )
    outcomes = set(counts[0]) | set(counts[1])
    table = np.array([[c[o] for o in outcomes] for c in counts])
    common = table[:, table.sum(0) >= 10]
    table = np.hstack([common, table[:, table.sum(0) < 10].sum(1, keepdims=True)])
    table = table[:, table.sum(0) > 0]
    assert stats.chi2_contingency(table).pvalue > 1e-7


@pytest.mark.parametrize("each", [1, 2, 3])
def test_users_bring_the_same_examples(each):
    # All users are drawn every time, so nothing is random but the order of rows.
    owners = np.array([7, 3, 7, 7, 9, 3])
    drawn = [
        m.UserSelectionStrategy(m.CyclicPoissonSampling(1.0, 5), each).batch_iterator(owners, 0)
        for m in (ours, theirs)
    ]
    for one, two in zip(*drawn, strict=True):
        assert sorted(one.tolist()) == sorted(two.tolist())


@pytest.mark.parametrize("length", range(9))
@pytest.mark.parametrize("size", [1, 3, 4])
def test_padding_is_the_same(length, size):
    indices = np.arange(length)
    np.testing.assert_array_equal(
        ours.pad_to_multiple_of(indices, size), theirs.pad_to_multiple_of(indices, size)
    )
    parts = [m.split_and_pad_global_batch(indices, size) for m in (ours, theirs)]
    for one, two in itertools.zip_longest(*parts):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("length", range(14))
@pytest.mark.parametrize("microbatch_size", [1, 2, 3, 6])
def test_padding_fills_the_same_microbatches(length, microbatch_size):
    # The order differs: ours is for contiguous microbatches, theirs for strided ones.
    parts = [
        m.split_and_pad_global_batch(np.arange(length), 6, microbatch_size) for m in (ours, theirs)
    ]
    for one, two in zip(*parts, strict=True):
        contiguous = one.reshape(-1, microbatch_size)
        strided = two.reshape(-1, 6 // microbatch_size).T
        assert sorted(one) == sorted(two)
        np.testing.assert_array_equal((contiguous == -1).sum(1), (strided == -1).sum(1))
