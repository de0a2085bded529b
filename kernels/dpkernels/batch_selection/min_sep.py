"""Poisson sampling in which an example rests after every batch that it was in.

Example:
    >>> strategy = BMinSepSampling(sampling_prob=0.5, iterations=4, min_sep=3)
    >>> strategy.expected_batch_size(100)
    25.0
    >>> first, second, third, fourth = strategy.batch_iterator(100, rng=0)
    >>> bool(set(first) & set(second) or set(first) & set(third))
    False
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
    check_sampling_prob,
    check_truncation,
    draw_each,
    expected_size,
    make_generator,
)


@dataclasses.dataclass(frozen=True)
class BMinSepSampling(BatchSelectionStrategy):
    """Poisson sampling from the examples that were in none of the last `min_sep - 1` draws.

    In each iteration every example that does not rest is drawn with probability `sampling_prob`,
    independently of the others; then it rests for `min_sep - 1` iterations. `min_sep=1` is
    Poisson sampling, and a warm start with `sampling_prob=1` is `BallsInBinsSampling`.

    A cold start has every example ready for the first batch, so the first batches are the
    largest. A warm start begins as if sampling had gone on forever: an example is ready with
    probability 1/(1 + (min_sep - 1)·sampling_prob), otherwise it has 1, ..., min_sep - 1
    iterations left to rest, each equally likely. All batches then have the same law.

    If `truncated_batch_size` is set, a uniformly random subset of that size is kept of any larger
    draw; examples that were drawn and not kept rest all the same.

    Accounting: No sound accounting is known here: no config states an epsilon for it. The paper
    computes the amplification by Monte Carlo. What holds without any amplification, under
    ADD_OR_REMOVE_ONE and for whole batches, is `accounting.amplified_bandmf_event` with
    `sampling_prob=1` and `num_bands=min_sep`, for a strategy of no more bands.

    Attributes:
        sampling_prob: Probability with which an example that is ready is drawn, in [0, 1].
        iterations: How many batches are drawn.
        min_sep: Smallest distance, in iterations, between two draws of an example.
        warm_start: Whether all batches, from the first, have the same law.
        truncated_batch_size: The most examples in a batch, or None.

    Guarantees:
        Two batches with a common example are at least `min_sep` apart.
        Untruncated, the batches that an example is in are independent of the other examples.
        With a warm start an example is drawn in every iteration with the same probability,
        1/(min_sep - 1 + 1/sampling_prob).
        Truncated, given its size, a batch is a uniform subset of the examples.

    Raises:
        TypeError: If a number is not one, or `warm_start` not a bool.
        ValueError: If a field is out of range.

    Source:
        Dong and Ganesh 2026, "Privacy amplification for BandMF via b-min-sep subsampling", arXiv
        2602.09338.
    """

    sampling_prob: float
    iterations: int
    min_sep: int
    warm_start: bool = True
    truncated_batch_size: int | None = None

    def __post_init__(self) -> None:
        check_sampling_prob(self.sampling_prob)
        check_iterations(self.iterations)
        check_truncation(self.truncated_batch_size)
        hint = "Pass the smallest distance between two draws of an example; 1 is Poisson sampling."
        _validate.integer("min_sep", self.min_sep, hint, minimum=1)
        if not isinstance(self.warm_start, bool | np.bool_):
            raise TypeError(
                f"`warm_start` must be a bool, got {self.warm_start!r}. Pass True or False."
            )

    def batch_iterator(self, num_examples: int, rng: RngType = None) -> Iterator[np.ndarray]:
        """See the base class."""
        return self._batches(check_num_examples(num_examples), make_generator(rng))

    def expected_batch_size(self, num_examples: int) -> float:
        """See the base class; exact, truncation included."""
        probs = self._draw_probs()
        sizes = expected_size(check_num_examples(num_examples), probs, self.truncated_batch_size)
        return float(np.mean(sizes)) if probs.size else 0.0

    @property
    def _ready_prob(self) -> float:
        return 1 / (1 + (self.min_sep - 1) * float(self.sampling_prob))

    def _draw_probs(self) -> np.ndarray:
        """Returns the probability with which an example is drawn, for each iteration."""
        if self.warm_start:
            return np.full(1, self.sampling_prob * self._ready_prob)
        probs = np.zeros(self.iterations)
        for i in range(self.iterations):
            # Draws so close together exclude one another, so their probabilities add up.
            is_resting = probs[max(0, i - self.min_sep + 1) : i].sum()
            probs[i] = self.sampling_prob * max(0.0, 1 - is_resting)
        return probs

    def _batches(self, num_examples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        ready_at = np.zeros(num_examples, np.int64)  # the iteration from which on it is ready
        if self.warm_start and self.min_sep > 1:
            is_resting = rng.random(num_examples) >= self._ready_prob
            ready_at = np.where(is_resting, rng.integers(1, self.min_sep, num_examples), 0)
        for i in range(self.iterations):
            drawn = draw_each(rng, np.flatnonzero(ready_at <= i), self.sampling_prob)
            ready_at[drawn] = i + self.min_sep
            if self.truncated_batch_size is not None and drawn.size > self.truncated_batch_size:
                drawn = rng.choice(drawn, self.truncated_batch_size, replace=False, shuffle=False)
            yield drawn
