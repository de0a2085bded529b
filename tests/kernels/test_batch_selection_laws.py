"""The laws by which batches are drawn, against exact ones that are enumerated here.

A chi-square test on whole outcomes (a batch, or all batches that an example is in) sees every
deviation at once: of marginals, of dependence between examples, and of dependence between
iterations. With seeds fixed a test is no flake; with another seed each fails by chance with
probability 1e-7, `FALSE_ALARM`. Each test also shows that it tells a slightly wrong law apart.
"""

import itertools
from collections import Counter, defaultdict
from math import comb

import numpy as np
import pytest
from scipy import stats

from dpkernels.batch_selection import (
    BallsInBinsSampling,
    BMinSepSampling,
    CyclicPoissonSampling,
    FixedBatchSampling,
    PartitionType,
    RandomAllocationSampling,
)

FALSE_ALARM = 1e-7
INDEPENDENT = PartitionType.INDEPENDENT


def pvalue(outcomes, law):
    """Chi-square p-value of outcomes under a law; 0 for an outcome that it rules out."""
    counts = Counter(outcomes)
    law = {outcome: prob for outcome, prob in law.items() if prob > 0}
    assert sum(law.values()) == pytest.approx(1)
    if not counts.keys() <= law.keys():
        return 0.0
    total = sum(counts.values())
    # Outcomes too rare for the approximation share one cell, with the next ones above if need be.
    cells, pooled = [], np.zeros(2)
    for prob, outcome in sorted(((p, o) for o, p in law.items()), reverse=True):
        pooled += counts[outcome], prob * total
        if prob * total >= 5:
            cells.append(pooled)
            pooled = np.zeros(2)
    cells[-1] = cells[-1] + pooled
    observed, expected = np.array(cells).T
    if len(cells) == 1:
        return 1.0
    return float(stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue)


def histories(strategy, num_examples, seed=0):
    """For each example the iterations it was in, as a tuple of 0 and 1."""
    taken = np.zeros((num_examples, strategy.iterations), int)
    for i, indices in enumerate(strategy.batch_iterator(num_examples, seed)):
        np.add.at(taken[:, i], indices, 1)
    return list(map(tuple, taken.tolist()))


def batches(strategy, num_examples, seed=0):
    return [tuple(sorted(b.tolist())) for b in strategy.batch_iterator(num_examples, seed)]


def runs(strategy, num_examples, count, seed=0):
    """The batches of many short runs from one generator."""
    rng = np.random.default_rng(seed)
    return [tuple(batches(strategy, num_examples, rng)) for _ in range(count)]


def together(drawn):
    """For each run the histories of examples 0 and 1."""
    return [tuple(tuple(int(i in b) for b in run) for i in range(2)) for run in drawn]


def poisson_law(members, prob, at_most=None):
    """The law of one batch, from all coin flips; of a longer draw a uniform part is kept."""
    law = defaultdict(float)
    for flips in itertools.product([False, True], repeat=len(members)):
        drawn = [m for m, is_drawn in zip(members, flips, strict=True) if is_drawn]
        share = prob ** len(drawn) * (1 - prob) ** (len(members) - len(drawn))
        size = len(drawn) if at_most is None else min(len(drawn), at_most)
        for kept in itertools.combinations(drawn, size):
            law[kept] += share / comb(len(drawn), size)
    return law


def uniform(outcomes):
    outcomes = list(outcomes)
    return dict.fromkeys(outcomes, 1 / len(outcomes))


def pairs(law):
    return {(a, b): p * q for (a, p), (b, q) in itertools.product(law.items(), repeat=2)}


# Cyclic Poisson


@pytest.mark.parametrize("prob", [0.3, 0.7])
def test_poisson_draws_each_example_independently(prob):
    # 16 sets of 4 examples, 30000 draws: 3% off in `sampling_prob` is seen, as shown.
    drawn = batches(CyclicPoissonSampling(prob, iterations=30_000), 4)
    assert pvalue(drawn, poisson_law(range(4), prob)) > FALSE_ALARM
    assert pvalue(drawn, poisson_law(range(4), prob * 0.97)) < FALSE_ALARM


