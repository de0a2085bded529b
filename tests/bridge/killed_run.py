"""A script that trains in child processes and kills them.

    python killed_run.py FOLDER KIND KILLS SEED

KIND is "planned" or "endless". With 1 for KILLS one child is killed, some steps after a checkpoint;
with more, children are killed at random moments.

It fails unless the ledger has, right after each resume and in the end, all releases that were seen,
also of steps that a kill took back: with a plan the same ones again, without one others. It prints
how many kills there were, how many steps they took back, and how many of them were seen again.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

# A fork has one thread, so JAX must start in the children alone: dpbridge is imported there.
# What takes long to import and starts nothing comes here, once for all of them.
import dp_accounting.pld  # noqa: F401
import optax  # noqa: F401
import scipy.stats  # noqa: F401
import torch
import torch.export
from torch import nn

FEATURES, EXAMPLES = 3, 12


class Endless:
    """No plan, and empty draws: what is seen is noise alone, so that any used twice shows.

    Args:
        steps: How many there are in all.
    """

    def __init__(self, steps):
        self.steps = steps

    def make_parts(self, log, journal):
        from dpbridge import DPOptimizer

        torch.manual_seed(5)
        model = nn.Linear(FEATURES, 2)
        base = Witness(model.parameters(), log)
        optimizer = DPOptimizer(
            base, model, loss_fn=nn.MSELoss(), self_check=False, journal=journal,
            l2_clip_norm=1.0, noise_multiplier=1.0, expected_batch_size=4, sampling_prob=0.1,
        )  # fmt: skip
        base.step_number = lambda: optimizer.ledger.steps
        return {"model": model, "optimizer": optimizer}

    def batches(self, parts):
        while parts["optimizer"].ledger.steps < self.steps:
            yield torch.zeros(0, FEATURES), torch.zeros(0, 2)

    def check(self, lines, ledger):
        numbers = [line["step"] for line in lines]
        assert numbers == sorted(set(numbers)), "a step was released after a later one"
        assert len({line["grads"] for line in lines}) == len(lines), "noise was used twice"
        # The last one may have been killed before it could be seen.
        assert sum(run[2] for run in ledger["runs"]) == self.steps >= max(numbers)
        return 0


class Planned:
    """A plan whose noise has a memory: its state is to be restored, not only its place.

    Args:
        steps: How many there are in all.
    """

    def __init__(self, steps):
        self.steps = steps

    def make_parts(self, log, journal):
        from dpbridge import DPOptimizer, PlanLoader
        from dpkernels.execution_plan import BandMFConfig

        config = BandMFConfig(
            iterations=self.steps, expected_participations=self.steps / 4, strategy=(1.0, 0.5),
            noise_multiplier=1.0,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(EXAMPLES, FEATURES, generator=generator)
        data = torch.utils.data.TensorDataset(x, torch.randn(EXAMPLES, 2, generator=generator))
        torch.manual_seed(5)
        model, plan = nn.Linear(FEATURES, 2), config.make()
        base, loader = Witness(model.parameters(), log), PlanLoader(plan, data)
        optimizer = DPOptimizer(
            base, model, loss_fn=nn.MSELoss(), plan=plan, loader=loader, self_check=False,
            journal=journal,
        )  # fmt: skip
        base.step_number = lambda: optimizer.ledger.position
        return {"model": model, "optimizer": optimizer, "loader": loader}

    def batches(self, parts):
        return parts["loader"]

    def check(self, lines, ledger):
        seen = {(line["step"], line["grads"], line["weights"]) for line in lines}
        expected = list(range(1, self.steps + 1))
        assert sorted(step for step, _, _ in seen) == expected, "a replay differs"
        assert len({grads for _, grads, _ in seen}) == ledger["steps"] == self.steps
        return len(lines) - len(seen)


def digest(tensors):
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.detach().numpy().tobytes())
    return whole.hexdigest()


class Witness(torch.optim.SGD):
    """Writes down what it is given, where a kill cannot take it back."""

    def __init__(self, parameters, log):
        super().__init__(parameters, lr=0.1, momentum=0.9)
        self.log, self.step_number = log, None

    def step(self, closure=None):
        (group,) = self.param_groups
        grads = digest(p.grad for p in group["params"])
        super().step(closure)
        line = {"step": self.step_number(), "grads": grads, "weights": digest(group["params"])}
        os.write(self.log, (json.dumps(line) + "\n").encode())
        os.fsync(self.log)


def read_log(folder, name="released.jsonl"):
    """Returns what was written down by all processes, in their order."""
    path = folder / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def open_log(folder, name="released.jsonl"):
    return os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def save(path, parts):
    """Saves all parts of a run in one file, which is there whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    with open(unfinished, "wb") as file:
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def train(folder, kind, ready, is_saved, most):
    """Trains from the last checkpoint to the end.

    Args:
        folder: Of checkpoint, journal and logs.
        kind: `Planned` or `Endless`.
        ready: Where to write a byte for each step.
        is_saved: Says after which steps of this process there is a checkpoint.
        most: After how many steps to wait for the end.
    """
    parts = kind.make_parts(open_log(folder), folder / "journal.jsonl")
    path = folder / "checkpoint.pt"
    if path.exists():
        resume(folder, path, parts)
    else:
        save(path, parts)
    for made, (x, y) in enumerate(kind.batches(parts), 1):
        parts["optimizer"].backward(x, y)
        parts["optimizer"].step()
        parts["optimizer"].zero_grad()
        if is_saved(made):
            save(path, parts)
        os.write(ready, b".")
        if made == most:
            signal.pause()
    save(path, parts)


