"""Which JAX dtype is which torch dtype."""

from typing import Any

import jax.numpy as jnp
import torch

_TO_JAX = {
    torch.bool: jnp.dtype(jnp.bool_),
    torch.uint8: jnp.dtype(jnp.uint8),
    torch.uint16: jnp.dtype(jnp.uint16),
    torch.uint32: jnp.dtype(jnp.uint32),
    torch.uint64: jnp.dtype(jnp.uint64),
    torch.int8: jnp.dtype(jnp.int8),
    torch.int16: jnp.dtype(jnp.int16),
    torch.int32: jnp.dtype(jnp.int32),
    torch.int64: jnp.dtype(jnp.int64),
    torch.float16: jnp.dtype(jnp.float16),
    torch.bfloat16: jnp.dtype(jnp.bfloat16),
    torch.float32: jnp.dtype(jnp.float32),
    torch.float64: jnp.dtype(jnp.float64),
    torch.complex64: jnp.dtype(jnp.complex64),
    torch.complex128: jnp.dtype(jnp.complex128),
}
_TO_TORCH = {jax_dtype: torch_dtype for torch_dtype, jax_dtype in _TO_JAX.items()}


def to_jax_dtype(dtype: torch.dtype) -> Any:
    """Returns the JAX dtype of a torch dtype.

    Raises:
        TypeError: If JAX has none.
    """
    if dtype not in _TO_JAX:
        known = ", ".join(str(key).removeprefix("torch.") for key in _TO_JAX)
        raise TypeError(f"A tensor must be one of {known} to cross to JAX, got {dtype}. Cast it.")
    return _TO_JAX[dtype]


def to_torch_dtype(dtype: Any) -> torch.dtype:
    """Returns the torch dtype of a JAX dtype that `to_jax_dtype` can return."""
    return _TO_TORCH[jnp.dtype(dtype)]
