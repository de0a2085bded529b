"""The table of lowering rules: one torch op, one small function on JAX arrays."""

import importlib
import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch.fx import Node
from torch.multiprocessing.reductions import StorageWeakRef

from dpbridge.dtypes import to_jax_dtype

OpOverload = type(torch.ops.aten.relu.default)
Rule = Callable[..., Any]
IsAlias = Callable[[Node], bool]


@dataclass(frozen=True)
class Entry:
    """A rule, and whether torch's op returns a view of its first argument."""

    rule: Rule
    is_alias: IsAlias | None = None


@dataclass
class Run:
    """What one evaluation of a program carries from op to op.

    Attributes:
        key: PRNG key of this example at this step.
        randomness: Scalar bool; False turns dropout into the identity and what is drawn into fixed
            numbers (for the self-check).
        autocast: The devices for which `torch.autocast` is on, and the type it casts to.
        requirements: `(holds, message)` pairs that rules ask the host to check.
    """

    key: jax.Array
    randomness: jax.Array
    autocast: Mapping[str, torch.dtype] = field(default_factory=dict)
    requirements: list[tuple[jax.Array, str]] = field(default_factory=list)
    random_ops: int = 0


@dataclass(frozen=True)
class Call:
    """One op of the exported graph, as its rule sees it.

    Attributes:
        node: The graph's node.
        run: The evaluation it belongs to.
        of_example: Whether its tensors depend on the example, and not only on parameters and
            constants.
    """

    node: Node
    run: Run
    of_example: bool = True

    @property
    def result(self) -> Any:
        """The fake tensor (or tuple of them) that torch says the op returns."""
        return self.node.meta["val"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the op's single result."""
        return tuple(self.result.shape)

    @property
    def dtype(self) -> Any:
        """JAX dtype of the op's single result."""
        return to_jax_dtype(self.result.dtype)

    @property
    def randomness(self) -> jax.Array:
        """Scalar bool; False while the self-check compares with torch."""
        return self.run.randomness

    def key(self) -> jax.Array:
        """Returns a PRNG key that no other op of this example and step has."""
        self.run.random_ops += 1
        return jax.random.fold_in(self.run.key, self.run.random_ops)

    def require(self, holds: jax.Array, message: str) -> None:
        """Asks the host to raise IndexError with `message` where `holds` is False.

        For what torch checks when it runs and XLA does not, such as an index out of range.
        """
        place = f"({op_name(self.node.target)}{at_line(self.node)})"
        self.run.requirements.append((jnp.all(holds), f"{message} {place}"))

    def refuse(self, reason: str) -> NotImplementedError:
        """Returns the error to raise for a use of the op that the rule does not cover."""
        return NotImplementedError(
            f"`{op_name(self.node.target)}`{at_line(self.node)} is not supported: {reason}"
        )


_ENTRIES: dict[Any, Entry] = {}


def register_lowering(*ops: Any, is_alias: IsAlias | None = None) -> Callable[[Rule], Rule]:
    """Registers a rule for torch ops.

    Args:
        *ops: Overloads such as `torch.ops.aten.relu.default`. The in-place variant of an op, such
            as `relu_`, needs no rule of its own.
        is_alias: For ops that return a view of their first argument: a function of the op's FX
            node that says whether this use does.

    Returns:
        A decorator for `rule(call, *args, **kwargs)`. Tensors come as JAX arrays, all else as
        torch passes it. The interpreter casts each result to the dtype torch gives it and checks
        its shape.

    Raises:
        ValueError: If an op has a rule already.

    >>> @register_lowering(torch.ops.aten.sinc.default)
    ... def sinc(call, x):
    ...     return jnp.sinc(x)
    """

    def register(rule: Rule) -> Rule:
        for op in ops:
            if op in _ENTRIES:
                raise ValueError(f"`{op_name(op)}` has a lowering rule already. Register it once.")
            _ENTRIES[op] = Entry(rule, is_alias)
        return rule

    return register


def find(op: Any) -> Entry | None:
    """Returns the entry of `op`, or None."""
    return _ENTRIES.get(op)


def load_families() -> None:
    """Fills the table with the rules of this package."""
    for family in _FAMILIES:
        importlib.import_module(f"dpbridge.lowering.{family}")


def supported_ops() -> tuple[str, ...]:
    """Returns the names of all ops that have a rule."""
    return tuple(sorted(op_name(op) for op in _ENTRIES))


def shares_memory(node: Node) -> bool:
    """Whether torch's result is a view of the op's first argument: an `is_alias`."""
    return any(source is node.args[0] for source in memory_sources(node))


def memory_sources(node: Node) -> list[Node]:
    """Returns the nodes whose tensors lie in the same memory as the op's result."""
    if node.target is torch.ops.aten.lift_fresh_copy.default:
        return []  # copies, but torch.export's stand-in for its result says otherwise
    own = _storages(node)
    return [source for source in node.all_input_nodes if own & _storages(source)]


def op_name(op: Any) -> str:
    """Returns a name such as `aten.relu.default` for an op of the exported graph."""
    return str(op) if isinstance(op, OpOverload) else getattr(op, "__name__", str(op))


def at_line(node: Node) -> str:
    """Returns ` at model.py:12: code` for the user's line, or an empty string.

    torch.export keeps lines of functions named `forward` only, so a loss function has none.
    """
    frames = _frames(node.meta.get("stack_trace") or "")
    frames = [frame for frame in frames if not frame[0].startswith(_HERE)]
    own = [frame for frame in frames if not frame[0].startswith(_TORCH)]
    if not frames:
        return ""
    place, code = (own or frames)[-1]
    return f" at {place}: `{code}`"


def _storages(node: Node) -> set[int]:
    values = node.meta.get("val")
    tensors = values if isinstance(values, (tuple, list)) else [values]
    return {
        StorageWeakRef(tensor.untyped_storage()).cdata
        for tensor in tensors
        if isinstance(tensor, torch.Tensor)
    }


def _frames(trace: str) -> list[tuple[str, str]]:
    lines = [line.strip() for line in trace.splitlines()]
    frames = []
    for place, code in itertools.pairwise([*lines, ""]):
        if place.startswith("File "):
            path, line, *_ = place.removeprefix("File ").split(", ")
            frames.append((f"{path.strip(chr(34))}:{line.removeprefix('line ')}", code))
    return frames


_HERE = f"{Path(__file__).parent}{os.sep}"
_TORCH = f"{Path(torch.__file__).parent}{os.sep}"

_FAMILIES = (
    "elementwise",
    "selection",
    "activations",
    "reductions",
    "sorting",
    "shapes",
    "creation",
    "indexing",
    "embedding_bag",
    "linear",
    "recurrent",
    "convolution",
    "patches",
    "pooling",
    "resizing",
    "grid",
    "normalization",
    "attention",
    "losses",
    "margins",
    "dropout",
    "draws",
    "jax_call",
)
