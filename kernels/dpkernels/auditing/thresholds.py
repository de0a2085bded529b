"""Where to put the threshold on the scores, without paying for having looked at them.

Example:
    >>> scores_in, scores_out = [2.0, 3.0, 4.0] * 40, [0.0, 1.0, 2.0] * 40
    >>> from dpkernels.auditing import CanaryScoreAuditor
    >>> auditor = CanaryScoreAuditor(scores_in, scores_out)
    >>> auditor.epsilon_clopper_pearson(0.05, threshold_strategy=Explicit(1.5))
    0.82
"""

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from dpkernels import _validate
from dpkernels.auditing.rates import Counts, count

# From counts and a significance to a lower bound of epsilon for each threshold.
Estimator: TypeAlias = Callable[[Counts, float], np.ndarray]


class ThresholdStrategy(abc.ABC):
    """A way to choose the threshold under which a bound holds all the same."""

    @abc.abstractmethod
    def bound(
        self,
        estimator: Estimator,
        in_scores: np.ndarray,
        out_scores: np.ndarray,
        *,
        significance: float,
        sees_membership: bool,
    ) -> float:
        """Returns the estimator's bound.

        Args:
            estimator: Gives a bound for each threshold, each by itself at a significance.
            in_scores: `(in,)`, sorted.
            out_scores: `(out,)`, sorted.
            significance: Probability with which the result may be above the truth.
            sees_membership: Whether the estimator holds where a threshold is a score of known
                membership. Otherwise a threshold may depend on all scores together alone.
        """


@dataclass(frozen=True)
class Bonferroni(ThresholdStrategy):
    """Tries ranks that are fixed beforehand and shares the significance among them.

    The ranks, about two to an octave from either end, depend on the numbers of scores alone. To
    count afterwards how many thresholds were worth a look would be a choice made on the data.
    """

    def bound(
        self,
        estimator: Estimator,
        in_scores: np.ndarray,
        out_scores: np.ndarray,
        *,
        significance: float,
        sees_membership: bool,
    ) -> float:
        """Returns the largest bound of all ranks."""
        count_ranks = _counts_by_rank if sees_membership else _counts_by_common_rank
        counts = count_ranks(in_scores, out_scores)
        return float(np.max(estimator(counts, significance / counts.hits.size)))


@dataclass(frozen=True)
class Explicit(ThresholdStrategy):
    """A threshold that was chosen before the scores were seen.

    Attributes:
        threshold: Canaries that score at least this are taken to be in the data.
    """

    threshold: float

    def __post_init__(self) -> None:
        if math.isnan(self.threshold):
            raise ValueError(
                "`threshold` must be a number, got NaN. Choose one between the scores."
            )

    def bound(
        self,
        estimator: Estimator,
        in_scores: np.ndarray,
        out_scores: np.ndarray,
        *,
        significance: float,
        sees_membership: bool,
    ) -> float:
        """Returns the bound at the threshold."""
        del sees_membership
        counts = count(in_scores, out_scores, np.array([self.threshold]))
        return float(estimator(counts, significance)[0])


@dataclass(frozen=True)
class Split(ThresholdStrategy):
    """Chooses the threshold on one part of the scores and takes the bound from the other.

    Attributes:
        threshold_estimation_frac: Share of the scores that the threshold is chosen on, in (0, 1).
        seed: Of the random split. By default from the operating system.
    """

    threshold_estimation_frac: float = 0.5
    seed: int | None = None

    def __post_init__(self) -> None:
        hint = "One half is usual."
        _validate.open_unit("threshold_estimation_frac", self.threshold_estimation_frac, hint)

    def bound(
        self,
        estimator: Estimator,
        in_scores: np.ndarray,
        out_scores: np.ndarray,
        *,
        significance: float,
        sees_membership: bool,
    ) -> float:
        """Returns the bound of the other part at the threshold that is best on the first."""
        del sees_membership
        rng = np.random.default_rng(self.seed)
        frac = self.threshold_estimation_frac
        first_in, second_in = _split("in_canary_scores", in_scores, frac, rng)
        first_out, second_out = _split("out_canary_scores", out_scores, frac, rng)
        candidates = _candidates(first_in, first_out)
        bounds = estimator(count(first_in, first_out, candidates), significance)
        chosen = candidates[[np.argmax(bounds)]]
        return float(estimator(count(second_in, second_out, chosen), significance)[0])


