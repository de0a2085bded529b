"""DPOptimizer as a torch optimizer, and as a private mechanism."""

import copy
import io
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional
from torch.optim import lr_scheduler

import dpbridge
import oracles
from dpbridge import DPOptimizer

FEATURES, CLASSES = 6, 3


def make_model():
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def make_batch(size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, FEATURES, generator=generator)
    return x, torch.randint(CLASSES, (size,), generator=generator)


def make_optimizer(model, base=None, **options):
    base = base or torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    defaults = {
        "loss_fn": nn.CrossEntropyLoss(),
        "l2_clip_norm": 1.0,
        "noise_multiplier": 1.0,
        "expected_batch_size": 16,
        "sampling_prob": 0.01,
        "seed": 0,
    }
    return DPOptimizer(base, model, **{**defaults, **options})


def take_steps(optimizer, count, start=0):
    for i in range(start, start + count):
        optimizer.backward(*make_batch(seed=i))
        optimizer.step()
        optimizer.zero_grad()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def released(optimizer, model, *batches):
    """Gradients that one step releases, by name; the weights stay."""
    for batch in batches:
        optimizer.backward(*batch)
    optimizer.step()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.zero_grad()
    return grads


def plain(model):
    """A base optimizer that leaves the weights where they are."""
    return torch.optim.SGD(model.parameters(), lr=0.0)


# What is released


@pytest.mark.parametrize("microbatch_size", [None, 5])
@pytest.mark.parametrize("clip_norm", [0.1, 1.3, 100.0])
def test_step_releases_the_clipped_sum_of_a_float64_loop(clip_norm, microbatch_size):
    model = make_model()
    optimizer = make_optimizer(
        model,
        plain(model),
        l2_clip_norm=clip_norm,
        noise_multiplier=0.0,
        expected_batch_size=10,
        microbatch_size=microbatch_size,
    )
    x, y = make_batch(13)
    found = released(optimizer, model, (x, y))
    gradients = oracles.torch_gradients(model, nn.CrossEntropyLoss(), (x, y))
    expected = oracles.clipped_sum(gradients, clip_norm, normalize_by=10)
    oracles.assert_close(found, expected, rtol=1e-5)


def test_step_clips_some_examples_and_not_others():
    model = make_model()
    gradients = oracles.torch_gradients(model, nn.CrossEntropyLoss(), make_batch(13))
    norms = [math.sqrt(sum((g**2).sum() for g in gradient.values())) for gradient in gradients]
    assert min(norms) < 1.3 < max(norms)


def test_step_adds_gaussian_noise_at_the_stated_scale():
    model = nn.Linear(400, 250)  # 100 250 coordinates.
    optimizer = make_optimizer(
        model,
        plain(model),
        loss_fn=nn.MSELoss(),
        l2_clip_norm=0.7,
        noise_multiplier=1.3,
        expected_batch_size=50,
    )
    grads = released(optimizer, model, (torch.zeros(0, 400), torch.zeros(0, 250)))
    noise = torch.cat([grad.flatten() for grad in grads.values()]).numpy()
    assert noise.size > 100_000
    assert stats.kstest(noise * 50, stats.norm(scale=1.3 * 0.7).cdf).pvalue > 1e-3
    assert stats.kstest(noise * 50, stats.norm(scale=1.2 * 0.7).cdf).pvalue < 1e-9


def test_noise_scale_does_not_depend_on_the_drawn_size():
    model = make_model()
    sizes = []
    for size in (0, 3, 60):
        optimizer = make_optimizer(model, plain(model), noise_multiplier=0.0)
        exact = released(optimizer, model, make_batch(size))
        optimizer = make_optimizer(model, plain(model), noise_multiplier=2.0)
        noised = released(optimizer, model, make_batch(size))
        sizes.append(torch.cat([(noised[n] - exact[n]).flatten() for n in exact]))
    torch.testing.assert_close(sizes[0], sizes[1])
    torch.testing.assert_close(sizes[0], sizes[2])


def test_physical_batches_of_one_logical_batch_share_one_noise():
    x, y = make_batch(16)
    model = make_model()
    whole = make_optimizer(model, plain(model))
    expected = released(whole, model, (x, y))
    parts = make_optimizer(model, plain(model))
    found = released(parts, model, (x[:5], y[:5]), (x[5:5], y[5:5]), (x[5:], y[5:]))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    assert parts.ledger.steps == 1


def test_an_empty_draw_counts_and_releases_noise():
    model = make_model()
    optimizer = make_optimizer(model, plain(model))
    x, y = make_batch(0)
    assert optimizer.backward(x, y).item() == 0
    optimizer.step()
    assert optimizer.ledger.steps == 1
    assert all(p.grad.norm() > 0 for p in model.parameters())


def test_noise_is_fresh_at_each_step():
    model = make_model()
    optimizer = make_optimizer(model, plain(model))
    first = released(optimizer, model, make_batch(0))
    second = released(optimizer, model, make_batch(0))
    assert all(not torch.equal(first[name], second[name]) for name in first)


