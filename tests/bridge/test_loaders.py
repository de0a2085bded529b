import collections
import copy
import io
import multiprocessing
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from scipy import stats
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from dpbridge.loaders import PoissonLoader

# Where a statistic decides, the seed is fixed and the test fails one time in a thousand seeds.
SIGNIFICANCE = 1e-3


def make_loader(*, examples: int = 200, **options: Any) -> PoissonLoader:
    """A loader whose examples are their own indices."""
    dataset = TensorDataset(torch.arange(examples))
    return PoissonLoader(dataset, **{"sampling_prob": 0.1, "steps": 5, "seed": 1} | options)


def draws(batches: Any) -> list[list[int]]:
    return [sorted(batch[0].tolist()) for batch in batches]


def take(loader: PoissonLoader, count: int) -> list[list[int]]:
    """The first batches of a new pass, which is then left."""
    return [sorted(batch[0].tolist()) for _, batch in zip(range(count), loader, strict=False)]


@pytest.fixture(scope="module")
def membership() -> np.ndarray:
    """(draws, examples): which example was in which of many batches."""
    loader = make_loader(examples=40, sampling_prob=0.2, steps=4000, seed=0)
    members = np.zeros((4000, 40))
    for row, batch in zip(members, draws(loader), strict=True):
        row[batch] = 1
    return members


def test_loader_includes_each_example_with_the_sampling_probability(
    membership: np.ndarray,
) -> None:
    count = len(membership)
    z = (membership.sum(axis=0) - 0.2 * count) / np.sqrt(0.2 * 0.8 * count)
    assert stats.chi2.sf((z**2).sum(), z.size) > SIGNIFICANCE


def test_loader_batch_sizes_are_binomial(membership: np.ndarray) -> None:
    sizes = membership.sum(axis=1).astype(int)
    edges = np.arange(3, 14)  # sizes up to 3, 4, ..., 12, and above
    observed = np.bincount(np.searchsorted(edges, sizes), minlength=len(edges) + 1)
    cdf = stats.binom.cdf(edges, 40, 0.2)
    expected = np.diff(cdf, prepend=0, append=1) * len(sizes)
    assert stats.chisquare(observed, expected).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_loader_inclusions_are_pairwise_independent(membership: np.ndarray, lag: int) -> None:
    standard = (membership - 0.2) / np.sqrt(0.2 * 0.8)
    earlier, later = standard[: len(standard) - lag], standard[lag:]
    z = earlier.T @ later / np.sqrt(len(later))
    pairs = z[np.triu_indices(len(z), 1)] if lag == 0 else z.ravel()
    assert stats.chi2.sf((pairs**2).sum(), pairs.size) > SIGNIFICANCE


@pytest.mark.parametrize(("examples", "sampling_prob"), [(10**6, 1e-5), (3, 0.5), (1, 0.5)])
def test_loader_mean_batch_size_is_the_expected_one(examples: int, sampling_prob: float) -> None:
    loader = PoissonLoader(
        range(examples), sampling_prob=sampling_prob, steps=2000, collate_fn=len_as_rows, seed=3
    )
    total = sum(len(batch) for batch in loader)
    p_value = stats.binomtest(total, 2000 * examples, sampling_prob).pvalue
    assert p_value > SIGNIFICANCE


def len_as_rows(examples: list[int]) -> torch.Tensor:
    return torch.zeros(len(examples))


def test_loader_batch_has_no_example_twice() -> None:
    assert all(len(set(batch)) == len(batch) for batch in draws(make_loader(sampling_prob=0.7)))


def test_loader_with_probability_one_yields_everything() -> None:
    assert draws(make_loader(sampling_prob=1)) == [list(range(200))] * 5


def test_loader_length_is_steps() -> None:
    assert len(make_loader(steps=7)) == 7


@pytest.mark.parametrize("sampling_prob", [1e-9, 0.02, 1.0])
def test_loader_pass_has_exactly_steps_batches(sampling_prob: float) -> None:
    assert len(draws(make_loader(sampling_prob=sampling_prob, steps=7))) == 7


