"""DpsgdGradientComputer: clipped means, and noise on a mean over the total batch."""

import math

import pytest
import torch
from torch import nn

import oracles
from dpbridge.exchange import to_torch
from dpbridge.gradient_computer import DpsgdGradientComputer


def make_computer(model=None, loss_fn=None, **options):
    defaults = {"clipping_norm": 1.0, "noise_multiplier": 0.0, "seed": 0}
    return DpsgdGradientComputer(
        model or nn.Linear(3, 2), loss_fn or nn.MSELoss(), **{**defaults, **options}
    )


def make_batch(size=7):
    return torch.randn(size, 3), torch.randn(size, 2)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("clipping_norm", [0.3, 2.5])
def test_clipped_gradients_are_the_mean_of_a_float64_loop(clipping_norm, rescale):
    model, batch = nn.Linear(3, 2), make_batch()
    computer = make_computer(
        model, clipping_norm=clipping_norm, rescale_to_unit_norm=rescale, microbatch_size=4
    )
    loss, grads = computer.loss_and_clipped_gradients(*batch)
    gradients = oracles.torch_gradients(model, nn.MSELoss(), batch)
    expected = oracles.clipped_sum(gradients, clipping_norm, rescale=rescale, normalize_by=7)
    oracles.assert_close(to_torch(grads.mean), expected, rtol=1e-5)
    torch.testing.assert_close(loss, nn.MSELoss()(model(batch[0]), batch[1]).detach())


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([3.0, -2.0]))

    def forward(self, x):
        return x @ self.a


@pytest.mark.parametrize(
    ("clipping_norm", "rescale", "golden"),
    [
        (1.0, False, (-0.44721362, -0.89442724)),
        (100.0, False, (-10.0, -20.0)),
        (100.0, True, (-0.1, -0.2)),
    ],
)
def test_golden_gradients(clipping_norm, rescale, golden):
    computer = make_computer(
        Line(),
        lambda found, y: (found - y).square().sum(),
        clipping_norm=clipping_norm,
        rescale_to_unit_norm=rescale,
    )
    _, grads = computer.loss_and_clipped_gradients(torch.tensor([[1.0, 2.0]]), torch.tensor([4.0]))
    assert grads.mean["a"].tolist() == pytest.approx(golden, rel=1e-6)


@pytest.mark.parametrize(
    ("clipping_norm", "noise_multiplier", "rescale", "std"),
    [(0.1, 3, False, 0.075), (0.1, 3, True, 0.75), (10, 5, False, 12.5), (10, 5, True, 1.25)],
)
def test_golden_standard_deviations(clipping_norm, noise_multiplier, rescale, std):
    computer = make_computer(
        nn.Linear(200, 100),
        clipping_norm=clipping_norm,
        noise_multiplier=noise_multiplier,
        rescale_to_unit_norm=rescale,
    )
    _, grads = computer.loss_and_clipped_gradients(torch.zeros(0, 200), torch.zeros(0, 100))
    noised = computer.add_noise_to_grads(
        grads, total_batch_size=4, noise_state=computer.init_noise_state()
    )
    assert noised.std == pytest.approx(std)
    found = torch.cat([grad.flatten() for grad in noised.grads.values()])
    # 20,100 draws: seven deviations of the estimate are 3.5 %.
    assert float(found.std()) == pytest.approx(std, rel=0.035)


def test_noise_never_repeats():
    computer = make_computer(noise_multiplier=1.0)
    _, grads = computer.loss_and_clipped_gradients(*make_batch())
    state, seen = computer.init_noise_state(), set()
    for _ in range(4):
        noised = computer.add_noise_to_grads(grads, total_batch_size=7, noise_state=state)
        state = noised.noise_state
        seen.update(noised.grads["weight"].flatten().tolist())
    assert len(seen) == 4 * 6


def test_noised_gradients_are_the_parameters_kind():
    model = nn.Linear(3, 2).to(torch.bfloat16)
    model.bias.requires_grad_(False)
    computer = make_computer(model, noise_multiplier=1.0)
    x, y = make_batch()
    _, grads = computer.loss_and_clipped_gradients(x.bfloat16(), y.bfloat16())
    noised = computer.add_noise_to_grads(grads, total_batch_size=7, noise_state=0)
    assert {name: grad.dtype for name, grad in noised.grads.items()} == {"weight": torch.bfloat16}


def test_dropout_differs_between_batches():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2))
    computer = make_computer(model, clipping_norm=100.0)
    batch = make_batch()
    means = [computer.loss_and_clipped_gradients(*batch)[1].mean["1.weight"] for _ in range(2)]
    assert (means[0] != means[1]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clipping_norm": 0.0}, "`clipping_norm` must be positive"),
        ({"clipping_norm": math.inf}, "`clipping_norm` must be positive"),
        ({"noise_multiplier": -1.0}, "`noise_multiplier` must be"),
        ({"noise_multiplier": math.nan}, "`noise_multiplier` must be"),
    ],
)
def test_computer_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        make_computer(**options)


@pytest.mark.parametrize("drawn", [1, 16, 64])
def test_noise_is_for_the_total_however_few_were_drawn(drawn):
    """A mean over the draw, noised for the total, would have too little noise."""
    model = nn.Linear(3, 2)
    computer = make_computer(model, clipping_norm=0.3)
    batch = make_batch(drawn)
    _, grads = computer.loss_and_clipped_gradients(*batch)
    noised = computer.add_noise_to_grads(grads, total_batch_size=64, noise_state=0)
    gradients = oracles.torch_gradients(model, nn.MSELoss(), batch)
    expected = oracles.clipped_sum(gradients, 0.3, normalize_by=64)
    oracles.assert_close(noised.grads, expected, rtol=1e-5)


def test_batches_of_a_step_add_up():
    model = nn.Linear(3, 2)
    computer = make_computer(model)
    x, y = make_batch(10)
    _, first = computer.loss_and_clipped_gradients(x[:4], y[:4])
    _, second = computer.loss_and_clipped_gradients(x[4:], y[4:])
    _, whole = computer.loss_and_clipped_gradients(x, y)
    both = first + second
    assert both.size == 10
    oracles.assert_close(to_torch(both.total), to_torch(whole.total), rtol=1e-5)
    model.bias.requires_grad_(False)
    _, frozen = computer.loss_and_clipped_gradients(x, y)
    with pytest.raises(ValueError, match="must be of the same parameters"):
        both + frozen


def test_noise_refuses_what_it_cannot_noise():
    computer = make_computer(noise_multiplier=1.0)
    _, grads = computer.loss_and_clipped_gradients(*make_batch())
    with pytest.raises(TypeError, match="`grads` must be ClippedGradients"):
        computer.add_noise_to_grads({}, total_batch_size=7, noise_state=0)
    with pytest.raises(ValueError, match="`noise_state` must be at least 0"):
        computer.add_noise_to_grads(grads, total_batch_size=7, noise_state=-1)