def test_poisson_draws_successive_batches_independently():
    drawn = batches(CyclicPoissonSampling(0.4, iterations=20_000), 3)
    assert pvalue(zip(drawn[::2], drawn[1::2], strict=True), pairs(poisson_law(range(3), 0.4))) > (
        FALSE_ALARM
    )
    # Batches that repeat the one before, now and then, are told apart.
    sticky = [a if i % 20 == 0 else b for i, (a, b) in enumerate(itertools.pairwise(drawn))]
    assert pvalue(zip(drawn[:-1], sticky, strict=True), pairs(poisson_law(range(3), 0.4))) < (
        FALSE_ALARM
    )


def test_poisson_draws_each_of_many_examples_alike():
    # The marginals of 1000 examples and their sizes, where NumPy draws by another algorithm.
    strategy = CyclicPoissonSampling(0.02, iterations=4000)
    drawn = list(strategy.batch_iterator(1000, rng=1))
    times_drawn = np.bincount(np.concatenate(drawn), minlength=1000)
    law = dict(enumerate(stats.binom.pmf(np.arange(4001), 4000, 0.02)))
    assert pvalue(times_drawn.tolist(), law) > FALSE_ALARM
    sizes = [b.size for b in drawn]
    law = dict(enumerate(stats.binom.pmf(np.arange(1001), 1000, 0.02)))
    assert pvalue(sizes, law) > FALSE_ALARM
    wrong = dict(enumerate(stats.binom.pmf(np.arange(1001), 1000, 0.0208)))
    assert pvalue(sizes, wrong) < FALSE_ALARM


@pytest.mark.parametrize("at_most", [0, 1, 2, 4])
def test_truncated_poisson_keeps_a_uniform_part(at_most):
    drawn = batches(CyclicPoissonSampling(0.4, 30_000, truncated_batch_size=at_most), 4)
    assert pvalue(drawn, poisson_law(range(4), 0.4, at_most)) > FALSE_ALARM
    if at_most in (1, 2):
        # Keeping the first ones drawn in order instead of a uniform part is told apart.
        first = defaultdict(float)
        for subset, share in poisson_law(range(4), 0.4).items():
            first[subset[:at_most]] += share
        assert pvalue(drawn, first) < FALSE_ALARM


def cyclic_law(num_examples, prob, split):
    """The joint law of the first two batches of two groups."""
    law = defaultdict(float)
    size = num_examples // 2
    for groups in itertools.product([0, 1], repeat=num_examples):
        if split is INDEPENDENT:
            weight = 2.0**-num_examples
        elif sum(groups) == size:
            weight = 1 / comb(num_examples, size)
        else:
            continue
        first, second = ([i for i, g in enumerate(groups) if g == k] for k in (0, 1))
        for a, p in poisson_law(first, prob).items():
            for b, q in poisson_law(second, prob).items():
                law[a, b] += weight * p * q
    return law


@pytest.mark.parametrize("prob", [0.6, 1.0])
@pytest.mark.parametrize("split", PartitionType)
def test_cyclic_poisson_draws_from_a_random_partition(split, prob):
    strategy = CyclicPoissonSampling(prob, 2, cycle_length=2, partition_type=split)
    drawn = runs(strategy, 4, 10_000)
    assert pvalue(drawn, cyclic_law(4, prob, split)) > FALSE_ALARM
    other = PartitionType.EQUAL_SPLIT if split is INDEPENDENT else INDEPENDENT
    assert pvalue(drawn, cyclic_law(4, prob, other)) < FALSE_ALARM


