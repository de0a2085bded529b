"""Normalisation of one example's features; what would mix examples is refused."""

import pytest
import torch
import torch.nn.functional as F

from lowering_checks import assert_same, compare, lower_function, normal

CASES = {
    "layer_norm": (
        lambda x, w, b: [
            F.layer_norm(x, (3, 4), w, b),
            F.layer_norm(x, (3, 4)),
            F.layer_norm(x, (4,), w[0], None, 0.1),
        ],
        normal(2, 3, 4),
        normal(3, 4),
        normal(3, 4),
    ),
    "rms_norm": (
        lambda x, w: [F.rms_norm(x, (4,), w, 1e-6), F.rms_norm(x, (4,), w), F.rms_norm(x, (3, 4))],
        normal(2, 3, 4),
        normal(4),
    ),
    "group_norm": (
        lambda x, w, b: [
            F.group_norm(x, 2, w, b),
            F.group_norm(x, 4),
            F.group_norm(x, 1, w, b, 0.1),
        ],
        normal(1, 4, 3, 2),
        normal(4),
        normal(4),
    ),
    "group_norm without space": (lambda x: F.group_norm(x, 2), normal(1, 4)),
    "instance_norm": (
        lambda x, w, b: [F.instance_norm(x), F.instance_norm(x, weight=w, bias=b, eps=0.1)],
        normal(1, 4, 3, 2),
        normal(4),
        normal(4),
    ),
    "instance_norm, 1d": (F.instance_norm, normal(1, 4, 5)),
    "weight_norm": (
        lambda v, g: [torch._weight_norm(v, g), torch._weight_norm(v, g.view(1, 4, 1)[:, :3], 1)],
        normal(4, 3, 2),
        normal(4, 1, 1),
    ),
}


@pytest.fixture(scope="module")
def results():
    return compare(CASES)


@pytest.mark.parametrize("name", CASES)
def test_normalization_equals_torch(results, name):
    assert_same(results[name])


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_is_refused(training):
    stats = torch.zeros(2), torch.ones(2)
    x = torch.randn(1, 2, 3)
    lowered = lower_function(lambda x: F.batch_norm(x, *stats, training=training), [x])
    with pytest.raises(NotImplementedError, match=r"batch_norm.*Use nn.GroupNorm"):
        lowered(x.numpy())


def test_instance_norm_with_running_statistics_is_refused():
    stats = torch.zeros(2), torch.ones(2)
    x = torch.randn(1, 2, 3)
    lowered = lower_function(lambda x: F.instance_norm(x, *stats), [x])
    with pytest.raises(NotImplementedError, match="track_running_stats=False"):
        lowered(x.numpy())
