"""Maxima and means over windows, one axis after the other."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from dpbridge.lowering.convolution import each
from dpbridge.lowering.dtypes import widen
from dpbridge.lowering.table import Call, register_lowering

aten = torch.ops.aten

Sizes = int | Sequence[int]
Windows = list[np.ndarray]
"""For each axis the positions of `(outputs, elements of a window)`; some may be outside."""

_LONGEST_CHAIN = 8
"""Windows up to this size are compared element by element, which XLA fuses; others searched."""


def _max_windows(
    call: Call,
    x: jax.Array,
    kernel: Sizes,
    stride: Sizes = (),
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    *,
    rank: int,
) -> Windows:
    sizes, strides = each(kernel, rank), each(stride or kernel, rank)
    pads, steps = each(padding, rank), each(dilation, rank)
    return [
        np.arange(outputs)[:, None] * strides[i] - pads[i] + np.arange(sizes[i]) * steps[i]
        for i, outputs in enumerate(_output_space(call, rank))
    ]


def _adaptive_windows(call: Call, x: jax.Array, outputs: Sizes, *, rank: int) -> Windows:
    windows = []
    for length, count in zip(x.shape[-rank:], _output_space(call, rank), strict=True):
        starts, ends = _adaptive_bounds(length, count)
        positions = starts[:, None] + np.arange((ends - starts).max())
        windows.append(np.minimum(positions, ends[:, None] - 1))
    return windows


def _adaptive_bounds(length: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    edges = np.arange(outputs + 1) * length
    return edges[:-1] // outputs, -(-edges[1:] // outputs)


def _output_space(call: Call, rank: int) -> tuple[int, ...]:
    result = call.result[0] if isinstance(call.result, (tuple, list)) else call.result
    return tuple(result.shape[-rank:])


def _max_over(x: jax.Array, windows: Windows) -> tuple[jax.Array, jax.Array]:
    """Returns maxima and their positions; of equal elements the first, as torch has it.

    The first along the last axis, then the first of those along the axis before, is the first.
    """
    space = x.shape[-len(windows) :]
    index = jnp.broadcast_to(jnp.arange(np.prod(space)).reshape(space), x.shape)
    for i in reversed(range(len(windows))):
        axis = x.ndim - len(windows) + i
        x, index = _max_along(x, index, windows[i], axis)
    return x, index


def _max_along(
    x: jax.Array, index: jax.Array, positions: np.ndarray, axis: int
) -> tuple[jax.Array, jax.Array]:
    length = positions.shape[1]
    is_tiling = np.array_equal(positions.ravel(), np.arange(x.shape[axis]))
    if is_tiling and length <= _LONGEST_CHAIN:
        # Windows side by side: to XLA on a CPU the padding of strided slices is slow.
        columns = [_side_by_side(array, length, axis) for array in (x, index)]
        return _first_largest(*columns)
    before = max(0, -int(positions.min()))
    after = max(0, int(positions.max()) + 1 - x.shape[axis])
    widths = [(before, after, 0) if i == axis else (0, 0, 0) for i in range(x.ndim)]
    positions = positions + before
    x, index = lax.pad(x, _lowest(x.dtype), widths), lax.pad(index, index.dtype.type(0), widths)
    if positions.shape[1] > _LONGEST_CHAIN:
        return _search(x, index, positions, axis)
    columns = [[_column(array, column, axis) for column in positions.T] for array in (x, index)]
    return _first_largest(*columns)


def _side_by_side(x: jax.Array, length: int, axis: int) -> list[jax.Array]:
    split = x.reshape(*x.shape[:axis], -1, length, *x.shape[axis + 1 :])
    return [lax.index_in_dim(split, i, axis + 1, keepdims=False) for i in range(length)]


def _first_largest(
    values: list[jax.Array], indices: list[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    best, best_index = values[0], indices[0]
    for other, other_index in zip(values[1:], indices[1:], strict=True):
        is_better = (other > best) | jnp.isnan(other)
        best = jnp.where(is_better, other, best)
        best_index = jnp.where(is_better, other_index, best_index)
    return best, best_index


def _search(
    x: jax.Array, index: jax.Array, positions: np.ndarray, axis: int
) -> tuple[jax.Array, jax.Array]:
    x, index = jnp.take(x, positions, axis), jnp.take(index, positions, axis)
    best = jnp.argmax(x, axis + 1, keepdims=True)
    values, index = (jnp.take_along_axis(array, best, axis + 1) for array in (x, index))
    return values.squeeze(axis + 1), index.squeeze(axis + 1)


def _column(x: jax.Array, positions: np.ndarray, axis: int) -> jax.Array:
    stride = int(positions[1] - positions[0]) if len(positions) > 1 else 1
    if stride > 0 and np.array_equal(positions, positions[0] + np.arange(len(positions)) * stride):
        return lax.slice_in_dim(x, int(positions[0]), int(positions[-1]) + 1, stride, axis)
    return jnp.take(x, positions, axis)


def _lowest(dtype: Any) -> jax.Array:
    is_float = jnp.issubdtype(dtype, jnp.floating)
    return jnp.asarray(-jnp.inf if is_float else jnp.iinfo(dtype).min, dtype)


def _avg_pool(
    call: Call,
    x: jax.Array,
    kernel: Sizes,
    stride: Sizes = (),
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    rank: int,
) -> jax.Array:
    sizes, strides, pads = each(kernel, rank), each(stride or kernel, rank), each(padding, rank)
    x = widen(x)
    for i, outputs in enumerate(_output_space(call, rank)):
        axis = x.ndim - rank + i
        length = x.shape[axis]
        starts = np.arange(outputs) * strides[i] - pads[i]
        ends = np.minimum(starts + sizes[i], length + pads[i])
        inner_starts, inner_ends = np.maximum(starts, 0), np.minimum(ends, length)
        counts = ends - starts if count_include_pad else inner_ends - inner_starts
        counts = np.ones_like(counts) if divisor_override else counts
        x = _mean_along(x, inner_starts, inner_ends, counts, axis)
    return x / divisor_override if divisor_override else x


def _adaptive_avg_pool(call: Call, x: jax.Array, outputs: Sizes, *, rank: int) -> jax.Array:
    x = widen(x)
    for i, count in enumerate(_output_space(call, rank)):
        axis = x.ndim - rank + i
        starts, ends = _adaptive_bounds(x.shape[axis], count)
        x = _mean_along(x, starts, ends, ends - starts, axis)
    return x


def _mean_along(
    x: jax.Array, starts: np.ndarray, ends: np.ndarray, counts: np.ndarray, axis: int
) -> jax.Array:
    """Returns the sum over each window [start, end) of the axis, divided by its count."""
    length, outputs = x.shape[axis], len(starts)
    inside = (np.arange(length) >= starts[:, None]) & (np.arange(length) < ends[:, None])
    tiles = np.arange(length) * outputs // length == np.arange(outputs)[:, None]
    if length % outputs == 0 and np.array_equal(inside, tiles):
        shape = (*x.shape[:axis], outputs, length // outputs, *x.shape[axis + 1 :])
        total = jnp.sum(x.reshape(shape), axis + 1)
    else:
        weights = jnp.asarray(inside, x.dtype)
        total = jnp.tensordot(x, weights, ((axis,), (1,)), precision=lax.Precision.HIGHEST)
        total = jnp.moveaxis(total, -1, axis)
    counts = counts.reshape(-1, *(1,) * (x.ndim - axis - 1))
    return total / jnp.asarray(counts, x.dtype)


def _register_max(op: Any, windows: Callable[..., Windows], rank: int) -> None:
    @register_lowering(op)
    def pool(call: Call, x: jax.Array, *args: Any) -> Any:
        values, index = _max_over(x, windows(call, x, *args, rank=rank))
        return (values, index) if isinstance(call.result, (tuple, list)) else values


for _rank in (1, 2, 3):
    _register_max(getattr(aten, f"max_pool{_rank}d").default, _max_windows, _rank)
    _register_max(getattr(aten, f"max_pool{_rank}d_with_indices").default, _max_windows, _rank)
    _register_max(getattr(aten, f"adaptive_max_pool{_rank}d").default, _adaptive_windows, _rank)
    register_lowering(getattr(aten, f"avg_pool{_rank}d").default)(
        functools.partial(_avg_pool, rank=_rank)
    )
    register_lowering(getattr(aten, f"adaptive_avg_pool{_rank}d").default)(
        functools.partial(_adaptive_avg_pool, rank=_rank)
    )
