"""Ops that make tensors of numbers alone."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from dpbridge.lowering.dtypes import Operand, Scalar
from dpbridge.lowering.table import Call, register_lowering

aten = torch.ops.aten


def _register_factory(value: Scalar, *ops: Any) -> None:
    @register_lowering(*ops)
    def factory(call: Call, *args: Any, **kwargs: Any) -> jax.Array:
        return jnp.full(call.shape, value, call.dtype)


_register_factory(
    0,
    aten.zeros.default,
    aten.zeros_like.default,
    aten.new_zeros.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.new_empty.default,
)
_register_factory(1, aten.ones.default, aten.ones_like.default, aten.new_ones.default)


@register_lowering(aten.full.default)
def _full(call: Call, size: Sequence[int], value: Scalar, **kwargs: Any) -> jax.Array:
    return jnp.full(call.shape, value, call.dtype)


@register_lowering(aten.full_like.default)
def _full_like(call: Call, x: jax.Array, value: Scalar, **kwargs: Any) -> jax.Array:
    return jnp.full(call.shape, value, call.dtype)


@register_lowering(aten.new_full.default)
def _new_full(
    call: Call, x: jax.Array, size: Sequence[int], value: Scalar, **kwargs: Any
) -> jax.Array:
    return jnp.full(call.shape, value, call.dtype)


@register_lowering(aten.scalar_tensor.default)
def _scalar_tensor(call: Call, value: Operand, **kwargs: Any) -> jax.Array:
    return jnp.asarray(value, call.dtype)


@register_lowering(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(call: Call, *bounds: Scalar, **kwargs: Any) -> jax.Array:
    start, step = bounds[0] if len(bounds) > 1 else 0, bounds[2] if len(bounds) > 2 else 1
    return jnp.asarray(start + step * np.arange(call.shape[0]), call.dtype)


@register_lowering(aten.linspace.default)
def _linspace(call: Call, start: Scalar, end: Scalar, steps: int, **kwargs: Any) -> jax.Array:
    return jnp.asarray(np.linspace(start, end, steps), call.dtype)


@register_lowering(aten.eye.default, aten.eye.m)
def _eye(call: Call, *sizes: int, **kwargs: Any) -> jax.Array:
    return jnp.eye(call.shape[0], call.shape[1], dtype=call.dtype)


@register_lowering(aten.tril_indices.default)
def _tril_indices(call: Call, rows: int, columns: int, offset: int = 0, **kwargs: Any) -> Any:
    return jnp.asarray(np.stack(np.tril_indices(rows, offset, columns)))


@register_lowering(aten.triu_indices.default)
def _triu_indices(call: Call, rows: int, columns: int, offset: int = 0, **kwargs: Any) -> Any:
    return jnp.asarray(np.stack(np.triu_indices(rows, offset, columns)))