@pytest.mark.parametrize("split", PartitionType)
def test_cyclic_poisson_draws_afresh_each_time_a_group_has_its_turn(split):
    # Histories of 60000 examples over two cycles of two. Under EQUAL_SPLIT groups of exactly
    # equal size make the statistic smaller, so false alarms are rarer still.
    strategy = CyclicPoissonSampling(0.3, 4, cycle_length=2, partition_type=split)
    law = defaultdict(float)
    for group, first, second in itertools.product([0, 1], repeat=3):
        share = 0.5 * (0.3 if first else 0.7) * (0.3 if second else 0.7)
        law[(0, first, 0, second) if group else (first, 0, second, 0)] += share
    assert pvalue(histories(strategy, 60_000), law) > FALSE_ALARM


def test_equal_split_leaves_out_random_examples():
    strategy = CyclicPoissonSampling(1.0, 2, cycle_length=2)
    left_out = []
    for first, second in runs(strategy, 5, 6000):
        assert len(first) == len(second) == 2
        left_out += {*range(5)} - {*first, *second}
    assert pvalue(left_out, uniform(range(5))) > FALSE_ALARM


def test_truncated_cyclic_poisson_is_uniform_within_its_group():
    strategy = CyclicPoissonSampling(0.7, 2, truncated_batch_size=1, cycle_length=2)
    law = defaultdict(float)
    for first in itertools.combinations(range(4), 2):
        second = sorted({*range(4)} - {*first})
        for a, p in poisson_law(first, 0.7, 1).items():
            for b, q in poisson_law(second, 0.7, 1).items():
                law[a, b] += p * q / comb(4, 2)
    assert pvalue(runs(strategy, 4, 10_000), law) > FALSE_ALARM


# Balls in bins, random allocation


def test_balls_in_bins_throws_each_example_independently():
    drawn = runs(BallsInBinsSampling(iterations=3, cycle_length=3), 3, 10_000)
    law = uniform(
        tuple(tuple(i for i, b in enumerate(bins) if b == k) for k in range(3))
        for bins in itertools.product(range(3), repeat=3)
    )
    assert pvalue(drawn, law) > FALSE_ALARM
    # Bins as equal as can be, the shuffled epochs of a data loader, are told apart.
    equal = {d: 1 / 6 for d in law if all(len(b) == 1 for b in d)}
    assert pvalue(drawn, equal) < FALSE_ALARM


def test_balls_in_bins_repeats_its_cycle():
    drawn = batches(BallsInBinsSampling(iterations=7, cycle_length=3), 50)
    assert drawn[:3] == drawn[3:6]
    assert drawn[6] == drawn[0]
    assert sorted(sum(drawn[:3], ())) == list(range(50))


@pytest.mark.parametrize("participations", [0, 1, 2, 3, 4])
def test_random_allocation_takes_each_set_of_iterations_alike(participations):
    taken = histories(RandomAllocationSampling(participations, iterations=4), 50_000)
    every = itertools.product([0, 1], repeat=4)
    law = uniform(h for h in every if sum(h) == participations)
    assert pvalue(taken, law) > FALSE_ALARM
    if participations == 2:
        # A Poisson draw at the same rate is ruled out; so is favouring the first iteration by 4%.
        assert any(pvalue([t], law) == 0 for t in histories(CyclicPoissonSampling(0.5, 4), 50))
        wrong = {h: p * (1.04 if h[0] else 0.96) for h, p in law.items()}
        assert pvalue(taken, wrong) < FALSE_ALARM


def test_random_allocation_is_independent_between_examples():
    drawn = together(runs(RandomAllocationSampling(1, iterations=3), 2, 8000))
    single = uniform([(1, 0, 0), (0, 1, 0), (0, 0, 1)])
    assert pvalue(drawn, pairs(single)) > FALSE_ALARM
    never_together = {pair: p for pair, p in pairs(single).items() if pair[0] != pair[1]}
    assert pvalue(drawn, uniform(never_together)) < FALSE_ALARM


# Fixed batches


