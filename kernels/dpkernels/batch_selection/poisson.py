"""Poisson sampling: each example flips its own coin for every batch.

Example:
    >>> strategy = CyclicPoissonSampling(sampling_prob=1.0, iterations=4, cycle_length=2)
    >>> first, second, third, _ = strategy.batch_iterator(6, rng=0)
    >>> sorted(first) == sorted(third), sorted([*first, *second]) == list(range(6))
    (True, True)
"""

import dataclasses
import enum
import itertools
from collections.abc import Iterator

import numpy as np

from dpkernels import _validate
from dpkernels.batch_selection.base import (
    BatchSelectionStrategy,
    RngType,
    check_iterations,
    check_num_examples,
    check_sampling_prob,
    check_truncation,
    draw_each,
    expected_size,
    make_generator,
)


class PartitionType(enum.Enum):
    """How examples are split into the groups that take turns.

    Attributes:
        INDEPENDENT: Each example joins a uniformly random group, whatever the others do. Group
            sizes are random. Adding or removing one example leaves all others where they are, so
            this is the split for ADD_OR_REMOVE_ONE.
        EQUAL_SPLIT: A uniformly random split into groups of equal, and so public, size; the
            `num_examples % cycle_length` examples that are left over, at random, are never drawn.
            The split for REPLACE_SPECIAL and REPLACE_ONE, where `num_examples` is public.
    """

    INDEPENDENT = 1
    EQUAL_SPLIT = 2


@dataclasses.dataclass(frozen=True)
class CyclicPoissonSampling(BatchSelectionStrategy):
    """Poisson sampling from one group of the examples at a time, the groups taking turns.

    Once, the examples are split at random into `cycle_length` groups. For iteration i each
    example of group `i % cycle_length` is drawn with probability `sampling_prob`, independently
    of all others and of all other iterations. With `cycle_length=1` this is Poisson sampling;
    with `sampling_prob=1` it is a random but fixed order, epoch after epoch.

    If `truncated_batch_size` is set, a uniformly random subset of that size is kept of any larger
    draw. Batches then have a largest size, and examples are no longer drawn independently.

    Accounting, for the noise multiplier of one batch:
        * Whole batches: `accounting.dpsgd_event` for `cycle_length=1`, otherwise
          `accounting.amplified_bandmf_event` with `num_bands=cycle_length`, for a strategy of no
          more bands. PLD accountant under any relation that the split allows (see
          `PartitionType`; one group allows all of them), RDP accountant under all but REPLACE_ONE.
        * Truncated batches with EQUAL_SPLIT: `accounting.truncated_dpsgd_event` or
          `accounting.truncated_amplified_bandmf_event` with groups of
          `num_examples // cycle_length`; PLD accountant, REPLACE_SPECIAL or REPLACE_ONE.
        * Truncated batches with INDEPENDENT: No sound accounting is known here: no config states
          an epsilon for it.

    Attributes:
        sampling_prob: Probability with which an example is drawn when its group has its turn, in
            [0, 1].
        iterations: How many batches are drawn.
        truncated_batch_size: The most examples in a batch, or None.
        cycle_length: How many groups take turns.
        partition_type: How the groups are made.

    Guarantees:
        Untruncated, each example of the group is in the batch independently with probability
        `sampling_prob`.
        Truncated, given its size, a batch is a uniform subset of its group.
        An example is only ever in batches that are a multiple of `cycle_length` apart.
        Under EQUAL_SPLIT every group has exactly `num_examples // cycle_length` examples, and
        all such splits are equally likely.
        Under INDEPENDENT each example is in each group with probability 1/cycle_length,
        independently of the others.

    Raises:
        TypeError: If a number is not one, or `partition_type` is not a `PartitionType`.
        ValueError: If a field is out of range; from `batch_iterator` and `expected_batch_size`,
            if EQUAL_SPLIT would leave all groups of a non-empty dataset empty.

    Source:
        Abadi et al. 2016, algorithm 1 (one group). Choquette-Choo et al. 2023, "(Amplified)
        banded matrix factorization", arXiv 2306.08153, section 5 (groups). Ganesh 2025, arXiv
        2508.15089, and Chua et al. 2024, arXiv 2411.04205 (truncation).
    """

    sampling_prob: float
    iterations: int
    truncated_batch_size: int | None = None
    cycle_length: int = 1
    partition_type: PartitionType = PartitionType.EQUAL_SPLIT

    def __post_init__(self) -> None:
        check_sampling_prob(self.sampling_prob)
        check_iterations(self.iterations)
        check_truncation(self.truncated_batch_size)
        hint = "Pass the number of groups that take turns; 1 is Poisson sampling."
        _validate.integer("cycle_length", self.cycle_length, hint, minimum=1)
        if not isinstance(self.partition_type, PartitionType):
            listed = " or ".join(map(str, PartitionType))
            raise TypeError(
                f"`partition_type` must be {listed}, got {self.partition_type!r}. "
                "Choose by the neighboring relation of the guarantee."
            )

    def batch_iterator(self, num_examples: int, rng: RngType = None) -> Iterator[np.ndarray]:
        """See the base class."""
        num_examples = self._checked(num_examples)
        return self._batches(num_examples, make_generator(rng))

    def expected_batch_size(self, num_examples: int) -> float:
        """See the base class; exact, truncation included."""
        count, prob = self._checked(num_examples), float(self.sampling_prob)
        if self.partition_type is PartitionType.EQUAL_SPLIT:
            count //= self.cycle_length
        else:  # being in the group whose turn it is, and being drawn, are independent
            prob /= self.cycle_length
        return float(expected_size(count, prob, self.truncated_batch_size))

    def _checked(self, num_examples: int) -> int:
        num_examples = check_num_examples(num_examples)
        is_split_equally = self.partition_type is PartitionType.EQUAL_SPLIT
        if is_split_equally and 0 < num_examples < self.cycle_length:
            raise ValueError(
                f"`cycle_length` must be at most `num_examples`, got {self.cycle_length} with "
                f"{num_examples} examples: every group of an equal split would be empty. Use fewer "
                "groups."
            )
        return num_examples

    def _batches(self, num_examples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        if self.partition_type is PartitionType.EQUAL_SPLIT:
            groups = _equal_groups(num_examples, self.cycle_length, rng)
        else:
            groups = independent_groups(num_examples, self.cycle_length, rng)
        for group in itertools.islice(itertools.cycle(groups), self.iterations):
            yield draw_each(rng, group, self.sampling_prob, self.truncated_batch_size)


def _equal_groups(num_examples: int, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    size = num_examples // count
    return list(rng.permutation(num_examples)[: count * size].reshape(count, size))


def independent_groups(num_examples: int, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Returns `count` groups, each example in one of them, uniformly and independently."""
    group_of = rng.integers(count, size=num_examples)
    ends = np.cumsum(np.bincount(group_of, minlength=count))[:-1]
    return np.split(np.argsort(group_of, kind="stable"), ends)
