"""The rows of the table: a model, its loss, and a batch of random data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import models

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        title: As it stands in the table.
        batch_size: How many examples.
        make_model: Makes the module.
        make_batch: Makes input and target of that many examples.
        make_loss: Makes the loss, a module with a `reduction`: "mean", or "none" for one number
            an example.
    """

    title: str
    batch_size: int
    make_model: Callable[[], nn.Module]
    make_batch: Callable[[int], Tensors]
    make_loss: Callable[[], nn.Module] = nn.CrossEntropyLoss


class TokenLoss(nn.Module):
    """Cross-entropy of the next token, the mean over each text."""

    def __init__(self) -> None:
        super().__init__()
        self.reduction = "mean"

    def forward(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        flat = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
        losses = flat.view(tokens.shape).mean(dim=1)
        return losses if self.reduction == "none" else losses.mean()


def _floats(*shape: int, classes: int = 10) -> Callable[[int], Tensors]:
    return lambda size: (torch.randn(size, *shape), torch.randint(classes, (size,)))


def _words(length: int, vocabulary: int, classes: int) -> Callable[[int], Tensors]:
    return lambda size: (
        torch.randint(vocabulary, (size, length)),
        torch.randint(classes, (size,)),
    )


def _text(length: int, vocabulary: int) -> Callable[[int], Tensors]:
    return lambda size: torch.randint(vocabulary, (2, size, length)).unbind(0)


def _gpt() -> nn.Module:
    return models.GPT(vocabulary=1000, width=256, layers=4, heads=8, length=128)


ROWS: Mapping[str, Row] = {
    "mlp": Row("MLP 784-1024-1024-10, B=256", 256, models.mlp, _floats(784)),
    "cnn": Row("CNN, 3 convolutions, GroupNorm, B=128", 128, models.cnn, _floats(3, 32, 32)),
    "resnet": Row("ResNet-18, GroupNorm, B=16", 16, models.resnet18, _floats(3, 32, 32)),
    "gpt": Row("GPT d=256 L=4 T=128, B=16", 16, _gpt, _text(128, 1000), TokenLoss),
    "lstm": Row(
        "LSTM classifier d=128 h=256 T=64, B=64",
        64,
        lambda: models.LSTMClassifier(vocabulary=5000, width=128, hidden=256, classes=4),
        _words(64, 5000, 4),
    ),
    "bag": Row(
        "Embedding bag V=20000 d=64 T=64, B=256",
        256,
        lambda: models.BagClassifier(vocabulary=20_000, width=64, classes=4),
        _words(64, 20_000, 4),
    ),
    "vit": Row(
        "ViT d=192 L=6 T=64, B=32",
        32,
        lambda: models.ViT(width=192, layers=6, heads=3, classes=10),
        _floats(3, 32, 32),
    ),
    "lora": Row(
        "GPT as above, LoRA of rank 8 alone, B=16",
        16,
        lambda: models.with_lora(_gpt(), rank=8),
        _text(128, 1000),
        TokenLoss,
    ),
}

# Not in the table: seconds to run, so that the harness itself can be tested.
TINY = Row(
    "MLP 8-16-4, B=8",
    8,
    lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)),
    _floats(8, classes=4),
)
