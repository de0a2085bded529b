"""What the forms have in common that norm and clipped sum of a block can take.

Each gives norms in two ways: fast, with a word on whether they can be relied on; and carefully,
from the gradients themselves. The clipped sum that goes with careful norms is one of the same
gradients: where large terms cancel, what is left depends on the order in which they are added up.
"""

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from dpkernels.tapped import rows
from dpkernels.tapped.blocks import Block, Use
from dpkernels.tapped.conv import Conv
from dpkernels.tapped.dense import Dense
from dpkernels.tapped.gather import Gather
from dpkernels.tapped.graph import Graph
from dpkernels.tapped.views import carry_back, from_memory_order, in_memory_order
from dpkernels.tree_clipping import l2_norm

Arrays = list[jax.Array]

# Bytes that are worked on at once in a loop over the batch.
AT_ONCE = 32 * 2**20


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


def l2_norms(each: Arrays) -> Arrays:
    """Returns the `(batch,)` norms of each array's examples, whatever the size of their numbers."""
    return [jax.vmap(l2_norm)(x) for x in each]


def only(keep: jax.Array, array: jax.Array) -> jax.Array:
    """Returns the array `(batch, ...)` with zeros for the examples that are not kept."""
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return array
    return jnp.where(rows.per_example(keep, array), array, jnp.zeros((), array.dtype))
