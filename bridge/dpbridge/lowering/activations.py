"""The activations of torch.nn, with torch's derivative where they have a corner."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax

from dpbridge.lowering.dtypes import Scalar, widen
from dpbridge.lowering.table import Call, register_lowering

aten = torch.ops.aten


@register_lowering(aten.hardtanh.default)
def _hardtanh(call: Call, x: jax.Array, low: Scalar = -1.0, high: Scalar = 1.0) -> jax.Array:
    bounded = jnp.where(x >= high, jnp.asarray(high, x.dtype), x)
    return jnp.where(x <= low, jnp.asarray(low, x.dtype), bounded)


@register_lowering(aten.relu6.default)
def _relu6(call: Call, x: jax.Array) -> jax.Array:
    return _hardtanh(call, x, 0, 6)


@register_lowering(aten.hardsigmoid.default)
def _hardsigmoid(call: Call, x: jax.Array) -> jax.Array:
    return _hardtanh(call, widen(x) + 3, 0, 6) / 6


@register_lowering(aten.hardswish.default)
def _hardswish(call: Call, x: jax.Array) -> jax.Array:
    x = widen(x)
    return jnp.where(x <= -3, 0.0, jnp.where(x >= 3, x, x * (x + 3) / 6))


@register_lowering(aten.leaky_relu.default)
def _leaky_relu(call: Call, x: jax.Array, slope: Scalar = 0.01) -> jax.Array:
    return jnp.where(x > 0, x, x * slope)


@register_lowering(aten.prelu.default)
def _prelu(call: Call, x: jax.Array, weight: jax.Array) -> jax.Array:
    channel_last = (1,) * max(x.ndim - 2, 0)
    weight = weight.reshape(-1, *channel_last) if weight.size > 1 else weight.reshape(())
    return jnp.where(x > 0, x, x * weight)


@register_lowering(aten.threshold.default)
def _threshold(call: Call, x: jax.Array, limit: Scalar, value: Scalar) -> jax.Array:
    return jnp.where(x <= limit, jnp.asarray(value, x.dtype), x)


@register_lowering(aten.elu.default)
def _elu(
    call: Call, x: jax.Array, alpha: Scalar = 1, scale: Scalar = 1, input_scale: Scalar = 1
) -> jax.Array:
    x = widen(x)
    is_positive = x > 0
    negative = jnp.where(is_positive, 0.0, x)
    return jnp.where(is_positive, x * scale, jnp.expm1(negative * input_scale) * (alpha * scale))


@register_lowering(aten.celu.default)
def _celu(call: Call, x: jax.Array, alpha: Scalar = 1.0) -> jax.Array:
    return _elu(call, x, alpha, 1, 1 / alpha)


@register_lowering(aten.selu.default)
def _selu(call: Call, x: jax.Array) -> jax.Array:
    return _elu(call, x, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


@register_lowering(aten.gelu.default)
def _gelu(call: Call, x: jax.Array, approximate: str = "none") -> jax.Array:
    x = widen(x)
    if approximate == "tanh":
        return jax.nn.gelu(x, approximate=True)
    return x * (0.5 + 0.5 * lax.erf(x * math.sqrt(0.5)))  # `jax.nn.gelu` takes the slower erfc.


@register_lowering(aten.softplus.default)
def _softplus(call: Call, x: jax.Array, beta: Scalar = 1, limit: Scalar = 20) -> jax.Array:
    x = widen(x)
    is_linear = x * beta > limit
    return jnp.where(is_linear, x, jax.nn.softplus(jnp.where(is_linear, 0.0, x) * beta) / beta)


@register_lowering(aten.hardshrink.default)
def _hardshrink(call: Call, x: jax.Array, limit: Scalar = 0.5) -> jax.Array:
    return jnp.where(jnp.abs(x) <= limit, 0.0, x)


@register_lowering(aten.softshrink.default)
def _softshrink(call: Call, x: jax.Array, limit: Scalar = 0.5) -> jax.Array:
    return jnp.where(x > limit, x - limit, jnp.where(x < -limit, x + limit, 0.0))


@register_lowering(aten.glu.default)
def _glu(call: Call, x: jax.Array, dim: int = -1) -> jax.Array:
    value, gate = jnp.split(widen(x), 2, axis=dim)
    return value * jax.nn.sigmoid(gate)


def _register(op: Any, function: Callable[[jax.Array], jax.Array]) -> None:
    @register_lowering(op)
    def activation(call: Call, x: jax.Array) -> jax.Array:
        return function(widen(x))


_register(aten.relu.default, lambda x: jnp.where(x <= 0, 0, x))
_register(aten.silu.default, jax.nn.silu)
_register(aten.mish.default, jax.nn.mish)
_register(aten.log_sigmoid.default, jax.nn.log_sigmoid)
