"""The journal: whatever a crash takes back, what was released is known."""

import contextlib
import copy
import errno
import os
import pickle
import resource
import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dpbridge import DPOptimizer, PlanLoader, PrivacyBudgetExceeded, make_private, train
from dpbridge import journal as module
from dpbridge.journal import Journal
from dpbridge.journal_lines import EndlessStep, PlannedStep, digest_of
from dpkernels.execution_plan import BandMFConfig, DPSGDConfig

EXAMPLES = 12


def endless(step, sampling_prob: float | None = 0.1):
    return EndlessStep(step, 1.0, sampling_prob)


def planned(step, release="r"):
    return PlannedStep(step, "d", release)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.jsonl"


# The file


def test_a_line_is_on_the_disk_when_write_returns(path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (fsync(file), synced.append(path.read_bytes())))
    journal = Journal(path)
    for step in (1, 2):
        journal.write("run", endless(step))
        assert synced[-1] == path.read_bytes()
        assert list(Journal(path).after(0))[-1] == endless(step)


@given(data=st.data())
def test_a_torn_line_counts_for_nothing(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("torn") / "journal.jsonl"
    for step in (1, 2, 4):
        Journal(path).write("run", planned(step))
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    left = max(0, whole[:cut].count(b"\n") - 1)
    steps = [planned(step) for step in (1, 2, 4)][:left]
    assert list(Journal(path).after(0)) == steps
    last = Journal(path).last
    Journal(path).write("run", planned(last + 1))
    assert list(Journal(path).after(0)) == [*steps, planned(last + 1)]


HEADER = b'{"dpbridge_journal": 1, "run": "run", "first": 0}\n'
STEP = b'{"step": 1, "noise_multiplier": 1.0, "sampling_prob": 0.1}\n'


@pytest.mark.parametrize(
    "content",
    [
        HEADER.replace(b": 1,", b": 2,") + STEP,
        STEP,
        b"\n",
        b"a letter\n",
        b"a letter without an end",
        b"[]\n",
        HEADER + b"\n",
        HEADER + b"\xff\xfe\n" + STEP,
        HEADER + STEP.replace(b"0.1", b"1.1"),
        HEADER + STEP.replace(b"1.0", b"NaN"),
        HEADER + STEP.replace(b"1.0", b"true"),
        HEADER + STEP.replace(b": 1,", b": 1.0,"),
        HEADER + STEP.replace(b": 1,", b": 0,"),
        HEADER + STEP.replace(b'"step"', b'"place"'),
        HEADER + b'{"step": 1, "draws": 3, "release": "r"}\n',
        HEADER + STEP + STEP,
        HEADER + STEP + HEADER,
        HEADER.replace(b"0}", b"-1}") + STEP,
    ],
)
def test_a_damaged_file_is_refused_and_left_as_it_is(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"`journal` must hold what .* It is damaged, or no journ"):
        Journal(path)
    assert path.read_bytes() == content


def test_a_file_is_its_owners_alone(path):
    Journal(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_path_must_be_of_a_file_in_a_folder(path):
    for wrong in (path.parent, path / "in" / "no" / "folder", os.devnull):
        with pytest.raises(ValueError, match="`journal` must name a file"):
            Journal(wrong)
    with pytest.raises(TypeError, match="`journal` must be a path, got 3"):
        make_endless(3)


@pytest.mark.parametrize("step", [endless, planned])
def test_two_that_write_to_one_file_are_refused(path, step):
    one, other = Journal(path), Journal(path)
    one.write("run", step(1))
    with pytest.raises(RuntimeError, match="`journal` must be left to one optimizer"):
        other.write("run", step(1))
    assert list(Journal(path).after(0)) == [step(1)]


def test_a_line_that_comes_in_between_is_found(path, monkeypatch):
    one, other = Journal(path), Journal(path)
    write = os.write

    def both(file, data):
        monkeypatch.undo()
        other.write("run", endless(1))
        return write(file, data)

    monkeypatch.setattr(module.os, "write", both)
    with pytest.raises(RuntimeError, match="`journal` must be left to one optimizer"):
        one.write("run", endless(1))


@pytest.mark.parametrize("change", [os.remove, lambda path: path.write_bytes(b"")])
def test_a_file_that_is_taken_away_is_missed(path, change):
    journal = Journal(path)
    journal.write("run", endless(1))
    change(path)
    with pytest.raises(RuntimeError, match="`journal` must be left to one optimizer"):
        journal.write("run", endless(2))


def test_a_full_disk_is_an_error_and_leaves_what_is_there(path):
    journal = Journal(path)
    journal.write("run", endless(1))
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 9, limits[1]))
    try:
        for step in (2, 3):
            with pytest.raises(OSError, match="No space left") as error:
                journal.write("run", endless(step))
            assert error.value.errno == errno.ENOSPC
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(Journal(path).after(0)) == [endless(1)]
    journal.write("run", endless(4))
    assert list(Journal(path).after(0)) == [endless(1), endless(4)]


