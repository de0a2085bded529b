"""Sampling in which every example takes part a set number of times, at times of its own.

Example:
    >>> strategy = RandomAllocationSampling(total_participations=2, iterations=5)
    >>> batches = list(strategy.batch_iterator(100, rng=0))
    >>> set(np.bincount(np.concatenate(batches)).tolist())
    {2}
"""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from dpkernels import _validate
from dpkernels.batch_selection.base import (
    BatchSelectionStrategy,
    RngType,
    check_iterations,
    check_num_examples,
    make_generator,
)
from dpkernels.batch_selection.poisson import independent_groups


@dataclasses.dataclass(frozen=True)
class BallsInBinsSampling(BatchSelectionStrategy):
    """Each example is thrown into one of `cycle_length` bins, and the bins take turns as batches.

    The throw is uniform, independent of the other examples, and made once: batch i is bin
    `i % cycle_length`, the same in every cycle. It is `CyclicPoissonSampling` with
    `sampling_prob=1` and independent groups.

    Accounting: No sound accounting is known here: no config states an epsilon for it. The papers
    compute the amplification by Monte Carlo. What holds without any amplification, under
    ADD_OR_REMOVE_ONE, is `accounting.amplified_bandmf_event` with `sampling_prob=1` and
    `num_bands=cycle_length`, for a strategy of no more bands.

    Attributes:
        iterations: How many batches are drawn.
        cycle_length: How many bins there are.

    Guarantees:
        Each example is in each bin with probability 1/cycle_length, independently of the others.
        Each example is in exactly one batch of every `cycle_length` successive ones, always at
        the same place of the cycle.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If `iterations` is negative or `cycle_length` below 1.

    Source:
        Choquette-Choo et al. 2024, "Near exact privacy amplification for matrix mechanisms",
        arXiv 2410.06266, section 3. Chua et al. 2024, "Balls-and-bins sampling for DP-SGD", arXiv
        2412.16802.
    """

    iterations: int
    cycle_length: int

    def __post_init__(self) -> None:
        check_iterations(self.iterations)
        hint = "Pass the number of batches of one epoch."
        _validate.integer("cycle_length", self.cycle_length, hint, minimum=1)

    def batch_iterator(self, num_examples: int, rng: RngType = None) -> Iterator[np.ndarray]:
        """See the base class."""
        return self._batches(check_num_examples(num_examples), make_generator(rng))

    def expected_batch_size(self, num_examples: int) -> float:
        """See the base class; exact."""
        return check_num_examples(num_examples) / self.cycle_length

    def _batches(self, num_examples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        bins = independent_groups(num_examples, self.cycle_length, rng)
        for members in itertools.islice(itertools.cycle(bins), self.iterations):
            yield members.copy()  # a caller that shuffles its batch must not shuffle the bin


@dataclasses.dataclass(frozen=True)
class RandomAllocationSampling(BatchSelectionStrategy):
    """Each example takes part in exactly `total_participations` of the `iterations` batches.

    Which ones is a uniformly random subset, independent of the other examples.

    Accounting: No sound accounting is known here: no config states an epsilon for it. The paper
    bounds the amplification, but dp_accounting has no event for it. What holds without any
    amplification, under ADD_OR_REMOVE_ONE and for independent noise, is `total_participations`
    Gaussian releases.

    Attributes:
        total_participations: In how many batches each example is.
        iterations: How many batches are drawn.

    Guarantees:
        Each example is in exactly `total_participations` batches, and never twice in one.
        All sets of that many iterations are equally likely, independently between examples.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If one is negative, or `total_participations` above `iterations`.

    Source:
        Feldman and Shenfeld 2025, "Privacy amplification by random allocation", arXiv 2502.08202.
    """

    total_participations: int
    iterations: int

    def __post_init__(self) -> None:
        check_iterations(self.iterations)
        hint = "Pass in how many of the batches each example is."
        count = _validate.integer(
            "total_participations", self.total_participations, hint, minimum=0
        )
        if count > self.iterations:
            raise ValueError(
                f"`total_participations` must be at most `iterations`, got {count} of "
                f"{self.iterations}. {hint}"
            )

    def batch_iterator(self, num_examples: int, rng: RngType = None) -> Iterator[np.ndarray]:
        """See the base class."""
        return self._batches(check_num_examples(num_examples), make_generator(rng))

    def expected_batch_size(self, num_examples: int) -> float:
        """See the base class; exact."""
        total = check_num_examples(num_examples) * self.total_participations
        return total / self.iterations if self.iterations else 0.0

    def _batches(self, num_examples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        # Selection sampling (Knuth, volume 2, algorithm 3.4.2 S), in whole numbers and so exact:
        # with r turns to take in the n batches left, an example is in the next one in r of n cases.
        turns = np.full(num_examples, self.total_participations)
        for batches_left in range(self.iterations, 0, -1):
            indices = np.flatnonzero(rng.integers(batches_left, size=num_examples) < turns)
            turns[indices] -= 1
            yield indices
