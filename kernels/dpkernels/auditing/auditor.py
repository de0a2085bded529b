"""Lower bounds of epsilon from the scores that an attack gives to canaries.

Example:
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> inside, outside = rng.normal(2.0, 1.0, 1000), rng.normal(0.0, 1.0, 1000)
    >>> auditor = CanaryScoreAuditor(inside, outside)
    >>> round(auditor.epsilon_clopper_pearson(0.05), 1), round(auditor.attack_auroc(), 2)
    (2.9, 0.92)
"""

import math

import dp_accounting
import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from dpkernels import _validate
from dpkernels.auditing import one_run, rates
from dpkernels.auditing.bootstrap import BootstrapParams, Statistic, bootstrap
from dpkernels.auditing.rates import Counts
from dpkernels.auditing.thresholds import Bonferroni, Estimator, ThresholdStrategy

_BONFERRONI = Bonferroni()
_SIGNIFICANCE_HINT = "0.05 makes the bound hold with 95 % confidence."
_DELTA_HINT = "Pass the delta for which epsilon is claimed."


class CanaryScoreAuditor:
    """Says what scores of canaries inside and outside the data reveal about privacy.

    A score is any statistic of what was released, larger where it looks as if the canary had been
    in the data. For `epsilon_clopper_pearson` and `epsilon_from_gdp` scores must be independent:
    one canary in each run. `epsilon_one_run` and `epsilon_one_run_fdp` are for many canaries in
    one run, each of which was in the data by a fair coin of its own.

    Args:
        in_canary_scores: `(in,)`, of canaries that were in the data.
        out_canary_scores: `(out,)`, of canaries that were not.

    Raises:
        ValueError: If scores are empty, not one-dimensional, or NaN.

    Guarantees:
        Each bound is above the true epsilon with at most the probability `significance`, if the
            scores were drawn as said. `epsilon_raw_counts` is an estimate, not a bound.
    """

    def __init__(self, in_canary_scores: npt.ArrayLike, out_canary_scores: npt.ArrayLike) -> None:
        self._in = _scores("in_canary_scores", in_canary_scores)
        self._out = _scores("out_canary_scores", out_canary_scores)

    def epsilon_clopper_pearson(
        self,
        significance: float,
        delta: float = 0,
        one_sided: bool = True,
        *,
        threshold_strategy: ThresholdStrategy = _BONFERRONI,
    ) -> float:
        """Returns a lower bound of epsilon from the rates of hits and false alarms.

        Args:
            significance: Probability, in (0, 0.5), with which the bound may be above the truth.
            delta: In [0, 1].
            one_sided: Whether to look at canaries taken to be inside alone. Otherwise also at
                those taken to be outside, at no cost: both follow from the same two rates.
            threshold_strategy: How the threshold is chosen.

        Raises:
            ValueError: If a number is out of range.

        Source:
            Nasr et al. 2021, arXiv 2101.04535, section IV; Jagielski et al. 2020, section 4.
        """
        significance = below_half(significance)
        delta = _delta(delta)

        def estimate(counts: Counts, significance: float) -> np.ndarray:
            hit_rates, false_alarm_rates = rates.bounded_rates(counts, significance)
            return _epsilon(hit_rates, false_alarm_rates, delta, one_sided)

        return self._bound(estimate, significance, threshold_strategy)

    def epsilon_from_gdp(
        self,
        significance: float,
        delta: float,
        eps_tol: float = 1e-6,
        *,
        threshold_strategy: ThresholdStrategy = _BONFERRONI,
    ) -> float:
        """Returns a lower bound of epsilon for a mechanism known to be μ-GDP for some μ.

        Args:
            significance: Probability, in (0, 0.5), with which the bound may be above the truth.
            delta: In (0, 1).
            eps_tol: By how much the result may be too small.
            threshold_strategy: How the threshold is chosen.

        Raises:
            ValueError: If a number is out of range.

        Guarantees:
            The bound holds only if the mechanism has a trade-off curve Φ(Φ⁻¹(1 - α) - μ), as the
                composition of Gaussian mechanisms on full batches; of others it is an estimate.

        Source:
            Dong, Roth and Su 2022, definition 2.6; Nasr et al. 2023, arXiv 2302.07956.
        """
        significance = below_half(significance)
        delta = _validate.open_unit("delta", delta, _DELTA_HINT)
        eps_tol = _validate.positive("eps_tol", eps_tol, "Pass 1e-6.")

        def estimate(counts: Counts, significance: float) -> np.ndarray:
            hit_rates, false_alarm_rates = rates.bounded_rates(counts, significance)
            return np.maximum(0, ndtri(hit_rates) - ndtri(false_alarm_rates))

        mu = self._bound(estimate, significance, threshold_strategy)
        return _epsilon_of_gdp(mu, delta, eps_tol)

    def epsilon_one_run(
        self,
        significance: float,
        delta: float,
        one_sided: bool = True,
        *,
        threshold_strategy: ThresholdStrategy = _BONFERRONI,
    ) -> float:
        """Returns a lower bound of epsilon from many canaries in one run.

        Args:
            significance: Probability, in (0, 1), with which the bound may be above the truth.
            delta: In (0, 1].
            one_sided: Must be True: guesses are made for the high scores alone.
            threshold_strategy: How the threshold is chosen.

        Raises:
            ValueError: If a number is out of range, or `one_sided` is False.

        Source:
            Steinke, Nasr and Jagielski 2023, arXiv 2305.08846, theorem 5.2.
        """
        significance, delta = _one_run_arguments(significance, delta, one_sided)
        return self._bound(
            lambda counts, share: one_run.epsilon_dp(counts, share, delta),
            significance,
            threshold_strategy,
            sees_membership=False,
        )

    def epsilon_one_run_fdp(
        self,
        significance: float,
        delta: float,
        one_sided: bool = True,
        *,
        threshold_strategy: ThresholdStrategy = _BONFERRONI,
    ) -> float:
        """Returns a lower bound of epsilon from one run of a mechanism known to be μ-GDP.

        Tighter than `epsilon_one_run`, which allows for every mechanism.

        Args:
            significance: As of `epsilon_one_run`.
            delta: As of `epsilon_one_run`.
            one_sided: As of `epsilon_one_run`.
            threshold_strategy: As of `epsilon_one_run`.

        Raises:
            ValueError: As `epsilon_one_run`.

        Source:
            Mahloujifar, Melis and Chaudhuri 2024, arXiv 2410.22235, section 3.
        """
        significance, delta = _one_run_arguments(significance, delta, one_sided)
        mu = self._bound(one_run.mu_gdp, significance, threshold_strategy, sees_membership=False)
        return _epsilon_of_gdp(mu, delta, 1e-6)

    def epsilon_raw_counts(
        self,
        min_count: int = 50,
        delta: float = 0,
        one_sided: bool = True,
        *,
        bootstrap_params: BootstrapParams | None = None,
    ) -> float | np.ndarray:
        """Returns the largest log ratio of hits to false alarms: an estimate, not a bound.

        Args:
            min_count: How many hits and false alarms there must be, at least. Where no threshold
                has just as many, the attack chooses between two by a coin.
            delta: In [0, 1].
            one_sided: As of `epsilon_clopper_pearson`.
            bootstrap_params: For quantiles of the estimate instead of the estimate.

        Raises:
            ValueError: If a number is out of range.
        """
        min_count = _validate.integer("min_count", min_count, "50 is usual.", minimum=1)
        delta = _delta(delta)

        def statistic(in_scores: np.ndarray, out_scores: np.ndarray) -> float:
            counts = rates.count_everywhere(in_scores, out_scores)
            return _largest_ratio(counts, min_count, delta, one_sided)

        return self._value(statistic, bootstrap_params)

    def tpr_at_given_fpr(
        self, fpr: npt.ArrayLike, *, bootstrap_params: BootstrapParams | None = None
    ) -> float | np.ndarray:
        """Returns the rate of hits at rates of false alarms, between thresholds by a line.

        Args:
            fpr: Numbers in [0, 1]; one number with `bootstrap_params`.
            bootstrap_params: For quantiles of the rate instead of the rate.

        Raises:
            ValueError: If a rate is out of range, or there are several with `bootstrap_params`.
        """
        wanted = np.asarray(fpr, np.float64)
        if not np.all((wanted >= 0) & (wanted <= 1)):
            raise ValueError(f"`fpr` must be in [0, 1], got {fpr!r}. 0.01 is usual.")
        if bootstrap_params is not None and wanted.ndim:
            raise ValueError(
                f"`fpr` must be one number with `bootstrap_params`, got shape {wanted.shape}. "
                "Call once for each."
            )

        def hit_rates(in_scores: np.ndarray, out_scores: np.ndarray) -> np.ndarray:
            reached, most = _curve(rates.count_everywhere(in_scores, out_scores))
            return np.interp(wanted, reached / out_scores.size, most / in_scores.size)

        if wanted.ndim:
            return hit_rates(self._in, self._out)
        return self._value(lambda *scores: float(hit_rates(*scores)), bootstrap_params)

    def attack_auroc(
        self, *, bootstrap_params: BootstrapParams | None = None
    ) -> float | np.ndarray:
        """Returns the probability that an inside score is above an outside one; ties count half.

        Args:
            bootstrap_params: For quantiles of the probability instead of it.
        """

        def statistic(in_scores: np.ndarray, out_scores: np.ndarray) -> float:
            below = np.searchsorted(out_scores, in_scores, "left")
            not_above = np.searchsorted(out_scores, in_scores, "right")
            return float(np.mean(below + not_above) / (2 * out_scores.size))

        return self._value(statistic, bootstrap_params)

    def max_accuracy(
        self, *, prevalence: float | None = None, significance: float | None = None
    ) -> float:
        """Returns the best share of right answers that any threshold gives.

        Args:
            prevalence: Share of canaries inside the data, in [0, 1]; by default that of the scores.
            significance: If given, returns what the best threshold's accuracy exceeds with at
                most this probability, in (0, 1).

        Raises:
            ValueError: If a number is out of range.
        """
        counts = rates.count_everywhere(self._in, self._out)
        hit_rates, rejections = counts.hit_rates, 1 - counts.false_alarm_rates
        if significance is not None:
            # Which threshold is best does not depend on the scores, so no correction is due.
            half = _validate.open_unit("significance", significance, _SIGNIFICANCE_HINT) / 2
            hit_rates = rates.upper_bound(counts.hits, counts.num_in, half)
            rejected = counts.num_out - counts.false_alarms
            rejections = rates.upper_bound(rejected, counts.num_out, half)
        share = counts.num_in / (counts.num_in + counts.num_out)
        if prevalence is not None:
            share = _unit("prevalence", prevalence, "One half is usual.")
        return float(np.max(share * hit_rates + (1 - share) * rejections))

    def _bound(
        self,
        estimator: Estimator,
        significance: float,
        threshold_strategy: ThresholdStrategy,
        *,
        sees_membership: bool = True,
    ) -> float:
        return threshold_strategy.bound(
            estimator,
            self._in,
            self._out,
            significance=significance,
            sees_membership=sees_membership,
        )

    def _value(self, statistic: Statistic, params: BootstrapParams | None) -> float | np.ndarray:
        if params is None:
            return statistic(self._in, self._out)
        return bootstrap(statistic, self._in, self._out, params)


