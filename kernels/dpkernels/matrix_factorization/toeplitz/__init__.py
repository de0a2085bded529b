"""Lower-triangular Toeplitz matrices, each given by its first column.

A banded one with b coefficients costs b - 1 buffers of noise, whatever the number of steps.
Computations are in float64 NumPy on the host, whatever JAX is set to; where a coefficient is
traced, they are in JAX and in its type, so that they can be differentiated.

Example:
    >>> coefs = optimize_banded_toeplitz(100, 4)
    >>> coefs.round(5).tolist()
    [0.68298, 0.4828, 0.41446, 0.35869]
    >>> round(float(loss(coefs, 100)) ** 0.5, 4), round(float(loss([1.0], 100)) ** 0.5, 4)
    (3.9161, 7.1063)
"""

from dpkernels.matrix_factorization.toeplitz.algebra import (
    inverse_coef,
    materialize_lower_triangular,
    multiply,
    pad_coefs_to_n,
    solve_banded,
)
from dpkernels.matrix_factorization.toeplitz.error import (
    loss,
    minsep_sensitivity_squared,
    per_query_error,
    sensitivity_squared,
)
from dpkernels.matrix_factorization.toeplitz.strategy import (
    inverse_as_streaming_matrix,
    optimal_max_error_noising_coefs,
    optimal_max_error_strategy_coefs,
    optimize_banded_toeplitz,
    optimize_coefs_for_amplifications,
)

__all__ = [
    "inverse_as_streaming_matrix",
    "inverse_coef",
    "loss",
    "materialize_lower_triangular",
    "minsep_sensitivity_squared",
    "multiply",
    "optimal_max_error_noising_coefs",
    "optimal_max_error_strategy_coefs",
    "optimize_banded_toeplitz",
    "optimize_coefs_for_amplifications",
    "pad_coefs_to_n",
    "per_query_error",
    "sensitivity_squared",
    "solve_banded",
]
