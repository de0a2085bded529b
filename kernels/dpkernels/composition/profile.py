"""Epsilon at a delta, and delta at an epsilon, of any event."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import dp_accounting
from dp_accounting import NeighboringRelation

from dpkernels import _validate
from dpkernels.composition import losses, renyi
from dpkernels.composition.events import Counts, counted, is_without_noise

_DELTA_HINT = "Choose it well below one over the number of examples."
_EPSILON_HINT = "0.1 to 10 is usual."


class Accountant(NamedTuple):
    """What an accountant can do, given counted events.

    Attributes:
        name: `"pld"` or `"rdp"`.
        supports: Whether it knows what a single event spends under a relation.
        epsilon_at: The epsilon of events with noise, under a relation and at a delta.
        delta_at: Their delta at an epsilon.
    """

    name: str
    supports: Callable[[dp_accounting.DpEvent, NeighboringRelation], bool]
    epsilon_at: Callable[[Counts, NeighboringRelation, float], float]
    delta_at: Callable[[Counts, NeighboringRelation, float], float]


def epsilon_of_event(
    dp_event: dp_accounting.DpEvent,
    delta: float,
    *,
    accountant: str | Accountant = "pld",
    neighboring_relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
) -> float:
    """Returns the epsilon that an event spends at `delta`.

    An event is read as the accountant of that name in dp_accounting reads it. Beware of one
    difference between the two. With noise of standard deviation s on a sum of gradients of norm
    at most C, a `GaussianDpEvent` holds the noise multiplier

    | relation | `"pld"` | `"rdp"` |
    |---|---|---|
    | ADD_OR_REMOVE_ONE, REPLACE_SPECIAL | s / C | s / C |
    | REPLACE_ONE | s / C | s / (2 C) |

    also where it stands in another event. Under REPLACE_ONE an event that was written for one
    accountant must not be handed to the other: `"rdp"` would state too little.

    What is supported:

    | event | `"pld"` | `"rdp"` |
    |---|---|---|
    | `GaussianDpEvent` | all relations | all relations |
    | Gaussians in `PoissonSampledDpEvent` | all relations | not REPLACE_ONE |
    | `TruncatedSubsampledGaussianDpEvent` | all relations | no |
    | Gaussians in `SampledWithoutReplacementDpEvent` | REPLACE_ONE | REPLACE_ONE |
    | `MixtureOfGaussiansDpEvent` | not REPLACE_ONE | no |
    | Laplace, randomised response | as dp_accounting | as dp_accounting |
    | `ZCDpEvent`, trees, repeat-and-select | no | as dp_accounting |

    and compositions of these. The `dataset_size` of a truncated event is that of the larger of two
    neighbouring datasets.

    Args:
        dp_event: What was released.
        delta: The delta of (epsilon, delta)-differential privacy, in (0, 1).
        accountant: `"pld"` composes privacy loss distributions, `"rdp"` Rényi divergences, which
            is looser; or `pld_accountant` or `rdp_accountant` with settings of one's own.
        neighboring_relation: Which datasets are neighbours.

    Returns:
        The epsilon; 0.0 where nothing was released and `math.inf` where something was released
        without noise, or no finite epsilon can be computed.

    Raises:
        ValueError: If the accountant does not support the event under this relation, a parameter
            is outside its range, or `delta` is too small for the arithmetic.
        TypeError: If `dp_event` is no event or `delta` no number.

    Guarantees:
        * The result is never below the epsilon of the event's worst neighbours.
        * `delta_of_event` at the result is at most `delta`.
        * Where doubles cannot hold the privacy loss distribution (an epsilon above 700, more
          than 2**20 releases, a delta below their rounding), `"pld"` gives what `"rdp"` gives
          if that supports the event with the same meaning, and otherwise infinity or an error.

    Source:
        Koskela, Jälkö and Honkela 2020; Doroshenko et al. 2022, Algorithm 1; Mironov 2017.
    """
    delta = _validate.open_unit("delta", delta, _DELTA_HINT)
    methods = _named(accountant)
    counts = _supported(dp_event, methods, neighboring_relation)
    if not counts:
        return 0.0
    if any(map(is_without_noise, counts)):
        return float("inf")
    return methods.epsilon_at(counts, neighboring_relation, delta)


def delta_of_event(
    dp_event: dp_accounting.DpEvent,
    epsilon: float,
    *,
    accountant: str | Accountant = "pld",
    neighboring_relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
) -> float:
    """Returns the delta that an event spends at `epsilon`.

    How events are read, and which are supported, is described in `epsilon_of_event`.

    Args:
        dp_event: What was released.
        epsilon: The epsilon of (epsilon, delta)-differential privacy, 0 or more.
        accountant: As in `epsilon_of_event`.
        neighboring_relation: Which datasets are neighbours.

    Returns:
        The delta, in [0, 1]; 0.0 where nothing was released and 1.0 where something was released
        without noise, or no smaller delta can be computed.

    Raises:
        ValueError: If the accountant does not support the event under this relation, or a
            parameter is outside its range.
        TypeError: If `dp_event` is no event or `epsilon` no number.

    Guarantees:
        * The result is never below the delta of the event's worst neighbours.
        * It does not grow with `epsilon`, up to a relative 1e-3.
    """
    epsilon = _validate.non_negative("epsilon", epsilon, _EPSILON_HINT)
    methods = _named(accountant)
    counts = _supported(dp_event, methods, neighboring_relation)
    if not counts:
        return 0.0
    if any(map(is_without_noise, counts)):
        return 1.0
    return min(max(methods.delta_at(counts, neighboring_relation, epsilon), 0.0), 1.0)


# -- what is supported ----------------------------------------------------------------------


def _named(accountant: str | Accountant) -> Accountant:
    if isinstance(accountant, Accountant):
        return accountant
    return _ACCOUNTANTS[_validate.one_of("accountant", accountant, _ACCOUNTANTS)]


def _supported(
    dp_event: dp_accounting.DpEvent, accountant: Accountant, relation: NeighboringRelation
) -> Counts:
    """Returns the single events of a nested one, after checking each against the accountant."""
    if not isinstance(relation, NeighboringRelation):
        listed = ", ".join(relation.name for relation in NeighboringRelation)
        raise TypeError(
            f"`neighboring_relation` must be a dp_accounting.NeighboringRelation, got "
            f"{relation!r}. Choose one of {listed}."
        )
    counts = counted(dp_event)
    for event in counts:
        if not accountant.supports(event, relation):
            raise ValueError(
                f"`dp_event` must be supported by accountant {accountant.name!r} under "
                f"{relation.name}, got {event}. {_instead(event)}"
            )
    return counts


def _instead(event: dp_accounting.DpEvent) -> str:
    others = [
        f"{name!r} under {relation.name}"
        for name, relation in itertools.product(_ACCOUNTANTS, NeighboringRelation)
        if _ACCOUNTANTS[name].supports(event, relation)
    ]
    if not others:
        return "No accountant here does: use Poisson sampling and Gaussian noise."
    return f"Supported: {', '.join(others)}. Choose one of these, or Poisson sampling."


# -- the accountants ------------------------------------------------------------------------


def rdp_accountant(orders: Sequence[float] = ()) -> Accountant:
    """Returns the accountant `"rdp"`, with chosen orders.

    Args:
        orders: Orders above 1 of the divergences to compute. By default those that fit.

    Raises:
        ValueError: If an order is not above 1.
        TypeError: If an order is no number.
    """
    hint = "Choose orders such as 2, 8 and 64."
    chosen = tuple(_validate.positive("orders", order, hint) for order in orders)
    if any(order <= 1 for order in chosen):
        raise ValueError(f"`orders` must be above 1, got {min(chosen)}. {hint}")

    def epsilon_at(counts: Counts, relation: NeighboringRelation, delta: float) -> float:
        scale = losses.second_divergence(counts, relation)
        return renyi.curve_at_delta(counts, relation, delta, scale, chosen).epsilon_within(delta)

    def delta_at(counts: Counts, relation: NeighboringRelation, epsilon: float) -> float:
        scale = losses.second_divergence(counts, relation)
        curve = renyi.curve_at_epsilon(counts, relation, epsilon, scale, chosen)
        return float(curve.delta_at(epsilon))

    return Accountant("rdp", renyi.supports, epsilon_at, delta_at)


_RDP = rdp_accountant()


def pld_accountant(interval: float | None = None) -> Accountant:
    """Returns the accountant `"pld"`, with a chosen grid of privacy losses.

    Args:
        interval: Width of the grid; a wider one overstates epsilon, and where a grid would have
            more than a million points a wider one is taken. By default one that fits.

    Raises:
        ValueError: If `interval` is not positive and finite.
        TypeError: If `interval` is no number.
    """
    if interval is not None:
        interval = _validate.positive("interval", interval, "1e-4 is usual.")

    def epsilon_at(counts: Counts, relation: NeighboringRelation, delta: float) -> float:
        curve = losses.curve(counts, relation, interval)
        is_resolved = 2 * curve.rounding <= delta
        if is_resolved and not curve.reason:
            epsilon = curve.epsilon_within(delta)
            if epsilon <= losses.MAX_EPSILON or curve.rounding == 0:
                return epsilon
        if _means_the_same_to_rdp(counts, relation):
            return _RDP.epsilon_at(counts, relation, delta)
        if not is_resolved:
            raise ValueError(
                f"`delta` must be at least {2 * curve.rounding:.3g} for accountant 'pld' and this "
                f"event, got {delta!r}. Choose a larger delta."
            )
        return float("inf")

    def delta_at(counts: Counts, relation: NeighboringRelation, epsilon: float) -> float:
        curve = losses.curve(counts, relation, interval)
        delta = 1.0 if curve.reason else curve.delta_at(epsilon)
        is_resolved = delta > 16 * curve.rounding and epsilon <= losses.MAX_EPSILON
        if (curve.reason or not is_resolved) and _means_the_same_to_rdp(counts, relation):
            delta = min(delta, _RDP.delta_at(counts, relation, epsilon))
        return delta

    return Accountant("pld", losses.supports, epsilon_at, delta_at)


def _means_the_same_to_rdp(counts: Counts, relation: NeighboringRelation) -> bool:
    """Returns whether Rényi divergences may stand in: not under REPLACE_ONE, see above."""
    return relation is not NeighboringRelation.REPLACE_ONE and all(
        renyi.supports(event, relation) for event in counts
    )


_ACCOUNTANTS = {"pld": pld_accountant(), "rdp": _RDP}

ACCOUNTANTS = tuple(_ACCOUNTANTS)
