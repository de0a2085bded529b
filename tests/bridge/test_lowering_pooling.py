"""Pools of every rank; the gradient of a maximum goes to the first of equal elements."""

import math

import pytest
import torch.nn.functional as F

from lowering_checks import assert_same, compare, normal, tied

MAX = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 2},
    {"kernel_size": 2, "stride": 3},
    {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
]
AVERAGE = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False},
    {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True, "count_include_pad": False},
]
SPACES = {1: (9,), 2: (7, 9), 3: (4, 5, 7)}


def on_all(name, options, **fixed):
    """The pool with each of the options, as one function with many outputs."""
    pool = getattr(F, name)
    return lambda x: [pool(x, **each, **fixed) for each in options]


CASES = {
    **{
        f"max_pool{rank}d at ties": (on_all(f"max_pool{rank}d", MAX), tied(1, 2, *space))
        for rank, space in SPACES.items()
    },
    **{
        f"max_pool{rank}d with indices": (
            on_all(f"max_pool{rank}d", MAX[:4], return_indices=True),
            tied(1, 2, *space),
        )
        for rank, space in SPACES.items()
    },
    **{
        f"avg_pool{rank}d": (on_all(f"avg_pool{rank}d", AVERAGE), normal(1, 2, *space))
        for rank, space in SPACES.items()
    },
    **{
        f"adaptive_avg_pool{rank}d": (
            on_all(f"adaptive_avg_pool{rank}d", [{"output_size": size} for size in (1, 2, 3, 5)]),
            normal(1, 2, *space),
        )
        for rank, space in SPACES.items()
    },
    **{
        f"adaptive_max_pool{rank}d at ties": (
            on_all(f"adaptive_max_pool{rank}d", [{"output_size": size} for size in (1, 2, 3)]),
            tied(1, 2, *space),
        )
        for rank, space in SPACES.items()
    },
    "adaptive with indices": (
        lambda x: F.adaptive_max_pool2d(x, (2, 5), return_indices=True),
        tied(1, 2, 7, 9),
    ),
    "uneven kernels": (
        lambda x: [
            F.max_pool2d(x, (2, 3), (1, 2), (0, 1)),
            F.avg_pool2d(x, (3, 2), (2, 1), (1, 0)),
            F.adaptive_avg_pool2d(x, (None, 3)),
        ],
        tied(1, 2, 7, 9),
    ),
    "divisor_override": (
        lambda x: F.avg_pool2d(x, 3, 2, 1, divisor_override=5),
        normal(1, 2, 7, 9),
    ),
    "long windows at ties": (
        lambda x: [F.max_pool1d(x, 20), F.max_pool1d(x, 11, 3, 2), F.avg_pool1d(x, 20)],
        tied(1, 2, 20),
    ),
    "without batch": (lambda x: [F.max_pool2d(x, 2), F.avg_pool2d(x, 2)], tied(2, 4, 6)),
    "windows side by side at ties": (
        lambda x: [
            F.max_pool2d(x, (2, 3)),
            F.max_pool2d(x, (3, 2), return_indices=True),
            F.adaptive_max_pool2d(x, (2, 3)),
        ],
        tied(1, 2, 6, 6),
    ),
    "windows side by side with NaN": (
        lambda x: F.max_pool2d(x.masked_fill(x == 1, math.nan), 2),
        tied(1, 2, 6, 4),
    ),
    "lp_pool": (lambda x: F.lp_pool2d(x, 2, 2), normal(1, 2, 4, 6)),
    "local_response_norm": (lambda x: F.local_response_norm(x, 3), normal(1, 5, 4, 4)),
}


@pytest.fixture(scope="module")
def results():
    return compare(CASES)


@pytest.mark.parametrize("name", CASES)
def test_pool_equals_torch(results, name):
    assert_same(results[name])
