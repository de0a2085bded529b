"""Gradients that are sums of outer products: squared norms and inner products from Grams.

With g = sum over t of left[t] ⊗ right[t], the squared norm is the sum over t and s of
⟨left[t], left[s]⟩ ⟨right[t], right[s]⟩ (Goodfellow 2015, arXiv 1510.01799; for more than one row
Li et al. 2022, arXiv 2110.05679, section 4.1).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dpkernels.tree_clipping import widest

_ROUNDING = 4  # What the sum of products may be off by, in units of the type's precision.
_CANCELLED = 1e-3


class Norms(NamedTuple):
    """Squared norms, and whether they can be relied on.

    Attributes:
        squared: `(batch,)` squared norms, never below the true ones where `is_safe`.
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
    return lax.dot_general(a, b, (((3,), (3,)), ((0, 1), (0, 1))), precision=lax.Precision.HIGHEST)


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


def cross(a: Rows, b: Rows, *, swapped: bool) -> jax.Array:
    """Returns the inner products of two gradients, `(batch,)`.

    Args:
        a: The one.
        b: The other.
        swapped: Whether what is left in `b` is right in `a`.
    """
    if not swapped:
        gram = left_products(a, b) * products(a.right, b.right)
    elif a.is_one_hot:
        gram = _entries(b.right, a.left).swapaxes(2, 3) * products(a.right, b.left)
    elif b.is_one_hot:
        gram = _entries(a.right, b.left) * products(a.left, b.right)
    else:
        gram = products(a.left, b.right) * products(a.right, b.left)
    return jnp.sum(gram, (1, 2, 3))


class Energies(NamedTuple):
    """What is known of rows one by one.

    Attributes:
        together: `(batch,)` sums of squared norms of the outer products.
        largest: `(batch,)` the largest squared norm of a row, on either side.
    """

    together: jax.Array
    largest: jax.Array


def energies(left: jax.Array, right: jax.Array) -> Energies:
    """Returns the energies of rows from their Grams."""
    ends = [jnp.diagonal(gram, axis1=2, axis2=3) for gram in (left, right)]
    largest = jnp.maximum(*(jnp.max(end, (1, 2), initial=0) for end in ends))
    return Energies(jnp.sum(ends[0] * ends[1], (1, 2)), largest)


def settle(total: jax.Array, energy: Energies, limit: jax.Array) -> Norms:
    """Adds what rounding may have taken away, and says whether that is little enough.

    Where rows cancel, the sum of products keeps the rounding of its large terms, and the norm
    would come out too small: an example would be clipped too little.
    """
    rounding = _ROUNDING * jnp.finfo(total.dtype).eps * energy.together
    is_safe = (total >= _CANCELLED * energy.together) & (energy.largest <= limit)
    return Norms(total + rounding, is_safe & jnp.isfinite(total))


def outer_norms(left: jax.Array, right: jax.Array, limit: jax.Array) -> Norms:
    """Returns the norms where each group has one row, `(batch, groups, size)` on both sides."""
    sides = [jnp.sum(jnp.square(side), 2) for side in (left, right)]
    largest = jnp.maximum(*(jnp.max(side, 1, initial=0) for side in sides))
    total = jnp.sum(sides[0] * sides[1], 1)
    return Norms(total, (largest <= limit) & jnp.isfinite(total))


def widened(array: Any) -> jax.Array:
    """Returns the array in float32 or better; complex ones as they are."""
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        return array
    return array.astype(widest([array]))
