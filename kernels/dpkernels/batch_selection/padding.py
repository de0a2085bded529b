"""Batches of varying size, brought to few shapes by the index -1.

Example:
    >>> pad_to_multiple_of(np.array([7, 2, 5]), 4)
    array([ 7,  2,  5, -1])
    >>> split_and_pad_global_batch(np.array([7, 2, 5]), 2)
    [array([7, 2]), array([ 5, -1])]
"""

from typing import Any

import numpy as np

from dpkernels import _validate

_MICROBATCH_HINT = "Pass the `microbatch_size` of the clipped gradient, or leave it out."


def pad_to_multiple_of(
    indices: Any, multiple: int, microbatch_size: int | None = None
) -> np.ndarray:
    """Appends -1 until the length is a multiple of `multiple`, so that few programs are compiled.

    `padded == -1` is the `is_padding_example` of `clipped_grad`; give such rows any example's
    data, such as that of index -1 itself. An empty batch stays empty: 0 is a multiple.

    Padding is always last. `clipped_grad` cuts contiguous microbatches, microbatch i being the
    rows from i·microbatch_size on, so padding fills the last microbatches, and those of padding
    alone are skipped. JAX Privacy cuts strided ones, and reorders the batch to the same end.

    Args:
        indices: Signed integers, `(batch,)`, or `(users, examples)` for rows of -1.
        multiple: What the length is to be a multiple of, at least 1.
        microbatch_size: If given, checked to divide the padded length.

    Returns:
        An array of the type of `indices`.

    Raises:
        TypeError: If `indices` are not signed integers, or a number is not an integer.
        ValueError: If `indices` have another shape, a number is below 1, or `microbatch_size`
            does not divide.

    Guarantees:
        The given indices come first, in their order, and nothing but -1 after them.
        Fewer than `multiple` are appended.
    """
    indices = _checked_indices(indices)
    hint = "Pass the granularity of batch sizes, such as 32."
    multiple = _validate.integer("multiple", multiple, hint, minimum=1)
    padded = _pad(indices, -len(indices) % multiple)
    _check_microbatch("the padded batch", len(padded), microbatch_size)
    return padded


def split_and_pad_global_batch(
    indices: Any, minibatch_size: int, microbatch_size: int | None = None
) -> list[np.ndarray]:
    """Cuts a batch into minibatches of one size, the last of them padded with -1.

    The clipped sums of all of them, added up, are noised once. An empty batch makes one minibatch
    of padding alone: it is a step too.

    Args:
        indices: As in `pad_to_multiple_of`.
        minibatch_size: The size of each part, at least 1.
        microbatch_size: If given, checked to divide `minibatch_size`; see `pad_to_multiple_of`.

    Returns:
        At least one array of length `minibatch_size`, of the type of `indices`.

    Raises:
        TypeError: As in `pad_to_multiple_of`.
        ValueError: As in `pad_to_multiple_of`.

    Guarantees:
        Joined, the minibatches are the given indices in their order, and then only -1.
        Only the last minibatch has padding.
    """
    indices = _checked_indices(indices)
    hint = "Pass how many examples fit into one call."
    size = _validate.integer("minibatch_size", minibatch_size, hint, minimum=1)
    _check_microbatch("`minibatch_size`", size, microbatch_size)
    count = max(1, -(-len(indices) // size))
    return np.split(_pad(indices, count * size - len(indices)), count)


def _pad(indices: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([indices, np.full((count, *indices.shape[1:]), -1, indices.dtype)])


def _checked_indices(indices: Any) -> np.ndarray:
    indices = np.asarray(indices)
    if indices.dtype.kind != "i":
        raise TypeError(
            f"`indices` must be signed integers, to hold the -1 of padding, got {indices.dtype}. "
            "Pass what a batch iterator yields."
        )
    if indices.ndim not in (1, 2):
        raise ValueError(
            f"`indices` must be (batch,) or (users, examples), got shape {indices.shape}. "
            "Pass what a batch iterator yields."
        )
    return indices


def _check_microbatch(what: str, length: int, microbatch_size: int | None) -> None:
    if microbatch_size is None:
        return
    size = _validate.integer("microbatch_size", microbatch_size, _MICROBATCH_HINT, minimum=1)
    if length % size:
        raise ValueError(
            f"`microbatch_size` must divide {what}, got {size} for {length}. {_MICROBATCH_HINT}"
        )
