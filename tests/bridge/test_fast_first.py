"""Which of two programs runs, and that nothing is used of one that needs care."""

import math

import jax
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpbridge.private_gradient
import dpkernels
import oracles
from dpbridge import DPOptimizer, make_private, scale_then_privatize
from dpbridge._compat import x64
from dpbridge.fast_first import FastFirst
from dpbridge.streams import dropout_stream
from dpkernels.execution_plan import DPExecutionPlan, DPSGDConfig, PerformanceFlags

FEATURES, CLASSES, CLIP = 6, 3, 0.5


def make_model(*middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), *middle, nn.Linear(8, CLASSES))


def make_batch(size=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, FEATURES, generator=generator)
    return x, torch.arange(size) % CLASSES


def with_a_bad_row(row=2, value=math.nan, size=8):
    x, y = make_batch(size)
    x[row, 0] = value
    return x, y


def make_optimizer(model, base=None, **options):
    base = base or torch.optim.SGD(model.parameters(), lr=0.0)
    defaults = {"loss_fn": nn.CrossEntropyLoss()}
    if "plan" not in options:
        defaults |= {
            "l2_clip_norm": CLIP,
            "noise_multiplier": 0.0,
            "expected_batch_size": 8,
            "seed": 0,
        }
    return DPOptimizer(base, model, **defaults | options)


def program_of(optimizer):
    (program,) = optimizer._gradient._programs
    return program


def released(optimizer, model, batch):
    loss = optimizer.backward(*batch)
    optimizer.step()
    return float(loss), {name: p.grad.clone() for name, p in model.named_parameters()}


def expected(model, batch, kept):
    gradients = oracles.torch_gradients(model, nn.CrossEntropyLoss(), batch)
    return oracles.clipped_sum([gradients[i] for i in kept], CLIP, normalize_by=8)


# The switch alone


def make_programs(needs_care):
    """Both, with what they are called with; the fast one's results are poison when they are not."""
    calls = []

    def fast(batch):
        calls.append(("fast", batch))
        needed = batch in needs_care
        return (math.nan if needed else batch, batch), np.bool_(needed)

    def careful(batch):
        calls.append(("careful", batch))
        return batch, batch

    return careful, fast, calls


def test_the_careful_program_never_runs_where_no_batch_needs_it():
    careful, fast, calls = make_programs(())
    program = FastFirst(careful, fast)
    assert [program(batch) for batch in range(3)] == [(i, i) for i in range(3)]
    assert calls == [("fast", 0), ("fast", 1), ("fast", 2)]
    assert not program.is_careful


def test_a_batch_that_needs_care_runs_again_and_all_later_ones_carefully():
    careful, fast, calls = make_programs({1})
    program = FastFirst(careful, fast)
    assert [program(batch) for batch in range(3)] == [(i, i) for i in range(3)]
    assert calls == [("fast", 0), ("fast", 1), ("careful", 1), ("careful", 2)]
    assert program.is_careful


def test_sizes_are_to_be_checked_anew_after_the_switch():
    careful, fast, _ = make_programs({1})
    program = FastFirst(careful, fast)
    sizes = program.ready_sizes
    sizes.add(8)
    program(0)
    assert sizes == {8}
    program(1)
    assert sizes == set()


def test_a_batch_to_be_refused_is_refused_before_anything_is_compiled_for_it():
    careful, fast, calls = make_programs({1})

    def refuse(result):
        if result[1] == 1:
            raise IndexError("out of range")

    program = FastFirst(careful, fast, refuse)
    with pytest.raises(IndexError, match="out of range"):
        program(1)
    assert calls == [("fast", 1)]
    assert not program.is_careful


def test_without_a_fast_program_there_is_the_careful_one():
    careful, _, calls = make_programs(())
    program = FastFirst(careful, None)
    assert program.is_careful
    assert program(4) == (4, 4)
    assert calls == [("careful", 4)]


# The private step


