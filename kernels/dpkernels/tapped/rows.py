"""Gradients that are sums of outer products: squared norms and inner products from Grams.

With g = sum over t of left[t] ⊗ right[t], the squared norm is the sum over t and s of
⟨left[t], left[s]⟩ ⟨right[t], right[s]⟩ (Goodfellow 2015, arXiv 1510.01799; for more than one row
Li et al. 2022, arXiv 2110.05679, section 4.1).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dpkernels.tree_clipping import widest

# How far rounding may put a squared norm off; half of it for the norm.
_TOLERANCE = 2e-5
# How many numbers may be added up one after the other: where all are the same, a sum of 512 of them
# is up to 7e-6 off. Products of many rows are left to the library, which does no more at once.
_ADDED_AT_ONCE = 512
_FEW_ROWS = 16
# How many are, where there are more: the fastest of the lengths tried.
_ADDED_AT_FIRST = 32


class Norms(NamedTuple):
    """Squared norms, and whether they can be relied on.

    Attributes:
        squared: `(batch,)` squared norms.
        is_safe: `(batch,)` bools. False where numbers are so large or small, or cancel so far,
            that the norm has to be taken from the gradient itself.
    """

    squared: jax.Array
    is_safe: jax.Array


@dataclass(frozen=True)
class Rows:
    """One gradient as a sum of outer products.

    Attributes:
        left: `(batch, groups, rows, size)`; or `(batch, rows)` integers that stand for rows with
            a single one, each at that place.
        right: `(batch, groups, rows, size)`.
    """

    left: jax.Array
    right: jax.Array

    @property
    def is_one_hot(self) -> bool:
        """Whether the left side is given as indices."""
        return bool(jnp.issubdtype(self.left.dtype, jnp.integer))

    def grams(self) -> tuple[jax.Array, jax.Array]:
        """Returns the Grams of both sides, `(batch, groups, rows, rows)`."""
        return left_products(self, self), products(self.right, self.right)


def products(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the inner products of all rows, `(batch, groups, rows of a, rows of b)`."""
    size = a.shape[3]
    if size <= _ADDED_AT_ONCE or min(a.shape[2], b.shape[2]) > _FEW_ROWS:
        return _inner(a, b, (0, 1))
    a, b = (jnp.moveaxis(_split(side, _ADDED_AT_ONCE), 3, 0) for side in (a, b))
    each = _inner(a, b, (0, 1, 2))  # (parts, batch, groups, rows of a, rows of b)
    shape = each.shape[1:]
    return totals(jnp.moveaxis(each, 0, -1).reshape(math.prod(shape), len(each))).reshape(shape)


