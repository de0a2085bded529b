"""What a model returns: its tensors, in any nesting, and on which axis the examples lie."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import jax
import torch

from dpbridge.batches import Batch
from dpbridge.untouched import untouched

_SETTINGS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class Withheld:
    """Stands for what a model returned that is not made of tensors, such as a cache.

    In training the model runs in JAX for each example by itself, where no such object exists.
    """

    def __init__(self, kind: type) -> None:
        self._kind = kind

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(
            f"`{name}` must not be asked of the {self._kind.__name__} that the model returns in "
            "private training, which is not there. Turn it off (use_cache=False), or call the "
            "model under torch.no_grad()."
        )


def map_tensors(value: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """Returns the same structure with `function` of every tensor, in a fixed order.

    Lists, tuples, mappings and dataclasses are followed, numbers and strings kept; for any other
    object stands a `Withheld`.
    """
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (*_SETTINGS, Withheld)):
        return value
    if isinstance(value, (list, tuple)):
        parts = [map_tensors(part, function) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, Mapping):
        items = {name: map_tensors(part, function) for name, part in value.items()}
        if not isinstance(value, MutableMapping):
            return items
        mapping = copy.copy(value)
        for name, part in items.items():
            mapping[name] = part
        return mapping
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        other = copy.copy(value)
        for field in dataclasses.fields(value):
            part = map_tensors(getattr(value, field.name), function)
            object.__setattr__(other, field.name, part)
        return other
    return Withheld(type(value))


def tensors_in(value: Any) -> tuple[torch.Tensor, ...]:
    """Returns the tensors of a structure, in the order of `map_tensors`."""
    found: list[torch.Tensor] = []
    map_tensors(value, found.append)
    return tuple(found)


@dataclass(frozen=True)
class Layout:
    """The form of what a model returns for a batch.

    Attributes:
        template: The structure, with tensors that hold nothing.
        axes: For each tensor the axis of the examples; None for a scalar, of which each example
            has one of its own and the batch the mean or the sum.
        empty: Each tensor for a batch without examples; of a scalar, `(0,)`.
    """

    template: Any
    axes: tuple[int | None, ...]
    empty: tuple[torch.Tensor, ...]

    def rebuild(self, tensors: list[torch.Tensor]) -> Any:
        """Returns the structure with these tensors in it."""
        waiting = iter(tensors)
        return map_tensors(self.template, lambda _: next(waiting))

    def rows(self, index: int, tensor: torch.Tensor) -> torch.Tensor:
        """Returns one of the tensors with the examples on axis 0."""
        return tensor.movedim(self.axes[index] or 0, 0)


def find_layout(call: Callable[..., Any], batch: Batch, *owners: Any) -> Layout:
    """Runs a model on two and on three times the same example, and sees which axes have grown.

    Args:
        call: The model, or one of its methods.
        batch: The batch; of one without examples the zeros of its shapes are taken.
        *owners: Modules that the run is to leave as they are.

    Raises:
        NotImplementedError: If a tensor has neither an axis of the examples nor is a scalar.
    """
    with torch.no_grad(), untouched(*owners, has_tensors=False):
        two, three = (_call_on(call, batch, count) for count in (2, 3))
    of_two, of_three = tensors_in(two), tensors_in(three)
    if len(of_two) != len(of_three):
        raise NotImplementedError(
            "The model must return as many tensors for each batch, got "
            f"{len(of_two)} for two examples and {len(of_three)} for three. "
            "Return one tensor with a row an example."
        )
    axes = tuple(map(_axis, range(len(of_two)), of_two, of_three))
    empty = tuple(
        a.new_empty([0 if i == (axis or 0) else n for i, n in enumerate(a.shape or (0,))])
        for a, axis in zip(of_two, axes, strict=True)
    )
    return Layout(map_tensors(two, lambda tensor: tensor.new_empty(0)), axes, empty)


def _call_on(call: Callable[..., Any], batch: Batch, count: int) -> Any:
    leaves = jax.tree.leaves(batch.example(0))
    rows = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    args, kwargs = batch.rebuild([x.expand(count, *x.shape[1:]).contiguous() for x in rows])
    return call(*args, **kwargs)


def _axis(index: int, two: torch.Tensor, three: torch.Tensor) -> int | None:
    if two.shape == three.shape == ():
        return None
    if two.ndim == three.ndim:
        grown = [i for i in range(two.ndim) if two.shape[i] != three.shape[i]]
        if len(grown) == 1 and (two.shape[grown[0]], three.shape[grown[0]]) == (2, 3):
            return grown[0]
    raise NotImplementedError(
        f"The model must return tensors with one row an example, or scalars, got shape "
        f"{tuple(two.shape)} for two examples and {tuple(three.shape)} for three (tensor {index} "
        "of its output). Leave it out, or give each example a row."
    )
