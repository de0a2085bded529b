"""DPOptimizer with a plan: the plan's clipping, noise, steps and epsilon, and no others."""

import copy
import io
import pickle

import dp_accounting
import numpy as np
import optax
import pytest
import torch
from torch import nn

import oracles
from dpbridge import DPOptimizer, PlanLoader
from dpkernels.execution_plan import (
    BandMFConfig,
    DPExecutionPlan,
    DPSGDConfig,
    NonPrivateConfig,
    PerformanceFlags,
)

FEATURES, EXAMPLES, STEPS = 5, 40, 6
POISSON = DPSGDConfig(iterations=STEPS, sampling_prob=0.2, noise_multiplier=1.5, normalize_by=8.0)
BANDED = BandMFConfig(
    iterations=STEPS, expected_participations=1.0, strategy=(1.0, 0.5, 0.25), noise_multiplier=1.5
)


def make_dataset():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(EXAMPLES, FEATURES, generator=generator)
    return torch.utils.data.TensorDataset(x, torch.randn(EXAMPLES, 2, generator=generator))


def by_hand(made):
    """A plan of the same parts that no config made."""
    return DPExecutionPlan(
        made.clipped_grad,
        made.batch_selection_strategy,
        made.noise_addition_transform,
        made.dp_event,
        made.neighboring_relation,
    )


def make_model():
    torch.manual_seed(5)
    return nn.Linear(FEATURES, 2)


def make_optimizer(model, plan, loader=None, *, lr=0.0, **options):
    base = torch.optim.SGD(model.parameters(), lr=lr)
    return DPOptimizer(base, model, loss_fn=nn.MSELoss(), plan=plan, loader=loader, **options)


def make_run(config, *, flags=None, lr=0.0, **options):
    """Returns a model, its optimizer and the plan's loader."""
    plan = config.make(flags or PerformanceFlags(noise_seed=7))
    model = make_model()
    loader = PlanLoader(plan, make_dataset(), seed=11)
    return model, make_optimizer(model, plan, loader, lr=lr, **options), loader


def take_steps(optimizer, loader, count):
    """Returns what each step releases, as one vector."""
    released = []
    for _, batch in zip(range(count), loader, strict=False):
        optimizer.backward(*batch)
        optimizer.step()
        grads = [p.grad for p in optimizer.param_groups[0]["params"]]
        released.append(torch.cat([grad.flatten() for grad in grads]))
        optimizer.zero_grad()
    return torch.stack(released)


@pytest.mark.parametrize(
    ("flags", "rescale"),
    [
        ({}, False),
        ({"microbatch_size": 3}, True),
        ({"keep_batch_dim": False}, False),
        ({"strategy": "materialize"}, True),
    ],
    ids=str,
)
def test_step_releases_the_plans_clipped_sum(flags, rescale):
    config = DPSGDConfig(
        iterations=STEPS,
        sampling_prob=0.5,
        noise_multiplier=0.0,
        l2_clip_norm=1.7,
        rescale_to_unit_norm=rescale,
        normalize_by=8.0,
    )
    model, optimizer, loader = make_run(config, flags=PerformanceFlags(**flags))
    x, y = next(iter(loader))
    optimizer.backward(x, y)
    optimizer.step()
    gradients = oracles.torch_gradients(model, nn.MSELoss(), (x, y))
    expected = oracles.clipped_sum(gradients, 1.7, rescale=rescale, normalize_by=8.0)
    found = {name: p.grad for name, p in model.named_parameters()}
    oracles.assert_close(found, expected, rtol=1e-5)


