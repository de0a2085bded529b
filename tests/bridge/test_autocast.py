"""`torch.autocast`: the types of torch, around forward and in it, with weights in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dpbridge import DPOptimizer, check, make_private
from dpbridge.dtypes import to_jax_dtype
from dpbridge.lowering import lower_outputs
from lowering_checks import to_jax
from oracles import QUICKEST_TO_COMPILE

BATCH = 3


def half():
    return torch.autocast("cpu", dtype=torch.bfloat16)


class Net(nn.Module):
    """Calls what it is given, with these layers."""

    def __init__(self, forward, **layers):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({name: make() for name, make in layers.items()})
        self.call = forward

    def forward(self, x):
        return self.call(self.layers, x)


def mlp(m, x):
    return m["b"](torch.tanh(m["n"](m["a"](x))))


def cnn(m, x):
    x = F.max_pool2d(F.relu(m["n"](m["a"](x[:, None]))), 2)
    return m["b"](x.flatten(1))


def transformer(m, x):
    heads = [m[name](m["n"](x)).unflatten(-1, (2, 4)).transpose(1, 2) for name in "qkv"]
    mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
    x = x + m["o"](mixed.transpose(1, 2).flatten(2))
    return m["b"](F.gelu(x).mean(1))


def lstm(m, x):
    return m["b"](m["a"](x)[0][:, -1])


def every_kind(m, x):
    """Ops of torch's lists, and ops whose operands differ in type under autocast."""
    y = m["a"](x)
    z = torch.einsum("btd,bsd->bts", y, x) + torch.bmm(x, x.transpose(1, 2)) * m["p"](y).sum()
    z = torch.cat([z, x.new_ones(1, 6, 1)], -1) @ x.new_ones(7, 2)
    z = torch.stack([z, x[..., :2]]).sum(0).softmax(-1) + F.layer_norm(z, (2,)).exp()
    total = x.new_zeros(2)
    total += z.mean(1)[0]
    return total[None] + m["g"](x)[0][:, -1] + m["c"](x[:, 0])[0] + m["r"](x)[0][:, -1]


def of_heads():
    return {name: lambda: nn.Linear(8, 8) for name in "qkvo"}


MODELS = {
    "mlp": lambda: (
        Net(mlp, a=lambda: nn.Linear(8, 8), n=lambda: nn.LayerNorm(8), b=lambda: nn.Linear(8, 4)),
        torch.randn(BATCH, 8),
    ),
    "cnn": lambda: (
        Net(
            cnn,
            a=lambda: nn.Conv2d(1, 4, 3),
            n=lambda: nn.GroupNorm(2, 4),
            b=lambda: nn.Linear(36, 4),
        ),
        torch.randn(BATCH, 8, 8),
    ),
    "transformer": lambda: (
        Net(transformer, n=lambda: nn.LayerNorm(8), b=lambda: nn.Linear(8, 4), **of_heads()),
        torch.randn(BATCH, 6, 8),
    ),
    "lstm": lambda: (
        Net(lstm, a=lambda: nn.LSTM(8, 8, batch_first=True), b=lambda: nn.Linear(8, 4)),
        torch.randn(BATCH, 6, 8),
    ),
    "every kind": lambda: (
        Net(
            every_kind,
            a=lambda: nn.Linear(8, 8),
            p=nn.PReLU,
            g=lambda: nn.GRU(8, 2, batch_first=True),
            c=lambda: nn.LSTMCell(8, 2),
            r=lambda: nn.RNN(8, 2, batch_first=True),
        ),
        torch.randn(BATCH, 6, 8),
    ),
}

_LIKE = ("mlp", "cnn", "lstm")  # what they have, other tests have too


def of_torch(model, x):
    """Returns for each example the output and the gradients of its sum, in torch."""
    found = []
    for row in x.split(1):
        with half():
            output = model(row)
        gradients = torch.autograd.grad(output.float().sum(), list(model.parameters()))
        found.append((output, gradients))
    return found


