"""Losses of predictions against targets."""

from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax
from jax.scipy import special

from dpbridge.lowering.dtypes import widen
from dpbridge.lowering.elementwise import absolute
from dpbridge.lowering.table import Call, register_lowering

aten = torch.ops.aten

NONE, MEAN, SUM = range(3)


def reduce(values: jax.Array, reduction: int, weight: jax.Array | None = None) -> jax.Array:
    """Returns the values, each times its weight if there is one; their mean or their sum."""
    if weight is not None:
        values = values * weight.astype(values.dtype)
    if reduction == NONE:
        return values
    return jnp.mean(values) if reduction == MEAN else jnp.sum(values)


def in_dtype_of(call: Call, *values: jax.Array) -> list[jax.Array]:
    """Casts to the dtype of the result, or wider."""
    return [widen(value.astype(call.dtype)) for value in values]


@register_lowering(aten.cross_entropy_loss.default)
def _cross_entropy(
    call: Call,
    x: jax.Array,
    target: jax.Array,
    weight: jax.Array | None = None,
    reduction: int = MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> jax.Array:
    axis = _class_axis(x)
    x = widen(x)
    shifted = x - lax.stop_gradient(jnp.max(x, axis, keepdims=True))
    log_norm = jnp.log(jnp.sum(jnp.exp(shifted), axis))
    if jnp.issubdtype(target.dtype, jnp.floating):
        log_probs = shifted - jnp.expand_dims(log_norm, axis)
        return _soft_cross_entropy(log_probs, target, weight, reduction, label_smoothing)
    labels, is_used = _labels(call, target, x.shape[axis], ignore_index)
    chosen = _pick(shifted, labels) - log_norm
    loss = _negative_log_likelihood(chosen, labels, is_used, weight, reduction)
    if label_smoothing == 0:
        return loss
    log_probs = shifted - jnp.expand_dims(log_norm, axis)
    smooth = _smooth_loss(log_probs, labels, is_used, weight, reduction)
    return (1 - label_smoothing) * loss + label_smoothing / x.shape[axis] * smooth


def _smooth_loss(
    log_probs: jax.Array,
    labels: jax.Array,
    is_used: jax.Array,
    weight: jax.Array | None,
    reduction: int,
) -> jax.Array:
    """The loss against all classes alike."""
    if weight is not None:
        log_probs = log_probs * _channelwise(weight, log_probs)
    loss = jnp.where(is_used, -jnp.sum(log_probs, _class_axis(log_probs)), 0)
    if reduction == MEAN:
        return _ratio(jnp.sum(loss), _weight_sum(labels, is_used, weight, loss.dtype))
    return reduce(loss, reduction)


def _soft_cross_entropy(
    log_probs: jax.Array,
    target: jax.Array,
    weight: jax.Array | None,
    reduction: int,
    label_smoothing: float,
) -> jax.Array:
    axis = _class_axis(log_probs)
    target = target.astype(log_probs.dtype) * (1 - label_smoothing)
    target = target + label_smoothing / log_probs.shape[axis]
    if weight is not None:
        target = target * _channelwise(weight, log_probs)
    return reduce(-jnp.sum(log_probs * target, axis), reduction)


@register_lowering(aten.nll_loss_nd.default, aten.nll_loss.default, aten.nll_loss2d.default)
def _nll_loss(
    call: Call,
    x: jax.Array,
    target: jax.Array,
    weight: jax.Array | None = None,
    reduction: int = MEAN,
    ignore_index: int = -100,
) -> jax.Array:
    labels, is_used = _labels(call, target, x.shape[_class_axis(x)], ignore_index)
    return _negative_log_likelihood(_pick(widen(x), labels), labels, is_used, weight, reduction)


def _class_axis(x: jax.Array) -> int:
    return 0 if x.ndim == 1 else 1


def _pick(x: jax.Array, labels: jax.Array) -> jax.Array:
    axis = _class_axis(x)
    return jnp.take_along_axis(x, jnp.expand_dims(labels, axis), axis).squeeze(axis)


def _labels(
    call: Call, target: jax.Array, classes: int, ignore_index: int
) -> tuple[jax.Array, jax.Array]:
    """Returns labels that are safe to gather with, and which of them count."""
    is_used = target != ignore_index
    is_label = (target >= 0) & (target < classes)
    allowed = f"labels must be in [0, {classes}) or equal ignore_index={ignore_index}"
    call.require(is_label | ~is_used, allowed)
    return jnp.where(is_used & is_label, target, 0), is_used


def _negative_log_likelihood(
    chosen: jax.Array,
    labels: jax.Array,
    is_used: jax.Array,
    weight: jax.Array | None,
    reduction: int,
) -> jax.Array:
    loss = -chosen
    if weight is not None:
        loss = loss * weight.astype(loss.dtype)[labels]
    loss = jnp.where(is_used, loss, 0)
    if reduction == MEAN:
        return _ratio(jnp.sum(loss), _weight_sum(labels, is_used, weight, loss.dtype))
    return reduce(loss, reduction)


def _weight_sum(
    labels: jax.Array, is_used: jax.Array, weight: jax.Array | None, dtype: Any
) -> jax.Array:
    weights = 1 if weight is None else weight.astype(dtype)[labels]
    return jnp.sum(jnp.where(is_used, weights, jnp.zeros((), dtype)))


def _ratio(total: jax.Array, count: jax.Array) -> jax.Array:
    """The mean; over nothing it is NaN, but its gradient is 0, as in torch."""
    is_empty = count == 0
    return jnp.where(is_empty, jnp.nan, total / jnp.where(is_empty, 1, count))


def _channelwise(weight: jax.Array, x: jax.Array) -> jax.Array:
    return weight.astype(x.dtype).reshape(-1, *(1,) * max(x.ndim - 2, 0))


@register_lowering(aten.mse_loss.default)
def _mse_loss(call: Call, x: jax.Array, target: jax.Array, reduction: int = MEAN) -> jax.Array:
    x, target = in_dtype_of(call, x, target)
    return reduce(jnp.square(x - target), reduction)


@register_lowering(aten.l1_loss.default)
def _l1_loss(call: Call, x: jax.Array, target: jax.Array, reduction: int = MEAN) -> jax.Array:
    x, target = in_dtype_of(call, x, target)
    return reduce(absolute(x - target), reduction)


@register_lowering(aten.smooth_l1_loss.default)
def _smooth_l1_loss(
    call: Call, x: jax.Array, target: jax.Array, reduction: int = MEAN, beta: float = 1.0
) -> jax.Array:
    if beta == 0:
        return _l1_loss(call, x, target, reduction)
    x, target = in_dtype_of(call, x, target)
    size = absolute(x - target)
    loss = jnp.where(size < beta, 0.5 / beta * jnp.square(x - target), size - 0.5 * beta)
    return reduce(loss, reduction)


@register_lowering(aten.huber_loss.default)
def _huber_loss(
    call: Call, x: jax.Array, target: jax.Array, reduction: int = MEAN, delta: float = 1.0
) -> jax.Array:
    x, target = in_dtype_of(call, x, target)
    size = absolute(x - target)
    loss = jnp.where(size <= delta, 0.5 * jnp.square(x - target), delta * (size - 0.5 * delta))
    return reduce(loss, reduction)


@jax.custom_jvp
def _entropy(x: jax.Array, target: jax.Array) -> jax.Array:
    log_x, log_other = jnp.maximum(jnp.log(x), -100), jnp.maximum(jnp.log1p(-x), -100)
    return (target - 1) * log_other - target * log_x


@_entropy.defjvp
def _entropy_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Torch bounds the slope, which at x = 0 or 1 is not that of the bounded logarithm."""
    x, target = primals
    slope = (x - target) / jnp.maximum((1 - x) * x, 1e-12)
    slope_of_target = jnp.log1p(-x) - jnp.log(x)
    return _entropy(x, target), slope * tangents[0] + slope_of_target * tangents[1]


@register_lowering(aten.binary_cross_entropy.default)
def _binary_cross_entropy(
    call: Call,
    x: jax.Array,
    target: jax.Array,
    weight: jax.Array | None = None,
    reduction: int = MEAN,
) -> jax.Array:
    x, target = in_dtype_of(call, x, target)
    call.require((x >= 0) & (x <= 1), "inputs of binary_cross_entropy must be in [0, 1]")
    loss = _entropy(x, target)
    return reduce(loss, reduction, weight)


@register_lowering(aten.binary_cross_entropy_with_logits.default)
def _binary_cross_entropy_with_logits(
    call: Call,
    x: jax.Array,
    target: jax.Array,
    weight: jax.Array | None = None,
    pos_weight: jax.Array | None = None,
    reduction: int = MEAN,
) -> jax.Array:
    x, target = in_dtype_of(call, x, target)
    positive = 1 if pos_weight is None else (pos_weight.astype(x.dtype) - 1) * target + 1
    loss = (1 - target) * x + positive * jax.nn.softplus(-x)
    return reduce(loss, reduction, weight)


@register_lowering(aten.kl_div.default)
def _kl_div(
    call: Call,
    x: jax.Array,
    target: jax.Array,
    reduction: int = MEAN,
    *,
    log_target: bool = False,
) -> jax.Array:
    x, target = in_dtype_of(call, x, target)
    if log_target:
        return reduce(jnp.exp(target) * (target - x), reduction)
    return reduce(special.xlogy(target, target) - target * x, reduction)


@register_lowering(aten.poisson_nll_loss.default)
def _poisson_nll_loss(
    call: Call,
    x: jax.Array,
    target: jax.Array,
    log_input: bool,
    full: bool,
    eps: float,
    reduction: int,
) -> jax.Array:
    x, target = in_dtype_of(call, x, target)
    loss = jnp.exp(x) - target * x if log_input else x - target * jnp.log(x + eps)
    if full:
        safe = jnp.where(target > 1, target, 2.0)
        stirling = safe * jnp.log(safe) - safe + 0.5 * jnp.log(2 * jnp.pi * safe)
        loss = loss + jnp.where(target > 1, stirling, 0)
    return reduce(loss, reduction)
