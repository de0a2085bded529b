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


class Examples:
    """The arguments of a call, taken apart into what is batched and what is not.

    Args:
        args: The arguments.
        batch_argnums: Which have a batch axis.
        prng_argnum: Which is a PRNG key, to be split for the examples.
        keep_batch_dim: Whether an example keeps a leading axis of 1.

    Attributes:
        batch_size: The number of examples.
        rows: Arrays with the batch on axis 0; what `arguments` is given a row of.

    Raises:
        ValueError: As `batch_size_of`.
    """

    def __init__(
        self,
        args: Sequence[PyTree],
        batch_argnums: Sequence[int],
        prng_argnum: int | None,
        keep_batch_dim: bool,
    ) -> None:
        self.batch_size = batch_size_of(args, batch_argnums)
        self._args, self._prng_argnum = args, prng_argnum
        self._keep_batch_dim = keep_batch_dim
        batched = {argnum: jax.tree.map(jnp.asarray, args[argnum]) for argnum in batch_argnums}
        keys = None
        if prng_argnum is not None:
            keys = jax.tree.map(
                lambda key: jax.random.split(key, self.batch_size), args[prng_argnum]
            )
        self.rows = (batched, keys)

    @property
    def row(self) -> PyTree:
        """Shapes and types of one row."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), self.rows)

    def arguments(self, row: PyTree) -> list[PyTree]:
        """Returns the arguments for one example."""
        batched, key = row
        if self._keep_batch_dim:
            batched = jax.tree.map(lambda x: x[None], batched)
        return [
            batched.get(i, key if i == self._prng_argnum else arg)
            for i, arg in enumerate(self._args)
        ]


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
        microbatch_size: See `sum_over_microbatches`.
        spmd_axis_name: See `jax.vmap`.

    Returns:
        The sums, added up in the dtype of the summands; the stack.
    """

    def together(rows: PyTree, is_padding: jax.Array) -> tuple[PyTree, PyTree]:
        mapped = jax.vmap(fun, spmd_axis_name=spmd_axis_name)
        values, aux = mapped(rows, is_padding)
        return jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), values), aux

    return sum_over_microbatches(together, batched, is_padding_example, microbatch_size)


def sum_over_microbatches(
    together: Callable[..., tuple[PyTree, PyTree]],
    batched: PyTree,
    is_padding_example: jax.Array,
    microbatch_size: int | None,
) -> tuple[PyTree, PyTree]:
    """Sums the first result of `together` over microbatches, and joins the second.

    Args:
        together: Called as `together(rows, is_padding)` on some rows of `batched`; returns sums
            over these rows, and arrays with these rows on axis 0.
        batched: Arrays with the batch on axis 0.
        is_padding_example: `(batch,)` bools.
        microbatch_size: How many examples run at once; the last microbatch may be smaller. A
            microbatch of padding alone is skipped, and its rows of the second result are zeros.
    """
    batch_size = is_padding_example.shape[0]
    if batch_size == 0:
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), batched)
        value, aux = jax.eval_shape(together, one, jax.ShapeDtypeStruct((1,), jnp.bool_))
        empty = jax.tree.map(lambda x: jnp.zeros((0, *x.shape[1:]), x.dtype), aux)
        return _zeros(value), empty
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

    shapes = jax.eval_shape(together, *jax.tree.map(lambda x: x[0], microbatches))

    def body(total: PyTree, microbatch: tuple[PyTree, jax.Array]) -> tuple[PyTree, PyTree]:
        skip = jnp.all(microbatch[1])
        sums, stacked = jax.lax.cond(skip, lambda *_: _zeros(shapes), together, *microbatch)
        return jax.tree.map(jnp.add, total, sums), stacked

    sums, stacked = jax.lax.scan(body, _zeros(shapes[0]), microbatches)
    joined = jax.tree.map(lambda x: x.reshape(padded_to, *x.shape[2:])[:batch_size], stacked)
    return sums, joined


def _zeros(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
