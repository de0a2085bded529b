"""The forms that norm and clipped sum of a block can take.

Each gives norms in two ways: fast, with a word on whether they can be relied on; and carefully,
from the gradients themselves. The clipped sum that goes with careful norms is one of the same
gradients: where large terms cancel, what is left depends on the order in which they are added up.
"""

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dpkernels._compat import bind
from dpkernels.tapped import rows
from dpkernels.tapped.blocks import Block, Use
from dpkernels.tapped.chunks import map_examples, sum_examples
from dpkernels.tapped.conv import Conv
from dpkernels.tapped.dense import Dense
from dpkernels.tapped.gather import Gather
from dpkernels.tapped.generic import Generic
from dpkernels.tapped.graph import Graph
from dpkernels.tapped.views import carry_back, from_memory_order, in_memory_order
from dpkernels.tree_clipping import l2_norm

Arrays = list[jax.Array]

# What is worked on at once in a loop over the batch.
_AT_ONCE = 32 * 2**20
# The same for what is seldom run, and must cost no memory.
_CAREFULLY_AT_ONCE = 2**20
# Products of single examples that are written out side by side, so that they can run side by side.
_UNROLLED = 4


@dataclass(frozen=True)
class Values:
    """The arrays of one step.

    Attributes:
        graph: The program.
        params: The parameters.
        outer: Values without a batch axis.
        saved: What each site saved, `(batch, *loops, ...)`.
        dy: The gradients at each site's outputs, `(batch, *loops, ...)`.
    """

    graph: Graph
    params: Arrays
    outer: dict[int, Any]
    saved: list[Arrays]
    dy: list[Arrays]

    def of(self, uses: Sequence[Use]) -> tuple[list[Arrays], list[Arrays]]:
        """Returns what these uses' sites saved, and their gradients."""
        return [self.saved[use.site] for use in uses], [self.dy[use.site] for use in uses]


class Found(NamedTuple):
    """Norms, found fast.

    Attributes:
        squares: `(batch,)` squared norms, for each of the form's `norm_params`.
        kept: What the clipped sum can be taken from, or nothing.
        is_safe: Whether the squares can be relied on, for every example.
    """

    squares: Arrays
    kept: Arrays
    is_safe: jax.Array


@dataclass(frozen=True)
class Form(abc.ABC):
    """How norm and clipped sum of a block are computed.

    Attributes:
        block: The block.
        flops: Floating point operations for both, for one example.
        bytes: Memory beside activations and their gradients, for one example.
    """

    name: ClassVar[str]
    block: Block
    flops: float
    bytes: float

    @property
    def norm_params(self) -> tuple[int, ...]:
        """The parameters that norms are given for; those in a view are under one clip norm."""
        return self.block.params[:1] if self.block.is_view else self.block.params

    @abc.abstractmethod
    def fast(self, values: Values, limit: jax.Array) -> Found:
        """Returns norms; `limit` is how large the energy of a row may be (`rows.settle`)."""

    @abc.abstractmethod
    def careful_norms(self, values: Values, kept: Arrays) -> Arrays:
        """Returns `(batch,)` norms of the gradients themselves, for each of `norm_params`."""

    @abc.abstractmethod
    def sums(
        self, values: Values, kept: Arrays, factors: Arrays, carefully: bool
    ) -> dict[int, jax.Array]:
        """Returns the clipped sums; `factors` are `(batch,)`, for each of `norm_params`."""

    def _plain_sum(self, values: Values, factor: jax.Array) -> dict[int, jax.Array]:
        """The contraction that plain training does, with weighted gradients."""
        view = self.block.uses[0].view
        shape = values.graph.avals[view.ref].shape
        flat: Any = 0
        for use in self.block.uses:
            saved, dy = values.saved[use.site], values.dy[use.site]
            if isinstance(use.rule, Generic):
                each = use.rule.weighted_sum(saved, dy, factor, values.outer)
                total = rows.widened(each[use.position])
            else:
                total = use.rule.weighted_sum(saved, dy, factor)
            flat = flat + in_memory_order(total, use.view, 0)
        return carry_back(values.graph, view, from_memory_order(flat, view, shape))


