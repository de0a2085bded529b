"""The self-check: finds wrong gradients, names the parameter, lets right ones pass."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import dpbridge.private_gradient
from dpbridge import DPOptimizer
from dpbridge.self_check import DropoutOff


def make_optimizer(model, **options):
    defaults = {
        "loss_fn": nn.MSELoss(),
        "l2_clip_norm": 1.0,
        "noise_multiplier": 1.0,
        "expected_batch_size": 8,
        "seed": 0,
    }
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    return DPOptimizer(base, model, **{**defaults, **options})


def make_batch(size=8):
    return torch.randn(size, 4), torch.randn(size, 2)


class Doubled(torch.autograd.Function):
    """Its backward is not the derivative of its forward, and torch.export forgets it."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Wrong(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.second(Doubled.apply(self.first(x)))


def test_self_check_finds_a_custom_backward_and_spends_nothing():
    model = Wrong()
    optimizer = make_optimizer(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"gradient of `first\.bias` must agree"):
        optimizer.backward(*make_batch())
    with pytest.raises(RuntimeError, match="must follow a call of `backward`"):
        optimizer.step()
    assert optimizer.ledger.steps == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_self_check_can_be_turned_off():
    optimizer = make_optimizer(Wrong(), self_check=False)
    optimizer.backward(*make_batch())
    optimizer.step()
    assert optimizer.ledger.steps == 1


class WrongInTheLastRow(nn.Linear):
    """An op whose JAX rule is wrong, but only for inputs that mark the last example."""

    def forward(self, x):
        return super().forward(functional.mish(x))


def test_self_check_looks_at_the_last_example(monkeypatch):
    from dpbridge.lowering import table

    aten = torch.ops.aten

    def wrong_where_marked(call, x):
        import jax
        import jax.numpy as jnp

        right = x * jnp.tanh(jax.nn.softplus(x))
        return jnp.where(x[0, 0] > 5, 1.5 * right, right)

    entries = table._ENTRIES
    monkeypatch.setitem(entries, aten.mish.default, table.Entry(wrong_where_marked))
    optimizer = make_optimizer(WrongInTheLastRow(4, 2))
    x, y = make_batch(5)
    optimizer.backward(x, y)
    x[4, 0] = 6.0
    fresh = make_optimizer(WrongInTheLastRow(4, 2))
    with pytest.raises(RuntimeError, match="for example 4"):
        fresh.backward(x, y)


@pytest.mark.parametrize(
    "size", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 5, 8)), 13]
)
def test_self_check_passes_what_is_right(size):
    model = nn.Sequential(
        nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.Dropout(0.5), nn.GELU(), nn.Linear(6, 2)
    )
    make_optimizer(model).backward(*make_batch(size))


def test_self_check_leaves_no_gradient_behind():
    model = nn.Linear(4, 2)
    make_optimizer(model).backward(*make_batch())
    assert model.weight.grad is None


def test_self_check_leaves_torchs_generator_alone():
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2))
    optimizer = make_optimizer(model)
    x, y = make_batch()
    before = torch.get_rng_state()
    optimizer.backward(x, y)
    assert torch.equal(torch.get_rng_state(), before)


def test_self_check_runs_once_for_each_compiled_size(monkeypatch):
    runs = []
    real = dpbridge.private_gradient.check_gradients

    def counting(*args, **kwargs):
        runs.append(args)
        real(*args, **kwargs)

    monkeypatch.setattr(dpbridge.private_gradient, "check_gradients", counting)
    optimizer = make_optimizer(nn.Linear(4, 2))
    for size in (5, 6, 8, 13, 13):
        optimizer.backward(*make_batch(size))
    assert len(runs) == 2


def test_self_check_lets_an_example_pass_that_is_not_finite():
    x, y = make_batch()
    x[0] = float("nan")
    make_optimizer(nn.Linear(4, 2)).backward(x, y)


DROPOUTS = [
    nn.Dropout(0.5),
    nn.Dropout(0.5, inplace=True),
    nn.Dropout1d(0.5),
    nn.AlphaDropout(0.5),
    nn.FeatureAlphaDropout(0.5),
]


@pytest.mark.parametrize("layer", DROPOUTS)
def test_dropout_off_is_the_identity(layer):
    x = torch.randn(3, 4, 5)
    with DropoutOff():
        assert torch.equal(layer(x.clone()), x)
    assert not torch.equal(layer(x.clone()), x)


@pytest.mark.parametrize(
    "layer",
    [
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True),
        nn.LSTM(8, 4, 2, dropout=0.5, batch_first=True),
        nn.GRU(8, 4, 2, dropout=0.5, batch_first=True),
    ],
)
def test_dropout_off_reaches_into_layers(layer):
    def first(result):
        return result[0] if isinstance(result, tuple) else result

    x = torch.randn(3, 5, 8)
    with DropoutOff():
        found = first(layer(x))
    torch.testing.assert_close(found, first(layer.eval()(x)))


def test_dropout_off_reaches_attention():
    q = torch.randn(1, 2, 5, 4)
    attend = functional.scaled_dot_product_attention
    with DropoutOff():
        by_name, by_place = attend(q, q, q, dropout_p=0.5), attend(q, q, q, None, 0.5)
    torch.testing.assert_close(by_name, attend(q, q, q))
    torch.testing.assert_close(by_place, attend(q, q, q))
