"""Sites in loops whose gradient is that of a site before the loop."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import dpkernels
from dpkernels.tapped.graph import read
from dpkernels.tapped.shared import share_gradients
from kernel_checks import temporary_bytes

X = jnp.ones((5, 2))
PARAMS = {"b": jnp.ones(3), "u": jnp.ones((3, 3)), "w": jnp.ones((2, 3))}


def shared(loss):
    leaves, tree = jax.tree.flatten(PARAMS)
    program = jax.make_jaxpr(lambda *args: loss(jax.tree.unflatten(tree, args[:-1]), args[-1]))
    graph = read(
        program(*leaves, X),
        num_trainable=len(leaves),
        num_differentiated=1,
        keeps_site=lambda eqn, weights: False,
    )
    level, pairs = share_gradients(graph.top)
    sites = level.sites()
    assert [i for i, site in enumerate(sites) if not site.has_tap] == sorted(pairs)
    return {
        sites[one].eqn.primitive.name: sites[other].eqn.primitive.name
        for one, other in pairs.items()
    }


def rnn(cell, inputs):
    return lax.scan(lambda h, t: (cell(h, t),) * 2, jnp.zeros(3), inputs)[1].sum()


@pytest.mark.parametrize("is_first", [False, True])
def test_product_of_the_state_has_the_gradient_of_what_it_is_added_to(is_first):
    def loss(p, x):
        def cell(h, t):
            return jnp.tanh(h @ p["u"] + t if is_first else t + h @ p["u"])

        return rnn(cell, x @ p["w"] + p["b"])

    assert shared(loss) == {"dot_general": "add"}


LOSSES = {
    "used after the loop as well": lambda p, x: (
        lambda y: rnn(lambda h, t: jnp.tanh(t + h @ p["u"]), y) + y.sum()
    )(x @ p["w"]),
    "used twice inside": lambda p, x: rnn(lambda h, t: jnp.tanh(t + h @ p["u"]) + t, x @ p["w"]),
    "product used twice": lambda p, x: rnn(
        lambda h, t: (lambda y: jnp.tanh(t + y) * y)(h @ p["u"]), x @ p["w"]
    ),
    "subtracted": lambda p, x: rnn(lambda h, t: jnp.tanh(t - h @ p["u"]), x @ p["w"]),
    "the same at every turn": lambda p, x: rnn(
        lambda h, t: jnp.tanh((x @ p["w"])[0] + h @ p["u"]), x
    ),
    "scaled on the way": lambda p, x: rnn(lambda h, t: jnp.tanh(t + h @ p["u"]), 2 * (x @ p["w"])),
}


@pytest.mark.parametrize("name", LOSSES)
def test_other_gradients_are_taken_where_they_arise(name):
    assert shared(LOSSES[name]) == {}


def test_gradients_of_a_recurrent_layer_are_held_once():
    """A step needs hardly more memory than one without privacy."""
    p = {"u": jnp.zeros((128, 128)), "w": jnp.zeros((16, 128))}
    x = jnp.zeros((64, 16, 16))

    def loss(p, x):
        cell = lambda h, t: (jnp.tanh(t + h @ p["u"]),) * 2  # noqa: E731
        return lax.scan(cell, jnp.zeros(128), x @ p["w"])[1].sum()

    gradient = jax.grad(lambda p, x: jax.vmap(loss, (None, 0))(p, x).sum())
    private = dpkernels.clipped_grad(loss, l2_clip_norm=1.0, keep_batch_dim=False).fast_fun
    plain, private = (temporary_bytes(function, p, x) for function in (gradient, private))
    assert private / plain <= 1.1
