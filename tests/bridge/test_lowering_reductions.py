"""Sums, norms, extrema and sorting; of equal values, those get the gradient that do in torch."""

import pytest
import torch

from lowering_checks import BATCH, assert_same, compare, integers, normal, positive, tied

INFINITY = float("inf")


def over_axes(function, values):
    """`function(x)`, `function(x, dim)` and with `keepdim`."""
    return lambda x: [
        function(x),
        function(x, dim=1),
        function(x, dim=-1, keepdim=True),
        function(x, dim=(0, 2)),
    ], values


def zeros_in_the_middle():
    x = normal(3, 4)
    x[:, 1] = 0
    return x


CASES = {
    "sum": over_axes(torch.sum, normal(2, 3, 4)),
    "sum of integers": over_axes(torch.sum, integers(2, 3, 4)),
    "sum of bools": (lambda x: [(x > 0).sum(), (x > 0).sum(1)], normal(2, 3)),
    "sum in another dtype": (lambda x: x.sum(0, dtype=torch.float64), integers(3, 2)),
    "nansum": (torch.nansum, torch.tensor([[1.0, float("nan"), 2.0]] * BATCH).double()),
    "mean": over_axes(torch.mean, normal(2, 3, 4)),
    "var": over_axes(torch.var, normal(2, 3, 4)),
    "std": over_axes(torch.std, normal(2, 3, 4)),
    "var, biased": (
        lambda x: [x.var(1, unbiased=False), x.var(unbiased=False), x.var(1, correction=2)],
        normal(3, 4),
    ),
    "var_mean": (lambda x: [torch.var_mean(x, 1), torch.std_mean(x)], normal(3, 4)),
    "std of equal values": (lambda x: x.expand(4).std(), normal(1)),
    "prod": (lambda x: [x.prod(), x.prod(1), x.prod(0, keepdim=True)], normal(2, 3)),
    "prod with zeros": (lambda x: [x.prod(), x.prod(1)], zeros_in_the_middle()),
    "amax at ties": (lambda x: [x.amax(1), x.amax((0, 1)), x.amin(1), x.amin()], tied(3, 8)),
    "max at ties": (lambda x: [x.max(), x.min()], tied(3, 8)),
    "max over an axis at ties": (
        lambda x: [x.max(1), x.max(0, keepdim=True), x.min(1), x.min(-1, keepdim=True)],
        tied(3, 8),
    ),
    "max of one number": (lambda x: [x.max(0), x.argmax(), x.sum(0), x.cumsum(0)], normal()),
    "aminmax, which has no gradient before torch 2.13": (
        lambda x: [torch.aminmax(x.detach()), torch.aminmax(x.detach(), dim=1)],
        tied(3, 8),
    ),
    "argmax at ties": (
        lambda x: [x.argmax(), x.argmax(1), x.argmin(0, keepdim=True), x.argmin()],
        tied(3, 8),
    ),
    "any and all": (
        lambda x: [
            (x > 0).any(),
            (x > 0).any(1),
            (x > 0).all(0, keepdim=True),
            (x > 0).all(),
            x.any(dim=(0, 1)),
            x.all(dim=(0, 1)),
        ],
        tied(3, 4),
    ),
    "logsumexp": (lambda x: [x.logsumexp(1), x.logsumexp((0, 1), keepdim=True)], normal(3, 4)),
    "logsumexp of infinities": (
        lambda x: x.logsumexp(0),
        torch.tensor([[-INFINITY, -INFINITY], [-INFINITY, 1.0], [0.0, 2.0]]).double(),
    ),
    "norm": over_axes(torch.linalg.vector_norm, normal(2, 3, 4)),
    "norm of zeros": over_axes(torch.linalg.vector_norm, torch.zeros(BATCH, 2, 3, 4).double()),
    "norms of all orders": (
        lambda x: [x.norm(p=p, dim=1) for p in (0, 0.5, 1, 1.5, 2, 3, INFINITY, -INFINITY)],
        normal(3, 4),
    ),
    "norms of all orders with zeros": (
        lambda x: [x.norm(p=p, dim=1) for p in (0, 1, 1.5, 2, 3, INFINITY)],
        zeros_in_the_middle(),
    ),
    "norms at ties": (lambda x: [x.norm(p=p) for p in (1, INFINITY)], tied(3, 4)),
    "Frobenius norms": (
        lambda x: [x.norm(), torch.linalg.norm(x), torch.linalg.matrix_norm(x), x.norm("fro")],
        normal(3, 4),
    ),
    "linalg.norm": (
        lambda x: [torch.linalg.norm(x, dim=1), torch.linalg.norm(x, 3, dim=0, keepdim=True)],
        normal(3, 4),
    ),
    "normalize": (lambda x: torch.nn.functional.normalize(x, dim=1), zeros_in_the_middle()),
    "cumsum": (lambda x: [x.cumsum(0), x.cumsum(-1), (x > 0).cumsum(1)], normal(3, 4)),
    "cumprod": (lambda x: x.cumprod(1), normal(3, 4)),
    "diff": (
        lambda x, y: [
            torch.diff(x),
            torch.diff(x, n=2, dim=0),
            torch.diff(x, n=5),
            torch.diff(x, dim=1, prepend=y),
            torch.diff(x, n=2, dim=-1, prepend=y, append=y.float()),
        ],
        normal(3, 4),
        normal(3, 2),
    ),
    "diff of integers and bools": (
        lambda x: [x.diff(prepend=x[:, :1] - 1), (x > 0).diff(), x.diff(append=x > 0)],
        integers(3, 4),
    ),
    "count_nonzero": (lambda x: [x.count_nonzero(), x.count_nonzero(dim=1)], tied(3, 4)),
    "sort": (lambda x: [x.sort(), x.sort(0, descending=True), x.argsort(1)], normal(3, 4)),
    "stable sort at ties": (
        lambda x: [
            x.sort(dim=1, stable=True),
            x.sort(dim=1, stable=True, descending=True),
            x.argsort(dim=0, stable=True),
        ],
        tied(3, 8),
    ),
    "topk": (lambda x: [x.topk(2), x.topk(2, 0, largest=False)], normal(3, 4)),
    "searchsorted": (
        lambda x, bounds: [
            torch.searchsorted(bounds.sort()[0], x, side="right"),
            torch.bucketize(x, bounds.sort()[0].float(), out_int32=True),
            torch.bucketize(0.5, bounds.sort()[0], right=True),
            torch.searchsorted(torch.tensor([-1, 0, 0, 2]), x.long(), right=True),
        ],
        tied(3, 4),
        tied(5),
    ),
    "kthvalue": (lambda x: [x.kthvalue(2), x.kthvalue(1, 0, keepdim=True)], normal(3, 4)),
    "median over an axis": (lambda x: [x.median(1), x.median(0, keepdim=True)], normal(3, 4)),
    "median at ties": (torch.median, tied(3, 4)),
    "median, even": (torch.median, positive(6)),
}


@pytest.fixture(scope="module")
def results():
    return compare(CASES)


@pytest.mark.parametrize("name", CASES)
def test_reduction_equals_torch(results, name):
    assert_same(results[name])