def test_an_interrupted_write_does_not_stop_the_next(path, monkeypatch):
    journal = Journal(path)
    journal.write("run", endless(1))

    def interrupt(file):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        journal.write("run", endless(2))
    monkeypatch.undo()
    journal.write("run", endless(3))
    assert list(Journal(path).after(1)) == [endless(2), endless(3)]


def test_a_step_of_a_plan_is_written_once_and_then_compared(path):
    for step in (1, 2, 3):
        Journal(path).write("run", planned(step))
    before = path.read_bytes()
    journal = Journal(path)
    for step in (2, 3):
        journal.write("run", planned(step))
    assert path.read_bytes() == before
    journal = Journal(path)
    with pytest.raises(RuntimeError, match="Step 2 was released before a crash and must be repe"):
        journal.write("run", planned(2, "other"))
    assert path.read_bytes() == before


def test_a_step_without_a_plan_is_not_written_twice(path):
    for step in (1, 2):
        Journal(path).write("run", endless(step))
    with pytest.raises(RuntimeError, match="Step 2 must not be released, got 2 steps in"):
        Journal(path).write("run", endless(2))


def test_steps_of_two_runs_are_not_in_one_file(path):
    Journal(path).write("run", endless(1))
    with pytest.raises(RuntimeError, match=r"`journal` must be of this run, got .* 1 steps of an"):
        Journal(path).write("another run", endless(2))


def test_a_digest_tells_names_shapes_types_and_values_apart():
    x = torch.arange(4.0)
    others = [{"a": x}, {"b": x}, {"a": x.reshape(2, 2)}, {"a": -x}, {"a": x.view(torch.int32)}]
    others += [{"a": x[:2], "b": x[2:]}, {"a": x[:1], "b": x[1:]}, {"a": x[:0]}, {}]
    assert len({digest_of(other) for other in others}) == len(others)
    assert digest_of({"a": x, "b": -x}) == digest_of({"b": -x, "a": x})
    assert digest_of({"a": x[::2]}) == digest_of({"a": x[::2].clone()})


# Runs


def make_data():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(EXAMPLES, 3, generator=generator)
    return TensorDataset(x, torch.randn(EXAMPLES, 2, generator=generator))


def make_model():
    torch.manual_seed(5)
    return nn.Linear(3, 2)


def make_endless(path, base=torch.optim.SGD, **options):
    model = make_model()
    options = {"l2_clip_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": 4} | options
    optimizer = base(model.parameters(), lr=0.1)
    return DPOptimizer(
        optimizer, model, loss_fn=nn.MSELoss(), self_check=False, journal=path, **options
    )


def grads_of(optimizer):
    return b"".join(p.grad.numpy().tobytes() for p in optimizer.param_groups[0]["params"])


def make_step(optimizer, size=0):
    """Makes a step on so many examples; returns what can be seen of it: noise alone without."""
    x, y = make_data().tensors
    optimizer.zero_grad()
    optimizer.backward(x[:size], y[:size])
    optimizer.step()
    return grads_of(optimizer)


ENDLESS_MOVES = st.lists(st.sampled_from(["step", "save", "crash", "start"]), max_size=20)


@given(moves=ENDLESS_MOVES, data=st.data())
def test_a_ledger_has_what_was_released_and_no_noise_is_used_twice(tmp_path_factory, moves, data):
    path = tmp_path_factory.mktemp("run") / "journal.jsonl"
    options = {"seed": 7, "sampling_prob": 0.3}
    optimizer, released = make_endless(path, **options), []
    saved = [copy.deepcopy(optimizer.state_dict())]
    for move in moves:
        if move == "step":
            released.append(make_step(optimizer))
        elif move == "save":
            saved.append(copy.deepcopy(optimizer.state_dict()))
        else:
            optimizer = make_endless(path, **options)
        if move == "crash":
            optimizer.load_state_dict(data.draw(st.sampled_from(saved)))
        assert optimizer.ledger.steps == len(released)
        assert len(set(released)) == len(released)


