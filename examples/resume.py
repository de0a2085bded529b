"""Train privately, be killed in the middle, go on from the checkpoint, and lose nothing.

Another process trains, writes a checkpoint every few steps, and is killed by SIGKILL between two of
them. This one goes on from the file. Then it trains once more without interruption: weights,
optimizer, ledger and epsilon are the same, bit for bit. The steps after the checkpoint, which the
killed process had made already, were made again with the same draws and the same noise: whoever
saw both saw one. The journal, a file beside the checkpoint, knows of them: the ledger counts them
as soon as the checkpoint is loaded, and what would come out otherwise this time would be refused.

    python examples/resume.py                        # epsilon 8
    python examples/resume.py --checkpoint run.pt    # keeps the files
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpbridge

DELTA = 1e-4  # Below 1 / 1797, the size of the data.


class Run:
    """All that a training run consists of."""

    def __init__(self, args: argparse.Namespace, journal: Path | None = None) -> None:
        digits = load_digits()
        images = torch.tensor(digits.data, dtype=torch.float32) / 8
        data = TensorDataset(images, torch.tensor(digits.target))
        torch.manual_seed(args.seed)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Dropout(0.1), nn.Linear(64, 10))
        # Two runs are compared here, so both are given the same seeds. Leave generator and seed out
        # when privacy is at stake: the checkpoint then carries those of the operating system.
        generator = torch.Generator().manual_seed(args.seed)
        self.model, self.optimizer, self.loader = dpbridge.make_private(
            model,
            torch.optim.Adam(model.parameters(), lr=args.lr),
            DataLoader(data, batch_size=args.batch_size, shuffle=True, generator=generator),
            noise_multiplier=args.noise_multiplier,
            epsilon=args.epsilon,  # the most that this noise may spend
            delta=DELTA,
            epochs=args.epochs,
            l2_clip_norm=1.0,
            journal=journal,
            seed=args.seed,
        )
        self.epochs = args.epochs
        self.steps = args.epochs * len(self.loader)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.steps)

    def save(self, path: Path) -> None:
        """Writes the checkpoint whole or not at all. It holds the seeds: keep it secret."""
        parts = ("model", "optimizer", "loader", "scheduler")
        unfinished = path.with_suffix(".unfinished")
        torch.save({name: getattr(self, name).state_dict() for name in parts}, unfinished)
        os.replace(unfinished, path)

    def load(self, path: Path) -> None:
        """Goes to where the checkpoint was written."""
        for name, state in torch.load(path, weights_only=True).items():
            getattr(self, name).load_state_dict(state)

    def train(self, path: Path | None = None, *, every: int = 1, kill_at: int = 0) -> float:
        """Trains to the end; returns the last loss.

        Args:
            path: Where to write checkpoints, if anywhere.
            every: After how many steps each.
            kill_at: In which step to kill this process, after backward; 0 for none.
        """
        loss = torch.zeros(())
        # A loader that was left or loaded in the middle of an epoch goes on there.
        for _ in range(self.loader.draws_begun // len(self.loader), self.epochs):
            for x, y in self.loader:
                self.optimizer.zero_grad()
                loss = F.cross_entropy(self.model(x), y)
                loss.backward()
                if self.optimizer.ledger.position + 1 == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                self.optimizer.step()
                self.scheduler.step()
                if path is not None and self.optimizer.ledger.position % every == 0:
                    self.save(path)
        return loss.item()

    @property
    def results(self) -> dict[str, torch.Tensor]:
        """Everything that training has made, by name: weights and the optimizer's moments."""
        names = {p: name for name, p in self.model.named_parameters()}
        moments = {
            f"{key} of {names[p]}": value
            for p, state in self.optimizer.state.items()
            for key, value in state.items()
        }
        return {**self.model.state_dict(), **moments}


def train_and_be_killed(path: Path, kill_at: int) -> None:
    """Runs this file in another process, which ends in the middle of a step."""
    command = [sys.executable, __file__, *sys.argv[1:], "--checkpoint", str(path)]
    done = subprocess.run([*command, "--kill-at", str(kill_at)])
    if done.returncode != -signal.SIGKILL:
        raise SystemExit(f"The other process ended by itself, with status {done.returncode}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epsilon", type=float, default=8.0, help="target epsilon, such as 3 or 8")
    parser.add_argument("--noise-multiplier", type=float, default=0.7)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--checkpoint", type=Path, help="where to put the checkpoint")
    parser.add_argument("--kill-at", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.kill_at:
        Run(args, journal_of(args.checkpoint)).train(
            args.checkpoint, every=args.every, kill_at=args.kill_at
        )
        raise SystemExit(f"There was no step {args.kill_at} to be killed in.")
    if args.checkpoint is None:
        with tempfile.TemporaryDirectory() as folder:
            compare(args, Path(folder) / "run.pt")
    else:
        compare(args, args.checkpoint)


def journal_of(path: Path) -> Path:
    """Returns where the journal of a checkpoint is."""
    return path.with_suffix(".journal")


def compare(args: argparse.Namespace, path: Path) -> None:
    """Trains with and without interruption, and checks that it makes no difference."""
    whole = Run(args)
    # In the middle of the run, and of the time between two checkpoints.
    saved_at = whole.steps // 2 // args.every * args.every
    kill_at = saved_at + args.every // 2 + 1
    journal_of(path).unlink(missing_ok=True)  # that of an earlier call
    train_and_be_killed(path, kill_at)
    print(f"killed in step {kill_at} of {whole.steps}")

    resumed = Run(args, journal_of(path))
    resumed.load(path)
    steps, released = resumed.optimizer.ledger.position, resumed.optimizer.ledger.steps
    spent = resumed.optimizer.epsilon(DELTA)
    print(f"checkpoint of step {steps}, {released} were released: epsilon {spent:.4f}")
    loss = resumed.train()
    print(f"resumed to step {resumed.optimizer.ledger.steps}: loss {loss:.6f}")
    print(f"uninterrupted: loss {whole.train():.6f}")
    spent = resumed.optimizer.epsilon(DELTA)
    print(f"epsilon {spent:.4f} at delta {DELTA:g}, target {args.epsilon:g}")

    if (steps, released) != (saved_at, kill_at - 1):
        raise SystemExit(f"The checkpoint is of step {steps}, and {released} were released.")
    expected = whole.results
    different = [name for name, x in resumed.results.items() if not x.equal(expected[name])]
    if different:
        raise SystemExit(f"These differ from the uninterrupted run: {', '.join(different)}.")
    if resumed.optimizer.ledger.state_dict() != whole.optimizer.ledger.state_dict():
        raise SystemExit("The ledger differs from that of the uninterrupted run.")
    if resumed.optimizer.ledger.steps != resumed.steps or spent > args.epsilon:
        raise SystemExit("The ledger does not say what was spent.")
    print("weights, optimizer and ledger equal those of the uninterrupted run, bit for bit")


if __name__ == "__main__":
    main()
