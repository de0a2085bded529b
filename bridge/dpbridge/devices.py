"""Which devices torch and JAX share."""

import warnings

import jax
import torch


def check_device(device: torch.device) -> None:
    """Raises if JAX cannot work where a model lies; warns if it took most of the memory there.

    Args:
        device: Of the model's parameters.

    Raises:
        ValueError: If JAX does not see the device.
    """
    if device.type == "cpu":
        return
    found = _seen("gpu") if device.type == "cuda" else []
    own = [one for one in found if one.local_hardware_id == (device.index or 0)]
    if not own:
        seen = ", ".join(map(str, jax.devices()))
        raise ValueError(
            f"`model` must lie on a device that JAX sees, got {device} with JAX on {seen}. Install "
            'JAX for that device (pip install "jax[cuda13]"), or move the model to the CPU.'
        )
    _warn_of_preallocation(own[0])


def _seen(platform: str) -> list[jax.Device]:
    try:
        return jax.local_devices(backend=platform)
    except RuntimeError:  # JAX has no such platform.
        return []


def _warn_of_preallocation(device: jax.Device) -> None:
    stats = device.memory_stats() or {}
    taken, used = stats.get("pool_bytes", 0), stats.get("bytes_in_use", 0)
    if taken > 2**30 and taken > stats.get("bytes_limit", taken) / 2 and used < taken / 2:
        warnings.warn(
            f"JAX holds {taken / 2**30:.0f} GiB of {device} and uses {used / 2**30:.0f}, which "
            "torch cannot have: it was started before dpbridge was imported. Import dpbridge "
            "before JAX is used, or set XLA_PYTHON_CLIENT_PREALLOCATE=false.",
            RuntimeWarning,
            stacklevel=4,
        )
