"""The attacker's statistic: how much likelier a release is with the canary than without it.

Example:
    >>> statistic = LikelihoodRatio(np.ones((10, 1)), precision=np.eye(1), cycle_length=1)
    >>> statistic.log_likelihood(np.array([[2.0]]), 1.0)  # of N(1, 1) against N(0, 1): 2 - 1/2
    array([1.5])
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp


@dataclass(frozen=True, eq=False)
class LikelihoodRatio:
    """Gaussian noise of a known covariance, and a canary that is in batches at random.

    What the statistic is has no influence on the validity of an audit, only on its power. Two
    approximations are averaged: the mixture over the patterns of participation that were seen,
    exact where there are few, and a product over steps within each turn of a cycle, exact for
    Poisson sampling and independent noise.

    Attributes:
        patterns: `(draws, steps)`, how often the canary was in each batch of reference draws.
        precision: `(steps, steps)`, the inverse of the noise's covariance.
        cycle_length: After how many steps the canary's turn comes again.
    """

    patterns: np.ndarray
    precision: np.ndarray
    cycle_length: int

    def log_likelihood(self, released: np.ndarray, shift: float) -> np.ndarray:
        """Returns the log likelihood against no shift at all.

        Args:
            released: `(runs, steps)`.
            shift: By how much one participation moves a step.
        """
        if shift == 0:
            return np.zeros(released.shape[0])
        filtered = released @ self.precision
        either = [self._of_patterns(filtered, shift), self._of_steps(filtered, shift)]
        return np.asarray(logsumexp(either, axis=0) - np.log(2))

    def _of_patterns(self, filtered: np.ndarray, shift: float) -> np.ndarray:
        patterns, counts = np.unique(self.patterns, axis=0, return_counts=True)
        means = shift * patterns
        energy = np.einsum("ps,st,pt->p", means, self.precision, means)
        weights = np.log(counts / counts.sum())
        return np.asarray(logsumexp(filtered @ means.T - energy / 2 + weights, axis=1))

    def _of_steps(self, filtered: np.ndarray, shift: float) -> np.ndarray:
        exponents = shift * filtered - shift**2 * np.diag(self.precision) / 2
        shares = np.mean(self.patterns > 0, axis=0) * self.cycle_length
        with np.errstate(divide="ignore"):  # a step that never, or always, has the canary
            present = np.log(np.minimum(shares, 1.0))
            absent = np.log1p(-np.minimum(shares, 1.0))
        terms = np.logaddexp(absent, present + exponents)
        turns = np.arange(shares.size) % self.cycle_length
        sums = [terms[:, turns == turn].sum(axis=1) for turn in range(self.cycle_length)]
        return np.asarray(logsumexp(sums, axis=0) - np.log(self.cycle_length))


def precision_of(noise: np.ndarray, reach: float) -> np.ndarray:
    """Returns `(steps, steps)`, the inverse covariance of noise `(samples, steps)`.

    Args:
        noise: Samples of mean zero.
        reach: What a canary adds, beside which noise as good as none is not told from none.
    """
    covariance = noise.T @ noise / noise.shape[0]
    floor = max(1e-6 * float(np.mean(np.diag(covariance))), 1e-12 * reach**2)
    return np.linalg.inv(covariance + floor * np.eye(covariance.shape[0]))
