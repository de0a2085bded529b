"""The form that makes the gradient of every example, for any block."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from dpkernels._compat import bind
from dpkernels.tapped import rows
from dpkernels.tapped.blocks import Block
from dpkernels.tapped.chunks import map_examples, sum_examples
from dpkernels.tapped.conv import Conv
from dpkernels.tapped.dense import Dense
from dpkernels.tapped.forms import AT_ONCE, Arrays, Form, Found, Values, l2_norms, only
from dpkernels.tapped.generic import Generic
from dpkernels.tapped.graph import Graph
from dpkernels.tapped.views import carry_back, from_memory_order, in_memory_order

# As `AT_ONCE`, for what is seldom run, and must cost no memory.
_CAREFULLY_AT_ONCE = 2**20


@dataclass(frozen=True)
class Product(Form):
    """The gradient of every example.

    Attributes:
        is_stored: Whether they are kept for the clipped sum.
        unrolled: How many products that are written out one by one go into one turn of a loop.
    """

    name: ClassVar[str] = "product"
    is_stored: bool
    unrolled: int

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
            return l2_norms(kept)
        return self.norms_formed_anew(values, self._at_once(values, False))

    def norms_formed_anew(self, values: Values, at_once: int) -> Arrays:
        """Returns the norms of gradients that are formed once more, so many at once."""
        return map_examples(
            lambda part: l2_norms(self._products(values, part)),
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
        most = max(1, (_CAREFULLY_AT_ONCE if carefully else AT_ONCE) // size)
        is_unrolled = any(isinstance(use.rule, Dense | Conv) for use in self.block.uses)
        return min(most, 1 if carefully else self.unrolled) if is_unrolled else most

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


def _weighted(factors: Arrays, each: Arrays, keep: jax.Array | None) -> Arrays:
    if keep is not None:
        each = [only(keep, x) for x in each]
    return [
        jnp.tensordot(factor.astype(x.dtype), x, 1, precision=lax.Precision.HIGHEST)
        for factor, x in zip(factors, each, strict=True)
    ]
