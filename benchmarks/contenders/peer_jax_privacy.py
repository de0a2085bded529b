"""JAX Privacy's `clipped_grad` on the same lowered program."""

import time
from typing import Any

import jax

from benchmarks.contenders.plain_jax import JaxContender
from benchmarks.task import Task


class JaxPrivacy(JaxContender):
    """As it is by default: all examples at once."""

    title = "JAX Privacy"
    is_private = True
    microbatch_size: int | None = None

    def _function(self, task: Task) -> Any:
        import jax_privacy

        return jax_privacy.clipped_grad(
            self._lowered.loss,
            l2_clip_norm=task.l2_clip_norm,
            batch_argnums=2,
            microbatch_size=self.microbatch_size,
        )


class JaxPrivacyBest(JaxPrivacy):
    """The fastest of a few microbatch sizes."""

    title = "JAX Privacy, best microbatch"

    def _compile(self, task: Task) -> Any:
        size = task.row.batch_size
        tried = {}
        for microbatch_size in sorted({max(1, size // n) for n in (2, 4, 8, 16, 64)} - {size}):
            self.microbatch_size = microbatch_size
            compiled = super()._compile(task)
            tried[microbatch_size] = self._seconds(compiled), compiled
        best = min(tried, key=lambda microbatch_size: tried[microbatch_size][0])
        others = ", ".join(f"{n}: {1e3 * s:.3g} ms" for n, (s, _) in tried.items())
        self.note = f"microbatch_size={best}; tried {others}"
        return tried[best][1]

    def _seconds(self, compiled: Any) -> float:
        """Returns the shorter of two runs after a first."""
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            jax.block_until_ready(compiled(*self._args))
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:])
