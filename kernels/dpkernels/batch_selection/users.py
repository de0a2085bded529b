"""Sampling of users instead of examples, for guarantees about all that one user contributed.

Example:
    >>> from dpkernels.batch_selection import CyclicPoissonSampling
    >>> base = CyclicPoissonSampling(sampling_prob=1.0, iterations=2)
    >>> strategy = UserSelectionStrategy(base, examples_per_user_per_batch=2)
    >>> owners = np.array(["ann", "bob", "ann", "ann"])
    >>> [sorted(batch.tolist()) for batch in strategy.batch_iterator(owners, rng=0)]
    [[[0, 2], [1, 1]], [[1, 1], [3, 0]]]
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from dpkernels import _validate
from dpkernels.batch_selection.base import BatchSelectionStrategy, RngType, make_generator


@dataclasses.dataclass(frozen=True)
class UserSelectionStrategy:
    """Draws users by `base_strategy`, and for each of them some of their examples.

    The users, in the order of their sorted ids, are to `base_strategy` what examples are
    otherwise. A user who is drawn brings their next `examples_per_user_per_batch` examples,
    starting over after the last; one who has fewer brings some several times.

    Accounting: that of `base_strategy` with users for examples, and for neighbors that differ in
    all examples of one user. It holds where one user's row of a batch is clipped as a whole: pass
    rows with their example axis to `clipped_grad(..., keep_batch_dim=False)`, whose loss then
    takes `(examples_per_user_per_batch, ...)`. Every example must have one owner.

    Attributes:
        base_strategy: How users are drawn.
        examples_per_user_per_batch: How many examples a drawn user brings.
        shuffle_per_user: Whether each user's examples are put in a random order, once; otherwise
            they stay in the order of the dataset.

    Guarantees:
        The users of a batch are what `base_strategy` draws.
        Every row holds examples of one user.
        A user's examples are taken in turns: after any number of batches, how often two of them
        were taken differs by at most 1.
        Which of a user's examples are taken does not depend on the other users' examples.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If `examples_per_user_per_batch` is below 1.
    """

    base_strategy: BatchSelectionStrategy
    examples_per_user_per_batch: int = 1
    shuffle_per_user: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.base_strategy, BatchSelectionStrategy):
            raise TypeError(
                "`base_strategy` must be a BatchSelectionStrategy, got "
                f"{type(self.base_strategy).__name__}. Pass how users are to be drawn."
            )
        name, hint = "examples_per_user_per_batch", "Pass how many examples a drawn user brings."
        _validate.integer(name, self.examples_per_user_per_batch, hint, minimum=1)
        if not isinstance(self.shuffle_per_user, bool | np.bool_):
            raise TypeError(
                f"`shuffle_per_user` must be a bool, got {self.shuffle_per_user!r}. "
                "Pass True or False."
            )

    @property
    def iterations(self) -> int:
        """How many batches are drawn."""
        return self.base_strategy.iterations

    def batch_iterator(self, user_ids: Any, rng: RngType = None) -> Iterator[np.ndarray]:
        """Returns an iterator over `iterations` batches of rows of examples.

        Args:
            user_ids: For each example who owns it, integers or strings, `(num_examples,)`.
            rng: As for `BatchSelectionStrategy.batch_iterator`.

        Returns:
            An iterator over int64 arrays of indices, `(users, examples_per_user_per_batch)`; an
            empty draw has 0 rows.

        Raises:
            TypeError: If `user_ids` are neither integers nor strings, or `rng` is not valid.
            ValueError: If `user_ids` has another shape, or as `base_strategy`.
        """
        # The owners in sorted order, and for each example the position of its owner among them.
        users, user_of = np.unique(_checked_ids(user_ids), return_inverse=True)
        rng = make_generator(rng)
        order = rng.permutation(user_of.size) if self.shuffle_per_user else np.arange(user_of.size)
        by_user = order[np.argsort(user_of[order], kind="stable")]
        draws = self.base_strategy.batch_iterator(users.size, rng)
        return self._batches(by_user, np.bincount(user_of, minlength=users.size), draws)

    def expected_batch_size(self, num_users: int) -> float:
        """Returns the expected number of users in a batch, averaged over the iterations.

        Args:
            num_users: How many users the dataset has.

        Raises:
            TypeError: As `base_strategy`.
            ValueError: As `base_strategy`.
        """
        return self.base_strategy.expected_batch_size(num_users)

    def _batches(
        self, by_user: np.ndarray, counts: np.ndarray, draws: Iterator[np.ndarray]
    ) -> Iterator[np.ndarray]:
        first = np.cumsum(counts) - counts  # where a user's examples begin in `by_user`
        taken = np.zeros_like(counts)
        ahead = np.arange(self.examples_per_user_per_batch)
        for users in draws:
            # A base strategy with replacement draws a user several times; each brings on its own.
            start = taken[users] + ahead.size * _earlier_equals(users)
            places = (start[:, None] + ahead) % counts[users][:, None]
            np.add.at(taken, users, ahead.size)
            yield by_user[first[users][:, None] + places]


def _checked_ids(user_ids: Any) -> np.ndarray:
    ids = np.asarray(user_ids)
    if ids.ndim != 1:
        raise ValueError(
            f"`user_ids` must have one axis, got shape {ids.shape}. "
            "Pass the one owner of each example."
        )
    if ids.size and ids.dtype.kind not in "iuSU":
        raise TypeError(
            f"`user_ids` must be integers or strings, got {ids.dtype}. "
            "Give every example an owner, then convert them: np.asarray(user_ids, dtype=str)."
        )
    return ids


def _earlier_equals(values: np.ndarray) -> np.ndarray:
    """Returns for each value how many equal ones come before it."""
    order = np.argsort(values, kind="stable")
    in_order = values[order]
    earlier = np.empty_like(order)
    earlier[order] = np.arange(values.size) - np.searchsorted(in_order, in_order)
    return earlier
