"""Convolutions of one to three dimensions, plain and transposed."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import torch
from jax import lax

from dpbridge.lowering.table import Call, register_lowering

aten = torch.ops.aten

Pairs = list[tuple[int, int]]

_LAYOUTS = {
    3: ("NCH", "OIH", "NCH"),
    4: ("NCHW", "OIHW", "NCHW"),
    5: ("NCDHW", "OIDHW", "NCDHW"),
}


def each(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """Returns one value an axis, where torch allows one for all."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * rank if len(values) == 1 else values


def _padding(
    padding: str | int | Sequence[int], kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> Pairs:
    if padding == "same":
        totals = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    widths = 0 if isinstance(padding, str) else padding
    return [(width, width) for width in each(widths, len(kernel))]


def _with_bias(y: jax.Array, bias: jax.Array | None, rank: int) -> jax.Array:
    return y if bias is None else y + bias.reshape(-1, *(1,) * rank)


@register_lowering(
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
)
def _convolution(
    call: Call,
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> jax.Array:
    kernel = weight.shape[2:]
    rank = len(kernel)
    batched = x.reshape(-1, *x.shape[-rank - 1 :])
    strides, steps = each(stride, rank), each(dilation, rank)
    pairs = _padding(padding, kernel, steps)
    is_depthwise = weight.shape[1] == 1
    if groups == 1 or is_depthwise:
        y = lax.conv_general_dilated(
            batched,
            weight,
            strides,
            pairs,
            rhs_dilation=steps,
            dimension_numbers=_LAYOUTS[weight.ndim],
            feature_group_count=groups,
        )
    else:
        y = _grouped(batched, weight, strides, pairs, steps, groups)
    return _with_bias(y, bias, rank).reshape(call.shape)


def _grouped(
    x: jax.Array,
    weight: jax.Array,
    strides: tuple[int, ...],
    pairs: Pairs,
    steps: tuple[int, ...],
    groups: int,
) -> jax.Array:
    """The convolution as one product with patches of x.

    XLA's own takes a hundred times as long for the per-example gradient of the weight.
    """
    patches = patches_of(x, weight.shape[2:], strides, pairs, steps)
    batch, channels, taps, *space = patches.shape
    # (batch, groups, channels of a group, taps, positions)
    patches = patches.reshape(batch, groups, channels // groups, taps, -1)
    weights = weight.reshape(groups, -1, channels // groups, taps)
    y = jnp.einsum("ngckp,gock->ngop", patches, weights)
    return y.reshape(batch, -1, *space)


def patches_of(
    x: jax.Array,
    kernel: Sequence[int],
    strides: Sequence[int],
    pairs: Pairs,
    steps: Sequence[int],
) -> jax.Array:
    """Returns what a kernel sees of x at each of its places, `(batch, channels, taps, ...)`."""
    x = jnp.pad(x, [(0, 0), (0, 0), *pairs])
    space = [
        (size - step * (taps - 1) - 1) // stride + 1
        for size, taps, step, stride in zip(x.shape[2:], kernel, steps, strides, strict=True)
    ]
    taps = [
        _strided(x, [i * step for i, step in zip(tap, steps, strict=True)], space, strides)
        for tap in itertools.product(*map(range, kernel))
    ]
    return jnp.stack(taps, axis=2)


def _strided(
    x: jax.Array, starts: list[int], sizes: list[int], strides: Sequence[int]
) -> jax.Array:
    limits = [
        start + (size - 1) * stride + 1
        for start, size, stride in zip(starts, sizes, strides, strict=True)
    ]
    return lax.slice(x, (0, 0, *starts), (*x.shape[:2], *limits), (1, 1, *strides))


@register_lowering(
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input
)
def _conv_transpose(
    call: Call,
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> jax.Array:
    channels, per_group, *kernel = weight.shape
    rank = len(kernel)
    batched = x.reshape(-1, *x.shape[-rank - 1 :])
    pairs = [
        (step * (size - 1) - pad, step * (size - 1) - pad + extra)
        for size, pad, extra, step in zip(
            kernel,
            each(padding, rank),
            each(output_padding, rank),
            each(dilation, rank),
            strict=True,
        )
    ]
    # (in, out / groups, ...) is (out, in / groups, ...) of the convolution it transposes.
    grouped = weight.reshape(groups, channels // groups, per_group, *kernel)
    swapped = jnp.swapaxes(grouped, 1, 2).reshape(-1, channels // groups, *kernel)
    y = lax.conv_general_dilated(
        batched,
        lax.rev(swapped, tuple(range(2, rank + 2))),
        (1,) * rank,
        pairs,
        lhs_dilation=each(stride, rank),
        rhs_dilation=each(dilation, rank),
        dimension_numbers=_LAYOUTS[weight.ndim],
        feature_group_count=groups,
    )
    return _with_bias(y, bias, rank).reshape(call.shape)
