"""Privacy loss distributions of counted events.

Discretised pessimistically (Doroshenko et al. 2022, Algorithm 1) and composed by Fourier
transforms (Koskela et al. 2020); Gaussians on the whole dataset have a closed form (Balle and
Wang 2018, Theorem 8).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import dp_accounting
import numpy as np
from dp_accounting import NeighboringRelation
from dp_accounting import dp_event as events
from dp_accounting.pld import privacy_loss_distribution as pld
from scipy import special

from dpkernels.composition import fixed_size
from dpkernels.composition.curve import Curve
from dpkernels.composition.events import Counts

_INTERVAL = 1e-4
_MIN_INTERVAL = 1e-7
_MAX_INTERVAL = 1.0
_MAX_POINTS = 1e5
_MAX_TOTAL_POINTS = 1e6
_MIN_POINTS = 20
_MAX_STEPS = 2**20
MAX_EPSILON = 700.0  # where exp(-epsilon) leaves the range of doubles


def supports(event: dp_accounting.DpEvent, relation: NeighboringRelation) -> bool:
    """Returns whether there is a privacy loss distribution of the event."""
    if isinstance(event, events.NonPrivateDpEvent):
        return True
    if isinstance(event, events.SampledWithoutReplacementDpEvent):
        is_gaussian = isinstance(event.event, events.GaussianDpEvent)
        return is_gaussian and relation is NeighboringRelation.REPLACE_ONE
    is_known = type(event) in _BUILDERS
    return is_known and dp_accounting.pld.PLDAccountant(relation).supports(event)


def curve(counts: Counts, relation: NeighboringRelation, interval: float | None = None) -> Curve:
    """Returns the epsilons and deltas of all events together.

    Args:
        counts: What was released.
        relation: Which datasets are neighbours.
        interval: Width of the grid of losses; by default one is chosen.
    """
    if len(counts) == 1 and isinstance(event := next(iter(counts)), events.GaussianDpEvent):
        return _gaussian_curve(event.noise_multiplier / _shift(relation))
    asked = interval
    interval, steps = _affordable(counts, relation, interval), sum(counts.values())
    # The FFT's rounding is absolute and grows with the power it takes: measured at about
    # 2**-56 a composition, which would under-report where delta is as small.
    rounding = (steps + 64 * len(counts)) * 2.0**-52
    longest = max(_support(*_scale(event, relation)) for event in counts)
    if steps > _MAX_STEPS:
        return Curve(_nothing, _nothing, rounding, f"at most {_MAX_STEPS} releases")
    if interval > min(_MAX_INTERVAL, longest / _MIN_POINTS) and interval != asked:
        return Curve(_nothing, _nothing, rounding, "more noise")
    with np.errstate(all="ignore"):  # losses beyond 700 overflow, and are not used
        composed = functools.reduce(
            pld.PrivacyLossDistribution.compose,
            (_single(event, interval, relation).self_compose(n) for event, n in counts.items()),
        )

    def epsilon_at(delta: float) -> float:
        with np.errstate(all="ignore"):
            if composed.get_delta_for_epsilon(0.0) <= delta - rounding:
                return 0.0
            return float(composed.get_epsilon_for_delta(delta - rounding))

    def delta_at(epsilon: float) -> float:
        with np.errstate(all="ignore"):
            return float(composed.get_delta_for_epsilon(min(epsilon, MAX_EPSILON))) + rounding

    return Curve(epsilon_at, delta_at, rounding)


def _nothing(value: float) -> float:
    raise AssertionError("a curve with a reason has no values")


def _gaussian_curve(noise_multiplier: float) -> Curve:
    def epsilon_at(delta: float) -> float:
        with np.errstate(divide="ignore"):  # a delta of zero far out, where the search begins
            exact = dp_accounting.get_epsilon_gaussian(noise_multiplier, delta)
        return float(exact) * (1 + 1e-9) + 2e-12 if exact else 0.0  # its search is two-sided

    def delta_at(epsilon: float) -> float:
        beyond = epsilon * noise_multiplier + 0.5 / noise_multiplier
        upper = special.log_ndtr(1 / noise_multiplier - beyond)
        lower = epsilon + special.log_ndtr(-beyond)
        exact = -math.exp(upper) * math.expm1(min(lower - upper, 0.0))
        # Logarithms are off by some units in the last place, absolutely so in what is subtracted.
        return exact + math.exp(upper) * (abs(upper) + abs(lower) + 4) * 2.0**-50

    return Curve(epsilon_at, delta_at, 0.0)


# -- one event ------------------------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def _single(
    event: dp_accounting.DpEvent, interval: float, relation: NeighboringRelation
) -> pld.PrivacyLossDistribution:
    try:
        return _BUILDERS[type(event)](event, interval, relation)
    except ValueError as error:  # what dp_accounting finds out only now
        raise ValueError(
            f"`dp_event` must have privacy losses that doubles can hold, got {event}: {error} "
            "Choose less extreme parameters, or another accountant."
        ) from error


def _gaussian(
    event: Any, interval: float, relation: NeighboringRelation, sampling_prob: float = 1.0
) -> pld.PrivacyLossDistribution:
    return pld.from_gaussian_mechanism(
        event.noise_multiplier,
        sampling_prob=sampling_prob,
        value_discretization_interval=interval,
        neighboring_relation=relation,
    )


def _laplace(
    event: Any, interval: float, relation: NeighboringRelation, sampling_prob: float = 1.0
) -> pld.PrivacyLossDistribution:
    del relation
    return pld.from_laplace_mechanism(
        event.noise_multiplier, value_discretization_interval=interval, sampling_prob=sampling_prob
    )


def _poisson(
    event: Any, interval: float, relation: NeighboringRelation
) -> pld.PrivacyLossDistribution:
    build = _laplace if isinstance(event.event, events.LaplaceDpEvent) else _gaussian
    return build(event.event, interval, relation, event.sampling_probability)


def _truncated(
    event: Any, interval: float, relation: NeighboringRelation
) -> pld.PrivacyLossDistribution:
    return pld.from_truncated_subsampled_gaussian_mechanism(
        dataset_size=event.dataset_size,
        sampling_probability=event.sampling_probability,
        truncated_batch_size=event.truncated_batch_size,
        noise_multiplier=event.noise_multiplier,
        value_discretization_interval=interval,
        neighboring_relation=relation,
    )


def _mixture(
    event: Any, interval: float, relation: NeighboringRelation
) -> pld.PrivacyLossDistribution:
    del relation
    return pld.from_mixture_gaussian_mechanism(
        event.standard_deviation,
        event.sensitivities,
        event.sampling_probs,
        value_discretization_interval=interval,
    )


def _discrete_laplace(
    event: Any, interval: float, relation: NeighboringRelation
) -> pld.PrivacyLossDistribution:
    del relation
    return pld.from_discrete_laplace_mechanism(
        event.noise_parameter, event.sensitivity, value_discretization_interval=interval
    )


def _randomized_response(
    event: Any, interval: float, relation: NeighboringRelation
) -> pld.PrivacyLossDistribution:
    return pld.from_randomized_response(
        event.noise_parameter,
        event.num_buckets,
        value_discretization_interval=interval,
        neighboring_relation=relation,
    )


def _fixed(
    event: Any, interval: float, relation: NeighboringRelation
) -> pld.PrivacyLossDistribution:
    sampled = event.sample_size / event.source_dataset_size
    shift = _shift(relation) / event.event.noise_multiplier
    return fixed_size.loss_distribution(shift, sampled, interval)


_BUILDERS: dict[type, Callable[..., pld.PrivacyLossDistribution]] = {
    events.GaussianDpEvent: _gaussian,
    events.LaplaceDpEvent: _laplace,
    events.DiscreteLaplaceDpEvent: _discrete_laplace,
    events.RandomizedResponseDpEvent: _randomized_response,
    events.PoissonSampledDpEvent: _poisson,
    events.TruncatedSubsampledGaussianDpEvent: _truncated,
    events.MixtureOfGaussiansDpEvent: _mixture,
    events.SampledWithoutReplacementDpEvent: _fixed,
}


# -- the grid -------------------------------------------------------------------------------


def _affordable(counts: Counts, relation: NeighboringRelation, interval: float | None) -> float:
    """Returns the width of the grid on which privacy losses are discretised.

    Any width is pessimistic, so this trades tightness for time only: dp_accounting's default,
    finer where it would be coarse beside the loss of one step, coarser where the number of grid
    points would not fit. A power of two times the default, so that adding a step to a
    composition rarely changes it.
    """
    total = second_divergence(counts, relation)
    supports = [_support(*_scale(event, relation)) for event in counts]
    least = max(
        max(supports) / _MAX_POINTS,
        sum(supports) / _MAX_TOTAL_POINTS,
        (2 * total + 24 * math.sqrt(total)) / _MAX_TOTAL_POINTS,
    )
    if interval is not None and interval >= least:
        return interval
    fine = math.sqrt(total / sum(counts.values())) / 50
    wanted = max(min(fine, _INTERVAL), _MIN_INTERVAL, interval or 0.0, least)
    return _INTERVAL * 2.0 ** math.ceil(math.log2(wanted / _INTERVAL))


def second_divergence(counts: Counts, relation: NeighboringRelation) -> float:
    """Returns the Rényi divergence of order 2 of all events, the scale of what they spend.

    It is exact for Gaussians on the whole dataset and on Poisson samples, and a guess for others.
    """
    return sum(
        n * log_mixture(sampling_prob**2, noise_multiplier**-2)
        for (noise_multiplier, sampling_prob), n in (
            (_scale(event, relation), n) for event, n in counts.items()
        )
    )


def _support(noise_multiplier: float, sampling_prob: float) -> float:
    """Returns the length of the range of one event's privacy loss, up to ten deviations."""
    inverse = 1 / noise_multiplier
    tail = inverse * (0.5 * inverse + 10)
    return log_mixture(sampling_prob, tail) - log_mixture(sampling_prob, -tail)


