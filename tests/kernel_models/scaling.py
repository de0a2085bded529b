"""Biases of every broadcast, and the scales of normalisation layers."""

import jax.numpy as jnp
from jax import lax

from kernel_models.base import Family, normalize, score

scaling = Family("scaling")


@scaling({"b": ()}, (4, 3), slow=True)
def scalar_bias(p, x):
    return score(x + p["b"])


@scaling({"b": (3,)}, (3,))
def bias_without_rows(p, x):
    return score(x + p["b"])


@scaling({"b": (3,)}, (2, 4, 3), slow=True)
def bias_of_the_last_axis(p, x):
    return score(x + p["b"])


@scaling({"b": (3, 1, 1)}, (3, 4, 2))
def bias_of_the_channels(p, x):
    return score(x - p["b"])


@scaling({"b": (4, 1)}, (3,), slow=True)
def bias_that_broadcasts_data(p, x):
    return score(x + p["b"])


@scaling({"b": (1, 3)}, (4, 1), slow=True)
def both_broadcast(p, x):
    return score(jnp.square(x + p["b"]))


@scaling({"g": ()}, (4, 3), slow=True)
def scalar_scale(p, x):
    return score(x * p["g"])


@scaling({"g": (4, 1)}, (3,))
def scale_that_broadcasts_data(p, x):
    return score(x * p["g"])


@scaling({"a": (3,), "b": (3,)}, (4, 3), slow=True)
def divided_and_powered(p, x):
    return score((x + jnp.exp(p["a"])) / (1.5 + jnp.square(p["b"])))


@scaling({"slope": (3,)}, (4, 3), slow=True)
def prelu(p, x):
    return score(jnp.where(x > 0, x, p["slope"] * x))


@scaling({"beta": (3,)}, (4, 3))
def data_in_a_nonlinear_function_with_a_parameter(p, x):
    return score(jnp.tanh(x * p["beta"]) + jnp.maximum(x, p["beta"]) + jnp.arctan2(x, p["beta"]))


@scaling({"w": (3, 4), "g": (4,), "b": (4,)}, (5, 3))
def layer_norm(p, x):
    return score(normalize(x @ p["w"], -1) * p["g"] + p["b"])


@scaling({"w": (3, 4), "g": (4,)}, (5, 3))
def rms_norm_with_one_plus(p, x):
    y = x @ p["w"]
    y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-3)
    return score(y * (1 + p["g"]))


@scaling({"w": (4, 2, 3, 3), "g": (4, 1, 1), "b": (4, 1, 1)}, (2, 5, 5))
def group_norm(p, x):
    y = lax.conv_general_dilated(x[None], p["w"], (1, 1), "SAME")[0]
    y = normalize(y.reshape(2, 2, 5, 5), (1, 2, 3)).reshape(4, 5, 5)
    return score(y * p["g"] + p["b"])


@scaling({"g": (3,), "b": (3,)}, (4, 5, 3), slow=True)
def instance_norm_channels_last(p, x):
    return score(normalize(x, (0, 1)) * p["g"] + p["b"])


@scaling({"a": (3, 1), "b": (3, 1), "g": (4,)}, (4,), slow=True)
def residual_with_layer_scale(p, x):
    y = jnp.tanh(x * p["a"] + p["b"])
    return score(x + y * p["g"])