def make_planned(path, config=None, **options):
    config = config or BandMFConfig(
        iterations=12, expected_participations=1e-9, strategy=(1.0, 0.5), noise_multiplier=1.0
    )
    plan, model = config.make(), make_model()
    loader = PlanLoader(plan, make_data())
    lr = options.pop("lr", 0.1)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=lr),
        model,
        loss_fn=nn.MSELoss(),
        plan=plan,
        loader=loader,
        self_check=False,
        journal=path,
        **options,
    )
    return optimizer, loader, model


def save(parts):
    return copy.deepcopy([part.state_dict() for part in parts])


def load(parts, states):
    for part, state in zip(parts, copy.deepcopy(states), strict=True):
        part.load_state_dict(state)


def draw(parts):
    """Makes a step on the next draw of a plan; returns what can be seen of it."""
    optimizer, loader, _ = parts
    x, y = next(iter(loader))
    optimizer.zero_grad()
    optimizer.backward(x, y)
    optimizer.step()
    return grads_of(optimizer)


@given(moves=st.lists(st.sampled_from(["step", "step", "save", "crash"]), max_size=14))
@settings(max_examples=8)
def test_lost_steps_of_a_plan_count_and_are_made_again(tmp_path_factory, moves):
    path = tmp_path_factory.mktemp("run") / "journal.jsonl"
    parts, released = make_planned(path), []
    saved = save(parts)
    for move in moves:
        ledger = parts[0].ledger
        if move == "step" and ledger.position < 12:
            seen = draw(parts)
            known = released[ledger.position - 1 : ledger.position]
            assert known in ([], [seen])
            released += [] if known else [seen]
        elif move == "save":
            saved = save(parts)
        elif move == "crash":
            parts = make_planned(path)
            load(parts, saved)
        assert parts[0].ledger.steps == len(released)
    assert len(set(released)) == len(released)


SAMPLED = DPSGDConfig(iterations=6, sampling_prob=0.5, noise_multiplier=1.0)


def crashed(path, config=SAMPLED, **options):
    """A plan's run that made three steps and is lost; returns its checkpoint of the first."""
    parts = make_planned(path, config, **options)
    draw(parts)
    states = save(parts)
    return states, [draw(parts), draw(parts)]


def test_a_resumed_plan_says_what_was_spent_and_repeats_it(path):
    states, lost = crashed(path)
    parts = make_planned(path, SAMPLED)
    load(parts, states)
    ledger = parts[0].ledger
    assert (ledger.steps, ledger.position) == (3, 1)
    assert parts[0].epsilon(1e-5) == SAMPLED.make().epsilon(1e-5, steps=3)
    assert [draw(parts), draw(parts)] == lost
    assert (ledger.steps, ledger.position) == (3, 3)
    draw(parts)
    assert (ledger.steps, ledger.position) == (4, 4)
    assert Journal(path).last == 4


@pytest.mark.parametrize("part", ["weights", "learning rate"])
def test_another_gradient_under_the_same_noise_is_refused(path, part):
    states, lost = crashed(path)
    parts = make_planned(path, SAMPLED)
    load(parts, states)
    if part == "weights":
        with torch.no_grad():
            parts[2].bias += 1.0
    else:
        parts[0].param_groups[0]["lr"] = 0.2  # The first gradient is still that of the weights.
        assert draw(parts) == lost[0]
    step = parts[0].ledger.position + 1
    with pytest.raises(RuntimeError, match=f"Step {step} was released before a crash and must be"):
        draw(parts)
    assert all(p.grad is None for p in parts[2].parameters())
    assert parts[0].ledger.steps == 3
    with pytest.raises(RuntimeError, match="`step` must not follow one that failed"):
        draw(parts)


def test_a_larger_count_survives_a_checkpoint_without_a_journal(path):
    states, lost = crashed(path)
    parts = make_planned(path, SAMPLED)
    load(parts, states)
    assert draw(parts) == lost[0]
    states = save(parts)
    parts = make_planned(None, SAMPLED)
    load(parts, states)
    ledger = parts[0].ledger
    assert (ledger.steps, ledger.position) == (3, 2)
    assert draw(parts) == lost[1]
    draw(parts)
    assert (ledger.steps, ledger.position) == (4, 4)


def test_steps_without_the_loader_are_unknown_after_a_crash_too(path):
    plan, x = SAMPLED.make(), make_data().tensors
    model = make_model()

    def make():
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        return DPOptimizer(
            base, model, loss_fn=nn.MSELoss(), plan=plan, self_check=False, journal=path
        )

    optimizer = make()
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.backward(*x)
    optimizer.step()
    optimizer = make()
    optimizer.load_state_dict(state)
    assert (optimizer.ledger.steps, optimizer.ledger.unknown_steps) == (1, 1)


