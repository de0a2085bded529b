"""Epsilon of noisy training, and the noise that a target epsilon needs.

Example:
    >>> epsilon = compute_epsilon(
    ...     noise_multiplier=3.0, sampling_prob=0.1, steps=512, delta=1e-6)
    >>> round(epsilon, 2)
    3.77
    >>> noise_multiplier = calibrate_noise_multiplier(
    ...     epsilon=1.0, delta=1e-6, sampling_prob=0.1, steps=512)
    >>> round(noise_multiplier, 2)
    9.66

All numbers are for the add-or-remove-one neighbouring relation.
"""

import contextlib
import functools
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import dp_accounting
import numpy as np
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.rdp import rdp_privacy_accountant
from scipy import optimize

from dpkernels import _validate


class Event(NamedTuple):
    """One release: Gaussian noise on a sum over a Poisson-subsampled batch.

    Attributes:
        noise_multiplier: Standard deviation of the noise over the sensitivity of the sum.
        sampling_prob: Probability with which each example is in the batch.
    """

    noise_multiplier: float
    sampling_prob: float

    def to_dp_event(self) -> dp_accounting.DpEvent:
        """Returns the event in the words of dp_accounting."""
        gaussian = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        return dp_accounting.PoissonSampledDpEvent(self.sampling_prob, gaussian)


def compute_epsilon(
    *,
    noise_multiplier: float,
    sampling_prob: float,
    steps: int,
    delta: float,
    accountant: str = "pld",
) -> float:
    """Returns the epsilon that `steps` steps of DP-SGD spend at `delta`.

    Each step is the Poisson-subsampled Gaussian mechanism of Abadi et al. 2016 (Algorithm 1).
    `"pld"` composes privacy loss distributions (Koskela et al. 2020), discretised
    pessimistically as in Doroshenko et al. 2022 (Algorithm 1); full batches have a closed
    form (Balle and Wang 2018, Theorem 8). `"rdp"` composes Rényi divergences (Mironov 2017,
    Proposition 1; Mironov, Talwar and Zhang 2019, Section 3.3), which is looser.

    Args:
        noise_multiplier: Standard deviation of the noise over the sensitivity, 0 or more.
        sampling_prob: Probability with which each example is in a batch, in (0, 1].
        steps: How many batches are released, 0 or more.
        delta: The delta of (epsilon, delta)-differential privacy, in (0, 1).
        accountant: `"pld"` or `"rdp"`.

    Returns:
        The epsilon; 0.0 for no steps and `math.inf` for steps without noise.

    Raises:
        ValueError: If an argument is outside its range, or the accountant is not known.
        TypeError: If a number is not one.

    Guarantees:
        * The result is never below the true epsilon.
        * It does not grow with more noise, and does not shrink with more steps or a larger
          sampling probability, up to a relative 1e-3.
        * Where doubles cannot hold the privacy loss distribution (an epsilon above 700, more
          than 2**20 steps, a delta below their rounding), `"pld"` gives what `"rdp"` gives.
    """
    event = Event(
        _validate.non_negative("noise_multiplier", noise_multiplier, _NOISE_HINT),
        _validate.probability("sampling_prob", sampling_prob, _SAMPLING_HINT),
    )
    steps = _validate.integer("steps", steps, _STEPS_HINT, minimum=0)
    return compose_epsilon([(event, steps)], delta=delta, accountant=accountant)


