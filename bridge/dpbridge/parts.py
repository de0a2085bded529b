"""Physical batches, and what clips and sums the gradients of their examples."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from dpbridge.batches import Batch
from dpbridge.clipped_sum import ClippedSum, Result, Tensors
from dpbridge.example_loss import ExampleLoss, LoweredLoss
from dpbridge.fingerprint import Fingerprint
from dpbridge.lowering import autocast
from dpbridge.mechanism import Mechanism
from dpbridge.scaling import ScaledOptimizer
from dpbridge.streams import Stream


class Summing(Protocol):
    """A compiled program: see `ClippedSum`.

    Attributes:
        loss: Of one example.
        ready_sizes: Padded sizes at which it has run and, unless that is off, was checked; none
            any more once it has become careful.
        fingerprint: What the model was when it was last looked up.
        is_careful: Whether it has gone over to the careful one of its two programs, in a call
            with a batch that needed it: see `FastFirst`.
    """

    ready_sizes: set[int]
    fingerprint: Fingerprint | None

    @property
    def is_careful(self) -> bool: ...  # noqa: D102

    @property
    def loss(self) -> ExampleLoss: ...  # noqa: D102

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
        """Runs on a batch that is padded already.

        Args:
            trainable: See `ClippedSum`, likewise the others.
            tensors: Of the part.
            is_padding_example: Likewise.
            streams: Likewise.
            l2_clip_norm: Likewise.
            second_moments: Likewise.
            randomness: Likewise.
            kept: What forward has left for this batch; None runs it.
        """
        ...


class Part(Protocol):
    """A physical batch, and how to come by the loss of its examples.

    Attributes:
        tensors: `(size, ...)` each.
        size: How many examples.
        streams: Random numbers for dropout.
        kind: What the program depends on, the size and the model apart.
        kept: What forward has left for this very batch, or None.
    """

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]: ...  # noqa: D102

    @property
    def size(self) -> int: ...  # noqa: D102

    @property
    def streams(self) -> tuple[Stream, ...]: ...  # noqa: D102

    @property
    def kind(self) -> Hashable: ...  # noqa: D102

    @property
    def kept(self) -> Any: ...  # noqa: D102

    def lower(
        self,
        model: nn.Module,
        trainable: Tensors,
        mechanism: Mechanism,
        scaling: ScaledOptimizer | None,
    ) -> Summing:
        """Returns what clips and sums the gradients of such a batch.

        Args:
            model: The module.
            trainable: The parameters to differentiate, by name.
            mechanism: How gradients are clipped.
            scaling: How they are scaled before that, or None.

        Raises:
            NotImplementedError: If the model does what a program cannot.
            ValueError: If the loss is not a scalar.
        """
        ...


@dataclass(frozen=True, eq=False)
class BatchPart:
    """What was passed to `DPOptimizer.backward`.

    Attributes:
        model: The module.
        loss_fn: Its loss, or None if the model returns it.
        batch: The batch.
        streams: See `Part`.
    """

    model: nn.Module
    loss_fn: Callable[..., Any] | None
    batch: Batch
    streams: tuple[Stream, ...]

    kept = None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """See `Part`."""
        return self.batch.tensors

    @property
    def size(self) -> int:
        """See `Part`."""
        return self.batch.size

    @property
    def kind(self) -> Hashable:
        """See `Part`."""
        return self.batch.signature, autocast.current()

    def lower(
        self,
        model: nn.Module,
        trainable: Tensors,
        mechanism: Mechanism,
        scaling: ScaledOptimizer | None,
    ) -> ClippedSum:
        """See `Part`."""
        loss = LoweredLoss.of(self.model, self.loss_fn, self.batch)
        return ClippedSum(loss, model, trainable, mechanism, scaling)