def test_a_line_is_there_before_the_gradient_is(path, monkeypatch):
    optimizer = make_endless(path)
    (group,) = optimizer.param_groups
    put, looked = Journal._put, []

    def look(journal, data):
        put(journal, data)
        looked.append([p.grad for p in group["params"]])

    monkeypatch.setattr(Journal, "_put", look)
    for step in (1, 2):
        make_step(optimizer)
        assert looked.pop() == [None, None]
        assert Journal(path).last == step


def test_a_step_is_not_released_when_its_line_cannot_be_written(path, monkeypatch):
    optimizer = make_endless(path)
    make_step(optimizer)
    early = copy.deepcopy(optimizer.state_dict())
    x, y = (rows[:0] for rows in make_data().tensors)
    optimizer.zero_grad()
    optimizer.backward(x, y)
    weights = [p.clone() for p in optimizer.param_groups[0]["params"]]

    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(module.os, "write", fail)
    with pytest.raises(OSError, match="Input/output error"):
        optimizer.step()
    monkeypatch.undo()
    assert all(p.grad is None for p in optimizer.param_groups[0]["params"])
    assert all(map(torch.equal, weights, optimizer.param_groups[0]["params"]))
    assert optimizer.ledger.steps == 2
    make_step(optimizer)
    assert [step.step for step in Journal(path).after(0)] == [1, 3]  # with noise of its own
    for state in (early, optimizer.state_dict()):
        resumed = make_endless(path)
        resumed.load_state_dict(state)
        assert resumed.ledger.steps == resumed._gradient.steps == 3


def test_a_checkpoint_of_a_step_that_failed_can_be_gone_on_from(path, monkeypatch):
    optimizer = make_endless(path)
    make_step(optimizer)

    def interrupt(journal, data):
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "_put", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_step(optimizer)
    monkeypatch.undo()
    optimizer.zero_grad()
    resumed = make_endless(path)
    resumed.load_state_dict(optimizer.state_dict())
    make_step(resumed)
    assert resumed.ledger.steps == 3


def test_lost_steps_are_counted_as_they_were_made(path):
    optimizer = make_endless(path, sampling_prob=0.3)
    state = copy.deepcopy(optimizer.state_dict())
    make_step(optimizer)
    make_step(optimizer, size=EXAMPLES)  # which is no draw of that probability every time
    for _ in range(20):
        make_step(optimizer, size=EXAMPLES)
    assert optimizer.ledger.unknown_steps
    resumed = make_endless(path, sampling_prob=0.3, noise_multiplier=2.0)
    resumed.load_state_dict(state)
    assert resumed.ledger.state_dict() == optimizer.ledger.state_dict()
    with pytest.raises(ValueError, match="`epsilon` must follow from how batches were drawn"):
        resumed.epsilon(1e-5)


def test_lost_steps_count_against_the_budget(path):
    options = {"noise_multiplier": 4.0, "sampling_prob": 0.3, "epsilon": 1.0, "delta": 1e-5}
    optimizer = make_endless(path, **options)
    state, made = copy.deepcopy(optimizer.state_dict()), 0
    with contextlib.suppress(PrivacyBudgetExceeded):
        for made in range(100):  # noqa: B007
            make_step(optimizer)
    assert 3 < made < 99
    resumed = make_endless(path, **options)
    resumed.load_state_dict(state)
    with pytest.raises(PrivacyBudgetExceeded, match=f"{made} steps were"):
        make_step(resumed)


def test_a_spent_budget_lets_lost_steps_of_a_plan_be_made_again(path):
    spent = SAMPLED.make().epsilon(1e-5, steps=3)
    options = {"epsilon": spent * 1.0001, "delta": 1e-5}
    states, lost = crashed(path, **options)
    parts = make_planned(path, SAMPLED, **options)
    load(parts, states)
    assert [draw(parts), draw(parts)] == lost
    with pytest.raises(PrivacyBudgetExceeded):
        draw(parts)


def test_a_run_with_a_given_seed_knows_its_journal_without_a_checkpoint(path):
    released = [make_step(make_endless(path, seed=7))]
    optimizer = make_endless(path, seed=7)
    assert optimizer.ledger.steps == 1
    released.append(make_step(optimizer))
    assert len(set(released)) == optimizer.ledger.steps == 2


# The wrong file


def make_first_step(path):
    make_step(make_endless(path))


def make_first_draw(path):
    draw(make_planned(path))


