"""Train a small CNN on handwritten digits with differential privacy.

An ordinary torch loop: model, optimizer and data are torch's, the private gradients are computed
by JAX. The data come with scikit-learn, so nothing is downloaded.

    python examples/digits.py                        # epsilon 8
    python examples/digits.py --epsilon 3 --plot digits.png
    python examples/digits.py --model mlp --repeats 3
"""

import argparse
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import TensorDataset
from tqdm import tqdm

import dpbridge

DELTA = 1e-4  # Below 1 / 1437, the size of the training set.


def load_data(model: str) -> tuple[TensorDataset, TensorDataset]:
    """Returns 1437 training and 360 test images of 8 by 8 pixels, in [0, 2].

    The MLP sees their edges instead: 4 maps of 4 by 4 cells.
    """
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8
    if model == "mlp":
        images = edges(images)
    labels = torch.tensor(digits.target)
    split = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    x_train, x_test, y_train, y_test = split
    return TensorDataset(x_train, y_train), TensorDataset(x_test, y_test)


def edges(images: torch.Tensor) -> torch.Tensor:
    """Returns how strong the edges of four directions are in each cell of 2 by 2 pixels.

    Fixed in advance and applied to each image by itself, this costs no privacy. What a small
    network would have to learn through the noise is given to it instead (Tramer and Boneh 2021).
    """
    padded = F.pad(images, (1, 1, 1, 1))  # (images, 1, 10, 10)
    dx = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    dy = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    strength = torch.hypot(dx, dy).clamp(min=1e-6)
    # The doubled angle: an edge from dark to bright counts as one from bright to dark.
    straight, diagonal = (dx**2 - dy**2) / strength, 2 * dx * dy / strength
    maps = torch.cat([straight, -straight, diagonal, -diagonal], dim=1).relu()
    return F.avg_pool2d(maps, 2)  # (images, 4, 4, 4)


def make_cnn() -> nn.Module:
    """Two convolutions with tanh, which keeps gradients small and so suits clipping."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def make_mlp() -> nn.Module:
    """One hidden layer of 64, on edges that are standardised image by image."""
    return nn.Sequential(
        nn.Flatten(),
        nn.LayerNorm(64, elementwise_affine=False),
        nn.Linear(64, 64),
        nn.Tanh(),
        nn.Linear(64, 10),
    )


MODELS = {"cnn": make_cnn, "mlp": make_mlp}
SETTINGS = {
    "cnn": {"batch_size": 256, "lr": 0.7, "l2_clip_norm": 0.25},
    "mlp": {"batch_size": 512, "lr": 0.4, "l2_clip_norm": 0.3},
}


@dataclass
class History:
    """What the picture shows."""

    steps: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    epsilon: list[float] = field(default_factory=list)


def train(args: argparse.Namespace, seed: int) -> tuple[float, float, History]:
    """Trains once; returns test accuracy, epsilon spent and the way there."""
    torch.manual_seed(seed)
    train_data, test_data = load_data(args.model)
    sampling_prob = args.batch_size / len(train_data)
    noise_multiplier = dpbridge.accounting.calibrate_noise_multiplier(
        epsilon=args.epsilon, delta=DELTA, sampling_prob=sampling_prob, steps=args.steps
    )
    model = MODELS[args.model]()
    # Seeds make the quoted numbers repeatable. Leave them out when privacy is at stake.
    optimizer = dpbridge.DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9),
        model,
        loss_fn=nn.CrossEntropyLoss(),
        l2_clip_norm=args.l2_clip_norm,
        noise_multiplier=noise_multiplier,
        expected_batch_size=args.batch_size,
        sampling_prob=sampling_prob,
        seed=seed,
    )
    # An average over the last steps is as private as the steps, and averages out their noise.
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.averaging))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    loader = dpbridge.PoissonLoader(
        train_data, sampling_prob=sampling_prob, steps=args.steps, seed=seed
    )
    history, seen, start = History(), 0, time.perf_counter()
    progress = tqdm(loader, desc=f"{args.model}, noise multiplier {noise_multiplier:.3f}")
    for step, (x, y) in enumerate(progress, start=1):
        loss = optimizer.backward(x, y)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        averaged.update_parameters(model)
        seen += len(x)
        if step % args.report_every == 0 or step == args.steps:
            history.steps.append(step)
            history.accuracy.append(accuracy(averaged, test_data))
            history.epsilon.append(optimizer.epsilon(DELTA))
            rate = seen / (time.perf_counter() - start)
            progress.set_postfix_str(
                f"loss {loss.item():.3f}, epsilon {history.epsilon[-1]:.2f}, {rate:.0f} examples/s"
            )
    return history.accuracy[-1], history.epsilon[-1], history


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Returns the share of test digits read correctly."""
    x, y = data.tensors
    return (model(x).argmax(1) == y).float().mean().item()


def plot(history: History, path: Path) -> None:
    """Draws accuracy and epsilon against steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.subplots()
    left.plot(history.steps, history.accuracy, color="tab:blue")
    left.set_xlabel("step")
    left.set_ylabel("test accuracy", color="tab:blue")
    left.set_ylim(0, 1)
    right = left.twinx()
    right.plot(history.steps, history.epsilon, color="tab:red")
    right.set_ylabel(f"epsilon spent (delta = {DELTA:g})", color="tab:red")
    right.set_ylim(0, None)
    left.set_title("Handwritten digits, trained privately")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epsilon", type=float, default=8.0, help="target epsilon, such as 3 or 8")
    parser.add_argument("--model", choices=sorted(MODELS), default="cnn")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, help="expected size of a draw")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--l2-clip-norm", type=float)
    parser.add_argument("--averaging", type=float, default=0.95, help="decay of the average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=1, help="seeds to run, for a mean")
    parser.add_argument("--report-every", type=int, default=25)
    parser.add_argument("--plot", type=Path, help="where to put a picture of the (last) run")
    parser.add_argument("--floor", type=float, default=0.94, help="accuracy to be reached")
    parser.set_defaults(**SETTINGS[parser.parse_known_args()[0].model])
    args = parser.parse_args()

    runs = [train(args, seed) for seed in range(args.seed, args.seed + args.repeats)]
    reached = [run[0] for run in runs]
    spent = max(run[1] for run in runs)
    spread = f" (from {min(reached):.4f} to {max(reached):.4f})" if len(reached) > 1 else ""
    print(f"test accuracy {statistics.mean(reached):.4f}{spread}")
    print(f"epsilon {spent:.4f} at delta {DELTA:g}, target {args.epsilon:g}")
    if args.plot:
        plot(runs[-1][2], args.plot)
        print(f"picture in {args.plot}")
    if spent > args.epsilon:
        raise SystemExit("The epsilon spent is above the target.")
    if min(reached) < args.floor:
        raise SystemExit(f"The accuracy is below {args.floor}.")


if __name__ == "__main__":
    main()
