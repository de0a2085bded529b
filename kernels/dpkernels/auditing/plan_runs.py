"""Runs of a plan on two neighbouring datasets, as many as wanted, with all that is released."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np

from dpkernels.batch_selection import BatchSelectionStrategy
from dpkernels.execution_plan import DPExecutionPlan

PyTree = Any
NeighboringRelation = dp_accounting.NeighboringRelation
_COORDINATES = 8  # of each parameter: the first is the canary's, the others show the noise


@dataclass(frozen=True)
class Neighbors:
    """Two datasets that differ in the last example, the canary, whose loss is linear.

    Gradients are multiples of the canary's own: 1 for the canary, `background` for all others,
    and `other` for what stands in the canary's place in the other dataset.

    Attributes:
        num_examples: How many examples there are, the canary included.
        background: The multiple for the others.
        other: The multiple for the stand-in, or None where the canary is left out.
    """

    num_examples: int
    background: float
    other: float | None

    @property
    def canary(self) -> int:
        """The canary's position."""
        return self.num_examples - 1

    def multiples(self, with_canary: bool) -> np.ndarray:
        """Returns `(examples,)`, the multiple of each."""
        multiples = np.full(self.num_examples, self.background, np.float32)
        multiples[self.canary] = 1.0 if with_canary else (self.other or 0.0)
        return multiples

    def size(self, with_canary: bool) -> int:
        """Returns how many examples the sampler chooses from."""
        return self.num_examples - (self.other is None and not with_canary)


OTHER = {
    NeighboringRelation.ADD_OR_REMOVE_ONE: None,
    NeighboringRelation.REPLACE_SPECIAL: 0.0,
    NeighboringRelation.REPLACE_ONE: -1.0,
}


def draw_batches(
    strategy: BatchSelectionStrategy, num_examples: int, runs: int, rng: np.random.Generator
) -> list[list[np.ndarray]]:
    """Returns the batches of each run: positions, `(batch,)`."""
    drawn = [list(strategy.batch_iterator(num_examples, rng)) for _ in range(runs)]
    for batches in drawn:
        if any(np.ndim(batch) != 1 for batch in batches):
            raise NotImplementedError(
                "Batches must be of examples, got batches of users with several examples each, "
                "whose audit is not supported yet."
            )
    return drawn


def participations(drawn: list[list[np.ndarray]], position: int) -> np.ndarray:
    """Returns `(runs, steps)`, how often the example is in each batch."""
    return np.array([[np.count_nonzero(batch == position) for batch in run] for run in drawn])