def of_program(model, x):
    """Returns the same of the lowered program, exported under autocast."""
    with half():
        program = lower_outputs(model, lambda row: (model(row),), (x[:1],), {})
    arrays = {name: to_jax(p) for name, p in model.named_parameters()}
    constants = {name: to_jax(tensor) for name, tensor in program.constants.items()}

    def summed(parameters, row):
        named = {**constants, **parameters}
        (output,), _ = program(named, jax.random.key(0), jnp.array(False), row[None])
        return output.astype(jnp.float32).sum(), output

    step = jax.vmap(jax.grad(summed, has_aux=True), in_axes=(None, 0))
    with jax.enable_x64(True):
        run = jax.jit(step, compiler_options=QUICKEST_TO_COMPILE)
        gradients, outputs = run(arrays, to_jax(x))
    names = [name for name, _ in model.named_parameters()]
    return [(outputs[i], [gradients[name][i] for name in names]) for i in range(len(x))]


def distance(found, expected):
    """Relative, of all numbers together."""
    wide = [np.asarray(jnp.asarray(a, jnp.float32)).reshape(-1) for a in found]
    true = [b.detach().float().numpy().reshape(-1) for b in expected]
    one, other = np.concatenate(wide), np.concatenate(true)
    return np.linalg.norm(one - other) / np.linalg.norm(other)


@pytest.mark.parametrize(
    "name",
    ["transformer", "every kind", *(pytest.param(n, marks=pytest.mark.slow) for n in _LIKE)],
)
def test_program_under_autocast_is_torchs(name):
    """Rounding to 8 bits is 4e-3 an op. The weights' gradients come back in float32."""
    model, x = MODELS[name]()
    for found, expected in zip(of_program(model, x), of_torch(model, x), strict=True):
        if name != "lstm":  # torch.export says float32 of it, and ForwardProgram corrects that.
            assert found[0].dtype == to_jax_dtype(expected[0].dtype)
        assert all(gradient.dtype == jnp.float32 for gradient in found[1])
        assert distance([found[0]], [expected[0]]) < 2e-2
        assert distance(found[1], expected[1]) < 2e-2


def products(x, weight, lstm):
    """Ops that round what they are given, `(1, 4, 4)`, to the type of autocast."""
    y = x.transpose(1, 2)
    first = torch.zeros(1, 1, 4)
    return (
        F.linear(x, weight),
        x @ y,
        torch.bmm(x, y),
        torch.addmm(x[0], x[0], y[0]),
        torch.baddbmm(x, x, y),
        torch.einsum("btd,bsd->bts", x, x),
        F.conv1d(x, weight[:, :, None]),
        F.conv2d(x[None], weight[:1, None, :2, None]),
        F.conv_transpose1d(x, weight[:, :, None]),
        F.scaled_dot_product_attention(x, y, x),
        F.prelu(x, weight[0, :1]),
        lstm(x, (first, first))[0],
    )


def test_operands_of_products_are_rounded():
    """In float32, the bits that bfloat16 lacks would show in each of these."""
    x, weight = torch.randn(1, 4, 4), torch.randn(4, 4)
    root = nn.LSTM(4, 4, batch_first=True)
    rounded = x.bfloat16().float()

    def call(row):
        return products(row, weight, root)

    for context, is_same in ((half(), True), (torch.autocast("cpu", enabled=False), False)):
        with context:
            program = lower_outputs(root, call, (x,), {})
            in_torch = [torch.equal(*pair) for pair in zip(call(x), call(rounded), strict=True)]
        arrays = {name: to_jax(p) for name, p in root.named_parameters()}
        arrays |= {name: to_jax(tensor) for name, tensor in program.constants.items()}
        key, off = jax.random.key(0), jnp.array(False)
        run = jax.jit(program, compiler_options=QUICKEST_TO_COMPILE)
        ours = [run(arrays, key, off, to_jax(row))[0] for row in (x, rounded)]
        found = zip(*ours, strict=True)
        assert [np.array_equal(*pair) for pair in found] == in_torch == [is_same] * len(in_torch)


