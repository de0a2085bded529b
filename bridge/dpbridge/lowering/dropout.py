"""Ops that draw: each call has a key of its own, each example and step another one."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import torch
from torch.fx import Node

from dpbridge.lowering.table import Call, register_lowering

aten = torch.ops.aten

_ALPHA = 1.7580993408473766
"""Minus the value that SELU tends to: what alpha dropout puts in place of an element."""


def keep_mask(call: Call, shape: tuple[int, ...], p: float) -> jax.Array:
    """Draws bools, True with probability 1 - p."""
    return jax.random.bernoulli(call.key(), jnp.float32(1 - p), shape)


def drop(
    call: Call, x: jax.Array, p: float, mask_shape: tuple[int, ...] | None = None
) -> jax.Array:
    """Zeroes elements with probability p and scales the others; without randomness, does not."""
    if p == 0:
        return x
    scale = 0.0 if p == 1 else 1 / (1 - p)
    mask = keep_mask(call, x.shape if mask_shape is None else mask_shape, p)
    factor = jnp.where(mask, jnp.asarray(scale, x.dtype), 0)
    return x * jnp.where(call.randomness, factor, 1)


def alpha_drop(
    call: Call, x: jax.Array, p: float, mask_shape: tuple[int, ...] | None = None
) -> jax.Array:
    """Puts `-_ALPHA` in place of elements, then restores mean and variance."""
    if p == 1:
        return jnp.where(call.randomness, x * 0, x)
    scale = ((_ALPHA**2 * p + 1) * (1 - p)) ** -0.5
    mask = keep_mask(call, x.shape if mask_shape is None else mask_shape, p)
    dropped = jnp.where(mask, x, -_ALPHA) * scale + _ALPHA * scale * p
    return jnp.where(call.randomness, dropped, x)


def _feature_shape(x: jax.Array) -> tuple[int, ...]:
    return x.shape[:2] + (1,) * (x.ndim - 2)


def _is_identity(node: Node) -> bool:
    _, p, train = node.args
    return bool(not train or p == 0)


def _register(op: object, function: Callable[..., jax.Array], by_feature: bool) -> None:
    @register_lowering(op, is_alias=_is_identity)
    def dropout(call: Call, x: jax.Array, p: float, train: bool) -> jax.Array:
        if _is_identity(call.node):
            return x
        return function(call, x, p, _feature_shape(x) if by_feature else None)


_register(aten.dropout.default, drop, False)
_register(aten.feature_dropout.default, drop, True)
_register(aten.alpha_dropout.default, alpha_drop, False)
_register(aten.feature_alpha_dropout.default, alpha_drop, True)


@register_lowering(aten.rrelu.default)
def _rrelu(
    call: Call,
    x: jax.Array,
    lower: float = 0.125,
    upper: float = 1 / 3,
    training: bool = False,
    generator: None = None,
) -> jax.Array:
    slope: float | jax.Array = (lower + upper) / 2
    if training:
        drawn = jax.random.uniform(call.key(), x.shape, x.dtype, lower, upper)
        slope = jnp.where(call.randomness, drawn, slope)
    return jnp.where(x > 0, x, x * slope)
