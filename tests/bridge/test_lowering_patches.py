"""Unfolding images into patches, and folding them back."""

import pytest
import torch.nn.functional as F

from lowering_checks import assert_same, compare, normal

CASES = {
    "unfold": (
        lambda x: [
            F.unfold(x, 2),
            F.unfold(x, (2, 3), stride=2, padding=1),
            F.unfold(x, 2, dilation=(1, 2), stride=(2, 1), padding=(0, 1)),
            F.unfold(x[0], 2),
        ],
        normal(1, 2, 5, 6),
    ),
    "fold": (
        lambda x: [F.fold(x, (4, 6), (2, 2), stride=2), F.fold(x[0], (4, 6), 2, stride=2)],
        normal(1, 8, 6),
    ),
    "fold of patches that overlap": (
        lambda x: [F.fold(F.unfold(x, 3, padding=1), (5, 6), 3, padding=1)],
        normal(1, 2, 5, 6),
    ),
    "fold with holes": (
        lambda x: F.fold(x, (5, 5), 2, dilation=2, stride=3, padding=1),
        normal(1, 8, 4),
    ),
}


@pytest.fixture(scope="module")
def results():
    return compare(CASES)


@pytest.mark.parametrize("name", CASES)
def test_patches_equal_torch(results, name):
    assert_same(results[name])
