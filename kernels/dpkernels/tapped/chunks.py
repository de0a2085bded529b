"""Work through a batch a few examples at a time, so that what is large stays in the cache."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

PyTree = Any


def map_examples(fun: Callable[[PyTree], PyTree], rows: PyTree, at_once: int) -> PyTree:
    """Returns `fun(rows)`, computed for `at_once` examples at a time.

    Args:
        fun: Maps arrays with a batch axis to arrays with a batch axis.
        rows: Arrays `(batch, ...)`.
        at_once: How many examples `fun` is given; once, it may be given fewer.
    """
    batch_size = jax.tree.leaves(rows)[0].shape[0]
    if at_once >= batch_size:
        return fun(rows)
    at_once = _even(batch_size, at_once)
    count = batch_size // at_once
    if at_once == 1:
        # Without an axis of one, XLA on a CPU would see a view, and write the product out naively.
        return lax.map(
            lambda i: jax.tree.map(lambda x: x[0], fun(_part(rows, i, 1))), jnp.arange(count)
        )
    mapped = lax.map(lambda i: fun(_part(rows, i * at_once, at_once)), jnp.arange(count))
    mapped = jax.tree.map(lambda x: x.reshape(count * at_once, *x.shape[2:]), mapped)
    if count * at_once == batch_size:
        return mapped
    rest = fun(jax.tree.map(lambda x: x[count * at_once :], rows))
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), mapped, rest)


def sum_examples(fun: Callable[[PyTree], PyTree], rows: PyTree, at_once: int) -> PyTree:
    """Returns `fun(rows)` for a function that sums over examples, `at_once` of them at a time."""
    batch_size = jax.tree.leaves(rows)[0].shape[0]
    if at_once >= batch_size:
        return fun(rows)
    at_once = _even(batch_size, at_once)
    count = batch_size // at_once
    rest = count * at_once
    total = fun(jax.tree.map(lambda x: x[rest:], rows)) if rest < batch_size else None
    if total is None:
        shapes = jax.eval_shape(fun, jax.tree.map(lambda x: x[:at_once], rows))
        total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def body(total: PyTree, i: jax.Array) -> tuple[PyTree, None]:
        part = fun(_part(rows, i * at_once, at_once))
        return jax.tree.map(jnp.add, total, part), None

    return lax.scan(body, total, jnp.arange(count))[0]


def _even(batch_size: int, at_once: int) -> int:
    """Returns at most so many that nothing remains, if that needs no more than twice the turns.

    What remains is a second program to compile.
    """
    return next(
        (few for few in range(at_once, (at_once + 1) // 2 - 1, -1) if batch_size % few == 0),
        at_once,
    )


def _part(rows: PyTree, start: jax.Array, length: int) -> PyTree:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, length), rows)
