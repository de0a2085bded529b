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
from dpkernels.tapped.gather import Bag, Gather
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
        is_safe: `(batch,)` bools: whether the squares can be relied on.
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

    def mended(self, values: Values, found: Found) -> Found:
        """Returns what `fast` found, with careful norms where this form loses digits by itself."""
        del values
        return found

    @abc.abstractmethod
    def careful_norms(self, values: Values, kept: Arrays) -> Arrays:
        """Returns `(batch,)` norms of the gradients themselves, for each of `norm_params`."""

    @abc.abstractmethod
    def sums(
        self, values: Values, kept: Arrays, factors: Arrays, keep: jax.Array | None
    ) -> dict[int, jax.Array]:
        """Returns the clipped sums.

        Args:
            values: The arrays.
            kept: What `fast` kept, or `mended`.
            factors: `(batch,)`, for each of `norm_params`.
            keep: None if all numbers are finite; otherwise `(batch,)` bools that say of which
                examples anything is to be taken, and the sums go with careful norms.
        """

    def _at_only_use(self, values: Values) -> tuple[Arrays, Arrays]:
        """Returns what the site of a block's only use saved, and its gradients."""
        (saved,), (dy,) = values.of(self.block.uses)
        return saved, dy

    def _plain_sum(
        self,
        values: Values,
        rules: Sequence[Dense | Conv | Gather],
        factor: jax.Array,
        keep: jax.Array | None = None,
    ) -> dict[int, jax.Array]:
        """The contraction that plain training does, with weighted gradients."""
        view = self.block.uses[0].view
        shape = values.graph.avals[view.ref].shape
        flat = jnp.zeros((math.prod(shape),), jnp.float32)
        for use, rule, saved, dy in zip(
            self.block.uses, rules, *values.of(self.block.uses), strict=True
        ):
            if keep is not None:
                saved, dy = ([only(keep, x) for x in arrays] for arrays in (saved, dy))
            total = in_memory_order(rule.weighted_sum(saved, dy, factor), use.view, 0)
            flat = flat.astype(total.dtype) + total
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
            squares = [rows.squared_norms(x) for x in each]
            return squares, each if self.is_stored else []

        at_once = self._at_once(values, False)
        squares, kept = map_examples(of_part, values.of(self.block.uses), at_once)
        return Found(squares, kept, jnp.ones(squares[0].shape, bool))

    def careful_norms(self, values: Values, kept: Arrays) -> Arrays:
        if kept:
            return _norms(kept)
        return self.norms_formed_anew(values, self._at_once(values, False))

    def norms_formed_anew(self, values: Values, at_once: int) -> Arrays:
        """Returns the norms of gradients that are formed once more, so many at once."""
        return map_examples(
            lambda part: _norms(self._products(values, part)),
            values.of(self.block.uses),
            at_once,
        )

    def sums(
        self, values: Values, kept: Arrays, factors: Arrays, keep: jax.Array | None
    ) -> dict[int, jax.Array]:
        if not kept:
            return self.sums_formed_anew(values, factors, keep, self._at_once(values, False))
        return self._by_param(values, _weighted(factors, kept, keep))

    def sums_formed_anew(
        self, values: Values, factors: Arrays, keep: jax.Array | None, at_once: int
    ) -> dict[int, jax.Array]:
        """Returns the sums from gradients that are formed once more.

        Not from the contraction of plain training: where terms cancel, or a derivative rule is not
        linear, that has another norm than the one that the factors were made for.
        """
        totals = sum_examples(
            lambda part: _weighted(part[1], self._products(values, part[0]), part[2]),
            (values.of(self.block.uses), factors, keep),
            at_once,
        )
        return self._by_param(values, totals)

    def _by_param(self, values: Values, totals: Arrays) -> dict[int, jax.Array]:
        if not self.block.is_view:
            return dict(zip(self.block.params, totals, strict=True))
        view = self.block.uses[0].view
        if self._only is not None:
            return carry_back(values.graph, view, self._only.as_weight(totals[0], 0))
        shape = values.graph.avals[view.ref].shape
        return carry_back(values.graph, view, from_memory_order(totals[0], view, shape))

    @property
    def _only(self) -> Conv | None:
        """The rule of a convolution whose kernel is used nowhere else.

        Its products stay as they come out: bringing each into the order of the kernel costs more
        than writing it.
        """
        rule = self.block.uses[0].rule
        is_single = self.block.is_view and len(self.block.uses) == 1
        return rule if is_single and isinstance(rule, Conv) else None

    def carefully_at_once(self, values: Values) -> int:
        """Returns for how many examples gradients are formed together where that is seldom."""
        return self._at_once(values, True)

    def _at_once(self, values: Values, carefully: bool) -> int:
        """Returns for how many examples gradients are formed together."""
        size = 4 * max(1, gradient_size(self.block, values.graph))
        most = max(1, (_CAREFULLY_AT_ONCE if carefully else _AT_ONCE) // size)
        is_unrolled = any(isinstance(use.rule, Dense | Conv) for use in self.block.uses)
        return min(most, 1 if carefully else _UNROLLED) if is_unrolled else most

    def _products(self, values: Values, part: Any) -> Arrays:
        """Returns the gradient of every example: one array for a view, or one a parameter."""
        if self._only is not None:
            each = self._only.raw_product(part[0][0], part[1][0])
            return [each.reshape(each.shape[0], -1)]
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
        return Found([found.squared], [], found.is_safe)

    def careful_norms(self, values: Values, kept: Arrays) -> Arrays:
        left, right = (jax.vmap(jax.vmap(l2_norm))(side) for side in self._sides(values))
        return _norms([left * right])

    def sums(
        self, values: Values, kept: Arrays, factors: Arrays, keep: jax.Array | None
    ) -> dict[int, jax.Array]:
        return self._plain_sum(values, [self.rule], factors[0], keep)

    def _sides(self, values: Values) -> tuple[jax.Array, jax.Array]:
        pair = self.rule.rows(*self._at_only_use(values))
        return pair.left[:, :, 0], pair.right[:, :, 0]


@dataclass(frozen=True)
class Merged(Form):
    """Looked-up rows, those of one index put together.

    Attributes:
        rule: The use's rule.
        scatters: See `Gather.merged`.
    """

    name: ClassVar[str] = "merged"
    rule: Gather
    scatters: bool

    def fast(self, values: Values, limit: jax.Array) -> Found:
        merged = self.rule.merged(*self._at_only_use(values), scatters=self.scatters)
        squares = rows.squared_norms(merged)
        return Found([squares], [merged], jnp.ones(squares.shape, bool))

    def careful_norms(self, values: Values, kept: Arrays) -> Arrays:
        return _norms(kept)

    def sums(
        self, values: Values, kept: Arrays, factors: Arrays, keep: jax.Array | None
    ) -> dict[int, jax.Array]:
        saved, _ = self._at_only_use(values)
        merged = kept[0] if keep is None else only(keep, kept[0])
        total = self.rule.scattered(saved, merged, factors[0])
        return carry_back(values.graph, self.block.uses[0].view, total)


@dataclass(frozen=True)
class Counted(Form):
    """A sum of looked-up rows: its gradient, and how often each row was looked up."""

    name: ClassVar[str] = "counted"
    rule: Bag

    def fast(self, values: Values, limit: jax.Array) -> Found:
        saved, dy = self._at_only_use(values)
        counts = self.rule.counts(saved)
        energy = rows.squared_norms(rows.widened(dy[0]))
        squares = energy * rows.squared_norms(counts).astype(energy.dtype)
        return Found([squares], [counts], energy <= limit)

    def careful_norms(self, values: Values, kept: Arrays) -> Arrays:
        _, dy = self._at_only_use(values)
        counts, norms = _norms([kept[0], rows.widened(dy[0])])
        # Of rows that are all outside the table nothing is taken, whatever their gradient is.
        return [jnp.where(counts == 0, 0, norms * counts.astype(norms.dtype))]

    def sums(
        self, values: Values, kept: Arrays, factors: Arrays, keep: jax.Array | None
    ) -> dict[int, jax.Array]:
        saved, dy = self._at_only_use(values)
        if keep is not None:
            dy = [only(keep, dy[0])]
        total = self.rule.counted_sum(saved, dy, factors[0], kept[0])
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
        return Found([found.squared], [], found.is_safe)

    def mended(self, values: Values, found: Found) -> Found:
        (squares,) = found.squares

        def from_products() -> jax.Array:
            (norms,) = self._norms_formed_anew(values)
            return jnp.where(found.is_safe, squares, jnp.square(norms))

        # Few blocks lose digits in a batch, if any, and only theirs are formed.
        is_safe = jnp.all(found.is_safe)
        squared = lax.cond(is_safe, lambda: squares, from_products)
        return Found([squared], [is_safe], jnp.isfinite(squared))

    def careful_norms(self, values: Values, kept: Arrays) -> Arrays:
        return self._norms_formed_anew(values)

    def sums(
        self, values: Values, kept: Arrays, factors: Arrays, keep: jax.Array | None
    ) -> dict[int, jax.Array]:
        def from_products() -> dict[int, jax.Array]:
            at_once = self.product.carefully_at_once(values)
            return self.product.sums_formed_anew(values, factors, keep, at_once)

        def plain() -> dict[int, jax.Array]:
            return self._plain_sum(values, self.rules, factors[0])

        if keep is not None:
            return from_products()
        return lax.cond(kept[0], plain, from_products) if kept else plain()

    def _norms_formed_anew(self, values: Values) -> Arrays:
        return self.product.norms_formed_anew(values, self.product.carefully_at_once(values))

    def _norms(self, part: Any, limit: jax.Array) -> rows.Norms:
        saved, dy = part
        own = [
            rows.own_sum(*rule.grams(*pair))
            for rule, *pair in zip(self.rules, saved, dy, strict=True)
        ]
        _, count, left, right = self.rules[0].sizes
        return rows.settle([*own, *self._cross_terms(saved, dy)], count + left + right, limit)

    def _cross_terms(self, saved: list[Arrays], dy: list[Arrays]) -> list[rows.Sum]:
        if len(self.rules) == 1:
            return []
        each = [
            rule.rows(*pair)
            for rule, *pair in zip(self.rules, saved, dy, strict=True)
            if not isinstance(rule, Conv)
        ]
        pairs = [(i, j) for i in range(len(each)) for j in range(i)]
        return [
            rows.sum_of(
                *rows.cross(each[i], each[j], swapped=self.swapped[i] != self.swapped[j]), 2.0
            )
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


def _weighted(factors: Arrays, each: Arrays, keep: jax.Array | None) -> Arrays:
    if keep is not None:
        each = [only(keep, x) for x in each]
    return [
        jnp.tensordot(factor.astype(x.dtype), x, 1, precision=lax.Precision.HIGHEST)
        for factor, x in zip(factors, each, strict=True)
    ]


def only(keep: jax.Array, array: jax.Array) -> jax.Array:
    """Returns the array `(batch, ...)` with zeros for the examples that are not kept."""
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return array
    return jnp.where(rows.per_example(keep, array), array, jnp.zeros((), array.dtype))
