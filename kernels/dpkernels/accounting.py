"""What a mechanism releases, in the words of dp_accounting: builders of its events.

An event says what happened, not what it costs: `dpkernels.composition` turns events into epsilons.

The noise multiplier of an event under REPLACE_ONE means different things to different accountants
of dp_accounting: the PLD accountant reads the standard deviation over the clip norm, the RDP
accountant the standard deviation over twice the clip norm. Configs of `dpkernels.execution_plan`
build the event of the accountant that they are asked for.

Example:
    >>> event = dpsgd_event(1.1, 100, sampling_prob=0.01)
    >>> event.count, event.event.sampling_probability
    (100, 0.01)
"""

import math

import dp_accounting

from dpkernels import _validate

_NOISE_HINT = "Pass the standard deviation of the noise over the sensitivity."
_ITERATIONS_HINT = "Pass the number of noised sums that are released."
_SAMPLING_HINT = "Pass the probability with which each example is in a batch."
_BATCH_HINT = "Pass the number of examples in each batch."
_SIZE_HINT = "Pass the number of examples in the dataset."


def dpsgd_event(
    noise_multiplier: float,
    iterations: int,
    *,
    sampling_prob: float,
    use_zcdp: bool = False,
) -> dp_accounting.DpEvent:
    """Returns the event of DP-SGD on Poisson-subsampled batches.

    Args:
        noise_multiplier: Standard deviation of the noise over the sensitivity, 0 or more.
        iterations: How many batches are released, 0 or more.
        sampling_prob: Probability with which each example is in each batch, in [0, 1].
        use_zcdp: Whether to describe the noise by zero-concentrated differential privacy, as
            discrete Gaussian noise needs; RDP accountants only.

    Raises:
        TypeError: If a number is not one.
        ValueError: If an argument is out of range.

    Source:
        Abadi et al. 2016, algorithm 1; zCDP: Bun and Steinke 2016, proposition 1.6.
    """
    sampling_prob = _share("sampling_prob", sampling_prob)
    sampled = dp_accounting.PoissonSampledDpEvent(sampling_prob, _noise(noise_multiplier, use_zcdp))
    return dp_accounting.SelfComposedDpEvent(sampled, _count(iterations))


def fixed_dpsgd_event(
    noise_multiplier: float,
    iterations: int,
    *,
    dataset_size: int,
    batch_size: int,
    replace: bool = False,
    use_zcdp: bool = False,
) -> dp_accounting.DpEvent:
    """Returns the event of DP-SGD on batches of a fixed size, drawn uniformly and independently.

    Without replacement the RDP accountant under REPLACE_ONE gives an epsilon, and so does
    `dpkernels.composition`, by RDP or PLD; with replacement nothing does.

    Args:
        noise_multiplier: Standard deviation of the noise over the sensitivity, 0 or more.
        iterations: How many batches are released, 0 or more.
        dataset_size: How many examples there are.
        batch_size: How many of them are in each batch.
        replace: Whether an example can be in a batch several times.
        use_zcdp: As in `dpsgd_event`.

    Raises:
        TypeError: If a number is not one.
        ValueError: If an argument is out of range, or a batch larger than the dataset.

    Source:
        Wang, Balle and Kasiviswanathan 2019, arXiv 1808.00087; Balle, Barthe and Gaboardi 2018,
        arXiv 1807.01647.
    """
    noise, iterations = _noise(noise_multiplier, use_zcdp), _count(iterations)
    dataset_size = _validate.integer("dataset_size", dataset_size, _SIZE_HINT, minimum=0)
    batch_size = _validate.integer("batch_size", batch_size, _BATCH_HINT, minimum=0)
    if batch_size and (dataset_size == 0 or (not replace and batch_size > dataset_size)):
        raise ValueError(
            f"`batch_size` must be at most `dataset_size`, got {batch_size} of {dataset_size}. "
            "Draw smaller batches."
        )
    kind = (
        dp_accounting.SampledWithReplacementDpEvent
        if replace
        else dp_accounting.SampledWithoutReplacementDpEvent
    )
    return dp_accounting.SelfComposedDpEvent(kind(dataset_size, batch_size, noise), iterations)


