"""Interpolation of every mode, by size and by factor."""

import pytest
import torch
import torch.nn.functional as F

from lowering_checks import assert_same, compare, normal, tied

SPACES = {1: (6,), 2: (6, 5), 3: (3, 4, 5)}
SIZES = {1: [(12,), (7,), (4,), (1,)], 2: [(12, 10), (4, 9), (1, 3)], 3: [(6, 8, 5), (5, 2, 7)]}
FACTORS = (2, 1.7, 0.6)


def resized(mode, rank, **options):
    """The interpolation to each of the sizes, and by each of the factors."""
    return lambda x: [
        *(F.interpolate(x, size, mode=mode, **options) for size in SIZES[rank]),
        *(F.interpolate(x, scale_factor=factor, mode=mode, **options) for factor in FACTORS),
        F.interpolate(x, scale_factor=1.7, mode=mode, recompute_scale_factor=True, **options),
    ]


WEIGHTED = {"linear": 1, "bilinear": 2, "trilinear": 3, "bicubic": 2}
CASES = {
    **{
        f"{mode}, rank {rank}": (resized(mode, rank), normal(1, 2, *SPACES[rank]))
        for mode in ("nearest", "nearest-exact")
        for rank in SPACES
    },
    **{
        f"{mode}, corners {corners}": (
            resized(mode, rank, align_corners=corners == "aligned"),
            normal(1, 2, *SPACES[rank]),
        )
        for mode, rank in WEIGHTED.items()
        for corners in ("aligned", "not aligned")
    },
    "area": (lambda x: F.interpolate(x, (3, 7), mode="area"), normal(1, 2, 6, 5)),
    "nearest at infinity": (
        lambda x: F.interpolate(x / (x != 0), scale_factor=3),
        tied(1, 2, 4, 4),
    ),
    "upsampling modules": (
        lambda x: [
            torch.nn.Upsample(scale_factor=2)(x),
            torch.nn.UpsamplingBilinear2d(scale_factor=2)(x),
        ],
        normal(1, 2, 4, 4),
    ),
}


@pytest.fixture(scope="module")
def results():
    return compare(CASES)


@pytest.mark.parametrize("name", CASES)
def test_interpolation_equals_torch(results, name):
    assert_same(results[name])
