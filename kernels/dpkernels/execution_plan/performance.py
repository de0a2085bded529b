"""How a plan is computed, as opposed to what it releases."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from dpkernels import clipping
from dpkernels.clipped_vjp import ClippedVjp, clipped_vjp
from dpkernels.clipping import BoundedSensitivityCallable


@dataclass(frozen=True)
class PerformanceFlags:
    """How a plan is computed. None of it changes what is released, but for rounding.

    Attributes:
        dtype: Gradients are cast to this type, float32 or float64, before they are clipped; None
            sums in float32, or in float64 for float64 gradients, and is faster.
        noise_seed: Seed or Threefry key of the noise. By default the operating system's. Whoever
            knows it can take the noise away; two runs with one seed draw the same noise.
        microbatch_size: How many examples are held in memory at once.
        spmd_axis_name: See `jax.vmap`.
        keep_batch_dim: Whether the loss sees an example with a leading axis of 1.
        strategy: How norms and sums are found: see `dpkernels.clipped_grad`.

    Raises:
        TypeError: If `dtype` is not float32 or float64.
    """

    dtype: Any = None
    noise_seed: Any = None
    microbatch_size: int | None = None
    spmd_axis_name: str | None = None
    keep_batch_dim: bool = True
    strategy: str = "auto"

    def __post_init__(self) -> None:
        if self.dtype is not None and jnp.dtype(self.dtype) not in (jnp.float32, jnp.float64):
            raise TypeError(
                f"`dtype` must be float32 or float64, got {self.dtype}. Leave it out for "
                "parameters in half precision, whose gradients are summed in float32."
            )


@dataclass(frozen=True)
class PlannedClipping:
    """`dpkernels.clipped_grad` with the arguments filled in that a plan decides.

    Attributes:
        flags: How it is computed.
        l2_clip_norm: See `dpkernels.clipped_grad`.
        rescale_to_unit_norm: Likewise.
        normalize_by: Likewise.
    """

    flags: PerformanceFlags
    l2_clip_norm: Any
    rescale_to_unit_norm: bool
    normalize_by: float

    def __call__(
        self,
        fun: Callable[..., Any],
        argnums: int | Sequence[int] = 0,
        has_aux: bool = False,
        *,
        batch_argnums: int | Sequence[int] = 1,
        prng_argnum: int | None = None,
        return_values: bool = False,
        return_grad_norms: bool = False,
        pre_clipping_transform: Callable[[Any], Any] | None = None,
    ) -> BoundedSensitivityCallable:
        """See `dpkernels.clipped_grad`; what is left out here is the plan's."""
        return clipping.clipped_grad(
            fun,
            argnums,
            has_aux,
            batch_argnums=batch_argnums,
            return_values=return_values,
            return_grad_norms=return_grad_norms,
            pre_clipping_transform=pre_clipping_transform,
            microbatch_size=self.flags.microbatch_size,
            dtype=self.flags.dtype,
            prng_argnum=prng_argnum,
            **self._shared(),
        )

    @property
    def has_vjp(self) -> bool:
        """Whether `vjp` computes the same: not in microbatches, and not on gradients that are cast.

        In microbatches nothing is kept from forward, which is what they are for.
        """
        flags = self.flags
        is_whole = flags.microbatch_size is None and flags.dtype is None
        return is_whole and flags.strategy != "materialize"

    def vjp(
        self,
        fun: Callable[..., Any],
        has_aux: bool = False,
        *,
        batch_argnums: int | Sequence[int] = 1,
        prng_argnum: int | None = None,
    ) -> ClippedVjp:
        """See `dpkernels.clipped_vjp`; what is left out here is the plan's.

        Raises:
            NotImplementedError: If not `has_vjp`.
        """
        if not self.has_vjp:
            raise NotImplementedError(
                "`vjp` must keep what forward computed, got a plan that works in microbatches or "
                "forms every gradient. Use `clipped_grad`."
            )
        return clipped_vjp(
            fun, has_aux, batch_argnums=batch_argnums, prng_argnum=prng_argnum, **self._shared()
        )

    def _shared(self) -> dict[str, Any]:
        return {
            "l2_clip_norm": self.l2_clip_norm,
            "rescale_to_unit_norm": self.rescale_to_unit_norm,
            "normalize_by": self.normalize_by,
            "keep_batch_dim": self.flags.keep_batch_dim,
            "spmd_axis_name": self.flags.spmd_axis_name,
            "strategy": self.flags.strategy,
        }
