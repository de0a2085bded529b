"""Which examples are in which batch: the sampling that privacy accounting assumes.

Everything here runs on the host, in NumPy. A strategy is public; what it draws is secret.

Example:
    >>> strategy = CyclicPoissonSampling(sampling_prob=0.5, iterations=3)
    >>> strategy.expected_batch_size(8)
    4.0
    >>> for indices in strategy.batch_iterator(8, rng=0):
    ...     padded = pad_to_multiple_of(indices, 4)
    ...     is_padding_example = padded == -1
"""

from dpkernels.batch_selection.allocation import BallsInBinsSampling, RandomAllocationSampling
from dpkernels.batch_selection.base import BatchSelectionStrategy, RngType
from dpkernels.batch_selection.fixed import FixedBatchSampling
from dpkernels.batch_selection.min_sep import BMinSepSampling
from dpkernels.batch_selection.padding import pad_to_multiple_of, split_and_pad_global_batch
from dpkernels.batch_selection.poisson import CyclicPoissonSampling, PartitionType
from dpkernels.batch_selection.users import UserSelectionStrategy

__all__ = [
    "BMinSepSampling",
    "BallsInBinsSampling",
    "BatchSelectionStrategy",
    "CyclicPoissonSampling",
    "FixedBatchSampling",
    "PartitionType",
    "RandomAllocationSampling",
    "RngType",
    "UserSelectionStrategy",
    "pad_to_multiple_of",
    "split_and_pad_global_batch",
]
