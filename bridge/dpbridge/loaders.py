"""Loaders whose batches are drawn as the privacy accounting assumes.

Example:
    >>> import torch
    >>> dataset = torch.utils.data.TensorDataset(torch.randn(1000, 8), torch.arange(1000))
    >>> loader = PoissonLoader(dataset, sampling_prob=0.05, steps=3, seed=0)
    >>> for x, y in loader:
    ...     assert x.shape == (len(y), 8)
    >>> len(loader), loader.expected_batch_size
    (3, 50.0)
"""

import contextlib
import copy
import functools
import multiprocessing
import random
import secrets
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

import numpy as np
import torch

from dpkernels import _validate


class PoissonLoader:
    """Draws every example into every batch independently, with probability `sampling_prob`.

    This is the sampling of DP-SGD (Abadi et al. 2016, Algorithm 1) that `accounting` assumes: a
    batch has a random size, possibly 0. An empty draw is a batch like the others, with the same
    structure, dtypes and trailing shapes, and 0 rows.

    Draws form one endless stream. Draw number t is a function of the seed and t alone. Each
    iteration over the loader is a *pass* and owns `steps` consecutive draws: the first pass the
    draws 0 to steps - 1, the second the next `steps`. A pass that is left early (a `break`)
    abandons the rest of its draws, so a new iteration is a full pass of draws that were neither
    yielded nor prefetched before. A loader restored by `load_state_dict` goes on where the saved
    one was: in the middle of a pass its first iteration yields what was left of that pass.

    Worker processes are started by "forkserver", or "spawn" where that does not exist, not by
    "fork": JAX runs threads, and a forked copy of a process with threads can deadlock. So the
    dataset and `collate_fn` must be picklable and a script needs the usual
    `if __name__ == "__main__":`. Pass `multiprocessing_context="fork"` to decide otherwise.

    A copy (`copy.copy`, `copy.deepcopy`, pickle) of a loader without a given seed gets a new seed
    and starts its own stream: two runs that train on the same secret draws would not compose as
    accounted. With a given seed a copy is at the same place of the same stream.

    Guarantees:
        * Each example is in each batch with probability `sampling_prob`, independently of the
          other examples and of the other batches.
        * A full pass has exactly `steps` batches, empty draws included.
        * No draw is yielded twice, also across passes left early, unless an older state is loaded.
        * With a saved state a new loader yields the same remaining batches, whatever the number
          of workers and however far they had prefetched (with the same NumPy).
        * PyTorch's global random state is neither used nor changed by the loader.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        sampling_prob: float,
        steps: int,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        seed: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
    ) -> None:
        """Checks the dataset and the options; reads no example.

        Args:
            dataset: A map-style dataset: anything with `__len__` and `__getitem__`, such as a
                `TensorDataset` or a list of examples.
            sampling_prob: Probability with which each example is in each batch, in (0, 1].
            steps: How many batches a pass has, at least 1.
            collate_fn: Makes a batch of a non-empty list of examples, as in
                `torch.utils.data.DataLoader`; the batch is the first axis of what it returns.
            seed: Decides all draws. By default 128 bits come from the operating system. Give one
                only where the draws need not be secret, as in tests.
            num_workers: How many processes load data; 0 loads in this one.
            pin_memory: As in `torch.utils.data.DataLoader`.
            timeout: Seconds to wait for a batch from a worker, 0 for ever.
            worker_init_fn: As in `torch.utils.data.DataLoader`.
            multiprocessing_context: How workers are started; see above.
            prefetch_factor: As in `torch.utils.data.DataLoader`.
            persistent_workers: As in `torch.utils.data.DataLoader`.

        Raises:
            TypeError: If the dataset is not map-style, or an argument has the wrong type.
            ValueError: If the dataset is empty, or an argument is outside its range.
        """
        num_examples = _checked_length(dataset)
        hint = "Pass the expected batch size over the size of the dataset."
        sampling_prob = _validate.probability("sampling_prob", sampling_prob, hint)
        hint = "Pass the number of batches of one pass."
        self._steps = _validate.integer("steps", steps, hint, minimum=1)
        hint = "Leave it out to have one drawn by the operating system."
        if seed is not None:
            seed = _validate.integer("seed", seed, hint, minimum=0)
        hint = "Pass 0 to load data in this process."
        num_workers = _validate.integer("num_workers", num_workers, hint, minimum=0)
        if timeout and not num_workers:
            raise ValueError(
                f"`timeout` must be 0 without workers, got {timeout!r}. Leave it out, or raise "
                f"num_workers."
            )
        if num_workers and multiprocessing_context is None:
            multiprocessing_context = _default_start_method()
        self._dataset = dataset
        self._options = {
            "collate_fn": collate_fn,
            "num_workers": num_workers,
            "pin_memory": pin_memory,
            "timeout": timeout,
            "worker_init_fn": worker_init_fn,
            "multiprocessing_context": multiprocessing_context,
            "prefetch_factor": prefetch_factor,
            "persistent_workers": persistent_workers,
        }
        self._has_given_seed = seed is not None
        self._stream = _Stream(_new_seed() if seed is None else seed, num_examples, sampling_prob)
        self._pass = 0  # the running pass, or the next one if none is running
        self._position = 0  # how many of its batches were yielded
        self._make_loader()

    def _make_loader(self) -> None:
        self._running: object | None = None  # identifies the iterator of the running pass
        self._template: tuple[Any] | Exception | None = None  # a batch without rows, once known
        self._requests = _Requests()
        self._generator = torch.Generator()
        self._loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
            self._dataset, batch_sampler=self._requests, generator=self._generator, **self._options
        )

    @property
    def dataset(self) -> Any:
        """The dataset."""
        return self._dataset

    @property
    def sampling_prob(self) -> float:
        """Probability with which each example is in each batch."""
        return self._stream.sampling_prob

    @property
    def steps(self) -> int:
        """How many batches a pass has."""
        return self._steps

    @property
    def expected_batch_size(self) -> float:
        """The mean size of a batch: `sampling_prob` times the number of examples."""
        return self._stream.sampling_prob * self._stream.num_examples

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Any]:
        """Starts a pass, or what is left of one after `load_state_dict`.

        Only one pass runs at a time: an older iterator raises RuntimeError when it is used again.
        """
        if self._running is not None:
            self._pass, self._position = self._pass + 1, 0
        self._running = running = object()
        start = self._pass * self._steps
        draws = range(start + self._position, start + self._steps)
        is_known = self._template is not None
        self._requests.source = functools.partial(_index_lists, self._stream, draws, is_known)
        # Other random numbers in the workers than in any other pass, or part of this one.
        self._generator.manual_seed(self._stream.worker_seed(draws.start))
        return self._run(running, draws, iter(self._loader))

    def _run(self, running: object, draws: range, fetched: Iterator[Any]) -> Iterator[Any]:
        for draw in draws:
            if self._running is not running:
                raise RuntimeError(
                    "This iterator has ended: a newer iteration over the PoissonLoader was "
                    "started, or a state was loaded. Iterate over one pass at a time."
                )
            batch = self._fetch(self._stream.size(draw), fetched)
            self._position += 1
            yield batch
        if self._running is running:
            next(fetched, None)  # past its end, where DataLoader stops its workers
            self._pass, self._position, self._running = self._pass + 1, 0, None

    def _fetch(self, size: int, fetched: Iterator[Any]) -> Any:
        if size:
            batch = next(fetched)
            if self._template is None:
                self._template = _template(batch)
            return batch
        if self._template is None:
            # Nothing was seen yet, so the request was for an example that is not drawn: it must
            # leave no trace, also not in the random numbers that its transforms take.
            with _preserved_random_state():
                self._template = _template(next(fetched))
        if isinstance(self._template, Exception):
            raise self._template
        return _without_rows(self._template[0])  # again, for containers of the caller's own

    def state_dict(self) -> dict[str, Any]:
        """Returns the place in the stream, in plain types.

        Taken in the body of a loop, it counts the batch of that body as yielded. It holds the
        seed: whoever reads it knows which examples were in which batch.
        """
        return {
            "version": _VERSION,
            "seed": self._stream.seed,
            "pass": self._pass,
            "position": self._position,
            "steps": self._steps,
            "num_examples": self._stream.num_examples,
            "sampling_prob": self._stream.sampling_prob,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved place; the next iteration yields what was left of the pass there.

        After the last batch of a pass that is nothing: the loop that was interrupted there had
        no more to do. If the pass had ended, the next iteration is a full one.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: If `state` is not what `state_dict` returns, or was saved by a loader with
                other `steps`, another `sampling_prob` or a dataset of another length; nothing is
                changed then.
        """
        here = self.state_dict()
        seed, number, position = _checked_state(state, here)
        self._stream = self._stream._replace(seed=seed)
        self._pass, self._position, self._running = number, position, None

    def __getstate__(self) -> dict[str, Any]:
        return {
            "dataset": self._dataset,
            "options": self._options,
            "stream": self._stream._replace(seed=0),
            "steps": self._steps,
            "place": self.state_dict() if self._has_given_seed else None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._dataset, self._options = state["dataset"], state["options"]
        self._steps, place = state["steps"], state["place"]
        self._has_given_seed = place is not None
        self._stream = state["stream"]._replace(seed=place["seed"] if place else _new_seed())
        self._pass, self._position = (place["pass"], place["position"]) if place else (0, 0)
        self._make_loader()


class _Stream(NamedTuple):
    """The endless stream of draws: draw t is a function of these fields and t."""

    seed: int
    num_examples: int
    sampling_prob: float

    def size(self, draw: int) -> int:
        """Returns the size of a draw, without drawing its members."""
        return int(self._rng(0, draw).binomial(self.num_examples, self.sampling_prob))

    def indices(self, draw: int) -> list[int]:
        """Returns the members of a draw.

        A binomial size and a uniform subset of that size have the joint distribution of
        independent coin flips, at a cost that grows with the batch instead of the dataset.
        """
        rng = self._rng(0, draw)
        size = rng.binomial(self.num_examples, self.sampling_prob)
        indices: list[int] = rng.choice(
            self.num_examples, size, replace=False, shuffle=False
        ).tolist()
        return indices

    def worker_seed(self, draw: int) -> int:
        """Returns a seed for the workers' own random numbers from a draw on."""
        return int(self._rng(1, draw).integers(2**63))

    def _rng(self, *key: int) -> np.random.Generator:
        sequence = np.random.SeedSequence(self.seed, spawn_key=key)
        return np.random.Generator(np.random.PCG64(sequence))


def _new_seed() -> int:
    return secrets.randbits(128)


class _Requests:
    """The batch sampler of the inner DataLoader.

    DataLoader may iterate over it several times for one pass (it does where it has workers), so
    an iterator must not depend on the earlier ones.
    """

    source: Callable[[], Iterator[list[int]]] = staticmethod(lambda: iter(()))

    def __iter__(self) -> Iterator[list[int]]:
        return self.source()


def _index_lists(stream: _Stream, draws: range, is_structure_known: bool) -> Iterator[list[int]]:
    """Yields what is to be fetched: the draws that are not empty.

    No collate function can be asked for a batch of nothing. Where the first draw is empty and no
    batch was seen before, one example is fetched in its place, to learn the structure from.
    """
    for draw in draws:
        indices = stream.indices(draw)
        if indices or not is_structure_known:
            yield indices or [0]
        is_structure_known = True


def _template(batch: Any) -> tuple[Any] | Exception:
    """Returns a batch without rows, or why there is none: only an empty draw needs to know."""
    try:
        return (_without_rows(batch),)
    except (TypeError, ValueError) as error:
        return error.with_traceback(None)  # which would keep the batch alive


def _without_rows(batch: Any) -> Any:
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
def _preserved_random_state() -> Iterator[None]:
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _checked_length(dataset: Any) -> int:
    is_iterable = isinstance(dataset, torch.utils.data.IterableDataset)
    if is_iterable or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise TypeError(
            f"`dataset` must be a map-style dataset, with __len__ and __getitem__, got "
            f"{type(dataset).__name__}. Poisson subsampling picks examples by their index: load "
            f"them into a list, or write a torch.utils.data.Dataset that reads them by index."
        )
    if len(dataset) == 0:
        raise ValueError("`dataset` must not be empty, got length 0. Pass one with examples.")
    return len(dataset)


def _default_start_method() -> str:
    available = multiprocessing.get_all_start_methods()
    return "forkserver" if "forkserver" in available else "spawn"


_VERSION = 1


def _checked_state(state: Any, here: dict[str, Any]) -> tuple[int, int, int]:
    """Returns the seed, the pass and the position of a saved state, all of it checked."""
    if not isinstance(state, Mapping) or set(state) != set(here):
        got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(
            f"`state` must have the keys {sorted(here)}, got {got}. "
            f"Load what PoissonLoader.state_dict returned."
        )
    for key in ("version", "steps", "num_examples", "sampling_prob"):
        if state[key] != here[key]:
            raise ValueError(
                f"`state[{key!r}]` must be this loader's {here[key]!r}, got {state[key]!r}. "
                f"Make the loader as the saved one was made."
            )
    hint = "Load an unchanged state_dict."
    try:
        seed, number, position = (
            _validate.integer(f"state[{key!r}]", state[key], hint, minimum=0)
            for key in ("seed", "pass", "position")
        )
    except TypeError as error:
        raise ValueError(str(error)) from error
    if position > here["steps"]:
        raise ValueError(
            f"`state['position']` must be at most {here['steps']}, got {position}. {hint}"
        )
    return seed, number, position