def _scores(name: str, scores: npt.ArrayLike) -> np.ndarray:
    array = np.asarray(scores, np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(
            f"`{name}` must be one-dimensional and not empty, got shape {array.shape}. "
            "Pass one score for each canary."
        )
    if np.isnan(array).any():
        raise ValueError(
            f"`{name}` must be numbers, got {np.count_nonzero(np.isnan(array))} NaN of "
            f"{array.size}. Find out why the attack has no answer for them; to leave them out "
            "would bias the audit."
        )
    return np.sort(array)


def _unit(name: str, value: float, hint: str) -> float:
    number = _validate.non_negative(name, value, hint)
    if number > 1:
        raise ValueError(f"`{name}` must be in [0, 1], got {value!r}. {hint}")
    return number


def _delta(delta: float) -> float:
    return _unit("delta", delta, _DELTA_HINT)


def below_half(significance: float) -> float:
    """Returns the significance if it lies in (0, 0.5)."""
    value = _validate.open_unit("significance", significance, _SIGNIFICANCE_HINT)
    if value >= 0.5:
        raise ValueError(
            f"`significance` must be in (0, 0.5), got {significance!r}. {_SIGNIFICANCE_HINT}"
        )
    return value


def _one_run_arguments(significance: float, delta: float, one_sided: bool) -> tuple[float, float]:
    if not one_sided:
        raise ValueError(
            "`one_sided` must be True, got False. Guesses are made for the high scores alone."
        )
    significance = _validate.open_unit("significance", significance, _SIGNIFICANCE_HINT)
    return significance, _validate.probability("delta", delta, _DELTA_HINT)


def _epsilon(
    hit_rates: np.ndarray, false_alarm_rates: np.ndarray, delta: float, one_sided: bool
) -> np.ndarray:
    """Returns the least epsilon at which such rates are possible."""
    ratios = _ratio(hit_rates - delta, false_alarm_rates)
    if not one_sided:
        ratios = np.maximum(ratios, _ratio(1 - false_alarm_rates - delta, 1 - hit_rates))
    return np.log(np.maximum(ratios, 1))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full_like(above, np.inf), where=below > 0)


