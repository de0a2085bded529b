"""Whole models: loss and per-example gradients of all parameters, against torch, one by one."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowering_checks import assert_model_matches, run_program

BATCH, TIME, VOCABULARY, WIDTH = 4, 6, 11, 8
CLASSES = 5

cross_entropy = nn.CrossEntropyLoss()


def labels():
    return torch.randint(CLASSES, (BATCH,))


def tokens():
    return torch.randint(VOCABULARY, (BATCH, TIME))


def sequence():
    return torch.randn(BATCH, TIME, WIDTH)


class Residual(nn.Module):
    """A ResNet block with GroupNorm and in-place ReLU."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(2, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(2, outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        return self.relu(y)


class GPT(nn.Module):
    """As people write it by hand: a mask buffer, tied embeddings, logits of each token."""

    def __init__(self, tied=True):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(torch.zeros(1, TIME, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        self.drop = nn.Dropout(0.1)

    def forward(self, ids):
        x = self.drop(self.tokens(ids) + self.positions[:, : ids.size(1)])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    def __init__(self, heads=2):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1)
        )
        self.register_buffer("mask", torch.tril(torch.ones(TIME, TIME)).view(1, 1, TIME, TIME))

    def forward(self, x):
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def attend(self, x):
        batch, time, width = x.size()
        q, k, v = (
            part.view(batch, time, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(x).split(width, dim=2)
        )
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.mask[:, :, :time, :time] == 0, float("-inf"))
        y = F.softmax(scores, dim=-1) @ v
        return self.out(y.transpose(1, 2).contiguous().view(batch, time, width))


class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 5, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, 2, 16, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.head(self.encoder(x)[:, 0])


class MixerBlock(nn.Module):
    def __init__(self, patches=4):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.tokens = nn.Sequential(nn.Linear(patches, 6), nn.GELU(), nn.Linear(6, patches))
        self.channels = nn.Sequential(nn.Linear(WIDTH, 6), nn.GELU(), nn.Linear(6, WIDTH))

    def forward(self, x):
        x = x + self.tokens(self.norm1(x).mT).mT
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.blocks = nn.Sequential(MixerBlock(), MixerBlock())
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.head(self.blocks(self.patches(x).flatten(2).mT).mean(dim=1))


class TextClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.convs = nn.ModuleList(nn.Conv1d(WIDTH, 4, size) for size in (2, 3))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, ids):
        x = self.embedding(ids).transpose(1, 2)
        pooled = [F.relu(conv(x)).max(dim=2).values for conv in self.convs]
        return self.head(torch.cat(pooled, 1))


class SelfAttention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.1, batch_first=True)

    def forward(self, x, key_padding_mask=None):
        out, weights = self.attention(x, x, x, key_padding_mask=key_padding_mask, **self.options)
        return out if weights is None else out + weights.sum(-1, keepdim=True)


class Encoder(nn.Module):
    """A transformer encoder that builds its causal mask in forward."""

    def __init__(self, norm_first=False, is_causal=None):
        super().__init__()
        self.is_causal = is_causal
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x, padding=None):
        mask = torch.triu(torch.ones(TIME, TIME, dtype=torch.bool), diagonal=1)
        return self.encoder(x, mask=mask, src_key_padding_mask=padding, is_causal=self.is_causal)


def padding():
    mask = torch.zeros(BATCH, TIME, dtype=torch.bool)
    for row in range(BATCH):
        mask[row, TIME - row :] = True
    return mask


def language_loss(logits, ids):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gathered_loss(logits, target):
    return -F.log_softmax(logits, -1).gather(1, target[:, None]).mean()


def logsumexp_loss(logits, target):
    return (logits.logsumexp(1) - logits[torch.arange(len(target)), target]).sum()


def contrastive_loss(features, target):
    unit = F.normalize(features, dim=1)
    return (1 - F.cosine_similarity(unit, target[:, None] + torch.zeros_like(unit))).mean()


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.GroupNorm(2, 4), nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), nn.InstanceNorm2d(8, affine=True),
        nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(8, CLASSES),
    )  # fmt: skip


def depthwise_cnn():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding="same", groups=3), nn.Conv2d(6, 4, 1), nn.Hardswish(),
        nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2), nn.LocalResponseNorm(3),
        nn.AdaptiveAvgPool2d((1, 3)), nn.Flatten(), nn.Linear(12, CLASSES),
    )  # fmt: skip


def images():
    return torch.randn(BATCH, 3, 8, 8)