@pytest.mark.parametrize("make", [make_first_step, make_first_draw])
def test_the_journal_of_another_run_is_refused_at_the_first_step(path, make):
    for _ in range(3):
        Journal(path).write("another run", planned(Journal(path).last + 1))
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match=r"`journal` must be of this run, .* 3 steps of another"):
        make(path)
    assert path.read_bytes() == before


def test_the_journal_of_another_run_is_refused_with_a_checkpoint(path):
    Journal(path).write("another run", endless(1))
    other = make_endless(None)
    make_step(other)
    optimizer = make_endless(path)
    seed = optimizer._gradient.seed
    with pytest.raises(
        ValueError, match="must be of the run that `state_dict` is of, got steps of"
    ):
        optimizer.load_state_dict(other.state_dict())
    assert (optimizer.ledger.steps, optimizer._gradient.seed) == (0, seed)


def older_copy(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))


@pytest.mark.parametrize("lose", [older_copy, os.remove])
def test_a_journal_that_lacks_steps_of_the_checkpoint_is_refused(path, lose):
    optimizer = make_endless(path)
    for _ in range(3):
        make_step(optimizer)
    lose(path)
    resumed = make_endless(path)
    with pytest.raises(ValueError, match="`journal` must hold the 3 steps that the checkpoint kno"):
        resumed.load_state_dict(optimizer.state_dict())
    assert resumed.ledger.steps == 0


def test_a_run_that_went_on_without_its_journal_is_refused_there(path):
    optimizer = make_endless(path)
    make_step(optimizer)
    without = make_endless(None)
    without.load_state_dict(optimizer.state_dict())
    make_step(without)
    with pytest.raises(ValueError, match="`journal` must hold the 2 steps that the checkpoint kno"):
        make_endless(path).load_state_dict(without.state_dict())


def test_a_journal_may_begin_in_the_middle_of_a_run(path):
    optimizer = make_endless(None)
    make_step(optimizer)
    early = copy.deepcopy(optimizer.state_dict())
    make_step(optimizer)
    late = copy.deepcopy(optimizer.state_dict())
    optimizer = make_endless(path)
    optimizer.load_state_dict(late)
    make_step(optimizer)
    resumed = make_endless(path)
    with pytest.raises(ValueError, match="got one that begins after step 2, later than the check"):
        resumed.load_state_dict(early)
    resumed.load_state_dict(late)
    assert resumed.ledger.steps == 3


def test_checkpoints_may_be_loaded_in_any_order_and_twice(path):
    optimizer = make_endless(path)
    states = [copy.deepcopy(optimizer.state_dict())]
    for _ in range(3):
        make_step(optimizer)
        states.append(copy.deepcopy(optimizer.state_dict()))
    make_step(optimizer)
    for order in ([0, 3], [3, 0], [1, 1]):
        resumed = make_endless(path)
        for number in order:
            resumed.load_state_dict(states[number])
            assert (resumed.ledger.steps, resumed._gradient.steps) == (4, 4)


@pytest.mark.parametrize(
    "twin", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_a_copy_has_no_journal(path, twin):
    optimizer = make_endless(path)
    make_step(optimizer)
    before = path.read_bytes()
    make_step(twin(optimizer))
    assert path.read_bytes() == before
    make_step(optimizer)


# The other ways to train


def test_make_private_takes_a_journal(path):
    def make():
        model = make_model()
        base, loader = torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(make_data(), 4)
        model, optimizer, loader = make_private(
            model, base, loader, plan=SAMPLED.make(), self_check=False, journal=path
        )
        return optimizer, loader, model

    def steps(parts, count):
        optimizer, loader, model = parts
        for _, (x, y) in zip(range(count), loader, strict=False):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
        return grads_of(optimizer)

    parts = make()
    states = save(parts)
    lost = steps(parts, 2)
    parts = make()
    load(parts, states)
    assert parts[0].ledger.steps == 2
    assert steps(parts, 2) == lost
    assert (parts[0].ledger.steps, parts[0].ledger.position) == (2, 2)


def test_train_takes_a_journal(path):
    states = []

    def callback(state, loss):
        del loss
        states.append(copy.deepcopy(state.state_dict()))
        return state.step == 3

    def run(resume=None):
        model = make_model()
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        return train(
            SAMPLED.make(), make_data(), model, nn.MSELoss(), base, callback=callback,
            journal=path, resume=resume, progress=False,
        )  # fmt: skip

    lost = run()
    resumed = run(states[0])
    assert (resumed.step, resumed.optimizer.ledger.steps) == (3, 3)
    assert torch.equal(resumed.model.weight, lost.model.weight)
    assert Journal(path).last == 3
