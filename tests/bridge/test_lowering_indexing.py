"""Reading and writing by index: values, gradients, and indices that are out of range."""

import pytest
import torch
import torch.nn.functional as F

from lowering_checks import BATCH, assert_same, compare, integers, normal, requirements, tied


def chosen(*shape, size):
    return integers(*shape, low=0, high=size)


def distinct(count, size):
    """`count` different indices below `size` for each example."""
    return torch.stack([torch.randperm(size)[:count] for _ in range(BATCH)])


def assign(x, key, value):
    x = x.clone()
    x[key] = value
    return x


CASES = {
    "embedding with repeated tokens": (F.embedding, chosen(2, 6, size=4), normal(4, 3)),
    "embedding with padding": (
        lambda ids, w: [F.embedding(ids, w, padding_idx=1), F.embedding(ids, w, padding_idx=-1)],
        chosen(2, 6, size=4),
        normal(4, 3),
    ),
    "one_hot": (lambda ids: F.one_hot(ids, 5), chosen(2, 3, size=5)),
    "index with one tensor": (
        lambda x, i: [x[i], x[:, i], x[..., i], x[1:, i], x[i - 3], x[:, i, 1:]],
        normal(3, 3, 3),
        chosen(2, 2, size=3),
    ),
    "index with tensors": (
        lambda x, i, j: [x[i, j], x[:, i, j], x[i, :, j], x[i, 0], x[i[:, None], j]],
        normal(3, 3, 3),
        chosen(2, size=3),
        chosen(2, size=3),
    ),
    "index with numbers": (lambda x: [x[[0, 2]], x[:, [1, 1]], x[[0, 1], [1, 2]]], normal(3, 3)),
    "index_select": (
        lambda x, i: [x.index_select(0, i), x.index_select(-1, i), x.index_select(1, i[0])],
        normal(3, 4),
        chosen(5, size=3),
    ),
    "gather": (
        lambda x, i: [x.gather(0, i), x.gather(-1, i), x.gather(1, i[:1, :1])],
        normal(3, 4),
        chosen(2, 3, size=3),
    ),
    "take": (lambda x, i: [x.take(i), x.take(i - 12)], normal(3, 4), chosen(2, 3, size=12)),
    "take_along_dim": (
        lambda x, i: [x.take_along_dim(i, 1), x.take_along_dim(i)],
        normal(3, 4),
        chosen(3, 2, size=4),
    ),
    "scatter": (
        lambda x, i, y: [x.scatter(1, i, y), x.scatter(1, i, 2.0), x.scatter(1, i[:2, :1], 0.5)],
        normal(3, 4),
        distinct(2, 4).unsqueeze(1).expand(-1, 3, -1),
        normal(3, 2),
    ),
    "scatter_add": (
        lambda x, i, y: [x.scatter_add(1, i, y), x.scatter_reduce(0, i, y, "sum")],
        normal(3, 4),
        chosen(3, 4, size=3),
        normal(3, 4),
    ),
    "index_add": (
        lambda x, i, y: [x.index_add(0, i, y), x.index_add(0, i, y, alpha=2)],
        normal(3, 4),
        chosen(5, size=3),
        normal(5, 4),
    ),
    "index_copy": (
        lambda x, i, y: [x.index_copy(1, i, y), x.index_fill(1, i, 3.0), x.index_fill(0, i[:1], 1)],
        normal(3, 4),
        distinct(2, 3),
        normal(3, 2),
    ),
    "index_put": (
        lambda x, i, y: [
            assign(x, i, y),
            assign(x, (slice(None), i), 2.0),
            x.index_put((i,), y),
            x.index_put((i - 3,), y[0]),
        ],
        normal(3, 3),
        distinct(2, 3),
        normal(2, 3),
    ),
    "index_put with accumulation": (
        lambda x, i, y: x.index_put((i,), y, accumulate=True),
        normal(3, 4),
        chosen(5, size=3),
        normal(5, 4),
    ),
    "assignment by mask": (
        lambda x, m, y: [assign(x, x > 0, 0.0), assign(x, m > 0, y), assign(x, x > y, -1.0)],
        normal(3, 4),
        tied(3),
        normal(),
    ),
    "masked_scatter": (
        lambda x, y: x.masked_scatter(x.detach() > 0, y),
        normal(3, 4),
        normal(12),
    ),
    "copies into": (
        lambda x, y: [
            x.clone().copy_(y),
            x.clone().fill_(2.0),
            x.clone().fill_(y[0]),
            x.clone().zero_(),
        ],
        normal(3, 4),
        normal(4),
    ),
}


@pytest.fixture(scope="module")
def results():
    return compare(CASES)


@pytest.mark.parametrize("name", CASES)
def test_indexing_equals_torch(results, name):
    assert_same(results[name])


X = torch.arange(12.0).view(3, 4)


@pytest.mark.parametrize(
    ("function", "bad"),
    [
        (lambda i: F.embedding(i, X), 3),
        (lambda i: F.embedding(i, X), -1),
        (lambda i: F.one_hot(i, 3), 3),
        (lambda i: X[i], 3),
        (lambda i: X[i], -4),
        (lambda i: X[:, i], 4),
        (lambda i: X.index_select(0, i), 3),
        (lambda i: X.gather(0, i[None]), 3),
        (lambda i: X.gather(0, i[None]), -1),
        (lambda i: X.take(i), 12),
        (lambda i: X[:, :2].take_along_dim(i[None], 0), 3),
        (lambda i: X.scatter(0, i[None], 0.0), 3),
        (lambda i: X.scatter_add(0, i[None], X), -1),
        (lambda i: X.index_add(0, i, X[:2]), 3),
        (lambda i: X.index_copy(0, i, X[:2]), 3),
        (lambda i: X.index_fill(0, i, 0.0), 3),
        (lambda i: X.index_put((i,), X[0]), -4),
    ],
)
def test_index_out_of_range_is_reported(function, bad):
    good = 0
    assert all(holds for holds, _ in requirements(function, torch.tensor([good, good])))
    ((holds, message),) = requirements(function, torch.tensor([good, bad]))
    assert not holds
    assert "must be in [" in message


def test_masked_scatter_from_too_few_is_reported():
    held = requirements(lambda x: x.masked_scatter(x > 0, x[:1]), torch.ones(3))
    assert [holds for holds, _ in held] == [False]
