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

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from dpbridge.loading import (
    Fetcher,
    check_position,
    checked_length,
    checked_options,
    checked_place,
    checked_seed,
    generator_of,
)
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
        num_examples = checked_length(dataset)
        hint = "Pass the expected batch size over the size of the dataset."
        sampling_prob = _validate.probability("sampling_prob", sampling_prob, hint)
        hint = "Pass the number of batches of one pass."
        self._steps = _validate.integer("steps", steps, hint, minimum=1)
        self._dataset = dataset
        self._options = checked_options(
            collate_fn=collate_fn,
            num_workers=num_workers,
            pin_memory=pin_memory,
            timeout=timeout,
            worker_init_fn=worker_init_fn,
            multiprocessing_context=multiprocessing_context,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
        )
        self._has_given_seed = seed is not None
        self._stream = _Stream(checked_seed(seed), num_examples, sampling_prob)
        self._pass = 0  # the running pass, or the next one if none is running
        self._position = 0  # how many of its batches were yielded
        self._running: object | None = None  # identifies the iterator of the running pass
        self._fetcher = Fetcher(self._dataset, self._options)

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
        stream, start = self._stream, self._pass * self._steps
        draws = range(start + self._position, start + self._steps)
        batches = self._fetcher.start(
            lambda: map(stream.indices, draws),
            map(stream.size, draws),
            # Other random numbers in the workers than in any other pass, or part of this one.
            worker_seed=stream.worker_seed(draws.start),
        )
        return self._run(running, len(draws), batches)

    def _run(self, running: object, count: int, batches: Iterator[Any]) -> Iterator[Any]:
        for _ in range(count):
            if self._running is not running:
                raise RuntimeError(
                    "This iterator has ended: a newer iteration over the PoissonLoader was "
                    "started, or a state was loaded. Iterate over one pass at a time."
                )
            batch = next(batches)
            self._position += 1
            yield batch
        if self._running is running:
            next(batches, None)  # past its end
            self._pass, self._position, self._running = self._pass + 1, 0, None

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

        The draws after that place come again. Where an optimizer's journal counts the steps that
        were made on them, new steps need new draws, for which epsilon holds: use a new loader.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: If `state` is not what `state_dict` returns, or was saved by a loader with
                other `steps`, another `sampling_prob` or a dataset of another length; nothing is
                changed then.
        """
        seed, number, position = checked_place(
            state, self.state_dict(), places=("seed", "pass", "position"), owner="PoissonLoader"
        )
        check_position(position, self._steps)
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
        self._stream = state["stream"]._replace(seed=place["seed"] if place else checked_seed(None))
        self._pass, self._position = (place["pass"], place["position"]) if place else (0, 0)
        self._running = None
        self._fetcher = Fetcher(self._dataset, self._options)


_VERSION = 1


class _Stream(NamedTuple):
    """The endless stream of draws: draw t is a function of these fields and t."""

    seed: int
    num_examples: int
    sampling_prob: float

    def size(self, draw: int) -> int:
        """Returns the size of a draw, without drawing its members."""
        return int(generator_of(self.seed, 0, draw).binomial(self.num_examples, self.sampling_prob))

    def indices(self, draw: int) -> list[int]:
        """Returns the members of a draw.

        A binomial size and a uniform subset of that size have the joint distribution of
        independent coin flips, at a cost that grows with the batch instead of the dataset.
        """
        rng = generator_of(self.seed, 0, draw)
        size = rng.binomial(self.num_examples, self.sampling_prob)
        indices: list[int] = rng.choice(
            self.num_examples, size, replace=False, shuffle=False
        ).tolist()
        return indices

    def worker_seed(self, draw: int) -> int:
        """Returns a seed for the workers' own random numbers from a draw on."""
        return int(generator_of(self.seed, 1, draw).integers(2**63))
