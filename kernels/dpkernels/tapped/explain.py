"""A table of how norm and clipped sum of every parameter are found, and what that costs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax

from dpkernels.tapped.forms import Form
from dpkernels.tapped.gather import is_bag
from dpkernels.tapped.graph import Graph, Site

_HEADS = ("parameter", "shape", "sites", "form", "MFLOP", "MB")


@dataclass(frozen=True)
class Row:
    """One block of parameters.

    Attributes:
        parameters: Their paths.
        shapes: Their shapes.
        sites: The equations that use them.
        form: "outer": norms of both sides of one outer product. "gram": inner products of all
            rows. "merged": looked-up rows, those of one index put together. "counted": a sum of
            them, by how often each was looked up. "product": the gradient of every example.
        flops: Floating point operations of norm and clipped sum, for the whole batch.
        bytes: What the form needs beside activations and their gradients, for the whole batch.
    """

    parameters: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    sites: tuple[str, ...]
    form: str
    flops: float
    bytes: float


@dataclass(frozen=True)
class Explanation:
    """Why a step costs what it costs: a row for each block of parameters; prints as a table.

    Attributes:
        rows: The dearest first.
        unused: Parameters that the loss does not depend on.
    """

    rows: tuple[Row, ...]
    unused: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        lines = [_HEADS, *(_cells(row) for row in self.rows)]
        flops, size = sum(row.flops for row in self.rows), sum(row.bytes for row in self.rows)
        lines.append(("all", "", "", "", _millions(flops), _millions(size)))
        widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADS))]
        table = "\n".join(_aligned(line, widths) for line in lines)
        return table + "".join(f"\n{name}: not used" for name in self.unused)

    __repr__ = __str__


def explain(
    forms: Sequence[Form], graph: Graph, sites: Sequence[Site], names: Sequence[str], batch: int
) -> Explanation:
    """Describes the forms for a batch of so many examples."""
    rows = []
    for form in forms:
        params = form.block.params
        used = dict.fromkeys(use.site for use in form.block.uses)
        rows.append(
            Row(
                tuple(names[i] for i in params),
                tuple(tuple(graph.avals[i].shape) for i in params),
                tuple(_describe(sites[i]) for i in used),
                form.name,
                form.flops * batch,
                form.bytes * batch,
            )
        )
    rows.sort(key=lambda row: -row.flops)
    used_params = {i for form in forms for i in form.block.params}
    unused = tuple(name for i, name in enumerate(names) if i not in used_params)
    return Explanation(tuple(rows), unused)


def parameter_names(params: object) -> list[str]:
    """Returns the paths of a tree's leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [jax.tree_util.keystr(path) or "params" for path, _ in leaves]


def _describe(site: Site) -> str:
    name = "identity"
    if site.eqn is not None:
        name = "gather and sum" if is_bag(site.eqn) else site.eqn.primitive.name
    turns = math.prod(site.loops)
    return name if not site.loops else f"{name} × {turns} turns"


def _cells(row: Row) -> tuple[str, ...]:
    counted = [
        f"{name} × {row.sites.count(name)}" if row.sites.count(name) > 1 else name
        for name in dict.fromkeys(row.sites)
    ]
    return (
        ", ".join(row.parameters),
        ", ".join("×".join(map(str, shape)) or "scalar" for shape in row.shapes),
        ", ".join(counted),
        row.form,
        _millions(row.flops),
        _millions(row.bytes),
    )


def _millions(value: float) -> str:
    return f"{value / 1e6:.3g}" if value < 1e9 else f"{value / 1e6:.0f}"


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    text = [cell.ljust(width) for cell, width in zip(line[:4], widths, strict=False)]
    figures = [cell.rjust(width) for cell, width in zip(line[4:], widths[4:], strict=True)]
    return "  ".join([*text, *figures]).rstrip()
