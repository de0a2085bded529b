"""Correlated noise: strategy matrices, their inverses as streams, their sensitivity and error.

A matrix mechanism with the strategy C adds C⁻¹Z to the sums of a whole run, one row a step, where Z
is i.i.d. Gaussian noise scaled to the sensitivity of C. `streaming_matrix` multiplies row by row,
`toeplitz` makes and rates strategies, `sensitivity` bounds any C, and
`noise_addition.matrix_factorization_privatizer` adds the noise.
"""

from dpkernels.matrix_factorization import (
    optimization,
    sensitivity,
    streaming_matrix,
    toeplitz,
)
from dpkernels.matrix_factorization.streaming_matrix import StreamingMatrix, num_rows

__all__ = [
    "StreamingMatrix",
    "num_rows",
    "optimization",
    "sensitivity",
    "streaming_matrix",
    "toeplitz",
]
