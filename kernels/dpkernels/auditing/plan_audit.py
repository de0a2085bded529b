"""An audit of a plan in one call.

Example:
    >>> from dpkernels.execution_plan import DPSGDConfig
    >>> plan = DPSGDConfig(iterations=4, sampling_prob=0.5, noise_multiplier=2.0).make()
    >>> report = audit_plan(plan, delta=0.05, num_trials=200, rng=0)
    >>> report.holds, report.epsilon_lower_bound <= report.epsilon_claimed
    (True, True)
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dpkernels import _validate
from dpkernels.auditing.auditor import CanaryScoreAuditor, below_half
from dpkernels.auditing.likelihood import LikelihoodRatio, precision_of
from dpkernels.auditing.plan_runs import (
    OTHER,
    Neighbors,
    PlanRunner,
    draw_batches,
    participations,
)
from dpkernels.batch_selection import FixedBatchSampling
from dpkernels.execution_plan import DPExecutionPlan

_REFERENCE_DRAWS = 500


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    Attributes:
        epsilon_lower_bound: The plan's true epsilon is not below this, with the confidence.
        epsilon_claimed: What the plan claims.
        epsilon_gdp: The same bound, were the plan Gaussian differential privacy. An estimate.
        delta: Of all three.
        significance: Probability with which `epsilon_lower_bound` is above the truth.
        in_scores: `(trials,)`, the attacker's statistic where the canary was in the data.
        out_scores: `(trials,)`, where it was not, or was replaced.
    """

    epsilon_lower_bound: float
    epsilon_claimed: float
    epsilon_gdp: float
    delta: float
    significance: float
    in_scores: np.ndarray = field(repr=False)
    out_scores: np.ndarray = field(repr=False)

    @property
    def holds(self) -> bool:
        """Whether the claim is compatible with what was seen."""
        return self.epsilon_lower_bound <= self.epsilon_claimed


def audit_plan(
    plan: DPExecutionPlan,
    *,
    delta: float,
    num_trials: int = 1000,
    significance: float = 0.05,
    rng: np.random.Generator | int | None = None,
    num_examples: int | None = None,
    params: Any = None,
    background: float | None = None,
    canary_norm: float = 1e4,
    epsilon_claimed: float | None = None,
) -> AuditReport:
    """Attacks a plan and compares what comes out with the epsilon that it claims.

    The plan's own sampler, clipped gradient and noise run from the first step to the last, many
    times, on two neighbouring datasets: one with a canary, whose gradient is as large as clipping
    lets it be, and one where it is left out, zeroed out, or replaced by its opposite, as the
    plan's neighbouring relation has it. The attacker sees all that is released, and knows all but
    the draws of the sampler and the noise.

    A small delta leaves little to be seen: few trials find rare events. For a mechanism of
    moderate epsilon, a delta of 0.01 to 0.1 tells most; the claim is that for the same delta.

    Args:
        plan: The plan.
        delta: For which epsilon is claimed, in (0, 1).
        num_trials: How many runs on each of the two datasets, at least 2.
        significance: Probability, in (0, 0.5), with which a plan that keeps its claim fails.
        rng: The runs' randomness. By default from the operating system.
        num_examples: Size of the dataset with the canary; by default that of the plan's config,
            or 20.
        params: A pytree whose structure the parameters have. By default that of the clip norms
            of the plan's config, or a single leaf. What the leaves are does not matter.
        background: The other examples' gradients as multiples of the canary's, in [-1, 1]. By
            default -1 for batches of a fixed size, where the canary takes another's place, and
            0 otherwise.
        canary_norm: Norm of the canary's gradient in each leaf. Must be above the clip norms.
        epsilon_claimed: The claim; by default `plan.epsilon(delta)`.

    Returns:
        The report; `report.holds` is the verdict.

    Raises:
        ValueError: If an argument is out of range, or the plan cannot say its epsilon.
        NotImplementedError: If batches are of users with several examples each.

    Guarantees:
        A plan whose epsilon is at most the claimed one is found to hold with probability at least
        1 - significance. That a plan holds proves nothing: another attack may find more.

    Source:
        Nasr et al. 2023, arXiv 2302.07956 (white-box gradient canaries); Jagielski et al. 2020.
    """
    delta = _validate.open_unit("delta", delta, "0.01 to 0.1 tells most.")
    num_trials = _validate.integer("num_trials", num_trials, "1000 is usual.", minimum=2)
    canary_norm = _validate.positive("canary_norm", canary_norm, "Must be above the clip norms.")
    significance = below_half(significance)
    claimed = plan.epsilon(delta) if epsilon_claimed is None else epsilon_claimed
    if not claimed >= 0:
        raise ValueError(
            f"`epsilon_claimed` must not be negative or NaN, got {claimed!r}. Leave it out for "
            "what the plan claims."
        )
    generator = np.random.default_rng(rng)
    neighbors = _neighbors(plan, num_examples, background)
    runner = PlanRunner.make(plan, _structure(plan, params), canary_norm)
    in_scores, out_scores = _attack(runner, neighbors, num_trials, generator)
    auditor = CanaryScoreAuditor(in_scores, out_scores)
    return AuditReport(
        epsilon_lower_bound=auditor.epsilon_clopper_pearson(significance, delta, one_sided=False),
        epsilon_claimed=claimed,
        epsilon_gdp=auditor.epsilon_from_gdp(significance, delta),
        delta=delta,
        significance=significance,
        in_scores=in_scores,
        out_scores=out_scores,
    )


