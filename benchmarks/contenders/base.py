"""What a contender is."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from benchmarks.task import Gradients, Task


class Contender(ABC):
    """Computes the gradient of a batch: the mean, or clipped by example and summed; no noise.

    Making one must do all that is done once; what it cannot do, it raises for.

    Attributes:
        title: As it stands in the table.
        is_private: Whether it clips the gradient of each example.
        note: What a reader should know about this run, if anything.
        is_watchable: Whether torch can count its FLOPs without changing what it does.
    """

    title: ClassVar[str]
    is_private: ClassVar[bool]
    note: str = ""
    is_watchable: ClassVar[bool] = True

    @abstractmethod
    def __init__(self, task: Task) -> None: ...

    @abstractmethod
    def __call__(self) -> None:
        """Computes the gradient, and returns when it is there."""

    @abstractmethod
    def gradients(self) -> Gradients:
        """Returns what the last call found, by parameter name."""

    def compiled(self) -> Any:
        """Returns the `jax.stages.Compiled`, where there is one."""
        return None

    def clear(self) -> None:  # noqa: B027, not all of them hold anything.
        """Drops what the last call found, so that others have the memory."""