def test_layers_are_clipped_each_by_its_own_name():
    config = DPSGDConfig(
        iterations=STEPS,
        sampling_prob=0.5,
        noise_multiplier=0.0,
        l2_clip_norm={"weight": 0.9, "bias": 0.2},
    )
    model, optimizer, loader = make_run(config)
    x, y = next(iter(loader))
    optimizer.backward(x, y)
    optimizer.step()
    gradients = oracles.torch_gradients(model, nn.MSELoss(), (x, y))
    for name, bound in config.l2_clip_norm.items():
        layer = [{name: gradient[name]} for gradient in gradients]
        found = {name: model.get_parameter(name).grad}
        oracles.assert_close(found, oracles.clipped_sum(layer, bound), rtol=1e-5)


def test_layers_of_other_names_are_refused():
    config = DPSGDConfig(
        iterations=STEPS, sampling_prob=0.5, noise_multiplier=1.0, l2_clip_norm={"weight": 0.9}
    )
    with pytest.raises(ValueError, match="`l2_clip_norm` must be a number, or a number for each"):
        make_run(config)


@pytest.mark.parametrize(
    "config",
    [pytest.param(POISSON, marks=pytest.mark.slow), BANDED],
    ids=["poisson", "banded"],
)
def test_noise_is_the_plans_own(config):
    quiet = type(config)(**{**vars(config), "noise_multiplier": 0.0})
    _, optimizer, loader = make_run(config)
    noisy = take_steps(optimizer, loader, STEPS)
    _, optimizer, loader = make_run(quiet)
    noise = (noisy - take_steps(optimizer, loader, STEPS)).numpy()

    plan = config.make(PerformanceFlags(noise_seed=7))
    zeros = {"bias": np.zeros(2, np.float32), "weight": np.zeros((2, FEATURES), np.float32)}
    state = plan.noise_addition_transform.init(zeros)
    for row in noise:
        own, state = plan.noise_addition_transform.update(zeros, state)
        expected = np.concatenate([np.ravel(own["weight"]), np.ravel(own["bias"])])
        np.testing.assert_allclose(row, expected, atol=2e-6)


@pytest.mark.slow
def test_noise_is_correlated_as_the_strategy_says():
    model, optimizer, loader = make_run(BANDED)
    del model
    quiet = BandMFConfig(**{**vars(BANDED), "noise_multiplier": 0.0})
    _, still, same = make_run(quiet)
    noise = take_steps(optimizer, loader, STEPS) - take_steps(still, same, STEPS)
    coefs = np.asarray(BANDED.strategy) / np.linalg.norm(BANDED.strategy)
    strategy = sum(c * np.eye(STEPS, k=-i) for i, c in enumerate(coefs))
    white = strategy @ noise.double().numpy()
    # 72 standard normals times 1.5: six deviations of their mean square are a factor of 2.
    assert 0.5 < np.mean(white**2) / 1.5**2 < 2


def test_epsilon_is_the_plans_for_the_steps_made():
    _, optimizer, loader = make_run(BANDED)
    assert optimizer.epsilon(1e-5) == 0.0
    take_steps(optimizer, loader, 4)
    assert optimizer.epsilon(1e-5) == BANDED.epsilon(1e-5, steps=4)
    take_steps(optimizer, loader, 2)
    assert optimizer.epsilon(1e-5) == BANDED.epsilon(1e-5)
    assert optimizer.epsilon(1e-5, accountant="rdp") == BANDED.epsilon(1e-5, accountant="rdp")


def test_epsilon_refuses_without_the_plans_loader():
    plan, model = POISSON.make(), make_model()
    optimizer = make_optimizer(model, plan)
    optimizer.backward(*make_dataset()[:8])
    optimizer.step()
    with pytest.raises(ValueError, match="Batches must be drawn as the plan says"):
        optimizer.epsilon(1e-5)


def test_loader_of_another_plan_is_refused():
    model, plan = make_model(), POISSON.make()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="`loader` must be made from the plan"):
        DPOptimizer(base, model, plan=plan, loader=PlanLoader(POISSON.make(), make_dataset()))
    usual = torch.utils.data.DataLoader(make_dataset(), batch_size=8)
    with pytest.raises(TypeError, match="`loader` must be a PlanLoader"):
        DPOptimizer(base, model, plan=plan, loader=usual)


