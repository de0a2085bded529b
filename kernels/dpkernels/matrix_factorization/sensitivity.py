"""How far one participant can move the output of a strategy matrix, in L2 norm.

Whoever takes part in several steps moves C G by the sum of the columns of C at those steps, each
times a vector of norm at most 1 (the clipped gradient). Which steps these can be is the
participation pattern: at least `min_sep` steps apart and at most `max_participations` of them, or
every epoch at the same place. All numbers are computed in float64 on the host.
"""

from typing import Any

import numpy as np

from dpkernels import _validate

_SEPARATION = "Pass how many steps lie between two of one participant's, at least 1."


def single_participation_sensitivity(C: Any) -> float:
    """Returns the largest L2 norm of a column: the sensitivity where everybody takes part once.

    Args:
        C: `(m, n)` strategy matrix.

    Raises:
        ValueError: If C is not a matrix of finite numbers.

    Example:
        >>> single_participation_sensitivity(np.array([[3.0, 0.0], [4.0, 1.0]]))
        5.0
    """
    return float(np.sqrt(np.square(_matrix("C", C)).sum(axis=0).max()))


def minsep_true_max_participations(
    n: int, min_sep: int, *, max_participations: int | None = None
) -> int:
    """Returns in how many of n steps one can take part, `min_sep` or more steps apart.

    Args:
        n: How many steps there are.
        min_sep: The least distance of two participations; 1 allows every step.
        max_participations: A further bound on their number, or None.

    Raises:
        ValueError: If an argument is below 1.
    """
    n = _validate.integer("n", n, "Pass the number of steps.", minimum=1)
    min_sep = _validate.integer("min_sep", min_sep, _SEPARATION, minimum=1)
    fitting = -(-n // min_sep)
    if max_participations is None:
        return fitting
    hint = "Pass None if `min_sep` is the only bound."
    return min(
        fitting, _validate.integer("max_participations", max_participations, hint, minimum=1)
    )


def max_participation_for_linear_fn(
    x: Any, min_sep: int = 1, *, max_participations: int | None = None
) -> float:
    """Returns the largest sum of entries of x over all participation patterns.

    Args:
        x: `(n,)` finite numbers.
        min_sep: The least distance of two participations.
        max_participations: The most participations, or None.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Choquette-Choo et al. 2023, arXiv 2306.08153, on b-min-sep participation.
    """
    vector = np.asarray(x, np.float64)
    if vector.ndim != 1 or not vector.size or not np.isfinite(vector).all():
        raise ValueError(
            f"`x` must be a non-empty vector of finite numbers, got {x!r}. Flatten it."
        )
    return float(_best_pattern(vector, min_sep, max_participations))


def get_min_sep_sensitivity_upper_bound(
    C: Any, min_sep: int = 1, *, max_participations: int | None = None
) -> float:
    """Returns an upper bound of the sensitivity of any matrix; see the form for X.

    Args:
        C: `(m, n)` strategy matrix.
        min_sep: The least distance of two participations.
        max_participations: The most participations, or None.
    """
    return get_min_sep_sensitivity_upper_bound_for_X(
        _gram_matrix(C), min_sep, max_participations=max_participations
    )


def get_min_sep_sensitivity_upper_bound_for_X(  # noqa: N802 (JAX Privacy's name)
    X: Any, min_sep: int = 1, *, max_participations: int | None = None
) -> float:
    """Returns an upper bound of the sensitivity of any C with X = CᵀC, in O(n²k) operations.

    Args:
        X: `(n, n)` symmetric matrix.
        min_sep: The least distance of two participations.
        max_participations: The most participations, or None.

    Raises:
        ValueError: If an argument is out of range.

    Guarantees:
        Never below the sensitivity, whatever the signs of X and the directions of the gradients.

    Source:
        Choquette-Choo et al. 2023, arXiv 2306.08153, on b-min-sep participation.
    """
    # A pattern u costs at most the sum over its rows i of (|X| u)_i. Each row is bounded by the
    # pattern that is worst for it alone, and then the rows by the pattern that is worst for them.
    rows = _best_pattern(np.abs(_symmetric("X", X)), min_sep, max_participations)
    return float(np.sqrt(_best_pattern(rows, min_sep, max_participations)))


def get_sensitivity_banded(
    C: Any, min_sep: int = 1, *, max_participations: int | None = None
) -> float:
    """Returns the sensitivity of a matrix with at most `min_sep` bands; see the form for X.

    Args:
        C: `(m, n)` strategy matrix.
        min_sep: The least distance of two participations.
        max_participations: The most participations, or None.
    """
    return get_sensitivity_banded_for_X(
        _gram_matrix(C), min_sep, max_participations=max_participations
    )


def get_sensitivity_banded_for_X(  # noqa: N802 (JAX Privacy's name)
    X: Any, min_sep: int = 1, *, max_participations: int | None = None
) -> float:
    """Returns the sensitivity of C with X = CᵀC, where columns `min_sep` or more apart do not meet.

    Args:
        X: `(n, n)` symmetric matrix with zeros where |i - j| is `min_sep` or more.
        min_sep: The least distance of two participations.
        max_participations: The most participations, or None.

    Raises:
        ValueError: If columns at which one can take part twice are not orthogonal, or another
            argument is out of range.

    Guarantees:
        Exact up to rounding errors left in X, which are added to it.

    Source:
        Choquette-Choo et al. 2023, arXiv 2306.08153, on banded matrices.
    """
    X = _symmetric("X", X)
    _validate.integer("min_sep", min_sep, _SEPARATION, minimum=1)
    outside = np.abs(X) * (1 - banded_symmetric_mask(len(X), min_sep))
    if outside.max() > 1e-12 * np.diagonal(X).max():
        row, column = np.unravel_index(outside.argmax(), X.shape)
        raise ValueError(
            f"`X` must be zero where |i - j| >= min_sep = {min_sep}, got {X[row, column]} at "
            f"({row}, {column}). Use `get_min_sep_sensitivity_upper_bound_for_X`."
        )
    worst = _best_pattern(np.diagonal(X), min_sep, max_participations)
    return float(np.sqrt(worst + outside.sum()))


def fixed_epoch_sensitivity(C: Any, epochs: int) -> float:
    """Returns an upper bound of the sensitivity over epochs of fixed order; see the form for X.

    Args:
        C: `(m, n)` strategy matrix.
        epochs: How often everybody takes part.
    """
    return fixed_epoch_sensitivity_for_X(_gram_matrix(C), epochs)


def fixed_epoch_sensitivity_for_X(X: Any, epochs: int) -> float:  # noqa: N802
    """Returns an upper bound of the sensitivity where everybody takes part once an epoch, in order.

    Args:
        X: `(n, n)` symmetric matrix CᵀC.
        epochs: How often everybody takes part: at steps i, i + n / epochs, i + 2n / epochs, ...

    Raises:
        ValueError: If `epochs` does not divide n, or an argument is out of range.

    Guarantees:
        Never below the sensitivity, and exact where X has no negative entry.

    Source:
        Choquette-Choo et al. 2023, arXiv 2211.06530, on fixed-epoch participation.
    """
    X = _symmetric("X", X)
    hint = "Pass how many times the data are gone through."
    epochs = _validate.integer("epochs", epochs, hint, minimum=1)
    if len(X) % epochs:
        raise ValueError(
            f"`epochs` must divide {len(X)}, the number of steps, got {epochs}. {hint}"
        )
    period = len(X) // epochs
    return float(np.sqrt(max(np.abs(X[i::period, i::period]).sum() for i in range(period))))


def banded_lower_triangular_mask(n: int, num_bands: int) -> np.ndarray:
    """Returns `(n, n)` int32 ones on the diagonal and on `num_bands` - 1 subdiagonals.

    Raises:
        ValueError: If an argument is below 1.
    """
    return np.tril(banded_symmetric_mask(n, num_bands))


def banded_symmetric_mask(n: int, num_bands: int) -> np.ndarray:
    """Returns `(n, n)` int32 ones where |i - j| < `num_bands`.

    Raises:
        ValueError: If an argument is below 1.
    """
    n = _validate.integer("n", n, "Pass the size of the matrix.", minimum=1)
    hint = "The diagonal is the first band."
    num_bands = _validate.integer("num_bands", num_bands, hint, minimum=1)
    index = np.arange(n)
    return (np.abs(index[:, None] - index) < num_bands).astype(np.int32)


def _best_pattern(x: np.ndarray, min_sep: int, max_participations: int | None) -> np.ndarray:
    """Returns the largest sum over patterns along the last axis, `(..., n)` to `(...)`."""
    n = x.shape[-1]
    rounds = minsep_true_max_participations(n, min_sep, max_participations=max_participations)
    best = np.zeros(x.shape)  # Over patterns that end at step t or before.
    for _ in range(rounds):
        before = np.zeros(x.shape)
        before[..., min_sep:] = best[..., : max(n - min_sep, 0)]
        best = np.maximum(best, np.maximum.accumulate(x + before, axis=-1))
    return best[..., -1]


def _matrix(name: str, value: Any) -> np.ndarray:
    matrix = np.asarray(value, np.float64)
    if matrix.ndim != 2 or not matrix.size or not np.isfinite(matrix).all():
        raise ValueError(
            f"`{name}` must be a non-empty matrix of finite numbers, got shape {matrix.shape}. "
            "Materialise it first."
        )
    return matrix


def _gram_matrix(C: Any) -> np.ndarray:
    C = _matrix("C", C)
    return C.T @ C


def _symmetric(name: str, value: Any) -> np.ndarray:
    matrix = _matrix(name, value)
    largest = np.abs(matrix).max()
    if matrix.shape[0] != matrix.shape[1] or np.abs(matrix - matrix.T).max() > 1e-9 * largest:
        raise ValueError(f"`{name}` must be symmetric, got shape {matrix.shape}. Pass CᵀC.")
    if np.diagonal(matrix).min() < 0:
        raise ValueError(f"`{name}` must not be negative on its diagonal. Pass CᵀC.")
    return matrix
