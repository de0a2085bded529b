"""The two kinds of run: one without an end, of equal steps, and one that follows a plan."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from scipy import special

from dpbridge.budget import PrivacyBudget
from dpbridge.journal import Journal
from dpbridge.journal_lines import EndlessStep, PlannedStep, Step, digest_of
from dpbridge.ledger import Ledger
from dpbridge.mechanism import GaussianMechanism, Mechanism, PlanMechanism
from dpbridge.plan_ledger import PlanLedger
from dpbridge.plan_loader import PlanLoader
from dpkernels import _validate
from dpkernels.execution_plan import DPExecutionPlan, PrivateConfig


class Run(Protocol):
    """What is released at each step of a run, and what that spends."""

    @property
    def mechanism(self) -> Mechanism: ...  # noqa: D102

    @property
    def ledger(self) -> Ledger | PlanLedger: ...  # noqa: D102

    def check_part(self, parts: int, size: int) -> None:
        """Raises RuntimeError if a batch of this size must not be added to `parts` others."""
        ...

    def check_step(self, drawn: int) -> None:
        """Raises RuntimeError if a step on this many examples must not be made now."""
        ...

    def record(self, drawn: int) -> None:
        """Puts such a step into the ledger; call it before anything of the step is released."""
        ...

    def fail(self) -> None:
        """Notes that a step was recorded and then not released."""
        ...

    def line(self, step: int, released: Mapping[str, torch.Tensor]) -> Step:
        """Returns what the journal is to hold of the step that was recorded last."""
        ...

    def count_lost(self, journal: Journal, place: int) -> int:
        """Counts the releases of the journal that the ledger lacks.

        Args:
            journal: Of this run.
            place: How many steps this run has made.

        Returns:
            The place in the noise stream to go on from.
        """
        ...

    def read_state(
        self, state: Mapping[str, Any], place: int, journal: Journal | None
    ) -> tuple[int, Callable[[], None]]:
        """Reads a saved ledger, and counts the releases of the journal that it lacks.

        Args:
            state: Of the ledger.
            place: How many steps were made when it was saved.
            journal: Of the same run, if there is one.

        Returns:
            As `count_lost`; and what restores the ledger, but for a longer one of this same run.

        Raises:
            ValueError: If it is not of such a run; nothing is changed.
        """
        ...

    def epsilon(self, delta: float, accountant: str | None) -> float:
        """Returns the epsilon spent so far; raises ValueError where none holds."""
        ...


class EndlessRun:
    """Equal steps of DP-SGD, as many as the user makes.

    Args:
        mechanism: What each step releases.
        sampling_prob: Probability with which each example is in a batch, or None if unknown.
        budget: What may be spent, or None.
        ledger: What was spent before.
    """

    def __init__(
        self,
        mechanism: GaussianMechanism,
        sampling_prob: float | None,
        budget: PrivacyBudget | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self.mechanism = mechanism
        self.sampling_prob = sampling_prob
        self.budget = budget
        self.ledger = ledger or Ledger()
        self._drawn, self._draws = 0, 0  # examples and steps, in this process

    @property
    def steps(self) -> int:
        """How many steps were made."""
        return self.ledger.steps

    def check_part(self, parts: int, size: int) -> None:
        """See `Run`: a draw may be split in any way."""

    def check_step(self, drawn: int) -> None:
        """See `Run`."""
        if self.budget is not None:
            self._refuse_implausible(drawn)
            own = self.mechanism.noise_multiplier, self.sampling_prob
            others = [run for run in self.ledger.state_dict()["runs"] if tuple(run[:2]) != own]
            self.budget.check(self, basis=others)

    def fail(self) -> None:
        """See `Run`: the next step has noise of its own."""

    def record(self, drawn: int) -> None:
        """See `Run`."""
        self.ledger.record(
            noise_multiplier=self.mechanism.noise_multiplier,
            sampling_prob=self.sampling_prob if self._is_plausible(drawn) else None,
        )
        self._drawn, self._draws = self._drawn + drawn, self._draws + 1

    def line(self, step: int, released: Mapping[str, torch.Tensor]) -> EndlessStep:
        """See `Run`."""
        del released
        return EndlessStep(step, *self.ledger.last)

    def count_lost(self, journal: Journal, place: int) -> int:
        """See `Run`: new steps have new noise, so what was lost is spent."""
        return _count_lost(self.ledger, journal, place)

    def read_state(
        self, state: Mapping[str, Any], place: int, journal: Journal | None
    ) -> tuple[int, Callable[[], None]]:
        """See `Run`."""
        ledger = Ledger()
        ledger.load_state_dict(state)
        _check_counted(ledger.steps, place)
        place = place if journal is None else _count_lost(ledger, journal, place)

        def restore() -> None:
            if ledger.steps >= self.ledger.steps:
                self.ledger.load_state_dict(ledger.state_dict())

        return place, restore

    def epsilon(self, delta: float, accountant: str | None) -> float:
        """See `Run`."""
        if self.sampling_prob is not None and self.ledger.unknown_steps:
            raise ValueError(
                "`epsilon` must follow from how batches were drawn, got "
                f"{self.ledger.unknown_steps} steps with more examples than Poisson subsampling "
                f"with sampling_prob={self.sampling_prob} and expected_batch_size="
                f"{self.mechanism.expected_batch_size} draws. Make one step of one draw of a "
                "PoissonLoader with the same sampling_prob."
            )
        return self.ledger.epsilon(delta, accountant=accountant or "pld")

    def epsilon_after(self, steps: int, delta: float, accountant: str | None) -> float:
        """Returns the epsilon once there are this many steps in all."""
        return self.ledger.epsilon_after(
            steps - self.ledger.steps,
            noise_multiplier=self.mechanism.noise_multiplier,
            sampling_prob=self.sampling_prob,
            delta=delta,
            accountant=accountant or "pld",
        )

    def _is_plausible(self, drawn: int) -> bool:
        """Whether Poisson draws can have as many examples: once in 1e12, if not.

        Neither this draw, nor all draws together: two draws that are added up in each step are
        told from one by their sum long before each for itself is too large.
        """
        if self.sampling_prob is None:
            return True
        population = max(1, round(self.mechanism.expected_batch_size / self.sampling_prob))
        trials = population * (self._draws + 1)
        return self._can_be(drawn, population) and self._can_be(self._drawn + drawn, trials)

    def _can_be(self, successes: int, trials: int) -> bool:
        if successes == 0:
            return True
        if successes > trials:
            return False
        tail = special.betainc(successes, trials - successes + 1, self.sampling_prob)
        return bool(tail > 1e-12)

    def _refuse_implausible(self, drawn: int) -> None:
        if self.sampling_prob is None or not self._is_plausible(drawn):
            raise RuntimeError(
                "A budget of `epsilon` must be spent on draws whose probability is known, got a "
                f"step on {drawn} examples with sampling_prob={self.sampling_prob}. Make one step "
                "of one draw of a PoissonLoader with the same sampling_prob."
            )


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
        _check_counted(ledger.position, place)
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


def _count_lost(ledger: Ledger, journal: Journal, place: int) -> int:
    """Records what an endless run has released after a place; returns where it is to go on."""
    if journal.last <= place:
        return place
    for step in journal.after(place):
        if not isinstance(step, EndlessStep):
            raise ValueError(
                f"`journal` must be of a run without a plan, got step {step.step} of a plan in "
                f"{journal.path}. It is damaged."
            )
        # A step that failed after its noise was drawn has no line. The ledger counted it, too.
        for _ in range(place, step.step):
            ledger.record(noise_multiplier=step.noise_multiplier, sampling_prob=step.sampling_prob)
        place = step.step
    return place


def _raise_to_lost(ledger: PlanLedger, journal: Journal) -> None:
    """Counts what a plan's run has released after what its ledger has."""
    if journal.last <= ledger.steps:
        return
    unknown = ledger.unknown_steps
    for step in journal.after(ledger.steps):
        unknown += not isinstance(step, PlannedStep) or step.draws is None
    ledger.raise_to(journal.last, unknown)


def _check_counted(steps: int, place: int) -> None:
    if steps < place:
        raise ValueError(
            f"`state_dict` must count every release in its ledger, got {steps} steps "
            f"there and noise for {place}. The checkpoint is damaged."
        )


def make_mechanism(
    *,
    l2_clip_norm: Any,
    noise_multiplier: Any,
    expected_batch_size: Any,
    microbatch_size: Any,
) -> GaussianMechanism:
    """Checks the numbers of an endless run."""
    if microbatch_size is not None:
        hint = "Pass how many examples fit in memory at once, or None."
        microbatch_size = _validate.integer("microbatch_size", microbatch_size, hint, minimum=1)
    return GaussianMechanism(
        l2_clip_norm=_validate.positive(
            "l2_clip_norm", l2_clip_norm, "Pass the bound on one example's gradient norm."
        ),
        noise_multiplier=_validate.non_negative(
            "noise_multiplier", noise_multiplier, "Calibrate it with dpbridge.accounting."
        ),
        expected_batch_size=_validate.positive(
            "expected_batch_size", expected_batch_size, "Pass sampling_prob * len(dataset)."
        ),
        microbatch_size=microbatch_size,
    )


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