def test_steps_past_the_plan_are_refused_before_anything_is_released():
    model, optimizer, loader = make_run(POISSON, lr=0.1)
    take_steps(optimizer, loader, STEPS)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="past the plan's 6 iterations"):
        optimizer.backward(*make_dataset()[:8])
    assert optimizer.ledger.steps == STEPS
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_batch_from_elsewhere_is_refused():
    _, optimizer, loader = make_run(POISSON)
    x, y = next(iter(loader))
    with pytest.raises(RuntimeError, match="must be called once on each batch"):
        optimizer.backward(*make_dataset()[:30])
    optimizer.backward(x, y)
    with pytest.raises(RuntimeError, match="must be called once on each batch"):
        optimizer.backward(x, y)
    assert optimizer.ledger.steps == 0


def test_skipped_draw_is_refused():
    _, optimizer, loader = make_run(POISSON)
    batches = iter(loader)
    next(batches)
    with pytest.raises(RuntimeError, match=r"Step 1 must be made on draw 1 .* got draw 2"):
        optimizer.backward(*next(batches))
    assert optimizer.ledger.steps == 0


def test_step_before_the_first_draw_is_refused():
    _, optimizer, _ = make_run(POISSON)
    with pytest.raises(RuntimeError, match=r"Step 1 must be made on draw 1 .* got draw 0"):
        optimizer.backward(*make_dataset()[:8])


def test_part_of_a_draw_is_refused():
    plan, model = POISSON.make(), make_model()
    loader = PlanLoader(plan, make_dataset(), accumulation_steps=2, seed=11)
    optimizer = make_optimizer(model, plan, loader)
    batches = iter(loader)
    optimizer.backward(*next(batches))
    with pytest.raises(RuntimeError, match=r"in 2 parts, got .* in 1"):
        optimizer.step()
    optimizer.backward(*next(batches))
    optimizer.step()
    assert optimizer.ledger.steps == 1


@pytest.mark.parametrize(
    ("config", "made"),
    [(BANDED, 0), (BANDED, 2), (POISSON, 2)],
    ids=["unbegun", "banded", "poisson"],
)
def test_resumed_run_releases_what_an_unbroken_one_does(config, made):
    _, optimizer, loader = make_run(config)
    whole = take_steps(optimizer, loader, STEPS)

    _, optimizer, loader = make_run(config)
    if made:
        take_steps(optimizer, loader, made)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "loader": loader.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)

    _, optimizer, loader = make_run(config)
    loader.load_state_dict(saved["loader"])
    optimizer.load_state_dict(saved["optimizer"])
    rest = take_steps(optimizer, loader, STEPS)
    torch.testing.assert_close(rest, whole[made:], rtol=0, atol=0)
    assert optimizer.epsilon(1e-5) == config.epsilon(1e-5)


def test_resumed_optimizer_refuses_a_loader_that_starts_anew():
    _, optimizer, loader = make_run(POISSON)
    take_steps(optimizer, loader, 2)
    saved = optimizer.state_dict()
    _, optimizer, loader = make_run(POISSON)
    optimizer.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="Step 3 must be made on draw 3"):
        optimizer.backward(*next(iter(loader)))


@pytest.mark.parametrize("config", [POISSON, BANDED], ids=["poisson", "banded"])
def test_resumed_optimizer_refuses_a_loader_that_skipped_as_many_draws(config):
    """The draws differ, so that the noise of later steps would be used on other data."""
    _, optimizer, loader = make_run(config)
    take_steps(optimizer, loader, 2)
    saved = optimizer.state_dict()
    plan, model = config.make(PerformanceFlags(noise_seed=7)), make_model()
    other = PlanLoader(plan, make_dataset(), seed=12)
    optimizer = make_optimizer(model, plan, other)
    optimizer.load_state_dict(saved)
    batches = iter(other)
    next(batches), next(batches)
    with pytest.raises(RuntimeError, match="on the draws that the steps before it began"):
        optimizer.backward(*next(batches))


