"""Ops that choose between numbers: bounds, extremes, masks."""

import functools

import jax
import jax.numpy as jnp
import torch

from dpbridge.lowering.dtypes import Operand
from dpbridge.lowering.elementwise import operands
from dpbridge.lowering.table import Call, register_lowering

aten = torch.ops.aten


@functools.cache
def _bounds_share() -> bool:
    """Whether an element equal to a bound shares the gradient with it.

    It does in torch 2.15, where a bound that is a number takes all of it; in 2.13 the element did.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros((), requires_grad=True)
        (gradient,) = torch.autograd.grad(x.clamp(0), x)
    return not gradient.item()


def bounded(x: jax.Array, low: Operand | None, high: Operand | None = None) -> jax.Array:
    """Clamps, with the gradient at the bounds that torch has."""
    if not _bounds_share():
        x = x if low is None else jnp.where(x < low, low, x)
        return x if high is None else jnp.where(x > high, high, x)
    if not (isinstance(low, jax.Array) or isinstance(high, jax.Array)):
        x = x if low is None else jnp.where(x <= low, low, x)
        return x if high is None else jnp.where(x >= high, high, x)
    shared = x if low is None else jnp.maximum(x, low)
    shared = shared if high is None else jnp.minimum(shared, high)
    if low is None or high is None:
        return shared
    # Where the bounds are equal, only one of the three gets the gradient.
    single = jnp.where(x < low, low, jnp.where(x > high, high, x))
    return jnp.where(low == high, single, shared)


@register_lowering(aten.fmax.default)
def _fmax(call: Call, x: jax.Array, y: jax.Array) -> jax.Array:
    x, y = operands(call, x, y)
    greatest = jnp.maximum(x, y) if _bounds_share() else jnp.where(x >= y, x, y)
    return jnp.where(jnp.isnan(x), y, jnp.where(jnp.isnan(y), x, greatest))


@register_lowering(aten.fmin.default)
def _fmin(call: Call, x: jax.Array, y: jax.Array) -> jax.Array:
    x, y = operands(call, x, y)
    least = jnp.minimum(x, y) if _bounds_share() else jnp.where(x <= y, x, y)
    return jnp.where(jnp.isnan(x), y, jnp.where(jnp.isnan(y), x, least))


@register_lowering(aten.clamp.default, aten.clamp.Tensor)
def _clamp(
    call: Call, x: jax.Array, low: Operand | None = None, high: Operand | None = None
) -> jax.Array:
    (x,) = operands(call, x)
    low, high = (
        bound.astype(x.dtype) if isinstance(bound, jax.Array) else bound for bound in (low, high)
    )
    return bounded(x, low, high)


@register_lowering(aten.clamp_min.default, aten.clamp_min.Tensor)
def _clamp_min(call: Call, x: jax.Array, low: Operand) -> jax.Array:
    return _clamp(call, x, low)


@register_lowering(aten.clamp_max.default, aten.clamp_max.Tensor)
def _clamp_max(call: Call, x: jax.Array, high: Operand) -> jax.Array:
    return _clamp(call, x, None, high)


@register_lowering(
    aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar
)
def _where(call: Call, condition: jax.Array, x: Operand, y: Operand) -> jax.Array:
    x, y = operands(call, x, y)
    return jnp.where(condition.astype(bool), x, y)


@register_lowering(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(call: Call, x: jax.Array, mask: jax.Array, value: Operand) -> jax.Array:
    return jnp.where(mask, jnp.asarray(value, x.dtype), x)


@register_lowering(aten.nan_to_num.default)
def _nan_to_num(
    call: Call,
    x: jax.Array,
    nan: float | None = None,
    posinf: float | None = None,
    neginf: float | None = None,
) -> jax.Array:
    limits = torch.finfo(call.result.dtype) if call.result.dtype.is_floating_point else None
    if limits is None:
        return x
    x = jnp.where(jnp.isnan(x), 0.0 if nan is None else nan, x)
    x = jnp.where(jnp.isposinf(x), limits.max if posinf is None else posinf, x)
    return jnp.where(jnp.isneginf(x), limits.min if neginf is None else neginf, x)
