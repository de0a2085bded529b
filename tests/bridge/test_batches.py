"""Padding: few sizes, little waste, exactly the same rows."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dpbridge.batches import pad, padded_size, take_apart


@given(st.integers(1, 100_000), st.floats(0.5, 5000))
def test_padded_size_holds_the_batch(size, expected):
    assert padded_size(size, expected) >= size


@given(st.integers(1, 20_000), st.floats(0.5, 5000))
def test_padded_size_is_reached_by_itself(size, expected):
    padded = padded_size(size, expected)
    assert padded_size(padded, expected) == padded


@pytest.mark.parametrize("expected", [1, 16, 64, 256, 1000, 4096])
def test_padded_size_takes_few_values_on_poisson_draws(expected):
    draws = stats.poisson(expected).rvs(2000, random_state=0)
    sizes = {padded_size(int(n), expected) for n in draws if n}
    assert len(sizes) <= 7


@pytest.mark.parametrize("expected", [64, 256, 1000, 4096])
def test_padded_size_wastes_little(expected):
    draws = stats.poisson(expected).rvs(2000, random_state=0)
    waste = sum(padded_size(int(n), expected) for n in draws) / draws.sum() - 1
    assert waste <= 2.5 / math.sqrt(expected)


def test_padded_sizes_far_above_the_expected_one_are_few():
    assert len({padded_size(n, 16) for n in range(1, 10_000)}) <= 60


@pytest.mark.parametrize("size", [1, 9, 33, 65, 1000])
def test_parts_of_a_large_batch_are_padded_by_a_quarter_at_most(size):
    assert padded_size(size, 1e6) <= max(8 * math.ceil(size / 8), 1.25 * size)


def test_pad_repeats_the_last_row():
    x = torch.arange(6.0).reshape(3, 2)
    batch = take_apart((x, torch.arange(3)), {}, torch.device("cpu"))
    rows, labels = pad(batch.tensors, 5)
    assert torch.equal(rows, x[[0, 1, 2, 2, 2]])
    assert labels.tolist() == [0, 1, 2, 2, 2]


def test_pad_copies_nothing_when_the_size_fits():
    x = torch.zeros(3, 2)
    batch = take_apart((x,), {}, torch.device("cpu"))
    assert pad(batch.tensors, 3)[0] is x


def test_take_apart_and_rebuild_are_inverse():
    args = ({"x": torch.ones(2, 3), "name": "a"}, [torch.zeros(2), None])
    batch = take_apart(args, {"flag": True}, torch.device("cpu"))
    (first, second), kwargs = batch.rebuild(batch.tensors)
    assert first["x"] is args[0]["x"]
    assert first["name"] == "a"
    assert second[0] is args[1][0]
    assert second[1] is None
    assert kwargs == {"flag": True}


def test_example_keeps_a_leading_axis_of_one():
    batch = take_apart((torch.arange(3.0),), {}, torch.device("cpu"))
    assert batch.example(0)[0][0].tolist() == [0.0]
    assert batch.example(-1)[0][0].tolist() == [2.0]
