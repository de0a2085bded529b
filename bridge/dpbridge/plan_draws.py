"""The draws of a plan, one after another, as a loader needs them."""

import hashlib
from collections import deque

import dp_accounting
import numpy as np

from dpbridge.loading import generator_of
from dpkernels.execution_plan import DPExecutionPlan

NO_USERS = (
    "`plan.batch_selection_strategy` draws users with several examples each, which PlanLoader "
    "does not load: it would clip each example, and not each user. Draw examples, and state "
    "epsilon for examples."
)


class PlanDraws:
    """The draws of one plan and seed: made when first asked for, kept until the next is begun.

    Prefetching asks for draws ahead of those that are begun. They stay here, so that nothing is
    lost where the prefetched batches are dropped.

    Attributes:
        seed: Of all draws.
        begun: How many draws were begun.
        digest_before: A hash of those that were begun before the last of them.
    """

    def __init__(self, plan: DPExecutionPlan, num_examples: int, seed: int) -> None:
        self.seed = seed
        self.begun = 0
        self._iterations, self._num_examples = plan.iterations, num_examples
        self._may_repeat = isinstance(plan.dp_event, dp_accounting.NonPrivateDpEvent)
        self._iterator = plan.batch_selection_strategy.batch_iterator(
            num_examples, generator_of(seed, 0)
        )
        self._kept: deque[np.ndarray] = deque()  # from the one on that was begun last
        self._hash = hashlib.sha256()
        self.digest_before = self.digest

    @property
    def digest(self) -> str:
        """A hash of the draws that were begun."""
        return self._hash.hexdigest()

    def __getitem__(self, number: int) -> np.ndarray:
        """Returns a draw, not before the one that was begun last."""
        first = max(self.begun - 1, 0)
        while number >= first + len(self._kept):
            self._kept.append(self._make(first + len(self._kept)))
        return self._kept[number - first]

    def part(self, number: int, per_draw: int) -> np.ndarray:
        """Returns what a physical batch holds.

        Prefetching passes over empty batches only on its way to the next full one, so it may ask
        for them after they were yielded and forgotten.
        """
        draw, part = divmod(number, per_draw)
        if draw < self.begun - 1:
            return np.zeros(0, np.int64)
        return np.array_split(self[draw], per_draw)[part]

    def begin_next(self) -> None:
        """Counts the next draw as begun, and forgets the one before it."""
        indices = self[self.begun]
        if self.begun:
            self._kept.popleft()
        self.begun += 1
        self.digest_before = self.digest
        self._hash.update(f"{len(indices)}:".encode() + indices.astype("<i8").tobytes())

    def _make(self, number: int) -> np.ndarray:
        # Out of reach until all went well: the draw after a bad one must not take its place.
        iterator, self._iterator = self._iterator, iter(())
        draw = next(iterator, None)
        if draw is None:
            raise RuntimeError(
                f"`plan.batch_selection_strategy` must make {self._iterations} draws, as its "
                f"`iterations` says, got {number} before it ended or failed. Correct the strategy."
            )
        indices = np.array(draw)  # a copy: the strategy may use its array again
        if number == self._iterations - 1 and next(iterator, None) is not None:
            raise RuntimeError(
                f"`plan.batch_selection_strategy` must make {self._iterations} draws, as its "
                f"`iterations` says, got more. The plan's epsilon is not theirs: correct the "
                f"strategy."
            )
        _check_draw(indices, number, self._num_examples)
        if not self._may_repeat and len(np.unique(indices)) < len(indices):
            raise ValueError(
                f"`plan.batch_selection_strategy` must draw no example twice at once, got draw "
                f"{number} with repeats. Their gradients would add up to more than the "
                f"sensitivity that the noise is made for: draw without replacement."
            )
        self._iterator = iterator
        return indices


def _check_draw(indices: np.ndarray, number: int, num_examples: int) -> None:
    if indices.ndim == 2:
        raise NotImplementedError(NO_USERS)
    if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
        raise TypeError(
            f"`plan.batch_selection_strategy` must draw 1-D arrays of integers, got one of shape "
            f"{indices.shape} and dtype {indices.dtype} as draw {number}. Correct the strategy."
        )
    if indices.size and not (indices.min() >= 0 and indices.max() < num_examples):
        raise ValueError(
            f"`plan.batch_selection_strategy` must draw indices from 0 to {num_examples - 1}, got "
            f"{indices.min()} to {indices.max()} in draw {number}. Correct the strategy; draws are "
            f"not padded here."
        )
