"""Parameters that reach their site through transposes, reshapes, slices and the like.

Such a view preserves norms: a gradient with respect to the view has the norm of what it gives the
parameter. So norms are taken at the site, and only the clipped sum is carried back.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives

from dpkernels._compat import bind
from dpkernels.tapped.graph import Graph, Outer, OuterStep

_ONE_TO_ONE = frozenset(
    {
        primitives.transpose_p,
        primitives.reshape_p,
        primitives.squeeze_p,
        primitives.rev_p,
        primitives.slice_p,
        primitives.copy_p,
        primitives.convert_element_type_p,
    }
)
_CASTS = frozenset({primitives.convert_element_type_p, primitives.copy_p})


@dataclass(frozen=True)
class View:
    """Where a trainable value comes from.

    Attributes:
        ref: The value, as an index of the graph's outer values.
        params: The parameters that it is computed from.
        root: What it is a view of: a parameter or parameters put together; None if it is not a
            view, so that norms must be taken at the parameters.
        memory: The view on memory laid out as the root is, to compare it with other views; None
            if it is none.
    """

    ref: int
    params: frozenset[int]
    root: int | None
    memory: np.ndarray | None


class Views:
    """Traces trainable values back to their parameters."""

    def __init__(self, graph: Graph, num_trainable: int) -> None:
        self._graph = graph
        self._found = {
            i: View(i, frozenset([i]), i, _memory(graph.avals[i].shape))
            for i in range(num_trainable)
        }

    def of(self, ref: int) -> View:
        """Returns where an outer value comes from."""
        if ref not in self._found:
            self._found[ref] = self._trace(ref)
        return self._found[ref]

    def _trace(self, ref: int) -> View:
        step = self._graph.made_by[ref]
        sources = [
            self.of(atom.index)
            for atom in step.inputs
            if isinstance(atom, Outer) and self._graph.trains[atom.index]
        ]
        params = frozenset().union(*(source.params for source in sources))
        if step.eqn.primitive is primitives.concatenate_p:
            if _can_put_together(sources, len(step.inputs), self._graph):
                return View(ref, params, ref, _memory(self._graph.avals[ref].shape))
        elif len(sources) == 1 and sources[0].root is not None:
            is_view, memory = _step(step.eqn, sources[0].memory)
            if is_view:
                return View(ref, params, sources[0].root, memory)
        return View(ref, params, None, None)


def _memory(shape: Sequence[int]) -> np.ndarray:
    # Never touched, so it takes addresses and no memory.
    return np.empty(shape, np.int8)


def _can_put_together(sources: list[View], count: int, graph: Graph) -> bool:
    """Returns whether all of what is concatenated are whole parameters, none of them twice."""
    whole = [
        source.root is not None
        and np.prod(graph.avals[source.ref].shape) == np.prod(graph.avals[source.root].shape)
        for source in sources
    ]
    params = [param for source in sources for param in source.params]
    return len(sources) == count and all(whole) and len(set(params)) == len(params)


def _step(eqn: Any, memory: np.ndarray | None) -> tuple[bool, np.ndarray | None]:
    """Returns whether the equation is a view, and the view itself where strides can say it."""
    primitive, params = eqn.primitive, eqn.params
    if primitive is primitives.broadcast_in_dim_p:
        if eqn.invars[0].aval.size != eqn.outvars[0].aval.size:
            return False, None
        return True, None if memory is None else _reshaped(memory, params["shape"])
    if primitive not in _ONE_TO_ONE or not _is_real(eqn.outvars[0].aval):
        return False, None
    if memory is None or primitive in _CASTS:
        return True, memory
    if primitive is primitives.transpose_p:
        return True, memory.transpose(params["permutation"])
    if primitive is primitives.rev_p:
        return True, np.flip(memory, params["dimensions"])
    if primitive is primitives.slice_p:
        strides = params["strides"] or (1,) * memory.ndim
        bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
        return True, memory[tuple(slice(*bound) for bound in bounds)]
    if primitive is primitives.reshape_p and params["dimensions"] is not None:
        return True, None
    return True, _reshaped(memory, eqn.outvars[0].aval.shape)


def _is_real(aval: Any) -> bool:
    return bool(jnp.issubdtype(aval.dtype, jnp.floating))


def _reshaped(memory: np.ndarray, shape: Sequence[int]) -> np.ndarray | None:
    reshaped = memory.reshape(shape)
    return reshaped if np.may_share_memory(reshaped, memory) else None


def same_memory(a: View, b: View) -> bool:
    """Returns whether two views hold the same elements, in whatever order."""
    if a.ref == b.ref:
        return True
    return a.memory is not None and b.memory is not None and _extent(a) == _extent(b)


def apart(a: View, b: View) -> bool:
    """Returns whether two views of one root have no element in common."""
    if a.memory is None or b.memory is None:
        return False
    try:
        return not np.shares_memory(a.memory, b.memory, max_work=10_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return False


def axes_by_stride(view: View, axes: Sequence[int]) -> tuple[int, ...]:
    """Returns axes of the view, those that make the largest steps in memory first."""
    if view.memory is None:
        return tuple(axes)
    steps = np.abs(view.memory.strides)
    return tuple(sorted(axes, key=lambda axis: (-steps[axis], axis)))


def walk_of(view: View, axes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Returns how these axes step through memory: sizes and strides, merged where they can be.

    Two views agree about the order of what these axes run over if they agree in this.
    """
    assert view.memory is not None
    merged: list[tuple[int, int]] = []
    for axis in axes:
        size, stride = view.memory.shape[axis], view.memory.strides[axis]
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return tuple(merged)


