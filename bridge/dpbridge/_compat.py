"""How JAX is set up beside torch, and what differs between their supported releases."""

import ctypes
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


def keep_freed_memory() -> None:
    """Has glibc keep what a step frees for the next one, rather than give it back to the system.

    XLA on a CPU allocates the temporaries of a program anew at every call, and glibc takes blocks
    of their size from the system each time, whose pages it then zeroes one by one: a tenth to a
    quarter of a step. The price is that a process stays as large as it once was.

    Has an effect on threads that start later, so JAX must not have started. A setting of the
    user's stands: any `MALLOC_` variable of glibc, `GLIBC_TUNABLES` or `LD_PRELOAD`.
    `DPBRIDGE_KEEP_MEMORY=0` turns it off.
    """
    is_set = any(name.startswith("MALLOC_") or name in _ALLOCATORS for name in os.environ)
    is_off = os.environ.get("DPBRIDGE_KEEP_MEMORY") == "0"
    has_glibc = "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {})
    if is_off or is_set or not has_glibc:
        return
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in _KEPT.items():
        mallopt(option, value)


_ALLOCATORS = {"GLIBC_TUNABLES", "LD_PRELOAD"}
# M_ARENA_MAX, because arenas of threads cannot hold large blocks; M_MMAP_MAX, because mapped blocks
# are given back; M_TRIM_THRESHOLD, in bytes at the end of the heap.
_KEPT = {-8: 1, -4: 0, -1: 2**31 - 1}
