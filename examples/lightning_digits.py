"""Train a Lightning module on handwritten digits with differential privacy.

Module and datamodule are as they would be without privacy; the trainer has one more callback. The
data come with scikit-learn, so nothing is downloaded. Needs pip install dpbridge[lightning].

    python examples/lightning_digits.py                        # epsilon 8
    python examples/lightning_digits.py --epsilon 3 --checkpoint digits.ckpt
    python examples/lightning_digits.py --short
"""

# ruff: noqa: D102
# Lightning says what its hooks do.

import argparse
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dpbridge.lightning import PrivacyCallback

DELTA = 1e-4  # Below 1 / 1437, the size of the training set.


class Digits(pl.LightningDataModule):
    """1437 training and 360 test images of 8 by 8 pixels, in [0, 2]."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8
        labels = torch.tensor(digits.target)
        split = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
        x_train, x_test, y_train, y_test = split
        self.train_data = TensorDataset(x_train, y_train)
        self.test_data = TensorDataset(x_test, y_test)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_data, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.test_data, 360)


class Classifier(pl.LightningModule):
    """Two convolutions with tanh, which keeps gradients small and so suits clipping."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.Tanh(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 10),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        x, y = batch
        accuracy = (self(x).argmax(1) == y).float().mean()
        self.log("accuracy", accuracy, prog_bar=True, batch_size=len(x))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epsilon", type=float, default=8.0, help="target epsilon, such as 3 or 8")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=256, help="expected size of a draw")
    parser.add_argument("--lr", type=float, default=0.7)
    parser.add_argument("--l2-clip-norm", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="where to save the run")
    parser.add_argument("--floor", type=float, default=0.94, help="accuracy to be reached")
    parser.add_argument("--short", action="store_true", help="12 steps, a lower floor")
    args = parser.parse_args()
    if args.short:
        # Every draw is the whole set: one size, and one program to compile.
        args.epochs, args.batch_size, args.floor = 12, 1437, 0.4
    # Lightning's advice on workers and on its own products.
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    torch.manual_seed(args.seed)
    # The seed makes the noise repeatable. Leave it out when privacy is at stake.
    privacy = PrivacyCallback(
        epsilon=args.epsilon, delta=DELTA, l2_clip_norm=args.l2_clip_norm, seed=args.seed
    )
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        callbacks=[privacy],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    module, data = Classifier(args.lr), Digits(args.batch_size)
    start = time.perf_counter()
    trainer.fit(module, datamodule=data)
    seconds = time.perf_counter() - start

    accuracy, spent = float(trainer.callback_metrics["accuracy"]), privacy.epsilon()
    multiplier = privacy.optimizer.noise_multiplier
    print(f"{trainer.global_step} private steps in {seconds:.0f} s, noise {multiplier:.3f}")
    print(f"test accuracy {accuracy:.4f}")
    print(f"epsilon {spent:.4f} at delta {DELTA:g}, target {args.epsilon:g}")
    if args.checkpoint:
        trainer.save_checkpoint(args.checkpoint)
        print(f"run saved in {args.checkpoint}")
    if spent > args.epsilon:
        raise SystemExit("The epsilon spent is above the target.")
    if accuracy < args.floor:
        raise SystemExit(f"The accuracy is below {args.floor}.")


if __name__ == "__main__":
    main()
