"""Losses that are linear in their parameters, and data that norms are easily wrong about."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from kernel_models import BATCH


def dense(p, x, v):
    return jnp.sum((x @ p["w"] + p["b"]) * v)


def one_row(p, x, v):
    return dense(p, x[0], v[0])


def convolution(p, x, v):
    y = lax.conv_general_dilated(x[None], p["w"], (1,), "SAME")[0]
    return jnp.sum((y + p["b"]) * v)


def shared(p, x, v):
    return jnp.sum((x @ p["w"]) * v) - jnp.sum((x[::-1] @ p["w"].T) * v)


def recurrent(p, x, v):
    def cell(h, row):
        h = row @ p["w"] + 0.5 * h
        return h, h

    return jnp.sum(lax.scan(cell, jnp.zeros(WIDTH, x.dtype), x)[1] * v)


def wide(p, x, v):
    """Few rows to a large weight: what costs least is a Gram matrix."""
    return jnp.sum((x @ p["w"]) * v)


def scaled(p, x, v):
    return jnp.sum((x * p["g"] + p["b"]) * v)


def opposed(p, x, v):
    """Two uses of one weight that cancel but for what the rows of `x` and `v` differ in."""
    return jnp.sum((x @ p["w"]) * v) - jnp.sum((x[::-1] @ p["w"]) * v[::-1] * (1 + 1e-5))


# Linear in the parameters, so that gradients grow with `x` and with `v` to the end of float32.
ROWS, WIDTH = 6, 4
LINEAR = {
    dense: {"w": (WIDTH, WIDTH), "b": (WIDTH,)},
    one_row: {"w": (WIDTH, WIDTH), "b": (WIDTH,)},
    convolution: {"w": (ROWS, ROWS, 3), "b": (ROWS, 1)},
    shared: {"w": (WIDTH, WIDTH)},
    recurrent: {"w": (WIDTH, WIDTH)},
    scaled: {"g": (WIDTH,), "b": (WIDTH,)},
}
WIDE = 64


def make_data(width=WIDTH):
    """Finite examples of ordinary size."""
    return np.random.default_rng(0).normal(size=(2, BATCH, ROWS, width)).astype(np.float32)


def make_params(loss):
    shapes = {"w": (WIDE, WIDE)} if loss is wide else LINEAR[loss]
    return {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}


def cancelling_data(size, rest, seed, width=WIDTH):
    """One example whose rows cancel but for a `rest`, among others of ordinary size."""
    x, v = make_data(width)
    rng = np.random.default_rng(seed)
    x[1] = size * rng.normal(size=width)
    half = rng.normal(size=(ROWS // 2, width))
    v[1] = np.concatenate([half, -half])
    v[1, 0] += np.float32(rest)
    return x, v


# Products of 1e20 to 1e30, of which the squares are beyond float32; and factors whose own squares
# are, beside others that are small; and what vanishes when it is squared.
EXTREMES = [(1e10, 1e10), (1e15, 1e15), (1e25, 1e-2), (1e-2, 1e25), (1e-10, 1e-15), (1e-25, 1.0)]
