"""The parts of a whole `DPOptimizer` step, each alone, so that what the bridge adds can be seen."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import torch

from benchmarks.task import Task
from dpbridge import DPOptimizer
from dpbridge._compat import matmul_precision, x64
from dpbridge.streams import noise_stream
from dpkernels import gaussian_privatizer
from dpkernels.noise_addition import NoiseState

Parts = Mapping[str, Callable[[], None]]

_NOISE_MULTIPLIER = 1.0


def make_parts(task: Task) -> Parts:
    """Makes one callable for each part.

    Returns:
        step: `DPOptimizer.backward` and `step`: all of it.
        kernel: Its jitted program alone, on arrays that JAX has already.
        noise: The noise alone, jitted, likewise.
        base: `SGD.step` alone.
        stub: All of it, but for the program: its result of another run is put in its place.
    """
    whole, hollow = _Step(task), _Step(task)
    sums, kernel = _hollow_out(hollow)
    return {
        "step": whole.run,
        "kernel": kernel,
        "noise": _noise(task, sums),
        "base": _base(task),
        "stub": hollow.run,
    }


class _Step:
    """A training loop's body."""

    def __init__(self, task: Task) -> None:
        self.model = task.model()
        self.optimizer = DPOptimizer(
            torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.0),
            self.model,
            loss_fn=task.row.make_loss(),
            l2_clip_norm=task.l2_clip_norm,
            noise_multiplier=_NOISE_MULTIPLIER,
            expected_batch_size=task.row.batch_size,
            sampling_prob=1e-3,
        )
        self.batch = task.inputs, task.targets

    def run(self) -> None:
        self.optimizer.backward(*self.batch)
        self.optimizer.step()


def _hollow_out(step: _Step) -> tuple[Any, Callable[[], None]]:
    """Replaces the program of a step by its result; returns its sums, and the program alone."""
    step.run()
    (program,) = step.optimizer._gradient._programs
    run, calls = program._run.in_use, []

    def record(*args: Any) -> Any:
        calls.append((args, jax.block_until_ready(run(*args))))
        return calls[-1][1]

    program._run._fast = record
    step.run()
    ((args, stored),) = calls
    program._run._fast = lambda *_: stored

    def kernel() -> None:
        with x64(), matmul_precision():
            jax.block_until_ready(run(*args))

    (sums, _, _), _ = stored
    return sums, kernel


def _noise(task: Task, sums: dict[str, jax.Array]) -> Callable[[], None]:
    size = np.float32(task.row.batch_size)

    @jax.jit
    def noised(sums: Any, stream: Any, step: jax.Array, stddev: jax.Array) -> Any:
        state = NoiseState(stream.key(), step)
        result, _ = gaussian_privatizer(stddev=stddev).update(sums, state)
        return jax.tree.map(lambda x: x / size, result)

    def run() -> None:
        with x64():
            args = noise_stream(0), np.uint32(1), np.float64(_NOISE_MULTIPLIER * task.l2_clip_norm)
            jax.block_until_ready(noised(sums, *args))

    return run


def _base(task: Task) -> Callable[[], None]:
    parameters = [p for p in task.model().parameters() if p.requires_grad]
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    return lambda: optimizer.step()
