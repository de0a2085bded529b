"""Clip one pytree to an L2 norm; round it to a grid."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def clip_pytree(
    pytree: PyTree, clip_norm: PyTree, rescale_to_unit_norm: bool = False
) -> tuple[PyTree, PyTree]:
    """Scales a pytree so that its L2 norm is at most `clip_norm`.

    | `clip_norm` | result | result, rescaled |
    |---|---|---|
    | 0 | zeros | g / norm |
    | C | g · min(1, C / norm) | g · min(1 / C, 1 / norm) |
    | infinity | g | zeros |
    | any, where norm = 0 | zeros | zeros |

    Args:
        pytree: Arrays of any shape.
        clip_norm: A non-negative number, or a prefix tree of `pytree` whose leaves clip the
            subtree below them each by itself. A traced negative number counts as 0.
        rescale_to_unit_norm: Divides by the clip norm after clipping, so that the bound is 1.

    Returns:
        The clipped pytree, leaves in their own dtype; and the norms before clipping, float32 or
        float64, in the structure of `clip_norm`. Finite pytrees have finite norms unless the norm
        itself exceeds the float's range.

    Raises:
        ValueError: If a static `clip_norm` is negative or NaN.

    Source:
        Abadi et al. 2016, section 3.1; De et al. 2022 (arXiv 2204.13650) for rescaling.

    Example:
        >>> clipped, norm = clip_pytree({"w": jnp.array([3.0, 4.0])}, 1.0)
        >>> float(norm), float(clipped["w"][0])
        (5.0, 0.6000000238418579)
    """
    for bound in jax.tree.leaves(clip_norm):
        check_clip_norm(bound)
    norms = jax.tree.map(lambda _, subtree: l2_norm(subtree), clip_norm, pytree)
    clipped = jax.tree.map(
        lambda bound, norm, subtree: scale_tree(
            subtree, clip_factor(norm, bound, rescale_to_unit_norm)
        ),
        clip_norm,
        norms,
        pytree,
    )
    return clipped, norms


def clip_and_round_to_grid(
    gradient: PyTree, l2_clip_norm: float | jax.Array, grid_scale: float
) -> tuple[PyTree, jax.Array]:
    """Clips and rounds a pytree to integers whose L2 norm is at most `grid_scale`.

    Rounding moves each of the P coordinates by up to half a step, so the norm is first clipped
    to C - √P · (C / grid_scale) / 2, which leaves room for it.

    Args:
        gradient: Arrays of any shape.
        l2_clip_norm: The clip norm C.
        grid_scale: How many grid steps C spans.

    Returns:
        An int64 pytree, and the norm before clipping.

    Raises:
        ValueError: If 64-bit types are off, or the grid is too coarse for so many coordinates.
    """
    if jax.dtypes.canonicalize_dtype(jnp.int64) != jnp.int64:
        raise ValueError(
            "`grid_scale` must be used with 64-bit types, got a process where they are off. "
            'Call jax.config.update("jax_enable_x64", True).'
        )
    count = sum(leaf.size for leaf in jax.tree.leaves(gradient))
    room = 1 - math.sqrt(count) / (2 * grid_scale)
    if room <= 0:
        raise ValueError(
            f"`grid_scale` must exceed {math.sqrt(count) / 2} for {count} coordinates, "
            f"got {grid_scale}. Use a finer grid."
        )
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), gradient)
    clipped, norm = clip_pytree(wide, l2_clip_norm * room)
    step = l2_clip_norm / grid_scale
    rounded = jax.tree.map(lambda leaf: jnp.round(leaf / step).astype(jnp.int64), clipped)
    return rounded, norm


def l2_norm(pytree: PyTree) -> jax.Array:
    """Returns the L2 norm of all leaves together, in float32 or better.

    Squares of coordinates above 1.8e19 overflow float32, and those below 1e-19 vanish; so all are
    first divided by the largest.
    """
    leaves = [leaf for leaf in jax.tree.leaves(pytree) if leaf.size]
    if not leaves:
        return jnp.zeros((), jnp.float32)
    kind = widest(leaves)
    sizes = [jnp.abs(leaf.astype(kind)) for leaf in leaves]
    largest = jnp.stack([jnp.max(size) for size in sizes]).max()
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    squares = jnp.stack([jnp.sum(jnp.square(size / unit)) for size in sizes])
    return unit * jnp.sqrt(squares.sum())


def clip_factor(norm: jax.Array, clip_norm: Any, rescale_to_unit_norm: bool) -> jax.Array:
    """Returns what a gradient of this norm is multiplied by (see `clip_pytree`)."""
    bound = jnp.maximum(jnp.asarray(clip_norm, norm.dtype), 0)
    if rescale_to_unit_norm:
        factor = jnp.minimum(1 / bound, 1 / norm)
    else:
        factor = jnp.minimum(1, bound / norm)
    return jnp.where(norm == 0, 1, factor)


def scale_tree(pytree: PyTree, factor: jax.Array) -> PyTree:
    """Multiplies in float32 or better, where a small factor does not underflow; casts back."""

    def scale(leaf: jax.Array) -> jax.Array:
        kind = widest([leaf, factor])
        return (leaf.astype(kind) * factor.astype(kind)).astype(leaf.dtype)

    return jax.tree.map(scale, pytree)


def widest(arrays: Sequence[jax.Array]) -> Any:
    """Returns the type in which norms and sums of these are computed: float32 or float64."""
    wide = any(array.dtype == jnp.float64 for array in arrays)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def check_clip_norm(clip_norm: Any) -> None:
    """Raises ValueError for a static clip norm that is negative or NaN."""
    if not isinstance(clip_norm, jax.core.Tracer) and not float(clip_norm) >= 0:
        raise ValueError(
            f"`l2_clip_norm` must be non-negative, got {clip_norm}. Pass the largest L2 norm "
            "that one example's gradient may have."
        )
