"""What fits a budget, by any training accountant; with the names of JAX Privacy 1.0.

Example:
    >>> from dpbridge.accounting import accountants, analysis
    >>> accountant = analysis.DpsgdTrainingAccountant(accountants.RdpAccountantConfig())
    >>> calibrate_batch_size(
    ...     target_epsilon=2.0, accountant=accountant, noise_multipliers=2.0, num_updates=100,
    ...     num_samples=1000, target_delta=1e-5)
    78

Where JAX Privacy may end a little above the target, these never do.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from dpbridge.accounting.analysis import DpParams, SamplingMethod, TrainingAccountant
from dpkernels import _validate, composition

_EPSILON_HINT = "0.1 to 10 is usual."


def calibrate_noise_multiplier(
    *,
    target_epsilon: float,
    accountant: TrainingAccountant,
    batch_sizes: int | Sequence[tuple[int, int]],
    num_updates: int,
    num_samples: int,
    target_delta: float,
    examples_per_user: int | None = None,
    cycle_length: int | None = None,
    truncated_batch_size: int | None = None,
    sampling_method: SamplingMethod = SamplingMethod.POISSON,
) -> float:
    """Returns the noise multiplier with which a run spends at most `target_epsilon`.

    For the arguments see `analysis.DpParams`.

    Raises:
        ValueError: If an argument is outside its range, or no noise multiplier up to 2**40
            reaches the target.

    Guarantees:
        * The accountant's epsilon for the result is never above `target_epsilon`.
    """
    target_epsilon = _validate.positive("target_epsilon", target_epsilon, _EPSILON_HINT)
    _require_calibration(accountant.can_calibrate_noise_multipliers(), accountant, "noise")
    params = DpParams(
        noise_multipliers=1.0,
        num_samples=num_samples,
        delta=target_delta,
        batch_size=batch_sizes,
        examples_per_user=examples_per_user,
        cycle_length=cycle_length,
        truncated_batch_size=truncated_batch_size,
        sampling_method=sampling_method,
    )

    def spent(noise_multiplier: float) -> float:
        changed = dataclasses.replace(params, noise_multipliers=noise_multiplier)
        return accountant.compute_epsilon(num_updates, changed)

    return composition.smallest_within(spent, target_epsilon)


def calibrate_num_updates(
    *,
    target_epsilon: float,
    accountant: TrainingAccountant,
    noise_multipliers: float | Sequence[tuple[int, float]],
    batch_sizes: int | Sequence[tuple[int, int]],
    num_samples: int,
    target_delta: float,
    examples_per_user: int | None = None,
    cycle_length: int | None = None,
    truncated_batch_size: int | None = None,
    sampling_method: SamplingMethod = SamplingMethod.POISSON,
) -> int:
    """Returns the largest number of updates that spend at most `target_epsilon`.

    For the arguments see `analysis.DpParams`. With `cycle_length` it is a multiple of it.

    Raises:
        ValueError: If an argument is outside its range, or one update spends more.

    Guarantees:
        * The accountant's epsilon for the result is never above `target_epsilon`.
        * One update more would spend more.
    """
    target_epsilon = _validate.positive("target_epsilon", target_epsilon, _EPSILON_HINT)
    _require_calibration(accountant.can_calibrate_steps(), accountant, "the number of updates")
    params = DpParams(
        noise_multipliers=noise_multipliers,
        num_samples=num_samples,
        delta=target_delta,
        batch_size=batch_sizes,
        examples_per_user=examples_per_user,
        cycle_length=cycle_length,
        truncated_batch_size=truncated_batch_size,
        sampling_method=sampling_method,
    )

    def spent(num_updates: int) -> float:
        return accountant.compute_epsilon(num_updates, params)

    count = composition.largest_count(spent, target_epsilon)
    return _reached(count, "one update", target_epsilon, spent(1))


def calibrate_batch_size(
    *,
    target_epsilon: float,
    accountant: TrainingAccountant,
    noise_multipliers: float | Sequence[tuple[int, float]],
    num_updates: int,
    num_samples: int,
    target_delta: float,
    examples_per_user: int | None = None,
    cycle_length: int | None = None,
    truncated_batch_size: int | None = None,
    sampling_method: SamplingMethod = SamplingMethod.POISSON,
) -> int:
    """Returns the largest batch size with which a run spends at most `target_epsilon`.

    For the arguments see `analysis.DpParams`. No size above `num_samples // cycle_length` is tried.

    Raises:
        ValueError: If an argument is outside its range, or batches of one example spend more.

    Guarantees:
        * The accountant's epsilon for the result is never above `target_epsilon`.
        * Batches larger by one would spend more, where there are as many examples.
    """
    target_epsilon = _validate.positive("target_epsilon", target_epsilon, _EPSILON_HINT)
    _require_calibration(accountant.can_calibrate_batch_size(), accountant, "the batch size")
    params = DpParams(
        noise_multipliers=noise_multipliers,
        num_samples=num_samples,
        delta=target_delta,
        batch_size=1,
        examples_per_user=examples_per_user,
        cycle_length=cycle_length,
        truncated_batch_size=truncated_batch_size,
        sampling_method=sampling_method,
    )

    def spent(batch_size: int) -> float:
        changed = dataclasses.replace(params, batch_size=batch_size)
        return accountant.compute_epsilon(num_updates, changed)

    largest = max(num_samples // (cycle_length or 1), 1)
    size = composition.largest_count(spent, target_epsilon, maximum=largest)
    return _reached(size, "batches of one example", target_epsilon, spent(1))


def _reached(count: int, least: str, target_epsilon: float, spent: float) -> int:
    if count == 0:
        raise ValueError(
            f"`target_epsilon` must be what {least} spends or more, got {target_epsilon!r}: that "
            f"is {spent:.6g}. Choose a larger epsilon or more noise."
        )
    return count


def _require_calibration(is_possible: bool, accountant: Any, what: str) -> None:
    if not is_possible:
        raise ValueError(
            f"`accountant` must be one on which {what} has an effect, got "
            f"{type(accountant).__name__}. Calibrate the noise multiplier instead."
        )
