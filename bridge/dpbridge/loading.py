"""What the loaders share: their options, their saved states, and how indices become batches."""

import functools
import multiprocessing
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dpbridge.empty_draws import preserved_random_state, template, without_rows
from dpkernels import _validate


class Fetcher:
    """Makes batches of lists of indices with an inner `torch.utils.data.DataLoader`.

    An empty list makes a batch without rows.
    """

    def __init__(self, dataset: Any, options: Mapping[str, Any]) -> None:
        self._template: tuple[Any] | Exception | None = None  # a batch without rows, once known
        self._requests = _Requests()
        self._generator = torch.Generator()
        self._loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
            dataset, batch_sampler=self._requests, generator=self._generator, **options
        )

    def start(
        self,
        index_lists: Callable[[], Iterable[list[int]]],
        sizes: Iterable[int],
        *,
        worker_seed: int,
    ) -> Iterator[Any]:
        """Returns an iterator over batches, whose workers prefetch from now on.

        Args:
            index_lists: Returns what each batch holds. It may be called several times, and each
                of its iterators may be ahead of the batches.
            sizes: How many indices each batch holds.
            worker_seed: Of the random numbers that examples and transforms take in workers.
        """
        is_known = self._template is not None
        self._requests.source = functools.partial(_filled, index_lists, is_known)
        self._generator.manual_seed(worker_seed)
        return self._run(sizes, iter(self._loader))

    def _run(self, sizes: Iterable[int], fetched: Iterator[Any]) -> Iterator[Any]:
        for size in sizes:
            yield self._fetch(size, fetched)
        next(fetched, None)  # past its end, where DataLoader stops its workers

    def _fetch(self, size: int, fetched: Iterator[Any]) -> Any:
        if size:
            batch = next(fetched)
            if self._template is None:
                self._template = template(batch)
            return batch
        if self._template is None:
            # Nothing was seen yet, so the request was for an example that is not drawn: it must
            # leave no trace, also not in the random numbers that its transforms take.
            with preserved_random_state():
                self._template = template(next(fetched))
        if isinstance(self._template, Exception):
            raise self._template
        return without_rows(self._template[0])  # again, for containers of the caller's own


class _Requests:
    """The batch sampler of the inner DataLoader.

    DataLoader may iterate over it several times for one pass (it does where it has workers), so
    an iterator must not depend on the earlier ones.
    """

    source: Callable[[], Iterator[list[int]]] = staticmethod(lambda: iter(()))

    def __iter__(self) -> Iterator[list[int]]:
        return self.source()


def _filled(
    index_lists: Callable[[], Iterable[list[int]]], is_structure_known: bool
) -> Iterator[list[int]]:
    """Yields what is to be fetched: the lists that are not empty.

    No collate function can be asked for a batch of nothing. Where the first list is empty and no
    batch was seen before, one example is fetched in its place, to learn the structure from.
    """
    for indices in index_lists():
        if indices or not is_structure_known:
            yield indices or [0]
        is_structure_known = True


def checked_length(dataset: Any) -> int:
    """Returns how many examples a map-style dataset has, at least 1."""
    is_iterable = isinstance(dataset, torch.utils.data.IterableDataset)
    if is_iterable or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise TypeError(
            f"`dataset` must be a map-style dataset, with __len__ and __getitem__, got "
            f"{type(dataset).__name__}. Private sampling picks examples by their index: load "
            f"them into a list, or write a torch.utils.data.Dataset that reads them by index."
        )
    if len(dataset) == 0:
        raise ValueError("`dataset` must not be empty, got length 0. Pass one with examples.")
    return len(dataset)


def checked_options(
    *, num_workers: int, timeout: float, multiprocessing_context: Any, **others: Any
) -> dict[str, Any]:
    """Returns the options of the inner DataLoader; it checks the `others` itself."""
    hint = "Pass 0 to load data in this process."
    num_workers = _validate.integer("num_workers", num_workers, hint, minimum=0)
    if timeout and not num_workers:
        raise ValueError(
            f"`timeout` must be 0 without workers, got {timeout!r}. Leave it out, or raise "
            f"num_workers."
        )
    if num_workers and multiprocessing_context is None:
        multiprocessing_context = _default_start_method()
    return {
        "num_workers": num_workers,
        "timeout": timeout,
        "multiprocessing_context": multiprocessing_context,
        **others,
    }


def _default_start_method() -> str:
    available = multiprocessing.get_all_start_methods()
    return "forkserver" if "forkserver" in available else "spawn"


def checked_seed(seed: int | None) -> int:
    """Returns the seed, or a new one of 128 bits of the operating system."""
    if seed is None:
        return secrets.randbits(128)
    hint = "Leave it out to have one drawn by the operating system."
    return _validate.integer("seed", seed, hint, minimum=0)


def generator_of(seed: int, *key: int) -> np.random.Generator:
    """Returns a generator of its own for every key of a seed."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def checked_place(
    state: Any,
    here: Mapping[str, Any],
    *,
    places: Sequence[str],
    others: Sequence[str] = (),
    owner: str,
) -> list[int]:
    """Returns what a saved state says of `places`, after it was checked.

    Args:
        state: What is to be loaded.
        here: The state of the loader that it is to be loaded into.
        places: Keys of integers in which the two may differ.
        others: Keys in which the two may differ, and which the caller checks.
        owner: Name of the loader's class.

    Raises:
        ValueError: If `state` has other keys, or differs from `here` elsewhere.
    """
    if not isinstance(state, Mapping) or set(state) != set(here):
        got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(
            f"`state` must have the keys {sorted(here)}, got {got}. "
            f"Load what {owner}.state_dict returned."
        )
    for key, value in here.items():
        if key not in (*places, *others) and state[key] != value:
            raise ValueError(
                f"`state[{key!r}]` must be this loader's {value!r}, got {state[key]!r}. "
                f"Make the loader as the saved one was made."
            )
    hint = "Load an unchanged state_dict."
    try:
        return [_validate.integer(f"state[{key!r}]", state[key], hint, minimum=0) for key in places]
    except TypeError as error:
        raise ValueError(str(error)) from error


def check_position(position: int, most: int) -> None:
    """Refuses a saved position after the end."""
    if position > most:
        raise ValueError(
            f"`state['position']` must be at most {most}, got {position}. "
            f"Load an unchanged state_dict."
        )
