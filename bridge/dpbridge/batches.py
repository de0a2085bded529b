"""What a user passes to `backward`: tensors with one row an example, in any nesting."""

import dataclasses
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import torch

PyTree = Any


@dataclass(frozen=True)
class Batch:
    """A batch, taken apart.

    Attributes:
        tensors: The tensor leaves, each `(size, ...)`.
        size: How many examples.
        structure: Tree structure of `(args, kwargs)`.
        settings: All leaves, None in place of tensors: bools, strings and None.
        tensor_at: For each leaf whether it is a tensor.
    """

    tensors: tuple[torch.Tensor, ...]
    size: int
    structure: Any
    settings: tuple[Any, ...]
    tensor_at: tuple[bool, ...]

    @property
    def signature(self) -> Hashable:
        """What a compiled program depends on, the size apart."""
        shapes = tuple((tuple(x.shape[1:]), x.dtype, x.device) for x in self.tensors)
        return self.structure, self.settings, self.tensor_at, shapes

    def example(self, row: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns `(args, kwargs)` of one example, with a leading axis of 1.

        Of a batch without examples, zeros.
        """
        if self.size == 0:
            return self.rebuild([x.new_zeros(1, *x.shape[1:]) for x in self.tensors])
        row %= self.size
        return self.rebuild([x[row : row + 1] for x in self.tensors])

    @property
    def num_tensors(self) -> int:
        """How many of the leaves are tensors."""
        return sum(self.tensor_at)

    def without_rows(self) -> "Batch":
        """Returns the structure alone: what `rebuild` needs."""
        return dataclasses.replace(self, tensors=(), size=0)

    def rebuild(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns `(args, kwargs)` with these in place of the tensors."""
        waiting = iter(tensors)
        pairs = zip(self.settings, self.tensor_at, strict=True)
        leaves = [next(waiting) if is_tensor else setting for setting, is_tensor in pairs]
        args, kwargs = jax.tree.unflatten(self.structure, leaves)
        return args, kwargs


def take_apart(args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> Batch:
    """Flattens and checks the arguments of `backward`.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        device: Where the parameters lie.

    Raises:
        TypeError: If a leaf is neither a tensor nor a bool, string or None.
        ValueError: If there is no tensor, one has no batch axis, sizes on the first axis disagree
            or a tensor lies on another device.
    """
    leaves, structure = jax.tree.flatten((args, kwargs), is_leaf=lambda leaf: leaf is None)
    tensor_at = tuple(isinstance(leaf, torch.Tensor) for leaf in leaves)
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    settings = tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
    for setting in settings:
        if setting is not None and not isinstance(setting, (bool, str)):
            raise TypeError(
                "A batch must hold tensors, and bools, strings or None as settings, got "
                f"{type(setting).__name__}. All examples would share it: make it a tensor with "
                "one row an example, or an attribute of the model."
            )
    if not tensors:
        raise ValueError("A batch must hold at least one tensor, got none. Pass the examples.")
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if not all(shapes):
        raise ValueError(
            f"A batch must have the examples on axis 0 of every tensor, got shapes {shapes}. "
            "Give each example its own row."
        )
    if len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            f"A batch must have one size on axis 0, got shapes {shapes}. "
            "Pass one row an example in every tensor."
        )
    for tensor in tensors:
        if tensor.device != device:
            raise ValueError(
                f"A batch must be on the parameters' device {device}, got {tensor.device}. "
                f'Call .to("{device}") on it.'
            )
    return Batch(tensors, shapes[0][0], structure, settings, tensor_at)


def padded_size(size: int, expected_batch_size: float) -> int:
    """Returns the size that a batch is padded to: a few sizes in all, so few compilations.

    About the expected size, sizes are two standard deviations of a Poisson draw apart, rounded up
    to a power of two: about five sizes cover nearly all draws, and padding costs half a step on
    average. Far from it, where only parts of a logical batch can be, they are at most a quarter
    of the size apart.
    """
    spread = 2 ** math.ceil(math.log2(max(8.0, 2 * math.sqrt(expected_batch_size))))
    quarter = max(8, 2 ** (size.bit_length() - 1) // 4)
    if size < expected_batch_size / 2:
        step = min(spread, quarter)
    elif size > 2 * expected_batch_size + spread:
        step = max(spread, quarter)
    else:
        step = spread
    return -(-size // step) * step


def pad(tensors: tuple[torch.Tensor, ...], size: int) -> tuple[torch.Tensor, ...]:
    """Repeats the last example up to `size` rows: real values, so no NaN that was not there."""
    missing = size - tensors[0].shape[0]
    if missing == 0:
        return tensors
    return tuple(
        torch.cat([x.detach(), x[-1:].detach().expand(missing, *x.shape[1:])]) for x in tensors
    )
