"""Evaluate an exported graph on JAX arrays, in-place ops and views included.

torch.export leaves mutation in the training graph: `relu_`, `x[:, 0] = 0`. Each tensor here is
therefore a view of a cell: reading applies the view, writing puts the new numbers back into
the cell, and whoever else looks at that cell sees them.
"""

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from dpbridge.dtypes import to_jax_dtype
from dpbridge.lowering import table
from dpbridge.lowering.autocast import cast_operands
from dpbridge.lowering.table import Call, Run

ViewOp = Callable[[Any], Any]
Padding = list[tuple[int, int, int]]

aten = torch.ops.aten


@dataclass(eq=False)
class Cell:
    """The memory behind one or more tensors.

    Attributes:
        array: What it holds.
        of_example: Whether that depends on the example, and not only on parameters and constants.
        version: How often it was written to.
        is_viewed: Whether there are views of it.
        fixed: Why it must not change, if so.
    """

    array: Any
    of_example: bool = True
    version: int = 0
    is_viewed: bool = False
    fixed: str | None = None

    def set(self, array: Any) -> None:
        """Puts in other numbers, for all that look at this cell."""
        self.array = array
        self.version += 1


@dataclass(eq=False)
class View:
    """A way to look at a cell: whole, or through an op on another view of it."""

    cell: Cell
    base: "View | None" = None
    op: ViewOp | None = None
    _seen: tuple[int, Any] = field(default=(-1, None))

    def read(self) -> Any:
        """Returns the array as it stands now."""
        if self._seen[0] != self.cell.version:
            array = self._of(self.base.read()) if self.base else self.cell.array
            self._seen = (self.cell.version, array)
        return self._seen[1]

    def write(self, value: jax.Array) -> None:
        """Puts `value` where this view's elements lie in the cell."""
        self.cell.set(self._merged(value) if self.base else value)

    def _merged(self, value: jax.Array) -> jax.Array:
        whole = self.cell.array
        with jax.ensure_compile_time_eval():
            order = jnp.arange(whole.size).reshape(whole.shape)
            positions = np.asarray(self._through(order)).reshape(-1)
        box = _box(positions, whole.shape)
        if box is None:
            flat = whole.reshape(-1).at[positions].set(value.reshape(-1), unique_indices=True)
            return flat.reshape(whole.shape)
        sizes, padding = box
        inside = jax.lax.pad(jnp.ones(sizes, bool), False, padding)
        spread = jax.lax.pad(value.reshape(sizes), jnp.zeros((), value.dtype), padding)
        return jnp.where(inside, spread, whole)

    def _through(self, array: Any) -> Any:
        return self._of(self.base._through(array)) if self.base else array

    def _of(self, array: Any) -> Any:
        return self.op(array) if self.op else array


def _box(positions: np.ndarray, shape: tuple[int, ...]) -> tuple[list[int], Padding] | None:
    """Returns sizes and padding if the positions are a slice, with steps, of that shape.

    XLA fuses padding with what is around it; scattering it does element by element.
    """
    axes = [np.unique(axis) for axis in np.unravel_index(positions, shape)]
    if not positions.size or math.prod(map(len, axes)) != positions.size:
        return None
    grid = np.ravel_multi_index(np.ix_(*axes), shape) if shape else np.zeros(1, int)
    steps = [np.unique(np.diff(axis)) for axis in axes]
    if any(len(step) > 1 for step in steps) or not np.array_equal(grid.reshape(-1), positions):
        return None
    padding = [
        (int(axis[0]), int(size - axis[-1] - 1), int(step[0]) - 1 if len(step) else 0)
        for axis, size, step in zip(axes, shape, steps, strict=True)
    ]
    return [len(axis) for axis in axes], padding


@dataclass(eq=False)
class Tensor:
    """A torch tensor of the graph; `fixed` says what it is if forward must not write to it."""

    view: View
    fixed: str | None = None

    @classmethod
    def of(cls, array: Any, fixed: str | None = None, *, of_example: bool = True) -> "Tensor":
        """Returns a tensor with memory of its own."""
        return cls(View(Cell(array, of_example)), fixed)

    def read(self) -> Any:
        """Returns the array as it stands now."""
        return self.view.read()

    def through(self, op: ViewOp) -> "Tensor":
        """Returns the view of this tensor that `op` makes."""
        self.view.cell.is_viewed = True
        return Tensor(View(self.view.cell, self.view, op), self.fixed)