def test_noise_is_drawn_from_the_operating_system():
    model = make_model()
    draws = [
        released(make_optimizer(model, plain(model), seed=None), model, make_batch(0))
        for _ in range(2)
    ]
    assert all(not torch.equal(draws[0][name], draws[1][name]) for name in draws[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_example_that_is_not_finite_contributes_nothing(bad):
    model = make_model()
    optimizer = make_optimizer(model, plain(model), noise_multiplier=0.0)
    x, y = make_batch(9)
    keep = torch.arange(9) != 4
    expected = released(optimizer, model, (x[keep], y[keep]))
    x[4, 2] = bad
    found = released(optimizer, model, (x, y))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_the_ledger_records_before_the_gradient_is_released(monkeypatch):
    model = make_model()
    optimizer = make_optimizer(model)
    optimizer.backward(*make_batch())

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(optimizer._gradient, "release", crash)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert optimizer.ledger.steps == 1
    assert all(p.grad is None for p in model.parameters())


def test_no_example_depends_on_another():
    model = make_model()
    optimizer = make_optimizer(model, plain(model), noise_multiplier=0.0)
    x, y = make_batch(12)
    whole = released(optimizer, model, (x, y))
    alone = [released(optimizer, model, (x[i : i + 1], y[i : i + 1])) for i in range(12)]
    for name in whole:
        torch.testing.assert_close(whole[name], sum(grads[name] for grads in alone))


def test_an_interrupt_during_backward_counts_nothing_twice(monkeypatch):
    model = make_model()
    optimizer = make_optimizer(model, plain(model), noise_multiplier=0.0)
    expected = released(optimizer, model, make_batch())
    real = dpbridge.private_gradient.settle

    def interrupted(result):
        real(result)
        raise KeyboardInterrupt

    monkeypatch.setattr(dpbridge.private_gradient, "settle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.backward(*make_batch())
    monkeypatch.setattr(dpbridge.private_gradient, "settle", real)
    found = released(optimizer, model, make_batch())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_error_in_one_part_forgets_the_parts_before_it():
    model = make_model()
    optimizer = make_optimizer(model)
    x, y = make_batch()
    optimizer.backward(x, y)
    with pytest.raises(IndexError):
        optimizer.backward(x, y + CLASSES)
    with pytest.raises(RuntimeError, match="must follow a call of `backward`"):
        optimizer.step()


def test_an_error_of_the_base_optimizer_is_still_recorded(monkeypatch):
    optimizer = make_optimizer(make_model())

    def crash():
        raise OSError

    monkeypatch.setattr(optimizer.base_optimizer, "step", crash)
    optimizer.backward(*make_batch())
    with pytest.raises(OSError):  # noqa: PT011
        optimizer.step()
    assert optimizer.ledger.steps == 1


def test_writing_to_a_batch_after_backward_changes_nothing():
    model = nn.Sequential(nn.Linear(300, 2000), nn.Tanh(), nn.Linear(2000, CLASSES))
    optimizer = make_optimizer(
        model, plain(model), noise_multiplier=0.0, self_check=False, expected_batch_size=256
    )
    y = torch.zeros(256, dtype=torch.long)
    expected = None
    for _ in range(4):
        x = torch.linspace(-1, 1, 256 * 300).reshape(256, 300).clone()
        optimizer.backward(x, y)
        x.zero_()
        y.zero_()
        optimizer.step()
        grad = model[0].weight.grad.clone()
        optimizer.zero_grad()
        expected = grad if expected is None else expected
        assert torch.equal(grad, expected)


# As a torch optimizer


BASES = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "ASGD": lambda p: torch.optim.ASGD(p),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Rprop": lambda p: torch.optim.Rprop(p),
}


@pytest.mark.parametrize("base", BASES)
def test_without_clipping_and_noise_it_trains_as_torch_does(base):
    plain_model = make_model()
    model = copy.deepcopy(plain_model)
    reference = BASES[base](plain_model.parameters())
    optimizer = make_optimizer(
        model, BASES[base](model.parameters()), l2_clip_norm=1e6, noise_multiplier=0.0
    )
    for i in range(4):
        x, y = make_batch(seed=i)
        reference.zero_grad()
        functional.cross_entropy(plain_model(x), y).backward()
        reference.step()
        optimizer.zero_grad()
        optimizer.backward(x, y)
        optimizer.step()
    torch.testing.assert_close(weights(model), weights(plain_model), rtol=1e-3, atol=1e-5)


def test_it_is_an_optimizer_that_shares_groups_state_and_defaults():
    model = make_model()
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer = make_optimizer(model, base)
    assert isinstance(optimizer, torch.optim.Optimizer)
    take_steps(optimizer, 1)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert len(optimizer.state) == 4
    assert optimizer.defaults is base.defaults
    assert "Optimizer" in repr(optimizer)


def test_param_groups_keep_their_own_rates():
    model = make_model()
    groups = [
        {"params": model[0].parameters(), "lr": 0.0},
        {"params": model[2].parameters(), "lr": 1.0},
    ]
    optimizer = make_optimizer(model, torch.optim.SGD(groups, lr=0.1))
    before = copy.deepcopy(model.state_dict())
    take_steps(optimizer, 1)
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[2].weight, before["2.weight"])


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.5)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
}


