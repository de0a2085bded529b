"""The least noise, and the largest count, that stay within a budget."""

import functools
import math
from collections.abc import Callable

import dp_accounting
from dp_accounting import NeighboringRelation
from scipy import optimize

from dpkernels import _validate
from dpkernels.composition.profile import Accountant, epsilon_of_event, pld_accountant

_RELATIVE_TOLERANCE = 1e-6
_MIN_NOISE_MULTIPLIER = 2.0**-10  # no epsilon of interest needs less
_MAX_NOISE_MULTIPLIER = 2.0**40
_COARSE_INTERVAL = 1e-3
_DOUBLE, _CLOSE = 2.0, 1.0005


def smallest_noise_multiplier(
    event_of: Callable[[float], dp_accounting.DpEvent],
    *,
    epsilon: float,
    delta: float,
    accountant: str | Accountant = "pld",
    neighboring_relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
    guess: float = 1.0,
) -> float:
    """Returns about the smallest noise multiplier whose event spends at most `epsilon`.

    Args:
        event_of: Returns the event for a noise multiplier from 2**-10 to 2**40; more noise must
            not spend more.
        epsilon: The epsilon that may be spent, positive and finite.
        delta: The delta of (epsilon, delta)-differential privacy, in (0, 1).
        accountant: As in `epsilon_of_event`.
        neighboring_relation: Which datasets are neighbours.
        guess: Where the search begins; a good one only saves time.

    Returns:
        The noise multiplier, at least 2**-10.

    Raises:
        ValueError: If an argument is outside its range, the accountant does not support the
            event, or no noise multiplier up to 2**40 reaches the target.
        TypeError: If a number is not one.

    Guarantees:
        * `epsilon_of_event` with the result is never above `epsilon`.
        * Where more than 2**-10 is returned, 0.1 % less noise would spend more than `epsilon`.
    """
    epsilon = _validate.positive("epsilon", epsilon, "0.1 to 10 is usual.")

    def spent_by(accountant: str | Accountant) -> Callable[[float], float]:
        @functools.cache
        def spent(noise_multiplier: float) -> float:
            return epsilon_of_event(
                event_of(noise_multiplier),
                delta,
                accountant=accountant,
                neighboring_relation=neighboring_relation,
            )

        return spent

    closeness = _DOUBLE
    if accountant == "pld":  # A tenth of the time for each look finds nearly the same.
        coarse = spent_by(pld_accountant(_COARSE_INTERVAL))
        guess, closeness = smallest_within(coarse, epsilon, guess=guess), _CLOSE
    return smallest_within(spent_by(accountant), epsilon, guess=guess, closeness=closeness)


def largest_count(
    spent: Callable[[int], float], target: float, *, maximum: int = 2**40, guess: int = 1
) -> int:
    """Returns the largest count that spends at most `target`.

    Args:
        spent: What a count of 1 or more spends; it must grow with the count.
        target: What may be spent.
        maximum: No larger count is tried.
        guess: Where the search begins; a good one only saves time.

    Returns:
        A count from 0 to `maximum`; 0 where even one spends more.

    Guarantees:
        * `spent` of the result is never above `target`, unless the result is 0.
        * `spent` of the next count is above it, unless the result is `maximum`.
    """
    spent = functools.cache(spent)
    low, high = 0, min(max(guess, 1), maximum)
    while spent(high) <= target:
        if high == maximum:
            return maximum
        low, high = high, min(2 * high, maximum)
    halve = False
    while high - low > 1:
        middle = (low + high) // 2 if halve or not low else _between(spent, target, low, high)
        if spent(middle) <= target:
            low = middle
        else:
            high = middle
        halve = not halve
    return low


def _between(spent: Callable[[int], float], target: float, low: int, high: int) -> int:
    """Returns where a power law through both ends meets the target, strictly between them."""
    ends = spent(low), spent(high)
    if not 0 < ends[0] < ends[1] < math.inf:
        return (low + high) // 2
    share = math.log(target / ends[0]) / math.log(ends[1] / ends[0])
    return min(max(round(low * (high / low) ** share), low + 1), high - 1)


def smallest_within(
    spent: Callable[[float], float],
    target: float,
    *,
    guess: float = 1.0,
    closeness: float = _DOUBLE,
) -> float:
    """Returns about the smallest noise multiplier that spends at most `target`.

    Args:
        spent: What a noise multiplier from 2**-10 to 2**40 spends; more must not spend more.
        target: What may be spent, positive.
        guess: Where the search begins; a good one only saves time.
        closeness: By which factor less is tried first; one that fits the guess only saves time.

    Raises:
        ValueError: If no noise multiplier up to 2**40 reaches the target.

    Guarantees:
        `spent` of the result is never above `target`.
    """
    guess = min(max(guess, _MIN_NOISE_MULTIPLIER), _MAX_NOISE_MULTIPLIER)
    low, high = _bracket(spent, target, guess, closeness)
    if low is None:
        return high

    def noise_at(share: float) -> float:  # exactly `low` at 0 and `high` at 1
        return low if share == 0 else high * (low / high) ** (1 - share)

    # In logarithms the curve is nearly a line, for every target.
    def excess(share: float) -> float:
        share_of_target = min(max(spent(noise_at(share)), 1e-6 * target), 1e300) / target
        return math.log(share_of_target)

    if high <= _CLOSE * low:  # A line is then as good as the tolerance.
        ends = excess(0.0), excess(1.0)
        share = ends[0] / (ends[0] - ends[1])
    else:
        tolerance = _RELATIVE_TOLERANCE / math.log(high / low)
        share = optimize.brentq(excess, 0.0, 1.0, xtol=tolerance)
    noise_multiplier = noise_at(share)
    step = _RELATIVE_TOLERANCE
    while spent(noise_multiplier) > target:
        noise_multiplier = min(noise_multiplier * (1 + step), high)
        step *= 2
    return noise_multiplier


def _bracket(
    spent: Callable[[float], float], target: float, guess: float, closeness: float
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
        low = max(high / closeness, _MIN_NOISE_MULTIPLIER)
        while spent(low) <= target:
            if low <= _MIN_NOISE_MULTIPLIER:
                return None, low
            closeness = min(closeness**4, _DOUBLE)
            low, high = max(low / closeness, _MIN_NOISE_MULTIPLIER), low
    return low, high
