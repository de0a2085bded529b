"""The privacy loss of Gaussian noise on batches of a fixed size, drawn without replacement.

dp_accounting has none; accounting for Poisson sampling instead is not a bound (see the tests).
"""

import math

import numpy as np
from dp_accounting.pld import pld_pmf
from dp_accounting.pld import privacy_loss_distribution as pld
from scipy import special


def loss_distribution(shift: float, sampled: float, interval: float) -> pld.PrivacyLossDistribution:
    """Returns a privacy loss distribution that dominates one release, whatever the dataset.

    For the relation of replacing one example. One release spends delta(epsilon) of

        sampled * delta_gaussian(log(1 + (exp(epsilon) - 1) / sampled))    for epsilon >= 0

    (Balle, Barthe and Gaboardi 2018, Theorem 9). Neighbours may be exchanged, so for
    epsilon < 0 it is 1 - exp(epsilon) + exp(epsilon) * delta(-epsilon). A loss distribution with
    these hockey-stick divergences dominates every pair of neighbours, and so does its
    composition that of adaptive releases (Zhu, Dong and Wang 2022, Theorem 10).

    Args:
        shift: By how many standard deviations of the noise neighbouring sums may differ.
        sampled: Batch size over dataset size, in (0, 1].
        interval: Width of the grid of losses.
    """
    tail = shift * (0.5 * shift + 10)  # ten deviations; what lies beyond counts as infinite
    longest = float(np.logaddexp(np.log1p(-sampled), np.log(sampled) + tail))
    top = math.ceil(longest / interval)
    deltas = _deltas(np.arange(top + 1) * interval, shift, sampled)
    epsilons = np.arange(1, top + 1) * interval
    below = -np.expm1(-epsilons) + np.exp(-epsilons) * deltas[1:]
    pmf = pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(
        interval, -top, top, np.concatenate([below[::-1], deltas])
    )
    return pld.PrivacyLossDistribution(pmf)


def _deltas(epsilons: np.ndarray, shift: float, sampled: float) -> np.ndarray:
    """Returns the divergences of one release at epsilons of 0 and more."""
    inner = np.log1p(np.expm1(epsilons) / sampled)
    beyond = inner / shift + 0.5 * shift
    upper = special.log_ndtr(shift - beyond)
    lower = inner + special.log_ndtr(-beyond)
    return -sampled * np.exp(upper) * np.expm1(np.minimum(lower - upper, 0))
