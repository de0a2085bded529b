"""The record of a run that follows a plan: how many of its steps are released."""

from collections.abc import Mapping
from typing import Any

import dp_accounting

from dpkernels import _validate
from dpkernels.execution_plan import DPExecutionPlan, config_from_dict, config_to_dict


class PlanLedger:
    """Counts the steps of a plan that are released, and asks the plan what they spend.

    Args:
        plan: The plan.
        is_loaded: Whether the batches come from the plan's own loader. If not, no epsilon is
            stated.

    Guarantees:
        * `epsilon` is what the plan says of as many steps as were recorded.
        * Without the plan's own loader no epsilon is stated.
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
        self._steps = 0
        self._answers: dict[tuple[float, str | None, int], float] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(steps={self._steps})"

    @property
    def steps(self) -> int:
        """How many steps were recorded."""
        return self._steps

    @property
    def unknown_steps(self) -> int:
        """How many steps were made on batches that did not come from the plan's loader."""
        return 0 if self._is_loaded else self._steps

    @property
    def events(self) -> dp_accounting.DpEvent:
        """The record in the words of dp_accounting."""
        if self.unknown_steps:
            return dp_accounting.UnsupportedDpEvent()
        return self._plan.dp_event_after(self._steps)

    def check(self) -> None:
        """Raises RuntimeError if the plan has no step left."""
        if self._steps >= self._plan.iterations:
            raise RuntimeError(
                f"`step` must not go past the plan's {self._plan.iterations} iterations, which are "
                "used up. Make a plan of more iterations before training starts."
            )

    def record(self) -> None:
        """Counts one step; call it before anything of the step is released.

        Raises:
            RuntimeError: If the plan has no step left.
        """
        self.check()
        self._steps += 1

    def epsilon(self, delta: float, accountant: str | None = None) -> float:
        """Returns the epsilon spent so far.

        Raises:
            ValueError: If batches do not come from the plan's loader, the sampling has no sound
                accounting, or an argument is out of range.
        """
        if self._steps:
            self.refuse_unknown()
        return self.epsilon_after(self._steps, delta, accountant)

    def refuse_unknown(self) -> None:
        """Raises ValueError if batches do not come from the plan's loader."""
        if not self._is_loaded:
            raise ValueError(
                "Batches must be drawn as the plan says to state an epsilon, got no loader of "
                "the plan. Pass loader=PlanLoader(plan, dataset) where the optimizer is made, and "
                "train on its batches."
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
        saved = state["plan"] and config_from_dict(state["plan"])
        if (state["version"], saved) != (_VERSION, self._plan.config):
            raise ValueError(
                f"`state` must be of this plan, {self._plan.config!r}, got {saved!r}. "
                "Make the plan from the config that it was saved under."
            )
        hint = "Load an unchanged state_dict."
        steps = _validate.integer("state['steps']", state["steps"], hint, minimum=0)
        if steps > self._plan.iterations:
            raise ValueError(
                f"`state['steps']` must be at most the plan's {self._plan.iterations}, got "
                f"{steps}. {hint}"
            )
        self._steps = steps


_VERSION = 1
