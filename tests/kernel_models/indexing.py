"""Tables that are looked up, and weights that are sliced or gathered by data."""

import jax
import jax.numpy as jnp
from jax import lax

from kernel_models.base import Family, integers, normalize, score

indexing = Family("indexing")

TOKENS = integers(0, 7, 6)
OUT_OF_RANGE = integers(-9, 12, 6)


def embed(rows):
    """Weighs positions differently, so that equal tokens get unequal cotangents."""
    ramp = jnp.arange(1, 1 + rows.shape[0], dtype=rows.dtype)
    return score(rows * ramp[:, None])


@indexing({"table": (7, 3)}, TOKENS)
def take(p, tokens):
    return embed(jnp.take(p["table"], tokens, axis=0))


@indexing({"table": (7, 3)}, OUT_OF_RANGE)
def take_clip(p, tokens):
    return embed(jnp.take(p["table"], tokens, axis=0, mode="clip"))


@indexing({"table": (7, 3)}, OUT_OF_RANGE)
def take_fill(p, tokens):
    return embed(jnp.take(p["table"], tokens, axis=0, mode="fill", fill_value=0.5))


@indexing({"table": (7, 3)}, OUT_OF_RANGE)
def take_wrap(p, tokens):
    return embed(jnp.take(p["table"], tokens, axis=0, mode="wrap"))


@indexing({"table": (3, 7)}, OUT_OF_RANGE, slow=True)
def take_columns(p, tokens):
    return embed(jnp.take(p["table"], tokens, axis=1, mode="clip").T)


@indexing({"table": (7, 3)}, TOKENS)
def index_with_brackets(p, tokens):
    return embed(p["table"][tokens])


@indexing({"table": (7, 3)}, OUT_OF_RANGE, slow=True)
def index_out_of_range_with_brackets(p, tokens):
    return embed(p["table"][tokens])


@indexing({"table": (7, 3)}, OUT_OF_RANGE, slow=True)
def index_with_at_get(p, tokens):
    return embed(p["table"].at[tokens].get(mode="fill", fill_value=0))


@indexing({"table": (7, 3), "scale": (3,)}, integers(0, 1, 6), (6, 3))
def one_token_repeated(p, tokens, x):
    return score(p["table"][tokens] * x * p["scale"])


@indexing({"table": (7, 3)}, integers(0, 7), (3,), slow=True)
def one_token_an_example(p, token, x):
    return score(p["table"][token] * x)


@indexing({"table": (7, 3)}, integers(0, 7, 3, 2), slow=True)
def two_dimensional_tokens(p, tokens):
    return embed(p["table"][tokens].reshape(6, 3))


@indexing({"table": (7, 3)}, TOKENS)
def one_hot(p, tokens):
    return embed(jax.nn.one_hot(tokens, 7, dtype=p["table"].dtype) @ p["table"])


@indexing({"table": (7,)}, TOKENS, (6,), slow=True)
def table_of_scalars(p, tokens, x):
    return score(p["table"][tokens] * x)


@indexing({"table": (4, 5, 3)}, integers(0, 4, 6), integers(0, 5, 6), slow=True)
def two_index_arrays(p, rows, columns):
    return embed(p["table"][rows, columns])


@indexing({"table": (4, 6)}, integers(0, 4, 6), slow=True)
def take_along_axis(p, rows):
    return score(jnp.take_along_axis(p["table"], rows[None], axis=0) * (1.0 + jnp.arange(6.0)))


@indexing({"tokens": (7, 3), "positions": (9, 3)}, TOKENS, slow=True)
def tokens_and_positions(p, tokens):
    positions = p["positions"][jnp.arange(6)]
    return embed(normalize(p["tokens"][tokens] + positions, -1))


@indexing({"positions": (9, 3)}, (6, 3), slow=True)
def sliced_positions(p, x):
    return embed(x * p["positions"][:6])


@indexing({"table": (7, 3), "w": (3, 2)}, TOKENS)
def bag_of_embeddings(p, tokens):
    return score(p["table"][tokens].mean(0) @ p["w"])


@indexing({"table": (7, 3)}, OUT_OF_RANGE)
def bag_with_rows_outside(p, tokens):
    """JAX looks up NaN there; the sum is kept from it."""
    rows = p["table"].at[tokens].get(mode="fill", fill_value=0.5)
    return score(rows.sum(0))


@indexing({"table": (7, 3)}, integers(0, 3, 2, 3), slow=True)
def bag_of_two_dimensional_tokens(p, tokens):
    return score(p["table"][tokens].reshape(1, 6, 3).sum(1) / 3)


@indexing({"table": (7,)}, TOKENS, slow=True)
def bag_of_scalars(p, tokens):
    return score(p["table"][tokens].sum())


@indexing({"table": (7, 3)}, TOKENS, integers(0, 7, 4))
def two_bags_of_one_table(p, tokens, others):
    return score(p["table"][tokens].sum(0)) + score(p["table"][others].sum(0) - 0.5)


@indexing({"table": (7, 3)}, TOKENS, (3,), slow=True)
def bag_tied_to_the_head(p, tokens, x):
    return score(p["table"].T @ (p["table"] @ (p["table"][tokens].mean(0) + x)))


@indexing({"table": (7, 3)}, TOKENS, slow=True)
def bag_whose_rows_are_used_as_well(p, tokens):
    rows = p["table"][tokens]
    return score(rows.sum(0)) + embed(rows)


@indexing({"w": (9, 3)}, integers(0, 9), (4, 3))
def dynamic_slice_by_data(p, start, x):
    return score(lax.dynamic_slice(p["w"], (start, jnp.zeros_like(start)), (4, 3)) * x)


@indexing({"experts": (3, 4, 2)}, integers(0, 3), (5, 4))
def expert_chosen_by_data(p, index, x):
    return score(x @ p["experts"][index])


@indexing({"experts": (3, 4, 2)}, integers(0, 3, 6), (6, 4), slow=True)
def expert_chosen_for_every_row(p, index, x):
    return score(jnp.einsum("td,tdk->tk", x, p["experts"][index]))
