"""Rényi divergences of counted events.

Composed order by order (Mironov 2017, Proposition 1; Mironov, Talwar and Zhang 2019, Section 3.3)
and converted to epsilon and delta by Canonne, Kamath and Steinke 2020, Proposition 12.
"""

import contextlib
import logging
import math
from collections.abc import Iterator

import dp_accounting
from dp_accounting import NeighboringRelation
from dp_accounting.rdp import rdp_privacy_accountant

from dpkernels.composition.curve import Curve
from dpkernels.composition.events import Counts

Orders = tuple[float, ...]  # none: whichever fit

_DEFAULT = tuple(rdp_privacy_accountant.DEFAULT_RDP_ORDERS)
_HIGH = (*_DEFAULT, 2048, 4096, 8192, 16384)
# dp_accounting's divergences are off by up to 2e-15 (measured against 80-digit arithmetic),
# which can turn a small one negative; it then reads them as zero.
_SLACK = 1e-14


def supports(event: dp_accounting.DpEvent, relation: NeighboringRelation) -> bool:
    """Returns whether there are Rényi divergences of the event."""
    accountant = dp_accounting.rdp.RdpAccountant(neighboring_relation=relation)
    return bool(accountant.supports(event))


def curve_at_delta(
    counts: Counts, relation: NeighboringRelation, delta: float, scale: float, orders: Orders
) -> Curve:
    """Returns the epsilons and deltas of all events together, tight at one delta.

    Args:
        counts: What was released.
        relation: Which datasets are neighbours.
        delta: In (0, 1).
        scale: About the Rényi divergence of order 2 of all events.
        orders: Which divergences to compute; by default those that fit.
    """
    if orders:
        return _curve(counts, relation, orders)
    # The best order of a Gaussian with this divergence: beyond the default ones when the budget
    # is small, where they alone would bound epsilon from below by log(1 / delta) / 1023.
    is_small = 2 * math.log(1 / delta) > scale * _DEFAULT[-1] ** 2
    return _curve(counts, relation, _HIGH if is_small else _DEFAULT)


def curve_at_epsilon(
    counts: Counts, relation: NeighboringRelation, epsilon: float, scale: float, orders: Orders
) -> Curve:
    """Returns them tight at one epsilon; wherever `curve_at_delta` takes high orders, so here."""
    is_small = epsilon > 64 * scale or scale < 1e-4
    return _curve(counts, relation, orders or (_HIGH if is_small else _DEFAULT))


def _curve(counts: Counts, relation: NeighboringRelation, orders: Orders) -> Curve:
    accountant = dp_accounting.rdp.RdpAccountant(orders, relation)
    with _without_order_warnings():
        for event, count in counts.items():
            accountant.compose(event, count)
            accountant.compose(dp_accounting.ZCDpEvent(rho=0.0, xi=_SLACK), count)
    return Curve(accountant.get_epsilon, accountant.get_delta)


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
