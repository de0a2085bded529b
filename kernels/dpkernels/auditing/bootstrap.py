"""Bootstrap intervals of an attack's statistics.

Example:
    >>> from dpkernels.auditing import CanaryScoreAuditor
    >>> auditor = CanaryScoreAuditor([1.0, 3.0, 4.0, 5.0] * 20, [0.0, 1.0, 2.0, 3.0] * 20)
    >>> low, high = auditor.attack_auroc(bootstrap_params=BootstrapParams(seed=0))
    >>> bool(low < auditor.attack_auroc() < high)
    True
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from scipy.special import ndtr, ndtri

from dpkernels import _validate

Statistic: TypeAlias = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class BootstrapParams:
    """Which quantiles of a statistic to estimate, and how.

    Attributes:
        num_samples: How many times the scores are drawn anew.
        quantiles: One or several numbers in (0, 1).
        bias_correction: Whether the quantiles make up for the bias of the statistic.
        acceleration: Whether they also make up for its skewness.
        seed: Of the draws. By default from the operating system.

    Source:
        Efron 1987, "Better bootstrap confidence intervals" (BCa).
    """

    num_samples: int = 1000
    quantiles: float | tuple[float, ...] = (0.025, 0.975)
    bias_correction: bool = True
    acceleration: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        _validate.integer("num_samples", self.num_samples, "Pass 1000.", minimum=1)
        quantiles = np.atleast_1d(np.asarray(self.quantiles, np.float64))
        if quantiles.size == 0 or quantiles.ndim > 1:
            raise ValueError(
                f"`quantiles` must be one or several numbers, got {self.quantiles!r}. "
                "Pass (0.025, 0.975)."
            )
        for quantile in quantiles:
            _validate.open_unit("quantiles", float(quantile), "Pass (0.025, 0.975).")
        if self.acceleration and not self.bias_correction:
            raise ValueError(
                "`acceleration` must come with `bias_correction`, got it alone. Set both."
            )

    @classmethod
    def confidence_interval(
        cls, num_samples: int = 1000, confidence: float = 0.95, seed: int | None = None
    ) -> "BootstrapParams":
        """Returns the parameters of a two-sided interval of this confidence."""
        tail = (1 - _validate.open_unit("confidence", confidence, "0.95 is usual.")) / 2
        return cls(num_samples=num_samples, quantiles=(tail, 1 - tail), seed=seed)


def bootstrap(
    statistic: Statistic, in_scores: np.ndarray, out_scores: np.ndarray, params: BootstrapParams
) -> float | np.ndarray:
    """Returns the quantiles of a statistic of two samples, each drawn anew by itself."""
    rng = np.random.default_rng(params.seed)
    draws = np.array(
        [
            statistic(*(np.sort(rng.choice(x, x.size)) for x in (in_scores, out_scores)))
            for _ in range(params.num_samples)
        ]
    )
    levels = np.asarray(params.quantiles, np.float64)
    if params.bias_correction:
        value = statistic(in_scores, out_scores)
        skew = _acceleration(statistic, in_scores, out_scores) if params.acceleration else 0.0
        levels = _corrected(levels, draws, value, skew)
    result = np.quantile(draws, levels)
    return float(result) if result.ndim == 0 else result


def _corrected(levels: np.ndarray, draws: np.ndarray, value: float, skew: float) -> np.ndarray:
    below = np.mean(draws < value) + np.mean(draws == value) / 2
    half = 0.5 / draws.size  # keeps the bias finite where all draws lie on one side
    bias = ndtri(np.clip(below, half, 1 - half))
    shifted = bias + ndtri(levels)
    return np.asarray(ndtr(bias + shifted / (1 - skew * shifted)))


def _acceleration(statistic: Statistic, in_scores: np.ndarray, out_scores: np.ndarray) -> float:
    """Returns the skewness of the statistic, by the jackknife on either sample."""
    cubes = squares = 0.0
    for index, scores in enumerate((in_scores, out_scores)):
        samples = [in_scores, out_scores]
        values = []
        for left_out in range(scores.size if scores.size > 1 else 0):
            samples[index] = np.delete(scores, left_out)
            values.append(statistic(*samples))
        if values:
            influence = (scores.size - 1) * (np.mean(values) - np.array(values)) / scores.size
            cubes += float(np.sum(influence**3))
            squares += float(np.sum(influence**2))
    return cubes / (6 * math.pow(squares, 1.5)) if squares > 0 else 0.0
