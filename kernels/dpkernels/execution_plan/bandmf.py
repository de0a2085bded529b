"""Banded matrix factorization: noise correlated between steps, batches from groups in turn."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Self

import dp_accounting
import numpy as np
from scipy import signal

from dpkernels import _validate, accounting
from dpkernels.batch_selection import CyclicPoissonSampling, PartitionType
from dpkernels.execution_plan.config import NeighboringRelation, PrivateConfig
from dpkernels.execution_plan.performance import PerformanceFlags
from dpkernels.execution_plan.plan import DPExecutionPlan
from dpkernels.matrix_factorization import toeplitz
from dpkernels.noise_addition import matrix_factorization_privatizer

# By how much the noise of a step may exceed that of the first: what grows faster is soon not
# finite, and long before that the sums are lost in the rounding of float32.
_MAX_GROWTH = 1e6
_STEPS_CHECKED = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class BandMFConfig(PrivateConfig):
    """Numbers of a run with noise from a banded Toeplitz strategy. One band is DP-SGD.

    The examples are split into as many groups as the strategy has bands. Groups take turns, so
    that an example takes part in at most every `num_bands`-th step, and each draws a Poisson
    sample when it is its turn.

    Attributes:
        expected_participations: How often an example takes part, in the mean: decides the
            sampling probability within a group. At most `iterations // num_bands`.
        strategy: Coefficients of the strategy matrix C: its first column, of 1 to `iterations`
            numbers. The noise is C⁻¹Z, so that the first must not be 0, nor the noise grow over the
            steps without bound. Only their ratios count.
        truncated_batch_size: Largest batch; of a larger draw a uniform part is kept. Needs
            `num_examples`.
        num_examples: Size of the dataset, where it is public. With it neighbours differ by
            zeroing out an example (REPLACE_SPECIAL) and groups are of equal size, which leaves
            out up to `num_bands - 1` examples. Without it they differ by adding or removing one,
            and each example's group is drawn independently.
        column_normalize: Whether every column of C is scaled to the same norm. The last
            `num_bands - 1`, which end at the last step, are shorter otherwise.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of range.

    Guarantees:
        The plan's noise is C⁻¹Z, Z with the standard deviation `noise_multiplier` times
            `sensitivity()` times the largest column norm of C.
        `epsilon` is that of the plan's own sampling, noise and number of steps.

    Source:
        Choquette-Choo et al. 2023, "(Amplified) banded matrix factorization", arXiv 2306.08153.

    Example:
        >>> config = BandMFConfig(
        ...     iterations=100, expected_participations=5, strategy=(1.0, 0.5, 0.25),
        ...     noise_multiplier=4.0)
        >>> config.num_bands, config.sampling_prob
        (3, 0.15)
    """

    expected_participations: float
    strategy: Sequence[float]
    rescale_to_unit_norm: bool = True
    truncated_batch_size: int | None = None
    num_examples: int | None = None
    column_normalize: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_strategy()
        hint = "Pass how often an example takes part in the mean, say the number of epochs."
        value = _validate.positive("expected_participations", self.expected_participations, hint)
        if value > self.iterations // self.num_bands:
            raise ValueError(
                "`expected_participations` must be at most `iterations // num_bands`, "
                f"{self.iterations // self.num_bands}, got {value}. Use fewer bands."
            )
        self._set("expected_participations", value)
        if self.truncated_batch_size is not None and self.num_examples is None:
            raise ValueError(
                "`num_examples` must be given with `truncated_batch_size`, got None. "
                "Pass the size of the dataset."
            )
        for name, minimum in (("truncated_batch_size", 1), ("num_examples", self.num_bands)):
            if getattr(self, name) is not None:
                hint = "Pass a number of examples, at least one for each group."
                self._set(name, _validate.integer(name, getattr(self, name), hint, minimum=minimum))

    def _check_strategy(self) -> None:
        coefs = np.asarray(self.strategy, np.float64)
        if coefs.ndim != 1 or not 1 <= coefs.size <= self.iterations:
            raise ValueError(
                f"`strategy` must be 1 to {self.iterations} (`iterations`) numbers, got shape "
                f"{coefs.shape}. Pass the first column of the strategy matrix."
            )
        if not np.all(np.isfinite(coefs)) or coefs[0] <= 0:
            raise ValueError(
                f"`strategy` must be finite and begin with a positive number, got {coefs}. "
                "Scale it so that it does."
            )
        if not _growth(coefs, min(self.iterations, _STEPS_CHECKED)) <= _MAX_GROWTH:
            raise ValueError(
                "`strategy` must have an inverse that stays bounded, got "
                f"{coefs}, whose noise grows more than {_MAX_GROWTH:.0e} fold within the steps. "
                "Pass coefficients that fall, as those of BandMFConfig.default do."
            )
        self._set("strategy", tuple(coefs.tolist()))

    @classmethod
    def default(
        cls,
        *,
        num_bands: int,
        iterations: int,
        expected_participations: float,
        strategy_optimization_steps: int = 500,
        **options: Any,
    ) -> Self:
        """Returns a config whose strategy has the least mean squared error of its prefix sums.

        Args:
            num_bands: Bands of the strategy, 1 to `iterations`.
            iterations: How many steps.
            expected_participations: How often an example takes part, in the mean.
            strategy_optimization_steps: Of the optimisation of the strategy.
            **options: Other fields of the config.
        """
        hint = "Pass the number of bands of the strategy matrix; 1 is DP-SGD."
        num_bands = _validate.integer("num_bands", num_bands, hint, minimum=1)
        strategy = toeplitz.optimize_banded_toeplitz(
            iterations, num_bands, max_optimizer_steps=strategy_optimization_steps
        )
        return cls(
            iterations=iterations,
            expected_participations=expected_participations,
            strategy=tuple(np.asarray(strategy, np.float64).tolist()),
            **options,
        )

    @property
    def num_bands(self) -> int:
        """How many bands the strategy has, which is how many groups take turns."""
        return len(self.strategy)

    @property
    def sampling_prob(self) -> float:
        """Probability with which each example of a group is in the group's batch."""
        return min(1.0, self.expected_participations * self.num_bands / self.iterations)

    @property
    def relation(self) -> NeighboringRelation:
        """What makes two datasets neighbours."""
        if self.num_examples is None:
            return NeighboringRelation.ADD_OR_REMOVE_ONE
        return NeighboringRelation.REPLACE_SPECIAL

    @property
    def accountants(self) -> tuple[str, ...]:
        """The accountants that can answer, the tightest first."""
        return ("pld", "rdp") if self.truncated_batch_size is None else ("pld",)

    @property
    def rmse(self) -> float:
        """Root of the mean squared error of the prefix sums of the noise, in units of the sum.

        Raises:
            ValueError: If there is no noise multiplier yet.
        """
        coefs = np.asarray(self._unit_strategy())
        loss = toeplitz.loss(strategy_coef=coefs, n=self.iterations)
        return self._noise() * self.sensitivity() * math.sqrt(float(loss))

    def _unit_strategy(self) -> tuple[float, ...]:
        """Returns the coefficients scaled so that the largest column norm of C is 1."""
        norm = math.hypot(*self.strategy)
        return tuple(coef / norm for coef in self.strategy)

    def _dp_event(self, noise_multiplier: float, steps: int) -> dp_accounting.DpEvent:
        if self.truncated_batch_size is None:
            return accounting.amplified_bandmf_event(
                noise_multiplier,
                steps,
                num_bands=self.num_bands,
                sampling_prob=self.sampling_prob,
            )
        return accounting.truncated_amplified_bandmf_event(
            noise_multiplier,
            steps,
            num_bands=self.num_bands,
            sampling_prob=self.sampling_prob,
            largest_group_size=(self.num_examples or 0) // self.num_bands,
            truncated_batch_size=self.truncated_batch_size,
        )

    def make(self, performance_flags: PerformanceFlags | None = None) -> DPExecutionPlan:
        """Returns the plan.

        Args:
            performance_flags: How it is computed.

        Raises:
            ValueError: If there is no noise multiplier yet.
        """
        flags = performance_flags or PerformanceFlags()
        noising_matrix = toeplitz.inverse_as_streaming_matrix(
            np.asarray(self._unit_strategy()),
            column_normalize_for_n=self.iterations if self.column_normalize else None,
        )
        return DPExecutionPlan.made_by(
            self,
            clipped_grad=self._clipped_grad(flags),
            batch_selection_strategy=CyclicPoissonSampling(
                sampling_prob=self.sampling_prob,
                iterations=self.iterations,
                truncated_batch_size=self.truncated_batch_size,
                cycle_length=self.num_bands,
                partition_type=PartitionType.INDEPENDENT
                if self.num_examples is None
                else PartitionType.EQUAL_SPLIT,
            ),
            noise_addition_transform=matrix_factorization_privatizer(
                noising_matrix,
                stddev=self._noise() * self.sensitivity(),
                prng_key=flags.noise_seed,
            ),
        )


def _growth(strategy: np.ndarray, steps: int) -> float:
    """Returns the largest standard deviation of the noise at a step over that at the first.

    Rows of C⁻¹ hold its first column backwards, so that the last has all of it.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        column = signal.lfilter([1.0], strategy / strategy[0], np.eye(1, steps)[0])
        return float(np.linalg.norm(column))
