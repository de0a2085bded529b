"""Weights inside scan, map, while, cond, checkpoint, jit and functions with rules of their own."""

import jax
import jax.numpy as jnp
from jax import lax

from kernel_models.base import Family, integers, score

loops = Family("loops")

CELL = {"w": (2, 3), "u": (3, 3), "b": (3,)}


def run(cell, start, xs, **options):
    return lax.scan(lambda h, x: (cell(h, x),) * 2, start, xs, **options)[1]


def zeros(size, x):
    return jnp.zeros(size, x.dtype)


@loops(CELL, (6, 2))
def rnn(p, x):
    return score(run(lambda h, t: jnp.tanh(t @ p["w"] + h @ p["u"] + p["b"]), zeros(3, x), x))


@loops(CELL, (6, 2))
def rnn_with_input_product_outside(p, x):
    inputs = x @ p["w"] + p["b"]
    return score(run(lambda h, t: jnp.tanh(t + h @ p["u"]), zeros(3, x), inputs))


@loops({"w": (2, 3), "v": (2, 3), "u": (3, 3)}, (6, 2))
def rnn_in_both_directions_with_input_products_outside(p, x):
    def cell(h, t):
        return jnp.tanh(h @ p["u"] + t)

    there = run(cell, zeros(3, x), x @ p["w"])
    return score(jnp.concatenate([there, run(cell, zeros(3, x), x @ p["v"], reverse=True)]))


@loops(CELL, (6, 2), slow=True)
def rnn_whose_input_product_is_used_as_well(p, x):
    inputs = x @ p["w"] + p["b"]
    return score(run(lambda h, t: jnp.tanh(t + h @ p["u"]), zeros(3, x), inputs) + inputs)


@loops({"w": (3, 2), "u": (3, 3)}, (6, 2), slow=True)
def rnn_with_weights_transposed_inside(p, x):
    return score(run(lambda h, t: jnp.tanh(t @ p["w"].T + p["u"] @ h), zeros(3, x), x))


@loops(CELL | {"start": (3,)}, (6, 2))
def rnn_with_a_learned_start_run_backwards(p, x):
    cell = lambda h, t: jnp.tanh(t @ p["w"] + h @ p["u"] + p["b"])  # noqa: E731
    return score(run(cell, p["start"], x, reverse=True))


@loops(CELL, (6, 2), slow=True)
def rnn_unrolled_in_part(p, x):
    cell = lambda h, t: jnp.tanh(t @ p["w"] + h @ p["u"] + p["b"])  # noqa: E731
    return score(run(cell, zeros(3, x), x, unroll=4)[-1])


@loops({"w": (2, 12), "u": (3, 12), "b": (12,)}, (4, 2))
def lstm(p, x):
    def step(carry, t):
        h, c = carry
        i, f, g, o = jnp.split(t @ p["w"] + h @ p["u"] + p["b"], 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    return score(lax.scan(step, (zeros(3, x), zeros(3, x)), x)[1])


@loops({"w": (2, 9), "u": (3, 9), "b": (9,), "c": (3,)}, (4, 2), slow=True)
def gru(p, x):
    def cell(h, t):
        inputs, states = t @ p["w"] + p["b"], h @ p["u"]
        reset, update = jax.nn.sigmoid(inputs[:6] + states[:6]).reshape(2, 3)
        new = jnp.tanh(inputs[6:] + reset * (states[6:] + p["c"]))
        return (1 - update) * new + update * h

    return score(run(cell, zeros(3, x), x))


@loops({"table": (7, 2), "head": (3, 2)} | CELL, integers(0, 7, 5), (), slow=True)
def rnn_over_embedded_tokens(p, tokens, y):
    cell = lambda h, t: jnp.tanh(p["table"][t] @ p["w"] + h @ p["u"])  # noqa: E731
    return jnp.sum(jnp.square(run(cell, p["b"], tokens)[-1] @ p["head"] - y))


@loops({"w": (3, 4, 4), "b": (3, 4)}, (5, 4))
def stacked_layers_as_xs(p, x):
    return score(lax.scan(lambda h, q: (jnp.tanh(h @ q["w"] + q["b"]), None), x, p)[0])


@loops({"layers": (2, 3, 3), "shared": (3, 3)}, (4, 3), slow=True)
def stacked_layers_with_a_shared_one(p, x):
    def layer(h, w):
        return jnp.tanh(h @ w) + h @ p["shared"], jnp.sum(h)

    h, sums = lax.scan(layer, x, p["layers"])
    return score(h) + score(sums)


@loops({"u": (3, 3), "w": (2, 3)}, (2, 3, 2), slow=True)
def nested_scan(p, x):
    def outer(h, rows):
        inner = run(lambda s, t: jnp.tanh(t @ p["w"] + s @ p["u"]), h, rows)
        return inner[-1], inner.sum()

    h, sums = lax.scan(outer, zeros(3, x), x)
    return score(h) + score(sums)


@loops({"w": (3, 3)}, (4, 3), slow=True)
def weight_in_the_carry(p, x):
    def step(carry, t):
        h, w = carry
        return (jnp.tanh(t + h @ w), 0.9 * w), None

    return score(lax.scan(step, (zeros(3, x), p["w"]), x)[0][0])


@loops({"w": (3, 3)}, (4, 3))
def weight_updated_by_data_in_the_carry(p, x):
    def step(w, t):
        return w - 0.1 * jnp.outer(jnp.tanh(w @ t), t), w @ t

    return score(lax.scan(step, p["w"], x)[1])


@loops({"w": (2, 2, 2)}, (2, 3, 2), slow=True)
def convolution_in_a_scan(p, x):
    def cell(h, t):
        return jnp.tanh(lax.conv_general_dilated(h[None], p["w"], (1,), "SAME")[0] + t[:, None])

    return score(run(cell, jnp.zeros((2, 3), x.dtype), x[0]))


@loops({"w": (2, 3), "b": (3,)}, (4, 2))
def lax_map(p, x):
    return score(lax.map(lambda row: jnp.tanh(row @ p["w"] + p["b"]), x))


@loops({"w": (2, 3)}, (4, 2), slow=True)
def vmap_inside(p, x):
    return score(jax.vmap(lambda row: jnp.tanh(row @ p["w"]))(x))


@loops({"w": (3, 3)}, (3,), slow=True)
def fori_loop(p, x):
    return score(lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p["w"]), x))


