"""Tensors that last, parameters and buffers, cross to JAX once and not at every step.

On a CPU an array on a tensor's own memory shows what torch writes to it later, so the array of the
step before will do. To make one takes 50 to 100 microseconds, which in a small model's step adds up
to more than all else on the bridge.
"""

import weakref
from collections.abc import Mapping
from typing import NamedTuple

import jax
import torch

from dpbridge.exchange import to_jax, to_torch


class _Place(NamedTuple):
    """What an array depends on beside the values: where they lie, and how they are to be read."""

    address: int
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    is_conj: bool
    is_neg: bool


class _Kept(NamedTuple):
    tensor: "weakref.ref[torch.Tensor]"
    place: _Place
    array: jax.Array  # Keeps the memory: no other tensor can come to lie at the same address.


_kept: dict[int, _Kept] = {}


def lasting_to_jax(tensors: Mapping[str, torch.Tensor]) -> dict[str, jax.Array]:
    """Returns what `to_jax` does, the arrays of earlier calls where they are still right.

    Args:
        tensors: Parameters, say. What was kept of a tensor goes when the tensor does, or crosses
            again after it was given other memory.

    Returns:
        An array for each name: of the tensor's memory, or a copy of what it holds now.

    Raises:
        TypeError: As `to_jax`.
        ValueError: Likewise.
    """
    return {name: _to_jax(tensor) for name, tensor in tensors.items()}


def _to_jax(tensor: torch.Tensor) -> jax.Array:
    # On a GPU every crossing also orders JAX's stream behind torch's.
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        array: jax.Array = to_jax(tensor)
        return array
    place = _place(tensor)
    kept = _kept.get(id(tensor))
    if kept is not None and kept.tensor() is tensor and kept.place == place:
        return kept.array
    array = to_jax(tensor)
    if _place(to_torch(array)) == place:  # Otherwise it is a copy.
        key = id(tensor)
        _kept[key] = _Kept(weakref.ref(tensor, lambda _: _kept.pop(key, None)), place, array)
    return array


def _place(tensor: torch.Tensor) -> _Place:
    return _Place(
        tensor.data_ptr(),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.is_conj(),
        tensor.is_neg(),
    )