def evaluate(graph_module: GraphModule, inputs: list[Tensor], run: Run) -> list[Any]:
    """Runs the graph on `inputs`, one a placeholder; returns the arrays of its output."""
    return [_read(value) for value in _evaluate(graph_module, inputs, run)]


def _evaluate(graph_module: GraphModule, inputs: list[Tensor], run: Run) -> list[Any]:
    env: dict[Node, Any] = {}
    waiting = iter(inputs)
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(waiting)
        elif node.op == "get_attr":
            env[node] = getattr(graph_module, node.target)
        elif node.op == "call_function":
            env[node] = _call(node, env, run)
        elif node.op == "output":
            return list(map_arg(node.args[0], env.__getitem__))
    raise RuntimeError("The exported graph has no output.")


def _call(node: Node, env: dict[Node, Any], run: Run) -> Any:
    args: Any = map_arg(node.args, env.__getitem__)
    kwargs: Any = map_arg(node.kwargs, env.__getitem__)
    if node.target is operator.getitem:
        return args[0][args[1]]
    if node.target in _REGIONS:
        return _REGIONS[node.target](run, *args)
    call = Call(node, run, _is_of_example((args, kwargs)))
    _check_static(call)
    functional = functional_op(node.target)
    entry = table.find(functional or node.target)
    if entry is None:
        raise _no_rule(node)

    def apply(first: Any) -> Any:
        rest, named = _read((args[1:], kwargs))
        return entry.rule(call, first, *rest, **named)

    if functional and entry.is_alias:
        return _change_view(call, args[0], apply)
    if entry.is_alias and entry.is_alias(node) and not functional:
        return _alias(call, args[0], apply)

    def apply_cast(*first: Any) -> Any:
        operands, named = cast_operands(call, ((*first, *_read(args[1:])), _read(kwargs)))
        return entry.rule(call, *operands, **named)

    if functional:
        return _write(call, args[0], apply_cast)
    result = apply_cast(*_read(args[:1]))
    wrapped = _wrap(_conform(call, result), call.of_example)
    sharing = [env[source] for source in table.memory_sources(node)]
    for value in jax.tree.leaves([wrapped, sharing]) if sharing else []:
        value.view.cell.fixed = "memory that another tensor shares"
    return wrapped


def _write(call: Call, target: Tensor, apply: ViewOp) -> Tensor:
    fixed = target.fixed or target.view.cell.fixed
    if fixed:
        raise call.refuse(f"it writes into {fixed}. Write into a clone.")
    target.view.write(_conform_one(call, apply(target.read()), call.result))
    target.view.cell.of_example |= call.of_example
    return target


def _change_view(call: Call, target: Tensor, apply: ViewOp) -> Tensor:
    """`x.unsqueeze_(0)`: the same tensor object looks at its memory in another way."""
    if call.node.target is aten.detach_.default:
        return _detach(call, target)
    target.view = target.through(apply).view
    return target


def _detach(call: Call, target: Tensor) -> Tensor:
    if target.view.cell.is_viewed:
        raise call.refuse("the tensor has views. Use detach.")
    target.view.write(jax.lax.stop_gradient(target.read()))
    return target


def _alias(call: Call, base: Tensor, apply: ViewOp) -> Any:
    if isinstance(call.result, (tuple, list)):
        once = _Once(apply)
        return [base.through(_part(once, index)) for index in range(len(call.result))]
    view = base.through(apply)
    if call.node.target is aten.detach.default:
        view.fixed = view.fixed or "the memory of the tensor that it was detached from"
    return view


def _part(apply: ViewOp, index: int) -> ViewOp:
    return lambda array: apply(array)[index]


class _Once:
    """Takes an array apart once for all of its parts, so that their derivatives come together."""

    def __init__(self, apply: ViewOp) -> None:
        self._apply = apply
        self._last: tuple[Any, Any] = (None, None)

    def __call__(self, array: Any) -> Any:
        if self._last[0] is not array:
            self._last = (array, self._apply(array))
        return self._last[1]


@functools.cache
def functional_op(target: Any) -> Any:
    """Returns `aten.relu.default` for `aten.relu_.default`, and None for ops not in-place."""
    if not (isinstance(target, table.OpOverload) and target._schema.is_mutable):
        return None
    namespace, _, name = target._schema.name.partition("::")
    name = f"__{name[3:]}" if name.startswith("__i") else name.removesuffix("_")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet else []
    same = [op for op in overloads if _arguments(op) == _arguments(target)]
    return same[0] if same else target