# Private training


def make_optimizer(model, **options):
    defaults = {"l2_clip_norm": 0.1, "noise_multiplier": 0.0, "expected_batch_size": BATCH}
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    return DPOptimizer(sgd, model, loss_fn=F.mse_loss, seed=0, **defaults | options)


def gradient_of(optimizer, *batch):
    optimizer.zero_grad()
    optimizer.backward(*batch)
    optimizer.step()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in parameters)
    return torch.cat([p.grad.flatten().double() for p in parameters])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer", "lstm"])
def test_clipped_gradient_of_one_example_keeps_the_bound(name):
    """Norms are found, and gradients scaled, in float32: rounding to bfloat16 is 4e-3."""
    model, x = MODELS[name]()
    clip = 1e-3
    optimizer = make_optimizer(model, l2_clip_norm=clip, expected_batch_size=1, self_check=False)
    with half():
        gradient = gradient_of(optimizer, x[:1], torch.ones(1, 4))
    assert abs(gradient.norm() / clip - 1) < 1e-5


def test_optimizer_with_and_without_autocast_in_turn_compiles_for_both():
    """The input cancels in bfloat16 and not in float32."""
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, -1.0]])
    optimizer = make_optimizer(model, l2_clip_norm=1.0)
    batch = torch.tensor([[1.001, 1.0]] * BATCH), torch.zeros(BATCH, 1)
    for is_half in (True, False, True, False):
        model.weight.data = torch.tensor([[1.0, -1.0]])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_half):
            assert bool(gradient_of(optimizer, *batch).any()) is not is_half