def test_fixed_batches_are_uniform_subsets_independent_of_one_another():
    drawn = batches(FixedBatchSampling(2, iterations=30_000), 5)
    subsets = uniform(itertools.combinations(range(5), 2))
    assert pvalue(zip(drawn[::2], drawn[1::2], strict=True), pairs(subsets)) > FALSE_ALARM
    # Successive batches that never share an example, as in an epoch, are told apart.
    disjoint = uniform(p for p in pairs(subsets) if not set(p[0]) & set(p[1]))
    assert pvalue(zip(drawn[::2], drawn[1::2], strict=True), disjoint) < FALSE_ALARM


def test_fixed_batches_with_replacement_are_uniform_sequences():
    strategy = FixedBatchSampling(2, iterations=20_000, replace=True)
    drawn = [tuple(b.tolist()) for b in strategy.batch_iterator(4, rng=0)]
    assert pvalue(drawn, uniform(itertools.product(range(4), repeat=2))) > FALSE_ALARM
    without = uniform(itertools.permutations(range(4), 2))
    assert pvalue(drawn, without) < FALSE_ALARM


# b-min-sep


def min_sep_law(prob, min_sep, iterations, warm_start):
    """The law of the iterations that an example is in, from its rests."""
    ready = 1 / (1 + (min_sep - 1) * prob) if warm_start else 1.0
    state = {((), 0): ready}  # iterations so far, iterations left to rest
    for rest in range(1, min_sep):
        state[(), rest] = (1 - ready) / (min_sep - 1)
    for _ in range(iterations):
        following = defaultdict(float)
        for (history, rest), share in state.items():
            if rest:
                following[(*history, 0), rest - 1] += share
            else:
                following[(*history, 1), min_sep - 1] += share * prob
                following[(*history, 0), 0] += share * (1 - prob)
        state = following
    law = defaultdict(float)
    for (history, _), share in state.items():
        law[history] += share
    return law


@pytest.mark.parametrize("warm_start", [True, False])
@pytest.mark.parametrize(("prob", "min_sep"), [(0.4, 1), (0.4, 2), (0.3, 3), (1.0, 3), (0.0, 2)])
def test_min_sep_draws_and_rests(prob, min_sep, warm_start):
    taken = histories(BMinSepSampling(prob, 6, min_sep, warm_start), 50_000)
    assert pvalue(taken, min_sep_law(prob, min_sep, 6, warm_start)) > FALSE_ALARM
    if prob == 0.3:
        assert pvalue(taken, min_sep_law(0.31, min_sep, 6, warm_start)) < FALSE_ALARM
        assert pvalue(taken, min_sep_law(prob, min_sep, 6, not warm_start)) < FALSE_ALARM


def test_warm_start_draws_alike_from_the_first_batch_on():
    # Each of 8 sizes within 6 standard deviations (1.6e-8 together): 1.4% off is seen.
    strategy, count = BMinSepSampling(0.3, 8, min_sep=4), 1_000_000
    prob = 1 / (4 - 1 + 1 / 0.3)
    sizes = np.array([b.size for b in strategy.batch_iterator(count, rng=0)])
    sigma = (count * prob * (1 - prob)) ** 0.5
    assert np.abs(sizes - count * prob).max() < 6 * sigma


@pytest.mark.parametrize("warm_start", [True, False])
def test_min_sep_is_independent_between_examples(warm_start):
    strategy = BMinSepSampling(0.5, 3, min_sep=2, warm_start=warm_start)
    drawn = together(runs(strategy, 2, 8000))
    assert pvalue(drawn, pairs(min_sep_law(0.5, 2, 3, warm_start))) > FALSE_ALARM


def test_min_sep_keeps_its_distance_when_truncated():
    strategy = BMinSepSampling(0.6, 200, min_sep=4, truncated_batch_size=5)
    last = np.full(40, -100)
    for i, indices in enumerate(strategy.batch_iterator(40, rng=0)):
        assert indices.size <= 5
        assert (i - last[indices] >= 4).all()
        last[indices] = i


