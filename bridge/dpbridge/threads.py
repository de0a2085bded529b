"""Keep torch's threads from waiting on the cores that JAX is about to compute on.

After each operation that torch shares out, its OpenMP threads stay awake for some milliseconds, in
case there is another. The base optimizer's step is such an operation, and what comes next is JAX's.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence

import torch

# Numbers that one thread updates: of more, a step on all threads gains more than this loses.
_AT_MOST = 2**21


@contextlib.contextmanager
def one_thread_for_few(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """Has torch use one thread inside, where an update of these parameters is quick anyway.

    Nothing is changed where they are large or on a GPU, or OMP_WAIT_POLICY is "passive", with
    which threads do not stay awake.

    Args:
        parameters: What is updated inside.
    """
    is_passive = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
    threads = torch.get_num_threads()
    if threads == 1 or is_passive or not _are_few(list(parameters)):
        yield
        return
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def _are_few(tensors: Sequence[torch.Tensor]) -> bool:
    is_on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    return is_on_cpu and sum(tensor.numel() for tensor in tensors) <= _AT_MOST