def resume(folder, path, parts):
    """Goes on from a checkpoint, and checks that what was seen so far is known."""
    states = torch.load(path, weights_only=True)
    for name, state in states.items():
        parts[name].load_state_dict(state)
    steps, lines = parts["optimizer"].ledger.steps, read_log(folder)
    released = {line["grads"] for line in lines}
    if steps < max([len(released), *(line["step"] for line in lines)]):
        raise RuntimeError(f"The ledger has {steps} steps after {len(released)} releases.")
    made = states["optimizer"]["dpbridge"]["noise"]["steps"]
    if made and digest(parts["model"].parameters()) not in {line["weights"] for line in lines}:
        raise RuntimeError(f"The weights are not those after the {made} steps of the checkpoint.")
    os.write(open_log(folder, "lost.jsonl"), f"{steps - made}\n".encode())


def check_lineage(folder, kind):
    """Checks what was seen; returns how many steps were lost, and how many seen again."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["optimizer"]["dpbridge"]
    replayed = kind.check(read_log(folder), state["ledger"])
    return sum(read_log(folder, "lost.jsonl")), replayed


def in_child(action):
    """Runs an action in a fork of this process, and returns the fork's id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        action()
        status = 0
    finally:
        if status:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
        os._exit(status)


def run_once(folder, kind, steps, delay, *, is_saved, most=None):
    """Trains in a child, killed so many steps and seconds later; returns its status.

    Args:
        folder: As in `train`.
        kind: As in `train`.
        steps: How many; None to let it end.
        delay: In seconds, from then on.
        is_saved: As in `train`.
        most: As in `train`.
    """
    ready, told = os.pipe()
    child = in_child(lambda: train(folder, kind, told, is_saved, most))
    os.close(told)
    if steps is not None:
        while steps > 0 and (made := len(os.read(ready, steps))):
            steps -= made
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(ready)
    if os.waitstatus_to_exitcode(status) not in (0, -signal.SIGKILL):
        sys.exit(f"A child failed with status {status}.")
    return os.waitstatus_to_exitcode(status)


def kill_one(folder, kind, seed):
    """Kills a training that is at least five steps past its checkpoint, and goes on from there."""
    # It waits before its end, so that it is there to be killed however late that comes.
    delay, most = random.Random(seed).uniform(0.0, 0.005), kind.steps - 5
    options = {"is_saved": lambda made: made == 10, "most": most}
    killed = run_once(folder, kind, 15, delay, **options) != 0
    run_once(folder, kind, None, 0.0, is_saved=lambda made: False)
    return killed, *check_lineage(folder, kind)


def kill_many(folder, kind, kills, seed):
    """Kills trainings at random moments until there were so many kills; checks all of them."""

    def is_saved(made):
        return random.random() < 0.03

    moments, killed, found, lineage = random.Random(seed), 0, [], 0
    while killed < kills:
        lineage += 1
        own = folder / str(lineage)
        own.mkdir()
        is_done = False
        while not is_done and killed < kills:
            # Most within the time of a step, a few in what comes before the first.
            steps, delay = moments.randint(1, 100), moments.uniform(0.0, 0.005)
            if moments.random() < 0.1:
                steps, delay = 0, moments.uniform(0.0, 3.0)
            random.seed(moments.random())
            is_done = run_once(own, kind, steps, delay, is_saved=is_saved) == 0
            killed += not is_done
        if not is_done:
            run_once(own, kind, None, 0.0, is_saved=is_saved)
        found.append(check_lineage(own, kind))
    lost, replayed = map(sum, zip(*found, strict=True))
    return killed, lost, replayed


def main(folder, kind, kills, seed):
    torch.set_num_threads(1)
    kind = {"planned": Planned, "endless": Endless}[kind](40 if kills == 1 else 400)
    found = kill_one(folder, kind, seed) if kills == 1 else kill_many(folder, kind, kills, seed)
    sys.stdout.write(json.dumps(dict(zip(("killed", "lost", "replayed"), found, strict=True))))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