@loops({"w": (3, 3)}, (3,))
def while_loop_on_data(p, x):
    halved = lax.while_loop(
        lambda h: jnp.sum(jnp.square(h)) > 1, lambda h: h / 2, lax.stop_gradient(x)
    )
    return score(jnp.tanh(halved @ p["w"]) * x)


@loops({"a": (3, 2), "b": (3, 2), "c": (2,)}, (3,))
def cond_on_data(p, x):
    y = lax.cond(x[0] > 0, lambda: x @ p["a"], lambda: jnp.tanh(x @ p["b"]) * 2)
    return score(y + p["c"])


@loops({"w": (3, 3, 2)}, integers(0, 4), (3,))
def switch_on_data(p, index, x):
    branches = [lambda v, i=i: jnp.tanh(v @ p["w"][i]) * (i + 1.0) for i in range(3)]
    return score(lax.switch(index, branches, x))


@loops({"a": (3, 3), "b": (3, 3)}, (5, 3), slow=True)
def checkpoint(p, x):
    layer = jax.checkpoint(lambda w, h: jnp.tanh(h @ w))
    return score(layer(p["b"], layer(p["a"], x)))


@loops({"w": (3, 3, 3)}, (4, 3))
def checkpointed_layers_in_a_scan(p, x):
    layer = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
    return score(lax.scan(layer, x, p["w"])[0])


@loops({"w": (3, 3)}, (4, 3))
def jit_inside(p, x):
    layer = jax.jit(lambda w, h: jnp.tanh(h @ w))
    return score(layer(p["w"], layer(p["w"], x)))


@jax.custom_jvp
def tanh_with_a_rule(w, x):
    return jnp.tanh(x @ w)


@tanh_with_a_rule.defjvp
def _(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    y = jnp.tanh(x @ w)
    return y, (1 - y**2) * (dx @ w + 0.5 * (x @ dw))


@loops({"w": (3, 3)}, (4, 3))
def custom_jvp_that_is_not_the_derivative(p, x):
    return score(tanh_with_a_rule(p["w"], x) @ p["w"])


@jax.custom_vjp
def dense_with_a_rule(w, x):
    return x @ w


dense_with_a_rule.defvjp(
    lambda w, x: (x @ w, (w, x)), lambda kept, dy: (2 * kept[1].T @ dy, dy @ kept[0].T)
)


@loops({"w": (3, 3)}, (4, 3))
def custom_vjp_that_is_not_the_derivative(p, x):
    return score(jnp.tanh(dense_with_a_rule(p["w"], x)) @ p["w"])


@jax.custom_jvp
def relu6(x):
    return jnp.clip(x, 0, 6)


relu6.defjvps(lambda dx, y, x: jnp.where((x > 0) & (x < 6), dx, jnp.zeros_like(dx)))


@loops({"w": (3, 3), "b": (3,)}, (4, 3), slow=True)
def activation_with_a_rule(p, x):
    return score(jax.nn.gelu(relu6(x @ p["w"] + p["b"])))
