"""The models: plain modules, as a torch user writes them, that every contender is given.

Where a library asks for a form (Opacus: every parameter in a module that it knows, every input
with the examples on axis 0), and it costs nothing, that form was chosen: positions are indices
into an `nn.Embedding`, the head is not tied, there is no class token.
"""

import torch
import torch.nn.functional as F
from torch import nn


def mlp() -> nn.Module:
    """784-1024-1024-10."""
    return nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )


def cnn() -> nn.Module:
    """Three convolutions on 3×32×32."""

    def block(channels: int, wider: int) -> list[nn.Module]:
        return [
            nn.Conv2d(channels, wider, 3, padding=1),
            nn.GroupNorm(8, wider),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]

    layers = [*block(3, 32), *block(32, 64), *block(64, 128)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, 10))


class Residual(nn.Module):
    """The basic block of a ResNet, with GroupNorm."""

    def __init__(self, channels: int, wider: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, wider, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(32, wider)
        self.conv2 = nn.Conv2d(wider, wider, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(32, wider)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != wider:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, wider, 1, stride, bias=False), nn.GroupNorm(32, wider)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet18() -> nn.Module:
    """ResNet-18 for 3×32×32: 11.2 million parameters."""
    stages = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    blocks: list[nn.Module] = []
    for channels, wider, stride in stages:
        blocks += [Residual(channels, wider, stride), Residual(wider, wider, 1)]
    stem = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.GroupNorm(32, 64), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)]
    return nn.Sequential(*stem, *blocks, *head)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int, is_causal: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.heads = heads
        self.is_causal = is_causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (batch, heads, length, width / heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """A transformer block, norms first."""

    def __init__(self, width: int, heads: int, is_causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, is_causal)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A causal language model."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, True) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = self.tokens(tokens) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # (batch, length, vocabulary)


class LoRA(nn.Module):
    """A frozen linear layer with a trainable product of low rank beside it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.narrow = nn.Linear(base.in_features, rank, bias=False)
        self.widen = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.widen(self.narrow(x))


def with_lora(model: nn.Module, rank: int) -> nn.Module:
    """Freezes all of a transformer, and adds adapters to the linear layers of its blocks."""
    model.requires_grad_(False)
    for block in model.modules():
        if isinstance(block, Block):
            block.attention.qkv = LoRA(block.attention.qkv, rank)
            block.attention.out = LoRA(block.attention.out, rank)
            block.up = LoRA(block.up, rank)
            block.down = LoRA(block.down, rank)
    return model


class LSTMClassifier(nn.Module):
    """The last state of an LSTM over a text."""

    def __init__(self, vocabulary: int, width: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(self.tokens(tokens))
        return self.head(states[:, -1])


class BagClassifier(nn.Module):
    """The mean of a text's word vectors, and two layers."""

    def __init__(self, vocabulary: int, width: int, classes: int) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(vocabulary, width, mode="mean")
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.hidden(self.bag(tokens))))


class ViT(nn.Module):
    """A vision transformer on 3×32×32 in patches of 4×4, mean-pooled."""

    def __init__(self, width: int, layers: int, heads: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.positions = nn.Embedding(64, width)
        self.blocks = nn.ModuleList(Block(width, heads, False) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)  # (batch, 64, width)
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        x = x + self.positions(places)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))
