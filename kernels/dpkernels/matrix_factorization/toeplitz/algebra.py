"""Products, inverses and entries of lower-triangular Toeplitz matrices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import signal

from dpkernels import _validate


def numpy_of(*arrays: Any) -> Any:
    """Returns `jax.numpy` if an array is traced, else `numpy`.

    Sensitivities and errors decide how much noise there is, and in JAX float64 is mostly off.
    """
    return jnp if any(isinstance(array, jax.core.Tracer) for array in arrays) else np


def check_coefs(name: str, coef: Any) -> Any:
    """Returns coefficients as an array, float64 where concrete.

    Raises:
        ValueError: If they are not a non-empty vector, or not finite.
    """
    array = coef if isinstance(coef, jax.core.Tracer) else np.asarray(coef, np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(
            f"`{name}` must be a non-empty vector, got shape {array.shape}. "
            "Pass the first column of the matrix."
        )
    if isinstance(array, np.ndarray) and not np.isfinite(array).all():
        raise ValueError(f"`{name}` must be finite, got {coef!r}. Look at how it was optimised.")
    return array


def check_invertible(name: str, coef: Any) -> Any:
    """Returns coefficients as `check_coefs` does, if the first of them is not zero."""
    array = check_coefs(name, coef)
    if isinstance(array, np.ndarray) and array[0] == 0:
        raise ValueError(
            f"`{name}` must not start with zero, got {coef!r}. The matrix has no inverse."
        )
    return array


def check_size(n: int | None, default: int) -> int:
    """Returns a matrix's size: `n`, or `default` where it is None."""
    if n is None:
        return default
    return _validate.integer("n", n, "Pass the number of steps.", minimum=1)


def pad_coefs_to_n(coef: Any, n: int | None = None) -> Any:
    """Returns the first n coefficients, with zeros where there are no more; all for None.

    Args:
        coef: `(b,)` coefficients.
        n: How many to return.

    Raises:
        ValueError: If an argument is out of range.
    """
    return resize(check_coefs("coef", coef), n)


def materialize_lower_triangular(coef: Any, n: int | None = None) -> Any:
    """Returns the `(n, n)` matrix.

    Args:
        coef: `(b,)` coefficients.
        n: Its size; by default b.

    Raises:
        ValueError: If an argument is out of range.
    """
    column = resize(check_coefs("coef", coef), n)
    index = np.arange(column.size)
    return numpy_of(column).tril(column[np.abs(index[:, None] - index)])


def solve_banded(coef: Any, rhs: Any) -> Any:
    """Returns x with C x = rhs, in O(n b) operations for each column.

    Args:
        coef: `(b,)` coefficients of C.
        rhs: `(n, ...)` right-hand sides.

    Returns:
        `(n, ...)`.

    Raises:
        ValueError: If `coef` starts with zero, or `rhs` has no axis.
    """
    coef = check_invertible("coef", coef)
    rhs = rhs if isinstance(rhs, jax.core.Tracer) else np.asarray(rhs, np.float64)
    if rhs.ndim == 0:
        raise ValueError(f"`rhs` must have an axis of rows, got {rhs}. Pass one number a row.")
    return _solve(coef[: rhs.shape[0]], rhs)


def multiply(lhs_coef: Any, rhs_coef: Any, n: int | None = None) -> Any:
    """Returns the first n coefficients of the product, `(n,)`.

    Args:
        lhs_coef: `(b,)` coefficients.
        rhs_coef: `(c,)` coefficients.
        n: How many to return; by default b, if b = c.

    Raises:
        ValueError: If `n` is left out and b is not c.
    """
    lhs, rhs = check_coefs("lhs_coef", lhs_coef), check_coefs("rhs_coef", rhs_coef)
    if n is None and lhs.size != rhs.size:
        raise ValueError(
            f"`n` must be given for coefficients of different lengths, got {lhs.size} and "
            f"{rhs.size}. Pass the size of the matrices."
        )
    return product(lhs, rhs, check_size(n, lhs.size))


def inverse_coef(coef: Any, n: int | None = None) -> Any:
    """Returns the first n coefficients of the inverse, `(n,)`.

    Args:
        coef: `(b,)` coefficients, the first not zero.
        n: How many to return; by default b.

    Raises:
        ValueError: If an argument is out of range.
    """
    coef = check_invertible("coef", coef)
    size = check_size(n, coef.size)
    return _solve(coef[:size], np.eye(1, size)[0])


def resize(coef: Any, n: int | None) -> Any:
    """Returns checked coefficients cut, or padded with zeros, to length n."""
    size = check_size(n, coef.size)
    return numpy_of(coef).pad(coef[:size], (0, max(size - coef.size, 0)))


def product(lhs: Any, rhs: Any, n: int) -> Any:
    """Returns n coefficients of the product of checked coefficients."""
    if numpy_of(lhs, rhs) is np:
        return resize(np.convolve(lhs[:n], rhs[:n]), n)
    lhs, rhs = _same_type(lhs[:n], rhs[:n])
    return resize(jnp.convolve(lhs, rhs, precision=jax.lax.Precision.HIGHEST), n)


def _solve(coef: Any, rhs: Any) -> Any:
    """Multiplying by the inverse is a recursive filter."""
    if numpy_of(coef, rhs) is np:
        return signal.lfilter([1.0], coef, rhs, axis=0)
    return _solve_traced(*_same_type(coef, rhs))


def _solve_traced(coef: jax.Array, rhs: jax.Array) -> jax.Array:
    def next_row(earlier: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        known = jnp.tensordot(coef[1:], earlier, axes=1, precision=jax.lax.Precision.HIGHEST)
        solved = (row - known) / coef[0]
        return jnp.concatenate([solved[None], earlier])[: coef.size - 1], solved

    earlier = jnp.zeros((coef.size - 1, *rhs.shape[1:]), rhs.dtype)
    return jax.lax.scan(next_row, earlier, rhs)[1]


def _same_type(first: Any, second: Any) -> tuple[jax.Array, jax.Array]:
    first, second = jnp.asarray(first), jnp.asarray(second)
    kind = jnp.promote_types(first.dtype, second.dtype)
    return first.astype(kind), second.astype(kind)
