"""Torch's rules of promotion, for JAX arrays."""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import torch

from dpbridge.dtypes import to_jax_dtype, to_torch_dtype

Scalar = bool | int | float
Operand = jax.Array | Scalar


def promote(*values: Operand) -> tuple[jax.Array, ...]:
    """Casts to the dtype in which torch would compute an op on these values.

    As in torch, 0-dim tensors and Python numbers count only where their kind (bool, integer,
    floating-point) is above that of the tensors with dimensions.
    """
    ranked = sorted(values, key=_rank)
    result = reduce(_combine, ranked[1:], _stand_in(ranked[0]))
    dtype = to_jax_dtype(torch.result_type(result, result))
    return tuple(jnp.asarray(value, dtype) for value in values)


def widen(x: jax.Array) -> jax.Array:
    """Casts 16-bit floats to float32, in which torch computes ops on them."""
    return x.astype(jnp.float32) if x.dtype in _HALVES else x


def _rank(value: Operand) -> int:
    if isinstance(value, jax.Array):
        return 1 if value.ndim == 0 else 0
    return 2


def _combine(left: Any, right: Operand) -> torch.Tensor:
    other = _stand_in(right)
    return torch.empty_like(left, dtype=torch.result_type(left, other))


def _stand_in(value: Operand) -> Any:
    if isinstance(value, jax.Array):
        shape = (1,) * min(value.ndim, 1)
        return torch.empty(shape, dtype=to_torch_dtype(value.dtype), device="meta")
    return value


_HALVES = (jnp.dtype(jnp.float16), jnp.dtype(jnp.bfloat16))
