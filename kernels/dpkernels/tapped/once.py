"""Have XLA on a CPU compute a value once, and not again for each that takes it.

It makes cheap operations part of whatever takes their result, one copy for each. The gradient at a
residual connection is a sum that ends in such operations, and the next such sum takes it: left
alone, every layer computes all sums before it anew, and costs more the deeper the model is.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives

from dpkernels.tapped.graph import Level, Local, Loop, Plain, Step


def once(x: jax.Array) -> jax.Array:
    """Returns the same floats, computed once.

    A quotient is dear to XLA, so that it makes no copies of one. Its other passes must not see that
    it is by one, nor that all numbers are alike: until after fusion, when the division goes.
    """
    one = jnp.ones_like(x)
    # Ones alone would have no batch axis under vmap, and one divisor for all is made a factor.
    return x / lax.optimization_barrier(lax.select(x == 0, one, one))


@jax.custom_vjp
def gradient_once(x: jax.Array) -> jax.Array:
    """Returns the same floats; their gradient is computed once."""
    return x


gradient_once.defvjp(lambda x: (x, None), lambda _, gradient: (once(gradient),))


def mark_skips(level: Level) -> Level:
    """Returns the program with the values marked that go past something, to be added to it."""
    taken = level.use_counts()
    steps: list[Step] = []
    skips: set[int] = set()
    for step in level.steps:
        if isinstance(step, Loop):
            steps.append(dataclasses.replace(step, body=mark_skips(step.body)))
            continue
        steps.append(step)
        if isinstance(step, Plain) and step.eqn.primitive is primitives.add_p:
            ends = [atom.index for atom in step.inputs if isinstance(atom, Local)]
            is_float = jnp.issubdtype(step.eqn.outvars[0].aval.dtype, jnp.inexact)
            if len(ends) == 2 and is_float:
                skips.update(end for end in ends if taken[end] > 1)
    return dataclasses.replace(level, steps=steps, skips=frozenset(skips))
