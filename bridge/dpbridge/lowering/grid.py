"""Sampling of an image, or a volume, at places that are data themselves."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from dpbridge.lowering.dtypes import widen
from dpbridge.lowering.table import Call, register_lowering

aten = torch.ops.aten

LINEAR, NEAREST = range(2)
ZEROS, BORDER = range(2)


@register_lowering(aten.grid_sampler.default)
def _grid_sampler(
    call: Call, x: jax.Array, grid: jax.Array, mode: int, padding: int, align_corners: bool
) -> jax.Array:
    if mode not in (LINEAR, NEAREST) or padding not in (ZEROS, BORDER):
        raise call.refuse(
            "only the modes 'bilinear' and 'nearest' with padding_mode 'zeros' or 'border' have a "
            "rule. Use one of those."
        )
    # The last coordinate of the grid is that of the first axis of space.
    places = [
        _place(widen(grid[..., -1 - axis]), size, padding, align_corners)
        for axis, size in enumerate(x.shape[2:])
    ]
    corners = itertools.product((0, 1), repeat=len(places)) if mode == LINEAR else [None]
    channels_last = jnp.moveaxis(widen(x), 1, -1)
    total = sum(_at_corner(channels_last, places, corner) for corner in corners)
    return jnp.moveaxis(jnp.asarray(total), -1, 1)


def _place(coordinate: jax.Array, size: int, padding: int, align_corners: bool) -> jax.Array:
    """Returns where along an axis, in units of its elements, a coordinate in [-1, 1] lies."""
    place = (
        (coordinate + 1) / 2 * (size - 1) if align_corners else ((coordinate + 1) * size - 1) / 2
    )
    if padding == ZEROS:
        return place
    is_inside = (place > 0) & (place < size - 1)  # beyond, and there, torch's gradient is 0
    return jnp.where(is_inside, place, lax.stop_gradient(jnp.clip(place, 0, size - 1)))


def _at_corner(
    x: jax.Array, places: Sequence[jax.Array], corner: tuple[int, ...] | None
) -> jax.Array:
    """Returns the elements next to the places, on one side of them, times their weights.

    Args:
        x: `(batch, *space, channels)`.
        places: For each axis of space, `(batch, *outputs)`.
        corner: For each axis 0 for below, 1 for above; None for the nearest.
    """
    batch = jnp.arange(x.shape[0]).reshape(-1, *(1,) * (places[0].ndim - 1))
    index, weight = [batch], jnp.ones((), x.dtype)
    for axis, place in enumerate(places):
        floor = lax.stop_gradient(jnp.round(place) if corner is None else jnp.floor(place))
        if corner is not None:
            share = place - floor
            weight = weight * (share if corner[axis] else 1 - share)
            floor = floor + corner[axis]
        is_inside = (floor >= 0) & (floor <= x.shape[axis + 1] - 1)
        weight = jnp.where(is_inside, weight, 0)
        index.append(jnp.where(is_inside, floor, 0).astype(jnp.int32))
    return x[tuple(index)] * weight[..., None]


@register_lowering(aten.affine_grid_generator.default)
def _affine_grid(
    call: Call, theta: jax.Array, size: Sequence[int], align_corners: bool
) -> jax.Array:
    outputs = size[2:]
    axes = [_coordinates(count, align_corners) for count in outputs]
    grid = np.stack([*np.meshgrid(*axes, indexing="ij")[::-1], np.ones(outputs)], axis=-1)
    points = jnp.asarray(grid, theta.dtype)
    return jnp.einsum("...i,nji->n...j", points, theta, precision=lax.Precision.HIGHEST)


def _coordinates(count: int, align_corners: bool) -> np.ndarray:
    if align_corners:
        return np.linspace(-1, 1, count) if count > 1 else np.zeros(1)
    return (2 * np.arange(count) + 1) / count - 1
