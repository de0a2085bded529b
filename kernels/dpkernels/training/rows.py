"""The rows of a dataset, taken by index and padded."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from dp_accounting import dp_event

from dpkernels.batch_selection import CyclicPoissonSampling, PartitionType
from dpkernels.clipping import Aux
from dpkernels.execution_plan import DPExecutionPlan

PyTree = Any
_FIXED = (dp_event.SampledWithoutReplacementDpEvent, dp_event.SampledWithReplacementDpEvent)


class Rows:
    """The examples of a dataset, to be taken by their indices."""

    def __init__(self, dataset: PyTree) -> None:
        self._arrays = jax.tree.map(
            lambda leaf: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf), dataset
        )
        shapes = [leaf.shape for leaf in jax.tree.leaves(self._arrays)]
        if not shapes or not all(shapes) or len({shape[0] for shape in shapes}) > 1:
            raise ValueError(
                "`dataset` must hold arrays with the same number of examples on axis 0, got "
                f"shapes {shapes}. Pass one row for each example in every array."
            )
        self.count = int(shapes[0][0])
        if not self.count:
            raise ValueError("`dataset` must hold examples, got none. Pass at least one.")

    def take(self, indices: np.ndarray) -> tuple[PyTree, np.ndarray]:
        """Returns the rows, zeros for -1, and which are -1."""

        def take(leaf: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
            if isinstance(leaf, jax.Array):
                return _take_on_device(leaf, indices)
            rows = np.zeros((len(indices), *leaf.shape[1:]), leaf.dtype)
            rows[~is_padding] = leaf[indices[~is_padding]]
            return rows

        is_padding = indices < 0
        return jax.tree.map(take, self._arrays), is_padding


@jax.jit
def _take_on_device(leaf: jax.Array, indices: jax.Array) -> jax.Array:
    is_real = (indices >= 0).reshape(-1, *(1,) * (leaf.ndim - 1))
    return jnp.where(is_real, leaf[jnp.maximum(indices, 0)], jnp.zeros((), leaf.dtype))


def padded(indices: np.ndarray, multiple: int) -> np.ndarray:
    """Fills up with -1 to the next multiple that is not 0: an empty draw is a batch too."""
    size = -(-max(len(indices), 1) // multiple) * multiple
    return np.concatenate([indices, np.full(size - len(indices), -1)])


def real_rows(aux: Aux, is_padding: np.ndarray) -> Aux:
    """Returns the rows of what is not padding, as NumPy arrays."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[~is_padding], aux)


def check_size(plan: DPExecutionPlan, num_examples: int) -> None:
    """Refuses a dataset of another size than the one the plan's epsilon is for, if it has one."""
    sizes = [(getattr(plan.config, "num_examples", None), num_examples)]
    for accounted, actual in sizes + _accounted_sizes(plan, num_examples):
        if accounted not in (None, actual):
            raise ValueError(
                f"`dataset` must hold the {accounted} examples that the plan accounts for "
                f"(`num_examples`), got {actual}. Make the plan for this dataset."
            )


def _accounted_sizes(plan: DPExecutionPlan, num_examples: int) -> list[tuple[int, int]]:
    """Returns sizes of what batches are drawn from in the plan's event, each with the true one."""
    sizes, strategy = [], plan.batch_selection_strategy
    for event in _released(plan.dp_event):
        if isinstance(event, _FIXED):
            sizes.append((event.source_dataset_size, num_examples))
        elif (
            isinstance(event, dp_event.TruncatedSubsampledGaussianDpEvent)
            and isinstance(strategy, CyclicPoissonSampling)
            # Independent groups have sizes of their own.
            and (strategy.cycle_length == 1 or strategy.partition_type is PartitionType.EQUAL_SPLIT)
        ):
            sizes.append((event.dataset_size, num_examples // strategy.cycle_length))
    return sizes


def _released(event: dp_event.DpEvent) -> Iterator[dp_event.DpEvent]:
    """Yields what a composition is of."""
    if isinstance(event, dp_event.ComposedDpEvent):
        for part in event.events:
            yield from _released(part)
    elif isinstance(event, dp_event.SelfComposedDpEvent):
        yield from _released(event.event)
    else:
        yield event
