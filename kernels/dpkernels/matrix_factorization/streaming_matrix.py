"""Lower-triangular matrices that multiply a stream of pytrees, one row at a time.

Row t of the product needs row t of the input and whatever the matrix remembers of the earlier ones,
so that a whole run's noise never has to be in memory.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpkernels import _validate
from dpkernels.tree_clipping import widest

PyTree = Any
_BEYOND = "Make the matrix for as many steps as are taken."


@dataclasses.dataclass(frozen=True)
class StreamingMatrix:
    """A lower-triangular matrix, given by how it multiplies the next row.

    Attributes:
        init_multiply: Takes a pytree of arrays, or of `jax.ShapeDtypeStruct`, that stands for one
            row, and returns the state before the first row: a pytree of arrays.
        multiply_next: Takes the next row and the state; returns that row of the product, of the
            same structure, shapes and types, and the next state.
        num_rows: How many rows there are, or None where they never end. Past them `multiply_next`
            raises IndexError, or returns NaN where the step is traced.

    Example:
        >>> total = prefix_sum()
        >>> state = total.init_multiply({"w": jnp.zeros(2)})
        >>> _, state = total.multiply_next({"w": jnp.ones(2)}, state)
        >>> row, state = total.multiply_next({"w": jnp.ones(2)}, state)
        >>> row["w"].tolist()
        [2.0, 2.0]
        >>> (total @ jnp.arange(4.0)).tolist()
        [0.0, 1.0, 3.0, 6.0]
    """

    init_multiply: Callable[[PyTree], Any]
    multiply_next: Callable[[PyTree, Any], tuple[PyTree, Any]]
    num_rows: int | None = None

    @classmethod
    def from_array_implementation(
        cls,
        init_multiply_fn: Callable[[Any], Any],
        multiply_next_fn: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
        *,
        num_rows: int | None = None,
    ) -> "StreamingMatrix":
        """Makes a matrix for pytrees of functions for one array: each leaf by itself.

        Args:
            init_multiply_fn: `init_multiply` for a single array.
            multiply_next_fn: `multiply_next` for a single array.
            num_rows: As the attribute.
        """

        def init_multiply(like: PyTree) -> tuple[Any, ...]:
            return tuple(init_multiply_fn(leaf) for leaf in jax.tree.leaves(like))

        def multiply_next(row: PyTree, state: tuple[Any, ...]) -> tuple[PyTree, tuple[Any, ...]]:
            leaves, structure = jax.tree.flatten(row)
            pairs = [multiply_next_fn(*each) for each in zip(leaves, state, strict=True)]
            product = jax.tree.unflatten(structure, [leaf for leaf, _ in pairs])
            return product, tuple(after for _, after in pairs)

        return cls(init_multiply, multiply_next, num_rows)

    def materialize(self, n: int) -> jax.Array:
        """Returns the first n rows and columns, `(n, n)`.

        Raises:
            IndexError: If there are fewer than n rows.
        """
        n = _validate.integer("n", n, "Pass the number of rows.", minimum=0)
        return multiply_array(self, jnp.eye(n))

    def row_norms_squared(self, n: int) -> jax.Array:
        """Returns the squared L2 norms of the first n rows, `(n,)`, without holding the rows.

        Raises:
            IndexError: If there are fewer than n rows.
        """
        n = _validate.integer("n", n, "Pass the number of rows.", minimum=0)
        _check_rows(self, n)
        columns = jnp.arange(n)

        def next_norm(state: Any, index: jax.Array) -> tuple[Any, jax.Array]:
            row, state = self.multiply_next((columns == index).astype(float), state)
            return state, jnp.sum(jnp.square(row))

        like = jax.ShapeDtypeStruct((n,), jax.dtypes.canonicalize_dtype(float))
        return jax.lax.scan(next_norm, self.init_multiply(like), columns)[1]

    def scale_rows_and_columns(
        self, row_scale: Any = None, col_scale: Any = None
    ) -> "StreamingMatrix":
        """Returns diag(row_scale) @ self @ diag(col_scale); see the function of this name."""
        return scale_rows_and_columns(self, row_scale, col_scale=col_scale)

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, StreamingMatrix):
            return multiply_streaming_matrices(self, other)
        return multiply_array(self, other)

    def __mul__(self, factor: float) -> "StreamingMatrix":
        if not isinstance(factor, numbers.Real):
            raise TypeError(f"`factor` must be a number, got {factor!r}. Use `@` for matrices.")
        if not math.isfinite(factor):
            raise ValueError(f"`factor` must be finite, got {factor!r}. Pass a finite number.")

        def multiply_next(row: PyTree, state: Any) -> tuple[PyTree, Any]:
            product, state = self.multiply_next(row, state)
            return _times(product, factor), state

        return StreamingMatrix(self.init_multiply, multiply_next, self.num_rows)

    __rmul__ = __mul__


def num_rows(matrix: Any) -> int | None:
    """Returns for how many steps a streaming or dense matrix has rows; None if they never end.

    Raises:
        TypeError: If it is neither a `StreamingMatrix` nor an array.
        ValueError: If it is an array that does not have two axes.
    """
    if isinstance(matrix, StreamingMatrix):
        return matrix.num_rows
    if not isinstance(matrix, (jax.Array, np.ndarray)):
        raise TypeError(
            f"`matrix` must be a StreamingMatrix or an array, got {type(matrix).__name__}. "
            "Make one with `toeplitz.inverse_as_streaming_matrix`, say."
        )
    if matrix.ndim != 2:
        raise ValueError(
            f"`matrix` must have two axes, got shape {matrix.shape}. Pass coefficients of a "
            "Toeplitz matrix to `toeplitz.inverse_as_streaming_matrix`."
        )
    return int(matrix.shape[0])


def identity() -> StreamingMatrix:
    """Returns the identity, which remembers nothing."""
    return StreamingMatrix(lambda like: (), lambda row, state: (row, state))


def prefix_sum() -> StreamingMatrix:
    """Returns the matrix of ones on and below the diagonal: row t is the sum so far."""
    return _decayed_sum(1.0)


def diagonal(diag: Any) -> StreamingMatrix:
    """Returns a diagonal matrix.

    Args:
        diag: `(n,)` finite numbers. The matrix has n rows: its last entry is not repeated.

    Raises:
        ValueError: If `diag` is not one axis of finite numbers.
    """
    values = finite_vector("diag", diag)

    def multiply_next(row: PyTree, step: jax.Array) -> tuple[PyTree, jax.Array]:
        factor = _entry(values, step)
        return _times(row, factor), step + jnp.ones((), jnp.uint32)

    return StreamingMatrix(lambda like: jnp.zeros((), jnp.uint32), multiply_next, len(values))


def momentum_sgd_matrix(momentum: float = 0.0, learning_rates: Any = None) -> StreamingMatrix:
    """Returns what gradient descent with momentum does to gradients: row t sums the updates so far.

    Args:
        momentum: What is kept of the velocity at each step, 0 or more.
        learning_rates: `(n,)` positive numbers, one a step, or None for 1 at all of them.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Denisov et al. 2022, arXiv 2202.08312, on momentum and learning rates.
    """
    momentum = _validate.non_negative("momentum", momentum, "Pass that of the optimizer.")
    velocity = _decayed_sum(momentum)
    if learning_rates is not None:
        rates = finite_vector("learning_rates", learning_rates)
        if not (rates > 0).all():
            raise ValueError(
                f"`learning_rates` must be positive, got {rates.min()}. Leave such steps out."
            )
        velocity = multiply_streaming_matrices(diagonal(rates), velocity)
    return multiply_streaming_matrices(prefix_sum(), velocity)


def multiply_array(A: StreamingMatrix, x: Any) -> jax.Array:
    """Returns the product of the first n rows and columns of A with x.

    Args:
        A: A streaming matrix.
        x: `(n, ...)` numbers of a floating-point type.

    Returns:
        `(n, ...)`, of the type of `x`.

    Raises:
        IndexError: If A has fewer than n rows.
        ValueError: If `x` has no axis.
    """
    x = jnp.asarray(x)
    if x.ndim == 0:
        raise ValueError(f"`x` must have an axis of rows, got {x}. Multiply by a number with `*`.")
    _check_rows(A, x.shape[0])

    def next_row(state: Any, row: jax.Array) -> tuple[Any, jax.Array]:
        product, state = A.multiply_next(row, state)
        return state, product

    state = A.init_multiply(jax.ShapeDtypeStruct(x.shape[1:], x.dtype))
    return jax.lax.scan(next_row, state, x)[1]


def multiply_streaming_matrices(A: StreamingMatrix, B: StreamingMatrix) -> StreamingMatrix:
    """Returns A @ B, with as many rows as the shorter of the two."""

    def init_multiply(like: PyTree) -> tuple[Any, Any]:
        return A.init_multiply(like), B.init_multiply(like)

    def multiply_next(row: PyTree, state: tuple[Any, Any]) -> tuple[PyTree, tuple[Any, Any]]:
        inner, after_b = B.multiply_next(row, state[1])
        product, after_a = A.multiply_next(inner, state[0])
        return product, (after_a, after_b)

    lengths = [rows for rows in (A.num_rows, B.num_rows) if rows is not None]
    return StreamingMatrix(init_multiply, multiply_next, min(lengths, default=None))


def scale_rows_and_columns(
    matrix: StreamingMatrix, row_scale: Any = None, *, col_scale: Any = None
) -> StreamingMatrix:
    """Returns diag(row_scale) @ matrix @ diag(col_scale).

    Args:
        matrix: A streaming matrix.
        row_scale: `(n,)` factors, or None for 1 everywhere.
        col_scale: `(n,)` factors, or None for 1 everywhere.

    Returns:
        A matrix of n rows; of as many as `matrix` has if both are None.

    Raises:
        ValueError: If a scale is not one axis of finite numbers.
    """
    if col_scale is not None:
        matrix = multiply_streaming_matrices(matrix, diagonal(col_scale))
    if row_scale is not None:
        matrix = multiply_streaming_matrices(diagonal(row_scale), matrix)
    return matrix


def finite_vector(name: str, values: Any) -> np.ndarray:
    """Returns float64 `(n,)` values, n at least 1; raises ValueError for anything else."""
    vector = np.asarray(values, np.float64)
    if vector.ndim != 1 or vector.size == 0 or not np.isfinite(vector).all():
        raise ValueError(
            f"`{name}` must be a non-empty vector of finite numbers, got {values!r}. "
            "Pass one number a step."
        )
    return vector


def constant(values: np.ndarray) -> jax.Array:
    """Returns float64 numbers for use in JAX: in float64 where that is on, else in float32."""
    # A copy: JAX keeps what a NumPy array became when it was last traced, and would hand out
    # float32 again where float64 is on by now.
    return jnp.asarray(values.astype(jax.dtypes.canonicalize_dtype(np.float64)))


def _decayed_sum(decay: float) -> StreamingMatrix:
    def init_multiply(like: Any) -> jax.Array:
        return jnp.zeros(like.shape, widest([like]))

    def multiply_next(row: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = total * decay + row.astype(total.dtype)
        return total.astype(row.dtype), total

    return StreamingMatrix.from_array_implementation(init_multiply, multiply_next)


def _entry(values: np.ndarray, step: jax.Array) -> jax.Array:
    """Returns an entry; past the last one raises IndexError, or is NaN where `step` is traced."""
    if not isinstance(step, jax.core.Tracer) and int(step) >= len(values):
        raise IndexError(
            f"`step` must be below {len(values)}, the number of rows, got {int(step)}. {_BEYOND}"
        )
    # JAX would clamp the index by itself: the last row once more, and for noise that is a leak.
    return constant(values).at[step].get(mode="fill", fill_value=jnp.nan)


def _times(tree: PyTree, factor: Any) -> PyTree:
    def scale(leaf: jax.Array) -> jax.Array:
        kind = widest([leaf])
        return (leaf.astype(kind) * jnp.asarray(factor, kind)).astype(leaf.dtype)

    return jax.tree.map(scale, tree)


def _check_rows(matrix: StreamingMatrix, n: int) -> None:
    if matrix.num_rows is not None and n > matrix.num_rows:
        raise IndexError(
            f"`n` must be at most {matrix.num_rows}, the number of rows, got {n}. {_BEYOND}"
        )
