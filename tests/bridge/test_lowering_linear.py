"""Products of matrices and vectors."""

import pytest
import torch
import torch.nn.functional as F

from lowering_checks import assert_same, compare, normal

CASES = {
    "linear": (
        lambda x, w, b: [F.linear(x, w, b), F.linear(x, w), F.linear(x[0], w, b), x @ w[0]],
        normal(2, 3, 4),
        normal(5, 4),
        normal(5),
    ),
    "linear of one row": (F.linear, normal(4), normal(5, 4), normal(5)),
    "linear with one output": (F.linear, normal(2, 4), normal(4)),
    "matmul": (
        lambda x, y: [x @ y, x[0] @ y, x @ y[0], x[0, 0] @ y[0], x[0] @ y[0, :, 0]],
        normal(2, 3, 4),
        normal(2, 4, 3),
    ),
    "mm": (
        lambda x, y: [x.mm(y), x.mv(y[:, 0]), x[0].dot(y[:, 1]), torch.outer(x[0], y[0])],
        normal(3, 4),
        normal(4, 3),
    ),
    "bmm": (
        lambda x, y: [torch.bmm(x, y), torch.linalg.matmul(x, y)],
        normal(2, 3, 4),
        normal(2, 4, 3),
    ),
    "addmm": (
        lambda b, x, y: [
            torch.addmm(b, x, y),
            torch.addmm(b[0], x, y, beta=0.5, alpha=2),
            torch.addmm(b, x, y, beta=0),
            torch.addmv(b[0], x, y[:, 0]),
            torch.addr(b, b[:, 0], b[0]),
        ],
        normal(3, 3),
        normal(3, 4),
        normal(4, 3),
    ),
    "baddbmm": (
        lambda b, x, y: [torch.baddbmm(b, x, y, alpha=0.5), torch.addbmm(b[0], x, y)],
        normal(2, 3, 3),
        normal(2, 3, 4),
        normal(2, 4, 3),
    ),
    "einsum": (
        lambda x, y: [
            torch.einsum("bij,bjk->bik", x, y),
            torch.einsum("bij,bjk", x, y),
            torch.einsum("...ij->...ji", x),
            torch.einsum("bij->", x),
            torch.einsum("b i j, b j i -> b", x, y),
            torch.einsum("bii->bi", x @ y),
        ],
        normal(2, 3, 4),
        normal(2, 4, 3),
    ),
    "tensordot": (
        lambda x, y: [torch.tensordot(x, y, 1), torch.tensordot(x, y, ([0, 2], [1, 0]))],
        normal(2, 3, 4),
        normal(4, 2, 3),
    ),
    "bilinear": (F.bilinear, normal(2, 3), normal(2, 4), normal(5, 3, 4), normal(5)),
    "others": (
        lambda x, y: [
            torch.inner(x, x),
            torch.kron(x, y),
            torch.trace(x @ y),
            torch.linalg.multi_dot([x, y, x]),
            torch.linalg.vecdot(x, x),
        ],
        normal(3, 4),
        normal(4, 3),
    ),
}


@pytest.fixture(scope="module")
def results():
    return compare(CASES)


@pytest.mark.parametrize("name", CASES)
def test_product_equals_torch(results, name):
    assert_same(results[name])
