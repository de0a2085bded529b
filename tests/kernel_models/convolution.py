"""Kernels that meet data in a convolution, in every layout and with every option."""

import jax.numpy as jnp
from jax import lax

from kernel_models.base import Family, score

conv = Family("conv")


def convolve(x, w, strides=None, padding="SAME", layouts=None, **options):
    """Convolves one example, channels first unless `layouts` says otherwise."""
    rank = x.ndim - 1
    if layouts is None:
        space = "DHW"[3 - rank :]
        layouts = ("NC" + space, "OI" + space, "NC" + space)
    strides = strides or (1,) * rank
    return lax.conv_general_dilated(
        x[None], w, strides, padding, dimension_numbers=layouts, **options
    )[0]


@conv({"w": (3, 2, 3), "b": (3, 1)}, (2, 7))
def one_dimension(p, x):
    return score(convolve(x, p["w"]) + p["b"])


@conv({"w": (3, 2, 3, 3)}, (2, 6, 5), slow=True)
def channels_first(p, x):
    return score(convolve(x, p["w"]))


@conv({"w": (3, 3, 2, 3)}, (6, 5, 2))
def channels_last(p, x):
    return score(convolve(x, p["w"], layouts=("NHWC", "HWIO", "NHWC")))


@conv({"w": (3, 4, 2, 2)}, (4, 3, 2), slow=True)
def odd_layouts(p, x):
    y = lax.conv_general_dilated(
        x[:, :, None],
        p["w"],
        (1, 1),
        "VALID",
        dimension_numbers=("HWNC", "HOWI", "CWNH"),
    )
    return score(y)


@conv({"w": (2, 2, 2, 2, 2)}, (2, 3, 4, 3), slow=True)
def three_dimensions(p, x):
    return score(convolve(x, p["w"], (1, 2, 1), "VALID"))


@conv({"w": (3, 2, 3, 2)}, (2, 7, 6))
def strides_and_valid(p, x):
    return score(convolve(x, p["w"], (2, 3), "VALID"))


@conv({"w": (3, 2, 3, 3)}, (2, 7, 6), slow=True)
def strides_and_same_lower(p, x):
    return score(convolve(x, p["w"], (2, 2), "SAME_LOWER"))


@conv({"w": (3, 2, 3, 3)}, (2, 5, 5), slow=True)
def uneven_padding(p, x):
    return score(convolve(x, p["w"], (2, 1), ((0, 3), (2, 1))))


@conv({"w": (3, 2, 3, 3)}, (2, 6, 6))
def negative_padding(p, x):
    # Below zero on both sides of an axis: XLA on the CPU reads outside of a float32 array where
    # only the low side is (openxla/xla#48713).
    return score(convolve(x, p["w"], (1, 1), ((-1, -1), (0, -1))))


@conv({"w": (3, 2, 1, 2)}, (2, 4, 4), slow=True)
def padding_wider_than_the_kernel(p, x):
    return score(convolve(x, p["w"], (1, 2), ((1, 1), (2, 2))))


@conv({"w": (3, 2, 2, 2)}, (2, 6, 7), slow=True)
def kernel_dilation(p, x):
    return score(convolve(x, p["w"], (1, 2), "SAME", rhs_dilation=(2, 3)))


@conv({"w": (3, 2, 3, 3)}, (2, 4, 3), slow=True)
def input_dilation(p, x):
    return score(convolve(x, p["w"], (1, 1), ((1, 2), (1, 1)), lhs_dilation=(2, 3)))


@conv({"w": (2, 3, 2, 2)}, (3, 4, 4))
def everything_dilated_and_strided(p, x):
    y = convolve(x, p["w"], (3, 2), ((2, 1), (0, 2)), lhs_dilation=(2, 2), rhs_dilation=(2, 1))
    return score(y)


@conv({"w": (6, 2, 3, 3)}, (4, 5, 5))
def groups(p, x):
    return score(convolve(x, p["w"], (2, 1), feature_group_count=2))


@conv({"w": (3, 1, 3, 3)}, (3, 5, 5))
def depthwise(p, x):
    return score(convolve(x, p["w"], feature_group_count=3))


