"""How often a threshold on the scores is right, and how sure that is."""

from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Counts:
    """What thresholds did to the scores, one entry for each threshold.

    Attributes:
        hits: `(thresholds,)`, how many canaries that were in the data score at least that.
        false_alarms: `(thresholds,)`, how many that were not.
        num_in: How many canaries were in the data.
        num_out: How many were not.
    """

    hits: np.ndarray
    false_alarms: np.ndarray
    num_in: int
    num_out: int

    @property
    def hit_rates(self) -> np.ndarray:
        """Shares of the canaries in the data that were found."""
        return self.hits / self.num_in

    @property
    def false_alarm_rates(self) -> np.ndarray:
        """Shares of the canaries outside the data that were taken to be in it."""
        return self.false_alarms / self.num_out


def count(in_scores: np.ndarray, out_scores: np.ndarray, thresholds: np.ndarray) -> Counts:
    """Counts the scores that are not below each threshold. Scores must be sorted."""
    hits = in_scores.size - np.searchsorted(in_scores, thresholds, "left")
    false_alarms = out_scores.size - np.searchsorted(out_scores, thresholds, "left")
    return Counts(hits, false_alarms, in_scores.size, out_scores.size)


def count_everywhere(in_scores: np.ndarray, out_scores: np.ndarray) -> Counts:
    """Counts at every score, the highest first, and above all of them. Scores must be sorted."""
    thresholds = np.unique(np.concatenate([in_scores, out_scores, [np.inf]]))[::-1]
    return count(in_scores, out_scores, thresholds)


def lower_bound(successes: np.ndarray, trials: int, significance: float) -> np.ndarray:
    """Returns probabilities below which the true one lies with at most this probability.

    Source:
        Clopper and Pearson 1934.
    """
    bound = stats.beta.ppf(significance, np.maximum(successes, 1), trials - successes + 1)
    return np.where(successes == 0, 0.0, bound)


def upper_bound(successes: np.ndarray, trials: int, significance: float) -> np.ndarray:
    """Returns probabilities above which the true one lies with at most this probability."""
    return 1 - lower_bound(trials - successes, trials, significance)


def bounded_rates(counts: Counts, significance: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns hit rates from below and false alarm rates from above.

    At one threshold both hold together, but for this probability.
    """
    hit_rates = lower_bound(counts.hits, counts.num_in, significance / 2)
    return hit_rates, upper_bound(counts.false_alarms, counts.num_out, significance / 2)
