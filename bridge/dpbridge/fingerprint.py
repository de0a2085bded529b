"""What a lowered program depends on in the objects it was lowered from."""

import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import nn

_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class Fingerprint:
    """Changes when a model or its loss changes in a way that a program would not follow.

    Seen are, for every module: its class, training flag, parameters, buffers, submodules, hooks
    and attributes; for a loss that is a function or another object: its closure, defaults and
    attributes. Containers count by content, tensors by identity, type and place (their values are
    read at every step), and whatever else by identity. Not seen are globals, and what objects
    that are neither modules nor containers hold inside.

    Attributes:
        key: To be compared and hashed.
        kept: The objects behind the identities in `key`: none can be freed, and its identity
            taken by another, for as long as the fingerprint lives.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Any] | None) -> None:
        self.kept: list[Any] = []
        roots = [root for root in (model, loss_fn) if isinstance(root, nn.Module)]
        modules = [module for root in roots for module in root.modules()]
        self.key: Hashable = (
            torch.get_default_dtype(),
            tuple(self._module(module) for module in modules),
            self._freeze(loss_fn),
            None if isinstance(loss_fn, nn.Module) else self._inside(loss_fn),
        )

    def _module(self, module: nn.Module) -> Hashable:
        return type(module), tuple(self._items(vars(module)))

    def _items(self, attributes: dict[str, Any]) -> Iterator[Hashable]:
        for name, value in attributes.items():
            if isinstance(value, _VALUES):
                yield name, type(value), value
            elif not isinstance(value, dict) or value:
                yield name, self._freeze(value)

    def _inside(self, loss_fn: Any) -> Hashable:
        if isinstance(loss_fn, types.MethodType):
            return self._inside(loss_fn.__func__), self._inside(loss_fn.__self__)
        if isinstance(loss_fn, types.FunctionType):
            cells = [cell.cell_contents for cell in loss_fn.__closure__ or () if _is_filled(cell)]
            return self._freeze([cells, loss_fn.__defaults__, loss_fn.__kwdefaults__])
        return self._freeze(getattr(loss_fn, "__dict__", None))

    def _freeze(self, value: Any) -> Hashable:
        if isinstance(value, _VALUES):
            return type(value), value
        if isinstance(value, (list, tuple)):
            return type(value), tuple(map(self._freeze, value))
        if isinstance(value, dict):
            return dict, tuple((self._freeze(k), self._freeze(v)) for k, v in value.items())
        self.kept.append(value)
        if isinstance(value, torch.Tensor):
            return id(value), value.dtype, value.device, tuple(value.shape), value.requires_grad
        return id(value)


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # The variable is not assigned yet.
        return False
    return True
