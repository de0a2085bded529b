"""Batches of a fixed size.

Example:
    >>> strategy = FixedBatchSampling(batch_size=3, iterations=2)
    >>> [indices.shape for indices in strategy.batch_iterator(10, rng=0)]
    [(3,), (3,)]
"""

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class FixedBatchSampling(BatchSelectionStrategy):
    """Batches of one size, drawn uniformly and independently of one another.

    Without replacement a batch is a uniformly random subset of the examples; with replacement
    each of its places holds a uniformly random example, so an example can be in it several times.
    It is not the shuffled epochs of a usual data loader, in which batches depend on one another.

    Accounting:
        * Without replacement: `accounting.fixed_dpsgd_event`; RDP accountant, REPLACE_ONE alone.
        * With replacement: No sound accounting is known here: no config states an epsilon for it.
          An example drawn m times counts m times, beyond the sensitivity of a clipped sum.

    Attributes:
        batch_size: How many examples are in each batch.
        iterations: How many batches are drawn.
        replace: Whether an example can be in a batch several times.

    Guarantees:
        Every batch has exactly `batch_size` indices.
        Without replacement no batch repeats an index, and all subsets are equally likely.
        With replacement all sequences of indices are equally likely.
        Batches are independent of one another.

    Raises:
        TypeError: If a number is not an integer, or `replace` not a bool.
        ValueError: If a number is negative; from `batch_iterator` and `expected_batch_size`, if
            the dataset is too small.

    Source:
        Balle, Barthe and Gaboardi 2018, "Privacy amplification by subsampling", arXiv 1807.01647.
    """

    batch_size: int
    iterations: int
    replace: bool = False

    def __post_init__(self) -> None:
        hint = "Pass the number of examples in each batch."
        _validate.integer("batch_size", self.batch_size, hint, minimum=0)
        check_iterations(self.iterations)
        if not isinstance(self.replace, bool | np.bool_):
            raise TypeError(f"`replace` must be a bool, got {self.replace!r}. Pass True or False.")

    def batch_iterator(self, num_examples: int, rng: RngType = None) -> Iterator[np.ndarray]:
        """See the base class."""
        num_examples = self._checked(num_examples)
        return self._batches(num_examples, make_generator(rng))

    def expected_batch_size(self, num_examples: int) -> float:
        """See the base class; every batch has this size."""
        self._checked(num_examples)
        return float(self.batch_size)

    def _checked(self, num_examples: int) -> int:
        num_examples = check_num_examples(num_examples)
        if not self.replace and self.batch_size > num_examples:
            raise ValueError(
                f"`batch_size` must be at most `num_examples`, got {self.batch_size} of "
                f"{num_examples}. Draw smaller batches."
            )
        if self.batch_size and not num_examples:
            raise ValueError(
                f"`num_examples` must be positive, got 0 with a `batch_size` of {self.batch_size}. "
                "Pass a dataset with examples."
            )
        return num_examples

    def _batches(self, num_examples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        for _ in range(self.iterations):
            if self.replace:
                yield rng.integers(max(num_examples, 1), size=self.batch_size)
            else:
                yield rng.choice(num_examples, self.batch_size, replace=False, shuffle=False)
