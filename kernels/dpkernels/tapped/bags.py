"""Take a look-up of rows and their sum for one equation: a bag of embeddings.

Then no row is formed, and none has a gradient of its own: that of the sum stands for all.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import primitives

from dpkernels._compat import bind
from dpkernels.tapped.gather import takes_rows
from dpkernels.tapped.graph import Level, Local, Plain, Site, Step


def with_bags(level: Level) -> Level:
    """Returns the program of an example with its bags as one site each.

    A bag is a look-up by data whose rows, and all of them, are summed, and used for nothing else.
    """
    taken = level.use_counts()
    takers = {
        atom.index: step
        for step in level.steps
        for atom in step.inputs
        if isinstance(atom, Local) and taken[atom.index] == 1
    }
    bags: dict[int, Site] = {}
    inside: set[int] = set()
    for step in level.steps:
        if isinstance(step, Site) and _looks_up_by_data(step):
            way = _way_to_sum(step, takers)
            if way:
                bags[id(way[-1])] = _bag(step, way)
                inside.update(id(x) for x in (step, *way[:-1]))
    steps = [bags.get(id(step), step) for step in level.steps if id(step) not in inside]
    return Level(level.inputs, steps, level.outputs)


def _looks_up_by_data(site: Site) -> bool:
    is_look_up = site.eqn is not None and site.weights == (0,) and takes_rows(site.eqn)
    return is_look_up and site.saved == (1,) and isinstance(site.inputs[1], Local)


def _way_to_sum(site: Site, takers: dict[int, Step]) -> list[Plain]:
    """Returns the steps that make one sum of all rows, or none."""
    row = site.eqn.invars[0].aval.shape[1:]
    way: list[Plain] = []
    shape, step = site.avals[0].shape, takers.get(site.outputs[0])
    while isinstance(step, Plain) and _keeps_rows(step.eqn, len(shape) - len(row), row):
        way.append(step)
        shape = step.eqn.outvars[0].aval.shape
        if step.eqn.primitive is primitives.reduce_sum_p:
            return way if math.prod(shape) == math.prod(row) else []
        step = takers.get(step.outputs[0])
    return []


def _keeps_rows(eqn: Any, count: int, row: tuple[int, ...]) -> bool:
    """Returns whether an equation moves or adds up whole rows, along the first `count` axes."""
    shape = eqn.outvars[0].aval.shape
    if eqn.primitive in (primitives.reshape_p, primitives.broadcast_in_dim_p):
        is_same_order = eqn.params.get("dimensions") is None
        is_same_size = math.prod(shape) == eqn.invars[0].aval.size
        return is_same_order and is_same_size and shape[len(shape) - len(row) :] == row
    if eqn.primitive is primitives.squeeze_p:
        return all(axis < count for axis in eqn.params["dimensions"])
    is_sum = eqn.primitive is primitives.reduce_sum_p
    return is_sum and all(axis < count for axis in eqn.params["axes"])


def _bag(site: Site, way: Sequence[Plain]) -> Site:
    def sum_of_rows(table: Any, index: Any) -> Any:
        (x,) = bind(site.eqn, [table, index])
        for step in way:
            (x,) = bind(step.eqn, [x])
        return x

    kinds = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in site.eqn.invars]
    (eqn,) = jax.make_jaxpr(jax.jit(sum_of_rows))(*kinds).jaxpr.eqns
    avals = tuple(var.aval for var in eqn.outvars)
    return Site(eqn, site.inputs, way[-1].outputs, avals, site.weights, site.loops)
