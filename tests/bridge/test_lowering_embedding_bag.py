"""Bags of embeddings: every mode, whatever the bags, and what is out of range."""

import jax
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowering_checks import (
    assert_model_matches,
    assert_same,
    compare,
    integers,
    lower_function,
    normal,
    requirements,
    tied,
    to_jax,
)

BATCH, ROWS, FEATURES = 3, 5, 4
MODES = ("sum", "mean", "max")


def ids(*shape, size=ROWS):
    return integers(*shape, low=0, high=size)


def in_modes(**options):
    """`embedding_bag` in every mode, as one function with many outputs."""
    return lambda i, w, *offsets: [
        F.embedding_bag(i, w, *offsets, mode=mode, **options) for mode in MODES
    ]


def offsets(*rows):
    """Where bags begin, other places for each example."""
    return torch.tensor(rows)


CASES = {
    "of ids in rows": (in_modes(), ids(2, 6), normal(ROWS, FEATURES)),
    "at ties": (in_modes(), ids(2, 6), tied(ROWS, FEATURES)),
    "with padding": (in_modes(padding_idx=1), ids(3, 4, size=3), tied(ROWS, FEATURES)),
    "of padding alone": (in_modes(padding_idx=-1), ids(2, 3) * 0 + 4, normal(ROWS, FEATURES)),
    "with weights": (
        lambda i, w, s: F.embedding_bag(i, w, mode="sum", per_sample_weights=s, padding_idx=2),
        ids(2, 6),
        normal(ROWS, FEATURES),
        normal(2, 6),
    ),
    "of one bag": (in_modes(), ids(6), normal(ROWS, FEATURES), offsets([0], [0], [0])),
    "at offsets": (
        in_modes(),
        ids(6),
        tied(ROWS, FEATURES),
        offsets([0, 2, 2, 3], [0, 0, 1, 6], [0, 2, 4, 5]),
    ),
    "at offsets, with padding": (
        in_modes(padding_idx=0),
        ids(6, size=2),
        normal(ROWS, FEATURES),
        offsets([0, 2, 3], [0, 1, 3], [0, 6, 6]),
    ),
    "at offsets, with weights": (
        lambda i, w, o, s: F.embedding_bag(i, w, o, mode="sum", per_sample_weights=s),
        ids(6),
        normal(ROWS, FEATURES),
        offsets([0, 2, 3], [0, 1, 3], [0, 6, 6]),
        normal(6),
    ),
    "at offsets, the last included": (
        in_modes(include_last_offset=True),
        ids(6),
        normal(ROWS, FEATURES),
        offsets([0, 2, 6], [0, 0, 6], [0, 6, 6]),
    ),
    "at offsets of its own": (
        lambda i, w: [
            F.embedding_bag(i, w, torch.arange(0, 6, 2)),
            F.embedding_bag(i, w, torch.arange(0, 6, 4)),
            F.embedding_bag(i, w, torch.arange(0, 7, 3), include_last_offset=True),
            F.embedding_bag(i, w, torch.arange(0, 6, 2).mul_(2).clamp_(max=6)),
            F.embedding_bag(i, w, torch.tensor([0, 2])),
        ],
        ids(6),
        normal(ROWS, FEATURES),
    ),
}


@pytest.fixture(scope="module")
def results():
    return compare(CASES)


@pytest.mark.parametrize("name", CASES)
def test_embedding_bag_equals_torch(results, name):
    assert_same(results[name])


class Classifier(nn.Module):
    def __init__(self, mode, **options):
        super().__init__()
        self.bag = nn.EmbeddingBag(ROWS, FEATURES, mode=mode, **options)
        self.head = nn.Linear(FEATURES, 2)

    def forward(self, ids):
        return self.head(self.bag(ids))


@pytest.mark.parametrize("mode", MODES)
def test_model_with_embedding_bag_equals_torch(mode):
    args = (torch.randint(ROWS, (BATCH, 7)), torch.randint(2, (BATCH,)))
    assert_model_matches(Classifier(mode, padding_idx=0), nn.CrossEntropyLoss(), args)


@pytest.mark.parametrize("mode", MODES)
def test_bags_of_one_size_need_no_scatter(mode):
    inputs = [torch.randint(ROWS, (1, 7)), torch.randn(ROWS, FEATURES)]
    with jax.enable_x64(True):
        lowered = lower_function(lambda i, w: F.embedding_bag(i, w, mode=mode), inputs)
        jaxpr = jax.make_jaxpr(lowered)(*map(to_jax, inputs))
    assert "gather" in str(jaxpr)
    assert "scatter" not in str(jaxpr)


@pytest.mark.parametrize("bad", [-1, ROWS])
def test_id_out_of_range_is_reported(bad):
    weight = torch.ones(ROWS, FEATURES)
    ((holds, message),) = requirements(F.embedding_bag, torch.tensor([[0, bad]]), weight)
    assert not holds
    assert message.startswith(f"token ids must be in [0, {ROWS}) (aten.embedding_bag.padding_idx")


@pytest.mark.parametrize("bad", [[1, 2], [0, 2, 1], [0, 4], [1]])
def test_offsets_that_make_no_bags_are_reported(bad):
    inputs = torch.tensor([0, 1, 2]), torch.ones(ROWS, FEATURES)
    good = [0] * len(bad)
    assert all(holds for holds, _ in requirements(F.embedding_bag, *inputs, torch.tensor(good)))
    _, (holds, message) = requirements(F.embedding_bag, *inputs, torch.tensor(bad))
    assert not holds
    assert message.startswith("offsets must begin with 0, not decrease, and be at most 3")


def test_ids_after_the_last_bag_are_reported():
    inputs = torch.tensor([0, 1, 2]), torch.ones(ROWS, FEATURES), torch.tensor([0, 2])
    _, (holds, message) = requirements(
        lambda *args: F.embedding_bag(*args, include_last_offset=True), *inputs
    )
    assert not holds
    assert message.startswith("offsets must begin with 0, not decrease, and end with 3")


def test_scaling_by_frequency_is_refused():
    inputs = torch.tensor([[0, 1]]), torch.ones(ROWS, FEATURES)
    with pytest.raises(NotImplementedError, match="Use scale_grad_by_freq=False"):
        requirements(lambda i, w: F.embedding_bag(i, w, scale_grad_by_freq=True), *inputs)


def test_result_other_than_the_bags_is_refused():
    inputs = torch.tensor([0, 1]), torch.ones(ROWS, FEATURES), torch.tensor([0, 1])
    with pytest.raises(NotImplementedError, match="only the first of its results"):
        requirements(lambda i, w, o: torch.embedding_bag(w, i, o)[2], *inputs)
