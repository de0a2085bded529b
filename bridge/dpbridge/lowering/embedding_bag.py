"""Bags of embeddings: of the rows of each bag, their sum, mean or maximum."""

import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from dpbridge.lowering.dtypes import widen
from dpbridge.lowering.indexing import require_in_range
from dpbridge.lowering.table import Call, register_lowering

aten = torch.ops.aten

SUM, MEAN, MAX = range(3)


@dataclass(frozen=True)
class _EqualBags:
    """Bags of one size, one after the other: no more than another shape of the rows."""

    count: int

    def sum(self, x: jax.Array) -> jax.Array:
        return jnp.sum(self._grouped(x), axis=1)

    def first_maximum(self, rows: jax.Array) -> jax.Array:
        """Returns, for each bag and feature, which row has the maximum; of equal ones the first."""
        grouped = self._grouped(rows)
        starts = np.arange(self.count)[:, None] * grouped.shape[1]
        return jnp.argmax(grouped, axis=1) + starts

    def _grouped(self, x: jax.Array) -> jax.Array:
        return x.reshape(self.count, -1, *x.shape[1:])


@dataclass(frozen=True)
class _Bags:
    """Bags of any size. A row whose bag is `count` is in none."""

    count: int
    of_rows: jax.Array

    def sum(self, x: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(x, self.of_rows, self.count, indices_are_sorted=True)

    def first_maximum(self, rows: jax.Array) -> jax.Array:
        """As that of equal bags; for an empty bag it is any row."""
        greatest = jax.ops.segment_max(rows, self.of_rows, self.count, indices_are_sorted=True)
        is_greatest = rows == greatest.at[self.of_rows].get(mode="clip")
        positions = jnp.where(is_greatest, jnp.arange(len(rows))[:, None], len(rows))
        first = jax.ops.segment_min(positions, self.of_rows, self.count, indices_are_sorted=True)
        return jnp.minimum(first, len(rows) - 1)


@register_lowering(aten.embedding_bag.default, aten.embedding_bag.padding_idx)
def _embedding_bag(
    call: Call,
    weight: jax.Array,
    ids: jax.Array,
    offsets: jax.Array,
    scale_grad_by_freq: bool = False,
    mode: int = SUM,
    sparse: bool = False,
    per_sample_weights: jax.Array | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> list[jax.Array]:
    if scale_grad_by_freq:
        raise call.refuse("scale_grad_by_freq has no rule. Use scale_grad_by_freq=False.")
    if any(result.args[1] and result.users for result in call.node.users):
        raise call.refuse("only the first of its results has a rule. Use nn.EmbeddingBag.")
    require_in_range(call, ids, weight.shape[0], name="token ids")
    rows = widen(jnp.take(weight, ids, axis=0, mode="clip"))
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.astype(rows.dtype)[:, None]
    is_used = jnp.ones(ids.shape, bool)
    if padding_idx is not None:
        is_used = ids != padding_idx % weight.shape[0]
        rows = jnp.where(is_used[:, None], rows, 0)
    bags = _bags(call, offsets, ids.size, include_last_offset)
    result = _of_each_bag(bags, rows, is_used, mode)
    return [result, *(jnp.zeros(fake.shape, bool) for fake in call.result[1:])]


def _of_each_bag(
    bags: _EqualBags | _Bags, rows: jax.Array, is_used: jax.Array, mode: int
) -> jax.Array:
    """Returns `(bags, features)`, with zeros for bags that are empty."""
    if mode == SUM:
        return bags.sum(rows)
    counts = bags.sum(is_used.astype(rows.dtype))[:, None]
    if mode == MEAN:
        return bags.sum(rows) / jnp.maximum(counts, 1)
    candidates = jnp.where(is_used[:, None], jax.lax.stop_gradient(rows), -jnp.inf)
    chosen = jnp.take_along_axis(rows, bags.first_maximum(candidates), axis=0)
    return jnp.where(counts > 0, chosen, 0)


def _bags(
    call: Call, offsets: jax.Array, length: int, include_last_offset: bool
) -> _EqualBags | _Bags:
    count = offsets.size - include_last_offset
    if _are_equal(call.node.args[2], length, include_last_offset):
        return _EqualBags(count)
    is_ordered = (offsets[0] == 0) & jnp.all(offsets[1:] >= offsets[:-1])
    if include_last_offset:
        # Of ids after the last bag, torch takes some into it, as mode and dtype have it.
        is_end, end = offsets[-1] == length, "end with"
    else:
        is_end, end = offsets[-1] <= length, "be at most"
    bounds = f"offsets must begin with 0, not decrease, and {end} {length}"
    call.require(is_ordered & is_end, bounds)
    if count == 1:
        return _EqualBags(count)
    positions = jnp.arange(length, dtype=offsets.dtype)
    return _Bags(count, jnp.searchsorted(offsets, positions, side="right") - 1)


def _are_equal(offsets: Any, length: int, include_last_offset: bool) -> bool:
    """Whether the offsets are numbers such as nn.EmbeddingBag makes of ids in rows."""
    is_range = offsets.target is aten.arange.start_step and len(offsets.users) == 1
    if not is_range or not all(type(number) is int for number in offsets.args):
        return False
    bounds = [*range(*offsets.args), *([] if include_last_offset else [length])]
    sizes = {end - start for start, end in itertools.pairwise(bounds)}
    return bounds[0] == 0 and bounds[-1] == length and len(sizes) == 1
