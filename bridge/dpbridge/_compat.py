"""How JAX is set up beside torch, and what differs between their supported releases."""

import os
from contextlib import AbstractContextManager

import jax
import torch

_PRECISIONS = {"highest": "highest", "high": "tensorfloat32", "medium": "bfloat16"}


def x64(is_on: bool = True) -> AbstractContextManager[None]:
    """Returns a context in which JAX keeps 64-bit types, or does not.

    The bridge traces and runs under it, so that an int64 label or a float64 parameter is in JAX
    what it is in torch, whatever the process-wide setting.
    """
    return jax.enable_x64(is_on)


def matmul_precision() -> AbstractContextManager[None]:
    """Returns a context in which JAX multiplies float32 as precisely as torch is set to.

    On a GPU, JAX by itself rounds the factors to TensorFloat-32, and torch does not.
    """
    return jax.default_matmul_precision(_PRECISIONS[torch.get_float32_matmul_precision()])


def share_the_gpu() -> None:
    """Keeps JAX from taking three quarters of the GPU's memory at its first use.

    Has an effect if JAX has not started yet. A setting of the user's stands.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