MODELS = {
    "mlp": lambda: (
        nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.RMSNorm(9), nn.Linear(9, CLASSES)),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        (torch.randn(BATCH, 7), labels()),
    ),
    "mlp with class weights": lambda: (
        nn.Sequential(nn.Linear(7, 9), nn.PReLU(9), nn.Linear(9, CLASSES)),
        nn.CrossEntropyLoss(weight=torch.rand(CLASSES), ignore_index=0),
        (torch.randn(BATCH, 7), torch.arange(BATCH)),
    ),
    "regression": lambda: (
        nn.Sequential(nn.Linear(7, 9), nn.Softplus(), nn.Linear(9, 1)),
        nn.HuberLoss(),
        (torch.randn(BATCH, 7), torch.randn(BATCH, 1)),
    ),
    "binary": lambda: (
        nn.Sequential(nn.Linear(7, 9), nn.ELU(), nn.Linear(9, 3)),
        nn.BCEWithLogitsLoss(pos_weight=torch.rand(3)),
        (torch.randn(BATCH, 7), torch.rand(BATCH, 3)),
    ),
    "cnn": lambda: (cnn().eval(), cross_entropy, (images(), labels())),
    "depthwise cnn": lambda: (depthwise_cnn(), cross_entropy, (images(), labels())),
    "cnn 1d": lambda: (
        nn.Sequential(nn.Conv1d(2, 4, 5, padding=2, padding_mode="circular"), nn.LeakyReLU(),
                      nn.MaxPool1d(3, 2, 1), nn.Flatten(), nn.Linear(20, CLASSES)),
        gathered_loss,
        (torch.randn(BATCH, 2, 10), labels()),
    ),
    "cnn 3d": lambda: (
        nn.Sequential(nn.Conv3d(1, 2, 2), nn.ReLU(), nn.MaxPool3d(2), nn.Flatten(),
                      nn.Linear(8, CLASSES)),
        logsumexp_loss,
        (torch.randn(BATCH, 1, 5, 5, 3), labels()),
    ),
    "resnet": lambda: (
        nn.Sequential(Residual(3, 4), Residual(4, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                      nn.Linear(8, CLASSES)),
        cross_entropy,
        (images(), labels()),
    ),
    "vit": lambda: (ViT().eval(), cross_entropy, (images(), labels())),
    "mixer": lambda: (Mixer(), cross_entropy, (images(), labels())),
    "text classifier": lambda: (TextClassifier(), cross_entropy, (tokens(), labels())),
    "gpt, tied": lambda: (GPT().eval(), language_loss, (ids := tokens(), ids)),
    "gpt": lambda: (GPT(tied=False).eval(), language_loss, (ids := tokens(), ids)),
    "contrastive": lambda: (
        nn.Sequential(nn.Linear(7, 9), nn.Sigmoid()),
        contrastive_loss,
        (torch.randn(BATCH, 7), torch.randn(BATCH)),
    ),
    "attention with weights": lambda: (
        SelfAttention().eval(), F.mse_loss, (sequence(), sequence()),
    ),
    "attention without weights": lambda: (
        SelfAttention(need_weights=False).eval(), F.l1_loss, (sequence(), sequence()),
    ),
    "attention with all weights": lambda: (
        SelfAttention(average_attn_weights=False, need_weights=False).eval(),
        F.smooth_l1_loss,
        (sequence(), sequence()),
        {"key_padding_mask": padding()},
    ),
    "encoder, post-norm, causal": lambda: (
        Encoder().eval(), F.mse_loss, (sequence(), sequence()), {"padding": padding()},
    ),
    "encoder, pre-norm, causal": lambda: (
        Encoder(norm_first=True, is_causal=True).eval(), F.mse_loss, (sequence(), sequence()),
    ),
    "transformer": lambda: (
        nn.Transformer(WIDTH, 2, 1, 1, 16, batch_first=True).eval(),
        F.mse_loss,
        (sequence(), sequence(), sequence()),
    ),
}  # fmt: skip

IN_FLOAT64 = ("cnn", "gpt, tied", "text classifier")


def in_float64(tree):
    if isinstance(tree, torch.Tensor):
        return tree.double() if tree.is_floating_point() else tree
    if isinstance(tree, dict):
        return {key: in_float64(value) for key, value in tree.items()}
    return tuple(map(in_float64, tree))


# To be had by `make test-slow`: near relatives of others.
RELATIVES = {"gpt", "transformer", "vit"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in RELATIVES else n for n in MODELS]
)
def test_model_equals_torch(name):
    assert_model_matches(*MODELS[name]())


@pytest.mark.parametrize("name", ["resnet", pytest.param("gpt, tied", marks=pytest.mark.slow)])
def test_model_compiled_as_in_use_equals_torch(name):
    assert_model_matches(*MODELS[name](), options=None)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_FLOAT64)
def test_model_in_float64_equals_torch(name):
    model, loss_fn, *inputs = MODELS[name]()
    assert_model_matches(model.double(), loss_fn, *map(in_float64, inputs), rtol=1e-9)


@pytest.mark.parametrize("name", ["cnn", pytest.param("gpt", marks=pytest.mark.slow)])
def test_model_in_bfloat16_is_near_torch(name):
    model, loss_fn, (x, y) = MODELS[name]()
    half = x.bfloat16() if x.is_floating_point() else x
    losses, gradients, _ = run_program(model.bfloat16(), loss_fn, (half, y))
    exact, _, _ = run_program(model.float(), loss_fn, (half.float() if x is not half else x, y))
    np.testing.assert_allclose(losses.astype(np.float32), exact, rtol=0.1)
    assert {str(g.dtype) for g in gradients.values()} == {"bfloat16"}


@pytest.mark.parametrize(
    "name",
    [
        "cnn",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt", "encoder, post-norm, causal")),
    ],
)
def test_model_in_training_draws_other_masks_for_equal_examples(name):
    model, loss_fn, (x, y), *_ = MODELS[name]()
    same = [leaf[:1].expand(leaf.shape).contiguous() for leaf in (x, y)]
    losses, _, _ = run_program(model.train(), loss_fn, same, randomness=True)
    assert len(set(losses.tolist())) == BATCH


@pytest.mark.slow
def test_model_in_training_equals_torch_without_randomness():
    model, loss_fn, args = MODELS["gpt"]()
    expected, _, _ = run_program(model.eval(), loss_fn, args)
    found, _, _ = run_program(model.train(), loss_fn, args, randomness=False)
    np.testing.assert_array_equal(found, expected)
