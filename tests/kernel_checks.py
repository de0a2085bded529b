"""Runs models of `kernel_models` through `clipped_grad`, and through the float64 loop."""

from functools import cache

import jax
import numpy as np
import pytest

import oracles
from dpkernels import clipped_grad
from dpkernels.clipping import STRATEGIES
from kernel_models import MODELS

# One for each way of computing norms, and one in which several meet.
REPRESENTATIVE = [
    "conv-channels_last",
    "indexing-bag_of_embeddings",
    "loops-rnn",
    "programs-causal_attention_with_two_heads",
    "scaling-layer_norm",
    "sharing-tied_embedding_with_a_layer_between",
]


def strategies(*quick):
    """Parametrizes by strategy; all but the `quick` ones are marked slow."""
    marked = [
        pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in STRATEGIES
    ]
    return pytest.mark.parametrize("strategy", marked)


def temporary_bytes(function, *args):
    """Returns what the compiled function holds beside its arguments and results."""
    compiled = jax.jit(function).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


class Truth:
    """The float64 loop over a model's examples.

    Attributes:
        values: Losses of the examples.
        gradients: Their gradients, dicts of arrays.
        norms: The norms of these.
        clip_norm: One that stands in the middle of the norms.
    """

    def __init__(self, model):
        self.values, self.gradients = oracles.jax_per_example_gradients(model)
        self.norms = [oracles.norm(gradient) for gradient in self.gradients]
        self.clip_norm = float(np.median(self.norms)) or 1.0

    def clipped_sum(self, clip_norm=None, **options):
        clip_norm = self.clip_norm if clip_norm is None else clip_norm
        return oracles.clipped_sum(self.gradients, clip_norm, **options)


@cache
def truth(name):
    return Truth(MODELS[name])


def rows(tree, which):
    return jax.tree.map(lambda leaf: leaf[which], tree)


def with_batch(model, change):
    """The model's arguments, the batched ones changed."""
    batched = model.batch_argnums
    return [change(arg) if i in batched else arg for i, arg in enumerate(model.args)]


def quick_jit(function):
    return jax.jit(function, compiler_options=oracles.QUICK_TO_COMPILE)


def make_sum(model, **options):
    """A jitted clipped sum that returns losses and norms as well."""
    return quick_jit(
        clipped_grad(
            model.loss,
            return_values=True,
            return_grad_norms=True,
            **{**model.clipped_grad_options, **options},
        )
    )


def assert_sums_close(found, expected, *, rtol=1e-5):
    """Holds the distance of a tree to a dict `by_path` against that one's norm, over all leaves."""
    oracles.assert_close(oracles.by_path(found), expected, rtol=rtol)


def assert_norms_close(found, expected, clip_norm, *, rtol=1e-5):
    """Relative to the norm, or to the clip norm, below which a norm changes nothing."""
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * clip_norm)
