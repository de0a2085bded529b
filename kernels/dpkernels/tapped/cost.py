"""Choose the cheapest form of each block from shapes alone."""

import math
from collections.abc import Sequence
from typing import Any

from dpkernels.tapped.blocks import Block, Use, are_comparable
from dpkernels.tapped.conv import Conv
from dpkernels.tapped.dense import Dense
from dpkernels.tapped.forms import Form
from dpkernels.tapped.gather import Bag, Gather
from dpkernels.tapped.graph import Graph
from dpkernels.tapped.product_form import Product, gradient_size
from dpkernels.tapped.row_forms import Counted, Gram, Merged, Outer

# What moving a byte to and from memory costs, in floating point operations of a matrix product:
# gradients of all examples are written once and read twice. Measured on two cores of a server
# (150 GFLOP/s, 3 GB/s); for the others by their data sheets.
_FLOPS_PER_BYTE = {"cpu": 60.0, "gpu": 12.0, "tpu": 100.0}
# Gradients of all examples are held at once up to so many bytes, otherwise formed twice.
_STORE_AT_MOST = 256 * 2**20
# On a CPU one product takes all cores, and more of them in a loop's turn take longer to compile.
_UNROLLED = {"cpu": 1, "gpu": 4, "tpu": 4}


def choose(block: Block, graph: Graph, batch_size: int, platform: str, strategy: str) -> Form:
    """Returns the cheapest form that the strategy admits.

    Args:
        block: What to find norm and clipped sum of.
        graph: The program.
        batch_size: How many examples there are.
        platform: What JAX runs on.
        strategy: "auto", or the name of the form to take where it applies.
    """
    options = _options(block, graph, batch_size, platform)
    named = [form for form in options if form.name == strategy]
    if strategy == "gram" and not named:
        named = [form for form in options if form.name == "outer"]
    byte = _FLOPS_PER_BYTE.get(platform, _FLOPS_PER_BYTE["gpu"])
    return min(named or options, key=lambda form: form.flops + byte * form.bytes)


def _options(block: Block, graph: Graph, batch_size: int, platform: str) -> list[Form]:
    product = _product(block, graph, batch_size, platform)
    options: list[Form] = [product]
    rules = [use.rule for use in block.uses if isinstance(use.rule, Dense | Conv | Gather)]
    swapped = are_comparable(block.uses) if block.is_view else None
    if swapped is None or len(rules) < len(block.uses):
        return options
    if len(rules) == 1:
        (rule,) = rules
        if isinstance(rule, Bag):
            return [*options, _counted(block, rule)]
        if isinstance(rule, Gather):
            options.append(_merged(block, rule, scatters=platform == "cpu"))
        if isinstance(rule, Dense) and rule.sizes[1] == 1:
            return [*options, _outer(block, rule)]
    return [*options, _gram(block, rules, swapped, product)]


def _product(block: Block, graph: Graph, batch_size: int, platform: str) -> Product:
    size = gradient_size(block, graph)
    is_stored = 4 * size * batch_size <= _STORE_AT_MOST
    flops = _plain(block.uses) + 4 * size
    moved = 4.0 * size
    if any(isinstance(use.rule, Gather) for use in block.uses):
        moved *= 3  # Zeros are written first, and rows added to them.
    unrolled = _UNROLLED.get(platform, _UNROLLED["gpu"])
    return Product(block, flops if is_stored else 2 * flops, moved, is_stored, unrolled)


def _outer(block: Block, rule: Dense) -> Outer:
    groups, _, left, right = rule.sizes
    return Outer(block, _plain(block.uses) + 2 * groups * (left + right), 0.0, rule)


def _counted(block: Block, rule: Bag) -> Counted:
    _, rows, _, right = rule.sizes
    return Counted(block, rows * rows + 2.0 * rows * right + 2.0 * right, 8.0 * rows, rule)


def _merged(block: Block, rule: Gather, *, scatters: bool) -> Merged:
    _, rows, _, right = rule.sizes
    flops = rows * rows + 6.0 * rows * right if scatters else 2.0 * rows * rows * right
    return Merged(block, flops + 4.0 * rows * right, 4.0 * rows * (rows + right), rule, scatters)


def _gram(
    block: Block, rules: Sequence[Dense | Conv | Gather], swapped: Sequence[bool], product: Product
) -> Gram:
    flops, held = _plain(block.uses), 0.0
    for i, one in enumerate(rules):
        for other in rules[: i + 1]:
            groups, rows, left, right = one.sizes
            pairs = float(groups * rows * other.sizes[1])
            looks_up = isinstance(one, Gather) or isinstance(other, Gather)
            inner = right + 4 if looks_up else left + right
            if isinstance(one, Conv):
                inner = left // math.prod(one.kernel) + right
            flops += 2.0 * pairs * inner
            # Grams of both sides; those of patches are added up from shifted ones.
            held += 4.0 * pairs * (4 if isinstance(one, Conv) else 2)
    return Gram(block, flops, held, tuple(rules), tuple(swapped), product)


def _plain(uses: Sequence[Use]) -> float:
    """Returns the operations of the gradient in a plain step, for one example."""
    return sum(_plain_of(use.rule) for use in uses)


def _plain_of(rule: Any) -> float:
    if isinstance(rule, Dense | Conv):
        return 2.0 * math.prod(rule.sizes)
    if isinstance(rule, Gather):
        return 2.0 * math.prod(rule.sizes) / rule.sizes[2]
    turns = math.prod(rule.site.loops)
    return 2.0 * turns * sum(math.prod(aval.shape) for aval in rule.site.avals)
