"""The run that follows a plan, a step for each of its draws."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dpbridge.budget import PrivacyBudget
from dpbridge.journal import Journal
from dpbridge.journal_lines import PlannedStep, digest_of
from dpbridge.mechanism import PlanMechanism
from dpbridge.plan_ledger import PlanLedger
from dpbridge.plan_loader import PlanLoader
from dpbridge.runs import check_counted
from dpkernels.execution_plan import DPExecutionPlan, PrivateConfig


class PlannedRun:
    """The steps of a plan, one for each of its draws.

    Args:
        plan: The plan.
        loader: Where its batches come from, or None if they come from elsewhere: then no epsilon
            is stated.
        budget: What may be spent, or None.

    Raises:
        ValueError: If the loader is not this plan's.
    """

    def __init__(
        self,
        plan: DPExecutionPlan,
        loader: PlanLoader | None,
        budget: PrivacyBudget | None = None,
    ) -> None:
        if loader is not None and not isinstance(loader, PlanLoader):
            raise TypeError(
                f"`loader` must be a PlanLoader, got {type(loader).__name__}. "
                "Make it with PlanLoader(plan, dataset)."
            )
        if loader is not None and loader.plan is not plan:
            raise ValueError(
                "`loader` must be made from the plan of the optimizer, got that of another plan. "
                "Pass the same plan to both."
            )
        self.plan, self.loader, self.budget = plan, loader, budget
        size = None
        if loader is not None:
            size = plan.batch_selection_strategy.expected_batch_size(len(loader.dataset))
            loader.claim(self)
        self._has_failed = False
        self.mechanism = PlanMechanism(plan, size)
        self.ledger = PlanLedger(plan, is_loaded=loader is not None)

    def check_part(self, parts: int, size: int) -> None:
        """See `Run`: each batch of the loader once, and whole."""
        self._check_state()
        if self.loader is None:
            return
        self._check_draw(self.loader)
        if self.loader.parts_yielded != parts + 1 or self.loader.part_size != size:
            raise RuntimeError(
                f"`backward` must be called once on each batch of the plan's loader, got {size} "
                f"examples as part {parts + 1} of a draw, and the loader is at part "
                f"{self.loader.parts_yielded}, of {self.loader.part_size}. To save memory set "
                "`microbatch_size` in PerformanceFlags, or `accumulation_steps` of the loader."
            )

    @property
    def place(self) -> tuple[int, int]:
        """Of which draw, and which part of it, the batch is that the loader yielded last."""
        return (
            (0, 0) if self.loader is None else (self.loader.draws_begun, self.loader.parts_yielded)
        )

    def check_step(self, drawn: int) -> None:
        """See `Run`."""
        self._check_state()
        if self.loader is not None:
            self._check_draw(self.loader)
            self._check_whole(self.loader, drawn)
        if self.budget is not None:
            if self.loader is None:
                raise ValueError(
                    "A budget of `epsilon` must be spent on the plan's own draws, got no loader. "
                    "Pass loader=PlanLoader(plan, dataset) where the optimizer is made."
                )
            self.ledger.refuse_unknown()
            if self.ledger.position == self.ledger.steps:  # What is made again is spent.
                self.budget.check(self.ledger, most=self.plan.iterations)

    def _check_state(self) -> None:
        if self._has_failed:
            raise RuntimeError(
                "`step` must not follow one that failed after it was recorded: the plan's noise "
                "may be at another row than its draws. Make a new optimizer and loader, and load "
                "the last checkpoint into them."
            )
        self.ledger.check()

    def record(self, drawn: int) -> None:
        """See `Run`."""
        del drawn
        self.ledger.record(self.ledger.draws if self.loader is None else self.loader.digest)

    def fail(self) -> None:
        """See `Run`: noise that builds on earlier noise can no longer be told to be in step."""
        self._has_failed = True

    def line(self, step: int, released: Mapping[str, torch.Tensor]) -> PlannedStep:
        """See `Run`."""
        draws = None if self.loader is None else self.loader.digest
        return PlannedStep(step, draws, digest_of(released))

    def count_lost(self, journal: Journal, place: int) -> int:
        """See `Run`: lost steps are to be made again, with their noise."""
        _raise_to_lost(self.ledger, journal)
        return place

    def read_state(
        self, state: Mapping[str, Any], place: int, journal: Journal | None
    ) -> tuple[int, Callable[[], None]]:
        """See `Run`."""
        ledger = copy.copy(self.ledger)
        ledger.load_state_dict(state)
        check_counted(ledger.position, place)
        if ledger.position > place:
            raise ValueError(
                f"`state_dict` must be of a run without a failed step, got one that has drawn "
                f"batch {ledger.position} and noise {place}: the plan's noise would go on at "
                "another row than its draws. Load an earlier checkpoint."
            )
        if journal is not None:
            _raise_to_lost(ledger, journal)

        def restore() -> None:
            longer = max(self.ledger, ledger, key=lambda found: found.steps)
            steps, unknown = longer.steps, longer.unknown_steps
            if ledger.position >= self.ledger.position:
                ledger.raise_to(steps, unknown)
                self.ledger.load_state_dict(ledger.state_dict())
            self.ledger.raise_to(steps, unknown)

        return place, restore

    def epsilon(self, delta: float, accountant: str | None) -> float:
        """See `Run`."""
        return self.ledger.epsilon(delta, accountant)

    def _check_draw(self, loader: PlanLoader) -> None:
        """Raises unless the loader is at the draw of this step, after those of the steps before."""
        step = self.ledger.position + 1
        if loader.draws_begun != step:
            raise RuntimeError(
                f"Step {step} must be made on draw {step} of the plan's loader, got draw "
                f"{loader.draws_begun}. Make one step of each batch, also of an empty one; after "
                "loading a checkpoint of the optimizer load that of the loader too."
            )
        if loader.digest_before != self.ledger.draws:
            raise RuntimeError(
                f"Step {step} must be made on the draws that the steps before it began, got a "
                "loader that drew others: noise would be used again on other data. Load the "
                "loader's checkpoint beside the optimizer's."
            )

    def _check_whole(self, loader: PlanLoader, drawn: int) -> None:
        step = self.ledger.position + 1
        if drawn != loader.draw_size or loader.parts_yielded != loader.accumulation_steps:
            raise RuntimeError(
                f"Step {step} must be made on the {loader.draw_size} examples of its draw, in "
                f"{loader.accumulation_steps} parts, got {drawn} in {loader.parts_yielded}. Pass "
                "every batch of the loader to `backward` once."
            )


def _raise_to_lost(ledger: PlanLedger, journal: Journal) -> None:
    """Counts what a plan's run has released after what its ledger has."""
    if journal.last <= ledger.steps:
        return
    unknown = ledger.unknown_steps
    for step in journal.after(ledger.steps):
        unknown += not isinstance(step, PlannedStep) or step.draws is None
    ledger.raise_to(journal.last, unknown)


def check_layers(plan: DPExecutionPlan, names: Mapping[str, Any]) -> None:
    """Raises ValueError if a plan clips layers by names that are not the model's parameters."""
    norm = plan.config.l2_clip_norm if isinstance(plan.config, PrivateConfig) else 1.0
    if isinstance(norm, (int, float)):
        return
    if not isinstance(norm, Mapping) or set(norm) != set(names):
        raise ValueError(
            "`l2_clip_norm` must be a number, or a number for each trainable parameter by name, "
            f"got {norm!r:.200}. The parameters are {', '.join(names)}."
        )
