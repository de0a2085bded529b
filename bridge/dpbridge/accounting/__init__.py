"""Epsilon of noisy training, and the noise that a target epsilon needs.

Example:
    >>> epsilon = compute_epsilon(
    ...     noise_multiplier=3.0, sampling_prob=0.1, steps=512, delta=1e-6)
    >>> round(epsilon, 2)
    3.77
    >>> noise_multiplier = calibrate_noise_multiplier(
    ...     epsilon=1.0, delta=1e-6, sampling_prob=0.1, steps=512)
    >>> round(noise_multiplier, 2)
    9.66

All numbers are for the add-or-remove-one neighbouring relation. Other relations and mechanisms
are in `dpkernels.composition`; JAX Privacy's training accountants in `analysis` and `calibrate`.
"""

from dpbridge.accounting import accountants, analysis, calibrate
from dpbridge.accounting.poisson import (
    Event,
    calibrate_batch_size,
    calibrate_noise_multiplier,
    calibrate_num_updates,
    compose_epsilon,
    compute_delta,
    compute_epsilon,
)

__all__ = [
    "Event",
    "accountants",
    "analysis",
    "calibrate",
    "calibrate_batch_size",
    "calibrate_noise_multiplier",
    "calibrate_num_updates",
    "compose_epsilon",
    "compute_delta",
    "compute_epsilon",
]
