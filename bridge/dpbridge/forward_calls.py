"""Calls of a model's forward, and the loss whose gradient torch's backward asks for.

Torch differentiates a loss by the outputs; what is left is the derivative of the outputs by the
parameters, of each example by itself. It is that of the outputs' inner product with the cotangents.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from dpbridge.batches import Batch
from dpbridge.clipped_sum import ClippedSum, Result, Tensors
from dpbridge.example_loss import Arrays
from dpbridge.exchange import to_jax
from dpbridge.fast_first import FastFirst
from dpbridge.fingerprint import Fingerprint
from dpbridge.forward_program import ForwardProgram
from dpbridge.lasting import lasting_to_jax
from dpbridge.mechanism import Mechanism
from dpbridge.parts import Summing
from dpbridge.scaling import ScaledOptimizer
from dpbridge.streams import Stream
from dpkernels.tree_clipping import widest

Used = tuple[int, ...]


@dataclass(eq=False)
class ForwardCall:
    """One call of forward on one physical batch.

    Attributes:
        program: What ran.
        batch: On what.
        stream: Its random numbers.
        place: Of which draw, and which part of it, the batch was.
        kept: What forward has left for backward, or None.
        versions: The tensors that were read, with what tells whether they were written to since.
        cotangents: What torch's backward brought, by the index of the output; None before it.
    """

    program: ForwardProgram
    batch: Batch
    stream: Stream
    place: tuple[int, int]
    kept: Any = None
    versions: list[tuple[str, torch.Tensor, int, int]] = field(default_factory=list)
    cotangents: dict[int, torch.Tensor] | None = None

    def watch(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Remembers tensors as they are now."""
        self.versions += [(name, x, x._version, x.data_ptr()) for name, x in tensors.items()]

    def check_unchanged(self) -> None:
        """Raises RuntimeError if a tensor that forward read was written to since."""
        for name, tensor, version, pointer in self.versions:
            if (tensor._version, tensor.data_ptr()) != (version, pointer):
                raise RuntimeError(
                    f"{name} must stay as forward read it until `step`, got a write to it: the "
                    "gradient would be of other numbers than the loss. Write to it after `step`, "
                    "or to a copy."
                )


@dataclass(frozen=True, eq=False)
class CallsPart:
    """All calls on one physical batch, whose gradients are added up for each example.

    Attributes:
        calls: With their cotangents.
        size: How many examples.
        scale: What the cotangents are multiplied by.
    """

    calls: Sequence[ForwardCall]
    size: int
    scale: float

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The inputs of each call, and then its cotangents."""
        return tuple(tensor for call in self.calls for tensor in self._tensors(call))

    def _tensors(self, call: ForwardCall) -> Iterator[torch.Tensor]:
        yield from call.batch.tensors
        for index, cotangent in (call.cotangents or {}).items():
            yield call.program.layout.rows(index, cotangent) * self.scale

    @property
    def streams(self) -> tuple[Stream, ...]:
        """See `Part`: one for each call."""
        return tuple(call.stream for call in self.calls)

    @property
    def kind(self) -> Hashable:
        """See `Part`."""
        return self._programs_and_used(), self.kept is not None

    @property
    def kept(self) -> Any:
        """See `Part`. Of several calls it cannot be used: a parameter's gradients are added up."""
        return self.calls[0].kept if len(self.calls) == 1 else None

    def lower(
        self,
        model: nn.Module,
        trainable: Tensors,
        mechanism: Mechanism,
        scaling: ScaledOptimizer | None,
    ) -> Summing:
        """See `Part`: the program is that of forward."""
        used = self._programs_and_used()
        if self.kept is not None:
            return SplitSum(InnerProduct(used))
        return ClippedSum(InnerProduct(used), model, trainable, mechanism, scaling)

    def _programs_and_used(self) -> tuple[tuple[ForwardProgram, Used], ...]:
        return tuple((call.program, tuple(call.cotangents or ())) for call in self.calls)


