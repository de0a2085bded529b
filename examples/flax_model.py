"""Train a Flax model on handwritten digits with differential privacy, in an ordinary torch loop.

The model is Flax's; its parameters become torch's, so that loss, optimizer, scheduler, checkpoint
and loop are torch's own. The data come with scikit-learn, so nothing is downloaded.

    python examples/flax_model.py                    # epsilon 8
    python examples/flax_model.py --epsilon 3 --checkpoint digits.pt
"""

import argparse
import time
from pathlib import Path

import flax.linen
import jax
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset
from tqdm import tqdm

import dpbridge

DELTA = 1e-4  # Below 1 / 1437, the size of the training set.


class CNN(flax.linen.Module):
    """A convolution and a hidden layer with tanh, which suits clipping, and dropout."""

    @flax.linen.compact
    def __call__(self, images: jax.Array, *, deterministic: bool) -> jax.Array:
        """Returns `(batch, 10)` logits of `(batch, 8, 8, 1)` images."""
        x = flax.linen.tanh(flax.linen.Conv(32, (3, 3))(images))
        x = flax.linen.max_pool(x, (2, 2), strides=(2, 2))
        x = flax.linen.tanh(flax.linen.Dense(64)(x.reshape(x.shape[0], -1)))
        x = flax.linen.Dropout(0.1, deterministic=deterministic)(x)
        return flax.linen.Dense(10)(x)


def make_model(seed: int) -> dpbridge.JaxModule:
    """Returns the CNN as a torch module."""
    cnn = CNN()
    images = np.zeros((1, 8, 8, 1), np.float32)
    variables = cnn.init(jax.random.key(seed), images, deterministic=True)

    def apply_fn(variables, key, images):  # The key is None in eval mode.
        rngs = None if key is None else {"dropout": key}
        return cnn.apply(variables, images, deterministic=key is None, rngs=rngs)

    return dpbridge.JaxModule(apply_fn, variables, takes_key=True)


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """Returns 1437 training and 360 test images of 8 by 8 pixels, channels last, in [0, 2]."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(-1) / 8
    labels = torch.tensor(digits.target)
    split = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    x_train, x_test, y_train, y_test = split
    return TensorDataset(x_train, y_train), TensorDataset(x_test, y_test)


def train(args: argparse.Namespace) -> tuple[nn.Module, float, float]:
    """Returns the trained model, its test accuracy and the epsilon spent."""
    train_data, test_data = load_data()
    sampling_prob = args.batch_size / len(train_data)
    noise_multiplier = dpbridge.accounting.calibrate_noise_multiplier(
        epsilon=args.epsilon, delta=DELTA, sampling_prob=sampling_prob, steps=args.steps
    )
    model = make_model(args.seed)
    # Seeds make the quoted numbers repeatable. Leave them out when privacy is at stake.
    optimizer = dpbridge.DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9),
        model,
        loss_fn=nn.CrossEntropyLoss(),
        l2_clip_norm=args.l2_clip_norm,
        noise_multiplier=noise_multiplier,
        expected_batch_size=args.batch_size,
        sampling_prob=sampling_prob,
        seed=args.seed,
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    loader = dpbridge.PoissonLoader(
        train_data, sampling_prob=sampling_prob, steps=args.steps, seed=args.seed
    )
    progress = tqdm(loader, desc=f"Flax CNN, noise multiplier {noise_multiplier:.3f}")
    for x, y in progress:
        loss = optimizer.backward(x, y)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        progress.set_postfix_str(f"loss {loss.item():.3f}")
    return model, accuracy(model.eval(), test_data), optimizer.epsilon(DELTA)


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Returns the share of test digits read correctly."""
    x, y = data.tensors
    return (model(x).argmax(1) == y).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epsilon", type=float, default=8.0, help="target epsilon, such as 3 or 8")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=256, help="expected size of a draw")
    parser.add_argument("--lr", type=float, default=0.7)
    parser.add_argument("--l2-clip-norm", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="where to put the trained parameters")
    parser.add_argument("--floor", type=float, default=0.9, help="accuracy to be reached")
    args = parser.parse_args()

    start = time.perf_counter()
    model, reached, spent = train(args)
    names = ", ".join(name for name, _ in model.named_parameters())
    print(f"trained {names} in {time.perf_counter() - start:.0f} s")
    print(f"test accuracy {reached:.4f}")
    print(f"epsilon {spent:.4f} at delta {DELTA:g}, target {args.epsilon:g}")
    if args.checkpoint:
        torch.save(model.state_dict(), args.checkpoint)
        print(f"parameters in {args.checkpoint}")
    if spent > args.epsilon:
        raise SystemExit("The epsilon spent is above the target.")
    if reached < args.floor:
        raise SystemExit(f"The accuracy is below {args.floor}.")


if __name__ == "__main__":
    main()
