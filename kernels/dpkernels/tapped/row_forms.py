"""The forms that find norms without any example's gradient, from the rows it is made of."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from dpkernels.tapped import rows
from dpkernels.tapped.chunks import map_examples
from dpkernels.tapped.conv import Conv
from dpkernels.tapped.dense import Dense
from dpkernels.tapped.forms import AT_ONCE, Arrays, Form, Found, Values, l2_norms, only
from dpkernels.tapped.gather import Bag, Gather
from dpkernels.tapped.product_form import Product
from dpkernels.tapped.views import carry_back
from dpkernels.tree_clipping import l2_norm


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
        return l2_norms([left * right])

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
        return l2_norms(kept)

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
        counts, norms = l2_norms([kept[0], rows.widened(dy[0])])
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
            max(1, int(AT_ONCE // max(1.0, self.bytes))),
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
