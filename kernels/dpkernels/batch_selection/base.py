"""What every sampling strategy is, and what all of them check and draw.

Example:
    >>> rng = make_generator(0)
    >>> bool((draw_each(rng, np.arange(10), prob=1.0) == np.arange(10)).all())
    True
"""

import abc
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
from scipy import stats

from dpkernels import _validate

RngType: TypeAlias = int | np.random.Generator | None

_ITERATIONS_HINT = "Pass the number of batches to draw."
_TRUNCATION_HINT = "Pass the largest batch that fits, or None to keep every batch whole."


class BatchSelectionStrategy(abc.ABC):
    """How batches are drawn from a dataset: public, and a promise that accounting relies on.

    A subclass has the attribute `iterations` and the method `batch_iterator`. Batches are arrays
    of positions in the dataset, in no meaningful order. An empty batch is a batch: it is yielded,
    and the step on it must add noise like any other.

    Whoever learns the draws can undo the amplification by sampling, so `rng` is for tests and for
    resuming; leave it out otherwise. NumPy's default generator is not a cryptographic one: pass a
    `numpy.random.Generator` over another bit generator where that matters.

    Attributes:
        iterations: How many batches `batch_iterator` yields.

    Guarantees:
        `batch_iterator` yields exactly `iterations` batches, empty ones included.
        Without `rng`, the draws come from the operating system's entropy.
        NumPy's global random state is neither used nor changed.
    """

    iterations: int

    @abc.abstractmethod
    def batch_iterator(self, num_examples: int, rng: RngType = None) -> Iterator[np.ndarray]:
        """Returns an iterator over `iterations` batches.

        Args:
            num_examples: How many examples the dataset has.
            rng: A seed, or a generator, which is advanced as batches are drawn; by default one
                from the operating system's entropy. The same seed gives the same batches under
                the same NumPy.

        Returns:
            An iterator over int64 arrays of indices in [0, num_examples), `(batch,)`.

        Raises:
            TypeError: If `num_examples` is not an integer, or `rng` is anything else.
            ValueError: If either is negative, or the strategy cannot draw from so few examples.
        """

    def expected_batch_size(self, num_examples: int) -> float:
        """Returns the expected size of a batch, averaged over the iterations.

        It is what a clipped sum may be divided by, with a `num_examples` that is public; under
        ADD_OR_REMOVE_ONE the exact one is not.

        Args:
            num_examples: As in `batch_iterator`.

        Raises:
            TypeError: As `batch_iterator`.
            ValueError: As `batch_iterator`.
            NotImplementedError: If the subclass does not say.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not say how large its batches are. Write its "
            "`expected_batch_size`, or pass the size where it is asked for."
        )


def make_generator(rng: RngType) -> np.random.Generator:
    """Returns the generator given, one of a seed, or one of the operating system's entropy.

    Raises:
        TypeError: If `rng` is none of these; `numpy.random.RandomState` is not.
        ValueError: If the seed is negative.
    """
    if isinstance(rng, np.random.Generator):
        return rng
    if rng is None:
        return np.random.default_rng()
    hint = "Pass a seed or a numpy.random.Generator, or leave it out to have one of the OS."
    return np.random.default_rng(_validate.integer("rng", rng, hint, minimum=0))


def check_num_examples(num_examples: int) -> int:
    """Returns `num_examples` as an int if it is one, and not negative."""
    hint = "Pass the length of the dataset."
    return _validate.integer("num_examples", num_examples, hint, minimum=0)


def check_iterations(iterations: int) -> None:
    """Refuses what is not a number of iterations."""
    _validate.integer("iterations", iterations, _ITERATIONS_HINT, minimum=0)


def check_sampling_prob(sampling_prob: float) -> None:
    """Refuses what is not in [0, 1]."""
    hint = "Pass the expected batch size over the number of examples to draw from."
    if _validate.non_negative("sampling_prob", sampling_prob, hint) > 1:
        raise ValueError(f"`sampling_prob` must be in [0, 1], got {sampling_prob!r}. {hint}")


def check_truncation(truncated_batch_size: int | None) -> None:
    """Refuses what is neither None nor a size."""
    if truncated_batch_size is not None:
        name = "truncated_batch_size"
        _validate.integer(name, truncated_batch_size, _TRUNCATION_HINT, minimum=0)


def draw_each(
    rng: np.random.Generator, members: np.ndarray, prob: float, at_most: int | None = None
) -> np.ndarray:
    """Draws each member with probability `prob`, independently, then a uniform part of these.

    A binomial size and a uniform subset of that size have the law of independent coin flips.

    Args:
        rng: Where the draw comes from.
        members: What to draw from, `(members,)`.
        prob: The probability.
        at_most: Of a larger draw a uniform subset of this size is kept.
    """
    size = rng.binomial(members.size, prob)
    if at_most is not None:
        size = min(size, at_most)
    return rng.choice(members, size, replace=False, shuffle=False)


def expected_size(count: int, prob: Any, at_most: int | None = None) -> Any:
    """Returns the mean size of `draw_each`, E[min(Binomial(count, prob), at_most)].

    From k·P(X=k) = count·prob·P(X'=k-1), with X' one trial shorter: the draws up to `at_most`
    contribute count·prob·P(X' < at_most), the longer ones `at_most` each.

    Args:
        count: How many members there are.
        prob: The probability, or an array of them.
        at_most: As for `draw_each`.
    """
    mean = count * np.asarray(prob, np.float64)
    if at_most is None or at_most >= count:
        return mean
    short = stats.binom.cdf(at_most - 1, count - 1, prob)
    return mean * short + at_most * stats.binom.sf(at_most, count, prob)
