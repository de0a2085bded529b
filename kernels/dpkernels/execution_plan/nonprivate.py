"""Training without privacy through the same loop, to compare with."""

import dataclasses
import math

import dp_accounting
import optax

from dpkernels import _validate
from dpkernels.batch_selection import FixedBatchSampling
from dpkernels.execution_plan.config import NeighboringRelation
from dpkernels.execution_plan.performance import PerformanceFlags, PlannedClipping
from dpkernels.execution_plan.plan import DPExecutionPlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class NonPrivateConfig:
    """Batches of a fixed size, no clipping, no noise, the mean gradient. NOT private.

    Attributes:
        iterations: How many steps, at least 1.
        batch_size: Size of every batch.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of range.

    Guarantees:
        None: the epsilon of its plan is infinite.

    Example:
        >>> NonPrivateConfig(iterations=10, batch_size=4).make().epsilon(1e-6)
        inf
    """

    iterations: int
    batch_size: int

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size"):
            hint = "Pass the number of steps and the size of their batches."
            value = _validate.integer(name, getattr(self, name), hint, minimum=1)
            object.__setattr__(self, name, value)  # The only way in a frozen dataclass.

    def make(self, performance_flags: PerformanceFlags | None = None) -> DPExecutionPlan:
        """Returns the plan.

        Args:
            performance_flags: How it is computed.
        """
        return DPExecutionPlan(
            clipped_grad=PlannedClipping(
                performance_flags or PerformanceFlags(),
                l2_clip_norm=math.inf,
                rescale_to_unit_norm=False,
                normalize_by=float(self.batch_size),
            ),
            batch_selection_strategy=FixedBatchSampling(
                batch_size=self.batch_size, iterations=self.iterations
            ),
            noise_addition_transform=optax.identity(),
            dp_event=dp_accounting.NonPrivateDpEvent(),
            neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
            config=self,
        )