def truncated_dpsgd_event(
    noise_multiplier: float,
    iterations: int,
    *,
    sampling_prob: float,
    num_examples: int,
    truncated_batch_size: int,
) -> dp_accounting.DpEvent:
    """Returns the event of DP-SGD on Poisson-subsampled batches that are cut to a largest size.

    PLD accountants only, under REPLACE_SPECIAL (zero-out) and REPLACE_ONE.

    Args:
        noise_multiplier: Standard deviation of the noise over the sensitivity, 0 or more.
        iterations: How many batches are released, 0 or more.
        sampling_prob: Probability with which each example is in a draw, in [0, 1].
        num_examples: How many examples there are.
        truncated_batch_size: How many examples of a draw are kept at most, chosen uniformly.

    Raises:
        TypeError: If a number is not one.
        ValueError: If an argument is out of range.

    Source:
        arXiv 2508.15089.
    """
    event = dp_accounting.dp_event.TruncatedSubsampledGaussianDpEvent(
        dataset_size=_validate.integer("num_examples", num_examples, _SIZE_HINT, minimum=0),
        sampling_probability=_share("sampling_prob", sampling_prob),
        truncated_batch_size=_validate.integer(
            "truncated_batch_size", truncated_batch_size, _BATCH_HINT, minimum=0
        ),
        noise_multiplier=_validate.non_negative("noise_multiplier", noise_multiplier, _NOISE_HINT),
    )
    return dp_accounting.SelfComposedDpEvent(event, _count(iterations))


def amplified_bandmf_event(
    noise_multiplier: float,
    iterations: int,
    *,
    num_bands: int,
    sampling_prob: float,
    use_zcdp: bool = False,
) -> dp_accounting.DpEvent:
    """Returns the event of banded matrix factorization on cyclic Poisson-subsampled batches.

    The examples are split into `num_bands` groups that take turns, so that one example takes part
    in at most every `num_bands`-th iteration: one round of DP-SGD for each turn.

    Args:
        noise_multiplier: Standard deviation of the noise over the sensitivity times the largest
            column norm of the strategy matrix, 0 or more.
        iterations: How many batches are released, 0 or more.
        num_bands: Bands of the strategy matrix, at least 1.
        sampling_prob: Probability with which each example of a group is in the group's batch.
        use_zcdp: As in `dpsgd_event`.

    Raises:
        TypeError: If a number is not one.
        ValueError: If an argument is out of range.

    Source:
        Choquette-Choo et al. 2023, "(Amplified) banded matrix factorization", arXiv 2306.08153.
    """
    return dpsgd_event(
        noise_multiplier,
        _rounds(iterations, num_bands),
        sampling_prob=sampling_prob,
        use_zcdp=use_zcdp,
    )


def truncated_amplified_bandmf_event(
    noise_multiplier: float,
    iterations: int,
    *,
    num_bands: int,
    sampling_prob: float,
    largest_group_size: int,
    truncated_batch_size: int,
) -> dp_accounting.DpEvent:
    """Returns the event of `amplified_bandmf_event` on batches that are cut to a largest size.

    Args:
        noise_multiplier: As in `amplified_bandmf_event`.
        iterations: How many batches are released, 0 or more.
        num_bands: Bands of the strategy matrix, at least 1.
        sampling_prob: Probability with which each example of a group is in the group's draw.
        largest_group_size: How many examples the largest group has.
        truncated_batch_size: How many examples of a draw are kept at most.

    Raises:
        TypeError: If a number is not one.
        ValueError: If an argument is out of range.

    Source:
        Choquette-Choo et al. 2023, arXiv 2306.08153; arXiv 2508.15089.
    """
    return truncated_dpsgd_event(
        noise_multiplier,
        _rounds(iterations, num_bands),
        sampling_prob=sampling_prob,
        num_examples=largest_group_size,
        truncated_batch_size=truncated_batch_size,
    )


def _noise(noise_multiplier: float, use_zcdp: bool) -> dp_accounting.DpEvent:
    noise_multiplier = _validate.non_negative("noise_multiplier", noise_multiplier, _NOISE_HINT)
    if not use_zcdp:
        return dp_accounting.GaussianDpEvent(noise_multiplier)
    return dp_accounting.ZCDpEvent(0.5 / noise_multiplier**2 if noise_multiplier else math.inf)


def _count(iterations: int) -> int:
    return _validate.integer("iterations", iterations, _ITERATIONS_HINT, minimum=0)


def _rounds(iterations: int, num_bands: int) -> int:
    hint = "Pass the number of bands of the strategy matrix; 1 is DP-SGD."
    return -(-_count(iterations) // _validate.integer("num_bands", num_bands, hint, minimum=1))


def _share(name: str, value: float) -> float:
    if value == 0 and not isinstance(value, bool):
        return 0.0
    return _validate.probability(name, value, _SAMPLING_HINT)