@conv({"w": (3, 1, 6)}, (7, 3), slow=True)
def depthwise_with_multiplier_channels_last(p, x):
    y = convolve(x, p["w"], layouts=("NWC", "WIO", "NWC"), feature_group_count=3)
    return score(y)


@conv({"w": (4, 3, 1, 1), "b": (4, 1, 1)}, (3, 4, 5))
def one_by_one(p, x):
    return score(convolve(x, p["w"]) + p["b"])


@conv({"w": (4, 3, 1, 1)}, (3, 5, 5), slow=True)
def one_by_one_strided(p, x):
    return score(convolve(x, p["w"], (2, 2), "VALID"))


@conv({"w": (4, 4, 2, 3), "b": (3,)}, (8, 8, 2))
def patch_embedding(p, x):
    return score(convolve(x, p["w"], (4, 4), "VALID", ("NHWC", "HWIO", "NHWC")) + p["b"])


@conv({"w": (2, 2, 5, 5)}, (2, 5, 5), slow=True)
def kernel_as_large_as_the_image(p, x):
    return score(convolve(x, p["w"], (1, 1), "VALID"))


@conv({"w": (2, 2, 5, 5)}, (2, 3, 3), slow=True)
def kernel_larger_than_the_image(p, x):
    return score(convolve(x, p["w"], (1, 1), ((2, 2), (1, 1))))


@conv({"w": (3, 3, 2, 4)}, (4, 3, 2))
def transposed(p, x):
    y = lax.conv_transpose(x[None], p["w"], (2, 2), "SAME")
    return score(y)


@conv({"w": (3, 3, 4, 2)}, (4, 3, 2), slow=True)
def transposed_with_a_flipped_kernel(p, x):
    return score(lax.conv_transpose(x[None], p["w"], (2, 1), "VALID", transpose_kernel=True))


@conv({"w": (3, 2, 3, 3)}, (2, 5, 4))
def flipped_by_hand(p, x):
    return score(convolve(x, p["w"][:, :, ::-1, ::-1]))


@conv({"w": (3, 2, 2)}, (2, 7))
def kernel_as_the_left_operand(p, x):
    y = lax.conv_general_dilated(
        p["w"], x[None], (1,), ((6, 6),), dimension_numbers=("NCW", "OIW", "NCW")
    )
    return score(y)


@conv({"w": (4, 2, 3)}, (4, 2, 6))
def batch_groups(p, x):
    y = lax.conv_general_dilated(
        x, p["w"], (1,), "VALID", dimension_numbers=("NCW", "OIW", "NCW"), batch_group_count=2
    )
    return score(y)


@conv({"w": (3, 2, 3, 3)}, (4, 2, 5, 5), slow=True)
def several_images_an_example(p, x):
    return score(lax.conv_general_dilated(x, p["w"], (1, 1), "SAME"))


# More output features than places: kernels that are left in their order.
@conv({"w": (64, 2, 3, 2), "v": (64, 64, 2, 1)}, (2, 5, 4))
def kernels_larger_than_patches(p, x):
    y = convolve(x, p["w"], (2, 3), ((1, 1), (0, 2)), rhs_dilation=(1, 2))
    return score(convolve(jnp.tanh(y), p["v"], (1, 1), ((0, -1), (1, -1)), lhs_dilation=(1, 2)))


@conv({"w": (64, 2, 3)}, (2, 2), slow=True)
def kernel_larger_than_patches_in_one_dimension(p, x):
    return score(convolve(x, p["w"]))


@conv({"w1": (3, 3, 1, 2), "w2": (3, 3, 2, 2), "w3": (2, 3)}, (6, 6, 1), slow=True)
def two_convolutions_pooling_and_a_head(p, x):
    layouts = ("NHWC", "HWIO", "NHWC")
    hidden = jnp.maximum(convolve(x, p["w1"], layouts=layouts), 0)
    hidden = lax.reduce_window(hidden, -jnp.inf, lax.max, (2, 2, 1), (2, 2, 1), "VALID")
    hidden = jnp.tanh(convolve(hidden, p["w2"], layouts=layouts))
    return score(hidden.mean((0, 1)) @ p["w3"])
