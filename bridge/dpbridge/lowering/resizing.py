"""Interpolation to another size, one axis after the other."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from dpbridge.lowering.dtypes import widen
from dpbridge.lowering.table import Call, register_lowering

aten = torch.ops.aten

Taps = tuple[np.ndarray, np.ndarray]
"""For each position of the result the positions it is made of, and their weights."""

_CUBIC = -0.75
"""The free coefficient of Keys' kernel."""


def _step(size: int, outputs: int, factor: float | None, align_corners: bool = False) -> float:
    """Returns how far apart two neighbours of the result lie in the input."""
    if align_corners:
        return (size - 1) / (outputs - 1) if outputs > 1 else 0.0
    return 1 / factor if factor else size / outputs


def _linear_taps(size: int, places: np.ndarray) -> Taps:
    places = np.maximum(places, 0)
    left = np.minimum(places.astype(int), size - 1)
    share = np.clip(places - left, 0, 1)
    return np.stack([left, np.minimum(left + 1, size - 1)]), np.stack([1 - share, share])


def _cubic_taps(size: int, places: np.ndarray) -> Taps:
    left = np.floor(places).astype(int)
    offsets = np.arange(-1, 3)[:, None]
    distance = np.abs(places - left - offsets)
    inner = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
    outer = _CUBIC * (((distance - 5) * distance + 8) * distance - 4)
    return np.clip(left + offsets, 0, size - 1), np.where(distance <= 1, inner, outer)


def _weighted_along(x: jax.Array, axis: int, outputs: int, taps: Taps) -> jax.Array:
    weights = np.zeros((outputs, x.shape[axis]))
    for positions, shares in zip(*taps, strict=True):
        np.add.at(weights, (np.arange(outputs), positions), shares)
    matrix = jnp.asarray(weights, x.dtype)
    y = jnp.tensordot(x, matrix, ((axis,), (1,)), precision=lax.Precision.HIGHEST)
    return jnp.moveaxis(y, -1, axis)


def _chosen_along(x: jax.Array, axis: int, positions: np.ndarray) -> jax.Array:
    size, outputs = x.shape[axis], len(positions)
    if np.array_equal(positions, np.arange(outputs) * size // outputs) and outputs % size == 0:
        return jnp.repeat(x, outputs // size, axis)  # whose gradient is a sum, not a scatter
    return jnp.take(x, positions, axis)


def _factors(factors: Sequence[float] | None, rank: int) -> Sequence[float | None]:
    return (None,) * rank if factors is None else factors


def _register_nearest(name: str, rank: int, shift: float) -> None:
    @register_lowering(getattr(aten, name).vec)
    def nearest(
        call: Call, x: jax.Array, sizes: Sequence[int] | None, factors: Sequence[float] | None
    ) -> jax.Array:
        for axis, factor in zip(range(2, 2 + rank), _factors(factors, rank), strict=True):
            size, outputs = x.shape[axis], call.shape[axis]
            # In float32, whatever the dtype of x: which neighbour is nearest depends on it.
            step = np.float32(_step(size, outputs, factor))
            places = (np.arange(outputs, dtype=np.float32) + np.float32(shift)) * step
            x = _chosen_along(x, axis, np.minimum(places.astype(int), size - 1))
        return x


def _register_weighted(name: str, rank: int, taps_at: Callable[[int, np.ndarray], Taps]) -> None:
    @register_lowering(getattr(aten, name).vec)
    def weighted(
        call: Call,
        x: jax.Array,
        sizes: Sequence[int] | None,
        align_corners: bool,
        factors: Sequence[float] | None,
    ) -> jax.Array:
        x = widen(x)
        for axis, factor in zip(range(2, 2 + rank), _factors(factors, rank), strict=True):
            size, outputs = x.shape[axis], call.shape[axis]
            step = _step(size, outputs, factor, align_corners)
            shift = 0.0 if align_corners else 0.5
            places = (np.arange(outputs) + shift) * step - shift
            x = _weighted_along(x, axis, outputs, taps_at(size, places))
        return x


for _rank in (1, 2, 3):
    _register_nearest(f"upsample_nearest{_rank}d", _rank, 0.0)
    _register_nearest(f"_upsample_nearest_exact{_rank}d", _rank, 0.5)
_register_weighted("upsample_linear1d", 1, _linear_taps)
_register_weighted("upsample_bilinear2d", 2, _linear_taps)
_register_weighted("upsample_trilinear3d", 3, _linear_taps)
_register_weighted("upsample_bicubic2d", 2, _cubic_taps)