@dataclass(frozen=True)
class Product(Form):
    """The gradient of every example.

    Attributes:
        is_stored: Whether they are kept for the clipped sum.
    """

    name: ClassVar[str] = "product"
    is_stored: bool

    def fast(self, values: Values, limit: jax.Array) -> Found:
        def of_part(part: Any) -> tuple[Arrays, Arrays]:
            each = self._products(values, part)
            squares = [jnp.sum(jnp.square(x).reshape(x.shape[0], -1), 1) for x in each]
            return squares, each if self.is_stored else []

        at_once = self._at_once(values, False)
        squares, kept = map_examples(of_part, values.of(self.block.uses), at_once)
        return Found(squares, kept, jnp.ones((), bool))

    def careful_norms(self, values: Values, kept: Arrays) -> Arrays:
        if kept:
            return _norms(kept)
        return map_examples(
            lambda part: _norms(self._products(values, part)),
            values.of(self.block.uses),
            self._at_once(values, True),
        )

    def sums(
        self, values: Values, kept: Arrays, factors: Arrays, carefully: bool
    ) -> dict[int, jax.Array]:
        if kept:
            totals = _weighted(factors, kept)
        elif self.block.is_view and not carefully:
            return self._plain_sum(values, factors[0])
        else:
            totals = sum_examples(
                lambda part: _weighted(part[1], self._products(values, part[0])),
                (values.of(self.block.uses), factors),
                self._at_once(values, carefully),
            )
        if not self.block.is_view:
            return dict(zip(self.block.params, totals, strict=True))
        view = self.block.uses[0].view
        shape = values.graph.avals[view.ref].shape
        return carry_back(values.graph, view, from_memory_order(totals[0], view, shape))

    def _at_once(self, values: Values, carefully: bool) -> int:
        """Returns for how many examples gradients are formed together."""
        size = 4 * max(1, gradient_size(self.block, values.graph))
        most = max(1, (_CAREFULLY_AT_ONCE if carefully else _AT_ONCE) // size)
        is_unrolled = any(isinstance(use.rule, Dense | Conv) for use in self.block.uses)
        return min(most, 1 if carefully else _UNROLLED) if is_unrolled else most

    def _products(self, values: Values, part: Any) -> Arrays:
        """Returns the gradient of every example: one array for a view, or one a parameter."""
        by_ref: dict[int, Any] = {}
        flat: Any = 0
        for use, saved, dy in zip(self.block.uses, *part, strict=True):
            if isinstance(use.rule, Generic):
                product = use.rule.product(saved, dy, values.outer)[use.position]
            else:
                product = use.rule.product(saved, dy)
            if self.block.is_view:
                flat = flat + in_memory_order(product, use.view, 1)
            else:
                by_ref[use.view.ref] = by_ref.get(use.view.ref, 0) + product
        if self.block.is_view:
            return [flat]
        kinds = [values.outer[ref].dtype for ref in by_ref]
        cotangents = [x.astype(kind) for x, kind in zip(by_ref.values(), kinds, strict=True)]
        pull_back = _path(values, self.block.params, list(by_ref))
        return [rows.widened(x) for x in jax.vmap(pull_back)(cotangents)]


@dataclass(frozen=True)
class Outer(Form):
    """Norms of both sides of one outer product."""

    name: ClassVar[str] = "outer"
    rule: Dense

    def fast(self, values: Values, limit: jax.Array) -> Found:
        left, right = self._sides(values)
        found = rows.outer_norms(left, right, limit)
        return Found([found.squared], [], jnp.all(found.is_safe))

    def careful_norms(self, values: Values, kept: Arrays) -> Arrays:
        left, right = (jax.vmap(jax.vmap(l2_norm))(side) for side in self._sides(values))
        return _norms([left * right])

    def sums(
        self, values: Values, kept: Arrays, factors: Arrays, carefully: bool
    ) -> dict[int, jax.Array]:
        return self._plain_sum(values, factors[0])

    def _sides(self, values: Values) -> tuple[jax.Array, jax.Array]:
        site = self.block.uses[0].site
        pair = self.rule.rows(values.saved[site], values.dy[site])
        return pair.left[:, :, 0], pair.right[:, :, 0]


@dataclass(frozen=True)
class Merged(Form):
    """Looked-up rows, those of one index put together."""

    name: ClassVar[str] = "merged"
    rule: Gather

    def fast(self, values: Values, limit: jax.Array) -> Found:
        site = self.block.uses[0].site
        merged = self.rule.merged(values.saved[site], values.dy[site])
        return Found([jnp.sum(jnp.square(merged), (1, 2))], [merged], jnp.ones((), bool))

    def careful_norms(self, values: Values, kept: Arrays) -> Arrays:
        return _norms(kept)

    def sums(
        self, values: Values, kept: Arrays, factors: Arrays, carefully: bool
    ) -> dict[int, jax.Array]:
        saved = values.saved[self.block.uses[0].site]
        total = self.rule.scattered(saved, kept[0], factors[0])
        return carry_back(values.graph, self.block.uses[0].view, total)


@dataclass(frozen=True)
class Gram(Form):
    """Inner products of all rows, those of different uses included.

    Attributes:
        rules: The uses' rules.
        swapped: Which uses have left and right swapped, against the first.
        product: The same block's product form, for careful norms.
    """

    name: ClassVar[str] = "gram"
    rules: tuple[Dense | Conv | Gather, ...]
    swapped: tuple[bool, ...]
    product: Product

    def fast(self, values: Values, limit: jax.Array) -> Found:
        found = map_examples(
            lambda part: self._norms(part, limit),
            values.of(self.block.uses),
            max(1, int(_AT_ONCE // max(1.0, self.bytes))),
        )
        return Found([found.squared], [], jnp.all(found.is_safe))

    def careful_norms(self, values: Values, kept: Arrays) -> Arrays:
        return self.product.careful_norms(values, kept)

    def sums(
        self, values: Values, kept: Arrays, factors: Arrays, carefully: bool
    ) -> dict[int, jax.Array]:
        if carefully:
            return self.product.sums(values, kept, factors, carefully)
        return self._plain_sum(values, factors[0])

    def _norms(self, part: Any, limit: jax.Array) -> rows.Norms:
        saved, dy = part
        grams = [rule.grams(*pair) for rule, *pair in zip(self.rules, saved, dy, strict=True)]
        own = [jnp.sum(jnp.sum(left * right, 3), (1, 2)) for left, right in grams]
        total = jnp.stack([*own, *self._cross_terms(saved, dy)]).sum(0)
        energies = [rows.energies(*pair) for pair in grams]
        together = jnp.stack([energy.together for energy in energies]).sum(0) * len(energies)
        largest = jnp.stack([energy.largest for energy in energies]).max(0)
        return rows.settle(total, rows.Energies(together, largest), limit)

    def _cross_terms(self, saved: list[Arrays], dy: list[Arrays]) -> Arrays:
        if len(self.rules) == 1:
            return []
        each = [
            rule.rows(*pair)
            for rule, *pair in zip(self.rules, saved, dy, strict=True)
            if not isinstance(rule, Conv)
        ]
        pairs = [(i, j) for i in range(len(each)) for j in range(i)]
        return [
            2 * rows.cross(each[i], each[j], swapped=self.swapped[i] != self.swapped[j])
            for i, j in pairs
        ]


def gradient_size(block: Block, graph: Graph) -> int:
    """Returns how many numbers are formed for one example's gradient, those on the way included."""
    sizes = {use.view.ref: math.prod(graph.avals[use.view.ref].shape) for use in block.uses}
    if block.is_view:
        return sizes[block.uses[0].view.ref]
    on_the_way = sum(
        sizes[ref] for ref in {u.view.ref for u in block.uses if not isinstance(u.rule, Generic)}
    )
    return on_the_way + sum(math.prod(graph.avals[i].shape) for i in block.params)


def _path(values: Values, params: Sequence[int], refs: Sequence[int]) -> Callable[[Arrays], Arrays]:
    """Returns the derivative of what lies between parameters and their uses."""
    steps = values.graph.ancestors(refs)

    def forward(*own: jax.Array) -> Arrays:
        found = {**values.outer, **dict(zip(params, own, strict=True))}
        for step in steps:
            operands = [values.graph.read(atom, found) for atom in step.inputs]
            found.update(zip(step.outputs, bind(step.eqn, operands), strict=True))
        return [found[ref] for ref in refs]

    pull_back = jax.vjp(forward, *(values.params[i] for i in params))[1]
    return lambda cotangents: list(pull_back(cotangents))


def _norms(each: Arrays) -> Arrays:
    return [jax.vmap(l2_norm)(x) for x in each]


def _weighted(factors: Arrays, each: Arrays) -> Arrays:
    return [
        jnp.tensordot(factor.astype(x.dtype), x, 1, precision=lax.Precision.HIGHEST)
        for factor, x in zip(factors, each, strict=True)
    ]
