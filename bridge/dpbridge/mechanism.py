"""What one logical step releases: a clipped sum with noise on it, over a public number."""

import functools
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import dpkernels
from dpbridge.exchange import to_jax, to_torch
from dpbridge.streams import Stream, noise_stream
from dpkernels import BoundedSensitivityCallable, ClippedVjp, _validate, gaussian_privatizer
from dpkernels.execution_plan import DPExecutionPlan
from dpkernels.execution_plan.performance import PlannedClipping
from dpkernels.noise_addition import NoiseState

Arrays = dict[str, jax.Array]
Transform = Callable[[Any], Any]


class Mechanism(Protocol):
    """How gradients are clipped and noised.

    Attributes:
        expected_batch_size: Mean size of a draw, or None where it is not known.
        has_given_norm: Whether `clipped_grad` clips to the norm that it is given, rather than to
            one of its own.
        clips_together: Whether the whole gradient of an example is known to be clipped by one
            factor.
        run: Tells runs apart that have one seed; None where the seed decides the noise.
    """

    @property
    def expected_batch_size(self) -> float | None: ...  # noqa: D102

    @property
    def has_given_norm(self) -> bool: ...  # noqa: D102

    @property
    def clips_together(self) -> bool: ...  # noqa: D102

    @property
    def run(self) -> int | None: ...  # noqa: D102

    def check_names(self, names: Iterable[str]) -> None:
        """Raises RuntimeError if gradients of these parameters cannot be noised."""
        ...

    def clipped_grad(
        self, loss: Callable[..., Any], norm: Any, transform: Transform | None = None
    ) -> BoundedSensitivityCallable:
        """Returns the clipped sum of `loss(params, key, rows)`, as `ClippedSum` calls it.

        Args:
            loss: Of one example.
            norm: To clip to, if `has_given_norm`.
            transform: Applied to each gradient before it is clipped.
        """
        ...

    def fast_clipped_grad(
        self, loss: Callable[..., Any], norm: Any, transform: Transform | None = None
    ) -> Callable[..., tuple[Any, jax.Array]] | None:
        """Returns `clipped_grad` without what is seldom run: its `fast_fun`.

        Args:
            loss: See `clipped_grad`.
            norm: Likewise.
            transform: Likewise.

        Returns:
            None where there is no such thing, or `clipped_grad` is not known to have one.
        """
        ...

    def clipped_vjp(self, function: Callable[..., Any]) -> ClippedVjp | None:
        """Returns the halves of `clipped_grad` of `function(params, key, rows)`.

        Args:
            function: Returns outputs and an auxiliary value, of one example.

        Returns:
            None where the sum cannot be had in halves.
        """
        ...

    def noised(self, sums: Arrays, seed: int, step: int) -> Arrays:
        """Returns what is released at a step. Each step is asked for once, one after another."""
        ...

    def state_dict(self, sums: Callable[[], Arrays]) -> dict[str, Any]:
        """Returns what the noise of later steps depends on, seed and step apart.

        Args:
            sums: Returns arrays like those that are noised.
        """
        ...

    def read_state(self, state: Mapping[str, Any], sums: Arrays) -> Callable[[], None]:
        """Reads it and returns what restores it; `sums` are as those that are noised."""
        ...


