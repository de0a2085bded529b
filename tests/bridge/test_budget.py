"""A budget is a hard limit: the step that would pass it is not made."""

import copy

import pytest
import torch
from torch import nn

import dpbridge
from dpbridge import DPOptimizer, PlanLoader, PrivacyBudgetExceeded
from dpbridge.budget import PrivacyBudget
from dpkernels.execution_plan import DPSGDConfig

DELTA = 1e-5


def make_optimizer(**options):
    model = nn.Linear(3, 1)
    defaults = {
        "loss_fn": nn.MSELoss(),
        "l2_clip_norm": 1.0,
        "noise_multiplier": 2.0,
        "expected_batch_size": 4,
        "sampling_prob": 0.25,
        "delta": DELTA,
    }
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, DPOptimizer(base, model, **{**defaults, **options})


def spent_by(steps):
    return dpbridge.accounting.compute_epsilon(
        noise_multiplier=2.0, sampling_prob=0.25, steps=steps, delta=DELTA
    )


def make_steps(optimizer, most=20):
    """Steps until the budget ends, and returns how many there were."""
    for made in range(most):
        optimizer.backward(torch.ones(4, 3), torch.zeros(4, 1))
        try:
            optimizer.step()
        except PrivacyBudgetExceeded:
            return made
    return most


def test_last_step_within_the_budget_is_made_and_the_next_is_not():
    for limit in (3, 5):
        _, optimizer = make_optimizer(epsilon=spent_by(limit))
        assert make_steps(optimizer) == limit
        assert optimizer.epsilon(DELTA) <= spent_by(limit)


def test_budget_just_below_is_not_enough():
    _, optimizer = make_optimizer(epsilon=spent_by(3) * (1 - 1e-6))
    assert make_steps(optimizer) == 2


def test_refused_step_changes_neither_model_nor_state():
    model, optimizer = make_optimizer(epsilon=spent_by(2))
    make_steps(optimizer, most=2)
    model_before = copy.deepcopy(model.state_dict())
    state_before = copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    optimizer.backward(torch.ones(4, 3), torch.zeros(4, 1))
    with pytest.raises(PrivacyBudgetExceeded, match="must stay within epsilon"):
        optimizer.step()
    assert str(model_before) == str(model.state_dict())
    assert all(p.grad is None for p in model.parameters())
    optimizer.zero_grad()
    assert str(state_before) == str(optimizer.state_dict())


def test_budget_counts_what_a_checkpoint_has_spent():
    _, first = make_optimizer(epsilon=spent_by(3))
    make_steps(first, most=2)
    _, second = make_optimizer(epsilon=spent_by(3))
    second.load_state_dict(first.state_dict())
    assert make_steps(second) == 1


def test_copy_has_the_budget_too():
    _, optimizer = make_optimizer(epsilon=spent_by(3))
    make_steps(optimizer, most=2)
    optimizer.zero_grad()
    assert make_steps(copy.deepcopy(optimizer)) == 1


@pytest.mark.parametrize(("sampling_prob", "size"), [(None, 4), (0.25, 17)])
def test_budget_refuses_draws_of_unknown_probability(sampling_prob, size):
    _, optimizer = make_optimizer(epsilon=1.0, sampling_prob=sampling_prob)
    optimizer.backward(torch.ones(size, 3), torch.zeros(size, 1))
    with pytest.raises(RuntimeError, match="must be spent on draws whose probability is known"):
        optimizer.step()
    assert optimizer.ledger.steps == 0


def test_budget_holds_with_a_plan():
    config = DPSGDConfig(iterations=6, sampling_prob=0.25, noise_multiplier=2.0)
    plan, model = config.make(), nn.Linear(3, 1)
    loader = PlanLoader(plan, list(zip(torch.ones(16, 3), torch.zeros(16, 1), strict=True)))
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        loss_fn=nn.MSELoss(),
        plan=plan,
        loader=loader,
        epsilon=config.epsilon(DELTA, steps=4),
        delta=DELTA,
    )
    with pytest.raises(PrivacyBudgetExceeded):  # noqa: PT012
        for x, y in loader:
            optimizer.backward(x, y)
            optimizer.step()
    assert optimizer.ledger.steps == 4


def test_budget_with_a_plan_needs_its_loader():
    plan = DPSGDConfig(iterations=6, sampling_prob=0.25, noise_multiplier=2.0).make()
    model = nn.Linear(3, 1)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        loss_fn=nn.MSELoss(),
        plan=plan,
        epsilon=1.0,
        delta=DELTA,
    )
    optimizer.backward(torch.ones(4, 3), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="must be spent on the plan's own draws"):
        optimizer.step()


def test_budget_counts_what_else_is_put_into_the_ledger():
    _, optimizer = make_optimizer(epsilon=spent_by(9))
    make_steps(optimizer, most=1)
    optimizer.ledger.record(noise_multiplier=0.5, sampling_prob=1.0)
    optimizer.zero_grad()
    assert make_steps(optimizer, most=2) == 0


def test_budget_asks_seldom_for_an_epsilon():
    class Counting:
        steps, asked = 0, 0

        def epsilon_after(self, steps, delta, accountant):
            self.asked += 1
            return steps / 100

    ledger, budget = Counting(), PrivacyBudget(10.0, DELTA)
    for _ in range(1000):
        budget.check(ledger)
        ledger.steps += 1
    with pytest.raises(PrivacyBudgetExceeded, match=r"got one that would spend 10\.01"):
        budget.check(ledger)
    assert ledger.asked < 40


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epsilon": 0.0}, ValueError, "`epsilon` must be positive"),
        ({"epsilon": 1.0, "delta": 1.0}, ValueError, "`delta` must be in"),
        ({"epsilon": 1.0, "delta": None}, TypeError, "`delta` must be given with `epsilon`"),
    ],
)
def test_budget_refuses(options, error, message):
    with pytest.raises(error, match=message):
        make_optimizer(**options)