def test_loader_attributes_say_how_it_samples() -> None:
    loader = make_loader(sampling_prob=0.25, steps=7)
    said = (loader.sampling_prob, loader.steps, loader.expected_batch_size)
    assert said == (0.25, 7, 50.0)


def test_loader_dataset_is_the_users() -> None:
    dataset = [torch.zeros(2)]
    assert PoissonLoader(dataset, sampling_prob=1, steps=1).dataset is dataset


@pytest.mark.parametrize("name", ["dataset", "sampling_prob", "steps", "expected_batch_size"])
def test_loader_attributes_cannot_be_set(name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        setattr(make_loader(), name, 1)


# -- datasets and structures


class Squares(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": torch.full((3,), float(index)), "y": (index, float(index) ** 2)}


class Fetched(Squares):
    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        assert indices
        return [self[index] for index in indices]


class Pair(NamedTuple):
    x: torch.Tensor
    y: np.ndarray


def collate_pairs(examples: list[torch.Tensor]) -> Pair:
    return Pair(torch.stack(examples), np.stack([example.numpy() for example in examples]))


@pytest.mark.parametrize(
    "dataset",
    [Squares(), Fetched(), Subset(Fetched(), range(40)), [{"x": torch.ones(3), "y": 1}] * 9],
)
def test_loader_reads_map_style_datasets(dataset: Any) -> None:
    loader = PoissonLoader(dataset, sampling_prob=1.0, steps=1)
    (batch,) = loader
    assert len(batch["x"]) == len(dataset)


def test_loader_reads_a_list_of_tensors_as_examples() -> None:
    (batch,) = PoissonLoader(list(torch.eye(4)), sampling_prob=1.0, steps=1)
    assert batch.shape == (4, 4)


def test_loader_uses_collate_fn() -> None:
    (batch,) = PoissonLoader(
        list(torch.eye(4)), sampling_prob=1.0, steps=1, collate_fn=collate_pairs
    )
    assert isinstance(batch, Pair)


def described(value: Any) -> Any:
    """The structure, dtypes and trailing shapes of a batch."""
    if isinstance(value, dict):
        return {key: described(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [described(item) for item in value]
    return type(value), value.dtype, value.shape[1:]


def rows(value: Any) -> set[int]:
    """The lengths of the first axes in a batch."""
    if isinstance(value, dict | list | tuple):
        items = value.values() if isinstance(value, dict) else value
        return set().union(*map(rows, items))
    return {len(value)}


EMPTY_CASES = [
    (Squares(), None),
    (Fetched(), None),
    (TensorDataset(torch.ones(9, 2, dtype=torch.bfloat16), torch.ones(9, dtype=torch.bool)), None),
    (list(torch.eye(4)), collate_pairs),
    ([(torch.ones(2), [torch.ones(3), {"z": torch.ones(2, 2)}])] * 9, None),
]


def first_of_kind(loader: PoissonLoader, *, is_empty: bool) -> Any:
    return next(batch for batch in loader if (rows(batch) == {0}) == is_empty)


@pytest.mark.parametrize(("dataset", "collate_fn"), EMPTY_CASES)
def test_loader_empty_draw_as_the_first_has_zero_rows(dataset: Any, collate_fn: Any) -> None:
    loader = PoissonLoader(dataset, sampling_prob=1e-9, steps=2, collate_fn=collate_fn, seed=0)
    assert [rows(batch) for batch in loader] == [{0}, {0}]


@pytest.mark.parametrize("sampling_prob", [1e-9, 0.02])
@pytest.mark.parametrize(("dataset", "collate_fn"), EMPTY_CASES)
def test_loader_empty_draw_has_the_structure_of_the_others(
    dataset: Any, collate_fn: Any, sampling_prob: float
) -> None:
    options: dict[str, Any] = {"steps": 200, "collate_fn": collate_fn, "seed": 0}
    empty = first_of_kind(
        PoissonLoader(dataset, sampling_prob=sampling_prob, **options), is_empty=True
    )
    full = first_of_kind(PoissonLoader(dataset, sampling_prob=1.0, **options), is_empty=False)
    assert described(empty) == described(full)


def test_loader_empty_draw_is_the_callers_own() -> None:
    loader = PoissonLoader(Squares(), sampling_prob=1e-9, steps=3)
    assert [len(batch.pop("x")) for batch in loader] == [0, 0, 0]


class Counting(Dataset[torch.Tensor]):
    def __init__(self) -> None:
        self.reads: list[int] = []

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> torch.Tensor:
        self.reads.append(index)
        noise = random.random() + np.random.random() + torch.rand(())
        return torch.full((2,), float(index)) + noise


def test_loader_empty_draws_read_one_example_at_most() -> None:
    dataset = Counting()
    loader = PoissonLoader(dataset, sampling_prob=1e-9, steps=5)
    for _ in range(3):
        list(loader)
    assert len(dataset.reads) == 1


def test_loader_empty_draws_read_nothing_once_a_batch_was_seen() -> None:
    dataset = Counting()
    loader = PoissonLoader(dataset, sampling_prob=0.01, steps=50, seed=2)
    sizes = [len(batch) for batch in loader]
    assert (sizes[0] > 0, 0 in sizes, len(dataset.reads)) == (True, True, sum(sizes))


def random_numbers() -> tuple[float, float, float]:
    return random.random(), np.random.random(), torch.rand(()).item()


def test_loader_empty_draw_leaves_the_random_state_of_transforms() -> None:
    torch.manual_seed(5)
    expected = random_numbers()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(5)
    list(PoissonLoader(Counting(), sampling_prob=1e-9, steps=3))
    assert random_numbers() == expected


def test_loader_neither_uses_nor_changes_the_global_random_state() -> None:
    before = torch.get_rng_state()
    torch.manual_seed(7)
    first = draws(make_loader())
    torch.set_rng_state(before)
    assert draws(make_loader()) == first
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("collate_fn", "message"),
    [
        (lambda examples: (torch.stack(examples), "text"), r"got 'text' at batch\[1\]"),
        (lambda examples: {"n": torch.tensor(1)}, r"got tensor\(1\) at batch\['n'\]"),
        (lambda examples: object(), "at batch. Return a tensor"),
    ],
)
@pytest.mark.parametrize("sampling_prob", [1e-9, 0.1])
def test_loader_empty_draw_refuses_leaves_without_rows(
    collate_fn: Any, message: str, sampling_prob: float
) -> None:
    loader = PoissonLoader(
        list(torch.eye(4)), sampling_prob=sampling_prob, steps=50, collate_fn=collate_fn, seed=0
    )
    with pytest.raises(TypeError, match=message):
        list(loader)


def test_loader_empty_draw_refuses_a_batch_that_is_not_the_first_axis() -> None:
    loader = PoissonLoader(
        list(torch.eye(4)),
        sampling_prob=1e-9,
        steps=1,
        collate_fn=lambda examples: (torch.stack(examples), torch.stack(examples, 1)),
    )
    with pytest.raises(ValueError, match=r"first axes of \{'batch\[0\]': 1, 'batch\[1\]': 4\}"):
        list(loader)


def test_loader_leaves_without_rows_are_fine_while_no_draw_is_empty() -> None:
    loader = PoissonLoader([1, 2], sampling_prob=1.0, steps=3, collate_fn=lambda examples: "text")
    assert list(loader) == ["text"] * 3


# -- the stream of draws


def test_loader_with_a_seed_repeats_itself() -> None:
    assert draws(make_loader(seed=3)) == draws(make_loader(seed=3))


def test_loader_without_a_seed_does_not_repeat_itself() -> None:
    assert draws(make_loader(seed=None)) != draws(make_loader(seed=None))


def test_loader_seeds_make_different_draws() -> None:
    assert draws(make_loader(seed=3)) != draws(make_loader(seed=4))


def test_loader_second_pass_goes_on_with_the_stream() -> None:
    loader = make_loader(steps=5)
    assert draws(loader) + draws(loader) == draws(make_loader(steps=10))


@pytest.mark.parametrize("yielded", [0, 1, 3, 5])
def test_loader_iteration_after_a_break_is_a_full_pass_of_the_next_draws(yielded: int) -> None:
    loader = make_loader(steps=5)
    batches = iter(loader)
    for _ in range(yielded):
        next(batches)
    assert draws(loader) == draws(make_loader(steps=10))[5:]


@hypothesis.given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.booleans())
def test_loader_never_yields_a_draw_twice(counts: list[int], is_restored: bool) -> None:
    loader, seen = make_loader(examples=1000, steps=5), []
    for count in counts:
        seen += take(loader, count)
        if is_restored:
            state = loader.state_dict()
            loader = make_loader(examples=1000, steps=5)
            loader.load_state_dict(state)
    assert len(set(map(tuple, seen))) == len(seen)


def test_loader_refuses_an_iterator_when_a_newer_one_was_started() -> None:
    loader = make_loader()
    older = iter(loader)
    next(older)
    next(iter(loader))
    with pytest.raises(RuntimeError, match="newer iteration"):
        next(older)


def test_loader_refuses_an_iterator_when_a_state_was_loaded() -> None:
    loader = make_loader()
    older = iter(loader)
    next(older)
    loader.load_state_dict(loader.state_dict())
    with pytest.raises(RuntimeError, match="state was loaded"):
        next(older)


# -- state


def restored(loader: PoissonLoader, **options: Any) -> PoissonLoader:
    file = io.BytesIO()
    torch.save(loader.state_dict(), file)
    file.seek(0)
    other = make_loader(**{"seed": None} | options)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize("seed", [1, None])
@pytest.mark.parametrize("yielded", range(6))
def test_loader_state_dict_resumes_at_the_next_batch(yielded: int, seed: int | None) -> None:
    loader = make_loader(seed=seed)
    list(loader)
    batches = iter(loader)
    for _ in range(yielded):
        next(batches)
    resumed = restored(loader)
    assert draws(resumed) == draws(batches)


def test_loader_state_dict_after_a_pass_resumes_with_a_full_one() -> None:
    loader = make_loader()
    list(loader)
    assert draws(restored(loader)) == draws(loader)


def test_loader_state_dict_after_a_resumed_pass_goes_on_with_the_stream() -> None:
    loader = make_loader()
    next(iter(loader))
    resumed = restored(loader)
    list(resumed)
    assert draws(resumed) == draws(make_loader(steps=10))[5:]


def test_loader_state_dict_can_be_loaded_where_the_stream_is_further_on() -> None:
    loader = make_loader()
    state = loader.state_dict()
    first = draws(loader)
    loader.load_state_dict(state)
    assert draws(loader) == first


def test_loader_state_dict_is_of_plain_types() -> None:
    assert {type(value) for value in make_loader().state_dict().values()} == {int, float}


def changed(**entries: Any) -> dict[str, Any]:
    return make_loader().state_dict() | entries


BAD_STATES = [
    (None, "`state` must have the keys"),
    ({}, "`state` must have the keys"),
    (changed(more=1), "`state` must have the keys"),
    (changed(version=2), r"`state\['version'\]` must be this loader's 1, got 2"),
    (changed(steps=6), r"`state\['steps'\]` must be this loader's 5, got 6"),
    (changed(num_examples=201), r"`state\['num_examples'\]` must be this loader's 200"),
    (changed(sampling_prob=0.2), r"`state\['sampling_prob'\]` must be this loader's 0.1"),
    (changed(seed=-1), r"`state\['seed'\]` must be at least 0"),
    (changed(seed="1"), r"`state\['seed'\]` must be an integer"),
    (changed(position=6), r"`state\['position'\]` must be at most 5"),
    (changed(position=1.0), r"`state\['position'\]` must be an integer"),
    ({**changed(), "pass": -1}, r"`state\['pass'\]` must be at least 0"),
]


@pytest.mark.parametrize(("state", "message"), BAD_STATES)
def test_loader_load_state_dict_names_the_bad_part(state: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_loader().load_state_dict(state)


@pytest.mark.parametrize("state", [state for state, _ in BAD_STATES])
def test_loader_load_state_dict_that_is_refused_changes_nothing(state: Any) -> None:
    loader = make_loader()
    take(loader, 2)
    before = loader.state_dict()
    with pytest.raises(ValueError, match="must"):
        loader.load_state_dict(state)
    assert loader.state_dict() == before


# -- copies

COPIES: list[Callable[[PoissonLoader], PoissonLoader]] = [
    copy.copy,
    copy.deepcopy,
    lambda loader: pickle.loads(pickle.dumps(loader)),
]


@pytest.mark.parametrize("copied", COPIES)
def test_loader_copy_draws_anew(copied: Callable[[PoissonLoader], PoissonLoader]) -> None:
    loader = make_loader(seed=None)
    assert draws(copied(loader)) != draws(loader)


@pytest.mark.parametrize("copied", COPIES)
def test_loader_copy_with_a_given_seed_is_at_the_same_place(
    copied: Callable[[PoissonLoader], PoissonLoader],
) -> None:
    loader = make_loader(seed=1)
    batches = iter(loader)
    next(batches)
    assert draws(copied(loader)) == draws(batches)


def test_loader_pickle_holds_no_secret_seed() -> None:
    loader = make_loader(seed=None)
    seed = loader.state_dict()["seed"]
    assert seed.to_bytes(16, "little") not in pickle.dumps(loader)


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
def test_loader_refuses_a_dataset_that_is_not_map_style(dataset: Any) -> None:
    with pytest.raises(TypeError, match=r"`dataset` must be a map-style.*into a list"):
        PoissonLoader(dataset, sampling_prob=0.1, steps=5)


def test_loader_refuses_an_empty_dataset() -> None:
    with pytest.raises(ValueError, match="`dataset` must not be empty"):
        PoissonLoader([], sampling_prob=0.1, steps=5)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("sampling_prob", 0.0, ValueError),
        ("sampling_prob", 1.5, ValueError),
        ("sampling_prob", float("nan"), ValueError),
        ("sampling_prob", "0.1", TypeError),
        ("steps", 0, ValueError),
        ("steps", 1.0, TypeError),
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
def test_loader_refuses_bad_options(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        make_loader(**{name: value})


@pytest.mark.parametrize("name", ["batch_size", "shuffle", "sampler", "generator", "unknown"])
def test_loader_refuses_unknown_options(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        make_loader(**{name: None})


def test_loader_options_are_keyword_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        PoissonLoader([1], 0.1, 5)


# -- workers: one process at a time, and never by fork, because JAX runs threads here

Observed = collections.namedtuple("Observed", ["batches", "processes", "remaining", "next_pass"])


@pytest.fixture(scope="module")
def with_worker() -> Observed:
    """What a loader with a worker yields, in one go: a worker takes seconds to start."""
    loader = make_loader(
        sampling_prob=0.005, steps=8, num_workers=1, prefetch_factor=4, persistent_workers=True
    )
    batches, processes = draws(loader), multiprocessing.active_children()
    take(loader, 3)
    remaining = draws(restored(loader, sampling_prob=0.005, steps=8))
    return Observed(batches, processes, remaining, draws(loader))


@pytest.fixture
def without_worker() -> list[list[int]]:
    return draws(make_loader(sampling_prob=0.005, steps=24))


def test_loader_with_workers_yields_the_same_batches(
    with_worker: Observed, without_worker: list[list[int]]
) -> None:
    assert [] in without_worker[:8]
    assert with_worker.batches == without_worker[:8]


def test_loader_with_workers_resumes_at_the_next_batch_that_was_not_yielded(
    with_worker: Observed, without_worker: list[list[int]]
) -> None:
    assert with_worker.remaining == without_worker[11:16]


def test_loader_with_workers_starts_a_full_pass_after_a_break(
    with_worker: Observed, without_worker: list[list[int]]
) -> None:
    assert with_worker.next_pass == without_worker[16:]


def test_loader_does_not_fork_a_process_that_runs_threads(with_worker: Observed) -> None:
    started_by = {type(process).__name__ for process in with_worker.processes}
    assert started_by <= {"ForkServerProcess", "SpawnProcess"}
    assert started_by


def test_loader_with_workers_and_an_empty_first_draw() -> None:
    loader = make_loader(sampling_prob=1e-9, steps=2, num_workers=1)
    assert draws(loader) == [[], []]
