"""Good Toeplitz strategies, and their inverses as streams of noise."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np

from dpkernels import _validate
from dpkernels.accounting import amplified_bandmf_event
from dpkernels.matrix_factorization import optimization
from dpkernels.matrix_factorization.streaming_matrix import (
    StreamingMatrix,
    constant,
    identity,
    scale_rows_and_columns,
)
from dpkernels.matrix_factorization.toeplitz import algebra
from dpkernels.matrix_factorization.toeplitz.error import loss
from dpkernels.tree_clipping import widest

PyTree = Any


class _Outputs(NamedTuple):
    """The last b - 1 rows of the product, in a ring: the next one replaces `position`."""

    position: jax.Array
    rows: PyTree


def optimal_max_error_strategy_coefs(n: int) -> np.ndarray:
    """Returns 1, 1/2, 3/8, 5/16, ...: the root of prefix sums, `(n,)`.

    Raises:
        ValueError: If `n` is below 1.

    Source:
        Fichtenberger et al. 2022, arXiv 2202.11205, section 3 (the factorization).
    """
    k = np.arange(1, algebra.check_size(n, 1))
    return np.cumprod(np.concatenate([[1.0], (2 * k - 1) / (2 * k)]))


def optimal_max_error_noising_coefs(n: int) -> np.ndarray:
    """Returns 1, -1/2, -1/8, -1/16, ...: the inverse of the root of prefix sums, `(n,)`.

    Raises:
        ValueError: If `n` is below 1.
    """
    k = np.arange(1, algebra.check_size(n, 1))
    return np.cumprod(np.concatenate([[1.0], (2 * k - 3) / (2 * k)]))


def inverse_as_streaming_matrix(
    coef: Any, column_normalize_for_n: int | None = None
) -> StreamingMatrix:
    """Returns the inverse of a banded strategy, which remembers its last b - 1 rows.

    Args:
        coef: `(b,)` coefficients of the strategy C, the first not zero.
        column_normalize_for_n: Where it is n, the inverse is that of C with its first n columns
            scaled to norm 1. Their sensitivity is 1 then, whatever the norm of `coef`: scale the
            noise by 1, not by that norm. The inverse has n rows.

    Returns:
        A streaming matrix of n rows, or of rows without end.

    Raises:
        ValueError: If an argument is out of range.

    Guarantees:
        With `column_normalize_for_n`, every column of the strategy has norm 1 for coefficients of
        any norm, the last b - 1 columns, which n cuts off, too.
    """
    coefs = np.trim_zeros(algebra.check_invertible("coef", coef), "b")
    inverse = _inverse(coefs)
    if column_normalize_for_n is None:
        return inverse
    hint = "Pass the number of steps."
    n = _validate.integer("column_normalize_for_n", column_normalize_for_n, hint, minimum=1)
    squares = np.zeros(n)
    squares[: coefs.size] = np.square(coefs[:n])
    return scale_rows_and_columns(inverse, np.sqrt(np.cumsum(squares))[::-1])


def optimize_banded_toeplitz(
    n: int,
    bands: int,
    *,
    strategy_coef: Any = None,
    max_optimizer_steps: int = 250,
    reduction_fn: Callable[[Any], Any] = jnp.mean,
) -> np.ndarray:
    """Returns the banded strategy of least error in prefix sums where everybody takes part once.

    Args:
        n: How many steps there are.
        bands: How many coefficients the strategy has, at most n.
        strategy_coef: `(bands,)` coefficients to start from; by default the root of prefix sums.
        max_optimizer_steps: The most steps of L-BFGS.
        reduction_fn: As in `loss`.

    Returns:
        `(bands,)` coefficients of norm 1.

    Raises:
        ValueError: If an argument is out of range.
        RuntimeError: If the loss is not finite.

    Source:
        McKenna 2024, arXiv 2405.15913, on banded Toeplitz strategies.
    """
    n = _validate.integer("n", n, "Pass the number of steps.", minimum=1)
    bands = _validate.integer("bands", bands, "The diagonal is the first.", minimum=1)
    if bands > n:
        raise ValueError(f"`bands` must be at most n = {n}, got {bands}. Pass fewer bands.")
    start = _start(strategy_coef, bands)

    def error(rest: jax.Array) -> Any:
        # The loss does not change with the scale, so the first coefficient can stay as it is.
        return loss(jnp.concatenate([jnp.ones(1), rest]), n, reduction_fn=reduction_fn)

    rest = optimization.optimize(error, start[1:], max_optimizer_steps=max_optimizer_steps)
    coefs = np.concatenate([[1.0], rest])
    return coefs / np.linalg.norm(coefs)


def optimize_coefs_for_amplifications(
    n: int,
    *,
    dataset_size: int,
    expected_batch_size: int,
    epsilon: float,
    delta: float,
    max_optimizer_steps: int = 250,
    reduction_fn: Callable[[Any], Any] = jnp.mean,
) -> tuple[np.ndarray, float]:
    """Returns the strategy, of whatever number of bands, that has the least error for a privacy.

    More bands cancel more of the noise; fewer leave more for amplification by sampling, because
    only one in `bands` batches can hold an example. Every number of bands is tried, with the noise
    that `epsilon` and `delta` ask for by the RDP accountant under cyclic Poisson sampling.

    Args:
        n: How many steps there are.
        dataset_size: How many examples there are.
        expected_batch_size: How many of them are in a batch on average.
        epsilon: The privacy to reach.
        delta: The privacy to reach, in (0, 1).
        max_optimizer_steps: The most steps of L-BFGS for each number of bands.
        reduction_fn: As in `loss`.

    Returns:
        `(bands,)` coefficients of norm 1, and the noise's standard deviation for sensitivity 1.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Choquette-Choo et al. 2023, arXiv 2306.08153, on amplification by sampling.
    """
    n = _validate.integer("n", n, "Pass the number of steps.", minimum=1)
    hint = "Pass a number of examples."
    dataset_size = _validate.integer("dataset_size", dataset_size, hint, minimum=1)
    batch = _validate.integer("expected_batch_size", expected_batch_size, hint, minimum=1)
    if batch > dataset_size:
        raise ValueError(
            f"`expected_batch_size` must be at most dataset_size = {dataset_size}, got {batch}. "
            "Pass a smaller one."
        )
    epsilon = _validate.positive("epsilon", epsilon, "Pass the epsilon to reach.")
    delta = _validate.open_unit("delta", delta, "Pass the delta to reach.")
    best: tuple[float, np.ndarray, float] = (math.inf, np.ones(1), math.inf)
    for bands in range(1, min(n, dataset_size // batch) + 1):
        coefs = optimize_banded_toeplitz(
            n, bands, max_optimizer_steps=max_optimizer_steps, reduction_fn=reduction_fn
        )
        stddev = _calibrated_stddev(n, bands, bands * batch / dataset_size, epsilon, delta)
        error = stddev**2 * float(loss(coefs, n, reduction_fn=reduction_fn))
        best = min(best, (error, coefs, stddev), key=lambda each: each[0])
    return best[1], best[2]


def _inverse(coefs: np.ndarray) -> StreamingMatrix:
    history = coefs.size - 1
    if not history:
        return identity() * float(1 / coefs[0])

    def init_multiply(like: PyTree) -> _Outputs:
        def rows(leaf: Any) -> jax.Array:
            return jnp.zeros((history, *leaf.shape), widest([leaf]))

        return _Outputs(jnp.zeros((), jnp.int32), jax.tree.map(rows, like))

    def multiply_next(row: PyTree, state: _Outputs) -> tuple[PyTree, _Outputs]:
        # The slot before `position` holds the row before this one, and so on round the ring.
        age = (state.position - 1 - jnp.arange(history, dtype=jnp.int32)) % history
        weights = constant(coefs[1:])[age]

        def solve(leaf: jax.Array, rows: jax.Array) -> jax.Array:
            known = jnp.tensordot(
                weights.astype(rows.dtype), rows, axes=1, precision=jax.lax.Precision.HIGHEST
            )
            return (leaf.astype(rows.dtype) - known) / jnp.asarray(coefs[0], rows.dtype)

        solved = jax.tree.map(solve, row, state.rows)
        rows = jax.tree.map(lambda old, new: old.at[state.position].set(new), state.rows, solved)
        result = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), solved, row)
        return result, _Outputs((state.position + 1) % history, rows)

    return StreamingMatrix(init_multiply, multiply_next)


def _start(strategy_coef: Any, bands: int) -> np.ndarray:
    if strategy_coef is None:
        return optimal_max_error_strategy_coefs(bands)
    start = np.asarray(algebra.check_invertible("strategy_coef", strategy_coef))
    if start.size != bands:
        raise ValueError(
            f"`strategy_coef` must have {bands} coefficients, as `bands` says, got {start.size}. "
            "Pad it with `pad_coefs_to_n`."
        )
    return start / start[0]


def _calibrated_stddev(n: int, bands: int, prob: float, epsilon: float, delta: float) -> float:
    def make_event(noise_multiplier: float) -> dp_accounting.DpEvent:
        return amplified_bandmf_event(noise_multiplier, n, num_bands=bands, sampling_prob=prob)

    return float(
        dp_accounting.calibrate_dp_mechanism(
            dp_accounting.rdp.RdpAccountant, make_event, epsilon, delta
        )
    )
