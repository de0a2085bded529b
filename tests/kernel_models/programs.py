"""Attention, whole small networks, odd uses of data, and the ways to call `clipped_grad`."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernel_models.base import Family, integers, normalize, score

programs = Family("programs")


@programs({"qkv": (4, 12), "qkv_b": (12,), "out": (4, 4)}, (5, 4))
def causal_attention_with_two_heads(p, x):
    q, k, v = jnp.split(x @ p["qkv"] + p["qkv_b"], 3, axis=-1)
    q, k, v = (part.reshape(5, 2, 2) for part in (q, k, v))
    logits = jnp.einsum("thk,shk->hts", q, k)
    weights = jax.nn.softmax(jnp.where(jnp.tri(5, dtype=bool), logits, -1e9))
    return score(jnp.einsum("hts,shk->thk", weights, v).reshape(5, 4) @ p["out"])


@programs({"k": (3, 4), "v": (3, 4), "queries": (2, 4)}, (5, 3), slow=True)
def attention_with_learned_queries(p, x):
    weights = jax.nn.softmax(p["queries"] @ (x @ p["k"]).T)
    return score(weights @ (x @ p["v"]))


@programs(
    {
        "table": (7, 4),
        "positions": (6, 4),
        "g": (2, 4),
        "qkv": (4, 12),
        "out": (4, 4),
        "up": (4, 8),
        "down": (8, 4),
    },
    integers(0, 7, 6),
    slow=True,
)
def small_gpt_with_tied_head(p, tokens):
    x = p["table"][tokens] + p["positions"]
    q, k, v = jnp.split(normalize(x, -1) * p["g"][0] @ p["qkv"], 3, axis=-1)
    logits = jnp.where(jnp.tri(6, dtype=bool), q @ k.T / 2, -1e9)
    x = x + jax.nn.softmax(logits) @ v @ p["out"]
    x = x + jax.nn.gelu(normalize(x, -1) * p["g"][1] @ p["up"]) @ p["down"]
    log_probs = jax.nn.log_softmax(x @ p["table"].T)
    return -jnp.mean(jnp.take_along_axis(log_probs[:-1], tokens[1:, None], 1))


@programs({"token": (1, 3), "patch": (4, 3), "positions": (5, 3), "w": (3, 2)}, (4, 4), slow=True)
def class_token_and_patches(p, x):
    x = jnp.concatenate([p["token"], x @ p["patch"]]) + p["positions"]
    x = jax.nn.softmax(x @ x.T) @ x
    return score(x[0] @ p["w"])


@programs({"pad": (3,)}, (6, 3), slow=True)
def parameter_where_data_is_masked(p, x):
    return score(jnp.where(x[:, :1] > 0, x, p["pad"]) * x)


@programs({"w": (2, 3)}, (5, 3))
def parameter_written_into_data(p, x):
    return score(jnp.sin(lax.dynamic_update_slice(x, p["w"], (1, 0)) * x))


@programs({"w": (2, 3)}, (5, 3), integers(0, 5, 2))
def parameter_scattered_into_data(p, x, where):
    return score(x.at[where].add(p["w"]) * x)


@programs({"w": (4, 3)}, (4,), integers(0, 4, 4), slow=True)
def data_scattered_into_a_parameter(p, x, where):
    return score(p["w"].at[where].multiply(x[:, None], mode="drop").sum(0) + p["w"].at[0].set(1.0))


@programs({"edge": (), "scale": ()}, (5,))
def parameter_as_the_edge_of_a_pad(p, x):
    return score(jnp.cumsum(lax.pad(x * p["scale"], p["edge"], ((2, 1, 0),))))


@programs({"w": (3, 4)}, (6, 3))
def sort_and_top_k(p, x):
    y = jnp.sort(x @ p["w"], axis=0)
    return score(lax.top_k(y.T, 2)[0] * jnp.array([1.0, 2.0], x.dtype))


@programs({"w": (4, 3)}, (6, 4))
def fft_of_data(p, x):
    spectrum = jnp.fft.rfft(x @ p["w"], axis=0)
    return score(jnp.square(jnp.abs(spectrum)))


@programs({"filter": (4, 2)}, (6,), slow=True)
def complex_filter(p, x):
    kernel = lax.complex(p["filter"][:, 0], p["filter"][:, 1])
    return score(jnp.fft.irfft(jnp.fft.rfft(x) * kernel))


@programs({"w": (4, 4), "b": (4,)}, (4,), slow=True)
def linear_solve(p, x):
    matrix = p["w"] @ p["w"].T + (2.0 + jnp.sum(jnp.square(x))) * jnp.eye(4, dtype=x.dtype)
    return score(jnp.linalg.solve(matrix, x + p["b"]))


@programs({"w": (3, 4), "v": (4, 2)}, (5, 3))
def gradient_stopped_at_data(p, x):
    return score(lax.stop_gradient(jnp.tanh(x @ p["w"])) @ p["v"] * (x @ p["w"]).sum())


@programs({"w": (3, 4), "v": (4, 2)}, (5, 3), slow=True)
def gradient_stopped_at_a_weight(p, x):
    return score(jnp.tanh(x @ p["w"]) @ (p["v"] + lax.stop_gradient(p["v"])))


@programs({"w": (3, 4), "frozen": (4, 2)}, (5, 3), slow=True)
def weight_with_no_gradient(p, x):
    return score(jnp.tanh(x @ p["w"]) @ lax.stop_gradient(p["frozen"]))


@programs({"w": (3, 4), "unused": (2,), "none": None, "empty": (0, 3)}, (5, 3))
def unused_parameters(p, x):
    return score(x @ p["w"])


@programs({"w": (3, 4), "b": (4,)}, (5, 3))
def regulariser_inside_the_loss(p, x):
    return score(x @ p["w"] + p["b"]) + 0.3 * jnp.sum(jnp.square(p["w"]))


@programs({"w": (3, 4), "b": (4,)}, (3,), slow=True)
def regulariser_weighed_by_data(p, x):
    return score(x @ p["w"]) + jnp.sum(x) * (jnp.sum(jnp.square(p["w"])) + jnp.prod(p["b"]))


@programs({"w": (3, 4)}, (5, 3), spreads=False)
def loss_without_data(p, x):
    return score(p["w"])


@programs({"w": (3, 4)}, (5, 3), spreads=False)
def loss_without_parameters(p, x):
    return score(x)


@programs({"w": ()}, (), slow=True)
def scalars_alone(p, x):
    return jnp.sin(p["w"] * x) + x * p["w"] ** 3


@programs((3,), (), slow=True)
def parameter_that_is_a_bare_array(p, x):
    return score(p * x)


@programs({"w": (3, 2)}, (5, 3), slow=True)
def gradient_inside_the_loss(p, x):
    inner = jax.grad(lambda v: jnp.sum(jnp.tanh(v @ p["w"]) ** 2))(x)
    return score(x @ p["w"]) + jnp.sum(jnp.square(inner))


@programs({"w": (3, 4), "v": (4, 2)}, (5, 3), extra=(jax.random.key(3),), prng_argnum=2)
def dropout_with_a_key_per_example(p, x, key):
    hidden = jnp.tanh(x @ p["w"])
    # The type of the probability decides how many bits are drawn.
    kept = jax.random.bernoulli(key, jnp.float32(0.5), hidden.shape)
    return score(jnp.where(kept, 2 * hidden, jnp.zeros_like(hidden)) @ p["v"])


@programs({"w": (3, 4)}, (2, 5, 3), (2, 5, 4))
def user_with_a_group_of_examples(p, x, y):
    per_example = lambda a, b: score(a @ p["w"] - b)  # noqa: E731
    return jnp.mean(jax.vmap(per_example)(x, y))


@programs({"w": (3, 4)}, (5, 3), (4,), keep_batch_dim=True)
def leading_axis_of_one(p, x, y):
    return score((x @ p["w"]).mean(1) - y)


@programs({"w": (3, 4), "b": (4,)}, (5, 3), keep_batch_dim=True, has_aux=True)
def auxiliary_output(p, x):
    y = x @ p["w"] + p["b"]
    return score(y), {"mean": y.mean((1, 2)), "rows": jnp.tanh(y)}


@programs({"w": (3, 4)}, (5, 3), extra=({"b": np.float32([1, 2, 3, 4])},), argnums=(0, 2))
def two_differentiated_arguments(p, x, q):
    return score(jnp.tanh(x @ p["w"]) + q["b"])


@programs(
    np.float32([[1, 2], [3, 4], [5, 6]]),
    (4, 2),
    (2,),
    extra=({"w": np.float32([[0.5, 1], [-1, 2]])},),
    argnums=3,
    batch_argnums=(1, 2),
)
def frozen_argument_first(frozen, x, y, p):
    return score(jnp.tanh(x @ p["w"]) @ frozen.T) + score(p["w"] @ y)


@programs({"w": (3, 2)}, {"x": (5, 3), "mask": integers(0, 2, 5) > 0}, slow=True)
def batch_that_is_a_tree(p, batch):
    loss = jnp.square(batch["x"] @ p["w"]).sum(-1)
    return jnp.sum(jnp.where(batch["mask"], loss, jnp.zeros_like(loss))) + 0.1 * jnp.sum(loss)