@dataclass(frozen=True)
class PlanRunner:
    """Runs a plan with a linear loss.

    Attributes:
        plan: What is run: its own sampler, clipped gradient and noise.
        params: The parameters, zeros of shape `(8,)` in each leaf.
        canary_norm: Norm of the canary's gradient in each leaf, before clipping.
        contribution: What one canary adds to the clipped sum: a pytree like the parameters.
    """

    plan: DPExecutionPlan
    params: PyTree
    canary_norm: float
    contribution: PyTree

    @classmethod
    def make(cls, plan: DPExecutionPlan, structure: PyTree, canary_norm: float) -> "PlanRunner":
        """Makes a runner for parameters of this structure.

        Raises:
            ValueError: If the plan's gradient of a canary is zero, not finite, or shorter than
                the plan lets it be.
        """
        params = jax.tree.map(lambda _: jnp.zeros(_COORDINATES), structure)
        row = _rows(params, np.ones(1, np.float32), canary_norm)
        clipped_grad = plan.clipped_grad(_loss)
        contribution = jax.jit(clipped_grad)(params, row)
        length = _length(contribution)
        if not (np.isfinite(length) and length > 0):
            raise ValueError(
                f"`plan.clipped_grad` must let a canary through, got a sum of norm {length}. "
                "Lower `canary_norm`, if its type cannot hold the canary's gradient."
            )
        if length < 0.999 * clipped_grad.l2_norm_bound:
            raise ValueError(
                f"`canary_norm` must be above the clip norms, got {canary_norm}, with which a "
                f"canary adds {length} of at most {clipped_grad.l2_norm_bound}. Raise it; without "
                "clipping no number is enough, and nothing is private."
            )
        return cls(plan, params, canary_norm, contribution)

    @property
    def reach(self) -> float:
        """The norm of what one canary adds to the clipped sum."""
        return _length(self.contribution)

    def release(
        self, drawn: list[list[np.ndarray]], multiples: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Runs the plan on batches and returns what it releases.

        Args:
            drawn: The batches of each run.
            multiples: `(examples,)`, each example's gradient as a multiple of the canary's.
            rng: Of the noise.

        Returns:
            `(runs, steps)`, the released sums along the canary's direction, and
            `(runs, steps, coordinates)`, what they hold where no example has a gradient.
        """
        rows = _rows(self.params, multiples, self.canary_norm)
        indices = _padded(drawn, multiples.size)
        init = self.plan.noise_addition_transform.init
        along, rest = self._run(rows, _fresh_states(init, self.params, len(drawn), rng), indices)
        return np.asarray(along, np.float64), np.asarray(rest, np.float64)

    @functools.cached_property
    def _run(self) -> Callable[..., tuple[jax.Array, jax.Array]]:
        clipped_grad = self.plan.clipped_grad(_loss)
        noise = self.plan.noise_addition_transform
        directions = [x[0] / self.reach for x in jax.tree.leaves(self.contribution)]

        def run(rows: PyTree, state: Any, batches: jax.Array) -> tuple[jax.Array, jax.Array]:
            def step(state: Any, batch: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
                examples = jax.tree.map(lambda x: x[jnp.maximum(batch, 0)], rows)
                total = clipped_grad(self.params, examples, is_padding_example=batch < 0)
                noised, state = noise.update(total, state)
                leaves = jax.tree.leaves(noised)
                along = [x[0] * d for x, d in zip(leaves, directions, strict=True)]
                rest = [x[1:] for x in leaves]
                return state, (jnp.sum(jnp.stack(along)), jnp.concatenate(rest))

            return jax.lax.scan(step, state, batches)[1]

        return jax.jit(jax.vmap(run, in_axes=(None, 0, 0)))


def _loss(params: PyTree, example: PyTree) -> jax.Array:
    products = jax.tree.map(lambda w, x: jnp.sum(w * x.astype(w.dtype)), params, example)
    return jnp.sum(jnp.stack(jax.tree.leaves(products)))


def _rows(params: PyTree, multiples: np.ndarray, canary_norm: float) -> PyTree:
    rows = np.zeros((multiples.size, _COORDINATES), np.float32)
    rows[:, 0] = multiples * canary_norm
    return jax.tree.map(lambda _: jnp.asarray(rows), params)


def _length(tree: PyTree) -> float:
    return float(
        np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(tree)))
    )


def _padded(drawn: list[list[np.ndarray]], num_examples: int) -> jax.Array:
    """Returns `(runs, steps, batch)` positions, -1 for padding."""
    steps = {len(batches) for batches in drawn}
    if len(steps) != 1:
        raise ValueError(f"Every run must draw as many batches, got {sorted(steps)}.")
    size = max([num_examples, *(batch.size for batches in drawn for batch in batches)])
    indices = np.full((len(drawn), steps.pop(), size), -1, np.int32)
    for run, batches in enumerate(drawn):
        for step, batch in enumerate(batches):
            indices[run, step, : batch.size] = batch
    return jnp.asarray(indices)


def _fresh_states(
    init: Callable[[PyTree], Any], params: PyTree, runs: int, rng: np.random.Generator
) -> Any:
    """Returns the noise's state of each run, stacked.

    A typed key in the state is replaced by one of the run's own: the plan may have been given a
    seed, which an attacker does not know. Without one, the noise must find its own randomness.
    """
    state = init(params)
    leaves, structure = jax.tree.flatten(state)
    is_key = [jnp.issubdtype(jnp.asarray(x).dtype, jax.dtypes.prng_key) for x in leaves]
    if not any(is_key):
        states = [state, *(init(params) for _ in range(runs - 1))]
        return jax.tree.map(lambda *x: jnp.stack(x), *states)

    def fresh(leaf: jax.Array, is_key: bool) -> jax.Array:
        if not is_key:
            return jnp.broadcast_to(leaf, (runs, *leaf.shape))
        words = rng.integers(2**32, size=2, dtype=np.uint32)
        base = jax.random.wrap_key_data(jnp.asarray(words), impl=jax.random.key_impl(leaf))
        return jax.random.split(base, (runs, *leaf.shape))

    fresh_leaves = [fresh(x, k) for x, k in zip(leaves, is_key, strict=True)]
    return jax.tree.unflatten(structure, fresh_leaves)
