"""What a Toeplitz strategy costs: its sensitivity, and the error that its noise leaves."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpkernels.matrix_factorization.sensitivity import minsep_true_max_participations
from dpkernels.matrix_factorization.toeplitz import algebra


def sensitivity_squared(coef: Any, n: int | None = None) -> Any:
    """Returns the squared sensitivity where everybody takes part once: that of the first column.

    Args:
        coef: `(b,)` coefficients.
        n: The size of the matrix; by default so large that all coefficients count.

    Raises:
        ValueError: If an argument is out of range.
    """
    column = algebra.resize(algebra.check_coefs("coef", coef), n)
    return (column**2).sum()


def minsep_sensitivity_squared(
    coef: Any, min_sep: int, *, n: int, max_participations: int | None = None
) -> Any:
    """Returns the squared sensitivity where participations are `min_sep` or more steps apart.

    Args:
        coef: `(b,)` coefficients.
        min_sep: The least distance of two participations.
        n: The size of the matrix. It has no default: a banded strategy's b coefficients say
            nothing of how often one can take part.
        max_participations: The most participations, or None.

    Raises:
        ValueError: If an argument is out of range.

    Guarantees:
        Exact where the coefficients are neither negative nor increasing: the worst is to take part
        at steps 0, min_sep, 2 min_sep, ...
        Never below the sensitivity for all others: they are first raised to the smallest
        non-increasing sequence above their absolute values.

    Source:
        Kalinin and Lampert 2024, arXiv 2405.13763, theorem 2.
    """
    column = algebra.resize(algebra.check_coefs("coef", coef), n)
    rounds = minsep_true_max_participations(n, min_sep, max_participations=max_participations)
    xp = algebra.numpy_of(column)
    hull = xp.maximum.accumulate(xp.abs(column)[::-1])[::-1]
    # Row t of the sum of columns 0, min_sep, ...: one entry of the hull in every min_sep-th row.
    by_round = xp.pad(hull, (0, -n % min_sep)).reshape(-1, min_sep)
    total = xp.cumsum(by_round, axis=0)
    late = xp.pad(total, ((rounds, 0), (0, 0)))[: total.shape[0]]
    return ((total - late).reshape(-1)[:n] ** 2).sum()


def per_query_error(
    *,
    strategy_coef: Any = None,
    noising_coef: Any = None,
    n: int | None = None,
    workload_coef: Any = None,
) -> Any:
    """Returns the variance of every released sum, for noise of variance 1: `(n,)`.

    Args:
        strategy_coef: `(b,)` coefficients of the strategy C, or None.
        noising_coef: `(b,)` coefficients of its inverse, or None. One of the two is given.
        n: How many steps there are; by default b.
        workload_coef: Coefficients of the workload A; by default prefix sums.

    Returns:
        Squared norms of the rows of A C⁻¹.

    Raises:
        ValueError: If not exactly one of `strategy_coef` and `noising_coef` is given.
    """
    if (strategy_coef is None) == (noising_coef is None):
        raise ValueError(
            "`strategy_coef` or `noising_coef` must be given, and not both, got "
            f"{strategy_coef!r} and {noising_coef!r}. Pass the one you have."
        )
    if strategy_coef is not None:
        coef = algebra.check_invertible("strategy_coef", strategy_coef)
    else:
        coef = algebra.check_coefs("noising_coef", noising_coef)
    size = algebra.check_size(n, coef.size)
    workload = np.ones(size)
    if workload_coef is not None:
        workload = algebra.resize(algebra.check_coefs("workload_coef", workload_coef), size)
    if strategy_coef is not None:
        column = algebra.solve_banded(coef, workload)
    else:
        column = algebra.product(workload, coef, size)
    return (column**2).cumsum()  # Row t holds the first t + 1 coefficients.


def loss(
    strategy_coef: Any, n: int | None = None, *, reduction_fn: Callable[[Any], Any] = jnp.mean
) -> Any:
    """Returns the error of prefix sums where everybody takes part once: what does not scale with C.

    Args:
        strategy_coef: `(b,)` coefficients of the strategy.
        n: How many steps there are; by default b.
        reduction_fn: Makes one number of the errors of all steps: `jnp.mean` or `jnp.max`.

    Returns:
        Squared sensitivity times the reduced variance, a scalar. Its root is the RMSE for mean.

    Raises:
        ValueError: If an argument is out of range.
    """
    coef = algebra.check_invertible("strategy_coef", strategy_coef)
    error = per_query_error(strategy_coef=coef, n=n)
    return sensitivity_squared(coef, n) * _reduced(error, reduction_fn)


def _reduced(error: Any, reduction_fn: Callable[[Any], Any]) -> Any:
    if isinstance(error, jax.core.Tracer):
        return reduction_fn(error)
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        return float(reduction_fn(jnp.asarray(error)))
