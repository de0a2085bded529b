"""Weights that are computed from parameters before they meet data."""

import jax
import jax.numpy as jnp
from jax import lax

from kernel_models.base import Family, normalize, score

derived = Family("derived")


@derived({"v": (3, 4), "g": (4,)}, (6, 3))
def weight_norm(p, x):
    direction = p["v"] / jnp.sqrt(jnp.square(p["v"]).sum(0))
    return score(x @ (direction * p["g"]))


@derived({"w": (3, 2, 3, 3)}, (2, 5, 5))
def weight_standardisation(p, x):
    filters = normalize(p["w"], (1, 2, 3))
    return score(lax.conv_general_dilated(x[None], filters, (1, 1), "SAME"))


@derived({"a": (6, 2), "b": (2, 5)}, (4, 6))
def low_rank_merged(p, x):
    return score(x @ (p["a"] @ p["b"]))


@derived({"a": (6, 2), "b": (2, 5)}, (4, 6), slow=True)
def low_rank_unmerged(p, x):
    return score((x @ p["a"]) @ p["b"])


@derived({"a": (6, 2), "b": (2, 5)}, (4, 6), extra=(jnp.full((6, 5), 0.3),))
def lora_beside_a_frozen_weight(p, x, frozen):
    return score(x @ frozen + 2.0 * ((x @ p["a"]) @ p["b"]))


@derived({"a": (6, 2), "b": (2, 5)}, (4, 6), extra=(jnp.full((6, 5), 0.3),), slow=True)
def lora_merged_into_a_frozen_weight(p, x, frozen):
    return score(x @ (frozen + 2.0 * (p["a"] @ p["b"])))


@derived({"w": (24,)}, (6, 3))
def reshaped_weight(p, x):
    return score(x @ p["w"][3:15].reshape(3, 4))


@derived({"w": (4, 2, 3)}, (5, 3, 4))
def transposed_and_reshaped_weight(p, x):
    return score(x @ p["w"].transpose(2, 0, 1).reshape(3, 8)[:, ::2].reshape(3, 4).T)


@derived({"w": (3, 4)}, (6, 3), slow=True)
def weight_times_a_constant(p, x):
    return score(x @ (p["w"] * 0.37))


@derived({"w": (3, 4)}, (6, 3), slow=True)
def weight_times_a_mask(p, x):
    mask = jnp.tril(jnp.ones((3, 4), x.dtype), 1)
    return score(x @ (p["w"] * mask))


@derived({"a": (3, 4), "b": (3, 4)}, (6, 3))
def weight_times_weight(p, x):
    return score(x @ (p["a"] * p["b"]))


@derived({"w": (4, 4)}, (6, 4), slow=True)
def weight_times_itself(p, x):
    return score(x @ (p["w"] @ p["w"].T))


@derived({"w": (3, 4)}, (6, 3), slow=True)
def quantised_straight_through(p, x):
    rounded = lax.stop_gradient(jnp.round(4 * p["w"]) / 4 - p["w"])
    return score(x @ (p["w"] + rounded))


@derived({"a": (3, 2), "b": (3, 3)}, (6, 3), slow=True)
def concatenated_weights(p, x):
    return score(x @ jnp.concatenate([p["a"], p["b"]], axis=1))


@derived({"w": (4,)}, (6, 4), slow=True)
def diagonal_weight(p, x):
    return score(x @ jnp.diag(p["w"]))


@derived({"w": (3, 3)}, (6, 3), slow=True)
def softmax_of_a_weight(p, x):
    return score(x @ jax.nn.softmax(p["w"]))


@derived({"w": (5,)}, (5,))
def cumsum_of_a_weight(p, x):
    return score(x * jnp.cumsum(p["w"]))


@derived({"w": (3, 4)}, (5, 3))
def broadcast_weight(p, x):
    return score(jnp.einsum("td,tdk->tk", x, jnp.broadcast_to(p["w"], (5, 3, 4))))


@derived({"w": (3, 4), "b": (4,)}, (6, 3), rtol=2e-2)
def bfloat16_compute(p, x):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), p)
    y = jnp.tanh(x.astype(jnp.bfloat16) @ half["w"] + half["b"])
    return score(y.astype(x.dtype))


@derived({"w": (3, 2, 3, 3)}, (2, 5, 5), rtol=1e-2, slow=True)
def float16_convolution(p, x):
    half = [leaf.astype(jnp.float16) for leaf in (x[None], p["w"])]
    return score(lax.conv_general_dilated(*half, (1, 1), "SAME").astype(x.dtype))


@derived({"w": (3, 2, 2, 4)}, (6, 2), slow=True)
def multi_head_weight_split_by_index(p, x):
    heads = [x @ p["w"][i, :, 0] + jnp.tanh(x @ p["w"][i, :, 1]) for i in range(3)]
    return score(jnp.stack(heads))