@dataclass(frozen=True)
class GaussianMechanism:
    """A sum clipped to one norm, with noise drawn afresh at each step: that of DP-SGD.

    Attributes:
        l2_clip_norm: Bound on each example's gradient.
        noise_multiplier: Standard deviation of the noise over the sensitivity.
        expected_batch_size: The public number that the noised sum is divided by.
        microbatch_size: How many examples JAX holds at once.
    """

    l2_clip_norm: float
    noise_multiplier: float
    expected_batch_size: float
    microbatch_size: int | None = None

    has_given_norm = True
    clips_together = True
    run = None

    @property
    def stddev(self) -> float:
        """Standard deviation of the noise on the sum."""
        return _stddev(self)

    def clipped_grad(
        self, loss: Callable[..., Any], norm: Any, transform: Transform | None = None
    ) -> BoundedSensitivityCallable:
        """See `Mechanism`. The norm may be traced: a program serves the self-check too."""
        return dpkernels.clipped_grad(
            loss,
            l2_clip_norm=norm,
            microbatch_size=self.microbatch_size,
            pre_clipping_transform=transform,
            **_ARGUMENTS,
        )

    def fast_clipped_grad(
        self, loss: Callable[..., Any], norm: Any, transform: Transform | None = None
    ) -> Callable[..., tuple[Any, jax.Array]] | None:
        """See `Mechanism`."""
        return self.clipped_grad(loss, norm, transform).fast_fun

    def clipped_vjp(self, function: Callable[..., Any]) -> ClippedVjp | None:
        """See `Mechanism`: its norm may be traced, so it cannot."""
        del function
        return None

    def check_names(self, names: Iterable[str]) -> None:
        """See `Mechanism`: all can."""

    def noised(self, sums: Arrays, seed: int, step: int) -> Arrays:
        """See `Mechanism`."""
        return _noised(
            sums,
            noise_stream(seed),
            np.uint32(step),
            np.float64(self.stddev),
            np.float64(self.expected_batch_size),
        )

    def state_dict(self, sums: Callable[[], Arrays]) -> dict[str, Any]:
        """See `Mechanism`: seed and step decide all of the noise."""
        del sums
        return {}

    def read_state(self, state: Mapping[str, Any], sums: Arrays) -> Callable[[], None]:
        """See `Mechanism`."""
        del sums
        if set(state) != {"seed", "steps"}:
            raise ValueError(
                f"`state_dict` must be of a run without a plan, got noise of {sorted(state)}. "
                "Load it into an optimizer with the plan that it was saved under."
            )
        return lambda: None


@functools.lru_cache
def _stddev(mechanism: GaussianMechanism) -> float:
    """Kept, because each step asks for it and what clips a gradient takes a while to make."""
    function = mechanism.clipped_grad(lambda *_: None, mechanism.l2_clip_norm)
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    return mechanism.noise_multiplier * function.sensitivity(relation)


