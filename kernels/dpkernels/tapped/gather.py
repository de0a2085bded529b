"""Rows looked up in a table: embeddings, and bags of them."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives

from dpkernels._compat import inner_jaxpr
from dpkernels.tapped.graph import Site
from dpkernels.tapped.rows import Rows, widened
from dpkernels.tapped.views import View


@dataclass(frozen=True)
class Gather:
    """Whole rows of a table, by an index along its first axis.

    Attributes:
        site: The equation.
        view: Where the table comes from.
    """

    site: Site
    view: View

    @staticmethod
    def match(site: Site, view: View) -> "Gather | None":
        """Returns the use of the table if this equation is one."""
        if site.eqn is None or site.weights != (0,) or not takes_rows(site.eqn):
            return None
        if site.saved[0] != 1:
            return None
        return Gather(site, view)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Sizes of groups, rows, left (the table's length) and right (a row)."""
        table = self.site.eqn.invars[0].aval.shape
        right = math.prod(table[1:])
        rows = math.prod(self.site.loops) * self._look_up.outvars[0].aval.size // max(1, right)
        return 1, rows, table[0], right

    @property
    def _look_up(self) -> Any:
        """The equation that looks rows up."""
        return self.site.eqn

    def rows(self, saved: list[jax.Array], dy: list[jax.Array]) -> Rows:
        """Returns the gradient as a sum of outer products with indices on the left."""
        index, is_inside = self._index(saved)
        right = jnp.where(is_inside[..., None], self._right(dy), 0)
        return Rows(index, right[:, None])

    def _right(self, dy: list[jax.Array]) -> jax.Array:
        """Returns the gradients at the rows, `(batch, rows, size)`."""
        _, count, _, size = self.sizes
        return widened(dy[0]).reshape(-1, count, size)

    def grams(self, saved: list[jax.Array], dy: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Returns the Grams of both sides, `(batch, 1, rows, rows)`."""
        return self.rows(saved, dy).grams()

    def merged(self, saved: list[jax.Array], dy: list[jax.Array], *, scatters: bool) -> jax.Array:
        """Returns gradients `(batch, rows, size)` with all those of one index in its first row.

        The others are zero, so that the norm of these is the norm of the gradient.

        Args:
            saved: What the site saved.
            dy: Its gradients.
            scatters: Whether rows are added one after the other, which is quick and always the
                same on a CPU, rather than by a product with zeros and ones.
        """
        rows = self.rows(saved, dy)
        right = rows.right[:, 0]
        batch, count, size = right.shape
        places = jnp.arange(count, dtype=jnp.int32)
        if scatters:
            into = _places(rows.left)[0] + count * jnp.arange(batch, dtype=jnp.int32)[:, None]
            zeros = jnp.zeros((batch * count, size), right.dtype)
            flat = right.reshape(-1, size)
            added = zeros.at[into.reshape(-1)].add(flat, mode="promise_in_bounds")
            return added.reshape(right.shape)
        same = rows.left[:, :, None] == rows.left[:, None, :]
        chosen = same & (jnp.argmax(same, 2) == places)[:, :, None]
        batched = (((2,), (1,)), ((0,), (0,)))
        return lax.dot_general(
            chosen.astype(right.dtype), right, batched, precision=lax.Precision.HIGHEST
        )

    def scattered(self, saved: list[jax.Array], merged: jax.Array, factor: jax.Array) -> jax.Array:
        """Returns the sum of the merged gradients of all examples, each times its factor."""
        weighted = merged * factor[:, None, None].astype(merged.dtype)
        return self._added_up(self._index(saved)[0], weighted)

    def product(self, saved: list[jax.Array], dy: list[jax.Array]) -> jax.Array:
        """Returns the gradient of every example, `(batch, *table)`."""
        rows = self.rows(saved, dy)
        table = self.site.eqn.invars[0].aval.shape

        def one(index: jax.Array, right: jax.Array) -> jax.Array:
            zeros = jnp.zeros((table[0], right.shape[-1]), right.dtype)
            return zeros.at[index].add(right, mode="promise_in_bounds")

        return jax.vmap(one)(rows.left, rows.right[:, 0]).reshape(-1, *table)

    def weighted_sum(
        self, saved: list[jax.Array], dy: list[jax.Array], factor: jax.Array
    ) -> jax.Array:
        """Returns the sum of the gradients of all examples, each times its factor."""
        rows = self.rows(saved, dy)
        return self._added_up(rows.left, rows.right[:, 0] * factor[:, None, None])

    def _added_up(self, index: jax.Array, rows: jax.Array) -> jax.Array:
        table = self.site.eqn.invars[0].aval.shape
        zeros = jnp.zeros((table[0], rows.shape[-1]), rows.dtype)
        flat = rows.reshape(-1, rows.shape[-1])
        return zeros.at[index.reshape(-1)].add(flat, mode="promise_in_bounds").reshape(table)

    def _index(self, saved: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Returns `(batch, rows)` indices within the table, and which of them count."""
        _, count, length, _ = self.sizes
        index = saved[0].reshape(saved[0].shape[0], count)
        if index.dtype.itemsize < 4:  # A small type may not hold the table's length.
            index = index.astype(jnp.int32)
        inside = jnp.clip(index, 0, length - 1).astype(jnp.int32)
        if _drops_outside(self._look_up):
            return inside, (index >= 0) & (index < length)
        return inside, jnp.ones(index.shape, bool)


@dataclass(frozen=True)
class Bag(Gather):
    """The sum of an example's rows, as `bags` makes it: each row has the gradient of the sum.

    With n(v) rows of index v and the gradient c at the sum, the table's gradient has n(v) c in row
    v, and the norm |c| times the root of the sum of n(v)².
    """

    @staticmethod
    def match(site: Site, view: View) -> "Bag | None":
        """Returns the use of the table if this equation is one."""
        return Bag(site, view) if site.eqn is not None and is_bag(site.eqn) else None

    @property
    def _look_up(self) -> Any:
        return inner_jaxpr(self.site.eqn).eqns[0]

    def _right(self, dy: list[jax.Array]) -> jax.Array:
        _, count, _, size = self.sizes
        own = widened(dy[0]).reshape(-1, 1, size)
        return jnp.broadcast_to(own, (own.shape[0], count, size))

    def counts(self, saved: list[jax.Array]) -> jax.Array:
        """Returns `(batch, rows)`: at the first row of each index how many have it, otherwise 0."""
        index, is_inside = self._index(saved)
        first, counts = _places(jnp.where(is_inside, index, -1))
        is_first = first == jnp.arange(index.shape[1], dtype=jnp.int32)
        return jnp.where(is_first & is_inside, counts, 0).astype(jnp.float32)

    def counted_sum(
        self, saved: list[jax.Array], dy: list[jax.Array], factor: jax.Array, counts: jax.Array
    ) -> jax.Array:
        """Returns the sum of the gradients of all examples, each times its factor.

        What one example adds to a row is one product: added up n times, it would be rounded n
        times, and to the same side.
        """
        own = widened(dy[0]).reshape(dy[0].shape[0], 1, -1) * factor[:, None, None]
        times = counts[..., None]
        each = jnp.where(times == 0, 0, own * times.astype(own.dtype))
        return self._added_up(self._index(saved)[0], each)


def _places(index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns for every place the first one of its example with the same index, and their number.

    One place after the other: comparing all with all in one go, XLA on a CPU works every index out
    anew for every comparison, which takes ten times as long.

    Args:
        index: `(batch, rows)` integers.
    """
    count = index.shape[1]

    def look_at(turn: jax.Array, found: tuple[jax.Array, jax.Array]) -> Any:
        first, counts = found
        place = (count - 1 - turn).astype(jnp.int32)
        same = index == lax.dynamic_slice_in_dim(index, place, 1, 1)
        return jnp.where(same, place, first), counts + same.astype(jnp.int32)

    zeros = jnp.zeros(index.shape, jnp.int32)
    return lax.fori_loop(0, count, look_at, (zeros, zeros), unroll=4)


def is_bag(eqn: Any) -> bool:
    """Returns whether `bags` made the equation."""
    return eqn.primitive is primitives.jit_p and takes_rows(inner_jaxpr(eqn).eqns[0])


def takes_rows(eqn: Any) -> bool:
    """Returns whether the equation looks up whole rows along the first axis of its operand."""
    table = eqn.invars[0].aval
    if table.ndim == 0 or not jnp.issubdtype(table.dtype, jnp.floating) or not table.shape[0]:
        return False
    if eqn.primitive is primitives.gather_p:
        numbers = eqn.params["dimension_numbers"]
        ndim = eqn.outvars[0].aval.ndim
        return (
            tuple(eqn.params["slice_sizes"]) == (1, *table.shape[1:])
            and tuple(numbers.collapsed_slice_dims) == (0,)
            and tuple(numbers.start_index_map) == (0,)
            and tuple(numbers.offset_dims) == tuple(range(ndim - table.ndim + 1, ndim))
            and not numbers.operand_batching_dims
        )
    is_slice = eqn.primitive is primitives.dynamic_slice_p
    return is_slice and tuple(eqn.params["slice_sizes"]) == (1, *table.shape[1:])


def _drops_outside(eqn: Any) -> bool:
    """Returns whether an index outside the table has no gradient, not that of the nearest row.

    What promises to be inside and is not looks up the nearest row, and JAX drops its gradient.
    """
    if eqn.primitive is primitives.dynamic_slice_p:
        return False
    mode = lax.GatherScatterMode.from_any(eqn.params["mode"])
    return mode != lax.GatherScatterMode.CLIP
