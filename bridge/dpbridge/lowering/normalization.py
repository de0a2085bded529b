"""Normalisation over the features of one example."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import torch
from jax import lax

from dpbridge.lowering.dtypes import widen
from dpbridge.lowering.reductions import safe_sqrt
from dpbridge.lowering.table import Call, register_lowering

aten = torch.ops.aten


def _standardize(x: jax.Array, axes: tuple[int, ...], eps: float) -> jax.Array:
    centered = x - jnp.mean(x, axes, keepdims=True)
    variance = jnp.mean(jnp.square(centered), axes, keepdims=True)
    return centered * lax.rsqrt(variance + eps)


def _affine(
    x: jax.Array, weight: jax.Array | None, bias: jax.Array | None, shape: tuple[int, ...]
) -> jax.Array:
    if weight is not None:
        x = x * weight.astype(x.dtype).reshape(shape)
    return x if bias is None else x + bias.astype(x.dtype).reshape(shape)


def _channelwise(x: jax.Array) -> tuple[int, ...]:
    return (-1,) + (1,) * (x.ndim - 2)


@register_lowering(aten.layer_norm.default)
def _layer_norm(
    call: Call,
    x: jax.Array,
    normalized_shape: Sequence[int],
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> jax.Array:
    axes = tuple(range(-len(normalized_shape), 0))
    return _affine(_standardize(widen(x), axes, eps), weight, bias, tuple(normalized_shape))


@register_lowering(aten.rms_norm.default)
def _rms_norm(
    call: Call,
    x: jax.Array,
    normalized_shape: Sequence[int],
    weight: jax.Array | None = None,
    eps: float | None = None,
) -> jax.Array:
    x = widen(x)
    eps = float(jnp.finfo(x.dtype).eps) if eps is None else eps
    axes = tuple(range(-len(normalized_shape), 0))
    square = jnp.mean(jnp.square(x), axes, keepdims=True)
    return _affine(x * lax.rsqrt(square + eps), weight, None, tuple(normalized_shape))


@register_lowering(aten.group_norm.default)
def _group_norm(
    call: Call,
    x: jax.Array,
    groups: int,
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> jax.Array:
    x = widen(x)
    centered = x - _group_means(x, groups)
    variance = _group_means(jnp.square(centered), groups)
    y = centered * lax.rsqrt(variance + eps)
    return _affine(y, weight, bias, _channelwise(x))


def _group_means(x: jax.Array, groups: int) -> jax.Array:
    """Returns the means of groups of channels, one for each channel, `(batch, channels, 1, ...)`.

    By a product with ones, which brings a group's sum to each of its channels: XLA on a CPU would
    look a channel's group up at every element.
    """
    batch, channels, *space = x.shape
    grouped = x.reshape(batch, groups, channels // groups, *space)
    sums = jnp.sum(grouped, tuple(range(3, grouped.ndim)))
    ones = jnp.ones((channels // groups, channels // groups), x.dtype)
    means = jnp.matmul(sums, ones, precision=lax.Precision.HIGHEST) / (x[0].size // groups)
    return means.reshape(batch, channels, *(1,) * len(space))


@register_lowering(aten.instance_norm.default)
def _instance_norm(
    call: Call,
    x: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    running_mean: jax.Array | None,
    running_var: jax.Array | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> jax.Array:
    if running_mean is not None or not use_input_stats:
        raise call.refuse(
            "running statistics carry data from one example to the next. Use "
            "track_running_stats=False."
        )
    y = _standardize(widen(x), tuple(range(2, x.ndim)), eps)
    return _affine(y, weight, bias, _channelwise(x))


@register_lowering(aten.batch_norm.default)
def _batch_norm(
    call: Call,
    x: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    running_mean: jax.Array | None,
    running_var: jax.Array | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> jax.Array:
    # Of weights, which it standardises in some convolutions, it mixes nothing.
    if call.of_example or running_mean is not None or not training:
        raise call.refuse("batch normalisation mixes examples. Use nn.GroupNorm.")
    axes = (0, *range(2, x.ndim))
    return _affine(_standardize(widen(x), axes, eps), weight, bias, _channelwise(x))


@register_lowering(aten._weight_norm.default)
def _weight_norm(call: Call, v: jax.Array, g: jax.Array, dim: int = 0) -> jax.Array:
    # To torch, -1 is no axis here but all of them.
    axes = tuple(axis for axis in range(v.ndim) if axis != dim)
    return v * (g / safe_sqrt(jnp.sum(jnp.square(v), axes, keepdims=True)))