def test_steps_without_the_loader_stay_unknown_in_a_checkpoint():
    plan, model = POISSON.make(), make_model()
    optimizer = make_optimizer(model, plan)
    optimizer.backward(*make_dataset()[:])
    optimizer.step()
    _, resumed, _ = make_run(POISSON)
    resumed.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="got 1 steps without its loader"):
        resumed.epsilon(1e-5)


def test_checkpoints_of_plans_by_hand_are_told_apart():
    quieter = DPSGDConfig(**{**vars(POISSON), "noise_multiplier": 0.3})
    little = make_optimizer(make_model(), by_hand(quieter.make()))
    with pytest.raises(ValueError, match="`state` must be of this plan"):
        make_optimizer(make_model(), by_hand(POISSON.make())).load_state_dict(little.state_dict())


def test_half_of_a_draw_is_not_passed_twice():
    plan, model = POISSON.make(), make_model()
    loader = PlanLoader(plan, make_dataset(), accumulation_steps=2, seed=11)
    optimizer = make_optimizer(model, plan, loader)
    batches = iter(loader)
    first = next(batches)
    optimizer.backward(*first)
    with pytest.raises(RuntimeError, match="must be called once on each batch"):
        optimizer.backward(*first)


def test_two_optimizers_do_not_share_a_loader():
    _, optimizer, loader = make_run(POISSON)
    with pytest.raises(ValueError, match="`loader` must serve one optimizer"):
        make_optimizer(make_model(), loader.plan, loader)
    del optimizer
    make_optimizer(make_model(), loader.plan, loader)


@pytest.mark.parametrize("config", [POISSON, BANDED], ids=["poisson", "banded"])
def test_freezing_within_a_plan_is_refused_before_it_is_recorded(config):
    model, optimizer, loader = make_run(config)
    batches = iter(loader)
    optimizer.backward(*next(batches))
    optimizer.step()
    model.bias.requires_grad_(False)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="must stay frozen or trainable for the whole"):
        optimizer.backward(*next(batches))
    assert optimizer.ledger.steps == 1


def test_step_that_failed_after_its_record_ends_the_run(monkeypatch):
    _, optimizer, loader = make_run(BANDED)
    batches = iter(loader)
    optimizer.backward(*next(batches))

    def out_of_memory(*_):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(optimizer._gradient.mechanism, "noised", out_of_memory)
        with pytest.raises(MemoryError):
            optimizer.step()
    assert optimizer.ledger.steps == 1
    with pytest.raises(RuntimeError, match="must not follow one that failed"):
        optimizer.backward(*next(batches))


def test_runs_of_one_seed_are_told_apart():
    _, first, loader = make_run(POISSON, seed=0)
    take_steps(first, loader, 2)
    _, second, other = make_run(POISSON, seed=0)
    take_steps(second, other, 1)
    with pytest.raises(ValueError, match="got one of another run"):
        second.load_state_dict(first.state_dict())


