"""What a composition spends, as a function."""

import math
from collections.abc import Callable
from typing import NamedTuple


class Curve(NamedTuple):
    """Epsilons and deltas of one composition, as far as doubles resolve them.

    Attributes:
        epsilon_at: The epsilon at a delta of at least twice `rounding`.
        delta_at: The delta at an epsilon, never below the truth.
        rounding: Deltas of this size may be rounding errors.
        reason: What it would take to compute anything; empty where nothing is missing.
    """

    epsilon_at: Callable[[float], float]
    delta_at: Callable[[float], float]
    rounding: float = 0.0
    reason: str = ""

    def epsilon_within(self, delta: float) -> float:
        """Returns `epsilon_at` a delta, or a little more, so that `delta_at` is within."""
        epsilon, step = float(self.epsilon_at(delta)), 2.0**-36
        while epsilon < math.inf and self.delta_at(epsilon) > delta:
            epsilon += step * max(epsilon, 1e-6)
            step *= 8
        return epsilon
