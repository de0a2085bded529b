"""Products of matrices and vectors."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax

from dpbridge.lowering.dtypes import Scalar
from dpbridge.lowering.table import Call, register_lowering

aten = torch.ops.aten


@register_lowering(aten.linear.default)
def _linear(
    call: Call, x: jax.Array, weight: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    y = lax.dot_general(x, weight, (((x.ndim - 1,), (weight.ndim - 1,)), ((), ())))
    return y if bias is None else y + bias


@register_lowering(aten.einsum.default)
def _einsum(
    call: Call, equation: str, operands: Sequence[jax.Array], *, path: Any = None
) -> jax.Array:
    return jnp.einsum(equation, *(operand.astype(call.dtype) for operand in operands))


@register_lowering(aten.bilinear.default)
def _bilinear(
    call: Call,
    left: jax.Array,
    right: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
) -> jax.Array:
    y = jnp.einsum("...i,oij,...j->...o", left, weight, right)
    return y if bias is None else y + bias


@register_lowering(aten.tensordot.default)
def _tensordot(
    call: Call, x: jax.Array, y: jax.Array, dims_x: Sequence[int], dims_y: Sequence[int]
) -> jax.Array:
    return jnp.tensordot(x, y, (tuple(dims_x), tuple(dims_y)))


@register_lowering(aten.linalg_multi_dot.default)
def _multi_dot(call: Call, matrices: Sequence[jax.Array]) -> jax.Array:
    return jnp.linalg.multi_dot(matrices)


@register_lowering(aten.trace.default)
def _trace(call: Call, x: jax.Array) -> jax.Array:
    return jnp.trace(x)


def _register_product(op: Any, product: Callable[[jax.Array, jax.Array], jax.Array]) -> None:
    @register_lowering(op)
    def multiply(call: Call, x: jax.Array, y: jax.Array) -> jax.Array:
        return product(x, y)


def _register_fused(op: Any, product: Callable[[jax.Array, jax.Array], jax.Array]) -> None:
    """`beta * x + alpha * product(left, right)`; with beta 0, torch does not look at x."""

    @register_lowering(op)
    def fused(
        call: Call,
        x: jax.Array,
        left: jax.Array,
        right: jax.Array,
        *,
        beta: Scalar = 1,
        alpha: Scalar = 1,
    ) -> jax.Array:
        y = product(left, right)
        y = y if alpha == 1 else y * alpha
        if beta == 0:
            return jnp.broadcast_to(y, call.shape)
        return y + (x if beta == 1 else x * beta)


for _name in ("matmul", "mm", "bmm", "mv", "dot", "vdot"):
    _register_product(getattr(aten, _name).default, jnp.matmul)
_register_product(aten.outer.default, jnp.outer)
_register_product(aten.ger.default, jnp.outer)
_register_product(aten.inner.default, jnp.inner)
_register_product(aten.kron.default, jnp.kron)
_register_product(aten.linalg_matmul.default, jnp.matmul)
for _name in ("addmm", "addmv", "baddbmm"):
    _register_fused(getattr(aten, _name).default, jnp.matmul)
_register_fused(aten.addbmm.default, lambda x, y: jnp.einsum("bij,bjk->ik", x, y))
_register_fused(aten.addr.default, jnp.outer)


@register_lowering(aten.linalg_vecdot.default)
def _vecdot(call: Call, x: jax.Array, y: jax.Array, *, dim: int = -1) -> jax.Array:
    return jnp.sum(x * y, axis=dim)