@dataclass(frozen=True)
class MultiSplit(ThresholdStrategy):
    """The median over many random splits, each at half the significance.

    Attributes:
        num_samples: How many splits.
        threshold_estimation_frac: As of `Split`.
        seed: Of the random splits. By default from the operating system.

    Guarantees:
        The median is above the truth with at most the significance, however the splits depend on
        one another.

    Source:
        Twice the median of p-values is one: Meinshausen et al. 2009, "p-values for
        high-dimensional regression", theorem 3.1 with γ = 1/2.
    """

    num_samples: int = 100
    threshold_estimation_frac: float = 0.5
    seed: int | None = None

    def __post_init__(self) -> None:
        _validate.integer("num_samples", self.num_samples, "Pass 100.", minimum=1)
        Split(self.threshold_estimation_frac)

    def bound(
        self,
        estimator: Estimator,
        in_scores: np.ndarray,
        out_scores: np.ndarray,
        *,
        significance: float,
        sees_membership: bool,
    ) -> float:
        """Returns the lower median of the splits' bounds."""
        seeds = np.random.default_rng(self.seed).integers(2**63, size=self.num_samples)
        bounds = [
            Split(self.threshold_estimation_frac, int(seed)).bound(
                estimator,
                in_scores,
                out_scores,
                significance=significance / 2,
                sees_membership=sees_membership,
            )
            for seed in seeds
        ]
        return sorted(bounds)[(self.num_samples - 1) // 2]


def _ranks(size: int) -> np.ndarray:
    """Returns 0 and about two whole numbers an octave, all below `size`."""
    halves = np.arange(2 * np.log2(size) + 1)
    ranks = np.unique(np.concatenate([[0], np.floor(2 ** (halves / 2))])).astype(int)
    return ranks[ranks < size]


def _counts_by_rank(in_scores: np.ndarray, out_scores: np.ndarray) -> Counts:
    """Counts just above outside scores of fixed ranks, and at inside scores of fixed ranks.

    A rank fixes one of the two counts, whose true rate is then that order statistic's: exactly
    what Clopper and Pearson bound. Ties only push the true rate further inside.
    """
    false_alarms, misses = _ranks(out_scores.size), _ranks(in_scores.size)
    hits = in_scores.size - np.searchsorted(in_scores, out_scores[::-1][false_alarms], "right")
    at_inside = count(in_scores, out_scores, in_scores[misses])
    return Counts(
        np.concatenate([hits, in_scores.size - misses]),
        np.concatenate([false_alarms, at_inside.false_alarms]),
        in_scores.size,
        out_scores.size,
    )


def _counts_by_common_rank(in_scores: np.ndarray, out_scores: np.ndarray) -> Counts:
    """Counts at scores of fixed ranks among all."""
    scores = np.sort(np.concatenate([in_scores, out_scores]))[::-1]
    return count(in_scores, out_scores, scores[_ranks(scores.size)])


def _candidates(in_scores: np.ndarray, out_scores: np.ndarray) -> np.ndarray:
    just_above = np.nextafter(out_scores[::-1][_ranks(out_scores.size)], np.inf)
    return np.concatenate([just_above, in_scores[_ranks(in_scores.size)]])


def _split(
    name: str, scores: np.ndarray, frac: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    size = round(scores.size * frac)
    if not 0 < size < scores.size:
        raise ValueError(
            f"`{name}` must be enough for both parts of a split, got {scores.size} scores. "
            "Use more canaries, or another threshold strategy."
        )
    shuffled = rng.permutation(scores)
    return np.sort(shuffled[:size]), np.sort(shuffled[size:])
