"""Normalisation of one example's features; what would mix examples is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowering_checks import (
    BATCH,
    assert_model_matches,
    assert_same,
    compare,
    lower_function,
    normal,
    run_program,
)

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


def standardized(weight, gain=None, eps=1e-6):
    """As convolutions do whose weights are standardised, in timm and Big Transfer."""
    outputs = len(weight)
    gain = None if gain is None else gain.view(-1)
    flat = F.batch_norm(
        weight.reshape(1, outputs, -1), None, None, gain, training=True, momentum=0.0, eps=eps
    )
    return flat.reshape_as(weight)


class Standardized(nn.Module):
    """Weights go through ops, views and writes before they are standardised."""

    def __init__(self, function=None):
        super().__init__()
        self.conv, self.plain = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1, bias=False)
        self.gain = nn.Parameter(torch.randn(4, 1, 1, 1))
        self.shift = nn.Buffer(torch.randn(4, 1, 1, 1))
        self.function = function or (lambda self, x: self.conv.weight)

    def forward(self, x):
        weight = standardized(self.function(self, x) + self.shift, self.gain * 0.3)
        x = F.conv2d(x, weight, self.conv.bias).relu()
        return F.conv2d(x, standardized(self.plain.weight)).mean((2, 3))


def images():
    return torch.randn(BATCH, 2, 5, 5), torch.randn(BATCH, 4)


def test_batch_norm_of_weights_equals_torch():
    assert_model_matches(Standardized(), F.mse_loss, images())


@pytest.mark.slow
def test_batch_norm_of_weights_compiled_as_in_use_equals_torch():
    assert_model_matches(Standardized(), F.mse_loss, images(), options=None)


def written(self, x):
    weight = self.conv.weight * 1
    weight[:, 0].mul_(2)
    with torch.no_grad():
        weight = weight + torch.zeros(3).fill_(1.0)
    return weight.view(4, 2, 9)[:, :, :].view(4, 2, 3, 3)


def test_batch_norm_of_what_was_made_of_weights_equals_torch():
    assert_model_matches(Standardized(written), F.mse_loss, images())


def with_example_written(self, x):
    weight = self.conv.weight * 1
    view = weight[0]
    view[0].copy_(x[0, 0, :3, :3])
    return weight


def with_example_in_no_grad(self, x):
    with torch.no_grad():
        scale = x.mean()
    return self.conv.weight * scale


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: self.conv.weight * x.mean(),
        lambda self, x: self.conv.weight.detach() + x.detach().mean(),
        with_example_written,
        with_example_in_no_grad,
    ],
)
def test_batch_norm_of_what_depends_on_the_example_is_refused(function):
    with pytest.raises(NotImplementedError, match=r"batch_norm.*Use nn.GroupNorm"):
        run_program(Standardized(function), F.mse_loss, images())


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_of_weights_with_running_statistics_is_refused(training):
    stats = torch.zeros(4), torch.ones(4)

    def forward(self, x):
        flat = self.conv.weight.reshape(1, 4, -1)
        return F.batch_norm(flat, *stats, training=training).view(4, 2, 3, 3)

    with pytest.raises(NotImplementedError, match=r"batch_norm.*Use nn.GroupNorm"):
        run_program(Standardized(forward), F.mse_loss, images())


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