def _extent(view: View) -> Any:
    memory = view.memory
    assert memory is not None
    steps = sorted(
        (abs(stride), size)
        for size, stride in zip(memory.shape, memory.strides, strict=True)
        if size > 1
    )
    merged: list[tuple[int, int]] = []
    for stride, size in steps:
        if merged and stride == merged[-1][0] * merged[-1][1]:
            merged[-1] = (merged[-1][0], merged[-1][1] * size)
        else:
            merged.append((stride, size))
    start = memory.__array_interface__["data"][0]
    low = start + sum(
        stride * (size - 1)
        for size, stride in zip(memory.shape, memory.strides, strict=True)
        if stride < 0 and size
    )
    return low, tuple(merged)


def in_memory_order(array: jax.Array, view: View, lead: int) -> jax.Array:
    """Flattens what has the view's axes behind `lead` others into the order of its memory."""
    if view.memory is not None:
        backwards = [lead + i for i, step in enumerate(view.memory.strides) if step < 0]
        order = axes_by_stride(view, range(view.memory.ndim))
        array = jnp.flip(array, backwards) if backwards else array
        array = array.transpose(*range(lead), *(lead + axis for axis in order))
    return array.reshape(*array.shape[:lead], math.prod(array.shape[lead:]))


def from_memory_order(flat: jax.Array, view: View, shape: Sequence[int]) -> jax.Array:
    """Undoes `in_memory_order` for an array without leading axes."""
    if view.memory is None:
        return flat.reshape(shape)
    order = axes_by_stride(view, range(view.memory.ndim))
    array = flat.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))
    backwards = [i for i, step in enumerate(view.memory.strides) if step < 0]
    return jnp.flip(array, backwards) if backwards else array


def carry_back(graph: Graph, view: View, total: jax.Array) -> dict[int, jax.Array]:
    """Returns what a sum at a view means for its parameters.

    In the type of `total`: casts on the way are left out, because a sum of clipped gradients must
    not be rounded to half precision.
    """
    steps = graph.ancestors([view.ref])
    params = sorted(view.params)

    def forward(*inputs: jax.Array) -> jax.Array:
        values: dict[int, Any] = dict(zip(params, inputs, strict=True))
        for step in steps:
            values[step.outputs[0]] = _without_cast(step, values)
        return values[view.ref]

    shapes = [jax.ShapeDtypeStruct(graph.avals[i].shape, total.dtype) for i in params]
    return dict(zip(params, jax.linear_transpose(forward, *shapes)(total), strict=True))


def _without_cast(step: OuterStep, values: dict[int, Any]) -> Any:
    operands = [values[atom.index] for atom in step.inputs if isinstance(atom, Outer)]
    return operands[0] if step.eqn.primitive in _CASTS else bind(step.eqn, operands)[0]