class PlanMechanism:
    """What a plan clips and adds. Its noise may depend on that of earlier steps.

    Args:
        plan: The plan.
        expected_batch_size: Mean size of its draws, or None where it is not known.
    """

    has_given_norm = False

    def __init__(self, plan: DPExecutionPlan, expected_batch_size: float | None) -> None:
        self.plan = plan
        self.expected_batch_size = expected_batch_size
        self.run: int | None = secrets.randbits(63)
        self._state: Any = None
        self._names: set[str] | None = None
        self._update = jax.jit(plan.noise_addition_transform.update)

    @property
    def clips_together(self) -> bool:
        """See `Mechanism`. A plan made by hand may do as it likes."""
        return isinstance(getattr(self.plan.config, "l2_clip_norm", None), (int, float))

    def clipped_grad(
        self, loss: Callable[..., Any], norm: Any, transform: Transform | None = None
    ) -> BoundedSensitivityCallable:
        """See `Mechanism`."""
        del norm
        options = {} if transform is None else {"pre_clipping_transform": transform}
        return self.plan.clipped_grad(loss, **_ARGUMENTS, **options)

    def fast_clipped_grad(
        self, loss: Callable[..., Any], norm: Any, transform: Transform | None = None
    ) -> Callable[..., tuple[Any, jax.Array]] | None:
        """See `Mechanism`. A plan made by hand is taken as it is."""
        if not isinstance(self.plan.clipped_grad, PlannedClipping):
            return None
        return self.clipped_grad(loss, norm, transform).fast_fun

    def clipped_vjp(self, function: Callable[..., Any]) -> ClippedVjp | None:
        """See `Mechanism`."""
        clipping = self.plan.clipped_grad
        if not isinstance(clipping, PlannedClipping) or not clipping.has_vjp:
            return None
        return clipping.vjp(function, has_aux=True, batch_argnums=2, prng_argnum=1)

    def check_names(self, names: Iterable[str]) -> None:
        """Raises RuntimeError if other parameters are trainable than at the steps before."""
        changed = set() if self._names is None else self._names ^ set(names)
        if changed:
            raise RuntimeError(
                "Parameters must stay frozen or trainable for the whole of a plan, whose noise "
                f"builds on that of earlier steps, got a change of {', '.join(sorted(changed))}. "
                "Make a plan for each stage of training."
            )

    def noised(self, sums: Arrays, seed: int, step: int) -> Arrays:
        """See `Mechanism`. The plan has its own seed and counts its steps itself."""
        del seed, step
        self.check_names(sums)
        self._start(sums)
        noised, self._state = self._update(sums, self._state)
        return dict(noised)

    def state_dict(self, sums: Callable[[], Arrays]) -> dict[str, Any]:
        """Returns the state of the noise as tensors, or None in its place without parameters.

        Before the first step too: a plan's noise comes from the operating system, and a run that
        started anew from its first checkpoint would release its steps with other noise.
        """
        if self._state is None:
            self._start(sums())
        if self._state is None:
            return {"run": self.run, "state": None}
        leaves = [_key_data(leaf) for leaf in jax.tree.leaves(self._state)]
        return {"run": self.run, "state": [tensor.clone() for tensor in to_torch(leaves)]}

    def read_state(self, state: Mapping[str, Any], sums: Arrays) -> Callable[[], None]:
        """Reads the state of the noise.

        Raises:
            ValueError: If it is not that of this plan with parameters of these shapes.
        """
        hint = "Load what DPOptimizer.state_dict returned."
        try:
            run = _validate.integer("noise.run", state.get("run"), hint, minimum=0)
        except TypeError as error:
            raise ValueError(str(error)) from error
        if "state" in state and state["state"] is None:
            return lambda: self._go_to(run, None, None)
        fresh = self.plan.noise_addition_transform.init(_zeros_like(sums))
        leaves, structure = jax.tree.flatten(fresh)
        kinds = [(_key_data(leaf).shape, _key_data(leaf).dtype) for leaf in leaves]
        saved = state.get("state")
        parts = list(saved) if isinstance(saved, (list, tuple)) else []
        is_whole = all(isinstance(part, torch.Tensor) for part in parts)
        arrays = to_jax(parts) if is_whole else []
        if [(array.shape, array.dtype) for array in arrays] != kinds:
            raise ValueError(
                "`state_dict` must hold the noise of this plan for these parameters, got other "
                "shapes or types. Make the plan and the model as they were when it was saved."
            )
        own = [jnp.array(array) for array in arrays]  # The tensors stay the caller's.
        restored = jax.tree.unflatten(structure, map(_like, own, leaves))
        return lambda: self._go_to(run, restored, set(sums))

    def _start(self, sums: Arrays) -> None:
        """Draws the seed of the noise, if that is still to be done."""
        if self._state is None and sums:
            self._state = self.plan.noise_addition_transform.init(_zeros_like(sums))
            self._names = set(sums)

    def _go_to(self, run: int, state: Any, names: set[str] | None) -> None:
        self.run, self._state, self._names = run, state, names


_ARGUMENTS: dict[str, Any] = {
    "has_aux": True,
    "batch_argnums": 2,
    "prng_argnum": 1,
    "return_values": True,
}


@jax.jit
def _noised(
    sums: Arrays,
    stream: Stream,
    step: jax.Array,
    stddev: jax.Array,
    expected_batch_size: jax.Array,
) -> Arrays:
    privatizer = gaussian_privatizer(stddev=stddev)
    noised, _ = privatizer.update(sums, NoiseState(stream.key(), step))
    return jax.tree.map(lambda x: x / expected_batch_size.astype(x.dtype), noised)


def _zeros_like(sums: Arrays) -> optax.Params:
    return {name: jnp.zeros(x.shape, x.dtype) for name, x in sums.items()}


def _is_key(leaf: jax.Array) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _key_data(leaf: jax.Array) -> jax.Array:
    return jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf)


def _like(array: jax.Array, leaf: jax.Array) -> jax.Array:
    if not _is_key(leaf):
        return array
    return jax.random.wrap_key_data(array, impl=str(jax.random.key_impl(leaf)))
