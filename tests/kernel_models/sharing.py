"""Parameters that are used more than once, in one form or in several."""

import jax.numpy as jnp
from jax import lax

from kernel_models.base import Family, integers, score

sharing = Family("sharing")


@sharing({"table": (7, 3)}, integers(0, 7, 6), integers(0, 7, 6), slow=True)
def tied_embedding_and_head(p, tokens, targets):
    hidden = jnp.tanh(p["table"][tokens])
    logits = hidden @ p["table"].T
    return -jnp.mean(jnp.take_along_axis(logits, targets[:, None], 1)) + score(logits)


@sharing({"table": (7, 3), "w": (3, 3)}, integers(0, 7, 6))
def tied_embedding_with_a_layer_between(p, tokens):
    hidden = jnp.tanh(p["table"][tokens] @ p["w"])
    return score(jnp.einsum("td,vd->tv", hidden, p["table"]))


@sharing({"w": (3, 3)}, (3,), slow=True)
def layer_called_twice(p, x):
    return score(jnp.tanh(x @ p["w"]) @ p["w"])


@sharing({"w": (3, 3), "b": (3,)}, (5, 3))
def layer_called_three_times(p, x):
    for _ in range(3):
        x = jnp.tanh(x @ p["w"] + p["b"])
    return score(x)


@sharing({"w": (3, 3)}, (4, 3), (2, 3))
def layer_called_on_different_numbers_of_rows(p, x, y):
    return score(x @ p["w"]) + score(jnp.tanh(y @ p["w"]))


@sharing({"w": (6, 3)}, (5, 6))
def autoencoder_with_transposed_weight(p, x):
    return score(jnp.tanh(x @ p["w"]) @ p["w"].T - x)


@sharing({"w": (3, 3)}, (5, 3), slow=True)
def plain_and_transposed_side_by_side(p, x):
    return score((x @ p["w"]) * (x @ p["w"].T))


@sharing({"w": (4, 3)}, (5, 4))
def weight_in_a_product_and_as_a_bias(p, x):
    return score(x @ p["w"] + p["w"].mean(0))


@sharing({"w": (3, 6)}, (5, 3))
def disjoint_slices(p, x):
    queries, keys, values = (x @ p["w"][:, i : i + 2] for i in (0, 2, 4))
    return score((queries @ keys.T) @ values)


@sharing({"w": (3, 6)}, (5, 3), slow=True)
def split_after_the_product(p, x):
    queries, keys, values = jnp.split(x @ p["w"], 3, axis=1)
    return score((queries @ keys.T) @ values)


@sharing({"w": (5, 4)}, (6, 3))
def overlapping_slices(p, x):
    return score(jnp.tanh(x @ p["w"][:3]) + x @ p["w"][2:])


@sharing({"w": (5, 3)}, (6, 3), integers(0, 5, 6), slow=True)
def slices_and_rows_of_one_table(p, x, tokens):
    return score(p["w"][tokens] * (x @ p["w"][1:4]))


@sharing({"w": (2, 2, 3)}, (2, 8))
def convolution_called_twice(p, x):
    for stride in (1, 2):
        x = jnp.tanh(lax.conv_general_dilated(x[None], p["w"], (stride,), "SAME")[0])
    return score(x)


@sharing({"w": (3, 3)}, (3, 6), slow=True)
def convolution_and_dense_of_one_weight(p, x):
    y = lax.conv_general_dilated(x[None], p["w"][:, :, None], (1,), "SAME")[0]
    return score(jnp.tanh(y) + p["w"].T @ x)


@sharing({"g": (3,)}, (5, 3), slow=True)
def scale_and_bias_of_one_vector(p, x):
    return score(x * p["g"] + p["g"])


@sharing({"w": (3, 3)}, (5, 3))
def uses_that_cancel_in_part(p, x):
    return score(x @ p["w"] - 0.9 * (jnp.roll(x, 1, 0) @ p["w"]))


@sharing({"a": (3, 3), "b": (3, 3)}, (5, 3), slow=True)
def used_alone_and_within_a_product(p, x):
    return score(x @ (p["a"] @ p["b"]) + jnp.tanh(x @ p["a"]))
