"""Interrupts: what was released is counted, wherever a process is killed or a key is pressed."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpbridge
from dpbridge import DPOptimizer, PlanLoader, make_private
from dpkernels.execution_plan import DPSGDConfig


@pytest.fixture(autouse=True)
def _types_as_before():
    """An interrupt may fall where JAX's 64-bit types are turned off again."""
    with jax.enable_x64(False):
        yield


FEATURES, EXAMPLES = 3, 12
PACKAGE = str(Path(dpbridge.__file__).parent)
SCRIPT = Path(__file__).with_name("killed_run.py")


def make_model():
    torch.manual_seed(5)
    return nn.Linear(FEATURES, 2)


def make_dataset():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(EXAMPLES, FEATURES, generator=generator)
    return TensorDataset(x, torch.randn(EXAMPLES, 2, generator=generator))


def make_endless(**options):
    """An optimizer that leaves the weights where they are."""
    model = make_model()
    options = {"l2_clip_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": 4} | options
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    return model, DPOptimizer(base, model, loss_fn=nn.MSELoss(), self_check=False, **options)


def make_planned():
    plan, model = (
        DPSGDConfig(iterations=500, sampling_prob=0.25, noise_multiplier=1.0).make(),
        make_model(),
    )
    loader = PlanLoader(plan, make_dataset(), seed=1)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = DPOptimizer(
        base, model, loss_fn=nn.MSELoss(), plan=plan, loader=loader, self_check=False
    )
    return model, optimizer, loader


# A key pressed in the middle of a step


class Interrupted:
    """Raises KeyboardInterrupt at the n-th line that dpbridge runs, of these modules.

    Attributes:
        lines: How many lines were run.
    """

    def __init__(self, *modules, at=None):
        paths = [Path(PACKAGE) / f"{module}.py" for module in modules]
        assert all(path.exists() for path in paths)
        self.files = {str(path) for path in paths}
        self.at, self.lines = at, 0

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, kind, error, where):
        sys.settrace(self.before)
        return kind is KeyboardInterrupt

    def trace(self, frame, event, argument):
        if frame.f_code.co_filename not in self.files:
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self.trace


# Those that decide what is released and what is recorded, in this order.
OF_A_STEP = ("optimizer", "private_loop", "private_gradient", "mechanism", "runs", "endless_run",
             "planned_run", "ledger", "plan_ledger", "foreign_gradients", "journal",
             "journal_lines")  # fmt: skip


def visible(model):
    """What torch can see of the releases, parameter by parameter."""
    return [None if p.grad is None else p.grad.numpy().tobytes() for p in model.parameters()]


class Seen:
    """Collects what was ever visible in `p.grad`."""

    def __init__(self, model):
        self.model, self.found = model, [set() for _ in model.parameters()]

    def look(self):
        for known, grad in zip(self.found, visible(self.model), strict=True):
            if grad is not None:
                known.add(grad)

    @property
    def releases(self):
        return max(map(len, self.found))


def test_an_interrupt_at_any_line_of_a_step_releases_nothing_uncounted():
    model, optimizer = make_endless()
    x, y = make_dataset().tensors

    def step():
        optimizer.backward(x, y)
        optimizer.step()

    step()
    seen = Seen(model)
    seen.look()
    optimizer.zero_grad()
    with Interrupted(*OF_A_STEP) as run:
        step()
    assert run.lines > 100
    seen.look()
    optimizer.zero_grad()
    for line in range(1, run.lines + 1):
        with Interrupted(*OF_A_STEP, at=line):
            step()
        seen.look()
        assert seen.releases <= optimizer.ledger.steps, line
        optimizer.zero_grad()
    step()  # and goes on
    seen.look()
    assert seen.releases > 2
    assert seen.releases <= optimizer.ledger.steps


def test_noise_of_an_interrupted_step_is_not_on_other_data():
    # The same noise on two sums would give away their difference.
    model, optimizer = make_endless(noise_multiplier=100.0)
    x, y = make_dataset().tensors
    released = []

    def step(size):
        optimizer.backward(x[:size], y[:size])
        optimizer.step()

    for size in (8, 0):
        step(size)
        optimizer.zero_grad()
    with Interrupted("optimizer", "private_gradient", "mechanism") as run:
        step(8)
    optimizer.zero_grad()
    for line in range(1, run.lines + 1):
        with Interrupted("optimizer", "private_gradient", "mechanism", at=line):
            step(8)
        for _ in range(2):
            if model.bias.grad is not None:
                released.append(model.bias.grad[0].item())
            optimizer.zero_grad()
            step(0)
    # Of scale 25; the sum of gradients moves it by at most 1 / 4.
    ordered = sorted(set(released))
    gaps = [b - a for a, b in itertools.pairwise(ordered)]
    assert len(ordered) == len(released)
    assert len(gaps) > 100


