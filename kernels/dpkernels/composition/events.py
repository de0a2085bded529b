"""From nested events to counts of single ones."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import dp_accounting
from dp_accounting import dp_event as events

from dpkernels import _validate

Counts = Counter[dp_accounting.DpEvent]

_MAX_NOISE = 2.0**40
_MIN_SAMPLING_PROB = 2.0**-40
_MIN_RESOLVABLE_NOISE = 1e-100  # its inverse square is far from overflow
_EVENT_HINT = "Pass the parameters of the mechanism that was run."


def counted(event: dp_accounting.DpEvent) -> Counts:
    """Returns how often each single event occurs in a nested one.

    Compositions are taken apart. Gaussians released on one batch become the one Gaussian that is
    their composition, and so do those on the whole dataset. What has no effect is left out.

    Raises:
        ValueError: If a parameter is outside its range.
        TypeError: If `event` is no event, or a parameter no number.
    """
    if not isinstance(event, dp_accounting.DpEvent):
        raise TypeError(
            f"`dp_event` must be a dp_accounting.DpEvent, got {event!r}. "
            "Build one with dpkernels.accounting or dp_accounting."
        )
    counts: Counts = Counter()
    _count(event, 1, counts)
    return _merged(+counts)  # without those that were released no times


def _count(event: dp_accounting.DpEvent, count: int, counts: Counts) -> None:
    if isinstance(event, events.ComposedDpEvent):
        for part in event.events:
            _count(part, count, counts)
    elif isinstance(event, events.SelfComposedDpEvent):
        hint = "Pass how often the event was released."
        times = _validate.integer("SelfComposedDpEvent.count", event.count, hint, minimum=0)
        _count(event.event, count * times, counts)
    else:
        single = _SIMPLIFIED.get(type(event), _checked)(event)
        if not isinstance(single, events.NoOpDpEvent):
            counts[single] += count


# -- single events --------------------------------------------------------------------------


def gaussian(noise_multiplier: float) -> dp_accounting.DpEvent:
    """Returns a Gaussian that doubles can resolve and that spends no less."""
    return events.GaussianDpEvent(min(noise_multiplier, _MAX_NOISE))


def sampled_gaussian(noise_multiplier: float, sampling_prob: float) -> dp_accounting.DpEvent:
    """Returns a Gaussian on a Poisson sample that doubles can resolve and that spends no less."""
    if sampling_prob == 0:
        return events.NoOpDpEvent()
    if sampling_prob == 1:
        return gaussian(noise_multiplier)
    return events.PoissonSampledDpEvent(
        max(sampling_prob, _MIN_SAMPLING_PROB), gaussian(noise_multiplier)
    )


def is_without_noise(event: dp_accounting.DpEvent) -> bool:
    """Returns whether an event releases something as it is, up to what doubles can resolve."""
    if isinstance(event, events.NonPrivateDpEvent):
        return True
    if isinstance(event, events.ZCDpEvent):
        return math.isinf(event.rho) or math.isinf(event.xi)
    inner = getattr(event, "event", event)
    fields = ("noise_multiplier", "standard_deviation", "noise_parameter")
    noises = [getattr(inner, field) for field in fields if hasattr(inner, field)]
    return any(noise < _MIN_RESOLVABLE_NOISE for noise in noises)


def _merged(counts: Counts) -> Counts:
    """Replaces all Gaussians on the whole dataset by the one that is their composition."""
    whole = {e: n for e, n in counts.items() if isinstance(e, events.GaussianDpEvent)}
    noise_multiplier = _composed_noise(whole)
    if noise_multiplier is None:
        return counts
    rest: Counts = Counter({e: n for e, n in counts.items() if e not in whole})
    rest[gaussian(noise_multiplier)] = 1
    return rest


def _composed_noise(counts: dict[dp_accounting.DpEvent, int] | Counts) -> float | None:
    """Returns the noise multiplier of many Gaussians together; None if there are others, or none.

    Their inverse squares add up (Dong, Roth and Su 2022, section 3).
    """
    if not counts or not all(isinstance(event, events.GaussianDpEvent) for event in counts):
        return None
    if min(event.noise_multiplier for event in counts) < _MIN_RESOLVABLE_NOISE:
        return 0.0
    return sum(n / event.noise_multiplier**2 for event, n in counts.items()) ** -0.5


def _simplified_gaussian(event: events.GaussianDpEvent) -> dp_accounting.DpEvent:
    return gaussian(_noise(event, "noise_multiplier"))


def _simplified_poisson(event: events.PoissonSampledDpEvent) -> dp_accounting.DpEvent:
    sampling_prob = _probability(event, "sampling_probability")
    inner = counted(event.event)
    if not inner or sampling_prob == 0:
        return events.NoOpDpEvent()
    noise_multiplier = _composed_noise(inner)
    if noise_multiplier is not None:
        return sampled_gaussian(noise_multiplier, sampling_prob)
    return events.PoissonSampledDpEvent(sampling_prob, _as_event(inner))


def _simplified_fixed(event: events.SampledWithoutReplacementDpEvent) -> dp_accounting.DpEvent:
    total = _size(event, "source_dataset_size")
    size = _size(event, "sample_size")
    if size > total:
        raise ValueError(
            f"`sample_size` must be at most source_dataset_size={total}, got {size}. {_EVENT_HINT}"
        )
    inner = counted(event.event)
    if not inner or size == 0:
        return events.NoOpDpEvent()
    noise_multiplier = _composed_noise(inner)
    if noise_multiplier is not None:
        inner = Counter([gaussian(noise_multiplier)])
    return events.SampledWithoutReplacementDpEvent(total, size, _as_event(inner))


def _simplified_truncated(
    event: events.TruncatedSubsampledGaussianDpEvent,
) -> dp_accounting.DpEvent:
    total = _size(event, "dataset_size")
    sampling_prob = _probability(event, "sampling_probability")
    size = _size(event, "truncated_batch_size")
    if total == 0 or size == 0 or sampling_prob == 0:
        return events.NoOpDpEvent()
    noise_multiplier = min(_noise(event, "noise_multiplier"), _MAX_NOISE)
    if size >= total:
        return sampled_gaussian(noise_multiplier, sampling_prob)
    return events.TruncatedSubsampledGaussianDpEvent(total, sampling_prob, size, noise_multiplier)


def _simplified_mixture(event: events.MixtureOfGaussiansDpEvent) -> dp_accounting.DpEvent:
    stddev = _noise(event, "standard_deviation")
    shifts, weights = tuple(event.sensitivities), tuple(event.sampling_probs)
    if len(shifts) != len(weights) or abs(math.fsum(weights) - 1) > 1e-6:
        raise ValueError(
            "`sampling_probs` must be as many as `sensitivities` and sum to 1, got "
            f"{weights} for {shifts}. {_EVENT_HINT}"
        )
    for shift, weight in zip(shifts, weights, strict=True):
        _validate.non_negative("sensitivities", shift, _EVENT_HINT)
        _validate.non_negative("sampling_probs", weight, _EVENT_HINT)
    if not any(shift > 0 and weight > 0 for shift, weight in zip(shifts, weights, strict=True)):
        return events.NoOpDpEvent()
    return events.MixtureOfGaussiansDpEvent(stddev, shifts, weights)


def _simplified_replacing(event: events.SampledWithReplacementDpEvent) -> dp_accounting.DpEvent:
    inner = _as_event(counted(event.event))
    return events.SampledWithReplacementDpEvent(event.source_dataset_size, event.sample_size, inner)


def _simplified_repeat(event: events.RepeatAndSelectDpEvent) -> dp_accounting.DpEvent:
    return events.RepeatAndSelectDpEvent(_as_event(counted(event.event)), event.mean, event.shape)


def _simplified_response(event: events.RandomizedResponseDpEvent) -> dp_accounting.DpEvent:
    name = "RandomizedResponseDpEvent"
    buckets = _validate.integer(f"{name}.num_buckets", event.num_buckets, _EVENT_HINT, minimum=1)
    noise = _noise(event, "noise_parameter")
    if noise > 1:
        raise ValueError(f"`{name}.noise_parameter` must be at most 1, got {noise}. {_EVENT_HINT}")
    if noise == 1 or buckets == 1:
        return events.NoOpDpEvent()  # the answer does not depend on the data
    return events.RandomizedResponseDpEvent(noise, buckets)


def _simplified_discrete(event: events.DiscreteLaplaceDpEvent) -> dp_accounting.DpEvent:
    noise, sensitivity = _noise(event, "noise_parameter"), _size(event, "sensitivity")
    if sensitivity == 0:
        return events.NoOpDpEvent()
    return events.DiscreteLaplaceDpEvent(noise, sensitivity)


def _checked(event: dp_accounting.DpEvent) -> dp_accounting.DpEvent:
    if hasattr(event, "noise_multiplier"):
        _noise(event, "noise_multiplier")
    if isinstance(event, events.SingleEpochTreeAggregationDpEvent):
        counts = event.step_counts
        counts = tuple(counts) if isinstance(counts, list | tuple) else counts
        return events.SingleEpochTreeAggregationDpEvent(event.noise_multiplier, counts)
    return event


def _as_event(counts: Counts) -> dp_accounting.DpEvent:
    if list(counts.values()) == [1]:
        return next(iter(counts))
    # A tuple: events are keys of a dictionary, and lists cannot be.
    return events.ComposedDpEvent(
        tuple(events.SelfComposedDpEvent(event, count) for event, count in counts.items())
    )


def _noise(event: dp_accounting.DpEvent, name: str) -> float:
    value = getattr(event, name)
    return _validate.non_negative(f"{type(event).__name__}.{name}", value, _EVENT_HINT)


def _size(event: dp_accounting.DpEvent, name: str) -> int:
    value = getattr(event, name)
    return _validate.integer(f"{type(event).__name__}.{name}", value, _EVENT_HINT, minimum=0)


def _probability(event: dp_accounting.DpEvent, name: str) -> float:
    value = getattr(event, name)
    if value == 0:
        return 0.0
    return _validate.probability(f"{type(event).__name__}.{name}", value, _EVENT_HINT)


_SIMPLIFIED: dict[type, Callable[[Any], dp_accounting.DpEvent]] = {
    events.GaussianDpEvent: _simplified_gaussian,
    events.PoissonSampledDpEvent: _simplified_poisson,
    events.SampledWithoutReplacementDpEvent: _simplified_fixed,
    events.SampledWithReplacementDpEvent: _simplified_replacing,
    events.RandomizedResponseDpEvent: _simplified_response,
    events.DiscreteLaplaceDpEvent: _simplified_discrete,
    events.RepeatAndSelectDpEvent: _simplified_repeat,
    events.TruncatedSubsampledGaussianDpEvent: _simplified_truncated,
    events.MixtureOfGaussiansDpEvent: _simplified_mixture,
}
