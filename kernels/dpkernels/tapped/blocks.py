"""Group the uses of parameters so that the norm of a gradient is a sum over groups.

A parameter that is used once, or several times in the same shape, makes a block of its own. Where
what lies between parameters and their uses does not preserve norms, they are a block together whose
gradients are formed for every example.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from dpkernels.tapped.conv import Conv
from dpkernels.tapped.dense import Dense
from dpkernels.tapped.gather import Bag, Gather
from dpkernels.tapped.generic import Generic
from dpkernels.tapped.graph import Graph, Site
from dpkernels.tapped.views import View, Views, apart, same_memory, walk_of

Rule: TypeAlias = Dense | Conv | Gather | Generic


@dataclass(frozen=True)
class Use:
    """One site's use of one value that is computed from parameters.

    Attributes:
        site: Index of the site.
        position: Which of the site's weights it is.
        view: Where the weight comes from.
        rule: How its gradient is found.
    """

    site: int
    position: int
    view: View
    rule: Rule


@dataclass(frozen=True)
class Block:
    """Parameters, or a part of one, whose gradient's norm is found together.

    Attributes:
        params: Indices of the parameters.
        uses: All uses of what the block is about.
        is_view: Whether norms can be taken at the uses. Then all of them are views of the same
            memory. Otherwise they are taken at the parameters.
    """

    params: tuple[int, ...]
    uses: tuple[Use, ...]
    is_view: bool


def find_blocks(graph: Graph, views: Views, clip_groups: Sequence[int]) -> list[Block]:
    """Groups all uses.

    Args:
        graph: The program.
        views: Where its values come from.
        clip_groups: For each parameter, which clip norm it is under.
    """
    uses = [use for i, site in enumerate(graph.top.sites()) for use in _uses_of(i, site, views)]
    blocks: list[Block] = []
    for params in _connected(uses):
        own = [use for use in uses if use.view.params <= params]
        parts = _parts(own)
        if parts is None or len({clip_groups[i] for i in params}) > 1:
            blocks.append(Block(tuple(sorted(params)), tuple(own), False))
        else:
            blocks.extend(Block(tuple(sorted(params)), tuple(part), True) for part in parts)
    return blocks


def are_comparable(uses: Sequence[Use]) -> list[bool] | None:
    """Returns for each use whether left and right are swapped against the first one.

    None if the uses do not see the weight as outer products over the same two sets of axes.
    """
    if len(uses) == 1:
        return [False]
    first = _sides(uses[0])
    if first is None:
        return None
    swapped = []
    for use in uses:
        sides = _sides(use)
        if sides is None or sides[0] != first[0] or {*sides[1:]} != {*first[1:]}:
            return None
        swapped.append(sides[1:] != first[1:])
    return swapped


def _sides(use: Use) -> tuple[object, object, object] | None:
    if use.view.memory is None:
        return None
    if isinstance(use.rule, Dense):
        groups, left, right = (walk_of(use.view, axes) for axes in use.rule.w_axes)
        return groups, left, right
    if isinstance(use.rule, Gather):
        axes = range(1, use.view.memory.ndim)
        return (), walk_of(use.view, [0]), walk_of(use.view, axes)
    return None


def _uses_of(index: int, site: Site, views: Views) -> list[Use]:
    shapes = [var.aval.size for var in (*site.eqn.invars, *site.eqn.outvars)] if site.eqn else []
    if len(site.weights) == 1 and all((*shapes, *site.loops)):
        view = views.of(site.weight_refs[0])
        for kind in (Dense, Conv, Gather, Bag):
            rule = kind.match(site, view)
            if rule is not None:
                return [Use(index, 0, view, rule)]
    generic = Generic(site)
    return [
        Use(index, position, views.of(ref), generic)
        for position, ref in enumerate(site.weight_refs)
    ]


def _connected(uses: Sequence[Use]) -> list[frozenset[int]]:
    """Returns sets of parameters such that no use depends on more than one set."""
    sets: list[frozenset[int]] = []
    for use in uses:
        touched = [s for s in sets if s & use.view.params]
        sets = [s for s in sets if s not in touched]
        sets.append(use.view.params.union(*touched))
    return sets


def _parts(uses: Sequence[Use]) -> list[list[Use]] | None:
    """Splits uses by the memory that they see; None if it overlaps or is not known."""
    if None in (use.view.root for use in uses) or len({use.view.root for use in uses}) > 1:
        return None
    parts: list[list[Use]] = []
    for use in uses:
        home = next((part for part in parts if same_memory(part[0].view, use.view)), None)
        if home is None and not all(apart(part[0].view, use.view) for part in parts):
            return None
        if home is None:
            parts.append([use])
        else:
            home.append(use)
    return parts
