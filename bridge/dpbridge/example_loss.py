"""The loss of one example, as a program and as torch computes it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import jax
import torch
from torch import nn

from dpbridge.batches import Batch
from dpbridge.lowering import Program, autocast, loss_of_example, lower

Arrays = Mapping[str, jax.Array]


class ExampleLoss(Protocol):
    """A scalar of one example, to be differentiated.

    Attributes:
        tensors: What it is computed from beside the example, by name: parameters by their name
            in the model, buffers and constants by names of their own.
        messages: What may be wrong with an example; known once it has been traced.
        half_types: The types to which `torch.autocast` casts in it.
    """

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]: ...  # noqa: D102

    @property
    def messages(self) -> list[str]: ...  # noqa: D102

    @property
    def half_types(self) -> frozenset[torch.dtype]: ...  # noqa: D102

    def __call__(
        self, arrays: Arrays, keys: tuple[jax.Array, ...], randomness: Any, *row: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the scalar, and `(len(messages),)` bools that are True where all is well.

        Args:
            arrays: Those of `tensors`.
            keys: PRNG keys for dropout, one for each stream of the part.
            randomness: Scalar bool; False makes dropout the identity.
            *row: The part's tensors for one example, with a leading axis of 1.
        """
        ...

    def in_torch(self, *row: torch.Tensor) -> torch.Tensor:
        """Returns the scalar of the same row as torch computes it, under autocast if it was on."""
        ...


@dataclass(frozen=True, eq=False)
class LoweredLoss:
    """The loss of one example of a batch that was passed to `backward`.

    Attributes:
        model: The module.
        loss_fn: Its loss, or None if the model returns it.
        structure: Of the batch.
        program: The loss, lowered.
    """

    model: nn.Module
    loss_fn: Callable[..., Any] | None
    structure: Batch
    program: Program

    @classmethod
    def of(cls, model: nn.Module, loss_fn: Callable[..., Any] | None, batch: Batch) -> Self:
        """Lowers the loss of such a batch; raises as `lower`."""
        program = lower(model, loss_fn, *batch.example(0))
        return cls(model, loss_fn, batch.without_rows(), program)

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """See `ExampleLoss`."""
        return tensors_of(self.program, self.model)

    @property
    def messages(self) -> list[str]:
        """See `ExampleLoss`."""
        return self.program.messages

    @property
    def half_types(self) -> frozenset[torch.dtype]:
        """See `ExampleLoss`."""
        return self.program.half_types

    def __call__(
        self, arrays: Arrays, keys: tuple[jax.Array, ...], randomness: Any, *row: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """See `ExampleLoss`."""
        (loss,), holds = self.program(arrays, keys[0], randomness, *row)
        return loss, holds

    def in_torch(self, *row: torch.Tensor) -> torch.Tensor:
        """See `ExampleLoss`."""
        args, kwargs = self.structure.rebuild(row)
        with autocast.entered(self.program.autocast):
            loss: torch.Tensor = loss_of_example(self.model, self.loss_fn, args, kwargs)
        return loss


def tensors_of(program: Program, model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the tensors that a program takes beside the example, by name."""
    parameters = dict(model.named_parameters())
    return {
        name: program.constants[name] if name in program.constants else parameters[name]
        for name in program.inputs
        if name is not None
    }
