"""Batches without rows, which stand for draws that hold no example."""

import contextlib
import copy
import random
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch


def template(batch: Any) -> tuple[Any] | Exception:
    """Returns a batch without rows, or why there is none: only an empty draw needs to know."""
    try:
        return (without_rows(batch),)
    except (TypeError, ValueError) as error:
        return error.with_traceback(None)  # which would keep the batch alive


def without_rows(batch: Any) -> Any:
    """Returns a batch of the same structure, dtypes and trailing shapes with 0 rows.

    Raises:
        TypeError: If a leaf of the batch has no rows to leave out.
        ValueError: If the arrays of the batch differ in how many rows they have.
    """
    lengths: dict[str, int] = {}
    empty = _map_leaves(batch, "batch", lengths)
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"`collate_fn` must put the examples along the first axis of every tensor, so that "
            f"an empty draw has a batch of 0 rows, got first axes of {lengths}. Change the layout "
            f"in the model instead."
        )
    return empty


def _map_leaves(value: Any, path: str, lengths: dict[str, int]) -> Any:
    """Returns `value` with 0 rows in every array, and notes how many each had."""
    if isinstance(value, torch.Tensor | np.ndarray) and value.ndim > 0:
        lengths[path] = len(value)
        return value[:0].detach().clone() if isinstance(value, torch.Tensor) else value[:0].copy()
    if isinstance(value, Mapping):
        items = {k: _map_leaves(v, f"{path}[{k!r}]", lengths) for k, v in value.items()}
        if not isinstance(value, MutableMapping):
            return items
        same_type = copy.copy(value)  # as DataLoader's own pin_memory does
        same_type.update(items)
        return same_type
    if isinstance(value, list | tuple):
        values = [_map_leaves(v, f"{path}[{i}]", lengths) for i, v in enumerate(value)]
        return type(value)(*values) if hasattr(value, "_fields") else type(value)(values)
    if value is None:
        return None
    raise TypeError(
        f"`collate_fn` must return tensors with a batch axis, in tuples, lists or dicts, so that "
        f"an empty draw has a batch of 0 rows, got {value!r} at {path}. Return a tensor there, or "
        f"leave it out of the batch."
    )


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Puts the process's random states back as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