def calibrate_noise_multiplier(
    *,
    epsilon: float,
    delta: float,
    sampling_prob: float,
    steps: int,
    accountant: str = "pld",
) -> float:
    """Returns the noise multiplier with which `steps` steps spend at most `epsilon`.

    Args:
        epsilon: The epsilon that may be spent, positive and finite.
        delta: The delta of (epsilon, delta)-differential privacy, in (0, 1).
        sampling_prob: Probability with which each example is in a batch, in (0, 1].
        steps: How many batches are released, 0 or more.
        accountant: `"pld"` or `"rdp"`.

    Returns:
        The noise multiplier. For no steps it is 0.0, otherwise it is at least 2**-10.

    Raises:
        ValueError: If an argument is outside its range, the accountant is not known, or no
            noise multiplier up to 2**40 reaches the target.
        TypeError: If a number is not one.

    Guarantees:
        * `compute_epsilon` with the result is never above `epsilon`.
        * Where more than 2**-10 is returned, 0.1 % less noise would spend more than `epsilon`.
    """
    epsilon = _validate.positive("epsilon", epsilon, "0.1 to 10 is usual.")
    delta = _validate.open_unit("delta", delta, _DELTA_HINT)
    sampling_prob = _validate.probability("sampling_prob", sampling_prob, _SAMPLING_HINT)
    steps = _validate.integer("steps", steps, _STEPS_HINT, minimum=0)
    _validate.one_of("accountant", accountant, _ACCOUNTANTS)
    if steps == 0:
        return 0.0

    @functools.cache
    def spent(noise_multiplier: float) -> float:
        event = Event(noise_multiplier, sampling_prob)
        return compose_epsilon([(event, steps)], delta=delta, accountant=accountant)

    # What the Gaussian mechanism needs (Dwork and Roth 2014, Appendix A), were the steps one
    # Gaussian with the sum of their variances.
    guess = sampling_prob * math.sqrt(2 * steps * math.log(1.25 / delta)) / epsilon
    return _smallest_within(spent, epsilon, guess)


def compose_epsilon(
    counted_events: Iterable[tuple[Event, int]], *, delta: float, accountant: str = "pld"
) -> float:
    """Returns the epsilon of all events together.

    Args:
        counted_events: Pairs of an event and how often it was released, in any order.
        delta: The delta of (epsilon, delta)-differential privacy, in (0, 1).
        accountant: `"pld"` or `"rdp"`.

    Returns:
        The epsilon; 0.0 for no events and `math.inf` if any was released without noise.

    Raises:
        ValueError: If `delta` is outside its range or the accountant is not known.
        TypeError: If `delta` is not a number.
    """
    delta = _validate.open_unit("delta", delta, _DELTA_HINT)
    epsilon_of = _ACCOUNTANTS[_validate.one_of("accountant", accountant, _ACCOUNTANTS)]
    counts: Counter[Event] = Counter()
    for event, count in counted_events:
        counts[_resolvable(event)] += count
    counts = +counts  # without those that were released no times
    if not counts:
        return 0.0
    if min(event.noise_multiplier for event in counts) < _MIN_RESOLVABLE_NOISE:
        return math.inf
    return epsilon_of(_merged(counts), delta)


_NOISE_HINT = "0 means no noise and no privacy; 0.5 to 10 is usual."
_SAMPLING_HINT = "Pass the expected batch size over the size of the dataset."
_STEPS_HINT = "Pass the number of optimizer steps."
_DELTA_HINT = "Choose it well below one over the number of examples."

Counts = Mapping[Event, int]

_MAX_NOISE_MULTIPLIER = 2.0**40
_MIN_SAMPLING_PROB = 2.0**-40
_MIN_RESOLVABLE_NOISE = 1e-100  # its inverse square is far from overflow


def _resolvable(event: Event) -> Event:
    """Moves an event that doubles cannot resolve to one that spends more."""
    noise_multiplier = min(event.noise_multiplier, _MAX_NOISE_MULTIPLIER)
    return Event(noise_multiplier, max(event.sampling_prob, _MIN_SAMPLING_PROB))


def _merged(counts: Counts) -> Counts:
    """Replaces all full-batch events by the one Gaussian that is their composition."""
    subsampled = {event: n for event, n in counts.items() if event.sampling_prob < 1}
    if len(subsampled) == len(counts):
        return subsampled
    precisions = (n / e.noise_multiplier**2 for e, n in counts.items() if e.sampling_prob == 1)
    return subsampled | {Event(1 / math.sqrt(sum(precisions)), 1.0): 1}


