"""One step of training, compiled: clip and sum, noise, apply."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

from dpkernels.clipping import Aux
from dpkernels.execution_plan import DPExecutionPlan
from dpkernels.optimizers import AugmentedGradientTransformation, identity
from dpkernels.tree_clipping import widest

PyTree = Any
# Names by which a third argument with a default is known to be the key.
_KEY_NAMES = ("prng", "prng_key", "rng", "rng_key", "key")


def takes_prng(loss_fn: Callable[..., Any]) -> bool:
    """Returns whether a loss takes a key after parameters and batch, going by its signature."""
    known = list(inspect.signature(loss_fn).parameters.values())
    positional = [
        parameter
        for parameter in known
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    needed = [
        parameter
        for parameter in known
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    ]
    if len(positional) == 2 and needed == positional:
        return False
    if len(positional) > 2 and needed == positional[:3]:
        return True
    if len(positional) > 2 and needed == positional[:2] and positional[2].name in _KEY_NAMES:
        return True
    raise TypeError(
        "`loss_fn` must take (params, batch) or (params, batch, prng), got "
        f"{inspect.signature(loss_fn)}. Wrap it in a lambda with these arguments."
    )


def make_clipped(
    plan: DPExecutionPlan,
    loss_fn: Callable[..., Any],
    optimizer: AugmentedGradientTransformation,
    has_prng: bool,
) -> Callable[..., tuple[PyTree, Aux]]:
    """Makes the clipped sum and its `Aux`: what is not private yet."""

    def loss(*args: Any) -> tuple[Any, Any]:
        result = loss_fn(*args)
        if not isinstance(result, tuple):
            return result, None
        if len(result) != 2:
            raise TypeError(
                "`loss_fn` must return a scalar or (scalar, aux), got a tuple of "
                f"{len(result)}. Put what is beside the loss into one pytree."
            )
        return result

    def clipped(
        params: PyTree, opt_state: PyTree, batch: PyTree, is_padding: jax.Array, key: jax.Array
    ) -> tuple[PyTree, Aux]:
        transform = optimizer.pre_clipping_transform(opt_state)
        summed = plan.clipped_grad(
            loss,
            has_aux=True,
            prng_argnum=2 if has_prng else None,
            return_values=True,
            return_grad_norms=True,
            # Any transform needs the gradients themselves, at a price.
            pre_clipping_transform=None if transform is identity else transform,
        )
        args = (params, batch, key) if has_prng else (params, batch)
        return summed(*args, is_padding_example=is_padding)

    return clipped


def make_step(
    plan: DPExecutionPlan,
    clipped: Callable[..., tuple[PyTree, Aux]],
    optimizer: AugmentedGradientTransformation,
    *,
    wants_aux: bool,
) -> Callable[..., Any]:
    """Makes the step from one state to the next; it gives up the memory of the one before."""

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step_fn(
        params: PyTree,
        opt_state: PyTree,
        noise_state: PyTree,
        index: jax.Array,
        batch: PyTree,
        is_padding: jax.Array,
        key: jax.Array,
    ) -> tuple[PyTree, PyTree, PyTree, Aux | None]:
        key = jax.random.fold_in(key, index)
        total, aux = clipped(params, opt_state, batch, is_padding, key)
        noised, noise_state = plan.noise_addition_transform.update(total, noise_state)
        wide = widened(params)
        noised = jax.tree.map(lambda grad, param: grad.astype(param.dtype), noised, wide)
        updates, opt_state = optimizer.update(noised, opt_state, wide)
        stepped = optax.apply_updates(wide, updates)
        params = jax.tree.map(lambda new, old: new.astype(old.dtype), stepped, params)
        return params, opt_state, noise_state, aux if wants_aux else None

    return step_fn


def widened(params: PyTree) -> PyTree:
    """Returns the parameters as an optimizer works with them: in float32 or better."""
    return jax.tree.map(lambda param: param.astype(widest([param])), params)
