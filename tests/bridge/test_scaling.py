"""scale_then_privatize with torch's optimizers, against a float64 loop over single examples."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import oracles
from dpbridge import DPOptimizer, PlanLoader, scale_then_privatize
from dpkernels.execution_plan import DPSGDConfig

EPS, CLIP_NORM = 0.05, 2.0
OPTIMIZERS = {
    "adam": (torch.optim.Adam, {}, "exp_avg_sq"),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}, "max_exp_avg_sq"),
    "adamw": (torch.optim.AdamW, {}, "exp_avg_sq"),
    "rmsprop": (torch.optim.RMSprop, {}, "square_avg"),
    "adagrad": (torch.optim.Adagrad, {"initial_accumulator_value": 0.3}, "sum"),
}


def make_model():
    torch.manual_seed(5)
    return nn.Linear(4, 2)


def make_batch(seed=0, size=9):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator)
    return x, torch.randn(size, 2, generator=generator)


def make_optimizer(model, base, **options):
    defaults = {
        "loss_fn": nn.MSELoss(),
        "l2_clip_norm": CLIP_NORM,
        "noise_multiplier": 0.0,
        "expected_batch_size": 9,
        "sampling_prob": 0.1,
        "seed": 0,
    }
    return DPOptimizer(scale_then_privatize(base, eps=EPS), model, **{**defaults, **options})


def expected_gradient(model, moments, batch):
    """Scales, clips, sums and scales back one example at a time, in float64."""
    scales = {name: 1 / (np.sqrt(v) + EPS) for name, v in moments.items()}
    gradients = oracles.torch_gradients(model, nn.MSELoss(), batch)
    scaled = [{name: g[name] * scales[name] for name in g} for g in gradients]
    total = oracles.clipped_sum(scaled, CLIP_NORM, normalize_by=9)
    return {name: total[name] / scales[name] for name in total}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_a_float64_loop(name):
    kind, options, key = OPTIMIZERS[name]
    model = make_model()
    optimizer = make_optimizer(model, kind(model.parameters(), lr=0.1, **options))
    start = options.get("initial_accumulator_value", 0.0)
    moments = {n: np.full(p.shape, start) for n, p in model.named_parameters()}
    for step in range(3):
        batch = make_batch(step)
        expected = expected_gradient(model, moments, batch)
        optimizer.backward(*batch)
        optimizer.step()
        found = {n: p.grad for n, p in model.named_parameters()}
        oracles.assert_close(found, expected, rtol=1e-4)
        moments = {n: optimizer.state[p][key].double().numpy() for n, p in model.named_parameters()}


def test_scaling_changes_what_is_clipped():
    model = make_model()
    base = torch.optim.Adagrad(model.parameters(), lr=0.1, initial_accumulator_value=0.3)
    scales = 1 / (math.sqrt(0.3) + EPS)
    gradients = oracles.torch_gradients(model, nn.MSELoss(), make_batch())
    norms = [scales * math.sqrt(sum((g**2).sum() for g in each.values())) for each in gradients]
    assert min(norms) < CLIP_NORM < max(norms)
    del base


def test_noise_is_added_in_the_scaled_space():
    model = nn.Linear(200, 100)
    base = torch.optim.Adagrad(model.parameters(), lr=0.0, initial_accumulator_value=4.0)
    optimizer = make_optimizer(model, base, noise_multiplier=1.5, self_check=False)
    optimizer.backward(torch.zeros(0, 200), torch.zeros(0, 100))
    optimizer.step()
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    # 20,100 draws: seven deviations of the estimate are 3.5 %.
    expected = 1.5 * CLIP_NORM * (2 + EPS) / 9
    assert float(grads.std()) == pytest.approx(expected, rel=0.035)


def test_plan_is_followed_in_the_scaled_space():
    model = make_model()
    config = DPSGDConfig(
        iterations=2,
        sampling_prob=0.5,
        noise_multiplier=0.0,
        l2_clip_norm=CLIP_NORM,
        normalize_by=9.0,
    )
    plan = config.make()
    loader = PlanLoader(plan, list(zip(*make_batch(size=20), strict=True)), seed=0)
    base = torch.optim.Adagrad(model.parameters(), lr=0.1, initial_accumulator_value=0.3)
    optimizer = DPOptimizer(
        scale_then_privatize(base, eps=EPS),
        model,
        loss_fn=nn.MSELoss(),
        plan=plan,
        loader=loader,
    )
    x, y = next(iter(loader))
    moments = {n: np.full(p.shape, 0.3) for n, p in model.named_parameters()}
    expected = expected_gradient(model, moments, (x, y))
    optimizer.backward(x, y)
    optimizer.step()
    oracles.assert_close({n: p.grad for n, p in model.named_parameters()}, expected, rtol=1e-4)


def test_copy_scales_too():
    model = make_model()
    optimizer = make_optimizer(model, torch.optim.Adam(model.parameters(), lr=0.1))
    twin = copy.deepcopy(optimizer)
    for each in (optimizer, twin):
        each.backward(*make_batch())
        each.step()
    ours, theirs = (
        torch.cat([p.grad.flatten() for p in each.param_groups[0]["params"]])
        for each in (optimizer, twin)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adadelta])
def test_optimizers_without_a_second_moment_are_refused(kind):
    with pytest.raises(TypeError, match="`base_optimizer` must be one of Adam"):
        scale_then_privatize(kind(make_model().parameters(), lr=0.1))


def test_centered_rmsprop_is_refused():
    base = torch.optim.RMSprop(make_model().parameters(), centered=True)
    with pytest.raises(NotImplementedError, match="must not be centered"):
        scale_then_privatize(base)


@pytest.mark.parametrize("eps", [-1.0, math.nan, 0.0])
def test_eps_must_be_positive(eps):
    with pytest.raises(ValueError, match="`eps` must be"):
        scale_then_privatize(torch.optim.Adam(make_model().parameters()), eps=eps)
