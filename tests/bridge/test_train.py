"""`train`: all steps of a plan, stopped and resumed."""

import io

import pytest
import torch
from torch import nn

from dpbridge import PrivacyBudgetExceeded, train
from dpkernels.execution_plan import BandMFConfig, DPSGDConfig, PerformanceFlags

PLANS = {
    "poisson": DPSGDConfig(
        iterations=6, sampling_prob=0.3, noise_multiplier=1.5, normalize_by=10.0
    ),
    "banded": BandMFConfig(
        iterations=6,
        expected_participations=1.0,
        strategy=(1.0, 0.5, 0.25),
        noise_multiplier=1.5,
        normalize_by=10.0,
    ),
}
every_plan = pytest.mark.parametrize("config", PLANS.values(), ids=PLANS.keys())


def run(config, **options):
    torch.manual_seed(5)
    model = nn.Linear(3, 1)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 3, generator=generator)
    dataset = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    defaults = {"progress": False, "seed": 1}
    return train(
        config.make(PerformanceFlags(noise_seed=7)),
        dataset,
        model,
        nn.MSELoss(),
        base,
        **{**defaults, **options},
    )


def weights(state):
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


@every_plan
def test_all_steps_of_the_plan_are_made(config):
    state = run(config)
    assert state.step == 6
    assert state.epsilon(1e-5) == config.epsilon(1e-5)


@every_plan
@pytest.mark.parametrize("made", [4, pytest.param(6, marks=pytest.mark.slow)])
def test_resumed_run_ends_where_an_unbroken_one_does(config, made):
    whole = run(config)
    stopped = run(config, callback=lambda state, loss: state.step == made)
    assert stopped.step == made
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed = run(config, resume=saved)
    assert resumed.step == 6
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


def test_callback_sees_every_step_and_its_loss():
    seen = []
    run(PLANS["poisson"], callback=lambda state, loss: seen.append((state.step, float(loss))))
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert all(loss > 0 for _, loss in seen)


def test_accumulated_steps_are_those_of_whole_draws():
    whole, parts = run(PLANS["poisson"]), run(PLANS["poisson"], accumulation_steps=3)
    assert parts.step == 6
    torch.testing.assert_close(weights(parts), weights(whole))


def test_model_learns_where_there_is_no_noise():
    quiet = DPSGDConfig(iterations=150, sampling_prob=0.3, noise_multiplier=0.0, normalize_by=10.0)
    first_and_last = []
    run(quiet, callback=lambda state, loss: first_and_last.append(float(loss)))
    assert first_and_last[-1] < 0.05 * first_and_last[0]


def test_budget_ends_training():
    config = PLANS["poisson"]
    with pytest.raises(PrivacyBudgetExceeded):
        run(config, epsilon=config.epsilon(1e-5, steps=3), delta=1e-5)


def test_dicts_are_passed_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 1)

        def forward(self, x, y):
            return (self.linear(x) - y).square().mean()

    model = Named()
    rows = [{"x": torch.ones(3), "y": torch.zeros(1)} for _ in range(20)]
    state = train(
        PLANS["poisson"].make(),
        rows,
        model,
        None,
        torch.optim.SGD(model.parameters(), lr=0.1),
        progress=False,
    )
    assert state.step == 6


def test_progress_bar_counts_steps(capsys):
    run(PLANS["poisson"], progress=True)
    assert "6/6" in capsys.readouterr().err
