"""A script that trains in child processes and kills them: `python killed_run.py FOLDER KILLS SEED`.

It fails unless each release that was seen, also of steps that a kill took back, is one that the
ledger counts in the end. It prints how many kills and replayed steps there were.
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

FEATURES, EXAMPLES, STEPS = 3, 12, 400


def make_config():
    from dpkernels.execution_plan import BandMFConfig

    # Noise with a memory: its state must be saved and restored, not only its place in a stream.
    return BandMFConfig(
        iterations=STEPS, expected_participations=100.0, strategy=(1.0, 0.5), noise_multiplier=1.0
    )


def make_parts(log):
    from dpbridge import DPOptimizer, PlanLoader

    generator = torch.Generator().manual_seed(3)
    x = torch.randn(EXAMPLES, FEATURES, generator=generator)
    data = torch.utils.data.TensorDataset(x, torch.randn(EXAMPLES, 2, generator=generator))
    torch.manual_seed(5)
    model, plan = nn.Linear(FEATURES, 2), make_config().make()
    base, loader = Witness(model.parameters(), log), PlanLoader(plan, data)
    optimizer = DPOptimizer(
        base, model, loss_fn=nn.MSELoss(), plan=plan, loader=loader, self_check=False
    )
    base.ledger = optimizer.ledger
    return {"model": model, "optimizer": optimizer, "loader": loader}


def digest(tensors):
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.detach().numpy().tobytes())
    return whole.hexdigest()


class Witness(torch.optim.SGD):
    """Writes down what it is given, where a kill cannot take it back."""

    def __init__(self, parameters, log):
        super().__init__(parameters, lr=0.1, momentum=0.9)
        self.log, self.ledger = log, None

    def step(self, closure=None):
        (group,) = self.param_groups
        grads = digest(p.grad for p in group["params"])
        super().step(closure)
        line = {"step": self.ledger.steps, "grads": grads, "weights": digest(group["params"])}
        os.write(self.log, (json.dumps(line) + "\n").encode())
        os.fsync(self.log)


def read_log(folder):
    """Returns what was seen of the releases, from all processes, in their order."""
    path = folder / "released.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def save(path, parts):
    """Saves all parts of a run in one file, which is there whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    with open(unfinished, "wb") as file:
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def train(folder, ready):
    """Trains from the last checkpoint to the plan's end, and saves at random steps."""
    log = os.open(folder / "released.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    parts = make_parts(log)
    model, optimizer, loader = parts.values()
    path = folder / "checkpoint.pt"
    if path.exists():
        for name, state in torch.load(path, weights_only=True).items():
            parts[name].load_state_dict(state)
        check_resumed(folder, optimizer.ledger.steps, model)
    else:
        save(path, parts)
    for x, y in loader:
        optimizer.backward(x, y)
        optimizer.step()
        optimizer.zero_grad()
        os.write(ready, b".")
        if random.random() < 0.03:
            save(path, parts)
    save(path, parts)


def check_resumed(folder, steps, model):
    """A checkpoint counts all that is in its weights."""
    lines = [line for line in read_log(folder) if line["step"] == steps]
    if steps and digest(model.parameters()) not in {line["weights"] for line in lines}:
        raise RuntimeError(f"The weights are not those after the {steps} steps of the ledger.")


def check_lineage(folder):
    """Whatever was seen, of lost steps too, is what the ledger's steps released, and no more."""
    lines = read_log(folder)
    ledger = torch.load(folder / "checkpoint.pt", weights_only=True)["optimizer"]["dpbridge"]
    steps = ledger["ledger"]["steps"]
    seen = {(line["step"], line["grads"], line["weights"]) for line in lines}
    assert sorted(step for step, _, _ in seen) == list(range(1, STEPS + 1)), "a replay differs"
    assert len({grads for _, grads, _ in seen}) == steps == STEPS
    return len(lines) - len(seen)


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


def run_once(folder, steps, delay):
    """Trains in a child, killed so many steps and seconds later; returns its status.

    Args:
        folder: Of checkpoint and log.
        steps: How many; None to let it end.
        delay: In seconds, from then on.
    """
    ready, told = os.pipe()
    child = in_child(lambda: train(folder, told))
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


def main(folder, kills, seed):
    """Kills trainings at random moments until there were so many kills; checks all of them."""
    torch.set_num_threads(1)
    random.seed(seed)
    moments, killed, replayed, lineage = random.Random(seed), 0, 0, 0
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
            is_done = run_once(own, steps, delay) == 0
            killed += not is_done
        if not is_done:
            run_once(own, None, 0.0)
        replayed += check_lineage(own)
    sys.stdout.write(json.dumps({"killed": killed, "replayed": replayed, "lineages": lineage}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
