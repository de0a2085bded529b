"""The loader of a plan: its batches are those that the plan's epsilon was computed for.

Example:
    >>> import torch
    >>> from dpkernels.execution_plan import DPSGDConfig
    >>> plan = DPSGDConfig(iterations=3, sampling_prob=0.05, noise_multiplier=1.0).make()
    >>> dataset = torch.utils.data.TensorDataset(torch.randn(1000, 8), torch.arange(1000))
    >>> loader = PlanLoader(plan, dataset, accumulation_steps=2, seed=0)
    >>> for x, y in loader:
    ...     assert x.shape == (len(y), 8)
    >>> len(loader), loader.draws_begun
    (6, 3)
"""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dpbridge.loading import (
    Fetcher,
    check_position,
    checked_length,
    checked_options,
    checked_place,
    checked_seed,
    generator_of,
)
from dpbridge.plan_draws import NO_USERS, PlanDraws
from dpkernels import _validate
from dpkernels.batch_selection import BatchSelectionStrategy, UserSelectionStrategy
from dpkernels.execution_plan import DPExecutionPlan


class PlanLoader:
    """Draws the batches of a plan, each once and in the plan's order.

    The whole plan is one pass of `plan.iterations` *draws*, the logical batches, or several passes
    of `draws_per_pass` draws: draw t is for the t-th step of the plan. A draw may be empty; it is a
    batch like the others then, with the same structure, dtypes and trailing shapes, and 0 rows.

    With `accumulation_steps` of k each draw comes as k physical batches, for loops that add up
    gradients over k batches before each step. Their sizes differ by 1 at most, so that some are
    empty where the draw is small.

    Batch t may depend on the batches before it, and the plan's accounting holds for these draws
    in this order. So, unlike with `PoissonLoader`, a loop that is left (a `break`) does not end
    the pass: the next iteration goes on with the next physical batch, in the middle of a draw if
    it was left there, and draws that were prefetched are kept for it. After the last batch there
    is nothing to go on with, and a new iteration is an error.

    Worker processes are started by "forkserver", or "spawn" where that does not exist, not by
    "fork": JAX runs threads, and a forked copy of a process with threads can deadlock. So the
    dataset and `collate_fn` must be picklable and a script needs the usual
    `if __name__ == "__main__":`. Pass `multiprocessing_context="fork"` to decide otherwise.

    A copy (`copy.copy`, `copy.deepcopy`, and pickle where the plan can be pickled) of a loader
    without a given seed gets a new seed and starts from the plan's first draw: two runs that train
    on the same secret draws would not compose as accounted. With a given seed a copy is at the
    same place of the same draws. Every copy but a pickled one shares the plan.

    Guarantees:
        * The draws are those of one `batch_iterator` of the plan's strategy, each of them and in
          its order, and no more than `plan.iterations`.
        * The physical batches of a draw are parts of it: no example is added, lost or repeated.
        * No example is twice in a draw, unless the plan is not private; such a draw is refused.
        * No draw is begun twice, also after a loop that was left, unless an older state is loaded.
        * With a saved state a new loader yields the same remaining batches, whatever the number
          of workers and however far they had prefetched; where it cannot, it refuses the state.
        * Without a given seed the draws follow from 128 bits of the operating system.
        * PyTorch's global random state is neither used nor changed by the loader.
    """

    def __init__(
        self,
        plan: DPExecutionPlan,
        dataset: Any,
        *,
        accumulation_steps: int = 1,
        draws_per_pass: int | None = None,
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
        """Checks the plan, the dataset and the options; draws nothing and reads no example.

        Args:
            plan: Says how batches are drawn and how many.
            dataset: A map-style dataset: anything with `__len__` and `__getitem__`, such as a
                `TensorDataset` or a list of examples.
            accumulation_steps: As how many physical batches each draw is yielded.
            draws_per_pass: After how many draws an iteration ends, for loops over epochs; by
                default after the last of the plan. The next iteration goes on from there.
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
            ValueError: If the dataset is empty or not of the size that the plan was made for, or
                an argument is outside its range.
            NotImplementedError: If the plan draws users instead of examples.
        """
        num_examples = checked_length(dataset)
        _check_plan(plan, num_examples)
        self._plan, self._dataset, self._num_examples = plan, dataset, num_examples
        hint = "Pass into how many parts each draw is cut, 1 for no cut."
        self._accumulation_steps = _validate.integer(
            "accumulation_steps", accumulation_steps, hint, minimum=1
        )
        hint = "Pass the draws of an epoch, or None for all of the plan's."
        if draws_per_pass is not None:
            draws_per_pass = _validate.integer("draws_per_pass", draws_per_pass, hint, minimum=1)
        self._draws_per_pass = min(draws_per_pass or plan.iterations, plan.iterations)
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
        self._is_restored = False  # and was not iterated over since
        self._owner: weakref.ref[Any] | None = None
        self._fetcher = Fetcher(dataset, self._options)
        self._go_to(self._drawn_until(checked_seed(seed), 0), 0)

    def _drawn_until(self, seed: int, position: int) -> PlanDraws:
        """Returns the draws of a seed at a place."""
        draws = PlanDraws(self._plan, self._num_examples, seed)
        for _ in range(-(-position // self._accumulation_steps)):
            draws.begin_next()
        return draws

    def _go_to(self, draws: PlanDraws, position: int) -> None:
        self._draws, self._position = draws, position  # in physical batches yielded
        self._running: object | None = None  # identifies the iterator that may go on

    @property
    def plan(self) -> DPExecutionPlan:
        """The plan."""
        return self._plan

    @property
    def dataset(self) -> Any:
        """The dataset."""
        return self._dataset

    @property
    def accumulation_steps(self) -> int:
        """As how many physical batches each draw is yielded."""
        return self._accumulation_steps

    @property
    def draws_begun(self) -> int:
        """Of how many draws at least one physical batch was yielded."""
        return self._draws.begun

    @property
    def draw_size(self) -> int | None:
        """How many examples the draw holds that was begun last; None before the first.

        It is not private.
        """
        return len(self._draws[self._draws.begun - 1]) if self._draws.begun else None

    @property
    def part_size(self) -> int | None:
        """How many examples the physical batch holds that was yielded last; None before it."""
        if not self._position:
            return None
        return len(self._draws.part(self._position - 1, self._accumulation_steps))

    @property
    def digest(self) -> str:
        """A hash of the draws that were begun, the last included. As secret as they are."""
        return self._draws.digest

    @property
    def digest_before(self) -> str:
        """A hash of the draws before the one that was begun last."""
        return self._draws.digest_before

    def claim(self, owner: Any) -> None:
        """Makes `owner` the one that takes the steps on these draws.

        Raises:
            ValueError: If another one does, and still exists: both together would release more
                than the plan accounts for.
        """
        held = self._owner() if self._owner is not None else None
        if held is not None and held is not owner:
            del held
            gc.collect()  # It may be left in a cycle, as of a notebook's cell that was run again.
            held = self._owner() if self._owner is not None else None
            if held is not None:
                raise ValueError(
                    "`loader` must serve one optimizer, got one that another optimizer holds. "
                    "Make a plan and a loader for each run; put all parameters of a model into "
                    "one optimizer."
                )
        self._owner = weakref.ref(owner)

    @property
    def parts_yielded(self) -> int:
        """How many physical batches were yielded of the draw that was begun last."""
        return self._position - max(self._draws.begun - 1, 0) * self._accumulation_steps

    @property
    def _total(self) -> int:
        """How many physical batches the plan has."""
        return self._plan.iterations * self._accumulation_steps

    def __len__(self) -> int:
        """How many physical batches a pass has, those that were yielded included.

        The last pass has fewer if `draws_per_pass` does not divide the plan's draws.
        """
        return self._draws_per_pass * self._accumulation_steps

    def __iter__(self) -> Iterator[Any]:
        """Goes on with the next physical batch of the plan, to the end of its pass.

        Only one iterator may go on: an older one raises RuntimeError when it is used again.

        Raises:
            RuntimeError: If all of them were yielded, and no state was loaded since.
        """
        if self._position == self._total and not self._is_restored:
            raise RuntimeError(
                f"The plan's batches are used up: all {self._plan.iterations} draws were yielded, "
                f"and the plan's epsilon holds for no more. Iterate once; for more epochs, make a "
                f"plan of more iterations."
            )
        self._is_restored = False
        self._running = running = object()
        draws, per_draw = self._draws, self._accumulation_steps
        end = (self._position // len(self) + 1) * len(self)
        parts = range(self._position, min(end, self._total))
        batches = self._fetcher.start(
            lambda: (draws.part(number, per_draw).tolist() for number in parts),
            (len(draws.part(number, per_draw)) for number in parts),
            # Other random numbers in the workers than from any other place on.
            worker_seed=int(generator_of(draws.seed, 1, parts.start).integers(2**63)),
        )
        return self._run(running, len(parts), batches)

    def _run(self, running: object, count: int, batches: Iterator[Any]) -> Iterator[Any]:
        for _ in range(count):
            if self._running is not running:
                raise RuntimeError(
                    "This iterator has ended: a newer iteration over the PlanLoader was started, "
                    "or a state was loaded. Use one iterator at a time."
                )
            batch = next(batches)
            if self._position % self._accumulation_steps == 0:
                self._draws.begin_next()
            self._position += 1
            yield batch
        if self._running is running:
            next(batches, None)  # past its end

    def state_dict(self) -> dict[str, Any]:
        """Returns the place in the plan, in plain types.

        Taken in the body of a loop, it counts the batch of that body as yielded. It holds the
        seed: whoever reads it knows which examples were in which batch.
        """
        return {
            "version": _VERSION,
            "seed": self._draws.seed,
            "position": self._position,
            "digest": self._draws.digest,
            "iterations": self._plan.iterations,
            "accumulation_steps": self._accumulation_steps,
            "num_examples": self._num_examples,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved place; the next iteration goes on there.

        The strategy makes the draws before that place again, which takes the time that they
        took, without their examples. After the last batch the next iteration yields nothing: the
        loop that was interrupted there had no more to do.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: If `state` is not what `state_dict` returns, or was saved by a loader of
                another plan, with other `accumulation_steps` or with a dataset of another length;
                nothing is changed then.
        """
        seed, position = checked_place(
            state,
            self.state_dict(),
            places=("seed", "position"),
            others=("digest",),
            owner=type(self).__name__,
        )
        check_position(position, self._total)
        draws = self._drawn_until(seed, position)
        if draws.digest != state["digest"]:
            raise ValueError(
                "`state['digest']` must be that of the draws that this loader's plan makes of the "
                "seed, got another. Make the plan as the saved one was made, with the same version "
                "of NumPy."
            )
        self._go_to(draws, position)
        self._is_restored = True

    def __getstate__(self) -> dict[str, Any]:
        return {
            "plan": self._plan,
            "dataset": self._dataset,
            "num_examples": self._num_examples,
            "accumulation_steps": self._accumulation_steps,
            "draws_per_pass": self._draws_per_pass,
            "options": self._options,
            "place": (self._draws.seed, self._position) if self._has_given_seed else None,
            "is_restored": self._is_restored and self._has_given_seed,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._plan, self._dataset = state["plan"], state["dataset"]
        self._num_examples = state["num_examples"]
        self._accumulation_steps, self._options = state["accumulation_steps"], state["options"]
        self._draws_per_pass = state["draws_per_pass"]
        self._has_given_seed = state["place"] is not None
        self._is_restored = state["is_restored"]
        self._owner = None
        self._fetcher = Fetcher(self._dataset, self._options)
        seed, position = state["place"] or (checked_seed(None), 0)
        self._go_to(self._drawn_until(seed, position), position)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PlanLoader":
        memo[id(self._plan)] = self._plan  # a value, by which an optimizer tells its own loader
        other = type(self).__new__(type(self))
        other.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return other


_VERSION = 1


def _check_plan(plan: Any, num_examples: int) -> None:
    if not isinstance(plan, DPExecutionPlan):
        raise TypeError(
            f"`plan` must be a DPExecutionPlan, got {type(plan).__name__}. Pass what the `make` of "
            f"a config returns."
        )
    strategy = plan.batch_selection_strategy
    if isinstance(strategy, UserSelectionStrategy):
        raise NotImplementedError(NO_USERS)
    if not isinstance(strategy, BatchSelectionStrategy):
        raise TypeError(
            f"`plan.batch_selection_strategy` must be a BatchSelectionStrategy, got "
            f"{type(strategy).__name__}. Choose one of dpkernels.batch_selection."
        )
    planned = getattr(plan.config, "num_examples", None)
    if planned is not None and planned != num_examples:
        raise ValueError(
            f"`dataset` must have the {planned} examples that the plan was made for, got "
            f"{num_examples}. Make the plan with num_examples={num_examples}."
        )
