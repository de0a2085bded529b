"""Sorting, and the numbers that an order picks."""

import jax
import jax.numpy as jnp
import torch

from dpbridge.lowering.dtypes import Operand, promote
from dpbridge.lowering.reductions import pick
from dpbridge.lowering.table import Call, register_lowering

aten = torch.ops.aten


def _sorted(x: jax.Array, dim: int, descending: bool) -> tuple[jax.Array, jax.Array]:
    index = jnp.argsort(x, axis=dim, descending=descending, stable=True)
    return jnp.take_along_axis(x, index, dim), index


@register_lowering(aten.sort.default)
def _sort(
    call: Call, x: jax.Array, dim: int = -1, descending: bool = False
) -> tuple[jax.Array, jax.Array]:
    return _sorted(x, dim, descending)


@register_lowering(aten.sort.stable)
def _sort_stable(
    call: Call, x: jax.Array, *, stable: bool | None, dim: int = -1, descending: bool = False
) -> tuple[jax.Array, jax.Array]:
    return _sorted(x, dim, descending)


@register_lowering(aten.argsort.default)
def _argsort(call: Call, x: jax.Array, dim: int = -1, descending: bool = False) -> jax.Array:
    return _sorted(x, dim, descending)[1]


@register_lowering(aten.argsort.stable)
def _argsort_stable(
    call: Call, x: jax.Array, *, stable: bool, dim: int = -1, descending: bool = False
) -> jax.Array:
    return _sorted(x, dim, descending)[1]


@register_lowering(aten.topk.default)
def _topk(
    call: Call, x: jax.Array, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[jax.Array, jax.Array]:
    index = jnp.argsort(x, axis=dim, descending=largest, stable=True)
    index = jax.lax.slice_in_dim(index, 0, k, axis=dim)
    return jnp.take_along_axis(x, index, dim), index


@register_lowering(aten.kthvalue.default)
def _kthvalue(
    call: Call, x: jax.Array, k: int, dim: int = -1, keepdim: bool = False
) -> tuple[jax.Array, jax.Array]:
    order = jnp.argsort(x, axis=dim, stable=True)
    return pick(x, jax.lax.slice_in_dim(order, k - 1, k, axis=dim), dim, keepdim)


@register_lowering(aten.median.dim)
def _median_dim(
    call: Call, x: jax.Array, dim: int, keepdim: bool = False
) -> tuple[jax.Array, jax.Array]:
    return _kthvalue(call, x, (x.shape[dim] + 1) // 2, dim, keepdim)


@register_lowering(aten.median.default)
def _median(call: Call, x: jax.Array) -> jax.Array:
    middle = jnp.sort(jax.lax.stop_gradient(x).reshape(-1))[(x.size - 1) // 2]
    # Equal values share the gradient, as in torch; jnp.max does that.
    return jnp.max(jnp.where(x <= middle, x, jnp.min(x)))


@register_lowering(aten.bucketize.Tensor, aten.bucketize.Scalar)
def _bucketize(
    call: Call,
    x: Operand,
    boundaries: jax.Array,
    *,
    out_int32: bool = False,
    right: bool = False,
) -> jax.Array:
    return _searchsorted(call, boundaries, x, right=right)


@register_lowering(aten.searchsorted.Tensor, aten.searchsorted.Scalar)
def _searchsorted(
    call: Call,
    boundaries: jax.Array,
    x: Operand,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: jax.Array | None = None,
) -> jax.Array:
    if boundaries.ndim != 1 or sorter is not None:
        raise call.refuse("only boundaries in one sorted row have a rule.")
    boundaries, x = promote(boundaries, x)
    return jnp.searchsorted(boundaries, x, side="right" if right or side == "right" else "left")
