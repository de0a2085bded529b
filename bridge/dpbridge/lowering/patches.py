"""Taking images apart into patches, and adding patches up to images."""

from collections.abc import Sequence

import jax
import torch

from dpbridge.lowering.convolution import each, patches_of
from dpbridge.lowering.table import Call, register_lowering

aten = torch.ops.aten

Sizes = Sequence[int]


@register_lowering(aten.im2col.default)
def _unfold(
    call: Call, x: jax.Array, kernel: Sizes, dilation: Sizes, padding: Sizes, stride: Sizes
) -> jax.Array:
    images = x.reshape(-1, *x.shape[-3:])
    return _patches(images, kernel, dilation, padding, stride).reshape(call.shape)


@register_lowering(aten.col2im.default)
def _fold(
    call: Call,
    x: jax.Array,
    size: Sizes,
    kernel: Sizes,
    dilation: Sizes,
    padding: Sizes,
    stride: Sizes,
) -> jax.Array:
    def take_apart(images: jax.Array) -> jax.Array:
        return _patches(images, kernel, dilation, padding, stride)

    *batch, channels, height, width = call.shape
    images = jax.ShapeDtypeStruct((*(batch or [1]), channels, height, width), x.dtype)
    shape = jax.eval_shape(take_apart, images).shape
    (y,) = jax.linear_transpose(take_apart, images)(x.reshape(shape))
    return y.reshape(call.shape)


def _patches(
    images: jax.Array, kernel: Sizes, dilation: Sizes, padding: Sizes, stride: Sizes
) -> jax.Array:
    pairs = [(width, width) for width in each(padding, 2)]
    return patches_of(images, each(kernel, 2), each(stride, 2), pairs, each(dilation, 2))
