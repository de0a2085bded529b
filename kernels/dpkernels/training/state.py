"""Where a training run stands: at its start, and where one is resumed."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpkernels.clipping import Aux
from dpkernels.execution_plan import DPExecutionPlan, NonPrivateConfig, PrivateConfig
from dpkernels.noise_addition import make_key
from dpkernels.optimizers import AugmentedGradientTransformation
from dpkernels.training.step import widened

PyTree = Any


class TrainingState(NamedTuple):
    """Where a training run stands. A pytree: save it with any checkpointer of JAX.

    It holds the key of the noise: keep it as secret as the data. `params` alone are private.

    Attributes:
        step: How many steps were made; as `plan.epsilon(delta, steps=state.step)` takes it.
        params: The parameters, in their own types.
        opt_state: State of the optimizer, in float32 or better.
        noise_state: Where the noise stream stands.
        draws: Checksum of the examples drawn so far, by which a resumed run sees that it draws
            the same. None is not compared.
        plan: Checksum of the numbers of the plan, by which a resumed run sees that all of its
            steps are of one plan.
    """

    step: int
    params: PyTree
    opt_state: PyTree
    noise_state: PyTree
    draws: int | None = None
    plan: int | None = None


def begin(
    plan: DPExecutionPlan,
    clipped: Callable[..., tuple[PyTree, Aux]],
    optimizer: AugmentedGradientTransformation,
    params: PyTree,
    batch: PyTree,
    is_padding: np.ndarray,
) -> TrainingState:
    """Makes the state of a new run; the batch counts for its shapes alone."""
    _check_params(params)
    params = _copied(params)
    opt_state = optimizer.init(widened(params))
    # A noise that remembers, as correlated noise does, does so in the type of the sums.
    sums, _ = jax.eval_shape(clipped, params, opt_state, batch, is_padding, make_key(0))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), sums)
    noise_state = plan.noise_addition_transform.init(zeros)
    return TrainingState(0, params, _copied(opt_state), _copied(noise_state), 0, fingerprint(plan))


def resumed(
    plan: DPExecutionPlan, state: TrainingState, rng: int | np.random.Generator | None
) -> TrainingState:
    """Returns a state to go on from, in memory of its own."""
    step = int(state.step)
    if not 0 <= step <= plan.iterations:
        raise ValueError(
            f"`params.step` must be at most the plan's {plan.iterations} iterations, got {step}. "
            "Resume with the plan that the run began with."
        )
    if state.plan is None or int(state.plan) != fingerprint(plan):
        raise ValueError(
            f"`params.plan` must be {fingerprint(plan)}, the checksum of `plan`, got {state.plan}. "
            "Resume with the plan that the run began with: its epsilon is for all steps."
        )
    if rng is None and step > 0:
        raise ValueError(
            "`rng` must be given to resume a run, got None. Pass the seed that it began with: "
            "who takes part in which step is decided once for all steps."
        )
    draws = None if state.draws is None else int(state.draws)
    params, opt_state, noise_state = _copied((state.params, state.opt_state, state.noise_state))
    return TrainingState(step, params, opt_state, noise_state, draws, fingerprint(plan))


def fingerprint(plan: DPExecutionPlan) -> int:
    """Returns a checksum of what is accounted for: the same for every plan of one config."""
    config = plan.config if isinstance(plan.config, PrivateConfig | NonPrivateConfig) else None
    numbers = (plan.dp_event, plan.neighboring_relation, plan.iterations, config)
    return zlib.crc32(repr(numbers).encode()) & 0x7FFFFFFF  # JAX can hold it as an int32.


def _check_params(params: PyTree) -> None:
    leaves = jax.tree.leaves_with_path(params)
    if not leaves:
        raise ValueError("`params` must hold arrays, got none. Pass what is to be trained.")
    for path, leaf in leaves:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"`params{jax.tree_util.keystr(path)}` must be of a floating-point type, got "
                f"{jnp.result_type(leaf)}. Close over what is not trained in `loss_fn`."
            )


def _copied(tree: PyTree) -> PyTree:
    """Returns arrays that nobody else holds, so that the step may reuse their memory."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, dtype=jnp.result_type(leaf), copy=True), tree)
