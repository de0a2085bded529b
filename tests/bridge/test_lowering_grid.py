"""Sampling at places that are data: values, and gradients of image and places."""

import pytest
import torch
import torch.nn.functional as F

from lowering_checks import assert_same, compare, integers, lower_function, normal

pytestmark = pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid")

LINEAR, NEAREST = ("bilinear", "zeros", False), ("nearest", "zeros", True)
BORDER, ALIGNED = ("bilinear", "border", False), ("bilinear", "border", True)
NEAREST_BORDER = ("nearest", "border", False)


def sampled(*options):
    return lambda x, grid: [F.grid_sample(x, grid, *each) for each in options]


# Corners, edges, middles and beyond: where there are ties, and where gradients end.
ON_ELEMENTS = integers(1, 5, 5, 2, low=-2, high=3).double()

CASES = {
    "image": (sampled(LINEAR, NEAREST_BORDER), normal(2, 2, 4, 5), normal(2, 3, 6, 2)),
    "volume": (sampled(NEAREST), normal(1, 2, 3, 4, 2), normal(1, 2, 3, 2, 3)),
    "places on elements": (sampled(ALIGNED, NEAREST), normal(1, 1, 3, 3), ON_ELEMENTS),
    "places between elements": (sampled(LINEAR), normal(1, 1, 3, 3), ON_ELEMENTS),
    "affine": (
        lambda theta: [
            F.affine_grid(theta, [1, 2, 3, 4], align_corners=True),
            F.affine_grid(theta, [1, 2, 3, 1], align_corners=True),
            F.affine_grid(theta, [1, 2, 3, 4], align_corners=False),
        ],
        normal(1, 2, 3),
    ),
    "affine, volume": (
        lambda theta: F.affine_grid(theta, [1, 1, 2, 3, 4], align_corners=False),
        normal(1, 3, 4),
    ),
}


@pytest.fixture(scope="module")
def results():
    return compare(CASES)


@pytest.mark.parametrize("name", CASES)
def test_grid_sampling_equals_torch(results, name):
    assert_same(results[name])


@pytest.mark.slow
def test_linear_sampling_of_a_volume_equals_torch():
    case = (sampled(LINEAR, BORDER), normal(1, 2, 3, 4, 2), normal(1, 2, 3, 2, 3))
    assert_same(compare({"volume": case})["volume"])


@pytest.mark.parametrize(
    "options", [("bicubic", "zeros", False), ("bilinear", "reflection", False)]
)
def test_other_grid_sampling_is_refused(options):
    x, grid = torch.randn(1, 1, 3, 3), torch.randn(1, 2, 2, 2)
    lowered = lower_function(lambda x, grid: F.grid_sample(x, grid, *options), [x, grid])
    with pytest.raises(NotImplementedError, match="'bilinear' and 'nearest'"):
        lowered(x.numpy(), grid.numpy())
