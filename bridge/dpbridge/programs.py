"""Compiled programs, kept for as long as the model is what they were made of."""

from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from torch import nn

from dpbridge.fingerprint import Fingerprint

_MOST = 64


class Filed(Protocol):
    """What can be kept.

    Attributes:
        fingerprint: What the model was when it was filed; keeps identities from reuse.
    """

    fingerprint: Fingerprint | None


P = TypeVar("P", bound=Filed)


class Programs(Generic[P]):
    """Programs by kind of batch and by what model and loss were; the oldest are forgotten.

    Args:
        model: The module.
        loss_fn: Its loss, or None.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Any] | None) -> None:
        self._model, self._loss_fn = model, loss_fn
        self._kept: dict[Hashable, P] = {}

    def __iter__(self) -> Iterator[P]:
        return iter(self._kept.values())

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, kind: Hashable) -> P | None:
        """Returns the program of a kind, if the model has not changed since it was filed."""
        return self._kept.get((kind, self._fingerprint().key))

    def file(self, kind: Hashable, program: P) -> None:
        """Keeps a program under what the model is now.

        One that counts its own calls has changed since `find`, and would otherwise be lowered
        anew at every step.
        """
        program.fingerprint = self._fingerprint()
        self._kept[kind, program.fingerprint.key] = program
        while len(self._kept) > _MOST:
            del self._kept[next(iter(self._kept))]

    def _fingerprint(self) -> Fingerprint:
        return Fingerprint(self._model, self._loss_fn)
