"""Run a model and leave no trace: its tensors, its attributes and the random numbers."""

import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


class Snapshot:
    """What modules hold, to see what a run has written to, and to undo it.

    Every parameter, buffer and tensor attribute is copied, so this needs as much memory again.

    Args:
        *roots: Modules, none lazy; whatever else is passed is left out.
        has_tensors: False leaves out the values of tensors, and the copies.
    """

    def __init__(self, *roots: Any, has_tensors: bool = True) -> None:
        modules = [root for root in roots if isinstance(root, nn.Module)]
        self._owners = [(path, module) for root in modules for path, module in root.named_modules()]
        self._attributes = [(module, dict(vars(module))) for _, module in self._owners]
        self._containers: dict[int, tuple[Any, Any]] = {}
        for _, attributes in self._attributes:
            self._keep(list(attributes.values()))
        self._tensors = [
            (owner, name, tensor, tensor.detach().clone(), _version(tensor))
            for owner, name, tensor in (self._named_tensors() if has_tensors else ())
        ]

    def written(self) -> list[tuple[nn.Module, str]]:
        """Returns owner and path of each tensor that was written to, whatever the new values."""
        return [
            (owner, name)
            for owner, name, tensor, saved, version in self._tensors
            if _version(tensor) != version or not _is_same(tensor, saved)
        ]

    def gpus(self) -> list[int]:
        """Returns the CUDA devices on which tensors lie."""
        devices = {tensor.device for _, _, tensor, _, _ in self._tensors}
        return sorted(device.index or 0 for device in devices if device.type == "cuda")

    def restore(self) -> None:
        """Puts everything back."""
        for module, attributes in self._attributes:
            vars(module).clear()
            vars(module).update(attributes)
        for container, saved in self._containers.values():
            container.clear()
            (container.update if isinstance(container, (dict, set)) else container.extend)(saved)
        with torch.no_grad():
            for _, _, tensor, saved, _ in self._tensors:
                if not _is_same(tensor, saved):
                    tensor.copy_(saved)

    def _keep(self, values: list[Any]) -> None:
        for value in values:
            if isinstance(value, (list, dict, set, deque)) and id(value) not in self._containers:
                saved = dict(value) if isinstance(value, dict) else list(value)
                self._containers[id(value)] = value, saved
                self._keep(list(value.values() if isinstance(value, dict) else value))

    def _named_tensors(self) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
        seen = set()
        for path, module in self._owners:
            own = {**vars(module), **module._parameters, **module._buffers}
            for name, value in own.items():
                if isinstance(value, torch.Tensor) and id(value) not in seen:
                    seen.add(id(value))
                    yield module, f"{path}.{name}".removeprefix("."), value


@contextmanager
def untouched(*roots: Any, has_tensors: bool = True) -> Iterator[Snapshot]:
    """Gives a context after which modules and global random numbers are as they were.

    Not undone are writes to globals and to objects that are neither modules nor built-in
    containers. For `has_tensors` see `Snapshot`.

    >>> layer = nn.Dropout(0.5)
    >>> with untouched(layer):
    ...     _ = layer.eval()
    >>> layer.training
    True
    """
    snapshot = Snapshot(*roots, has_tensors=has_tensors)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=snapshot.gpus()):
            yield snapshot
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        snapshot.restore()


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _is_same(tensor: torch.Tensor, saved: torch.Tensor) -> bool:
    return torch.equal(tensor.detach(), saved)