def rates(optimizer, scheduler, steps=5):
    found = []
    for _ in range(steps):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SequentialLR warns about itself.
            scheduler.step(
                *([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else [])
            )
        group = optimizer.param_groups[0]
        found.append((group["lr"], group["momentum"]))
    return found


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_move_the_rates_as_on_the_base_optimizer(name):
    def make_base(model):
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    model = make_model()
    optimizer = make_optimizer(model, make_base(model))
    optimizer.backward(*make_batch(0))
    base = make_base(make_model())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        scheduler, expected = SCHEDULERS[name](optimizer), SCHEDULERS[name](base)
    optimizer.step()
    base.step()
    assert rates(optimizer, scheduler) == rates(base, expected)


def test_step_returns_what_its_closure_returns():
    model = make_model()
    optimizer = make_optimizer(model)
    x, y = make_batch()

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        return optimizer.backward(x, y)

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.item() == pytest.approx(math.log(CLASSES), abs=0.5)
    assert optimizer.ledger.steps == 1


def test_step_hooks_run():
    model = make_model()
    optimizer = make_optimizer(model)
    seen = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(("pre", o)))
    optimizer.register_step_post_hook(lambda o, *_: seen.append(("post", o)))
    take_steps(optimizer, 1)
    assert seen == [("pre", optimizer), ("post", optimizer)]


def test_state_dict_hooks_run():
    model = make_model()
    optimizer = make_optimizer(model)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append(o))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, state: seen.append(state["extra"]))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [optimizer, 1, "loaded"]


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))]
)
def test_a_copy_trains_its_own_model_with_noise_of_its_own(duplicate):
    model = make_model()
    optimizer = make_optimizer(model)
    take_steps(optimizer, 1)
    twin, twin_model = duplicate((optimizer, model))
    before = weights(model)
    take_steps(twin, 1)
    assert torch.equal(weights(model), before)
    assert (twin.ledger.steps, optimizer.ledger.steps) == (2, 1)
    take_steps(optimizer, 1)
    assert not torch.allclose(weights(model), weights(twin_model), atol=1e-3)


def test_a_pickle_does_not_hold_the_seed():
    optimizer = make_optimizer(make_model(), seed=0x1234567890ABCDEF)
    assert (0x1234567890ABCDEF).to_bytes(8, "little") not in pickle.dumps(optimizer)


def test_a_copy_trains_as_the_original_does_but_for_the_noise():
    model = make_model()
    optimizer = make_optimizer(model, noise_multiplier=0.0)
    take_steps(optimizer, 2)
    twin, twin_model = pickle.loads(pickle.dumps((optimizer, model)))
    take_steps(optimizer, 2, start=2)
    take_steps(twin, 2, start=2)
    assert torch.equal(weights(model), weights(twin_model))


def test_a_shallow_copy_has_noise_of_its_own():
    model = make_model()
    optimizer = make_optimizer(model, plain(model))
    twin = copy.copy(optimizer)
    assert twin.base_optimizer is optimizer.base_optimizer
    first = released(optimizer, model, make_batch(0))
    optimizer.zero_grad()
    second = released(twin, model, make_batch(0))
    assert all(not torch.allclose(first[name], second[name]) for name in first)


def test_resuming_from_a_state_dict_continues_bit_for_bit():
    model = make_model()
    optimizer = make_optimizer(model, torch.optim.Adam(model.parameters(), lr=0.01))
    take_steps(optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    take_steps(optimizer, 3, start=3)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed_model = make_model()
    resumed = make_optimizer(
        resumed_model, torch.optim.Adam(resumed_model.parameters(), lr=0.5), seed=99
    )
    resumed_model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    take_steps(resumed, 3, start=3)
    assert torch.equal(weights(model), weights(resumed_model))
    assert resumed.epsilon(1e-5) == optimizer.epsilon(1e-5)


def test_going_back_keeps_the_longer_ledger_and_the_later_noise():
    model = make_model()
    optimizer = make_optimizer(model, plain(model))
    start = copy.deepcopy(optimizer.state_dict())
    first = released(optimizer, model, make_batch(0))
    optimizer.load_state_dict(start)
    assert optimizer.ledger.steps == 1
    second = released(optimizer, model, make_batch(0))
    assert all(not torch.equal(first[name], second[name]) for name in first)
    assert optimizer.ledger.steps == 2


def test_the_state_of_another_run_is_refused_once_steps_were_made():
    state = make_optimizer(make_model(), seed=5).state_dict()
    optimizer = make_optimizer(make_model())
    take_steps(optimizer, 1)
    with pytest.raises(ValueError, match="must be of this run"):
        optimizer.load_state_dict(state)


def test_zero_grad_forgets_what_was_added():
    model = make_model()
    optimizer = make_optimizer(model, plain(model), noise_multiplier=0.0)
    expected = released(optimizer, model, make_batch(seed=1))
    optimizer.backward(*make_batch(seed=0))
    optimizer.zero_grad()
    found = released(optimizer, model, make_batch(seed=1))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_zero_grad_that_fills_with_zeros_is_no_foreign_gradient():
    model = make_model()
    optimizer = make_optimizer(model)
    for i in range(2):
        optimizer.zero_grad(set_to_none=False)
        optimizer.backward(*make_batch(seed=i))
        optimizer.step()
    assert optimizer.ledger.steps == 2


def test_frozen_parameters_get_no_gradient_until_unfrozen():
    model = make_model()
    model[0].requires_grad_(False)
    optimizer = make_optimizer(model)
    take_steps(optimizer, 1)
    optimizer.backward(*make_batch())
    optimizer.step()
    assert model[0].weight.grad is None
    model[0].requires_grad_(True)
    optimizer.zero_grad()
    optimizer.backward(*make_batch())
    optimizer.step()
    assert model[0].weight.grad is not None


def test_parameters_left_to_nobody_are_frozen():
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, torch.optim.SGD(model[2].parameters(), lr=0.1))
    take_steps(optimizer, 1)
    assert torch.equal(model[0].weight, before["0.weight"])
    optimizer.add_param_group({"params": model[0].parameters()})
    take_steps(optimizer, 1)
    assert not torch.equal(model[0].weight, before["0.weight"])