def _largest_ratio(counts: Counts, min_count: int, delta: float, one_sided: bool) -> float:
    ratios = [_best_ratio(counts, min_count, delta)]
    if not one_sided:
        mirrored = Counts(
            counts.num_out - counts.false_alarms,
            counts.num_in - counts.hits,
            num_in=counts.num_out,
            num_out=counts.num_in,
        )
        ratios.append(_best_ratio(mirrored, min_count, delta))
    return math.log(max(ratios))


def _best_ratio(counts: Counts, min_count: int, delta: float) -> float:
    """Returns the largest ratio of the rates, at least 1, at `min_count` false alarms or more."""
    reached, most = _curve(counts)
    at = np.concatenate([[min_count], reached[reached > min_count]])
    hits = np.interp(at, reached, most)
    ratios = _ratio(hits / counts.num_in - delta, at / counts.num_out)
    return float(np.max(ratios[hits >= min_count], initial=1.0))


def _curve(counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers of false alarms that occur, and the most hits at each."""
    reached, group = np.unique(counts.false_alarms, return_inverse=True)
    most = np.zeros(reached.size)
    np.maximum.at(most, group, counts.hits)
    return reached, most


def _epsilon_of_gdp(mu: float, delta: float, tolerance: float) -> float:
    if mu == 0 or delta == 1:
        return 0.0
    with np.errstate(divide="ignore"):  # a delta of zero far out, where the search begins
        epsilon = dp_accounting.get_epsilon_gaussian(1 / mu, delta, tol=tolerance / 2)
    return max(0.0, float(epsilon) - tolerance / 2)  # its search is two-sided
