"""Minimises smooth functions of a few hundred parameters, in float64, as strategies need it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy import optimize as scipy_optimize

from dpkernels import _validate

PyTree = Any


def optimize(
    loss_fn: Callable[[PyTree], jax.Array], params: PyTree, *, max_optimizer_steps: int = 250
) -> PyTree:
    """Minimises a function by L-BFGS, with gradients by JAX.

    Args:
        loss_fn: Takes the parameters, as float64 arrays, and returns a scalar.
        params: Where to start: a pytree of numbers.
        max_optimizer_steps: The most steps; fewer where the loss stops falling.

    Returns:
        Float64 NumPy arrays in the structure of `params`, where the loss is no higher than there.

    Raises:
        RuntimeError: If the loss or its gradient is not finite at the start or at the end.
        ValueError: If `max_optimizer_steps` is negative.

    Source:
        Liu and Nocedal 1989.

    Example:
        >>> optimize(lambda x: jnp.sum((x - 3) ** 2), np.zeros(2)).round(6).tolist()
        [3.0, 3.0]
    """
    hint = "Pass 0 to leave the parameters as they are."
    steps = _validate.integer("max_optimizer_steps", max_optimizer_steps, hint, minimum=0)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), params)
        start, unravel = ravel_pytree(wide)
        value_and_grad = jax.jit(jax.value_and_grad(lambda flat: loss_fn(unravel(flat))))

        def evaluate(flat: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = value_and_grad(jnp.asarray(flat))
            return float(value), np.asarray(gradient)

        best, lowest = np.asarray(start), _finite(*evaluate(np.asarray(start)))
        if steps and best.size:
            options = {"maxiter": steps, "maxfun": 20 * steps, "ftol": 1e-14, "gtol": 1e-10}
            found = scipy_optimize.minimize(
                evaluate, best, jac=True, method="L-BFGS-B", options=options
            ).x
            if _finite(*evaluate(found)) <= lowest:
                best = found
        return jax.tree.map(np.asarray, unravel(jnp.asarray(best)))


def _finite(value: float, gradient: np.ndarray) -> float:
    if not (np.isfinite(value) and np.isfinite(gradient).all()):
        raise RuntimeError(
            f"`loss_fn` must be finite, got {value} with a gradient of norm "
            f"{np.linalg.norm(gradient)}. Start from other parameters."
        )
    return value
