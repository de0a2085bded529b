"""Random stacks of layers that share parameters at random, against the float64 loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from kernel_checks import STRATEGIES, Truth, assert_norms_close, assert_sums_close, make_sum
from kernel_models import BATCH, Model
from kernel_models.base import normalize, score

ROWS, WIDTH, TOKENS = 5, 4, 6

# Every layer maps (ROWS, WIDTH) to itself, so that layers stack, and share, in any order. The
# matrices are all WIDTH by WIDTH, in whatever parameter they lie.
MATRICES = {
    "dense": lambda p: p["dense"],
    "transposed": lambda p: p["dense"].T,
    "other": lambda p: p["other"],
    "product": lambda p: p["dense"] @ p["other"],
    "scaled": lambda p: 0.5 * p["other"],
    "left slice": lambda p: p["wide"][:, :WIDTH],
    "right slice": lambda p: p["wide"][:, WIDTH:],
    "overlapping slice": lambda p: p["wide"][:, 1 : 1 + WIDTH],
    "reshaped": lambda p: p["wide"].reshape(2 * WIDTH, WIDTH)[::2],
    "rows of the table": lambda p: p["table"][1 : 1 + WIDTH],
    "slice of the kernel": lambda p: p["kernel"][1],
    "low rank": lambda p: p["table"][:2].T @ p["other"][:2],
    "normed": lambda p: normalize(p["dense"], 0),
    "rounded": lambda p: p["other"] + lax.stop_gradient(jnp.round(p["other"]) - p["other"]),
}
VECTORS = {
    "bias": lambda p: p["bias"],
    "gain": lambda p: p["gain"],
    "row of a matrix": lambda p: p["dense"][0],
    "mean of a matrix": lambda p: p["other"].mean(0),
}


def convolve(h, kernel, dilation=1, groups=1):
    layout = ("NWC", "WIO", "NWC")
    options = {"rhs_dilation": (dilation,), "feature_group_count": groups}
    return lax.conv_general_dilated(
        h[None], kernel, (1,), "SAME", **options, dimension_numbers=layout
    )[0]


def recur(h, w, u, reverse):
    def cell(state, row):
        state = jnp.tanh(row @ w + state @ u)
        return state, state

    return lax.scan(cell, jnp.zeros(WIDTH, h.dtype), h, reverse=reverse)[1]


def attend(h, q, k, v):
    return jax.nn.softmax((h @ q) @ (h @ k).T / 2) @ (h @ v)


# From a layer's name to `(h, tokens, p, matrices, vectors) -> h`.
LAYERS = {
    "dense": lambda h, t, p, m, v: h @ m[0],
    "left": lambda h, t, p, m, v: jnp.einsum("ji,tj->ti", m[0], h),
    "affine": lambda h, t, p, m, v: jnp.tanh(h @ m[0] + v[0]),
    "gated": lambda h, t, p, m, v: jax.nn.sigmoid(h @ m[0]) * (h @ m[1]),
    "residual": lambda h, t, p, m, v: h + jnp.tanh(h @ m[0]) @ m[1],
    "bias": lambda h, t, p, m, v: jnp.tanh(h + v[0]),
    "norm": lambda h, t, p, m, v: normalize(h, -1) * (1 + v[0]) + v[1],
    "group norm": lambda h, t, p, m, v: normalize(h, (0,)) * v[0],
    "embed": lambda h, t, p, m, v: h + p["table"][t],
    "vocabulary": lambda h, t, p, m, v: jnp.tanh(h @ p["table"].T) @ p["table"],
    "conv": lambda h, t, p, m, v: jnp.tanh(convolve(h, p["kernel"])),
    "dilated conv": lambda h, t, p, m, v: jnp.tanh(convolve(h, p["kernel"], 2)),
    "depthwise": lambda h, t, p, m, v: convolve(h, p["kernel"][:, :1], groups=WIDTH),
    "conv of matrices": lambda h, t, p, m, v: convolve(h, jnp.stack(m[:2])),
    "scan": lambda h, t, p, m, v: recur(h, m[0], m[1], reverse=False),
    "reverse scan": lambda h, t, p, m, v: recur(h + v[0], m[0], m[1], reverse=True),
    "attention": lambda h, t, p, m, v: attend(h, *m),
    "checkpoint": lambda h, t, p, m, v: jax.checkpoint(lambda a, w: jnp.tanh(a @ w))(h, m[0]),
    "heads": lambda h, t, p, m, v: jnp.einsum("td,hdk->tk", h, jnp.stack(m)),
    "pooled": lambda h, t, p, m, v: h + jnp.tanh(h.mean(0) @ m[0]),
}


@st.composite
def losses(draw):
    """Draws up to five layers; the parameters that they name are shared by what they happen to."""
    matrices = st.lists(st.sampled_from(sorted(MATRICES)), min_size=3, max_size=3)
    vectors = st.lists(st.sampled_from(sorted(VECTORS)), min_size=2, max_size=2)
    layer = st.tuples(st.sampled_from(sorted(LAYERS)), matrices, vectors)
    return draw(st.lists(layer, min_size=1, max_size=5))


def make_loss(layers):
    def loss(p, x, tokens):
        h = x
        for layer, matrices, vectors in layers:
            m = [MATRICES[name](p) for name in matrices]
            v = [VECTORS[name](p) for name in vectors]
            h = LAYERS[layer](h, tokens, p, m, v)
        return score(h * x)

    return loss


def make_args(seed):
    rng = np.random.default_rng(seed)
    shapes = {
        "dense": (WIDTH, WIDTH),
        "other": (WIDTH, WIDTH),
        "wide": (WIDTH, 2 * WIDTH),
        "table": (TOKENS, WIDTH),
        "kernel": (3, WIDTH, WIDTH),
        "bias": (WIDTH,),
        "gain": (WIDTH,),
    }
    params = {name: 0.4 * rng.normal(size=shape) for name, shape in shapes.items()}
    x = rng.normal(size=(BATCH, ROWS, WIDTH)) * rng.uniform(0.5, 2, size=(BATCH, 1, 1))
    params, x = jax.tree.map(np.float32, (params, x))
    return params, x, rng.integers(0, TOKENS, (BATCH, ROWS), dtype=np.int32)


def check(layers, strategy, seed):
    model = Model("random", make_loss(layers), make_args(seed), batch_argnums=(1, 2))
    expected = Truth(model)
    function = make_sum(model, l2_clip_norm=expected.clip_norm, strategy=strategy)
    total, aux = function(*model.args)
    assert_sums_close(total, expected.clipped_sum())
    assert_norms_close(aux.grad_norms, expected.norms, expected.clip_norm)


drawn = given(losses(), st.sampled_from(STRATEGIES), st.integers(0, 3))


@settings(max_examples=6)
@drawn
def test_random_models_equal_a_float64_loop(layers, strategy, seed):
    check(layers, strategy, seed)


@pytest.mark.slow
@settings(max_examples=300)
@drawn
def test_many_random_models_equal_a_float64_loop(layers, strategy, seed):
    check(layers, strategy, seed)