def test_an_interrupt_in_the_unchanged_loop_releases_nothing_uncounted():
    lines, line = 10**6, 1
    while line <= lines:
        model = make_model()
        generator = torch.Generator().manual_seed(line)
        loader = DataLoader(make_dataset(), batch_size=3, generator=generator)
        model, optimizer, loader = make_private(
            model, torch.optim.SGD(model.parameters(), lr=0.1), loader, noise_multiplier=1.0,
            epochs=60, l2_clip_norm=1.0, self_check=False,
        )  # fmt: skip
        seen, batches = Seen(model), (batch for _ in range(60) for batch in loader)

        def step(x, y, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()

        for _ in range(3):
            step(*next(batches))  # every size is compiled
            seen.look()
        with Interrupted(*OF_A_STEP) as run:
            step(*next(batches))
        seen.look()
        lines = run.lines
        x, y = next(batches)
        while line <= lines:
            counted = optimizer.ledger.steps
            try:
                with Interrupted(*OF_A_STEP, at=line):
                    step(x, y)
            except RuntimeError as error:  # The one before was interrupted when it was counted.
                assert "must not follow one that failed" in str(error)  # noqa: PT017
                break
            line += 29
            seen.look()
            assert seen.releases <= optimizer.ledger.steps, line
            if optimizer.ledger.steps > counted:  # Else the same draw again.
                x, y = next(batches)
        assert 0 < seen.releases <= optimizer.ledger.steps


def test_an_interrupt_while_a_state_is_loaded_leaves_no_noise_uncounted():
    _, optimizer = make_endless(sampling_prob=0.01)
    x, y = make_dataset().tensors
    for _ in range(3):
        optimizer.backward(x, y)
        optimizer.step()
    state = optimizer.state_dict()
    _, fresh = make_endless(sampling_prob=0.01)
    with Interrupted("optimizer", "private_gradient", "ledger") as run:
        fresh.load_state_dict(state)
    for line in range(1, run.lines + 1):
        _, fresh = make_endless(sampling_prob=0.01)
        with Interrupted("optimizer", "private_gradient", "ledger", at=line):
            fresh.load_state_dict(state)
        assert fresh._gradient.steps <= fresh.ledger.steps, line


# A crash in the middle of a step: the journal is all that is left


def step_on_nothing(optimizer):
    """Releases noise alone, so that any that is used twice shows."""
    x, y = make_dataset().tensors
    optimizer.zero_grad()
    optimizer.backward(x[:0], y[:0])
    optimizer.step()


def make_journaled(path):
    """An optimizer without a plan, what was seen of it, and a checkpoint before its one step."""
    model, optimizer = make_endless(journal=path, sampling_prob=0.1)
    state, seen = optimizer.state_dict(), Seen(model)
    step_on_nothing(optimizer)
    seen.look()
    return optimizer, seen, state


def test_a_crash_at_any_line_of_a_step_leaves_nothing_uncounted(tmp_path):
    lines, line, released = 1, 0, 0
    while line < lines:
        path = tmp_path / f"{line}.jsonl"
        optimizer, seen, state = make_journaled(path)
        with Interrupted(*OF_A_STEP, at=line) as run:  # No line is the zeroth.
            step_on_nothing(optimizer)
        lines, line = max(lines, run.lines), line + 3
        seen.look()
        seen.model, resumed = make_endless(journal=path, sampling_prob=0.1)
        resumed.load_state_dict(state)
        assert seen.releases <= resumed.ledger.steps, line
        before = seen.releases
        step_on_nothing(resumed)
        seen.look()
        assert seen.releases == before + 1, line
        released += before
    assert lines > 100
    assert lines < 3 * released < 2 * lines


# One that falls where a file is closed leaves that to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_while_a_journal_is_read_leaves_nothing_uncounted(tmp_path):
    _, first, state = make_journaled(tmp_path / "journal.jsonl")
    content = (tmp_path / "journal.jsonl").read_bytes()
    modules = ("optimizer", "runs", "endless_run", "journal", "private_gradient", "ledger",
               "journal_lines")  # fmt: skip
    lines, line, resumed = 1, 0, 0
    while line < lines:
        path = tmp_path / f"{line}.jsonl"
        path.write_bytes(content)
        model, optimizer = make_endless(journal=path, sampling_prob=0.1)
        seen = Seen(model)
        seen.found = [set(found) for found in first.found]
        with Interrupted(*modules, at=line) as run:
            optimizer.load_state_dict(state)
        lines, line = max(lines, run.lines), line + 3
        try:
            step_on_nothing(optimizer)
        except RuntimeError as error:  # It did not come so far as to be the journal's run.
            assert "`journal` must be of this run" in str(error)  # noqa: PT017
            continue
        seen.look()
        assert seen.releases == 2, line
        assert optimizer.ledger.steps >= 2, line
        resumed += 1
    assert 0 < resumed < lines


# Threads


def test_two_threads_do_not_step_on_one_place_of_the_noise(monkeypatch):
    _, optimizer = make_endless()
    optimizer.backward(*make_dataset().tensors)
    meeting, errors = threading.Barrier(2), []
    record = type(optimizer.ledger).record

    def slow(*args, **kwargs):
        record(*args, **kwargs)
        with contextlib.suppress(threading.BrokenBarrierError):
            meeting.wait(0.3)

    monkeypatch.setattr(type(optimizer.ledger), "record", slow)

    def run():
        try:
            optimizer.step()
        except RuntimeError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert optimizer.ledger.steps == optimizer._gradient.steps == 1
    assert len(errors) == 1
    assert "`step` must follow a call of `backward`" in errors[0]


def test_threads_that_train_one_optimizer_take_turns():
    _, optimizer = make_endless()
    x, y = make_dataset().tensors
    optimizer.backward(x, y)
    optimizer.step()

    def closure():
        optimizer.zero_grad()
        return optimizer.backward(x, y)

    threads = [
        threading.Thread(target=lambda: [optimizer.step(closure) for _ in range(10)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert optimizer.ledger.steps == optimizer._gradient.steps == 41


# Lost steps


def test_a_run_that_starts_anew_from_its_first_checkpoint_repeats_itself():
    # With other noise the steps that were lost would be releases that nobody counts.
    def grads(optimizer, model, loader):
        found = []
        for _, (x, y) in zip(range(2), loader, strict=False):
            optimizer.backward(x, y)
            optimizer.step()
            found += [p.grad.clone() for p in model.parameters()]
            optimizer.zero_grad()
        return found

    model, optimizer, loader = make_planned()
    states = optimizer.state_dict(), loader.state_dict()
    lost = grads(optimizer, model, loader)
    model, optimizer, loader = make_planned()
    optimizer.load_state_dict(states[0])
    loader.load_state_dict(states[1])
    for before, again in zip(lost, grads(optimizer, model, loader), strict=True):
        assert torch.equal(before, again)


# Killed processes


def kill(tmp_path, kind, kills, seed):
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, str(SCRIPT), str(tmp_path), kind, str(kills), str(seed)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")


# Crashes are tested above, without a process that starts JAX; and one kill by examples/resume.py.
@pytest.mark.slow
@forks
def test_steps_lost_in_a_kill_are_counted_and_replayed_bit_for_bit(tmp_path):
    found = kill(tmp_path, "planned", kills=1, seed=0)
    assert found["killed"] == 1
    assert found["lost"] >= found["replayed"] >= 5


@pytest.mark.slow
@forks
def test_steps_lost_in_a_kill_are_counted_without_a_plan(tmp_path):
    found = kill(tmp_path, "endless", kills=1, seed=0)
    assert found["killed"] == 1
    assert found["lost"] >= 5


@pytest.mark.slow
@forks
@pytest.mark.parametrize("kind", ["planned", "endless"])
def test_two_hundred_kills_lose_no_count(tmp_path, kind):
    found = kill(tmp_path, kind, kills=200, seed=1)
    assert found["killed"] == 200
    assert found["lost"] > 200
    assert (found["replayed"] > 200) is (kind == "planned")
