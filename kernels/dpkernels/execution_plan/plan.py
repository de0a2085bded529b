"""The plan of a private training run: how batches are drawn, clipped, noised and accounted."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import dp_accounting
import optax

from dpkernels import _validate
from dpkernels.batch_selection import BatchSelectionStrategy
from dpkernels.clipping import BoundedSensitivityCallable
from dpkernels.composition import epsilon_of_event
from dpkernels.execution_plan.config import (
    ExecutionPlanConfig,
    NeighboringRelation,
    PrivateConfig,
)


@dataclass(frozen=True)
class DPExecutionPlan:
    """Parts of a mechanism that belong together: batches, clipping, noise, event, neighbours.

    A loop draws each batch from `batch_selection_strategy`, calls `clipped_grad` on it, hands the
    sum to `noise_addition_transform`, and steps with what comes out. Nothing may come between
    sum and noise; every draw is one step, an empty one too; there are no steps after the last.

    Attributes:
        clipped_grad: `dpkernels.clipped_grad` with clipping and performance filled in.
        batch_selection_strategy: Draws the batches.
        noise_addition_transform: An optax transformation from clipped sums to noised ones.
        dp_event: What all steps together release, in dp_accounting's words and in the convention
            of the accountant that `config` prefers. Without a config that is the PLD accountant:
            also for REPLACE_ONE, Gaussians hold the noise over the clip norm.
        neighboring_relation: For which `dp_event` holds.
        config: What made the plan, or None where the parts were put together by hand, which is
            what `dataclasses.replace` does too.

    Raises:
        ValueError: If a plan put together by hand has a config that states an epsilon.

    Guarantees:
        A config's epsilon is stated for the parts that the config made, and for no others.
        `epsilon` is never below that of what was released, as long as a loop keeps to the above.
        Where no sound accounting of the sampling is known, no epsilon is stated.

    Example:
        >>> from dpkernels.execution_plan import DPSGDConfig
        >>> config = DPSGDConfig(iterations=512, sampling_prob=0.1, noise_multiplier=3.0)
        >>> plan = config.make()
        >>> round(plan.epsilon(1e-6), 2), plan.clipped_grad(lambda w, x: 0.0).sensitivity()
        (3.77, 1.0)
    """

    clipped_grad: Callable[..., BoundedSensitivityCallable]
    batch_selection_strategy: BatchSelectionStrategy
    noise_addition_transform: optax.GradientTransformation
    dp_event: dp_accounting.DpEvent
    neighboring_relation: NeighboringRelation
    config: ExecutionPlanConfig | None = None

    def __post_init__(self) -> None:
        if isinstance(self.config, PrivateConfig):
            raise ValueError(
                "`config` must be None in a plan that is put together or changed by hand, got "
                f"{type(self.config).__name__}, whose epsilon is for its own parts alone. Make "
                "the plan with config.make(), or pass config=None and the dp_event of your parts."
            )

    @classmethod
    def made_by(
        cls,
        config: PrivateConfig,
        *,
        clipped_grad: Callable[..., BoundedSensitivityCallable],
        batch_selection_strategy: BatchSelectionStrategy,
        noise_addition_transform: optax.GradientTransformation,
    ) -> Self:
        """Returns the plan of a config, whose `make` calls this with the parts that it made.

        Args:
            config: States the plan's event, relation and epsilon.
            clipped_grad: As in the plan.
            batch_selection_strategy: As in the plan.
            noise_addition_transform: As in the plan.

        Raises:
            ValueError: If there is no noise multiplier yet, or no accounting.
        """
        plan = cls(
            clipped_grad=clipped_grad,
            batch_selection_strategy=batch_selection_strategy,
            noise_addition_transform=noise_addition_transform,
            dp_event=config.dp_event(),
            neighboring_relation=config.relation,
        )
        object.__setattr__(plan, "config", config)  # Past the check of plans made by hand.
        return plan

    @property
    def iterations(self) -> int:
        """How many batches are drawn."""
        return self.batch_selection_strategy.iterations

    def dp_event_after(self, steps: int, *, accountant: str | None = None) -> dp_accounting.DpEvent:
        """Returns what the first steps release.

        A plan without a config answers with the whole `dp_event`, of which any steps are a part.

        Args:
            steps: How many, at most `iterations`.
            accountant: In whose convention: `"pld"`, `"rdp"`, or None for what the config prefers.

        Raises:
            ValueError: If there are more steps than `iterations`, or the accountant cannot answer.
        """
        steps = _validate.integer("steps", steps, "Pass the steps made so far.", minimum=0)
        if steps > self.iterations:
            raise ValueError(
                f"`steps` must be at most the plan's {self.iterations} iterations, got {steps}. "
                "Make a plan of more iterations."
            )
        if steps == 0:
            return dp_accounting.NoOpDpEvent()
        if isinstance(self.config, PrivateConfig):
            return self.config.dp_event(steps=steps, accountant=accountant)
        return self.dp_event

    def epsilon(
        self, delta: float, *, steps: int | None = None, accountant: str | None = None
    ) -> float:
        """Returns the epsilon that the first steps spend, or all of them.

        Args:
            delta: In (0, 1); well below 1 / number of examples.
            steps: How many; by default all.
            accountant: `"pld"` or `"rdp"`. By default the tightest that the config holds for
                sound, and `"pld"` for a plan without a config.

        Raises:
            ValueError: If an argument is out of range, or the accountant cannot answer for this
                sampling and neighbouring relation. For REPLACE_ONE a plan without a config has no
                accountant but `"pld"`: another would read its noise as twice what it is.
        """
        if isinstance(self.config, PrivateConfig):
            accountant = self.config.check_accountant(accountant)
        elif self.neighboring_relation is NeighboringRelation.REPLACE_ONE:
            accountant = _validate.one_of("accountant", accountant or "pld", ("pld",))
        steps = self.iterations if steps is None else steps
        return epsilon_of_event(
            self.dp_event_after(steps, accountant=accountant),
            delta,
            accountant=accountant or "pld",
            neighboring_relation=self.neighboring_relation,
        )
