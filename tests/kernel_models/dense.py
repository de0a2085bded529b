"""Weights that meet data in a dot product, in every layout."""

import jax.numpy as jnp
from jax import lax

from kernel_models.base import Family, score

dense = Family("dense")


@dense({"w": (3, 4)}, (3,))
def data_times_weight(p, x):
    return score(x @ p["w"])


@dense({"w": (4, 3)}, (3,))
def weight_times_data(p, x):
    return score(p["w"] @ x)


@dense({"w": (3, 4)}, (6, 3))
def rows_times_weight(p, x):
    return score(x @ p["w"])


@dense({"w": (4, 3)}, (3, 6), slow=True)
def weight_times_columns(p, x):
    return score(p["w"] @ x)


@dense({"w": (4, 3)}, (6, 3), slow=True)
def rows_times_transposed_weight(p, x):
    return score(x @ p["w"].T)


@dense({"w": (2, 2)}, (40, 2))
def many_rows_and_a_small_weight(p, x):
    return score(x @ p["w"])


@dense({"w": (12, 14)}, (2, 12), slow=True)
def few_rows_and_a_large_weight(p, x):
    return score(x @ p["w"])


@dense({"w": (3, 4)}, (1, 3), slow=True)
def one_row(p, x):
    return score(x @ p["w"])


@dense({"w": (3, 4)}, (2, 6, 3))
def two_row_axes(p, x):
    return score(x @ p["w"])


@dense({"w": (3, 4)}, (2, 3, 2, 3), slow=True)
def three_row_axes(p, x):
    return score(x @ p["w"])


@dense({"w": (3, 4)}, (6, 3, 2), slow=True)
def rows_on_both_sides_of_the_contraction(p, x):
    return score(jnp.einsum("tds,dk->kts", x, p["w"]))


@dense({"w": (5,)}, (5,))
def weight_vector(p, x):
    return score(p["w"] @ x)


@dense({"w": (5,)}, (6, 5), slow=True)
def weight_vector_and_rows(p, x):
    return score(x @ p["w"])


@dense({"w": (4,)}, (6,))
def outer_product(p, x):
    return score(jnp.einsum("t,k->tk", x, p["w"]))


@dense({"w": (2, 3, 4)}, (3, 4, 6))
def two_contracted_axes(p, x):
    return score(jnp.einsum("kab,abt->kt", p["w"], x))


@dense({"w": (4, 3, 2)}, (6, 3, 4), slow=True)
def two_contracted_axes_in_the_other_order(p, x):
    return score(jnp.einsum("tab,bak->tk", x, p["w"]))


@dense({"w": (2, 3, 4)}, (6, 3))
def heads_from_shared_rows(p, x):
    return score(jnp.einsum("td,hdk->htk", x, p["w"]))


@dense({"w": (3, 2, 4)}, (6, 3), slow=True)
def heads_on_the_middle_axis(p, x):
    return score(jnp.einsum("td,dhk->thk", x, p["w"]))


@dense({"w": (2, 4, 3)}, (6, 2, 4))
def heads_merged_into_the_output(p, x):
    return score(jnp.einsum("thk,hkd->td", x, p["w"]))


@dense({"w": (2, 3, 4)}, (2, 6, 3))
def weight_batch_with_data_batch(p, x):
    return score(jnp.einsum("etd,edk->etk", x, p["w"]))


@dense({"w": (2, 4, 3)}, (6, 2, 3), slow=True)
def weight_batch_on_the_left(p, x):
    return score(jnp.einsum("ekd,ted->tek", p["w"], x))


@dense({"w": (2, 5)}, (6, 2, 5), slow=True)
def weight_batch_of_vectors(p, x):
    return score(jnp.einsum("hd,thd->th", p["w"], x))


@dense({"experts": (3, 4, 2), "gate": (4, 3)}, (6, 4))
def mixture_of_experts(p, x):
    gates = jnp.exp(x @ p["gate"])
    gates = gates / gates.sum(-1, keepdims=True)
    outputs = jnp.einsum("td,edk->etk", x, p["experts"])
    return score(jnp.einsum("te,etk->tk", gates, jnp.tanh(outputs)))


@dense({"w": (2, 3, 4)}, (2, 6), (6, 3))
def weight_between_two_data_factors(p, x, y):
    return score(jnp.einsum("et,td,edk->ek", x, y, p["w"]))


@dense({"w": (2, 2, 3, 4)}, (2, 2, 5, 3), slow=True)
def two_batch_axes(p, x):
    return score(lax.dot_general(x, p["w"], (((3,), (2,)), ((1, 0), (1, 0)))))


@dense({"w": (3, 3)}, (3,), (3,))
def bilinear_form(p, x, y):
    return score(x @ p["w"] @ y)


@dense({"w": (3, 4), "b": (4,)}, (6, 3), slow=True)
def preferred_element_type(p, x):
    y = lax.dot_general(x, p["w"], (((1,), (0,)), ((), ())), preferred_element_type=x.dtype)
    return score(y + p["b"])


@dense([(3, 4), (4,), (4, 4), (4,), (4, 1)], (3,), ())
def three_layers(p, x, y):
    w1, b1, w2, b2, w3 = p
    hidden = jnp.tanh(jnp.tanh(x @ w1 + b1) @ w2 + b2)
    return jnp.sum(jnp.square(hidden @ w3 - y))
