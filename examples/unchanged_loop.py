"""An ordinary torch training loop, made private by one call that stands before it.

Model, optimizer, scheduler, loss and loop are what a torch user writes. `make_private` makes the
loader draw Poisson batches, the model run in JAX while it trains, and the optimizer clip and noise.
The data come with scikit-learn, so nothing is downloaded.

    python examples/unchanged_loop.py                # epsilon 8
    python examples/unchanged_loop.py --epsilon 3
"""

import argparse
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpbridge

DELTA = 1e-4  # Below 1 / 1437, the size of the training set.


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """Returns 1437 training and 360 test images of 8 by 8 pixels, in [0, 2]."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8
    labels = torch.tensor(digits.target)
    split = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    x_train, x_test, y_train, y_test = split
    return TensorDataset(x_train, y_train), TensorDataset(x_test, y_test)


def make_model() -> nn.Module:
    """A convolution and a linear layer, with tanh, which keeps gradients small."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    """Returns the share of digits read correctly."""
    model.eval()
    hits = sum((model(x).argmax(1) == y).sum().item() for x, y in loader)
    model.train()
    return hits / len(loader.dataset)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epsilon", type=float, default=8.0, help="target epsilon, such as 3 or 8")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--floor", type=float, default=0.9, help="accuracy to be reached")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    train_data, test_data = load_data()
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    # The generator and the seed make the run repeatable. Leave them out when privacy is at stake.
    generator = torch.Generator().manual_seed(args.seed)
    loader = DataLoader(train_data, batch_size=args.batch_size, shuffle=True, generator=generator)
    test_loader = DataLoader(test_data, batch_size=len(test_data))

    model, optimizer, loader = dpbridge.make_private(
        model,
        optimizer,
        loader,
        epsilon=args.epsilon,
        delta=DELTA,
        epochs=args.epochs,
        l2_clip_norm=0.5,
        criterion=F.cross_entropy,  # has it tried whether this loss mixes examples
        seed=args.seed,
    )

    # From here on nothing knows of privacy, but for the epsilon that is printed.
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(loader))
    start = time.perf_counter()
    for epoch in range(1, args.epochs + 1):
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            scheduler.step()
        reached, spent = accuracy(model, test_loader), optimizer.epsilon(DELTA)
        print(f"epoch {epoch}: test accuracy {reached:.4f}, epsilon {spent:.4f}")

    model = dpbridge.make_public(model)
    print(f"trained {optimizer.ledger.steps} steps in {time.perf_counter() - start:.0f} s")
    print(f"test accuracy {reached:.4f}")
    print(f"epsilon {spent:.4f} at delta {DELTA:g}, target {args.epsilon:g}")

    if spent > args.epsilon:
        raise SystemExit("The epsilon spent is above the target.")
    if accuracy(model, test_loader) != reached:
        raise SystemExit("The model that was taken back is not the one that was trained.")
    if reached < args.floor:
        raise SystemExit(f"The accuracy is below {args.floor}.")


if __name__ == "__main__":
    main()