def test_min_sep_lets_those_rest_that_truncation_left_out():
    strategy = BMinSepSampling(1.0, 4, min_sep=2, warm_start=False, truncated_batch_size=3)
    sizes = [b.size for b in strategy.batch_iterator(10, rng=0)]
    assert sizes == [3, 0, 3, 0]


def test_truncated_min_sep_keeps_a_uniform_part():
    strategy = BMinSepSampling(0.5, 1, min_sep=3, warm_start=False, truncated_batch_size=2)
    drawn = [run[0] for run in runs(strategy, 4, 12_000)]
    assert pvalue(drawn, poisson_law(range(4), 0.5, 2)) > FALSE_ALARM


# The mean size


STRATEGIES = [
    CyclicPoissonSampling(0.3, 4),
    CyclicPoissonSampling(0.3, 4, truncated_batch_size=3),
    CyclicPoissonSampling(0.3, 4, truncated_batch_size=0),
    CyclicPoissonSampling(0.0, 4, truncated_batch_size=3),
    CyclicPoissonSampling(1.0, 4, truncated_batch_size=3),
    CyclicPoissonSampling(0.8, 4, truncated_batch_size=3, cycle_length=3),
    CyclicPoissonSampling(0.8, 4, cycle_length=3, partition_type=INDEPENDENT),
    CyclicPoissonSampling(0.8, 4, 3, cycle_length=3, partition_type=INDEPENDENT),
    BallsInBinsSampling(5, cycle_length=3),
    RandomAllocationSampling(2, iterations=5),
    FixedBatchSampling(4, iterations=3),
    FixedBatchSampling(4, iterations=3, replace=True),
    BMinSepSampling(0.5, 7, min_sep=3),
    BMinSepSampling(0.5, 7, min_sep=3, warm_start=False),
    BMinSepSampling(0.5, 7, min_sep=3, truncated_batch_size=2),
    BMinSepSampling(0.9, 7, min_sep=3, warm_start=False, truncated_batch_size=2),
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_expected_batch_size_is_the_mean(strategy):
    # Within 5.5 standard errors (4e-8) of the mean of 1500 runs: off by some 0.05 at most.
    rng = np.random.default_rng(0)
    means = [
        np.mean([b.size for b in strategy.batch_iterator(11, rng)], dtype=float)
        for _ in range(1500)
    ]
    error = np.std(means) / len(means) ** 0.5
    assert abs(np.mean(means) - strategy.expected_batch_size(11)) <= 5.5 * error + 1e-12


@pytest.mark.parametrize("at_most", [0, 1, 3, 6, 7, 8])
@pytest.mark.parametrize("prob", [0.0, 0.2, 0.9, 1.0])
def test_expected_batch_size_of_a_truncated_draw_is_exact(prob, at_most):
    sizes = np.arange(8)
    exact = np.sum(np.minimum(sizes, at_most) * stats.binom.pmf(sizes, 7, prob))
    strategy = CyclicPoissonSampling(prob, 1, truncated_batch_size=at_most)
    assert strategy.expected_batch_size(7) == pytest.approx(exact, abs=1e-12)


def test_expected_batch_size_of_a_warm_start_has_a_closed_form():
    strategy = BMinSepSampling(0.25, 10, min_sep=5)
    assert strategy.expected_batch_size(80) == pytest.approx(80 / (5 - 1 + 1 / 0.25))


@pytest.mark.parametrize(("min_sep", "prob"), [(1, 0.5), (3, 0.3), (3, 1.0), (9, 0.7)])
def test_expected_batch_size_of_a_cold_start_follows_the_law(min_sep, prob):
    law = min_sep_law(prob, min_sep, 6, warm_start=False)
    exact = 10 * sum(sum(history) * share for history, share in law.items()) / 6
    strategy = BMinSepSampling(prob, 6, min_sep, warm_start=False)
    assert strategy.expected_batch_size(10) == pytest.approx(exact)
