"""Image models as timm writes them, in training mode: against torch, what they draw fixed."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpbridge import DPOptimizer
from lowering_checks import assert_model_matches, run_program

BATCH, CLASSES, WIDTH = 3, 5, 8


class DropPath(nn.Module):
    def __init__(self, drop_prob=0.25):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training:
            return x
        keep_prob = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob)
        return x * mask.div_(keep_prob)


class LayerScale(nn.Module):
    def __init__(self, width, inplace=False):
        super().__init__()
        self.inplace = inplace
        self.gamma = nn.Parameter(0.5 * torch.ones(width))

    def forward(self, x):
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


class Mlp(nn.Module):
    def __init__(self, inputs, hidden, gated=False):
        super().__init__()
        self.gated = gated
        self.first, self.second = (
            nn.Linear(inputs, hidden),
            nn.Linear(hidden // (1 + gated), inputs),
        )
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        x = self.first(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        else:
            x = F.gelu(x, approximate="tanh")
        return self.drop(self.second(self.drop(x)))


# Residual networks


class StdConv2d(nn.Conv2d):
    def forward(self, x):
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0,
            eps=1e-6,
        ).reshape_as(self.weight)  # fmt: skip
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ScaledStdConv2d(nn.Conv2d):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))
        self.scale = self.weight[0].numel() ** -0.5

    def forward(self, x):
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None,
            weight=(self.gain * self.scale).view(-1), training=True, momentum=0.0, eps=1e-6,
        ).reshape_as(self.weight)  # fmt: skip
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class BigTransferConv2d(nn.Conv2d):
    def forward(self, x):
        variance, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        weight = (self.weight - mean) / torch.sqrt(variance + 1e-10)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class SqueezeExcite(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

    def forward(self, x):
        scale = x.mean((2, 3), keepdim=True)
        return x * self.expand(F.relu(self.reduce(scale), inplace=True)).sigmoid()


class Bottleneck(nn.Module):
    def __init__(self, inputs, outputs, stride, conv):
        super().__init__()
        self.conv1, self.norm1 = conv(inputs, 4, 1, bias=False), nn.GroupNorm(2, 4)
        self.conv2 = conv(4, 4, 3, stride, 1, groups=2, bias=False)
        self.norm2 = nn.GroupNorm(2, 4)
        self.conv3, self.norm3 = conv(4, outputs, 1, bias=False), nn.GroupNorm(2, outputs)
        self.attention, self.drop_path = SqueezeExcite(outputs), DropPath()
        self.act = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential(
            nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False),
            conv(inputs, outputs, 1, bias=False),
            nn.GroupNorm(2, outputs),
        )

    def forward(self, x):
        y = self.act(self.norm1(self.conv1(x)))
        y = self.act(self.norm2(self.conv2(y)))
        y = self.drop_path(self.attention(self.norm3(self.conv3(y))))
        y += self.shortcut(x)
        return self.act(y)


class ResNet(nn.Module):
    def __init__(self, conv=StdConv2d):
        super().__init__()
        self.stem = nn.Sequential(
            conv(3, 4, 3, 2, 1, bias=False), nn.GroupNorm(2, 4), nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip
        self.stages = nn.Sequential(Bottleneck(4, 8, 1, conv), Bottleneck(8, 8, 2, conv))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.stages(self.stem(x)), 1).flatten(1)
        return self.head(F.dropout(x, 0.2, self.training))


# ConvNeXt


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias)
        return x.permute(0, 3, 1, 2)


class GlobalResponseNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))

    def forward(self, x):
        norm = x.norm(p=2, dim=(1, 2), keepdim=True)
        share = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)
        return x + torch.addcmul(self.bias.view(1, 1, 1, -1), self.weight, x * share)


class ConvNeXtBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.response = GlobalResponseNorm(2 * width)
        self.gamma = nn.Parameter(0.3 * torch.ones(width))
        self.drop_path = DropPath()

    def forward(self, x):
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        y = self.second(self.response(F.gelu(self.first(y)))).permute(0, 3, 1, 2)
        return self.drop_path(y.mul(self.gamma.reshape(1, -1, 1, 1))) + x


class ConvNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 2, 2), LayerNorm2d(4), ConvNeXtBlock(4))
        self.stage = nn.Sequential(LayerNorm2d(4), nn.Conv2d(4, 6, 2, 2), ConvNeXtBlock(6))
        self.norm, self.head = LayerNorm2d(6), nn.Linear(6, CLASSES)

    def forward(self, x):
        x = self.stage(self.stem(x)).mean((-2, -1), keepdim=True)
        return self.head(self.norm(x).flatten(1))


# Vision transformers


class Attention(nn.Module):
    def __init__(self, heads=2, fused=True):
        super().__init__()
        self.heads, self.features, self.fused = heads, WIDTH // heads, fused
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.LayerNorm(self.features), nn.RMSNorm(self.features)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        batch, time, width = x.shape
        parts = self.qkv(x).reshape(batch, time, 3, self.heads, self.features)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused:
            p = self.drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        else:
            weights = (q * self.features**-0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
            x = self.drop(weights) @ v
        return self.drop(self.proj(x.transpose(1, 2).reshape(batch, time, width)))


class TransformerBlock(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.mlp = Attention(**options), Mlp(WIDTH, 12, gated=True)
        self.scale1, self.scale2 = LayerScale(WIDTH), LayerScale(WIDTH, inplace=True)
        self.drop_path = DropPath()

    def forward(self, x):
        x = x + self.drop_path(self.scale1(self.attention(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class PatchDropout(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        prefix, x = x[:, :1], x[:, 1:]
        kept = torch.argsort(torch.randn(x.shape[:2], device=x.device), dim=-1)[:, :8]
        x = x.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return torch.cat((prefix, x), dim=1)


class ViT(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 2, 2)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 17, WIDTH))
        self.drop, self.norm = PatchDropout(), nn.LayerNorm(WIDTH)
        self.blocks = nn.Sequential(TransformerBlock(**options), TransformerBlock(**options))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.resized(4)
        return self.head(self.norm(self.blocks(self.drop(x)))[:, 0])

    def resized(self, size):
        grid = self.positions[:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(size, size), mode="bicubic", align_corners=False)
        return torch.cat([self.positions[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


# Mixers


class Affine(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, 1, width))
        self.beta = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, x):
        return torch.addcmul(self.beta, self.alpha, x)


class MixerBlock(nn.Module):
    def __init__(self, norm, tokens):
        super().__init__()
        self.norm1, self.norm2 = norm(WIDTH), norm(WIDTH)
        self.tokens, self.channels = tokens(), Mlp(WIDTH, 12)
        self.scale, self.drop_path = LayerScale(WIDTH), DropPath()

    def forward(self, x):
        mixed = self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.drop_path(self.scale(mixed))
        return x + self.drop_path(self.channels(self.norm2(x)))


class Mixer(nn.Module):
    def __init__(self, norm, tokens):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 2, 2)
        self.blocks = nn.Sequential(MixerBlock(norm, tokens), MixerBlock(norm, tokens))
        self.norm, self.head = norm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        x = self.blocks(self.patches(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(dim=1))


FAMILIES = {
    "resnet": ResNet,
    "resnet, scaled": partial(ResNet, ScaledStdConv2d),
    "resnet, big transfer": partial(ResNet, BigTransferConv2d),
    "convnext": ConvNeXt,
    "vit": ViT,
    "vit, eager": partial(ViT, fused=False),
    "mixer": partial(Mixer, nn.LayerNorm, partial(Mlp, 16, 6)),
    "resmlp": partial(Mixer, Affine, partial(nn.Linear, 16, 16)),
}
QUICK = ("convnext",)


def batch(name, size=BATCH):
    side = 16 if "resnet" in name else 8
    return torch.randn(size, 3, side, side), torch.randint(CLASSES, (size,))


def names(quick=QUICK):
    return [
        name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES
    ]


@pytest.mark.parametrize("name", names())
def test_family_equals_torch(name):
    assert_model_matches(FAMILIES[name](), nn.CrossEntropyLoss(), batch(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_family_has_another_loss_for_equal_examples(name):
    same = [leaf[:1].expand_as(leaf).contiguous() for leaf in batch(name, 8)]
    losses, _, _ = run_program(FAMILIES[name](), nn.CrossEntropyLoss(), same, randomness=True)
    assert len(set(losses.tolist())) > 1


@pytest.mark.parametrize("name", names(quick=()))
def test_family_passes_the_self_check(name):
    model = FAMILIES[name]()
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        loss_fn=nn.CrossEntropyLoss(),
        l2_clip_norm=1.0,
        noise_multiplier=1.0,
        expected_batch_size=4,
        seed=0,
    )
    optimizer.backward(*batch(name, 4))
    optimizer.step()
