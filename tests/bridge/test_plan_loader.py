import collections
import copy
import dataclasses
import io
import itertools
import multiprocessing
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import dp_accounting
import hypothesis
import numpy as np
import optax
import pytest
import torch
from dp_accounting import NeighboringRelation
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from dpbridge.plan_loader import PlanLoader
from dpkernels import clipped_grad
from dpkernels.batch_selection import (
    BallsInBinsSampling,
    BatchSelectionStrategy,
    BMinSepSampling,
    CyclicPoissonSampling,
    FixedBatchSampling,
    PartitionType,
    RandomAllocationSampling,
    UserSelectionStrategy,
)
from dpkernels.execution_plan import BandMFConfig, DPExecutionPlan, DPSGDConfig, NonPrivateConfig


@dataclasses.dataclass(frozen=True)
class Listed(BatchSelectionStrategy):
    """Draws what it was given, in an array that it uses again."""

    draws: Any
    iterations: int
    started: list[int] = dataclasses.field(default_factory=list)

    def batch_iterator(self, num_examples: int, rng: Any = None) -> Iterator[np.ndarray]:
        self.started.append(num_examples)
        for draw in self.draws:
            shared = np.array(draw)
            yield shared
            shared[...] = -1


def listed(*draws: Any) -> Listed:
    return Listed([np.array(draw, np.int32) for draw in draws], len(draws))


def plan_of(strategy: Any, **parts: Any) -> DPExecutionPlan:
    """A plan put together by hand around a strategy."""
    return DPExecutionPlan(
        **{
            "clipped_grad": clipped_grad,
            "batch_selection_strategy": strategy,
            "noise_addition_transform": optax.identity(),
            "dp_event": dp_accounting.GaussianDpEvent(1.0),
            "neighboring_relation": NeighboringRelation.ADD_OR_REMOVE_ONE,
        }
        | parts
    )


# Its draws are few enough for empty ones, and each depends on the ones before.
SPARSE = BMinSepSampling(sampling_prob=0.02, iterations=8, min_sep=4)


def make_loader(strategy: Any = SPARSE, *, examples: int = 60, **options: Any) -> PlanLoader:
    """A loader whose examples are their own indices."""
    dataset = TensorDataset(torch.arange(examples))
    return PlanLoader(plan_of(strategy), dataset, **{"seed": 1} | options)


def parts(batches: Any) -> list[list[int]]:
    return [batch[0].tolist() for batch in batches]


def take(loader: PlanLoader, count: int) -> list[list[int]]:
    """The next batches; then the loop is left."""
    return [batch[0].tolist() for _, batch in zip(range(count), loader, strict=False)]


STRATEGIES = [
    CyclicPoissonSampling(sampling_prob=0.1, iterations=6),
    CyclicPoissonSampling(sampling_prob=0.5, iterations=6, cycle_length=3),
    CyclicPoissonSampling(
        sampling_prob=0.5, iterations=6, cycle_length=3, partition_type=PartitionType.INDEPENDENT
    ),
    CyclicPoissonSampling(sampling_prob=0.5, iterations=6, truncated_batch_size=7),
    BallsInBinsSampling(iterations=6, cycle_length=4),
    RandomAllocationSampling(total_participations=2, iterations=6),
    FixedBatchSampling(batch_size=7, iterations=6),
    SPARSE,
]


@dataclasses.dataclass(frozen=True)
class Recorded(BatchSelectionStrategy):
    """Draws as another strategy, and keeps what it drew."""

    strategy: BatchSelectionStrategy
    drawn: list[list[int]] = dataclasses.field(default_factory=list)

    @property
    def iterations(self) -> int:
        return self.strategy.iterations

    def batch_iterator(self, num_examples: int, rng: Any = None) -> Iterator[np.ndarray]:
        for draw in self.strategy.batch_iterator(num_examples, rng):
            self.drawn.append(draw.tolist())
            yield draw


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_plan_loader_yields_the_draws_of_the_strategy(strategy: BatchSelectionStrategy) -> None:
    recorded = Recorded(strategy)
    assert parts(make_loader(recorded)) == recorded.drawn
    assert len(recorded.drawn) == strategy.iterations