def _attack(
    runner: PlanRunner, neighbors: Neighbors, num_trials: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the scores with the canary and without it."""
    strategy = runner.plan.batch_selection_strategy
    released, noise = {}, []
    for with_canary in (True, False):
        drawn = draw_batches(strategy, neighbors.size(with_canary), num_trials, rng)
        along, rest = runner.release(drawn, neighbors.multiples(with_canary), rng)
        released[with_canary] = along
        noise.append(rest.swapaxes(1, 2).reshape(-1, along.shape[1]))
    # Draws apart from the trials': that a trial's own draws are looked at would bias its score.
    reference = draw_batches(strategy, neighbors.num_examples, _REFERENCE_DRAWS, rng)
    sizes = np.array([[batch.size for batch in batches] for batches in reference])
    statistic = LikelihoodRatio(
        participations(reference, neighbors.canary),
        precision_of(np.concatenate(noise), runner.reach),
        int(getattr(strategy, "cycle_length", 1)),
    )
    base = runner.reach * neighbors.background * sizes.mean(axis=0)
    with_it = runner.reach * (1 - neighbors.background)
    without = 0.0 if neighbors.other is None else neighbors.other - neighbors.background
    without *= runner.reach
    in_scores, out_scores = (
        statistic.log_likelihood(released[which] - base, with_it)
        - statistic.log_likelihood(released[which] - base, without)
        for which in (True, False)
    )
    return in_scores, out_scores


def _neighbors(
    plan: DPExecutionPlan, num_examples: int | None, background: float | None
) -> Neighbors:
    relation = _validate.one_of("neighboring_relation", plan.neighboring_relation, OTHER)
    if num_examples is None:
        num_examples = getattr(plan.config, "num_examples", None) or 20
    hint = "Two at least: the canary and another."
    num_examples = _validate.integer("num_examples", num_examples, hint, minimum=2)
    if background is None:
        is_fixed = isinstance(plan.batch_selection_strategy, FixedBatchSampling)
        background = -1.0 if is_fixed else 0.0
    if not -1 <= background <= 1:
        raise ValueError(
            f"`background` must be in [-1, 1], got {background!r}. No gradient is longer than the "
            "canary's."
        )
    return Neighbors(num_examples, float(background), OTHER[relation])


def _structure(plan: DPExecutionPlan, params: Any) -> Any:
    return getattr(plan.config, "l2_clip_norm", 1.0) if params is None else params
