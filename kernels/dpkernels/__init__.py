"""Differentially private training in JAX: clip, sum, noise. Knows nothing of torch."""

from dpkernels._compat import refuse_broken_jaxlib
from dpkernels.clipped_vjp import ClippedVjp, clipped_vjp
from dpkernels.clipping import (
    Aux,
    BoundedSensitivityCallable,
    clipped_fun,
    clipped_grad,
)
from dpkernels.noise_addition import gaussian_privatizer, matrix_factorization_privatizer
from dpkernels.tree_clipping import clip_pytree

__all__ = [
    "Aux",
    "BoundedSensitivityCallable",
    "ClippedVjp",
    "clip_pytree",
    "clipped_fun",
    "clipped_grad",
    "clipped_vjp",
    "gaussian_privatizer",
    "matrix_factorization_privatizer",
]

refuse_broken_jaxlib()
