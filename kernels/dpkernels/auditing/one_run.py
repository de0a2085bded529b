"""What many canaries in a single run say about epsilon.

Each canary is in the data with probability one half, independently. The auditor guesses for some
of them that they are in, and counts how many guesses are right.

Example:
    >>> bool(p_value_dp(1000, 100, 90, epsilon=1.0, delta=1e-6) < 1e-3)
    True
"""

from collections.abc import Callable

import numpy as np
from scipy import special, stats

from dpkernels.auditing.rates import Counts


def p_value_dp(
    num_canaries: int, guesses: int, right: int, *, epsilon: float, delta: float
) -> float:
    """Returns how likely it is that a private mechanism lets at least as many guesses be right.

    Args:
        num_canaries: How many canaries there were.
        guesses: For how many a guess was made.
        right: How many guesses were right.
        epsilon: The mechanism's, for adding or removing a canary.
        delta: The mechanism's.

    Source:
        Steinke, Nasr and Jagielski 2023, arXiv 2305.08846, theorem 5.2.
    """
    if right == 0:
        return 1.0
    accuracy = special.expit(epsilon)
    tail = stats.binom.sf(right - 1, guesses, accuracy)
    # Probability to miss the count by 1, by at most 2, ...; delta buys the best of those.
    short = np.cumsum(stats.binom.pmf(np.arange(right - 1, -1, -1), guesses, accuracy))
    bought = np.max(short / np.arange(1, right + 1))
    return float(min(1.0, tail + 2 * num_canaries * delta * bought))


def epsilon_dp(counts: Counts, significance: float, delta: float) -> np.ndarray:
    """Returns for each threshold the largest epsilon at which its count is too unlikely."""
    guesses = counts.hits + counts.false_alarms
    num_canaries = counts.num_in + counts.num_out

    def is_refuted(epsilons: np.ndarray) -> np.ndarray:
        p_values = [
            p_value_dp(num_canaries, int(r), int(v), epsilon=float(e), delta=delta)
            for r, v, e in zip(guesses, counts.hits, epsilons, strict=True)
        ]
        return np.array(p_values) <= significance

    return _largest_refuted(is_refuted, guesses.size)


def mu_gdp(counts: Counts, significance: float) -> np.ndarray:
    """Returns for each threshold the largest μ of Gaussian differential privacy it refutes.

    Source:
        Mahloujifar, Melis and Chaudhuri 2024, arXiv 2410.22235, section 3.
    """
    guesses = counts.hits + counts.false_alarms
    num_canaries = counts.num_in + counts.num_out

    def is_refuted(mus: np.ndarray) -> np.ndarray:
        mass = _least_mass(counts.hits, guesses, significance / num_canaries, mus)
        return mass > guesses / num_canaries

    return _largest_refuted(is_refuted, guesses.size)


def _least_mass(
    right: np.ndarray, guesses: np.ndarray, share: float, mus: np.ndarray
) -> np.ndarray:
    """Returns what share of the canaries would have to be guessed at.

    Were as many guesses right as often as with probability τ = `share` * canaries, then the
    chances r to be right and h to be wrong with at least i right guesses follow from those with at
    least i + 1, by the trade-off curve of μ-GDP: h >= Φ(Φ⁻¹(r) - μ). Too much refutes μ.
    """
    r, h = share * right, share * (guesses - right)
    for i in range(int(right.max(initial=0)) - 1, -1, -1):
        active = i < right
        raised = special.ndtr(special.ndtri(np.minimum(r, 1.0)) - mus)
        raised = np.where(active, np.maximum(h, raised), h)
        r = r + i / np.maximum(guesses - i, 1) * (raised - h)
        h = raised
    return r + h


def _largest_refuted(is_refuted: Callable[[np.ndarray], np.ndarray], size: int) -> np.ndarray:
    """Returns for each of `size` the largest number, to 1e-7, that is refuted; 0 if none is."""
    low, high = np.zeros(size), np.full(size, 100.0)
    open_ = is_refuted(low)
    if not open_.any():
        return low
    for _ in range(30):
        middle = (low + high) / 2
        refuted = open_ & is_refuted(middle)
        low, high = np.where(refuted, middle, low), np.where(refuted, high, middle)
    return low
