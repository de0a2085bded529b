"""Ops that move and repeat elements without computing."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from dpbridge.lowering.dtypes import Scalar
from dpbridge.lowering.table import Call, register_lowering, shares_memory

aten = torch.ops.aten

_register_view = functools.partial(register_lowering, is_alias=shares_memory)


@_register_view(
    aten.view.default,
    aten._unsafe_view.default,
    aten.view_as.default,
    aten.reshape.default,
    aten.reshape_as.default,
    aten.ravel.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.atleast_1d.default,
    aten.atleast_2d.default,
    aten.atleast_3d.default,
)
def _reshape(call: Call, x: jax.Array, *args: Any) -> jax.Array:
    return x.reshape(call.shape)


@_register_view(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def _expand(call: Call, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    return jnp.broadcast_to(x, call.shape)


@_register_view(aten.contiguous.default, aten.alias.default)
def _alias(call: Call, x: jax.Array, **kwargs: Any) -> jax.Array:
    return x


@register_lowering(aten.clone.default, aten.lift_fresh_copy.default)
def _clone(call: Call, x: jax.Array, **kwargs: Any) -> jax.Array:
    return x


@_register_view(aten.detach.default)
def _detach(call: Call, x: jax.Array) -> jax.Array:
    return lax.stop_gradient(x)


@_register_view(aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)
def _transpose(call: Call, x: jax.Array, first: int, second: int) -> jax.Array:
    return jnp.swapaxes(x, first, second) if x.ndim else x


@_register_view(aten.t.default, aten.numpy_T.default)
def _reverse_axes(call: Call, x: jax.Array) -> jax.Array:
    return x.T


@_register_view(aten.mT.default)
def _matrix_transpose(call: Call, x: jax.Array) -> jax.Array:
    return x.mT


@_register_view(aten.permute.default)
def _permute(call: Call, x: jax.Array, dims: Sequence[int]) -> jax.Array:
    return jnp.transpose(x, dims)


@_register_view(aten.movedim.int, aten.movedim.intlist)
def _movedim(call: Call, x: jax.Array, source: Any, destination: Any) -> jax.Array:
    return jnp.moveaxis(x, source, destination)


@_register_view(aten.select.int)
def _select(call: Call, x: jax.Array, dim: int, index: int) -> jax.Array:
    return lax.index_in_dim(x, index, dim, keepdims=False)


@_register_view(aten.slice.Tensor)
def _slice(
    call: Call,
    x: jax.Array,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> jax.Array:
    first, last, step = slice(start, end, step).indices(x.shape[dim])
    return lax.slice_in_dim(x, first, max(first, last), step, dim)


@_register_view(aten.narrow.default)
def _narrow(call: Call, x: jax.Array, dim: int, start: int, length: int) -> jax.Array:
    first = start % max(x.shape[dim], 1) if start < 0 else start
    return lax.slice_in_dim(x, first, first + length, 1, dim)


def _parts(call: Call, x: jax.Array, dim: int) -> list[jax.Array]:
    sizes = [part.shape[dim] for part in call.result]
    if call.of_example:
        # The derivative is one concatenation, where that of slices adds up what they are padded to.
        return list(lax.split(x, sizes, dim % x.ndim))
    ends = np.cumsum(sizes).tolist()
    starts = [0, *ends[:-1]]
    return [lax.slice_in_dim(x, *bounds, 1, dim) for bounds in zip(starts, ends, strict=True)]


@_register_view(
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
)
def _split(call: Call, x: jax.Array, how: Any, dim: int = 0) -> list[jax.Array]:
    return _parts(call, x, dim)


@_register_view(aten.hsplit.int, aten.hsplit.array)
def _hsplit(call: Call, x: jax.Array, how: Any) -> list[jax.Array]:
    return _parts(call, x, min(x.ndim - 1, 1))


@_register_view(aten.vsplit.int, aten.vsplit.array)
def _vsplit(call: Call, x: jax.Array, how: Any) -> list[jax.Array]:
    return _parts(call, x, 0)


@_register_view(aten.unbind.int)
def _unbind(call: Call, x: jax.Array, dim: int = 0) -> list[jax.Array]:
    if call.of_example:
        return [jnp.squeeze(part, dim) for part in lax.split(x, (1,) * x.shape[dim], dim % x.ndim)]
    return [lax.index_in_dim(x, i, dim, keepdims=False) for i in range(x.shape[dim])]


@_register_view(aten.diagonal.default)
def _diagonal(call: Call, x: jax.Array, offset: int = 0, dim1: int = 0, dim2: int = 1) -> jax.Array:
    return jnp.diagonal(x, offset, dim1, dim2)


@_register_view(aten.unfold.default)
def _unfold(call: Call, x: jax.Array, dim: int, size: int, step: int) -> jax.Array:
    if x.ndim == 0:
        return x.reshape(call.shape)
    starts = np.arange(0, x.shape[dim] - size + 1, step)
    windows = jnp.take(x, starts[:, None] + np.arange(size), dim % x.ndim)
    return jnp.moveaxis(windows, dim % x.ndim + 1, -1)


@register_lowering(aten.diag.default)
def _diag(call: Call, x: jax.Array, diagonal: int = 0) -> jax.Array:
    return jnp.diag(x, diagonal)


@register_lowering(aten.diag_embed.default)
def _diag_embed(
    call: Call, x: jax.Array, offset: int = 0, dim1: int = -2, dim2: int = -1
) -> jax.Array:
    size = x.shape[-1] + abs(offset)
    rows = np.arange(x.shape[-1]) + max(-offset, 0)
    square = jnp.zeros((*x.shape[:-1], size, size), x.dtype)
    square = square.at[..., rows, rows + offset].set(x)
    return jnp.moveaxis(square, (-2, -1), (dim1, dim2))


def _joined(call: Call, tensors: Sequence[jax.Array]) -> list[jax.Array]:
    # torch.cat lets empty 1-d tensors of any rank's company pass.
    kept = [tensor for tensor in tensors if tensor.shape != (0,)] or list(tensors)
    return [tensor.astype(call.dtype) for tensor in kept]


@register_lowering(aten.cat.default, aten.concat.default, aten.concatenate.default)
def _cat(call: Call, tensors: Sequence[jax.Array], dim: int = 0) -> jax.Array:
    return jnp.concatenate(_joined(call, tensors), dim)


@register_lowering(aten.stack.default)
def _stack(call: Call, tensors: Sequence[jax.Array], dim: int = 0) -> jax.Array:
    return jnp.stack([tensor.astype(call.dtype) for tensor in tensors], dim)


def _register_stack(op: Any, function: Callable[[list[jax.Array]], jax.Array]) -> None:
    @register_lowering(op)
    def stacked(call: Call, tensors: Sequence[jax.Array]) -> jax.Array:
        return function([tensor.astype(call.dtype) for tensor in tensors])


_register_stack(aten.hstack.default, jnp.hstack)
_register_stack(aten.vstack.default, jnp.vstack)
_register_stack(aten.dstack.default, jnp.dstack)
_register_stack(aten.column_stack.default, jnp.column_stack)


@register_lowering(aten.broadcast_tensors.default)
def _broadcast_tensors(call: Call, tensors: Sequence[jax.Array]) -> list[jax.Array]:
    return [jnp.broadcast_to(x, fake.shape) for x, fake in zip(tensors, call.result, strict=True)]


@register_lowering(aten.meshgrid.default, aten.meshgrid.indexing)
def _meshgrid(call: Call, tensors: Sequence[jax.Array], indexing: str = "ij") -> list[jax.Array]:
    return jnp.meshgrid(*tensors, indexing=indexing)


@register_lowering(aten.repeat.default, aten.tile.default)
def _repeat(call: Call, x: jax.Array, repeats: Sequence[int]) -> jax.Array:
    return jnp.tile(x, tuple(repeats))


@register_lowering(aten.repeat_interleave.self_int)
def _repeat_interleave(
    call: Call, x: jax.Array, repeats: int, dim: int | None = None, *, output_size: Any = None
) -> jax.Array:
    axis = x.ndim if dim is None else dim % x.ndim + 1
    x = jnp.expand_dims(x, axis)
    shape = (*x.shape[:axis], repeats, *x.shape[axis + 1 :])
    return jnp.broadcast_to(x, shape).reshape(call.shape)


@register_lowering(aten.flip.default)
def _flip(call: Call, x: jax.Array, dims: Sequence[int]) -> jax.Array:
    return jnp.flip(x, tuple(dims))


@register_lowering(aten.roll.default)
def _roll(call: Call, x: jax.Array, shifts: Sequence[int], dims: Sequence[int] = ()) -> jax.Array:
    return jnp.roll(x, tuple(shifts), tuple(dims)) if dims else jnp.roll(x, shifts[0])


@register_lowering(aten.rot90.default)
def _rot90(call: Call, x: jax.Array, k: int = 1, dims: Sequence[int] = (0, 1)) -> jax.Array:
    return jnp.rot90(x, k, (dims[0], dims[1]))


@register_lowering(aten.tril.default)
def _tril(call: Call, x: jax.Array, diagonal: int = 0) -> jax.Array:
    return jnp.tril(x, diagonal)


@register_lowering(aten.triu.default)
def _triu(call: Call, x: jax.Array, diagonal: int = 0) -> jax.Array:
    return jnp.triu(x, diagonal)


@register_lowering(aten.pad.default)
def _pad(
    call: Call,
    x: jax.Array,
    widths: Sequence[int],
    mode: str = "constant",
    value: float | None = None,
) -> jax.Array:
    pairs = [tuple(widths[i : i + 2]) for i in range(0, len(widths), 2)]
    pairs = [(0, 0)] * (x.ndim - len(pairs)) + pairs[::-1]
    if mode == "constant":
        fill = jnp.asarray(value or 0, x.dtype)
        return lax.pad(x, fill, [(low, high, 0) for low, high in pairs])
    if min(widths) < 0:
        raise call.refuse(f"widths must not be negative with mode={mode!r}, got {list(widths)}.")
    return jnp.pad(x, pairs, {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}[mode])


@register_lowering(aten.constant_pad_nd.default)
def _constant_pad(call: Call, x: jax.Array, widths: Sequence[int], value: Scalar = 0) -> jax.Array:
    return _pad(call, x, widths, "constant", value)


@register_lowering(aten.pixel_shuffle.default)
def _pixel_shuffle(call: Call, x: jax.Array, factor: int) -> jax.Array:
    *rest, channels, height, width = x.shape
    x = x.reshape(*rest, channels // factor**2, factor, factor, height, width)
    n = len(rest)
    order = (*range(n), n, n + 3, n + 1, n + 4, n + 2)
    return jnp.transpose(x, order).reshape(call.shape)


@register_lowering(aten.pixel_unshuffle.default)
def _pixel_unshuffle(call: Call, x: jax.Array, factor: int) -> jax.Array:
    *rest, channels, height, width = x.shape
    x = x.reshape(*rest, channels, height // factor, factor, width // factor, factor)
    n = len(rest)
    order = (*range(n), n, n + 2, n + 4, n + 1, n + 3)
    return jnp.transpose(x, order).reshape(call.shape)


@register_lowering(aten.channel_shuffle.default)
def _channel_shuffle(call: Call, x: jax.Array, groups: int) -> jax.Array:
    batch, channels, *space = x.shape
    x = x.reshape(batch, groups, channels // groups, *space)
    return jnp.swapaxes(x, 1, 2).reshape(call.shape)


@register_lowering(aten._assert_tensor_metadata.default)
def _assert_tensor_metadata(call: Call, x: jax.Array, *args: Any, **kwargs: Any) -> None:
    # torch.export has checked it.
    return None