@pytest.mark.parametrize(
    "config",
    [
        DPSGDConfig(iterations=5, sampling_prob=0.1, noise_multiplier=1.0),
        BandMFConfig(
            iterations=5,
            expected_participations=1,
            strategy=(1.0, 0.5),
            noise_multiplier=1.0,
            num_examples=60,
        ),
        NonPrivateConfig(iterations=5, batch_size=7),
    ],
    ids=lambda config: type(config).__name__,
)
def test_plan_loader_takes_the_plans_of_configs(config: Any) -> None:
    plan = config.make()
    loader = PlanLoader(plan, TensorDataset(torch.arange(60)), seed=0)
    recorded = Recorded(plan.batch_selection_strategy)
    other = PlanLoader(plan_of(recorded), loader.dataset, seed=0)
    assert parts(loader) == parts(other)
    assert len(recorded.drawn) == 5


def test_plan_loader_asks_for_one_iterator() -> None:
    strategy = listed(*[[number] for number in range(6)])
    loader = make_loader(strategy)
    assert take(loader, 2) + take(loader, 1) + parts(loader) == [[n] for n in range(6)]
    assert strategy.started == [60]


@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_plan_loader_length_is_that_of_the_plan(accumulation_steps: int) -> None:
    loader = make_loader(accumulation_steps=accumulation_steps)
    lengths = [len(loader)] + [len(loader) for _ in loader]
    assert set(lengths) == {8 * accumulation_steps}
    assert len(lengths) == 1 + 8 * accumulation_steps


def test_plan_loader_attributes_are_the_users() -> None:
    plan, dataset = plan_of(SPARSE), [torch.zeros(2)]
    loader = PlanLoader(plan, dataset, accumulation_steps=3)
    assert (loader.plan, loader.dataset, loader.accumulation_steps) == (plan, dataset, 3)
    assert loader.plan is plan
    assert loader.dataset is dataset


