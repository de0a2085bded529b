"""The record of a run that follows a plan: how many of its steps are released.

After a crash a run goes on from a checkpoint, and makes the steps again that were lost. They are
released already, so the record is ahead of the run until it has caught up: `steps` is what was
released, and what epsilon is of; `position` is how far the run has got.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import dp_accounting

from dpkernels import _validate
from dpkernels.execution_plan import DPExecutionPlan, config_from_dict, config_to_dict

# The hash of no draws at all.
NO_DRAWS = hashlib.sha256().hexdigest()


class PlanLedger:
    """Counts the steps of a plan that are released, and asks the plan what they spend.

    Args:
        plan: The plan.
        is_loaded: Whether the batches come from the plan's own loader. If not, no epsilon is
            stated.

    Attributes:
        draws: The loader's hash of the draws of all steps up to `position`.

    Guarantees:
        * `steps` never goes down but in `load_state_dict`, and is never below `position`.
        * `epsilon` is what the plan says of as many steps as were recorded.
        * If any step was made without the plan's own loader, no epsilon is stated, also after
          saving and loading.
        * `load_state_dict` either restores the whole record or changes nothing.

    Example:
        >>> from dpkernels.execution_plan import DPSGDConfig
        >>> config = DPSGDConfig(iterations=512, sampling_prob=0.1, noise_multiplier=3.0)
        >>> ledger = PlanLedger(config.make(), is_loaded=True)
        >>> for _ in range(512):
        ...     ledger.record()
        >>> ledger.steps, round(ledger.epsilon(1e-6), 2)
        (512, 3.77)
    """

    def __init__(self, plan: DPExecutionPlan, *, is_loaded: bool) -> None:
        self._plan, self._is_loaded = plan, is_loaded
        self._steps, self._position, self._unknown = 0, 0, 0
        self.draws = NO_DRAWS
        self._answers: dict[tuple[float, str | None, int], float] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(steps={self._steps}, position={self._position})"

    @property
    def steps(self) -> int:
        """How many steps were released, lost ones included."""
        return self._steps

    @property
    def position(self) -> int:
        """How many steps the run has made: below `steps` while lost ones are made again."""
        return self._position

    @property
    def unknown_steps(self) -> int:
        """How many steps were made on batches that did not come from the plan's loader."""
        return self._unknown

    @property
    def events(self) -> dp_accounting.DpEvent:
        """The record in the words of dp_accounting."""
        if self.unknown_steps:
            return dp_accounting.UnsupportedDpEvent()
        return self._plan.dp_event_after(self._steps)

    def check(self) -> None:
        """Raises RuntimeError if the plan has no step left."""
        if self._position >= self._plan.iterations:
            raise RuntimeError(
                f"`step` must not go past the plan's {self._plan.iterations} iterations, which are "
                "used up. Make a plan of more iterations before training starts."
            )

    def record(self, draws: str = NO_DRAWS) -> None:
        """Counts one step, if it is not one that is made again.

        Call it before anything of the step is released.

        Args:
            draws: The loader's hash of all draws up to this step's.

        Raises:
            RuntimeError: If the plan has no step left.
        """
        self.check()
        position, unknown = self._position + 1, self._unknown
        if position > self._steps:
            unknown += not self._is_loaded
        # At once, lest an interrupt leave a part of it.
        self._steps, self._position, self._unknown, self.draws = (
            max(self._steps, position),
            position,
            unknown,
            draws,
        )

    def raise_to(self, steps: int, unknown_steps: int) -> None:
        """Counts steps that were released and lost, where these are more than it has.

        Args:
            steps: As the property.
            unknown_steps: As the property.

        Raises:
            ValueError: If the plan has fewer steps.
        """
        if steps > self._plan.iterations:
            raise ValueError(
                f"`steps` must be at most the plan's {self._plan.iterations}, got {steps}. Use the "
                "plan that they were made with."
            )
        self._steps = max(self._steps, steps)
        self._unknown = max(self._unknown, unknown_steps)

    def epsilon(self, delta: float, accountant: str | None = None) -> float:
        """Returns the epsilon spent so far.

        Raises:
            ValueError: If batches do not come from the plan's loader, the sampling has no sound
                accounting, or an argument is out of range.
        """
        self.refuse_unknown()
        return self.epsilon_after(self._steps, delta, accountant)

    def refuse_unknown(self) -> None:
        """Raises ValueError if any batch did not come from the plan's loader."""
        if self._unknown:
            raise ValueError(
                f"Batches must be drawn as the plan says to state an epsilon, got {self._unknown} "
                "steps without its loader. Pass loader=PlanLoader(plan, dataset) where the "
                "optimizer is made, and train on its batches from the first step on."
            )

    def epsilon_after(self, steps: int, delta: float, accountant: str | None = None) -> float:
        """Returns the epsilon that this many steps of the plan spend."""
        key = (delta, accountant, steps)
        if key not in self._answers:
            self._answers[key] = self._plan.epsilon(delta, steps=steps, accountant=accountant)
        return self._answers[key]

    def state_dict(self) -> dict[str, Any]:
        """Returns the record in plain types, with the numbers of the plan if it has a config."""
        config = self._plan.config
        return {
            "version": _VERSION,
            "steps": self._steps,
            "position": self._position,
            "unknown_steps": self._unknown,
            "draws": self.draws,
            "mechanism": _fingerprint(self._plan),
            "plan": None if config is None else config_to_dict(config),  # type: ignore[arg-type]
        }

    def load_state_dict(self, state: Any) -> None:
        """Replaces the record by a saved one.

        Raises:
            ValueError: If `state` is not what `state_dict` returns, or was saved under a plan with
                other numbers; the record is unchanged.
        """
        here = self.state_dict()
        if not isinstance(state, Mapping) or set(state) != set(here):
            raise ValueError(
                f"`state` must have the keys {sorted(here)}, got {state!r:.80}. "
                "Load what PlanLedger.state_dict returned."
            )
        if state["version"] != _VERSION:
            raise ValueError(
                f"`state['version']` must be {_VERSION}, got {state['version']!r}. "
                "Load it with the version of dpbridge that saved it."
            )
        saved = state["plan"] and config_from_dict(state["plan"])
        if state["mechanism"] != here["mechanism"] or saved != self._plan.config:
            raise ValueError(
                f"`state` must be of this plan, {self._plan.config!r}, got {saved!r}. "
                "Make the plan from the config that it was saved under."
            )
        hint = "Load an unchanged state_dict."
        try:
            steps = _validate.integer("state['steps']", state["steps"], hint, minimum=0)
            position = state["position"]
            position = _validate.integer("state['position']", position, hint, minimum=0)
            unknown = state["unknown_steps"]
            unknown = _validate.integer("state['unknown_steps']", unknown, hint, minimum=0)
        except TypeError as error:
            raise ValueError(str(error)) from error
        if steps > self._plan.iterations:
            raise ValueError(
                f"`state['steps']` must be at most the plan's {self._plan.iterations}, got "
                f"{steps}. {hint}"
            )
        if max(unknown, position) > steps or not isinstance(state["draws"], str):
            raise ValueError(
                f"`state` must be whole, got {unknown} unknown steps and position {position} of "
                f"{steps}. {hint}"
            )
        self._steps, self._position, self._unknown, self.draws = (
            steps,
            position,
            unknown,
            state["draws"],
        )


_VERSION = 2


def _fingerprint(plan: DPExecutionPlan) -> str:
    """Returns a hash of what a plan's epsilon depends on."""
    parts = (
        plan.dp_event,
        plan.neighboring_relation.name,
        plan.batch_selection_strategy,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()