def _log_mixture(weight: float, exponent: float) -> float:
    """Returns log(1 - weight + weight * exp(exponent)), without overflow or cancellation."""
    if weight == 1:
        return exponent
    if exponent < 1:
        return math.log1p(weight * math.expm1(exponent))
    return float(np.logaddexp(math.log1p(-weight), math.log(weight) + exponent))


def _second_divergence(counts: Counts) -> float:
    """Returns the Rényi divergence of order 2 of all events, the scale of what they spend."""
    return sum(
        n * _log_mixture(event.sampling_prob**2, event.noise_multiplier**-2)
        for event, n in counts.items()
    )


# -- privacy loss distributions -------------------------------------------------------------

_INTERVAL = 1e-4
_MIN_INTERVAL = 1e-7
_MAX_INTERVAL = 1.0
_MAX_POINTS = 1e5
_MAX_TOTAL_POINTS = 1e6
_MIN_POINTS = 20
_MAX_STEPS = 2**20
_MAX_EPSILON = 700.0  # where exp(-epsilon) leaves the range of doubles


def _pld_epsilon(counts: Counts, delta: float) -> float:
    if all(event.sampling_prob == 1 for event in counts):
        (event,) = counts
        with np.errstate(divide="ignore"):  # a delta of zero far out, where the search begins
            exact = dp_accounting.get_epsilon_gaussian(event.noise_multiplier, delta)
        return float(exact) * (1 + 1e-9) + 2e-12 if exact else 0.0  # its search is two-sided
    interval, steps = _interval(counts), sum(counts.values())
    # The FFT's rounding is absolute and grows with the power it takes: measured at about
    # 2**-56 a composition, which would under-report where delta is as small.
    rounding = (steps + 64 * len(counts)) * 2.0**-52
    is_too_coarse = interval > min(_MAX_INTERVAL, max(map(_support, counts)) / _MIN_POINTS)
    if is_too_coarse or steps > _MAX_STEPS or 2 * rounding > delta:
        return _rdp_epsilon(counts, delta)
    with np.errstate(all="ignore"):  # losses beyond 700 overflow, and are not used
        composed = functools.reduce(
            privacy_loss_distribution.PrivacyLossDistribution.compose,
            (_single_pld(event, interval).self_compose(n) for event, n in counts.items()),
        )
        if composed.get_delta_for_epsilon(0.0) <= delta - rounding:
            return 0.0
        epsilon = float(composed.get_epsilon_for_delta(delta - rounding))
    return epsilon if epsilon <= _MAX_EPSILON else _rdp_epsilon(counts, delta)