def _scale(event: dp_accounting.DpEvent, relation: NeighboringRelation) -> tuple[float, float]:
    """Returns the noise multiplier and sampling probability of a Gaussian that is like `event`."""
    shift = _shift(relation)
    if isinstance(event, events.PoissonSampledDpEvent):
        return event.event.noise_multiplier / shift, event.sampling_probability
    if isinstance(event, events.SampledWithoutReplacementDpEvent):
        sampled = event.sample_size / event.source_dataset_size
        return event.event.noise_multiplier / shift, sampled
    if isinstance(event, events.TruncatedSubsampledGaussianDpEvent):
        return event.noise_multiplier / 2, event.sampling_probability
    if isinstance(event, events.MixtureOfGaussiansDpEvent):
        weights = zip(event.sensitivities, event.sampling_probs, strict=True)
        none = math.fsum(weight for shift, weight in weights if shift == 0)
        return event.standard_deviation / max(event.sensitivities), max(1 - none, 1e-12)
    if isinstance(event, events.DiscreteLaplaceDpEvent):
        return 1 / (event.noise_parameter * event.sensitivity), 1.0
    if isinstance(event, events.RandomizedResponseDpEvent):
        share = event.noise_parameter / event.num_buckets
        return 1 / math.log1p((1 - event.noise_parameter) / share), 1.0
    # Of the rest, those that only Rényi divergences know have none; it matters for time alone.
    return getattr(event, "noise_multiplier", 1.0) / shift, 1.0


def _shift(relation: NeighboringRelation) -> float:
    """Returns by how many sensitivities of one example neighbouring sums may differ."""
    return 2.0 if relation is NeighboringRelation.REPLACE_ONE else 1.0


def log_mixture(weight: float, exponent: float) -> float:
    """Returns log(1 - weight + weight * exp(exponent)), without overflow or cancellation."""
    if weight == 1:
        return exponent
    if exponent < 1:
        return math.log1p(weight * math.expm1(exponent))
    return float(np.logaddexp(math.log1p(-weight), math.log(weight) + exponent))
