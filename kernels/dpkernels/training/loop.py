"""`train`: draw, clip and sum, noise, step."""

from collections.abc import Callable
from typing import Any

import numpy as np
import optax

from dpkernels import _validate
from dpkernels.clipping import Aux
from dpkernels.execution_plan import DPExecutionPlan
from dpkernels.noise_addition import make_key
from dpkernels.optimizers import AugmentedGradientTransformation, as_augmented_optimizer
from dpkernels.training.draws import checksum, draw_all, make_generator, replay, spawned_seed
from dpkernels.training.rows import Rows, check_size, padded, real_rows
from dpkernels.training.state import TrainingState, begin, resumed
from dpkernels.training.step import make_clipped, make_step, takes_prng

PyTree = Any


def train(
    plan: DPExecutionPlan,
    dataset: PyTree,
    loss_fn: Callable[..., Any],
    params: PyTree | TrainingState,
    optimizer: optax.GradientTransformation | AugmentedGradientTransformation,
    *,
    padding_multiple: int = 1,
    callback: Callable[[int, TrainingState, Aux], Any] | None = None,
    rng: int | np.random.Generator | None = None,
) -> TrainingState:
    """Trains on all batches that the plan draws.

    Args:
        plan: Says how batches are drawn, clipped and noised.
        dataset: Pytree of arrays with the examples on axis 0. NumPy arrays stay on the host, of
            which each batch is copied to the device; JAX arrays stay where they are.
        loss_fn: `loss_fn(params, batch)` or, for dropout and the like,
            `loss_fn(params, batch, prng)`: returns a scalar or `(scalar, aux)` for one example at
            a time (see `dpkernels.clipped_grad`).
        params: Pytree of floating-point arrays to start from, left unchanged; or the
            `TrainingState` of a run to resume.
        optimizer: Of optax, or one of `dpkernels.optimizers`. It works in float32 or better, also
            for parameters in half precision.
        padding_multiple: Batches are padded to multiples of this number; each size compiles
            once. The default compiles for every size drawn; 32 or more suits Poisson subsampling.
        callback: Called as `callback(step, state, aux)` after each step, the first of which has
            number 1. The run ends if it returns something true. `aux` is a `dpkernels.Aux` of
            NumPy arrays: loss, gradient norm and the loss's own aux of each example drawn. None
            of it is private but `state.params`. The next step reuses the memory of `state`: keep
            a copy, `jax.tree.map(jnp.copy, state)`.
        rng: Decides which examples are drawn, and dropout: a seed, or a NumPy generator at its
            start. By default the operating system's. Whoever knows it knows who took part in
            which step: keep it secret. Noise is seeded by the plan instead.

    Returns:
        The state after the last step.

    Raises:
        TypeError: If an argument has the wrong type, or `loss_fn` other arguments.
        ValueError: If one is out of range, `dataset` has another size than the one accounted for,
            or a run is resumed with another plan or other draws than those it began with.
        NotImplementedError: If the plan draws batches of users.
        RuntimeError: If the plan draws more or fewer batches than its `iterations`, or an example
            twice in one.

    Guarantees:
        What leaves a step is a function of the noised sum of clipped gradients, the state before
            and `rng`. (But for `aux`.)
        An empty draw is a step like others: noise alone.
        Padding contributes exactly zero.
        There is no step past the plan's last, also not in a resumed run.
        All steps of a run are of one plan, also in a resumed run: its `epsilon` is theirs.
        No example counts twice in a step of a plan that states an epsilon.
        A run that is resumed with its seed continues exactly as one that was not interrupted.

    Source:
        Abadi et al. 2016, algorithm 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from dpkernels.execution_plan import DPSGDConfig
        >>> plan = DPSGDConfig(
        ...     iterations=8, sampling_prob=0.5, noise_multiplier=2.0, normalize_by=50).make()
        >>> def loss(w, x):
        ...     return jnp.mean(jnp.square(x - w))
        >>> state = train(
        ...     plan, np.ones((100, 3), np.float32), loss, jnp.zeros(3), optax.sgd(0.1),
        ...     padding_multiple=32)
        >>> state.step, round(plan.epsilon(1e-5, steps=state.step), 1)
        (8, 3.5)
    """
    hint = "Pass the number of examples to pad batches to multiples of."
    multiple = _validate.integer("padding_multiple", padding_multiple, hint, minimum=1)
    optimizer = as_augmented_optimizer(optimizer)
    has_prng = takes_prng(loss_fn)
    rows = Rows(dataset)
    check_size(plan, rows.count)
    clipped = make_clipped(plan, loss_fn, optimizer, has_prng)
    step_fn = make_step(plan, clipped, optimizer, wants_aux=callback is not None)

    if isinstance(params, TrainingState):
        state = resumed(plan, params, rng)
    else:
        state = begin(plan, clipped, optimizer, params, *rows.take(np.full(multiple, -1)))
    sampler = make_generator(rng)
    key = make_key(spawned_seed(sampler) if has_prng else 0)
    draws = draw_all(plan, rows.count, sampler)
    digest = replay(draws, state)
    for step, indices in enumerate(draws, start=state.step + 1):
        digest = checksum(indices, digest)
        batch, is_padding = rows.take(padded(indices, multiple))
        params, opt_state, noise_state, aux = step_fn(
            state.params, state.opt_state, state.noise_state, step - 1, batch, is_padding, key
        )
        state = TrainingState(step, params, opt_state, noise_state, digest, state.plan)
        if callback is not None and callback(step, state, real_rows(aux, is_padding)):
            break
    return state
