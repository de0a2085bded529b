"""What happens between `model(x)` and `optimizer.step()` in a loop that nobody changed."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from dpbridge._compat import x64
from dpbridge.batches import Batch, pad, take_apart
from dpbridge.exchange import to_jax
from dpbridge.foreign_gradients import ForeignGradients, Regularizer
from dpbridge.forward_calls import CallsPart, ForwardCall
from dpbridge.forward_program import ForwardProgram
from dpbridge.lasting import lasting_to_jax
from dpbridge.lowering import autocast
from dpbridge.planned_run import PlannedRun
from dpbridge.private_forward import Outputs, attach, plain_forward
from dpbridge.private_gradient import PrivateGradient
from dpbridge.programs import Programs
from dpbridge.self_check import check_outputs
from dpbridge.streams import dropout_stream
from dpbridge.trainable import check_parameters, device_of

REDUCTIONS = ("mean", "sum")


class PrivateLoop:
    """Runs the model's forward in JAX, and keeps what backward brings until the step.

    The gradient of a batch is found when it is needed: at `step`, or when the next part of the
    draw goes backward. Until then every call of forward on the batch can go backward, and what
    they bring is added up for each example before it is clipped.

    Args:
        gradient: What the parts of a draw are added to.
        run: Says of which draw a batch must be.
        trainable: Returns the parameters to differentiate, by name.
        loss_reduction: "mean" or "sum": what the user's loss does over the examples.
        regularizer: See `ForeignGradients`.
    """

    def __init__(
        self,
        gradient: PrivateGradient,
        run: PlannedRun,
        trainable: Callable[[], Mapping[str, nn.Parameter]],
        *,
        loss_reduction: str,
        regularizer: Regularizer | None,
    ) -> None:
        self._gradient, self._run, self._trainable = gradient, run, trainable
        self._is_mean = loss_reduction == "mean"
        self._programs: Programs[ForwardProgram] = Programs(gradient.model, None)
        self._waiting: list[ForwardCall] = []
        self._serial = (0, 0)  # step, and how many calls of forward it has had
        self._is_removed = False
        self._attached = attach(self)
        self.foreign = ForeignGradients(gradient.model, regularizer)

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self._gradient.model

    @property
    def is_waiting(self) -> bool:
        """Whether backward has brought something that is not clipped and added up yet."""
        return bool(self._waiting)

    def remove(self) -> None:
        """Gives the model its own forward back."""
        self.discard()
        self._is_removed = True
        self.foreign.remove()
        for forward in self._attached:
            forward.remove()

    def discard(self) -> None:
        """Forgets what backward has brought."""
        self._waiting = []
        self.foreign.discard()

    def forward(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Runs a forward for each example by itself, and returns what the user's loop goes on with.

        Raises:
            TypeError, ValueError: If the arguments are not tensors with a row an example.
            NotImplementedError: If an input requires a gradient, or the model cannot be lowered.
        """
        _check_mode()
        batch = take_apart(args, kwargs, device_of(self.model))
        if any(x.requires_grad for x in batch.tensors):
            raise NotImplementedError(
                "The inputs of a private model must not require a gradient, got one that does: "
                "it ends at the model. Call detach() on it, or make what computes it part of the "
                "model."
            )
        trainable = self._trainable()
        check_parameters(self.model, trainable)
        program = self._program(original, batch, trainable)
        stream = dropout_stream(self._gradient.seed, self._gradient.steps, self._next_serial())
        call = ForwardCall(program, batch, stream, self._run.place)
        call.watch({f"`{name}`": tensor for name, tensor in program.tensors.items()})
        call.watch({f"Input {i} of the model": x for i, x in enumerate(batch.tensors)})
        anchor = torch.ones((), requires_grad=True)
        tensors = Outputs.apply(
            anchor, lambda: self._run_forward(call), lambda found: self._receive(call, found)
        )
        layout = program.layout
        pairs = zip(tensors, layout.axes, strict=True)
        return layout.rebuild([x if a is not None else self._reduced(x) for x, a in pairs])

    def settle(self, trainable: Mapping[str, nn.Parameter]) -> None:
        """Clips and adds up what is waiting.

        Raises:
            RuntimeError: If weights or inputs were written to since forward; all parts of the
                draw are forgotten then.
        """
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        size = waiting[0].batch.size
        try:
            for call in waiting:
                call.check_unchanged()
            part = CallsPart(waiting, size, float(size) if self._is_mean else 1.0)
            with plain_forward():
                self._gradient.add(part, trainable)
        except BaseException:
            self._gradient.discard()
            raise
        finally:
            for call in waiting:
                call.kept = None  # The user's loss may hold the call for another while.

    def _run_forward(self, call: ForwardCall) -> list[torch.Tensor]:
        program, batch = call.program, call.batch
        if batch.size == 0:
            return [x.clone() for x in program.layout.empty]
        size = self._gradient.padded_size(batch.size)
        with x64():
            arrays = lasting_to_jax(program.tensors)
            rows = to_jax(pad(batch.tensors, size))
            is_padding = np.arange(size) >= batch.size
            if size not in program.ready_sizes:
                if self._gradient.self_check:
                    with plain_forward():
                        check_outputs(program, arrays, rows, batch, call.stream)
                program.ready_sizes.add(size)
            padded, call.kept = program(arrays, rows, is_padding, stream=call.stream)
        axes = (axis or 0 for axis in program.layout.axes)
        # Copies, which the loop may write to: JAX's own memory may be kept for backward.
        return [x.narrow(a, 0, batch.size).clone() for x, a in zip(padded, axes, strict=True)]

    def _receive(self, call: ForwardCall, cotangents: dict[int, torch.Tensor]) -> None:
        """Takes what torch's backward brings to the outputs of a call."""
        if self._is_removed:
            raise RuntimeError(
                "`backward` must come before make_public, got a loss of a forward before it. Call "
                "the model again."
            )
        if call.place != self._run.place:
            raise RuntimeError(
                "`backward` must come before the loader's next batch, got a loss of an earlier "
                "one. Go forward, backward and to the next batch in this order."
            )
        call.check_unchanged()
        if self._waiting and self._waiting[0].place != call.place:
            self.settle(self._trainable())
        if not self._waiting:
            self._run.check_part(self._gradient.parts, call.batch.size)
        elif call.batch.size != self._waiting[0].batch.size:
            raise RuntimeError(
                "Every forward of a step must be on the whole batch of the loader, got "
                f"{call.batch.size} examples after {self._waiting[0].batch.size}. Rows that are "
                "the same example must be in the same place; to save memory set "
                "`microbatch_size`."
            )
        call.cotangents = cotangents
        for index, cotangent in cotangents.items():
            call.watch({f"The gradient of output {index}": cotangent})
        self._waiting.append(call)

    def _reduced(self, values: torch.Tensor) -> torch.Tensor:
        """Returns what the batch has of a scalar that each example has its own of."""
        total = values.sum(0)
        return total / max(1, values.shape[0]) if self._is_mean else total

    def _next_serial(self) -> int:
        step, count = self._serial
        count = count if step == self._gradient.steps else 0
        self._serial = self._gradient.steps, count + 1
        return count

    def _program(
        self, original: Callable[..., Any], batch: Batch, trainable: Mapping[str, nn.Parameter]
    ) -> ForwardProgram:
        """Returns the program for such a batch, lowered if that is still to be done."""
        own = getattr(original, "__self__", None), getattr(original, "__func__", original)
        dtypes = tuple((name, p.dtype) for name, p in trainable.items())
        kind = (*own, batch.signature, dtypes, autocast.current())
        program = self._programs.find(kind)
        if program is None:
            with plain_forward():
                mechanism = None if self._gradient.scaling else self._gradient.mechanism
                program = ForwardProgram(self.model, original, batch, list(trainable), mechanism)
            self._programs.file(kind, program)
        return program


def _check_mode() -> None:
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "A private model must not be compiled by torch.compile: its forward is compiled by "
            "JAX. Pass the module itself to make_private, and leave torch.compile out."
        )
