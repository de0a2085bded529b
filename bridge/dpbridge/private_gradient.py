"""The private half of a step: clip and sum in JAX, noise once, and only then back to torch."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from dpbridge._compat import x64
from dpbridge.batches import Batch, pad, padded_size
from dpbridge.clipped_sum import Arrays, settle
from dpbridge.exchange import finish, to_jax
from dpbridge.mechanism import Mechanism
from dpbridge.parts import BatchPart, Part, Summing
from dpbridge.programs import Programs
from dpbridge.scaling import ScaledOptimizer
from dpbridge.self_check import check_gradients
from dpbridge.streams import dropout_stream
from dpkernels.tapped.explain import Explanation
from dpkernels.tree_clipping import widest

Tensors = Mapping[str, nn.Parameter]


@dataclass(eq=False)
class PrivateGradient:
    """The clipped sum of one logical batch, held in JAX until it is noised.

    Attributes:
        model: The module.
        loss_fn: The loss that `backward` is given, or None.
        mechanism: What to release.
        seed: Of dropout and, unless a plan has its own, of the noise; below 2**64.
        scaling: How gradients are scaled before they are clipped, or None.
        self_check: Whether to compare the first batch of each compiled program with torch.
        steps: How many releases there were: the position in the noise stream.
    """

    model: nn.Module
    loss_fn: Callable[..., Any] | None
    mechanism: Mechanism
    seed: int
    scaling: ScaledOptimizer | None
    self_check: bool
    steps: int = 0
    _parts: int = 0
    _drawn: int = 0
    _sums: Arrays | None = None
    _programs: Programs[Summing] = field(init=False)

    def __post_init__(self) -> None:
        self._programs = Programs(self.model, self.loss_fn)

    @property
    def is_pending(self) -> bool:
        """Whether a batch was added since the last release."""
        return self._parts > 0

    @property
    def parts(self) -> int:
        """How many batches were added since the last release."""
        return self._parts

    @property
    def drawn(self) -> int:
        """How many examples were added since the last release."""
        return self._drawn

    def discard(self) -> None:
        """Forgets what was added since the last release."""
        self._sums, self._parts, self._drawn = None, 0, 0

    def part_of(self, batch: Batch) -> BatchPart:
        """Returns what `add` takes, of a batch that was passed to `backward`."""
        streams = (dropout_stream(self.seed, self.steps, self._parts),)
        return BatchPart(self.model, self.loss_fn, batch, streams)

    def add(self, part: Part, trainable: Tensors) -> torch.Tensor:
        """Adds the clipped gradients of a batch to those added since the last release.

        Whatever goes wrong, an interrupt included, all that was added before is forgotten too: a
        part that is added again would count twice.

        Args:
            part: Examples; may be none.
            trainable: The parameters to differentiate, by name.

        Returns:
            The mean loss, a scalar tensor on the parameters' device; 0 for an empty batch.

        Raises:
            IndexError: If a label or token is out of range.
            RuntimeError: If torch's own gradients differ from those of the compiled program, or
                other parameters are trainable than in the batches before.
            ValueError: If the model holds another parameter by a name than the optimizer.
        """
        try:
            self.check_names(trainable)
            if part.size == 0:
                self._parts += 1
                return torch.zeros((), device=part.tensors[0].device)
            with x64():
                sums, loss = self._clip_and_sum(part, trainable)
        except BaseException:
            self.discard()
            raise
        self._sums, self._parts, self._drawn = sums, self._parts + 1, self._drawn + part.size
        return loss

    def explain(self, part: BatchPart, trainable: Tensors) -> Explanation:
        """Says how norm and clipped sum of every parameter are found for such a batch."""
        with x64():
            program = part.lower(self.model, trainable, self.mechanism, self.scaling)
            moments = self._second_moments(trainable)
            return program.explain(
                trainable, part.tensors, streams=part.streams, second_moments=moments
            )

    def _clip_and_sum(self, part: Part, trainable: Tensors) -> tuple[Arrays, torch.Tensor]:
        size = self.padded_size(part.size)
        tensors = pad(part.tensors, size)
        clipped_sum = self._program(part, trainable, tensors)
        result = clipped_sum(
            trainable,
            tensors,
            np.arange(size) >= part.size,
            streams=part.streams,
            l2_clip_norm=getattr(self.mechanism, "l2_clip_norm", math.inf),
            second_moments=self._second_moments(trainable),
            kept=part.kept,
        )
        loss = settle(result)
        # If this batch was the first to need care, it is of a program that was not checked.
        self._make_ready(clipped_sum, part, trainable, tensors)
        return result.sums if self._sums is None else _add(self._sums, result.sums), loss

    def padded_size(self, size: int) -> int:
        """Returns how many rows a batch of this size is padded to."""
        return padded_size(size, self.mechanism.expected_batch_size or size)

    def release(self, trainable: Tensors) -> dict[str, torch.Tensor]:
        """Returns the noised mean gradient of all that was added, and starts anew.

        Args:
            trainable: The parameters that were differentiated, by name.

        Returns:
            For each name a tensor of the parameter's shape, dtype and device.

        Raises:
            RuntimeError: If other parameters are trainable than when the batches were added.

        Guarantees:
            Each coordinate is (clipped sum + N(0, (noise_multiplier · l2_clip_norm)²)) divided by
            `expected_batch_size`, whatever the number of examples drawn; or what the plan makes
            of the sum.
            Noise is drawn once, however many batches were added.
        """
        with x64():
            sums = self.take_sums(trainable)
            noised = self.mechanism.noised(sums, self.seed, self.steps)
            if self.scaling is not None:
                moments = to_jax(self._second_moments(trainable))
                noised = self.scaling.transform(moments)(noised, inverse=True)
            self.steps += 1
            dtypes = {name: parameter.dtype for name, parameter in trainable.items()}
            return {name: finish(noised[name]).to(dtypes[name]) for name in trainable}

    def take_sums(self, trainable: Tensors) -> Arrays:
        """Returns what was added, not noised, and starts anew. Call it under `x64`.

        Raises:
            RuntimeError: If other parameters are trainable than when the batches were added.
        """
        self.check_names(trainable)
        sums = self._sums if self._sums is not None else _zeros(trainable)
        self.discard()
        return sums

    def _second_moments(self, trainable: Tensors) -> dict[str, torch.Tensor]:
        return {} if self.scaling is None else self.scaling.second_moments(trainable)

    def noise_state(self, trainable: Tensors) -> dict[str, Any]:
        """Returns what the noise of later steps depends on, in plain types and tensors.

        Args:
            trainable: The parameters to differentiate, by name.
        """
        with x64():
            own = self.mechanism.state_dict(lambda: _zeros(trainable))
            return {"seed": self.seed, "steps": self.steps, **own}

    def read_noise_state(self, state: Mapping[str, Any], trainable: Tensors) -> Callable[[], None]:
        """Reads a saved place in the noise, and returns what goes there.

        Args:
            state: What `noise_state` returned; seed and steps are checked already.
            trainable: The parameters to differentiate, by name.

        Raises:
            ValueError: If it is the state of another mechanism.
        """
        with x64():
            restore = self.mechanism.read_state(state, _zeros(trainable))

        def go() -> None:
            restore()
            self.seed, self.steps = state["seed"], state["steps"]

        return go

    def check_names(self, trainable: Tensors) -> None:
        """Raises RuntimeError if other parameters are trainable than in what was added before."""
        self.mechanism.check_names(trainable)
        if self._sums is not None and self._sums.keys() != trainable.keys():
            changed = ", ".join(sorted(self._sums.keys() ^ trainable.keys()))
            raise RuntimeError(
                f"Parameters must not be frozen or unfrozen between `backward` and `step`, got a "
                f"change of {changed}. Do so after `step`, or call zero_grad and start anew."
            )

    def _program(
        self, part: Part, trainable: Tensors, tensors: tuple[torch.Tensor, ...]
    ) -> Summing:
        """Returns the program for such a batch, lowered and checked if that is still to be done."""
        dtypes = tuple((name, parameter.dtype) for name, parameter in trainable.items())
        kind, size = (type(part), part.kind, dtypes), tensors[0].shape[0]
        program = self._programs.find(kind)
        if program is None:
            program = part.lower(self.model, trainable, self.mechanism, self.scaling)
        if size not in program.ready_sizes:
            self._make_ready(program, part, trainable, tensors)
            self._programs.file(kind, program)
        return program

    def _make_ready(
        self,
        program: Summing,
        part: Part,
        trainable: Tensors,
        tensors: tuple[torch.Tensor, ...],
    ) -> None:
        """Checks the program for batches of this size, if that is still to be done."""
        size = tensors[0].shape[0]
        while size not in program.ready_sizes:
            was_careful = program.is_careful
            if self.self_check:
                check_gradients(
                    program,
                    part,
                    tensors,
                    trainable,
                    scaling=self.scaling,
                    is_clipped=not self.mechanism.has_given_norm,
                    clips_together=self.mechanism.clips_together,
                )
            if program.is_careful == was_careful:  # Otherwise it was one and then the other.
                program.ready_sizes.add(size)


@jax.jit
def _add(left: Arrays, right: Arrays) -> Arrays:
    return jax.tree.map(jnp.add, left, right)


def _zeros(trainable: Tensors) -> Arrays:
    arrays = to_jax(dict(trainable))
    return {name: jnp.zeros_like(x, dtype=widest([x])) for name, x in arrays.items()}