def test_ordinary_batches_compile_no_careful_program():
    model = make_model()
    optimizer = make_optimizer(model)
    batch = make_batch()
    _, found = released(optimizer, model, batch)
    oracles.assert_close(found, expected(model, batch, range(8)), rtol=1e-5)
    run = program_of(optimizer)._run
    assert not run.is_careful
    assert run._careful._cache_size() == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e25])
def test_a_bad_example_is_seen_to_by_the_careful_program(value):
    model = make_model()
    model[1] = nn.Identity()  # Otherwise tanh would make all of them ordinary.
    optimizer = make_optimizer(model)
    released(optimizer, model, make_batch())
    batch = with_a_bad_row(value=value)
    _, found = released(optimizer, model, batch)
    assert program_of(optimizer).is_careful
    rest = [i for i in range(8) if i != 2]
    total = {name: found[name].double() for name in found}
    alone = expected(model, batch, rest)
    distance = oracles.norm({name: total[name].numpy() - alone[name] for name in alone})
    # One that is large is clipped; one that is not finite contributes nothing.
    is_large = math.isfinite(value)
    assert distance <= (CLIP / 8 * (1 + 1e-5) if is_large else 1e-6)
    assert distance >= (CLIP / 8 * (1 - 1e-4) if is_large else 0)


def test_padding_that_is_not_finite_needs_care_and_contributes_nothing():
    model = make_model()
    optimizer = make_optimizer(model, self_check=False)
    batch = with_a_bad_row(row=4, size=5)  # Padded by repeating the last row.
    _, found = released(optimizer, model, batch)
    assert program_of(optimizer).is_careful
    oracles.assert_close(found, expected(model, batch, range(4)), rtol=1e-5)


def test_nothing_of_a_result_that_needs_care_is_used():
    """Not even the loss."""
    model = make_model()
    optimizer = make_optimizer(model)
    batch = make_batch()
    loss, found = released(optimizer, model, batch)
    run = program_of(optimizer)._run
    fast = run._fast

    def poisoned(*args):
        result, _ = fast(*args)
        return jax.tree.map(lambda x: x if x.dtype == bool else x * 7, result), np.True_

    run._fast = poisoned
    again, found_again = released(optimizer, model, batch)
    assert run.is_careful
    assert again == pytest.approx(loss, rel=1e-6)
    for name, grad in found.items():
        torch.testing.assert_close(found_again[name], grad)


