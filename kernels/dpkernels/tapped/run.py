"""Evaluate the program of one example with taps: zeros added to what parameters touch.

The derivative with respect to the taps is the gradient of the loss at every site, all of them found
in one backward pass.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dpkernels._compat import bind, scan_counts
from dpkernels.tapped.graph import Level, Loop, Outer, Plain, Site, Value
from dpkernels.tapped.once import gradient_once

PyTree = Any


def zero_taps(level: Level) -> list[Any]:
    """Returns the taps of every step: a list of arrays for a site, one of lists for a loop."""
    taps: list[Any] = []
    for step in level.steps:
        if isinstance(step, Site):
            taps.append([jnp.zeros(aval.shape, aval.dtype) for aval in _tapped(step)])
        elif isinstance(step, Loop):
            length = step.eqn.params["length"]
            inner = zero_taps(step.body)
            taps.append(jax.tree.map(lambda x, n=length: jnp.zeros((n, *x.shape), x.dtype), inner))
        else:
            taps.append([])
    return taps


def evaluate(
    level: Level,
    outer: dict[int, Any],
    inputs: Sequence[Any],
    taps: list[Any],
    bind_local: Callable[[Any, list[Any]], list[Any]] = bind,
) -> tuple[list[Any], list[Any]]:
    """Evaluates a level for one example.

    Args:
        level: The program.
        outer: Values that do not depend on the example, by index.
        inputs: Of the level.
        taps: As from `zero_taps`.
        bind_local: Evaluates an equation.

    Returns:
        The level's outputs; and what the sites save, in the structure of the taps.
    """
    values: dict[int, Any] = dict(zip(level.inputs, inputs, strict=True))

    def read(atom: Any) -> Any:
        if isinstance(atom, Value):
            return atom.value
        return outer[atom.index] if isinstance(atom, Outer) else values[atom.index]

    saved: list[Any] = []
    for step, tap in zip(level.steps, taps, strict=True):
        operands = [read(atom) for atom in step.inputs]
        kept: Any = []
        if isinstance(step, Plain):
            results = bind_local(step.eqn, operands)
        elif isinstance(step, Site):
            raw = operands if step.eqn is None else bind_local(step.eqn, operands)
            given = iter(tap)
            results = [x + next(given) if tap and _is_tapped(x) else x for x in raw]
            kept = [operands[i] for i in step.saved]
        else:
            results, kept = _loop(step, outer, operands, tap, bind_local)
        values.update(zip(step.outputs, results, strict=True))
        for index in level.skips.intersection(step.outputs):
            values[index] = gradient_once(values[index])
        saved.append(kept)
    return [read(atom) for atom in level.outputs], saved


def _loop(
    step: Loop,
    outer: dict[int, Any],
    operands: list[Any],
    taps: list[Any],
    bind_local: Callable[[Any, list[Any]], list[Any]],
) -> tuple[list[Any], Any]:
    params = step.eqn.params
    length = params["length"]
    num_local = len(step.body.inputs)
    num_consts, num_carry, num_xs = scan_counts(step.eqn)
    first = num_local - num_xs - num_carry
    last = num_local - num_xs
    consts, carry, xs = operands[:first], operands[first:last], operands[last:]
    kinds = [var.aval.dtype for var in step.eqn.invars[num_consts:]]

    def body(carry: list[Any], turn: tuple[list[Any], list[Any]]) -> Any:
        xs, taps = turn
        results, kept = evaluate(step.body, outer, [*consts, *carry, *xs], taps, bind_local)
        count = len(carry)
        return _typed(results[:count], kinds), (results[count:], kept)

    carry, (ys, kept) = lax.scan(
        body,
        _typed(carry, kinds),
        (_typed(xs, kinds[num_carry:]), taps),
        length,
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *ys], kept


def _typed(values: Sequence[Any], kinds: Sequence[Any]) -> list[jax.Array]:
    """Gives literals the type that they have in the program."""
    return [
        x if isinstance(x, jax.Array) else jnp.asarray(x, kind)
        for x, kind in zip(values, kinds, strict=False)
    ]


def _tapped(site: Site) -> list[Any]:
    if not site.has_tap:
        return []
    return [aval for aval in site.avals if jnp.issubdtype(aval.dtype, jnp.inexact)]


def _is_tapped(array: Any) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.inexact))


def by_site(level: Level, tree: list[Any]) -> list[list[jax.Array]]:
    """Brings what has the structure of the taps into the order of `Level.sites`."""
    found: list[list[jax.Array]] = []
    for step, part in zip(level.steps, tree, strict=True):
        if isinstance(step, Site):
            found.append(part)
        elif isinstance(step, Loop):
            found.extend(by_site(step.body, part))
    return found
