"""The run without an end: equal steps of DP-SGD, as many as the user makes."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from scipy import special

from dpbridge.budget import PrivacyBudget
from dpbridge.journal import Journal
from dpbridge.journal_lines import EndlessStep
from dpbridge.ledger import Ledger
from dpbridge.mechanism import GaussianMechanism
from dpbridge.runs import check_counted
from dpkernels import _validate


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
        check_counted(ledger.steps, place)
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
