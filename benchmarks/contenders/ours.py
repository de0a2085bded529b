"""dpbridge: the clipped sum as `DPOptimizer` has it computed, up to the noise."""

from typing import Any

import jax
import numpy as np

from benchmarks.contenders.base import Contender
from benchmarks.task import Gradients, Task
from dpbridge import to_jax
from dpbridge._compat import matmul_precision, x64
from dpbridge.batches import take_apart
from dpbridge.clipped_sum import ClippedSum, Result
from dpbridge.example_loss import LoweredLoss
from dpbridge.mechanism import GaussianMechanism
from dpbridge.streams import dropout_stream

_STREAMS = (dropout_stream(0, 0, 0),)


class Ours(Contender):
    """The program of `DPOptimizer`, exchange included; no noise and no optimizer."""

    title = "dpbridge"
    is_private = True

    def __init__(self, task: Task) -> None:
        model = task.model()
        self._batch = take_apart((task.inputs, task.targets), {}, task.inputs.device)
        named = sorted(model.named_parameters())
        self._trainable = {name: p for name, p in named if p.requires_grad}
        self._clip = task.l2_clip_norm
        self._padding = np.zeros(task.row.batch_size, bool)
        with x64():
            mechanism = GaussianMechanism(self._clip, 0.0, float(task.row.batch_size))
            loss = LoweredLoss.of(model, task.row.make_loss(), self._batch)
            self._program = ClippedSum(loss, model, self._trainable, mechanism)
        self._found: Result | None = None

    def __call__(self) -> None:
        with x64():
            self._found = self._program(
                self._trainable,
                self._batch.tensors,
                self._padding,
                streams=_STREAMS,
                l2_clip_norm=self._clip,
            )
        jax.block_until_ready(self._found)

    def gradients(self) -> Gradients:
        assert self._found is not None
        return {name: np.asarray(array) for name, array in self._found.sums.items()}

    def compiled(self) -> Any:
        # Its executable is nobody's business but for a look at its size.
        with x64(), matmul_precision():
            return self._program._run.in_use.lower(
                to_jax(self._trainable),
                to_jax(self._program._frozen),
                to_jax(self._batch.tensors),
                self._padding,
                _STREAMS,
                np.float64(self._clip),
                {},
                np.bool_(True),
            ).compile()

    def clear(self) -> None:
        self._found = None