# Batches and models


def test_backward_returns_the_mean_loss():
    model = make_model()
    x, y = make_batch(11)
    loss = make_optimizer(model).backward(x, y)
    assert loss.shape == ()
    assert not loss.requires_grad
    torch.testing.assert_close(loss, functional.cross_entropy(model(x), y).detach())


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(FEATURES, CLASSES)

    def forward(self, inputs, pair, *, shift=None, negate=False):
        h = self.linear(inputs["x"] + pair[0] * pair[1][0])
        h = h if shift is None else h + shift
        return -h if negate else h


def test_backward_takes_nested_inputs_keywords_and_settings():
    model = Nested()
    optimizer = make_optimizer(model, plain(model), noise_multiplier=0.0, l2_clip_norm=1e6)
    x, y = make_batch(5)
    scale, shift = torch.rand(5, 1), torch.rand(5, CLASSES)
    batch = ({"x": x}, (scale, [x]), y)
    loss = optimizer.backward(*batch, shift=shift, negate=True)
    expected = functional.cross_entropy(model({"x": x}, (scale, [x]), shift=shift, negate=True), y)
    torch.testing.assert_close(loss, expected.detach())
    other = optimizer.backward(*batch, shift=None)
    torch.testing.assert_close(
        other, functional.cross_entropy(model({"x": x}, (scale, [x])), y).detach()
    )


class ReturnsLoss(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.linear, self.wrap = nn.Linear(FEATURES, CLASSES), wrap

    def forward(self, x, labels):
        loss = functional.cross_entropy(self.linear(x), labels)
        return Output(loss) if self.wrap else loss


class Output:
    def __init__(self, loss):
        self.loss = loss


@pytest.mark.parametrize("wrap", [False, True])
def test_backward_takes_the_loss_from_the_model(wrap):
    model = ReturnsLoss(wrap)
    optimizer = make_optimizer(model, loss_fn=None)
    x, y = make_batch(5)
    loss = optimizer.backward(x, labels=y)
    torch.testing.assert_close(loss, functional.cross_entropy(model.linear(x), y).detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.slow
def test_other_precisions_train_and_get_gradients_of_their_own(dtype):
    model = make_model().to(dtype)
    optimizer = make_optimizer(model, plain(model), noise_multiplier=0.0)
    x, y = make_batch(8)
    grads = released(optimizer, model, (x.to(dtype), y))
    gradients = oracles.torch_gradients(model, nn.CrossEntropyLoss(), (x.to(dtype), y))
    expected = oracles.clipped_sum(gradients, 1.0, normalize_by=16)
    assert {grad.dtype for grad in grads.values()} == {dtype}
    oracles.assert_close(grads, expected, rtol=1e-12 if dtype == torch.float64 else 2e-2)


@pytest.mark.slow
def test_dropout_trains_with_fresh_masks():
    model = nn.Sequential(nn.Linear(FEATURES, 64), nn.Dropout(0.5), nn.Linear(64, CLASSES))
    optimizer = make_optimizer(model, plain(model), noise_multiplier=0.0)
    first = released(optimizer, model, make_batch())
    second = released(optimizer, model, make_batch())
    assert not torch.equal(first["2.weight"], second["2.weight"])
    model.eval()
    third = released(optimizer, model, make_batch())
    fourth = released(optimizer, model, make_batch())
    assert torch.equal(third["2.weight"], fourth["2.weight"])


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(FEATURES, CLASSES), 1.0
        self.register_buffer("shift", torch.zeros(CLASSES))
        self.offset = torch.zeros(CLASSES)

    def forward(self, x):
        return self.linear(x) * self.scale + self.shift + self.offset


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "scale", 3.0),
        lambda m: m.shift.copy_(torch.tensor([1.0, 2.0, -1.0])),
        lambda m: setattr(m, "shift", torch.tensor([1.0, 2.0, -1.0])),
        lambda m: m.offset.copy_(torch.tensor([1.0, 2.0, -1.0])),
        lambda m: setattr(m, "offset", torch.tensor([1.0, 2.0, -1.0])),
    ],
)
@pytest.mark.slow
def test_a_setting_or_buffer_changed_between_steps_is_seen(change):
    model = Scaled()
    optimizer = make_optimizer(model)
    take_steps(optimizer, 1)
    change(model)
    x, y = make_batch()
    loss = optimizer.backward(x, y)
    torch.testing.assert_close(loss, functional.cross_entropy(model(x), y).detach())