@functools.lru_cache(maxsize=32)
def _single_pld(event: Event, interval: float) -> privacy_loss_distribution.PrivacyLossDistribution:
    return privacy_loss_distribution.from_gaussian_mechanism(
        event.noise_multiplier,
        sampling_prob=event.sampling_prob,
        value_discretization_interval=interval,
        neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


def _interval(counts: Counts) -> float:
    """Returns the width of the grid on which privacy losses are discretised.

    Any width is pessimistic, so this trades tightness for time only: dp_accounting's default,
    finer where it would be coarse beside the loss of one step, coarser where the number of grid
    points would not fit. A power of two times the default, so that adding a step to a
    composition rarely changes it.
    """
    total = _second_divergence(counts)
    fine = math.sqrt(total / sum(counts.values())) / 50
    supports = [_support(event) for event in counts]
    affordable = max(
        max(supports) / _MAX_POINTS,
        sum(supports) / _MAX_TOTAL_POINTS,
        (2 * total + 24 * math.sqrt(total)) / _MAX_TOTAL_POINTS,
    )
    wanted = max(min(fine, _INTERVAL), _MIN_INTERVAL, affordable)
    return _INTERVAL * 2.0 ** math.ceil(math.log2(wanted / _INTERVAL))


def _support(event: Event) -> float:
    """Returns the length of the range of one event's privacy loss, up to ten deviations."""
    inverse = 1 / event.noise_multiplier
    tail = inverse * (0.5 * inverse + 10)
    return _log_mixture(event.sampling_prob, tail) - _log_mixture(event.sampling_prob, -tail)


# -- Rényi divergences ----------------------------------------------------------------------

_DEFAULT_ORDERS = tuple(rdp_privacy_accountant.DEFAULT_RDP_ORDERS)
_HIGH_ORDERS = (2048, 4096, 8192, 16384)
# dp_accounting's divergences are off by up to 2e-15 (measured against 80-digit arithmetic),
# which can turn a small one negative; it then reads them as zero.
_RDP_SLACK = 1e-14


def _rdp_epsilon(counts: Counts, delta: float) -> float:
    # The best order of a Gaussian with this divergence: beyond the default ones when the budget
    # is small, where they alone would bound epsilon from below by log(1 / delta) / 1023.
    total = _second_divergence(counts)
    is_small = 2 * math.log(1 / delta) > total * _DEFAULT_ORDERS[-1] ** 2
    accountant = dp_accounting.rdp.RdpAccountant(
        _DEFAULT_ORDERS + _HIGH_ORDERS if is_small else _DEFAULT_ORDERS,
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    )
    with _without_order_warnings():
        for event, count in counts.items():
            accountant.compose(event.to_dp_event(), count)
            accountant.compose(dp_accounting.ZCDpEvent(rho=0.0, xi=_RDP_SLACK), count)
    return float(accountant.get_epsilon(delta))


@contextlib.contextmanager
def _without_order_warnings() -> Iterator[None]:
    """Silences the warning for each fractional order whose series does not converge.

    Leaving an order out only makes epsilon larger, and at ordinary settings (sampling
    probability 0.3, noise multiplier 1) there would be twenty of these warnings a call.
    """

    def is_other(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("_compute_log_a_frac failed to converge")

    logger = logging.getLogger("absl")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


# -- calibration ----------------------------------------------------------------------------

_RELATIVE_TOLERANCE = 1e-6
_MIN_NOISE_MULTIPLIER = 2.0**-10  # no epsilon of interest needs less


def _smallest_within(spent: Callable[[float], float], target: float, guess: float) -> float:
    """Returns about the smallest noise multiplier that spends at most `target`."""
    low, high = _bracket(spent, target, min(max(guess, 0.5), _MAX_NOISE_MULTIPLIER))
    if low is None:
        return high

    def noise_at(share: float) -> float:  # exactly `low` at 0 and `high` at 1
        return low if share == 0 else high * (low / high) ** (1 - share)

    # In logarithms the curve is nearly a line, for every target.
    def excess(share: float) -> float:
        return math.log(max(spent(noise_at(share)), 1e-6 * target) / target)

    tolerance = _RELATIVE_TOLERANCE / math.log(high / low)
    noise_multiplier = noise_at(optimize.brentq(excess, 0.0, 1.0, xtol=tolerance))
    step = _RELATIVE_TOLERANCE
    while spent(noise_multiplier) > target:
        noise_multiplier = min(noise_multiplier * (1 + step), high)
        step *= 2
    return noise_multiplier


def _bracket(
    spent: Callable[[float], float], target: float, guess: float
) -> tuple[float | None, float]:
    """Returns noise multipliers below and above the target's; the lower may not exist."""
    low: float | None = None
    high = guess
    while spent(high) > target:
        if high >= _MAX_NOISE_MULTIPLIER:
            raise ValueError(
                f"`epsilon` must be reachable, got {target!r}: noise_multiplier={high:g} still "
                f"spends {spent(high):.3g}. Choose a larger epsilon or delta, or fewer steps."
            )
        factor = min(max(spent(high) / target, 2.0), 2.0**10)
        low, high = high, min(high * factor, _MAX_NOISE_MULTIPLIER)
    if low is None:
        low = max(high / 2, _MIN_NOISE_MULTIPLIER)
        while spent(low) <= target:
            if low <= _MIN_NOISE_MULTIPLIER:
                return None, low
            low, high = max(low / 2, _MIN_NOISE_MULTIPLIER), low
    return low, high


_ACCOUNTANTS: dict[str, Callable[[Counts, float], float]] = {
    "pld": _pld_epsilon,
    "rdp": _rdp_epsilon,
}
