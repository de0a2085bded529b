"""Distances, and the losses that hold them apart by a margin."""

import jax
import jax.numpy as jnp
import torch
from jax import lax

from dpbridge.lowering.dtypes import Scalar, widen
from dpbridge.lowering.losses import MEAN, in_dtype_of, reduce
from dpbridge.lowering.reductions import vector_norm
from dpbridge.lowering.selection import bounded
from dpbridge.lowering.table import Call, register_lowering

aten = torch.ops.aten


@register_lowering(aten.soft_margin_loss.default)
def _soft_margin_loss(
    call: Call, x: jax.Array, target: jax.Array, reduction: int = MEAN
) -> jax.Array:
    x, target = in_dtype_of(call, x, target)
    return reduce(jnp.log1p(jnp.exp(-target * x)), reduction)


@register_lowering(aten.hinge_embedding_loss.default)
def _hinge_embedding_loss(
    call: Call, x: jax.Array, target: jax.Array, margin: float = 1.0, reduction: int = MEAN
) -> jax.Array:
    x = widen(x)
    apart = jnp.where(target != 1, bounded(margin - x, 0), 0)
    near = jnp.where(target != -1, x, 0)
    return reduce(apart + near, reduction)


@register_lowering(aten.margin_ranking_loss.default)
def _margin_ranking_loss(
    call: Call,
    first: jax.Array,
    second: jax.Array,
    target: jax.Array,
    margin: float = 0.0,
    reduction: int = MEAN,
) -> jax.Array:
    first, second, target = in_dtype_of(call, first, second, target)
    return reduce(bounded(-target * (first - second) + margin, 0), reduction)


@register_lowering(aten.cosine_embedding_loss.default)
def _cosine_embedding_loss(
    call: Call,
    first: jax.Array,
    second: jax.Array,
    target: jax.Array,
    margin: float = 0.0,
    reduction: int = MEAN,
) -> jax.Array:
    first, second = in_dtype_of(call, first, second)
    axis = min(first.ndim, second.ndim) - 1 if target.ndim == 0 else 1
    eps = 1e-12
    size = (jnp.sum(first * first, axis) + eps) * (jnp.sum(second * second, axis) + eps)
    cosine = jnp.sum(first * second, axis) / jnp.sqrt(size)
    alike = jnp.where(target == 1, 1 - cosine, 0)
    unlike = jnp.where(target == -1, bounded(cosine - margin, 0), 0)
    return reduce(alike + unlike, reduction)


@register_lowering(aten.cosine_similarity.default)
def _cosine_similarity(
    call: Call, first: jax.Array, second: jax.Array, dim: int = 1, eps: float = 1e-8
) -> jax.Array:
    first, second = jnp.broadcast_arrays(*in_dtype_of(call, first, second))
    unit = [x / _bounded_norm(x, dim, eps) for x in (first, second)]
    return jnp.sum(unit[0] * unit[1], dim)


def _bounded_norm(x: jax.Array, dim: int, eps: float) -> jax.Array:
    """A norm of at least eps. torch bounds it without gradient: the norm's own goes on."""
    norm = vector_norm(x, 2, dim, keepdim=True)
    return jnp.where(norm < eps, norm - lax.stop_gradient(norm) + eps, norm)


@register_lowering(aten.pairwise_distance.default)
def _pairwise_distance(
    call: Call,
    first: jax.Array,
    second: jax.Array,
    p: float = 2.0,
    eps: float = 1e-6,
    keepdim: bool = False,
) -> jax.Array:
    first, second = in_dtype_of(call, first, second)
    return vector_norm(first - second + eps, p, -1, keepdim)


@register_lowering(aten.cdist.default)
def _cdist(
    call: Call,
    first: jax.Array,
    second: jax.Array,
    p: float = 2.0,
    compute_mode: int | None = None,
) -> jax.Array:
    return vector_norm(first[..., :, None, :] - second[..., None, :, :], p, -1)


@register_lowering(aten.triplet_margin_loss.default)
def _triplet_margin_loss(
    call: Call,
    anchor: jax.Array,
    positive: jax.Array,
    negative: jax.Array,
    margin: float = 1.0,
    p: float = 2.0,
    eps: float = 1e-6,
    swap: bool = False,
    reduction: int = MEAN,
) -> jax.Array:
    anchor, positive, negative = in_dtype_of(call, anchor, positive, negative)
    near = vector_norm(anchor - positive + eps, p, -1)
    far = vector_norm(anchor - negative + eps, p, -1)
    if swap:
        far = jnp.minimum(far, vector_norm(positive - negative + eps, p, -1))
    return reduce(bounded(margin + near - far, 0), reduction)


@register_lowering(aten.multi_margin_loss.default)
def _multi_margin_loss(
    call: Call,
    x: jax.Array,
    target: jax.Array,
    p: Scalar = 1,
    margin: Scalar = 1,
    weight: jax.Array | None = None,
    reduction: int = MEAN,
) -> jax.Array:
    x = widen(x)
    rows, labels = jnp.atleast_2d(x), jnp.atleast_1d(target)
    call.require((labels >= 0) & (labels < x.shape[-1]), f"labels must be in [0, {x.shape[-1]})")
    own = jnp.take_along_axis(rows, labels[:, None], 1, mode="clip")
    slack = margin - own + rows
    loss = jnp.where(slack > 0, slack, 0) ** int(p)
    loss = loss if weight is None else loss * weight.astype(x.dtype)[labels][:, None]
    is_own = jnp.arange(x.shape[-1]) == labels[:, None]
    loss = jnp.sum(jnp.where(is_own, 0, loss), 1) / x.shape[-1]
    return reduce(loss.reshape(target.shape), reduction)
