"""DP-SGD: Gaussian noise, drawn afresh at each step, on sums over randomly drawn batches."""

import dataclasses

import dp_accounting

from dpkernels import _validate, accounting
from dpkernels.batch_selection import (
    BatchSelectionStrategy,
    CyclicPoissonSampling,
    FixedBatchSampling,
)
from dpkernels.execution_plan.config import NeighboringRelation, PrivateConfig
from dpkernels.execution_plan.performance import PerformanceFlags
from dpkernels.execution_plan.plan import DPExecutionPlan
from dpkernels.noise_addition import gaussian_privatizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPSGDConfig(PrivateConfig):
    """Numbers of a DP-SGD run. Either `sampling_prob` or `batch_size` says how batches are drawn.

    | given | batches | neighbours | accountants |
    |---|---|---|---|
    | `sampling_prob` | Poisson | add or remove, zero out | PLD, RDP |
    | | | replace one | PLD |
    | and `truncated_batch_size` | Poisson, cut to a size | zero out, replace one | PLD |
    | `batch_size` | uniform, without replacement | replace one | PLD, RDP |

    Attributes:
        sampling_prob: Probability with which each example is in each batch, in (0, 1].
        batch_size: Size of every batch, drawn uniformly without replacement.
        truncated_batch_size: Largest batch; of a larger draw a uniform part is kept.
        num_examples: Size of the dataset, where it is public: with `truncated_batch_size` and
            `batch_size`. Otherwise the dataset's size is not part of what is released.
        neighboring_relation: What makes two datasets neighbours. By default
            ADD_OR_REMOVE_ONE for Poisson, REPLACE_SPECIAL (zero-out) for truncated Poisson, and
            REPLACE_ONE for batches of a fixed size.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of range, arguments contradict each other, or no accounting of
            the sampling is known for `neighboring_relation`.

    Guarantees:
        The plan's noise has the standard deviation `noise_multiplier` times `sensitivity()`, which
            is twice the clip norm for REPLACE_ONE.
        `epsilon` is that of the plan's own sampling, noise and number of steps.

    Source:
        Abadi et al. 2016, algorithm 1.

    Example:
        >>> config = DPSGDConfig(iterations=512, sampling_prob=0.1, normalize_by=100)
        >>> config = config.calibrate(epsilon=1.0, delta=1e-6)
        >>> round(config.noise_multiplier, 2), config.epsilon(1e-6) <= 1.0
        (9.66, True)
    """

    sampling_prob: float | None = None
    batch_size: int | None = None
    truncated_batch_size: int | None = None
    num_examples: int | None = None
    neighboring_relation: NeighboringRelation | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.sampling_prob is None) == (self.batch_size is None):
            raise ValueError(
                "Either `sampling_prob` or `batch_size` must be given, got "
                f"{self.sampling_prob!r} and {self.batch_size!r}. Pass sampling_prob for Poisson "
                "subsampling."
            )
        needs_size = self.batch_size is not None or self.truncated_batch_size is not None
        if needs_size != (self.num_examples is not None):
            raise ValueError(
                "`num_examples` must be given with `truncated_batch_size` or `batch_size`, and "
                f"only then, got {self.num_examples!r}. With plain Poisson subsampling the size "
                "of the dataset is private."
            )
        self._check_sizes()
        if self.neighboring_relation is None:
            self._set("neighboring_relation", next(iter(self._accountants_by_relation)))
        _validate.one_of(
            "neighboring_relation", self.neighboring_relation, self._accountants_by_relation
        )

    def _check_sizes(self) -> None:
        if self.sampling_prob is not None:
            hint = "Pass the expected batch size over the size of the dataset."
            prob = _validate.probability("sampling_prob", self.sampling_prob, hint)
            self._set("sampling_prob", prob)
        for name in ("batch_size", "truncated_batch_size", "num_examples"):
            if getattr(self, name) is not None:
                hint = "Pass a number of examples."
                size = _validate.integer(name, getattr(self, name), hint, minimum=1)
                self._set(name, size)
        if self.truncated_batch_size is not None and self.batch_size is not None:
            raise ValueError(
                "`truncated_batch_size` must go with `sampling_prob`, got a fixed `batch_size`, "
                "which has nothing to cut. Leave it out."
            )
        if self.batch_size is not None and self.batch_size > (self.num_examples or 0):
            raise ValueError(
                f"`batch_size` must be at most `num_examples`, {self.num_examples}, got "
                f"{self.batch_size}. Draw smaller batches."
            )

    @property
    def _accountants_by_relation(self) -> dict[NeighboringRelation, tuple[str, ...]]:
        if self.batch_size is not None:
            return {NeighboringRelation.REPLACE_ONE: ("pld", "rdp")}
        if self.truncated_batch_size is not None:
            return {
                NeighboringRelation.REPLACE_SPECIAL: ("pld",),
                NeighboringRelation.REPLACE_ONE: ("pld",),
            }
        return {
            NeighboringRelation.ADD_OR_REMOVE_ONE: ("pld", "rdp"),
            NeighboringRelation.REPLACE_SPECIAL: ("pld", "rdp"),
            NeighboringRelation.REPLACE_ONE: ("pld",),
        }

    @property
    def relation(self) -> NeighboringRelation:
        """What makes two datasets neighbours."""
        return NeighboringRelation(self.neighboring_relation)

    @property
    def accountants(self) -> tuple[str, ...]:
        """The accountants that can answer, the tightest first."""
        return self._accountants_by_relation[self.relation]

    def _dp_event(self, noise_multiplier: float, steps: int) -> dp_accounting.DpEvent:
        if self.sampling_prob is None:
            return accounting.fixed_dpsgd_event(
                noise_multiplier,
                steps,
                dataset_size=self.num_examples or 0,
                batch_size=self.batch_size or 0,
            )
        if self.truncated_batch_size is None:
            return accounting.dpsgd_event(noise_multiplier, steps, sampling_prob=self.sampling_prob)
        return accounting.truncated_dpsgd_event(
            noise_multiplier,
            steps,
            sampling_prob=self.sampling_prob,
            num_examples=self.num_examples or 0,
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
        return DPExecutionPlan.made_by(
            self,
            clipped_grad=self._clipped_grad(flags),
            batch_selection_strategy=self._batch_selection_strategy(),
            noise_addition_transform=gaussian_privatizer(
                stddev=self._noise() * self.sensitivity(), prng_key=flags.noise_seed
            ),
        )

    def _batch_selection_strategy(self) -> BatchSelectionStrategy:
        if self.sampling_prob is None:
            return FixedBatchSampling(batch_size=self.batch_size or 0, iterations=self.iterations)
        return CyclicPoissonSampling(
            sampling_prob=self.sampling_prob,
            iterations=self.iterations,
            truncated_batch_size=self.truncated_batch_size,
        )
