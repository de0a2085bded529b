"""Find where a loop's sites have gradients that are known outside of it already.

A recurrent layer adds the product of its state to a product of all inputs, made before the loop.
The gradient is the same at both, and stacked by turns it would be held, and multiplied by itself
for the norm, twice.
"""

import dataclasses

from jax.extend.core import primitives

from dpkernels._compat import scan_counts
from dpkernels.tapped.graph import Atom, Level, Local, Loop, Plain, Site, Step


def share_gradients(level: Level) -> tuple[Level, dict[int, int]]:
    """Returns the program without the taps that others stand for, and which these are.

    Returns:
        The program of an example; and for the index of a site, as in `Level.sites`, that of the
        site whose gradient it has.
    """
    taken, makers = level.use_counts(), _sites_by_output(level)
    steps: list[Step] = []
    pairs: list[tuple[Site, Site]] = []
    for step in level.steps:
        loop = step
        for given, inner in _split(step):
            maker = makers.get(given.index) if isinstance(given, Local) else None
            if isinstance(loop, Loop) and maker is not None and taken[maker.outputs[0]] == 1:
                site = _added_to(loop.body, inner)
                if site is not None:
                    loop, bare = _without_tap(loop, site)
                    pairs.append((bare, maker))
        steps.append(loop)
    changed = Level(level.inputs, steps, level.outputs)
    places = {id(site): index for index, site in enumerate(changed.sites())}
    return changed, {places[id(one)]: places[id(other)] for one, other in pairs}


def _sites_by_output(level: Level) -> dict[int, Site]:
    """Returns the level's sites with a single output."""
    return {x.outputs[0]: x for x in level.steps if isinstance(x, Site) and len(x.outputs) == 1}


def _split(step: Step) -> list[tuple[Atom, int]]:
    """Returns what a loop takes turn by turn, and what that is inside."""
    if not isinstance(step, Loop):
        return []
    _, _, count = scan_counts(step.eqn)
    pairs = list(zip(step.inputs, step.body.inputs, strict=True))
    return pairs[len(pairs) - count :]


def _added_to(body: Level, index: int) -> Site | None:
    """Returns the site whose output is added to this value, both being used for nothing else."""
    taken, sites = body.use_counts(), _sites_by_output(body)
    for step in body.steps:
        if isinstance(step, Plain) and step.eqn.primitive is primitives.add_p:
            ends = [atom.index for atom in step.inputs if isinstance(atom, Local)]
            if index in ends and len(ends) == 2:
                ends.remove(index)
                site = sites.get(ends[0])
                if site is not None and taken[index] == taken[ends[0]] == 1:
                    return site
    return None


def _without_tap(loop: Loop, site: Site) -> tuple[Loop, Site]:
    bare = dataclasses.replace(site, has_tap=False)
    steps = [bare if step is site else step for step in loop.body.steps]
    body = Level(loop.body.inputs, steps, loop.body.outputs)
    return dataclasses.replace(loop, body=body), bare