def _inner(a: jax.Array, b: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    last = a.ndim - 1
    return lax.dot_general(
        a, b, (((last,), (last,)), (batch, batch)), precision=lax.Precision.HIGHEST
    )


def left_products(a: Rows, b: Rows) -> jax.Array:
    """Returns the inner products of left rows, `(batch, groups, rows of a, rows of b)`."""
    if a.is_one_hot and b.is_one_hot:
        same = a.left[:, None, :, None] == b.left[:, None, None, :]
        return same.astype(b.right.dtype)
    if a.is_one_hot:
        return _entries(b.left, a.left).swapaxes(2, 3)
    if b.is_one_hot:
        return _entries(a.left, b.left)
    return products(a.left, b.left)


def _entries(dense: jax.Array, index: jax.Array) -> jax.Array:
    """Returns `dense[b, g, t, index[b, s]]`, `(batch, groups, rows t, rows s)`."""
    shape = (*dense.shape[:3], index.shape[1])
    return jnp.take_along_axis(dense, jnp.broadcast_to(index[:, None, None, :], shape), 3)


def cross(a: Rows, b: Rows, *, swapped: bool) -> tuple[jax.Array, jax.Array]:
    """Returns the Grams whose sum of products is the inner product of two gradients.

    Args:
        a: The one.
        b: The other.
        swapped: Whether what is left in `b` is right in `a`.
    """
    if not swapped:
        return left_products(a, b), products(a.right, b.right)
    left = _entries(b.right, a.left).swapaxes(2, 3) if a.is_one_hot else products(a.left, b.right)
    right = _entries(a.right, b.left) if b.is_one_hot else products(a.right, b.left)
    return left, right


class Sum(NamedTuple):
    """A sum of products of inner products, and how far it can be relied on.

    Attributes:
        total: `(batch,)` sums.
        size: `(batch,)` sums of absolute values: what their rounding is in proportion to.
        largest: `(batch,)` the largest squared norm of a row, on either side.
    """

    total: jax.Array
    size: jax.Array
    largest: jax.Array


def sum_of(left: jax.Array, right: jax.Array, weight: float = 1.0) -> Sum:
    """Sums the products of two Grams, `(batch, groups, rows, rows)`."""
    terms = left * right
    total, size = totals(terms), totals(jnp.abs(terms))
    return Sum(weight * total, weight * size, jnp.zeros_like(total))


def own_sum(left: jax.Array, right: jax.Array) -> Sum:
    """The same for the Grams of one gradient's rows with themselves."""
    ends = [jnp.diagonal(gram, axis1=2, axis2=3) for gram in (left, right)]
    largest = jnp.maximum(*(jnp.max(end, (1, 2), initial=0) for end in ends))
    return sum_of(left, right)._replace(largest=largest)


def settle(sums: Sequence[Sum], length: int, limit: jax.Array) -> Norms:
    """Adds sums up, and says for which examples they are norms that can be relied on.

    Where rows cancel, the sum keeps the rounding of its large terms, and the norm might come out
    too small: an example would be clipped too little.

    Args:
        sums: What to add up.
        length: How many numbers were added up for a sum's term, and how many terms for the sum.
        limit: How large a row's energy may be. Energies below the smallest float are lost.
    """
    total = jnp.stack([x.total for x in sums]).sum(0)
    size = jnp.stack([x.size for x in sums]).sum(0)
    largest = jnp.stack([x.largest for x in sums]).max(0)
    # As of roundings that go both ways. Numbers that repeat are rounded the same way each time, and
    # may be 1.5e-5 off; but then all terms are. The worst that was found for a total, searching
    # among rows of few different numbers that cancel, is 1e-5.
    rounding = (1 + 0.6 * math.sqrt(length)) * float(jnp.finfo(total.dtype).eps) * size
    is_safe = (rounding <= _TOLERANCE * total) & (largest <= limit)
    return Norms(total, is_safe & jnp.isfinite(total))


def outer_norms(left: jax.Array, right: jax.Array, limit: jax.Array) -> Norms:
    """Returns the norms where each group has one row, `(batch, groups, size)` on both sides."""
    sides = [
        squared_norms(side.reshape(-1, side.shape[2])).reshape(side.shape[:2])
        for side in (left, right)
    ]
    largest = jnp.maximum(*(jnp.max(side, 1, initial=0) for side in sides))
    total = jnp.sum(sides[0] * sides[1], 1)
    return Norms(total, (largest <= limit) & jnp.isfinite(total))


def squared_norms(array: jax.Array) -> jax.Array:
    """Returns the squared norm of every example's `(batch, ...)`."""
    return totals(jnp.square(array))


def totals(array: jax.Array) -> jax.Array:
    """Returns the sum of every example's `(batch, ...)`.

    A few numbers at a time, then sums of those: what is added to a large sum loses its last digits,
    and where numbers repeat, always to the same side. As products with ones, which XLA on a CPU
    does by vectors: a fifth of what its sums take.
    """
    sums = array.reshape(array.shape[0], math.prod(array.shape[1:]))
    while sums.shape[1] > _ADDED_AT_ONCE:
        sums = _sums_of_last(_split(sums, _ADDED_AT_FIRST))
    return _sums_of_last(sums)


def _sums_of_last(array: jax.Array) -> jax.Array:
    ones = jnp.ones(array.shape[-1:], array.dtype)
    return jnp.tensordot(array, ones, 1, precision=lax.Precision.HIGHEST)


def _split(array: jax.Array, length: int) -> jax.Array:
    """Returns the last axis in parts, `(..., parts, length)`, filled up with zeros."""
    count = -(-array.shape[-1] // length)
    lacking = count * length - array.shape[-1]
    widths = [(0, 0, 0)] * (array.ndim - 1) + [(0, lacking, 0)]
    padded = lax.pad(array, jnp.zeros((), array.dtype), widths) if lacking else array
    return padded.reshape(*array.shape[:-1], count, length)


def widened(array: Any) -> jax.Array:
    """Returns the array in float32 or better; complex ones as they are."""
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        return array
    return array.astype(widest([array]))


def per_example(values: jax.Array, like: jax.Array) -> jax.Array:
    """Returns `(batch,)` values with the axes that a product with `like`, `(batch, ...)`, needs."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))