def test_both_programs_give_one_result_dropout_included():
    model = make_model(nn.Dropout(0.5))
    optimizer = make_optimizer(model)
    optimizer.backward(*make_batch())
    optimizer.step()
    program, batch = program_of(optimizer), make_batch()

    def run():
        with x64():
            return program(
                dict(model.named_parameters()),
                batch,
                np.zeros(8, bool),
                streams=(dropout_stream(3, 0, 0),),
                l2_clip_norm=CLIP,
            )

    fast = run()
    assert not program.is_careful
    program._run._fast = None
    careful = run()
    np.testing.assert_allclose(fast.loss, careful.loss, rtol=1e-6)
    for name, total in fast.sums.items():
        np.testing.assert_allclose(total, careful.sums[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("is_careful", [False, True])
def test_labels_out_of_range_are_refused_by_either_program(is_careful):
    model = make_model()
    optimizer = make_optimizer(model)
    released(optimizer, model, with_a_bad_row() if is_careful else make_batch())
    assert program_of(optimizer).is_careful == is_careful
    x, y = make_batch()
    y[3] = CLASSES
    with pytest.raises(IndexError):
        optimizer.backward(x, y)
    assert program_of(optimizer).is_careful == is_careful


# The self-check


@pytest.fixture
def checks(monkeypatch):
    """Which program each self-check left in use."""
    seen = []
    real = dpbridge.private_gradient.check_gradients

    def recording(program, *args, **options):
        real(program, *args, **options)
        seen.append("careful" if program.is_careful else "fast")

    monkeypatch.setattr(dpbridge.private_gradient, "check_gradients", recording)
    return seen


def test_the_careful_program_is_checked_when_it_is_first_needed(checks):
    model = make_model()
    optimizer = make_optimizer(model)
    for batch in (make_batch(), with_a_bad_row(), make_batch()):
        released(optimizer, model, batch)
    assert checks == ["fast", "careful"]


def test_the_careful_program_is_checked_at_every_size_that_it_runs_at(checks):
    model = make_model()
    optimizer = make_optimizer(model)
    for size in (8, 16):
        released(optimizer, model, make_batch(size))
    released(optimizer, model, with_a_bad_row())
    released(optimizer, model, make_batch(16))
    assert checks == ["fast", "fast", "careful", "careful"]


def test_a_check_that_needs_the_careful_program_is_made_of_that_alone(checks):
    """It begins with one example's gradient by one program and goes on with the other."""
    model = make_model()
    optimizer = make_optimizer(model)
    released(optimizer, model, with_a_bad_row())
    assert checks == ["careful", "careful"]


def test_a_careful_program_that_fails_its_check_releases_nothing(monkeypatch):
    model = make_model()
    optimizer = make_optimizer(model)
    released(optimizer, model, make_batch())

    def failing(program, *_, **__):
        raise RuntimeError(f"wrong, careful: {program.is_careful}")

    monkeypatch.setattr(dpbridge.private_gradient, "check_gradients", failing)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="wrong, careful: True"):
            optimizer.backward(*with_a_bad_row())
        with pytest.raises(RuntimeError, match="must follow a call of `backward`"):
            optimizer.step()
    assert optimizer.ledger.steps == 1


# Who has two programs


def make_plan(**flags):
    config = DPSGDConfig(
        iterations=5, sampling_prob=0.1, noise_multiplier=1.0, l2_clip_norm=CLIP, normalize_by=8.0
    )
    return config.make(PerformanceFlags(noise_seed=7, **flags))


def made_by_hand(plan):
    """Its clipping is anybody's code, whatever it returns."""
    return DPExecutionPlan(
        lambda *args, **options: dpkernels.clipped_grad(*args, l2_clip_norm=CLIP, **options),
        plan.batch_selection_strategy,
        plan.noise_addition_transform,
        plan.dp_event,
        plan.neighboring_relation,
    )


@pytest.mark.parametrize(
    ("plan", "has_fast"),
    [
        pytest.param(make_plan(), True, id="config"),
        pytest.param(make_plan(microbatch_size=3), True, id="microbatches", marks=pytest.mark.slow),
        pytest.param(
            make_plan(strategy="materialize"), False, id="materialized", marks=pytest.mark.slow
        ),
        pytest.param(made_by_hand(make_plan()), False, id="by hand"),
    ],
)
def test_a_plan_has_a_fast_program_where_its_clipping_is_known_to(plan, has_fast):
    model = make_model()
    optimizer = make_optimizer(model, plan=plan)
    optimizer.backward(*make_batch())
    assert program_of(optimizer).is_careful != has_fast


def test_scaled_gradients_have_one_program():
    model = make_model()
    base = scale_then_privatize(torch.optim.Adam(model.parameters(), lr=0.1), eps=1e-3)
    optimizer = make_optimizer(model, base)
    optimizer.backward(*make_batch())
    assert program_of(optimizer).is_careful


# The unchanged loop, whose program is in two halves


@pytest.mark.parametrize("self_check", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_unchanged_loop_sees_to_a_bad_example(self_check):
    model = make_model()
    x, y = make_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model, optimizer, loader = make_private(
        model,
        optimizer,
        DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True),
        noise_multiplier=0.0,
        epochs=4,
        l2_clip_norm=CLIP,
        seed=1,
        self_check=self_check,
    )
    ways = []
    for epoch in range(3):
        for inputs, labels in loader:  # All of the data at once.
            is_bad = torch.arange(8) == (2 if epoch == 1 else 8)
            inputs = torch.where(is_bad[:, None], math.nan, inputs)
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            kept = [i for i in range(8) if not is_bad[i]]
            found = {name: p.grad for name, p in model.named_parameters()}
            oracles.assert_close(found, expected(model, (inputs, labels), kept), rtol=1e-5)
            optimizer.zero_grad()
            ways.append(program_of(optimizer).is_careful)
    assert ways == [False, True, True]
