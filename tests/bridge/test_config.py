"""DPConfig and make_private: the numbers of a run, checked, calibrated and kept."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

import dpbridge
from dpbridge import DPConfig, make_private

FIELDS = {
    "epsilon": 2.0,
    "delta": 1e-3,
    "clipping_norm": 0.5,
    "batch_size": 10,
    "gradient_accumulation_steps": 1,
    "train_steps": 6,
    "train_size": 40,
}


# What FIELDS need with one and with two batches a step, rounded up: to calibrate takes seconds.
ENOUGH_NOISE, ENOUGH_FOR_TWO = 1.264, 2.014


def make_config(**changes):
    return DPConfig(**{**FIELDS, **changes})


def make_dataset(size=40):
    return TensorDataset(torch.randn(size, 3), torch.randn(size, 1))


def make_run(config, loader=None):
    model = nn.Linear(3, 1)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = loader or DataLoader(make_dataset(), batch_size=10)
    return make_private(model, base, loader, config=config, loss_fn=nn.MSELoss())


def test_calibrated_noise_meets_the_target():
    config = make_config().update_with_calibrated_noise_multiplier()
    spent = dpbridge.accounting.compute_epsilon(
        noise_multiplier=config.noise_multiplier, sampling_prob=0.25, steps=6, delta=1e-3
    )
    assert 1.99 < spent <= 2.0
    assert config.get_noise_multiplier() == config.noise_multiplier
    assert config.update_with_calibrated_noise_multiplier() is config


@pytest.mark.parametrize(("batch_size", "accumulation", "golden"), [(10, 1, 0.72), (10, 8, 5.6)])
def test_golden_epsilons_of_the_effective_batch(batch_size, accumulation, golden):
    # JAX Privacy's keras_api_test: noise 1, 100 steps, 1000 examples, delta 1e-5.
    config = make_config(
        epsilon=6.0,
        delta=1e-5,
        batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        train_steps=100,
        train_size=1000,
        noise_multiplier=1.0,
    )
    assert config.make().epsilon(1e-5) == pytest.approx(golden, abs=0.05)


def test_noise_that_spends_more_than_epsilon_is_refused():
    make_config(noise_multiplier=ENOUGH_NOISE)
    with pytest.raises(ValueError, match="`noise_multiplier` must keep within epsilon=2"):
        make_config(noise_multiplier=0.99 * ENOUGH_NOISE)


def test_plan_has_the_configs_numbers():
    plan = make_config(microbatch_size=5, noise_multiplier=ENOUGH_NOISE).make()
    assert plan.iterations == 6
    assert plan.config.normalize_by == 10
    assert plan.config.sensitivity() == pytest.approx(0.1)
    unscaled = make_config(rescale_to_unit_norm=False, noise_multiplier=ENOUGH_NOISE).make()
    assert unscaled.config.sensitivity() == pytest.approx(0.05)


def test_fixed_batches_are_accounted_as_fixed_batches():
    # JAX Privacy's poisson_sampling_in_fit=False draws otherwise and accounts as Poisson.
    config = make_config(poisson_sampling_in_fit=False).update_with_calibrated_noise_multiplier()
    plan = config.make()
    assert type(plan.batch_selection_strategy).__name__ == "FixedBatchSampling"
    assert plan.neighboring_relation.name == "REPLACE_ONE"
    assert plan.epsilon(1e-3) <= 2.0
    assert config.noise_multiplier > ENOUGH_NOISE  # of twice the sensitivity, besides


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *[({"epsilon": v}, ValueError, "`epsilon` must be positive") for v in (0, -1, math.inf)],
        *[({"delta": v}, ValueError, "`delta` must be in") for v in (0, 1, math.nan)],
        ({"clipping_norm": 0}, ValueError, "`clipping_norm` must be positive"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1"),
        ({"gradient_accumulation_steps": 0}, ValueError, "must be at least 1"),
        ({"train_steps": 0}, ValueError, "`train_steps` must be at least 1"),
        ({"train_size": 9}, ValueError, "must be at most `train_size`, 9"),
        ({"gradient_accumulation_steps": 5}, ValueError, "must be at most `train_size`, 40"),
        ({"microbatch_size": 11}, ValueError, "`microbatch_size` must be at most `batch_size`"),
        ({"microbatch_size": 0}, ValueError, "`microbatch_size` must be at least 1"),
        ({"seed": -1}, ValueError, "`seed` must be at least 0"),
        ({"train_steps": 1.5}, TypeError, "`train_steps` must be an integer"),
        ({"poisson_sampling_in_fit": 1}, TypeError, "must be True or False"),
        ({"noise_multiplier": 0.0}, ValueError, "which spends inf"),
    ],
)
def test_config_refuses(change, error, message):
    with pytest.raises(error, match=message):
        make_config(**change)


def test_config_is_frozen_and_knows_no_other_fields():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_config().epsilon = 8.0
    with pytest.raises(TypeError, match="unexpected keyword"):
        make_config(clip_norm=1.0)


def test_private_run_spends_its_epsilon_and_no_more():
    model, optimizer, loader = make_run(make_config(noise_multiplier=ENOUGH_NOISE))
    before = model.weight.detach().clone()
    epochs = 0
    while optimizer.ledger.steps < 6:
        epochs += 1
        for x, y in loader:
            optimizer.backward(x, y)
            optimizer.step()
    assert epochs == 2  # of four batches, as the loader that was given
    assert 1.9 < optimizer.epsilon(1e-3) <= 2.0
    assert not torch.equal(model.weight, before)
    with pytest.raises(RuntimeError, match="used up"):
        iter(loader)
    with pytest.raises(RuntimeError, match="past the plan's 6 iterations"):
        optimizer.backward(x, y)


def test_accumulated_batches_are_one_draw():
    _, optimizer, loader = make_run(
        make_config(gradient_accumulation_steps=2, train_steps=3, noise_multiplier=ENOUGH_FOR_TWO)
    )
    steps = 0
    while steps < 3:
        for number, (x, y) in enumerate(loader, start=1):
            optimizer.backward(x, y)
            if number % 2 == 0:
                optimizer.step()
                steps += 1
    assert optimizer.ledger.steps == 3
    assert optimizer.epsilon(1e-3) <= 2.0


def test_step_on_one_of_two_accumulated_batches_is_refused():
    _, optimizer, loader = make_run(
        make_config(gradient_accumulation_steps=2, noise_multiplier=ENOUGH_FOR_TWO)
    )
    optimizer.backward(*next(iter(loader)))
    with pytest.raises(RuntimeError, match="in 2 parts"):
        optimizer.step()


def test_loader_keeps_what_the_users_had():
    def collate(rows):
        x, y = zip(*rows, strict=True)
        return {"x": torch.stack(x), "y": torch.stack(y)}

    dataset = make_dataset()
    usual = DataLoader(dataset, batch_size=10, shuffle=True, collate_fn=collate)
    _, _, loader = make_run(make_config(noise_multiplier=ENOUGH_NOISE), usual)
    assert loader.dataset is dataset
    assert len(loader) == len(usual)
    assert set(next(iter(loader))) == {"x", "y"}


class Endless(IterableDataset):
    def __iter__(self):
        return iter([torch.zeros(3)])


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (lambda: [], TypeError, "`loader` must be a torch DataLoader"),
        (lambda: DataLoader(Endless(), batch_size=10), TypeError, "got an IterableDataset"),
        (
            lambda: DataLoader(
                make_dataset(), batch_size=10, sampler=WeightedRandomSampler([1.0] * 40, 40)
            ),
            ValueError,
            "must sample uniformly, got WeightedRandomSampler",
        ),
        (
            lambda: DataLoader(make_dataset(), batch_size=10, drop_last=True),
            ValueError,
            "must not drop examples",
        ),
        (lambda: DataLoader(make_dataset(41), batch_size=10), ValueError, "`config.train_size`"),
        (lambda: DataLoader(make_dataset(), batch_size=8), ValueError, "`config.batch_size`"),
        (lambda: DataLoader(make_dataset(), batch_size=None), ValueError, "must sample uniformly"),
    ],
)
def test_loaders_that_cannot_be_kept_are_refused(loader, error, message):
    with pytest.raises(error, match=message):
        make_private(nn.Linear(3, 1), None, loader(), config=make_config(), loss_fn=nn.MSELoss())