@pytest.mark.parametrize(
    "name",
    ["plan", "dataset", "accumulation_steps", "draws_begun", "draw_size", "parts_yielded"],
)
def test_plan_loader_attributes_cannot_be_set(name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        setattr(make_loader(), name, 1)


# -- physical batches


@pytest.mark.parametrize("accumulation_steps", [1, 2, 3, 7])
def test_plan_loader_cuts_each_draw_into_as_many_parts(accumulation_steps: int) -> None:
    cut = parts(make_loader(accumulation_steps=accumulation_steps))
    groups = [
        cut[start : start + accumulation_steps] for start in range(0, len(cut), accumulation_steps)
    ]
    assert [list(itertools.chain(*group)) for group in groups] == parts(make_loader())
    assert all(max(map(len, group)) - min(map(len, group)) <= 1 for group in groups)


def test_plan_loader_counts_draws_and_parts() -> None:
    loader = make_loader(listed([1, 2, 3], [], [4]), accumulation_steps=2)

    def counts() -> tuple[int, int | None, int]:
        return loader.draws_begun, loader.draw_size, loader.parts_yielded

    assert counts() == (0, None, 0)
    assert [counts() for _ in loader] == [
        (1, 3, 1),
        (1, 3, 2),
        (2, 0, 1),
        (2, 0, 2),
        (3, 1, 1),
        (3, 1, 2),
    ]
    assert counts() == (3, 1, 2)


def test_plan_loader_counts_no_draw_that_is_only_prefetched() -> None:
    loader = make_loader()
    assert iter(loader)
    assert (loader.draws_begun, loader.draw_size, loader.parts_yielded) == (0, None, 0)


# -- empty draws


class Squares(Dataset[dict[str, Any]]):
    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.reads += 1
        noise = random.random() + np.random.random() + torch.rand(())
        return {"x": torch.full((3,), float(index)) + noise, "y": (index, float(index) ** 2)}


@pytest.mark.parametrize("draws", [([], [], [4, 5]), ([4, 5], [], []), ([], [])])
def test_plan_loader_empty_draw_has_the_structure_of_the_others(draws: Any) -> None:
    batches = list(PlanLoader(plan_of(listed(*draws)), Squares(), accumulation_steps=2))
    sizes = [len(half) for draw in draws for half in np.array_split(draw, 2)]
    for batch, size in zip(batches, sizes, strict=True):
        assert batch["x"].shape == (size, 3)
        assert [tuple(y.shape) for y in batch["y"]] == [(size,), (size,)]
        assert [y.dtype for y in batch["y"]] == [torch.int64, torch.float64]


def test_plan_loader_empty_draws_read_one_example_at_most() -> None:
    dataset = Squares()
    list(PlanLoader(plan_of(listed([], [], [], [])), dataset, accumulation_steps=2))
    assert dataset.reads == 1


def test_plan_loader_reads_what_is_drawn_and_nothing_else() -> None:
    dataset = Squares()
    list(PlanLoader(plan_of(listed([1, 2], [], [3], [])), dataset, accumulation_steps=3))
    assert dataset.reads == 3


def test_plan_loader_neither_uses_nor_changes_the_global_random_state() -> None:
    def states() -> tuple[Any, ...]:
        key = np.random.get_state()[1]
        return random.getstate(), bytes(key), bytes(torch.get_rng_state().tolist())

    before = states()
    first = parts(make_loader())
    list(PlanLoader(plan_of(listed([], [])), Squares()))
    assert states() == before
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    assert parts(make_loader()) == first


def test_plan_loader_empty_draw_refuses_leaves_without_rows() -> None:
    loader = make_loader(listed([1], []), collate_fn=lambda examples: "text")
    with pytest.raises(TypeError, match="got 'text' at batch"):
        list(loader)


# -- one pass


@hypothesis.given(
    st.lists(st.integers(0, 9), max_size=5), st.integers(1, 3), st.sampled_from([SPARSE, None])
)
def test_plan_loader_goes_on_where_a_loop_was_left(
    counts: list[int], accumulation_steps: int, strategy: Any
) -> None:
    # Without a memory, as well as with one.
    strategy = strategy or CyclicPoissonSampling(sampling_prob=0.05, iterations=8)
    options: dict[str, Any] = {"strategy": strategy, "accumulation_steps": accumulation_steps}
    whole = parts(make_loader(**options))
    loader, seen = make_loader(**options), []
    for count in counts:
        if len(seen) < len(loader):
            seen += take(loader, count)
    if len(seen) < len(loader):
        seen += parts(loader)
    assert seen == whole


def test_plan_loader_goes_on_in_the_middle_of_a_draw() -> None:
    loader = make_loader(listed([1, 2], [3, 4]), accumulation_steps=2)
    assert take(loader, 1) == [[1]]
    assert parts(loader) == [[2], [3], [4]]


class Failing(Dataset[int]):
    """Fails once, at an example."""

    def __init__(self, index: int) -> None:
        self.index: int | None = index

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[torch.Tensor]:
        if index == self.index:
            self.index = None
            raise OSError("no disk")
        return (torch.tensor(index),)


def test_plan_loader_loses_no_draw_to_an_error_of_the_dataset() -> None:
    loader = PlanLoader(plan_of(listed([1], [2, 3], [4])), Failing(3))
    with pytest.raises(OSError, match="no disk"):
        parts(loader)
    assert loader.draws_begun == 1
    assert parts(loader) == [[2, 3], [4]]


def test_plan_loader_refuses_a_second_pass() -> None:
    loader = make_loader()
    list(loader)
    with pytest.raises(RuntimeError, match="plan's batches are used up: all 8 draws"):
        iter(loader)


def test_plan_loader_refuses_to_go_on_after_a_break_at_the_last_batch() -> None:
    loader = make_loader()
    batches = iter(loader)
    for _ in range(8):
        next(batches)
    with pytest.raises(RuntimeError, match="plan's batches are used up"):
        iter(loader)


def test_plan_loader_refuses_an_iterator_when_a_newer_one_was_started() -> None:
    loader = make_loader()
    older = iter(loader)
    next(older)
    rest = parts(loader)
    with pytest.raises(RuntimeError, match="newer iteration"):
        next(older)
    assert len(rest) == 7


def test_plan_loader_refuses_an_iterator_when_a_state_was_loaded() -> None:
    loader = make_loader()
    older = iter(loader)
    next(older)
    loader.load_state_dict(loader.state_dict())
    with pytest.raises(RuntimeError, match="state was loaded"):
        next(older)


# -- seeds


def test_plan_loader_with_a_seed_repeats_itself() -> None:
    assert parts(make_loader(seed=3)) == parts(make_loader(seed=3))


def test_plan_loader_seeds_make_different_draws() -> None:
    assert parts(make_loader(seed=3)) != parts(make_loader(seed=4))


def test_plan_loader_without_a_seed_draws_from_the_operating_system(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Two equal seeds of 128 bits: no more often than once in 2**128 runs.
    assert (
        make_loader(seed=None).state_dict()["seed"] != make_loader(seed=None).state_dict()["seed"]
    )
    asked = []
    monkeypatch.setattr("secrets.randbits", lambda bits: asked.append(bits) or 3)
    assert parts(make_loader(seed=None)) == parts(make_loader(seed=3))
    assert asked == [128]


# -- state


def saved_and_loaded(loader: PlanLoader) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(loader.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


def restored(loader: PlanLoader, **options: Any) -> PlanLoader:
    other = make_loader(**{"seed": None, "accumulation_steps": loader.accumulation_steps} | options)
    other.load_state_dict(saved_and_loaded(loader))
    return other


@pytest.mark.parametrize("seed", [1, None])
@pytest.mark.parametrize("strategy", [STRATEGIES[0], STRATEGIES[4], SPARSE], ids=repr)
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_plan_loader_state_dict_resumes_at_the_next_batch(
    accumulation_steps: int, strategy: Any, seed: int | None
) -> None:
    loader = make_loader(strategy, accumulation_steps=accumulation_steps, seed=seed)
    resumed = []
    for yielded in itertools.count():
        other = restored(loader, strategy=strategy)
        resumed.append((yielded, parts(other)))
        if yielded == len(loader):
            break
        take(loader, 1)
    whole = resumed[0][1]
    assert len(whole) == len(loader)
    assert resumed == [(yielded, whole[yielded:]) for yielded in range(len(loader) + 1)]


def test_plan_loader_state_dict_restores_the_counts() -> None:
    for yielded in range(17):
        loader = make_loader(accumulation_steps=2)
        take(loader, yielded)
        other = restored(loader)
        assert (other.draws_begun, other.draw_size, other.parts_yielded) == (
            loader.draws_begun,
            loader.draw_size,
            loader.parts_yielded,
        )
        assert other.state_dict() == loader.state_dict()


def test_plan_loader_state_dict_in_the_body_of_a_loop_counts_its_batch() -> None:
    loader, whole = make_loader(), parts(make_loader())
    for number, _ in enumerate(loader):
        assert parts(restored(loader)) == whole[number + 1 :]


def test_plan_loader_restored_after_the_last_batch_yields_nothing_once() -> None:
    loader = make_loader()
    list(loader)
    other = restored(loader)
    assert list(other) == []
    with pytest.raises(RuntimeError, match="used up"):
        iter(other)


def test_plan_loader_state_dict_can_be_loaded_where_the_loader_is_further_on() -> None:
    loader = make_loader()
    take(loader, 2)
    state = loader.state_dict()
    rest = parts(loader)
    loader.load_state_dict(state)
    assert parts(loader) == rest


def test_plan_loader_state_dict_is_of_plain_types() -> None:
    assert {type(value) for value in make_loader().state_dict().values()} == {int, str}


def changed(**entries: Any) -> dict[str, Any]:
    return make_loader().state_dict() | entries


BAD_STATES = [
    (None, "`state` must have the keys"),
    ({}, "`state` must have the keys.*PlanLoader.state_dict"),
    (changed(more=1), "`state` must have the keys"),
    (changed(version=2), r"`state\['version'\]` must be this loader's 1, got 2"),
    (changed(iterations=6), r"`state\['iterations'\]` must be this loader's 8, got 6"),
    (changed(num_examples=61), r"`state\['num_examples'\]` must be this loader's 60"),
    (changed(accumulation_steps=2), r"`state\['accumulation_steps'\]` must be this loader's 1"),
    (changed(seed=-1), r"`state\['seed'\]` must be at least 0"),
    (changed(seed="1"), r"`state\['seed'\]` must be an integer"),
    (changed(position=9), r"`state\['position'\]` must be at most 8, got 9"),
    (changed(position=1.0), r"`state\['position'\]` must be an integer"),
    (changed(position=1), r"`state\['digest'\]` must be .* same version of NumPy"),
    (changed(seed=2, position=8), r"`state\['digest'\]` must be"),
    (changed(digest=None), r"`state\['digest'\]` must be .*, got another"),
]


@pytest.mark.parametrize(("state", "message"), BAD_STATES)
def test_plan_loader_load_state_dict_names_the_bad_part(state: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_loader().load_state_dict(state)


@pytest.mark.parametrize("state", [state for state, _ in BAD_STATES])
def test_plan_loader_load_state_dict_that_is_refused_changes_nothing(state: Any) -> None:
    loader, whole = make_loader(), parts(make_loader())
    batches = iter(loader)
    next(batches)
    before = loader.state_dict()
    with pytest.raises(ValueError, match="must"):
        loader.load_state_dict(state)
    assert loader.state_dict() == before
    assert parts(batches) == whole[1:]


@pytest.mark.parametrize(
    "change", [{"sampling_prob": 0.03}, {"min_sep": 3}, {"warm_start": False}], ids=repr
)
def test_plan_loader_refuses_the_state_of_another_plan(change: dict[str, Any]) -> None:
    loader = make_loader()
    take(loader, 6)
    other = make_loader(dataclasses.replace(SPARSE, **change))
    with pytest.raises(ValueError, match=r"state\['digest'\].*Make the plan as the saved one"):
        other.load_state_dict(loader.state_dict())


@dataclasses.dataclass(frozen=True)
class Unseeded(BatchSelectionStrategy):
    """Draws from other numbers than those it is given."""

    iterations: int = 8

    def batch_iterator(self, num_examples: int, rng: Any = None) -> Iterator[np.ndarray]:
        for _ in range(self.iterations):
            yield np.random.default_rng().permutation(num_examples)


def test_plan_loader_refuses_to_resume_draws_that_do_not_follow_from_the_seed() -> None:
    loader = make_loader(Unseeded())
    take(loader, 1)
    # One of 60! orders: equal by chance in no run.
    with pytest.raises(ValueError, match=r"state\['digest'\]"):
        loader.load_state_dict(loader.state_dict())


# -- copies

COPIES: list[Callable[[PlanLoader], PlanLoader]] = [copy.copy, copy.deepcopy]


@pytest.mark.parametrize("copied", COPIES)
def test_plan_loader_copy_draws_the_plan_anew(copied: Callable[[PlanLoader], PlanLoader]) -> None:
    loader = make_loader(CyclicPoissonSampling(sampling_prob=0.5, iterations=8), seed=None)
    first = take(loader, 3)
    other = copied(loader)
    assert (loader.draws_begun, other.draws_begun) == (3, 0)
    drawn = parts(other)
    assert len(drawn) == 8
    # One of 60 coin flips, three times: equal by chance with probability 2**-180.
    assert drawn[:3] != first


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("yielded", [0, 3, 16])
def test_plan_loader_copy_with_a_given_seed_is_at_the_same_place(
    copied: Callable[[PlanLoader], PlanLoader], yielded: int
) -> None:
    loader = make_loader(accumulation_steps=2)
    take(loader, yielded)
    other = copied(loader)
    assert other.state_dict() == loader.state_dict()
    if yielded < 16:
        assert parts(other) == parts(loader)


@pytest.mark.parametrize("copied", COPIES)
def test_plan_loader_copy_shares_the_plan(copied: Callable[[PlanLoader], PlanLoader]) -> None:
    loader = make_loader()
    assert copied(loader).plan is loader.plan


def test_plan_loader_deep_copy_has_its_own_dataset() -> None:
    loader = make_loader()
    other = copy.deepcopy(loader)
    assert other.dataset is not loader.dataset
    assert len(other.dataset) == len(loader.dataset)


def picklable_loader(seed: int | None) -> PlanLoader:
    """By hand: the closures in the plan of a config cannot be pickled."""
    plan = plan_of(SPARSE, noise_addition_transform=None)
    return PlanLoader(plan, TensorDataset(torch.arange(60)), seed=seed)


def test_plan_loader_pickle_with_a_given_seed_is_at_the_same_place() -> None:
    loader = picklable_loader(1)
    take(loader, 3)
    assert parts(pickle.loads(pickle.dumps(loader))) == parts(loader)


def test_plan_loader_pickle_holds_no_secret_seed() -> None:
    loader = picklable_loader(None)
    seed = loader.state_dict()["seed"]
    data = pickle.dumps(loader)
    assert seed.to_bytes(16, "little") not in data
    assert pickle.loads(data).state_dict()["seed"] != seed


# -- strategies that break their word


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([3, -1], ValueError, "indices from 0 to 59, got -1 to 3 in draw 1.*not padded"),
        ([60], ValueError, "indices from 0 to 59, got 60 to 60 in draw 1"),
        ([3, 4, 3], ValueError, "no example twice at once, got draw 1 with repeats"),
        ([[1, 2], [3, 4]], NotImplementedError, "users.*clip each example, and not each user"),
        (np.zeros((0, 2), int), NotImplementedError, "draws users"),
        ([1.0], TypeError, r"1-D arrays of integers, got one of shape \(1,\) and dtype float64"),
        ([True], TypeError, "dtype bool"),
        (np.zeros((0,)), TypeError, "dtype float64 as draw 1"),
        (3, TypeError, r"shape \(\)"),
    ],
)
def test_plan_loader_refuses_a_bad_draw(bad: Any, error: type[Exception], message: str) -> None:
    loader = make_loader(Listed([[1], bad, [2]], 3))
    batches = iter(loader)
    assert next(batches)[0].tolist() == [1]
    with pytest.raises(error, match=message):
        next(batches)
    assert loader.draws_begun == 1


def test_plan_loader_puts_no_other_draw_in_the_place_of_a_bad_one() -> None:
    loader = make_loader(Listed([[1], [-1], [2]], 3))
    with pytest.raises(ValueError, match="got -1"):
        list(loader)
    with pytest.raises(RuntimeError, match="got 1 before it ended or failed"):
        list(loader)
    assert loader.draws_begun == 1


@pytest.mark.parametrize(("iterations", "message"), [(4, "4 draws.*got 3 before"), (2, "got more")])
def test_plan_loader_refuses_another_number_of_draws(iterations: int, message: str) -> None:
    loader = make_loader(Listed([[1], [2], [3]], iterations))
    with pytest.raises(RuntimeError, match=f"must make {iterations} draws|{message}") as raised:
        list(loader)
    assert raised.match(message)


def test_plan_loader_lets_a_plan_repeat_examples_that_is_not_private() -> None:
    plan = plan_of(listed([3, 3, 5]), dp_event=dp_accounting.NonPrivateDpEvent())
    assert parts(PlanLoader(plan, TensorDataset(torch.arange(9)))) == [[3, 3, 5]]


def test_plan_loader_refuses_sampling_with_replacement_in_a_private_plan() -> None:
    # 40 draws of 60 without a repeat: 1e-8.
    strategy = FixedBatchSampling(batch_size=40, iterations=1, replace=True)
    with pytest.raises(ValueError, match="draw without replacement"):
        list(make_loader(strategy))


# -- bad input


class Unsized(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))

    def __len__(self) -> int:
        return 10


@pytest.mark.parametrize("dataset", [Endless(), Unsized(), iter([1]), None])
def test_plan_loader_refuses_a_dataset_that_is_not_map_style(dataset: Any) -> None:
    with pytest.raises(TypeError, match="`dataset` must be a map-style"):
        PlanLoader(plan_of(SPARSE), dataset)


def test_plan_loader_refuses_an_empty_dataset() -> None:
    with pytest.raises(ValueError, match="`dataset` must not be empty"):
        PlanLoader(plan_of(SPARSE), [])


def test_plan_loader_refuses_a_dataset_of_another_size_than_the_plans() -> None:
    config = BandMFConfig(
        iterations=5,
        expected_participations=1,
        strategy=(1.0, 0.5),
        noise_multiplier=1.0,
        num_examples=61,
    )
    with pytest.raises(ValueError, match="the 61 examples that the plan was made for, got 60"):
        PlanLoader(config.make(), range(60))


def test_plan_loader_refuses_too_small_a_dataset_at_once() -> None:
    with pytest.raises(ValueError, match="`batch_size` must be at most"):
        make_loader(FixedBatchSampling(batch_size=61, iterations=5))


@pytest.mark.parametrize("plan", [None, SPARSE, DPSGDConfig(iterations=5, sampling_prob=0.1)])
def test_plan_loader_refuses_what_is_not_a_plan(plan: Any) -> None:
    with pytest.raises(TypeError, match=f"`plan` must be a DPExecutionPlan.*{type(plan).__name__}"):
        PlanLoader(plan, range(60))


def test_plan_loader_refuses_users() -> None:
    strategy = UserSelectionStrategy(CyclicPoissonSampling(sampling_prob=0.5, iterations=5))
    with pytest.raises(NotImplementedError, match="draws users with several examples each"):
        make_loader(strategy)


def test_plan_loader_refuses_what_is_not_a_strategy() -> None:
    with pytest.raises(TypeError, match="must be a BatchSelectionStrategy, got list"):
        make_loader([[1, 2]])


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("accumulation_steps", 0, ValueError),
        ("accumulation_steps", 1.0, TypeError),
        ("seed", -1, ValueError),
        ("seed", 0.5, TypeError),
        ("num_workers", -1, ValueError),
        ("num_workers", "1", TypeError),
        ("timeout", 5, ValueError),
        ("prefetch_factor", 2, ValueError),
        ("persistent_workers", True, ValueError),
        ("multiprocessing_context", "spawn", ValueError),
    ],
)
def test_plan_loader_refuses_bad_options(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        make_loader(**{name: value})


@pytest.mark.parametrize("name", ["batch_size", "shuffle", "sampler", "generator", "unknown"])
def test_plan_loader_refuses_unknown_options(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        make_loader(**{name: None})


def test_plan_loader_options_are_keyword_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        PlanLoader(plan_of(SPARSE), [1], 2)


# -- workers: one process at a time, and never by fork, because JAX runs threads here

Observed = collections.namedtuple("Observed", ["left", "resumed", "rest", "processes"])


@pytest.fixture(scope="module")
def with_worker() -> Observed:
    """What a loader with a worker yields, in one go: a worker takes seconds to start."""
    options: dict[str, Any] = {"num_workers": 1, "prefetch_factor": 4, "accumulation_steps": 2}
    loader = make_loader(persistent_workers=True, **options)
    left = take(loader, 3) + take(loader, 4)
    processes = multiprocessing.active_children()
    resumed = parts(restored(loader))  # without a worker
    return Observed(left, resumed, parts(loader), processes)


@pytest.fixture
def without_worker() -> list[list[int]]:
    return parts(make_loader(accumulation_steps=2))


def test_plan_loader_with_workers_loses_no_draw_that_was_prefetched(
    with_worker: Observed, without_worker: list[list[int]]
) -> None:
    assert [] in without_worker
    assert with_worker.left == without_worker[:7]
    assert with_worker.rest == without_worker[7:]


def test_plan_loader_saved_with_workers_resumes_at_the_next_batch_that_was_not_yielded(
    with_worker: Observed, without_worker: list[list[int]]
) -> None:
    assert with_worker.resumed == without_worker[7:]


def test_plan_loader_does_not_fork_a_process_that_runs_threads(with_worker: Observed) -> None:
    started_by = {type(process).__name__ for process in with_worker.processes}
    assert started_by <= {"ForkServerProcess", "SpawnProcess"}
    assert started_by


# Seven draws, as `SPARSE` but for their number.
SEVEN = dataclasses.replace(SPARSE, iterations=7)


def test_passes_divide_the_draws_among_them():
    whole = parts(make_loader(SEVEN))
    loader = make_loader(SEVEN, draws_per_pass=3)
    passes = [parts(loader) for _ in range(3)]
    assert [len(batches) for batches in passes] == [3, 3, 1]
    assert [batch for batches in passes for batch in batches] == whole
    assert len(loader) == 3
    with pytest.raises(RuntimeError, match="used up"):
        iter(loader)


def test_pass_that_was_left_goes_on_to_its_end():
    loader = make_loader(SEVEN, draws_per_pass=3)
    take(loader, 1)
    assert len(list(loader)) == 2
    assert len(list(loader)) == 3


def test_draws_per_pass_must_be_a_count():
    with pytest.raises(ValueError, match="`draws_per_pass` must be at least 1"):
        make_loader(draws_per_pass=0)