def _arguments(op: Any) -> list[tuple[str, str]]:
    """Names and types of all but the tensor itself, which some call self and some input."""
    return [(argument.name, str(argument.type)) for argument in op._schema.arguments[1:]]


def _check_static(call: Call) -> None:
    value = call.node.meta.get("val")
    for result in value if isinstance(value, (tuple, list)) else [value]:
        if isinstance(result, torch.Tensor) and not all(type(size) is int for size in result.shape):
            raise call.refuse(
                "the shape of its result depends on the data. Use torch.where or masked_fill."
            )
        if isinstance(result, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise call.refuse("it makes a Python number of a tensor. Compute with the tensor.")


def _conform(call: Call, result: Any) -> Any:
    """Casts a rule's result to torch's dtype, and checks that it has torch's shape."""
    expected = call.node.meta.get("val")
    if isinstance(expected, (tuple, list)):
        return [_conform_one(call, *pair) for pair in zip(result, expected, strict=True)]
    return _conform_one(call, result, expected)


def _conform_one(call: Call, array: Any, fake: Any) -> Any:
    if not isinstance(fake, torch.Tensor):
        return array
    if array.shape != tuple(fake.shape):
        name = f"`{table.op_name(call.node.target)}`{table.at_line(call.node)}"
        raise RuntimeError(
            f"The rule of {name} must return shape {tuple(fake.shape)}, got {array.shape}. "
            "Correct the rule."
        )
    return array.astype(to_jax_dtype(fake.dtype))


def _no_rule(node: Node) -> NotImplementedError:
    name = table.op_name(node.target)
    return NotImplementedError(
        f"`{name}`{table.at_line(node)} has no lowering rule. Write the model without it, or "
        "add a rule with dpbridge.register_lowering."
    )


def _is_of_example(values: Any) -> bool:
    tensors = [value for value in jax.tree.leaves(values) if isinstance(value, Tensor)]
    return any(tensor.view.cell.of_example for tensor in tensors)


def _wrap(result: Any, of_example: bool) -> Any:
    if isinstance(result, (tuple, list)):
        return [_wrap(part, of_example) for part in result]
    return Tensor.of(result, of_example=of_example) if isinstance(result, jax.Array) else result


def _read(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.read()
    if isinstance(value, (tuple, list)):
        return tuple(_read(part) for part in value)
    if isinstance(value, dict):
        return {name: _read(part) for name, part in value.items()}
    return value


def _set_grad_region(run: Run, enabled: bool, body: GraphModule, *operands: Any) -> list[Any]:
    """A `torch.no_grad()` block: its gradient stops, in torch and here."""
    if enabled:
        return _evaluate(body, list(operands), run)
    outside = "a tensor from outside `torch.no_grad()`"
    tensors = [operand for operand in operands if isinstance(operand, Tensor)]
    inputs = [
        Tensor(operand.view, outside) if isinstance(operand, Tensor) else operand
        for operand in operands
    ]
    results = _evaluate(body, inputs, run)
    outer_cells = {id(operand.view.cell) for operand in tensors}
    return [_without_gradient(result, outer_cells) for result in results]


def _without_gradient(result: Any, outer_cells: set[int]) -> Any:
    if not isinstance(result, Tensor):
        return result
    cell = result.view.cell
    if id(cell) in outer_cells:
        return result.through(jax.lax.stop_gradient)
    cell.set(jax.lax.stop_gradient(cell.array))
    return result


def _autocast_region(
    run: Run, device: str, dtype: Any, enabled: bool, cache: Any, body: GraphModule, *operands: Any
) -> list[Any]:
    """A `torch.autocast` block; what is computed in it has the types that torch gives it."""
    outside = run.autocast
    others = {name: other for name, other in outside.items() if name != device}
    run.autocast = {**others, device: dtype} if enabled else others
    try:
        return _evaluate(body, list(operands), run)
    finally:
        run.autocast = outside


def _checkpoint_region(run: Run, body: GraphModule, *operands: Any) -> list[Any]:
    """A `torch.utils.checkpoint` block: what to keep for backward is XLA's choice here."""
    return _evaluate(body, list(operands), run)


_REGIONS: dict[Any, Callable[..., list[Any]]] = {
    torch.ops.higher_order.wrap_with_set_grad_enabled: _set_grad_region,
    torch.ops.higher_order.wrap_with_autocast: _autocast_region,
    torch.ops.higher_order.tag_activation_checkpoint: _checkpoint_region,
}