class Blocks(nn.Module):
    """A block of autocast, and in it one that is off, and one that is off for another device."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        with half():
            y = self.a(x)
            with torch.autocast("cpu", enabled=False):
                z = self.b(y.float())
            with torch.autocast("cuda", enabled=False):
                y = self.a(y)
        return z * y + self.b(x)


def test_block_in_forward_is_torchs_and_keeps_the_bound():
    torch.manual_seed(0)
    model, x, target = Blocks(), torch.randn(1, 8), torch.randn(1, 8)
    clip = 1e-3
    optimizer = make_optimizer(model, l2_clip_norm=clip, expected_batch_size=1)
    loss = F.mse_loss(model(x), target)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    expected = torch.cat([gradient.flatten() for gradient in expected])
    found = gradient_of(optimizer, x, target)  # Its self-check compares with torch, too.
    assert abs(found.norm() / clip - 1) < 1e-5
    assert distance([to_jax(found.float())], [expected * (clip / expected.norm())]) < 2e-2


@pytest.mark.parametrize("is_around", [False, True])
def test_what_is_off_in_a_block_is_not_rounded(is_around):
    """`1.001 - 1` is 0 in bfloat16, and not in float32."""
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, -1.0]])

    def call(x):
        with half():
            with torch.autocast("cpu", enabled=False):
                y = layer(x)
            with torch.autocast("cuda", enabled=False):
                return layer(x).float(), y, layer(x).float()

    x = torch.tensor([[1.001, 1.0]])
    with torch.autocast("cpu", torch.bfloat16, is_around):
        program = lower_outputs(layer, call, (x,), {})
    outputs, _ = program({"weight": to_jax(layer.weight)}, jax.random.key(0), None, to_jax(x))
    assert [bool(output[0, 0]) for output in outputs] == [False, True, False]


def privately(model, x, y):
    loader = DataLoader(
        TensorDataset(x, y), batch_size=len(x), generator=torch.Generator().manual_seed(3)
    )
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    return make_private(
        model, sgd, loader, noise_multiplier=0.0, l2_clip_norm=1e-2, epochs=2, seed=1
    )


@pytest.mark.parametrize("name", ["mlp", pytest.param("lstm", marks=pytest.mark.slow)])
def test_unchanged_loop_with_backward_outside_of_the_block_is_torchs(name):
    """Its self-check, of outputs and of gradients, is on, and runs outside too."""
    torch.manual_seed(0)
    model, _ = MODELS[name]()
    rows = torch.randn(8, *MODELS[name]()[1].shape[1:])
    model, optimizer, loader = privately(model, rows, torch.arange(8) % 4)
    x, y = next(iter(loader))
    before = [p.detach().clone() for p in model.parameters()]
    with half():
        output = model(x)
        loss = F.cross_entropy(output, y)
    assert output.dtype == torch.bfloat16
    loss.backward()
    optimizer.step()
    public = MODELS[name]()[0]
    for own, value in zip(public.parameters(), before, strict=True):
        own.data = value
    expected = [torch.zeros_like(p) for p in before]
    for i in range(len(x)):
        with half():
            loss = F.cross_entropy(public(x[i : i + 1]), y[i : i + 1])
        gradients = torch.autograd.grad(loss, list(public.parameters()))
        norm = float(torch.stack([g.norm() for g in gradients]).norm())
        for total, gradient in zip(expected, gradients, strict=True):
            total += gradient * min(1.0, 1e-2 / norm) / 8
    assert distance([to_jax(p.grad) for p in model.parameters()], expected) < 2e-2
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_self_check_outside_of_the_block_runs_torch_as_it_was_in_it():
    """In float32 the output, and with it the gradient of its square, would not be 0."""
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, -1.0]])
    model, optimizer, loader = privately(model, torch.tensor([[1.001, 1.0]] * 8), torch.zeros(8))
    x, _ = next(iter(loader))
    with half():
        loss = model(x).square().sum()
    loss.backward()
    optimizer.step()
    assert not model.weight.grad.any()


def test_loop_that_leaves_autocast_is_lowered_anew():
    torch.manual_seed(0)
    model, _ = MODELS["mlp"]()
    model, _, loader = privately(model, torch.randn(8, 8), torch.arange(8) % 4)
    x, _ = next(iter(loader))
    kinds = []
    for is_half in (True, False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_half):
            kinds.append(model(x).dtype)
    assert kinds == [torch.bfloat16, torch.float32, torch.bfloat16]


class Slanted(torch.autograd.Function):
    """Has a backward of its own, which torch.export does not see."""

    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient):
        return 1.3 * gradient


def test_wrong_gradient_under_autocast_is_found():
    """The tolerance of the self-check is wider there, and not without a limit."""
    layers = {"a": lambda: nn.Linear(8, 8), "b": lambda: nn.Linear(8, 4)}
    model = Net(lambda m, x: m["b"](Slanted.apply(m["a"](x))), **layers)
    optimizer = make_optimizer(model)
    with half(), pytest.raises(RuntimeError, match="must agree between torch and JAX"):
        optimizer.backward(torch.randn(BATCH, 8), torch.zeros(BATCH, 4))


@pytest.mark.slow
def test_check_says_what_training_under_autocast_does():
    model, x = MODELS["mlp"]()
    with half():
        report = check(model, x, torch.zeros(BATCH, 4), loss_fn=F.mse_loss)
    assert report.ok, str(report)


def test_op_without_a_rule_is_found_under_autocast():
    model = Net(
        lambda m, x: torch.special.zeta(m["a"](x).float(), m["n"](x) + 2),
        **{"a": lambda: nn.Linear(8, 8), "n": lambda: nn.LayerNorm(8)},
    )
    with half():
        report = check(model, torch.randn(BATCH, 8), torch.zeros(BATCH, 8), loss_fn=F.mse_loss)
    assert [finding.what for finding in report.findings] == ["aten.special_zeta.default"]