class SplitSum:
    """The two halves of a private step as one program: see `Summing`.

    Args:
        loss: Of one call.
    """

    def __init__(self, loss: "InnerProduct") -> None:
        self.loss = loss
        ((self._program, self._used),) = loss.calls
        self._sum = FastFirst(self._program.clipped_sum, self._program.fast_clipped_sum)
        self.ready_sizes = self._sum.ready_sizes
        self.fingerprint: Fingerprint | None = None

    @property
    def is_careful(self) -> bool:
        """See `Summing`. Forward is the same for both."""
        return self._sum.is_careful

    def __call__(
        self,
        trainable: Tensors,
        tensors: Sequence[torch.Tensor],
        is_padding_example: np.ndarray,
        *,
        streams: tuple[Stream, ...],
        l2_clip_norm: float,
        second_moments: Tensors | None = None,
        randomness: bool = True,
        kept: Any = None,
    ) -> Result:
        """See `Summing`."""
        del l2_clip_norm, second_moments  # The plan has a norm of its own.
        count = self._program.structure.num_tensors
        if kept is None:
            _, kept = self._program(
                lasting_to_jax({**self._program.tensors, **trainable}),
                to_jax(tuple(tensors[:count])),
                is_padding_example,
                stream=streams[0],
                randomness=randomness,
            )
        cotangents = dict(zip(self._used, to_jax(tuple(tensors[count:])), strict=True))
        sums = self._sum(kept, cotangents, is_padding_example)
        return Result(sums, jnp.zeros(()), ())


@dataclass(frozen=True, eq=False)
class InnerProduct:
    """The sum of the outputs' inner products with their cotangents: see `ExampleLoss`.

    Attributes:
        calls: The program of each call, and the outputs that have a cotangent.
    """

    calls: tuple[tuple[ForwardProgram, Used], ...]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """See `ExampleLoss`."""
        return {
            _name(position, program, name): tensor
            for position, (program, _) in enumerate(self.calls)
            for name, tensor in program.tensors.items()
        }

    @property
    def messages(self) -> list[str]:
        """See `ExampleLoss`."""
        return [text for program, _ in self.calls for text in program.program.messages]

    @property
    def half_types(self) -> frozenset[torch.dtype]:
        """See `ExampleLoss`."""
        return frozenset().union(*(program.program.half_types for program, _ in self.calls))

    def __call__(
        self, arrays: Arrays, keys: tuple[jax.Array, ...], randomness: Any, *row: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """See `ExampleLoss`."""
        waiting = iter(row)
        total: Any = 0.0
        held = []
        for position, (program, used) in enumerate(self.calls):
            own = {n: arrays[_name(position, program, n)] for n in program.tensors}
            inputs = [next(waiting) for _ in range(program.structure.num_tensors)]
            outputs, holds = program.program(own, keys[position], randomness, *inputs)
            held.append(holds)
            for index in used:
                axis, output = program.layout.axes[index], outputs[index]
                cotangent = next(waiting)
                cotangent = cotangent[0] if axis is None else jnp.moveaxis(cotangent, 0, axis)
                kind = widest([output])
                total += jnp.sum(output.astype(kind) * cotangent.astype(kind))
        return jnp.asarray(total), jnp.concatenate(held)

    def in_torch(self, *row: torch.Tensor) -> torch.Tensor:
        """See `ExampleLoss`."""
        waiting = iter(row)
        total = torch.zeros((), device=row[0].device)
        for program, used in self.calls:
            inputs = [next(waiting) for _ in range(program.structure.num_tensors)]
            args, kwargs = program.structure.rebuild(inputs)
            outputs = program.in_torch(*args, **kwargs)
            for index in used:
                axis, cotangent = program.layout.axes[index], next(waiting)
                cotangent = cotangent[0] if axis is None else cotangent.movedim(0, axis)
                total = total + (outputs[index] * cotangent).sum()
        return total


def _name(position: int, program: ForwardProgram, name: str) -> str:
    """Constants of two programs may have one name, and parameters are the model's."""
    return f"call {position}: {name}" if name in program.program.constants else name
