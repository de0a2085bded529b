"""Run a function on every example of a batch, and add up its results."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def batch_size_of(args: Sequence[PyTree], batch_argnums: Sequence[int]) -> int:
    """Returns the common length of axis 0.

    Raises:
        ValueError: If an argument is missing, has no leaves, or leaves disagree or lack the axis.
    """
    if max(batch_argnums) >= len(args):
        raise ValueError(
            f"`batch_argnums` must point at arguments of the call, got {max(batch_argnums)} "
            f"with {len(args)} arguments. Pass the batch by position."
        )
    leaves = jax.tree.leaves([args[argnum] for argnum in batch_argnums])
    shapes = [jnp.shape(leaf) for leaf in leaves]
    if not shapes or not all(shapes):
        raise ValueError(
            f"The batch must hold arrays with a leading batch axis, got shapes {shapes}. "
            "Add the axis, or name other `batch_argnums`."
        )
    sizes = sorted({shape[0] for shape in shapes})
    if len(sizes) > 1:
        raise ValueError(
            f"The batch must have one size on axis 0, got {sizes}. Pass the same number of rows "
            "in every array of the batch."
        )
    return int(sizes[0])


def sum_over_examples(
    fun: Callable[..., tuple[PyTree, PyTree]],
    batched: PyTree,
    is_padding_example: jax.Array,
    *,
    microbatch_size: int | None,
    spmd_axis_name: str | None,
) -> tuple[PyTree, PyTree]:
    """Sums the first result of `fun` over the examples, and stacks the second.

    Args:
        fun: Called as `fun(example, is_padding)` on one row of `batched`.
        batched: Arrays with the batch on axis 0.
        is_padding_example: `(batch,)` bools.
        microbatch_size: How many examples run at once; the last microbatch may be smaller. A
            microbatch of padding alone is skipped, and its rows of the second result are zeros.
        spmd_axis_name: See `jax.vmap`.

    Returns:
        The sums, added up in the dtype of the summands; the stack.
    """
    batch_size = is_padding_example.shape[0]

    def together(rows: PyTree, is_padding: jax.Array) -> tuple[PyTree, PyTree]:
        mapped = jax.vmap(fun, spmd_axis_name=spmd_axis_name)
        values, aux = mapped(rows, is_padding)
        return jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), values), aux

    row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batched)
    value, aux = jax.eval_shape(fun, row, jax.ShapeDtypeStruct((), jnp.bool_))
    if batch_size == 0:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), value), _empty(aux)
    if microbatch_size is None or microbatch_size >= batch_size:
        return together(batched, is_padding_example)

    count = -(-batch_size // microbatch_size)
    padded_to = count * microbatch_size
    # The rows that fill up the last microbatch repeat a real one: no new values, so no new NaN.
    rows = jnp.minimum(jnp.arange(padded_to), batch_size - 1)
    is_padding = jnp.where(jnp.arange(padded_to) < batch_size, is_padding_example[rows], True)
    microbatches = jax.tree.map(
        lambda x: x.reshape(count, microbatch_size, *x.shape[1:]),
        (jax.tree.map(lambda x: x[rows], batched), is_padding),
    )

    def body(total: PyTree, microbatch: tuple[PyTree, jax.Array]) -> tuple[PyTree, PyTree]:
        shapes = jax.eval_shape(together, *microbatch)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        skip = jnp.all(microbatch[1])
        sums, stacked = jax.lax.cond(skip, lambda *_: zeros, together, *microbatch)
        return jax.tree.map(jnp.add, total, sums), stacked

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), value)
    sums, stacked = jax.lax.scan(body, zero, microbatches)
    joined = jax.tree.map(lambda x: x.reshape(padded_to, *x.shape[2:])[:batch_size], stacked)
    return sums, joined


def _empty(aux: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.zeros((0, *x.shape), x.dtype), aux)