def test_going_back_keeps_the_later_noise_and_the_longer_ledger():
    _, optimizer, loader = make_run(BANDED)
    take_steps(optimizer, loader, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    take_steps(optimizer, loader, 2)
    later = optimizer.state_dict()["dpbridge"]
    optimizer.load_state_dict(saved)
    assert optimizer.ledger.steps == 3
    restored = optimizer.state_dict()["dpbridge"]["noise"]
    for now, then in zip(restored["state"], later["noise"]["state"], strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize(
    "other",
    [
        DPSGDConfig(**{**vars(POISSON), "noise_multiplier": 3.0}),
        DPSGDConfig(**{**vars(POISSON), "iterations": STEPS + 1}),
        BANDED,
    ],
    ids=["noise", "iterations", "kind"],
)
def test_state_of_another_plan_is_refused(other):
    _, optimizer, loader = make_run(POISSON)
    take_steps(optimizer, loader, 1)
    _, new, _ = make_run(other)
    before = new.state_dict()["dpbridge"]
    with pytest.raises(ValueError, match="`state` must be of this plan"):
        new.load_state_dict(optimizer.state_dict())
    assert str(new.state_dict()["dpbridge"]) == str(before)


def test_noise_of_other_shapes_is_refused_and_changes_nothing():
    _, optimizer, loader = make_run(BANDED)
    take_steps(optimizer, loader, 1)
    state = optimizer.state_dict()
    state["dpbridge"]["noise"]["state"][-1] = torch.zeros(3)
    _, new, _ = make_run(BANDED)
    with pytest.raises(ValueError, match="must hold the noise of this plan"):
        new.load_state_dict(state)
    assert new.ledger.steps == 0


def test_state_with_a_plan_is_refused_without_one():
    _, optimizer, loader = make_run(POISSON)
    take_steps(optimizer, loader, 1)
    model = make_model()
    free = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        l2_clip_norm=1.0,
        noise_multiplier=1.5,
        expected_batch_size=8,
    )
    with pytest.raises(ValueError, match="`state` must"):
        free.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused(copying):
    _, optimizer, _ = make_run(POISSON)
    with pytest.raises(NotImplementedError, match="with a plan must not be copied or pickled"):
        copying(optimizer)


@pytest.mark.parametrize(
    "argument",
    ["l2_clip_norm", "noise_multiplier", "expected_batch_size", "sampling_prob", "microbatch_size"],
)
def test_numbers_of_the_plan_are_not_given_twice(argument):
    with pytest.raises(TypeError, match=f"`{argument}` must be left out with a plan"):
        make_run(POISSON, **{argument: 1})


def test_optimizer_tells_the_numbers_of_its_plan():
    _, optimizer, _ = make_run(POISSON)
    assert optimizer.plan.config is POISSON
    assert (optimizer.noise_multiplier, optimizer.sampling_prob) == (1.5, 0.2)
    assert (optimizer.l2_clip_norm, optimizer.expected_batch_size) == (1.0, 8.0)


def test_plan_by_hand_drives_the_same_calls():
    made = POISSON.make(PerformanceFlags(noise_seed=7))
    plan = by_hand(made)
    model = make_model()
    loader = PlanLoader(plan, make_dataset(), seed=11)
    optimizer = make_optimizer(model, plan, loader)
    _, usual, same = make_run(POISSON)
    torch.testing.assert_close(take_steps(optimizer, loader, 3), take_steps(usual, same, 3))
    assert optimizer.epsilon(1e-5) == made.epsilon(1e-5)
    assert optimizer.noise_multiplier is None


def test_non_private_plan_trains_on_the_mean_and_states_no_epsilon():
    model, optimizer, loader = make_run(NonPrivateConfig(iterations=2, batch_size=8))
    x, y = next(iter(loader))
    optimizer.backward(x, y)
    optimizer.step()
    expected = torch.autograd.grad(nn.MSELoss()(model(x), y), list(model.parameters()))
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)
    assert optimizer.epsilon(1e-5) == float("inf")


def test_self_check_sees_a_wrong_gradient_through_a_plans_clipping(monkeypatch):
    made = POISSON.make()

    def wrong(fun, *args, **options):
        right = made.clipped_grad(fun, *args, **options)

        def turned(*inputs, is_padding_example=None):
            grads, aux = right(*inputs, is_padding_example=is_padding_example)
            return {**grads, "weight": grads["weight"][:, ::-1]}, aux

        return turned

    plan = DPExecutionPlan(
        wrong,
        made.batch_selection_strategy,
        optax.identity(),
        dp_accounting.NonPrivateDpEvent(),
        made.neighboring_relation,
    )
    model = make_model()
    optimizer = make_optimizer(model, plan)
    with pytest.raises(RuntimeError, match="gradient of `weight` must agree"):
        optimizer.backward(*make_dataset()[:8])
