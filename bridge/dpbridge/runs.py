"""What a run is: steps that release something, and a ledger of what that spends."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from dpbridge.journal import Journal
from dpbridge.journal_lines import Step
from dpbridge.ledger import Ledger
from dpbridge.mechanism import Mechanism
from dpbridge.plan_ledger import PlanLedger


class Run(Protocol):
    """What is released at each step of a run, and what that spends."""

    @property
    def mechanism(self) -> Mechanism: ...  # noqa: D102

    @property
    def ledger(self) -> Ledger | PlanLedger: ...  # noqa: D102

    def check_part(self, parts: int, size: int) -> None:
        """Raises RuntimeError if a batch of this size must not be added to `parts` others."""
        ...

    def check_step(self, drawn: int) -> None:
        """Raises RuntimeError if a step on this many examples must not be made now."""
        ...

    def record(self, drawn: int) -> None:
        """Puts such a step into the ledger; call it before anything of the step is released."""
        ...

    def fail(self) -> None:
        """Notes that a step was recorded and then not released."""
        ...

    def line(self, step: int, released: Mapping[str, torch.Tensor]) -> Step:
        """Returns what the journal is to hold of the step that was recorded last."""
        ...

    def count_lost(self, journal: Journal, place: int) -> int:
        """Counts the releases of the journal that the ledger lacks.

        Args:
            journal: Of this run.
            place: How many steps this run has made.

        Returns:
            The place in the noise stream to go on from.
        """
        ...

    def read_state(
        self, state: Mapping[str, Any], place: int, journal: Journal | None
    ) -> tuple[int, Callable[[], None]]:
        """Reads a saved ledger, and counts the releases of the journal that it lacks.

        Args:
            state: Of the ledger.
            place: How many steps were made when it was saved.
            journal: Of the same run, if there is one.

        Returns:
            As `count_lost`; and what restores the ledger, but for a longer one of this same run.

        Raises:
            ValueError: If it is not of such a run; nothing is changed.
        """
        ...

    def epsilon(self, delta: float, accountant: str | None) -> float:
        """Returns the epsilon spent so far; raises ValueError where none holds."""
        ...


def check_counted(steps: int, place: int) -> None:
    """Raises ValueError if a saved ledger has fewer steps than the noise beside it has places."""
    if steps < place:
        raise ValueError(
            f"`state_dict` must count every release in its ledger, got {steps} steps "
            f"there and noise for {place}. The checkpoint is damaged."
        )