class Tunable(nn.Module):
    """Things that a program is lowered from and that none of its tensors shows."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, CLASSES), nn.Tanh()
        self.factors, self.act, self.extra = [1.0], torch.tanh, None

    def forward(self, x):
        h = self.act(self.second(self.first(x))) * self.factors[0]
        return h if self.extra is None else h + 1


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "second", nn.Sigmoid()),
        lambda m: setattr(m, "act", torch.sigmoid),
        pytest.param(lambda m: m.factors.__setitem__(0, 3.0), marks=pytest.mark.slow),
        pytest.param(lambda m: setattr(m, "extra", object()), marks=pytest.mark.slow),
        pytest.param(
            lambda m: setattr(m, "forward", lambda x: m.first(x) * 2), marks=pytest.mark.slow
        ),
        lambda m: m.first.register_forward_hook(lambda *args: args[-1] * 3),
        pytest.param(
            lambda m: m.first.register_forward_pre_hook(lambda module, args: (args[0] * 3,)),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_model_rebuilt_between_steps_is_lowered_anew(change):
    model = Tunable()
    optimizer = make_optimizer(model, plain(model), noise_multiplier=0.0)
    released(optimizer, model, make_batch())
    change(model)
    x, y = make_batch()
    loss = optimizer.backward(x, y)
    torch.testing.assert_close(loss, functional.cross_entropy(model(x), y).detach())


def test_a_loss_changed_between_steps_is_lowered_anew():
    class Weighted:
        weight = 1.0

        def __call__(self, output, y):
            return self.weight * functional.cross_entropy(output, y)

    def closure():
        def loss(output, y):
            return scale * functional.cross_entropy(output, y)

        scale = 1.0
        yield loss
        scale = 2.0
        yield

    for loss_fn, change in [(w := Weighted(), lambda w=w: setattr(w, "weight", 2.0))]:
        optimizer = make_optimizer(make_model(), loss_fn=loss_fn)
        once = optimizer.backward(*make_batch())
        change()
        torch.testing.assert_close(optimizer.backward(*make_batch()), 2 * once)

    steps = closure()
    optimizer = make_optimizer(make_model(), loss_fn=next(steps))
    once = optimizer.backward(*make_batch())
    next(steps)
    torch.testing.assert_close(optimizer.backward(*make_batch()), 2 * once)


def test_a_loss_may_close_over_a_tensor():
    scales = torch.tensor([1.0, 2.0, 3.0])
    x, y = make_batch(5)
    model = make_model()
    optimizer = make_optimizer(
        model, loss_fn=lambda output, y: functional.cross_entropy(output * scales, y)
    )
    expected = functional.cross_entropy(model(x) * scales, y).detach()
    torch.testing.assert_close(optimizer.backward(x, y), expected)


@pytest.mark.slow
def test_programs_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(dpbridge.programs, "_MOST", 2)
    model = Scaled()
    optimizer = make_optimizer(model)
    for scale in (1.0, 2.0, 3.0):
        model.scale = scale
        take_steps(optimizer, 1)
    assert len(optimizer._gradient._programs) == 2


class CountsCalls(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(FEATURES, CLASSES), 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x)


def test_a_module_that_counts_its_calls_is_lowered_once():
    model = CountsCalls()
    optimizer = make_optimizer(model)
    take_steps(optimizer, 1)
    calls = model.calls
    take_steps(optimizer, 3)
    assert model.calls == calls


# What is refused


def test_more_examples_than_a_draw_can_have_leave_epsilon_unstated():
    optimizer = make_optimizer(make_model(), expected_batch_size=16, sampling_prob=0.01)
    for part in range(3):
        optimizer.backward(*make_batch(32, seed=part))
    optimizer.step()
    assert optimizer.ledger.steps == 1
    with pytest.raises(ValueError, match=r"1 steps with more examples than Poisson subsampling"):
        optimizer.epsilon(1e-5)


@pytest.mark.parametrize(
    ("expected", "sampling_prob", "drawn", "is_plausible"),
    [
        (256, 0.01, 330, True),
        (256, 0.01, 512, False),
        (256, 1.0, 256, True),
        (256, 1.0, 257, False),
        (1, 0.001, 10, True),
        (1, 0.001, 488, False),
        (0.01, 1e-4, 0, True),
    ],
)
def test_draws_beyond_the_tail_are_told_apart(expected, sampling_prob, drawn, is_plausible):
    optimizer = make_optimizer(
        make_model(), expected_batch_size=expected, sampling_prob=sampling_prob
    )
    optimizer._run.record(drawn)
    assert (optimizer.ledger.unknown_steps == 0) is is_plausible


def test_two_draws_in_every_step_are_told_from_one():
    optimizer = make_optimizer(make_model(), expected_batch_size=8, sampling_prob=0.008)
    rng = np.random.default_rng(0)
    for _ in range(40):
        optimizer._run.record(int(rng.binomial(1000, 0.008, size=2).sum()))
    assert optimizer.ledger.unknown_steps
    with pytest.raises(ValueError, match="must follow from how batches were drawn"):
        optimizer.epsilon(1e-5)


def test_honest_draws_are_never_suspected():
    optimizer = make_optimizer(make_model(), expected_batch_size=8, sampling_prob=0.008)
    for drawn in np.random.default_rng(1).binomial(1000, 0.008, size=2000):
        optimizer._run.record(int(drawn))
    assert not optimizer.ledger.unknown_steps


def test_the_sampling_probability_cannot_be_changed():
    with pytest.raises(AttributeError):
        make_optimizer(make_model()).sampling_prob = 1e-9


def test_inference_mode_is_refused():
    optimizer = make_optimizer(make_model())
    with torch.inference_mode(), pytest.raises(NotImplementedError, match="must run outside"):
        optimizer.backward(*make_batch())


def test_data_parallel_is_refused():
    model = make_model()
    with pytest.raises(NotImplementedError, match="must run on one device, got DataParallel"):
        make_optimizer(nn.DataParallel(model), plain(model))


@pytest.mark.slow
def test_layers_added_later_can_be_trained():
    model = make_model()
    optimizer = make_optimizer(model)
    take_steps(optimizer, 1)
    model.append(nn.Linear(CLASSES, CLASSES))
    optimizer.add_param_group({"params": model[3].parameters()})
    before = model[3].weight.detach().clone()
    take_steps(optimizer, 1)
    assert not torch.equal(model[3].weight, before)


def test_a_parameter_replaced_in_the_model_is_refused():
    model = make_model()
    optimizer = make_optimizer(model)
    model[0] = nn.Linear(FEATURES, 8)
    with pytest.raises(ValueError, match=r"`0\.bias` must be the parameter that the"):
        optimizer.backward(*make_batch())


def test_a_parameter_frozen_with_a_gradient_left_does_not_move():
    model = make_model()
    optimizer = make_optimizer(model)
    optimizer.backward(*make_batch())
    optimizer.step()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.detach().clone()
    optimizer.backward(*make_batch(0))
    optimizer.step()
    assert torch.equal(model[0].weight, before)


def test_a_gradient_added_to_the_released_one_is_refused():
    model = make_model()
    optimizer = make_optimizer(model)
    take_steps(optimizer, 1)
    functional.cross_entropy(model(make_batch()[0]), make_batch()[1]).backward()
    optimizer.backward(*make_batch(0))
    with pytest.raises(RuntimeError, match=r"must be left to DPOptimizer|must stay as"):
        optimizer.step()
    assert optimizer.ledger.steps == 1


def test_step_without_backward_is_an_error_and_costs_nothing():
    model = make_model()
    optimizer = make_optimizer(model)
    before = weights(model)
    with pytest.raises(RuntimeError, match="`step` must follow a call of `backward`"):
        optimizer.step()
    take_steps(optimizer, 1)
    with pytest.raises(RuntimeError, match="`step` must follow a call of `backward`"):
        optimizer.step()
    assert optimizer.ledger.steps == 1
    assert not torch.equal(weights(model), before)


def test_a_gradient_from_elsewhere_is_refused_before_anything_is_spent():
    model = make_model()
    optimizer = make_optimizer(model)
    x, y = make_batch()
    functional.cross_entropy(model(x), y).backward()
    optimizer.backward(x, y)
    with pytest.raises(RuntimeError, match=r"`0.bias.grad` must be left to DPOptimizer"):
        optimizer.step()
    assert optimizer.ledger.steps == 0


def test_a_foreign_gradient_of_a_frozen_parameter_is_refused():
    model = make_model()
    optimizer = make_optimizer(model)
    model[0].weight.requires_grad_(False)
    optimizer.backward(*make_batch())
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with pytest.raises(RuntimeError, match=r"`0\.weight\.grad` must be left to DPOptimizer"):
        optimizer.step()


@pytest.mark.parametrize("first", [0, 5])
def test_freezing_between_backward_and_step_is_refused(first):
    model = make_model()
    optimizer = make_optimizer(model)
    optimizer.backward(*make_batch(5))
    model[0].weight.requires_grad_(False)
    action = optimizer.step if first else lambda: optimizer.backward(*make_batch(5))
    with pytest.raises(RuntimeError, match=r"frozen or unfrozen.*change of 0\.weight"):
        action()


def test_a_group_smuggled_into_the_base_optimizer_is_refused():
    optimizer = make_optimizer(make_model())
    optimizer.base_optimizer.add_param_group({"params": make_model().parameters()})
    with pytest.raises(ValueError, match="must hold parameters of `model` alone"):
        optimizer.backward(*make_batch())


@pytest.mark.parametrize("what", ["state_dict", "copying", "add_param_group"])
def test_a_sum_that_is_not_noised_is_not_saved(what):
    model = make_model()
    optimizer = make_optimizer(model)
    optimizer.backward(*make_batch())
    actions = {
        "state_dict": optimizer.state_dict,
        "copying": lambda: pickle.dumps(optimizer),
        "add_param_group": lambda: optimizer.add_param_group({"params": []}),
    }
    with pytest.raises(RuntimeError, match=f"`{what}` must not fall between"):
        actions[what]()


NEGATIVE_NAN_INFINITE = [-1.0, math.nan, math.inf]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[({"l2_clip_norm": v}, "`l2_clip_norm` must be") for v in [0, *NEGATIVE_NAN_INFINITE]],
        *[({"noise_multiplier": v}, "`noise_multiplier` must be") for v in NEGATIVE_NAN_INFINITE],
        *[
            ({"expected_batch_size": v}, "`expected_batch_size` must be")
            for v in [0, *NEGATIVE_NAN_INFINITE]
        ],
        *[({"sampling_prob": v}, "`sampling_prob` must be") for v in [0.0, 1.1, math.nan, -0.1]],
        ({"microbatch_size": 0}, "`microbatch_size` must be at least 1"),
        ({"seed": -1}, "`seed` must be at least 0"),
        ({"seed": 2**64}, "`seed` must be below"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(make_model(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l2_clip_norm": "1"}, "`l2_clip_norm` must be a real number"),
        ({"noise_multiplier": None}, "`noise_multiplier` must be a real number"),
        ({"microbatch_size": 2.5}, "`microbatch_size` must be an integer"),
        ({"loss_fn": 3}, "`loss_fn` must be callable"),
        ({"max_grad_norm": 1.0}, "max_grad_norm"),
    ],
)
def test_wrong_types_and_unknown_names_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        make_optimizer(make_model(), **options)


def test_an_optimizer_over_other_parameters_is_refused():
    other = torch.optim.SGD(make_model().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="must hold parameters of `model` alone"):
        make_optimizer(make_model(), other)


def test_a_group_of_other_parameters_is_refused():
    optimizer = make_optimizer(make_model())
    with pytest.raises(ValueError, match="must hold parameters of `model` alone"):
        optimizer.add_param_group({"params": make_model().parameters()})


def test_what_is_no_optimizer_is_refused():
    model = make_model()
    with pytest.raises(TypeError, match="`optimizer` must be a plain torch optimizer, got list"):
        DPOptimizer([], model, l2_clip_norm=1.0, noise_multiplier=1.0, expected_batch_size=1)
    with pytest.raises(TypeError, match="got DPOptimizer"):
        make_optimizer(model, make_optimizer(model))


def test_what_is_no_module_is_refused():
    model = make_model()
    with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module"):
        make_optimizer(lambda x: x, plain(model))


def test_lbfgs_is_refused():
    model = make_model()
    with pytest.raises(NotImplementedError, match="LBFGS"):
        make_optimizer(model, torch.optim.LBFGS(model.parameters()))


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(8),
        nn.BatchNorm2d(8, affine=False),
        nn.BatchNorm3d(8).eval(),
        nn.BatchNorm1d(8, track_running_stats=False).requires_grad_(False),
        nn.SyncBatchNorm(8),
        nn.LazyBatchNorm1d(),
    ],
)
def test_batch_norm_is_refused_by_name(layer):
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Sequential(layer))
    base = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(NotImplementedError, match=r"BatchNorm.* at `1\.0`.*GroupNorm"):
        make_optimizer(model, base)


def test_functional_batch_norm_is_refused():
    class Hidden(nn.Linear):
        def forward(self, x):
            hidden = super().forward(x).unsqueeze(-1).expand(-1, -1, 2)
            return functional.batch_norm(hidden, None, None, training=True).mean(-1)

    model = Hidden(FEATURES, CLASSES)
    optimizer = make_optimizer(model)
    with pytest.raises(NotImplementedError, match=r"batch_norm.* at .*test_optimizer\.py"):
        optimizer.backward(*make_batch())
    assert optimizer.ledger.steps == 0


@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(reduction="none"),
        lambda output, y: output.argmax(),
        lambda output, y: (output.sum(), y),
        lambda output, y: None,
    ],
)
def test_a_loss_that_is_no_scalar_is_refused(loss_fn):
    optimizer = make_optimizer(make_model(), loss_fn=loss_fn)
    with pytest.raises(ValueError, match="`loss_fn` must return one floating-point scalar"):
        optimizer.backward(*make_batch())
    with pytest.raises(RuntimeError, match="must follow a call of `backward`"):
        optimizer.step()


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (
            (torch.ones(4, FEATURES), torch.ones(3, dtype=torch.long)),
            ValueError,
            "one size on axis 0",
        ),
        ((torch.ones(4, FEATURES), torch.tensor(1)), ValueError, "examples on axis 0"),
        ((np.ones((4, FEATURES)), torch.ones(4)), TypeError, "got ndarray"),
        ((torch.ones(4, FEATURES), 3), TypeError, "got int"),
        (
            (torch.ones(4, FEATURES, device="meta"), torch.ones(4, device="meta")),
            ValueError,
            "device",
        ),
        ((), TypeError, "must be given the target last"),
        ((None, "a"), ValueError, "at least one tensor"),
    ],
)
def test_a_bad_batch_is_refused(batch, error, message):
    optimizer = make_optimizer(make_model())
    with pytest.raises(error, match=message):
        optimizer.backward(*batch)
    assert optimizer.ledger.steps == 0


def test_a_label_out_of_range_is_refused_as_torch_does():
    optimizer = make_optimizer(make_model())
    x, y = make_batch()
    y[3] = CLASSES
    with pytest.raises(IndexError, match=r"\[0, 3\)|in range|must be"):
        optimizer.backward(x, y)
    with pytest.raises(RuntimeError, match="must follow"):
        optimizer.step()


def test_a_model_on_two_devices_is_refused():
    model = make_model()
    model[2].to("meta")
    with pytest.raises(ValueError, match="`model` must lie on one device, got cpu, meta"):
        make_optimizer(model)


def test_an_op_without_a_rule_names_itself_and_the_line():
    class Exotic(nn.Linear):
        def forward(self, x):
            return torch.special.i0(super().forward(x))  # the culprit

    optimizer = make_optimizer(Exotic(FEATURES, CLASSES))
    with pytest.raises(NotImplementedError, match=r"special_i0.*test_optimizer\.py.*the culprit"):
        optimizer.backward(*make_batch())


def test_epsilon_needs_the_sampling_probability():
    optimizer = make_optimizer(make_model(), sampling_prob=None)
    take_steps(optimizer, 1)
    with pytest.raises(ValueError, match="sampling_prob"):
        optimizer.epsilon(1e-5)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_epsilon_refuses_a_delta(delta):
    with pytest.raises(ValueError, match="`delta` must be in"):
        make_optimizer(make_model()).epsilon(delta)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_epsilon_is_that_of_the_helper(accountant):
    optimizer = make_optimizer(make_model())
    assert optimizer.epsilon(1e-5) == 0
    take_steps(optimizer, 3)
    expected = dpbridge.accounting.compute_epsilon(
        noise_multiplier=1.0, sampling_prob=0.01, steps=3, delta=1e-5, accountant=accountant
    )
    assert optimizer.epsilon(delta=1e-5, accountant=accountant) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("dpbridge"), "must hold `dpbridge`"),
        (lambda state: state["dpbridge"].pop("ledger"), "must hold `dpbridge`"),
        (lambda state: state["dpbridge"].update(version=99), "must be of version 1"),
        (lambda state: state["dpbridge"]["noise"].update(steps=-1), r"`noise.steps` must be"),
        (lambda state: state["dpbridge"]["noise"].update(steps=2**32), r"`noise.steps` must be"),
        (lambda state: state["dpbridge"]["noise"].update(seed=2**70), "`seed` must be below"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(damage, message):
    model = make_model()
    optimizer = make_optimizer(model)
    take_steps(optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    damage(state)
    fresh = make_optimizer(make_model())
    before = fresh.state_dict()
    with pytest.raises(ValueError, match=message):
        fresh.load_state_dict(state)
    assert fresh.state_dict() == before


@pytest.mark.gpu
def test_training_on_the_gpu_equals_training_on_the_cpu():
    cpu_model = make_model()
    gpu_model = copy.deepcopy(cpu_model).to("cuda")
    for model in (cpu_model, gpu_model):
        optimizer = make_optimizer(model, noise_multiplier=0.5)
        device = next(model.parameters()).device
        for i in range(5):
            optimizer.backward(*[leaf.to(device) for leaf in make_batch(seed=i)])
            optimizer.step()
            assert all(p.grad.device == device for p in model.parameters())
            optimizer.zero_grad()
    torch.testing.assert_close(weights(gpu_model).cpu(), weights(cpu_model), rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_writes_to_batch_and_weights_do_not_overtake_backward_on_the_gpu():
    model = nn.Sequential(nn.Linear(3000, 4000), nn.Tanh(), nn.Linear(4000, CLASSES)).to("cuda")
    saved = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(
        model, plain(model), noise_multiplier=0.0, self_check=False, expected_batch_size=512
    )
    expected = None
    for _ in range(10):
        x = torch.linspace(-1, 1, 512 * 3000, device="cuda").reshape(512, 3000).clone()
        optimizer.backward(x, torch.zeros(512, dtype=torch.long, device="cuda"))
        x.zero_()
        with torch.no_grad():
            _ = [p.zero_() for p in model.parameters()]
        optimizer.step()
        model.load_state_dict(saved)
        grad = model[0].weight.grad.clone()
        optimizer.zero_grad()
        expected = grad if expected is None else expected
        assert torch.equal(grad, expected)


@pytest.mark.gpu
def test_a_batch_on_another_device_is_refused():
    optimizer = make_optimizer(make_model().to("cuda"))
    with pytest.raises(ValueError, match="must be on the parameters' device cuda:0, got cpu"):
        optimizer.backward(*make_batch())


# What a step costs


def test_explain_names_every_trainable_parameter_and_changes_nothing():
    model = make_model()
    model[0].bias.requires_grad_(False)
    optimizer = make_optimizer(model)
    before = str(optimizer.state_dict())
    table = str(optimizer.explain(*make_batch()))
    assert all(name in table for name in ("0.weight", "2.weight", "2.bias"))
    assert "0.bias" not in table
    assert str(optimizer.state_dict()) == before
    assert optimizer.ledger.steps == 0


def test_explain_refuses_where_every_gradient_is_formed():
    model = make_model()
    base = torch.optim.Adam(model.parameters())
    optimizer = make_optimizer(model, dpbridge.scale_then_privatize(base))
    with pytest.raises(NotImplementedError, match="must be asked of a gradient that is taken"):
        optimizer.explain(*make_batch())
