"""DP-SGD on Poisson samples: what it spends, and what fits a budget.

Example:
    >>> calibrate_num_updates(epsilon=2.0, delta=1e-6, noise_multiplier=3.0, sampling_prob=0.1)
    155
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import dp_accounting

from dpkernels import _validate, composition

_NOISE_HINT = "0 means no noise and no privacy; 0.5 to 10 is usual."
_SAMPLING_HINT = "Pass the expected batch size over the size of the dataset."
_STEPS_HINT = "Pass the number of optimizer steps."
_DELTA_HINT = "Choose it well below one over the number of examples."
_EPSILON_HINT = "0.1 to 10 is usual."


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
    run = _run(noise_multiplier, sampling_prob, steps)
    return composition.epsilon_of_event(run, delta, accountant=accountant)


def compute_delta(
    *,
    noise_multiplier: float,
    sampling_prob: float,
    steps: int,
    epsilon: float,
    accountant: str = "pld",
) -> float:
    """Returns the delta that `steps` steps of DP-SGD spend at `epsilon`.

    Args:
        noise_multiplier: Standard deviation of the noise over the sensitivity, 0 or more.
        sampling_prob: Probability with which each example is in a batch, in (0, 1].
        steps: How many batches are released, 0 or more.
        epsilon: The epsilon of (epsilon, delta)-differential privacy, 0 or more and finite.
        accountant: `"pld"` or `"rdp"`, as in `compute_epsilon`.

    Returns:
        The delta, in [0, 1]; 0.0 for no steps and 1.0 for steps without noise.

    Raises:
        ValueError: If an argument is outside its range, or the accountant is not known.
        TypeError: If a number is not one.

    Guarantees:
        * The result is never below the true delta.
        * At what `compute_epsilon` gives for a delta, it is at most that delta.
    """
    run = _run(noise_multiplier, sampling_prob, steps)
    return composition.delta_of_event(run, epsilon, accountant=accountant)


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
    run = dp_accounting.ComposedDpEvent(
        [
            dp_accounting.SelfComposedDpEvent(event.to_dp_event(), count)
            for event, count in counted_events
        ]
    )
    return composition.epsilon_of_event(run, delta, accountant=accountant)


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
    epsilon, delta = _checked_target(epsilon, delta, accountant)
    run = _run(0.0, sampling_prob, steps)
    if steps == 0:
        return 0.0
    # What the Gaussian mechanism needs (Dwork and Roth 2014, Appendix A), were the steps one
    # Gaussian with the sum of their variances.
    guess = sampling_prob * math.sqrt(2 * steps * math.log(1.25 / delta)) / epsilon
    return composition.smallest_noise_multiplier(
        lambda noise_multiplier: _run(noise_multiplier, sampling_prob, run.count),
        epsilon=epsilon,
        delta=delta,
        accountant=accountant,
        guess=guess,
    )


def calibrate_num_updates(
    *,
    epsilon: float,
    delta: float,
    noise_multiplier: float,
    sampling_prob: float,
    accountant: str = "pld",
) -> int:
    """Returns the largest number of steps that spend at most `epsilon`.

    Args:
        epsilon: The epsilon that may be spent, positive and finite.
        delta: The delta of (epsilon, delta)-differential privacy, in (0, 1).
        noise_multiplier: Standard deviation of the noise over the sensitivity, 0 or more.
        sampling_prob: Probability with which each example is in a batch, in (0, 1].
        accountant: `"pld"` or `"rdp"`.

    Returns:
        The number of steps, at least 1; 2**40 where even so many stay within.

    Raises:
        ValueError: If an argument is outside its range, the accountant is not known, or one
            step spends more than `epsilon`.
        TypeError: If a number is not one.

    Guarantees:
        * `compute_epsilon` with the result is never above `epsilon`.
        * One step more would spend more than `epsilon`.
    """
    epsilon, delta = _checked_target(epsilon, delta, accountant)
    _run(noise_multiplier, sampling_prob, 1)

    def spent(steps: int) -> float:
        run = _run(noise_multiplier, sampling_prob, steps)
        return composition.epsilon_of_event(run, delta, accountant=accountant)

    at_once = (epsilon * noise_multiplier / sampling_prob) ** 2 / (2 * math.log(1.25 / delta))
    steps = composition.largest_count(spent, epsilon, guess=int(min(at_once, 2.0**20)))
    if steps == 0:
        raise ValueError(
            f"`epsilon` must be what one update spends or more, got {epsilon!r}: one spends "
            f"{spent(1):.6g}. Choose a larger epsilon, more noise or smaller batches."
        )
    return steps


def calibrate_batch_size(
    *,
    epsilon: float,
    delta: float,
    noise_multiplier: float,
    num_examples: int,
    steps: int,
    accountant: str = "pld",
) -> int:
    """Returns the largest expected batch size with which `steps` steps spend at most `epsilon`.

    Args:
        epsilon: The epsilon that may be spent, positive and finite.
        delta: The delta of (epsilon, delta)-differential privacy, in (0, 1).
        noise_multiplier: Standard deviation of the noise over the sensitivity, 0 or more.
        num_examples: How many examples there are, 1 or more. Each is in a batch with a
            probability of the batch size over this.
        steps: How many batches are released, 0 or more.
        accountant: `"pld"` or `"rdp"`.

    Returns:
        The expected batch size, from 1 to `num_examples`.

    Raises:
        ValueError: If an argument is outside its range, the accountant is not known, or batches
            of one example spend more than `epsilon`.
        TypeError: If a number is not one.

    Guarantees:
        * `compute_epsilon` with the result over `num_examples` is never above `epsilon`.
        * Batches larger by one would spend more than `epsilon`, where there are as many examples.
    """
    epsilon, delta = _checked_target(epsilon, delta, accountant)
    hint = "Pass the size of the dataset."
    num_examples = _validate.integer("num_examples", num_examples, hint, minimum=1)
    _run(noise_multiplier, 1.0, steps)

    def spent(batch_size: int) -> float:
        run = _run(noise_multiplier, batch_size / num_examples, steps)
        return composition.epsilon_of_event(run, delta, accountant=accountant)

    scale = math.sqrt(2 * max(steps, 1) * math.log(1.25 / delta))
    guess = int(min(epsilon * noise_multiplier / scale, 1.0) * num_examples)
    size = composition.largest_count(spent, epsilon, maximum=num_examples, guess=guess)
    if size == 0:
        raise ValueError(
            f"`epsilon` must be what batches of one example spend or more, got {epsilon!r}: they "
            f"spend {spent(1):.6g}. Choose a larger epsilon, more noise or fewer steps."
        )
    return size


def _run(noise_multiplier: float, sampling_prob: float, steps: int) -> dp_accounting.DpEvent:
    event = Event(
        _validate.non_negative("noise_multiplier", noise_multiplier, _NOISE_HINT),
        _validate.probability("sampling_prob", sampling_prob, _SAMPLING_HINT),
    )
    steps = _validate.integer("steps", steps, _STEPS_HINT, minimum=0)
    return dp_accounting.SelfComposedDpEvent(event.to_dp_event(), steps)


def _checked_target(epsilon: float, delta: float, accountant: str) -> tuple[float, float]:
    _validate.one_of("accountant", accountant, composition.ACCOUNTANTS)
    return (
        _validate.positive("epsilon", epsilon, _EPSILON_HINT),
        _validate.open_unit("delta", delta, _DELTA_HINT),
    )
