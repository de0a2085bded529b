"""Reading and writing by index, with every index checked: XLA clips what torch refuses."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from dpbridge.lowering.dtypes import Operand, Scalar
from dpbridge.lowering.table import Call, register_lowering

aten = torch.ops.aten

Index = tuple[Any, ...]


def require_in_range(
    call: Call, index: jax.Array, size: int, *, name: str = "index", low: int = 0
) -> None:
    """Asks the host to check that every index is in [low, size)."""
    call.require((index >= low) & (index < size), f"{name} must be in [{low}, {size})")


def _along(x: jax.Array, dim: int, index: jax.Array) -> Index:
    return (slice(None),) * (dim % x.ndim) + (index,)


@register_lowering(aten.embedding.default)
def _embedding(
    call: Call,
    weight: jax.Array,
    ids: jax.Array,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> jax.Array:
    if scale_grad_by_freq:
        raise call.refuse("scale_grad_by_freq has no rule. Use scale_grad_by_freq=False.")
    require_in_range(call, ids, weight.shape[0], name="token ids")
    rows = jnp.take(weight, ids, axis=0, mode="clip")
    if padding_idx < 0:
        return rows
    return jnp.where((ids == padding_idx)[..., None], jax.lax.stop_gradient(rows), rows)


@register_lowering(aten.one_hot.default)
def _one_hot(call: Call, ids: jax.Array, classes: int = -1) -> jax.Array:
    require_in_range(call, ids, classes, name="classes")
    return jax.nn.one_hot(ids, classes, dtype=call.dtype)


@register_lowering(aten.index_select.default)
def _index_select(call: Call, x: jax.Array, dim: int, index: jax.Array) -> jax.Array:
    require_in_range(call, index, x.shape[dim])
    return jnp.take(x, index, axis=dim, mode="clip").reshape(call.shape)


@register_lowering(aten.take.default)
def _take(call: Call, x: jax.Array, index: jax.Array) -> jax.Array:
    require_in_range(call, index, x.size, low=-x.size)
    return x.reshape(-1).at[index].get(mode="clip")


@register_lowering(aten.gather.default)
def _gather(
    call: Call, x: jax.Array, dim: int, index: jax.Array, sparse_grad: bool = False
) -> jax.Array:
    if x.ndim == 0:
        return x.reshape(call.shape)
    require_in_range(call, index, x.shape[dim])
    part = x[_beside(x, dim, index)]
    return jnp.take_along_axis(part, index, dim, mode="clip")


@register_lowering(aten.take_along_dim.default)
def _take_along_dim(
    call: Call, x: jax.Array, index: jax.Array, dim: int | None = None
) -> jax.Array:
    if dim is None:
        x, index, dim = x.reshape(-1), index.reshape(-1), 0
    require_in_range(call, index, x.shape[dim])
    return jnp.take_along_axis(x, index, dim, mode="clip")


def _beside(x: jax.Array, dim: int, index: jax.Array) -> Index:
    """Where `index` is smaller than `x` on another axis, torch uses the first elements of it."""
    sizes = list(index.shape)
    sizes[dim] = x.shape[dim]
    return tuple(slice(size) for size in sizes)


@register_lowering(aten.index.Tensor)
def _index(call: Call, x: jax.Array, indices: Sequence[jax.Array | None]) -> jax.Array:
    return x.at[_checked(call, x, indices)].get(mode="clip")


@register_lowering(aten.index_put.default)
def _index_put(
    call: Call,
    x: jax.Array,
    indices: Sequence[jax.Array | None],
    values: jax.Array,
    accumulate: bool = False,
) -> jax.Array:
    if _is_mask(indices):
        return _put_by_mask(call, x, indices, values, accumulate)
    at = x.at[_checked(call, x, indices)]
    values = values.astype(x.dtype)
    return at.add(values, mode="drop") if accumulate else at.set(values, mode="drop")


def _checked(call: Call, x: jax.Array, indices: Sequence[jax.Array | None]) -> Index:
    for axis, index in enumerate(indices):
        if index is not None:
            require_in_range(call, index, x.shape[axis], low=-x.shape[axis])
    return tuple(slice(None) if index is None else index for index in indices)


def _is_mask(indices: Sequence[jax.Array | None]) -> bool:
    return any(index is not None and index.dtype in (jnp.bool_, jnp.uint8) for index in indices)


def _put_by_mask(
    call: Call,
    x: jax.Array,
    indices: Sequence[jax.Array | None],
    values: jax.Array,
    accumulate: bool,
) -> jax.Array:
    mask, *others = indices
    if mask is None or others or values.size != 1:
        raise call.refuse(
            "a boolean mask must come as the only index, and be filled with one value, got "
            f"{len(indices)} indices and values of shape {values.shape}. Use torch.where."
        )
    mask = mask.astype(bool).reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    value = values.astype(x.dtype).reshape(())
    return jnp.where(mask, x + value if accumulate else value, x)


@register_lowering(aten.masked_scatter.default)
def _masked_scatter(call: Call, x: jax.Array, mask: jax.Array, source: jax.Array) -> jax.Array:
    x, mask = jnp.broadcast_arrays(x, mask)
    nth = jnp.cumsum(mask.reshape(-1).astype(jnp.int64)) - 1
    call.require(nth[-1] < source.size, "`source` must have an element for each True of the mask")
    chosen = source.reshape(-1).astype(x.dtype).at[nth].get(mode="clip")
    return jnp.where(mask, chosen.reshape(x.shape), x)


def _scatter_index(call: Call, x: jax.Array, dim: int, index: jax.Array) -> Index:
    require_in_range(call, index, x.shape[dim])
    grid: list[Any] = list(np.indices(index.shape, sparse=True))
    grid[dim] = index
    return tuple(grid)


def _source(x: jax.Array, index: jax.Array, source: Operand) -> jax.Array:
    if not isinstance(source, jax.Array):
        return jnp.full(index.shape, source, x.dtype)
    return source[tuple(slice(size) for size in index.shape)].astype(x.dtype)


@register_lowering(aten.scatter.src, aten.scatter.value)
def _scatter(call: Call, x: jax.Array, dim: int, index: jax.Array, source: Operand) -> jax.Array:
    at = x.at[_scatter_index(call, x, dim, index)]
    return at.set(_source(x, index, source), mode="drop")


@register_lowering(aten.scatter_add.default)
def _scatter_add(
    call: Call, x: jax.Array, dim: int, index: jax.Array, source: jax.Array
) -> jax.Array:
    at = x.at[_scatter_index(call, x, dim, index)]
    return at.add(_source(x, index, source), mode="drop")


@register_lowering(aten.scatter_reduce.two)
def _scatter_reduce(
    call: Call,
    x: jax.Array,
    dim: int,
    index: jax.Array,
    source: jax.Array,
    reduce: str,
    *,
    include_self: bool = True,
) -> jax.Array:
    if reduce != "sum" or not include_self:
        raise call.refuse(f"reduce must be 'sum' with include_self=True, got {reduce!r}.")
    return _scatter_add(call, x, dim, index, source)


@register_lowering(aten.index_add.default)
def _index_add(
    call: Call, x: jax.Array, dim: int, index: jax.Array, source: jax.Array, alpha: Scalar = 1
) -> jax.Array:
    require_in_range(call, index, x.shape[dim])
    return x.at[_along(x, dim, index)].add(source.astype(x.dtype) * alpha, mode="drop")


@register_lowering(aten.index_copy.default)
def _index_copy(
    call: Call, x: jax.Array, dim: int, index: jax.Array, source: jax.Array
) -> jax.Array:
    require_in_range(call, index, x.shape[dim])
    return x.at[_along(x, dim, index)].set(source.astype(x.dtype), mode="drop")


@register_lowering(aten.index_fill.int_Scalar, aten.index_fill.int_Tensor)
def _index_fill(call: Call, x: jax.Array, dim: int, index: jax.Array, value: Operand) -> jax.Array:
    require_in_range(call, index, x.shape[dim], low=-x.shape[dim])
    return x.at[_along(x, dim, index)].set(jnp.asarray(value, x.dtype), mode="drop")


@register_lowering(aten.copy.default)
def _copy(call: Call, x: jax.Array, source: jax.Array, non_blocking: bool = False) -> jax.Array:
    return jnp.broadcast_to(source.astype(x.dtype), x.shape)


@register_lowering(aten.fill.Scalar, aten.fill.Tensor)
def _fill(call: Call, x: jax.Array, value: Operand) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(value, x.dtype), x.shape)


@register_lowering(aten.zero.default)
def _zero(call: Call, x: jax.Array) -> jax.Array:
    return jnp.zeros_like(x)
