"""`fix`: what is replaced by what, what is kept, what is refused."""

import copy

import pytest
import torch
from torch import nn

from dpbridge import DPOptimizer
from dpbridge.fix import fix

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.norm(self.conv(x)))


def make_cnn():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)
    )


def make_residual():
    return nn.Sequential(Residual(6), nn.Sequential(Residual(6)), nn.Flatten(), nn.Linear(6 * 9, 2))


def make_mlp():
    return nn.Sequential(nn.Linear(4, 48), nn.BatchNorm1d(48), nn.Tanh(), nn.Linear(48, 2))


def make_1d():
    return nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.AdaptiveAvgPool1d(2))


MODELS = {
    "cnn": (make_cnn, (3, 5, 5)),
    "residual": (make_residual, (6, 3, 3)),
    "mlp": (make_mlp, (4,)),
    "1d": (make_1d, (3, 9)),
}


def make(name):
    build, shape = MODELS[name]
    model, x = build(), torch.randn(5, *shape)
    model(x)  # gives lazy layers their shape, and running statistics something to hold
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model, x


# What comes out


@pytest.mark.parametrize("name", MODELS)
def test_fix_leaves_no_batch_norm_and_no_running_statistics(name):
    model, _ = make(name)
    fixed = fix(model)
    assert not [module for module in fixed.modules() if isinstance(module, NORMS)]
    assert not list(fixed.buffers())
    assert any(isinstance(module, NORMS) for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_fix_keeps_all_other_names_and_values(name):
    model, _ = make(name)
    before = {n: v for n, v in model.state_dict().items() if n in dict(model.named_parameters())}
    after = fix(model).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], before[n]) for n in before)


@pytest.mark.parametrize("name", MODELS)
def test_the_fixed_model_treats_each_example_by_itself(name):
    model, x = make(name)
    fixed = fix(model)
    assert fixed(x).shape == model(x).shape
    torch.testing.assert_close(fixed(x)[:1], fixed(x[:1]))
    torch.testing.assert_close(fixed(x), copy.deepcopy(fixed).eval()(x))


@pytest.mark.parametrize("name", MODELS)
def test_fix_leaves_the_original_alone(name):
    model, x = make(name)
    model.eval()
    before, output = copy.deepcopy(model.state_dict()), model(x)
    fix(model).requires_grad_(False).add_module("more", nn.ReLU())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert torch.equal(model(x), output)
    assert all(p.requires_grad for p in model.parameters())


def test_what_is_fine_stays_as_it_is():
    model = nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4))
    fixed = fix(model)
    assert repr(fixed) == repr(model)
    assert fixed is not model
    assert fix(model, inplace=True) is model


# Number of groups


@pytest.mark.parametrize(
    ("layer", "groups"),
    [
        (nn.BatchNorm2d(64), 32),
        (nn.BatchNorm2d(48), 24),  # of 32 or fewer with two channels or more, 24 divides 48
        (nn.BatchNorm3d(6), 3),
        (nn.BatchNorm2d(7), 1),
        (nn.BatchNorm2d(1), 1),
        (nn.BatchNorm2d(2), 1),
        (nn.BatchNorm1d(64), 4),
        (nn.BatchNorm1d(1024), 32),
        (nn.BatchNorm1d(20), 1),
        (nn.BatchNorm1d(3), 1),
        (nn.SyncBatchNorm(64), 4),
    ],
)
def test_groups_are_the_most_that_fit(layer, groups):
    fixed = fix(layer)
    assert isinstance(fixed, nn.GroupNorm)
    assert (fixed.num_groups, fixed.num_channels) == (groups, layer.num_features)


def test_max_groups_is_a_bound():
    assert fix(nn.BatchNorm2d(64), max_groups=5).num_groups == 4
    with pytest.raises(ValueError, match="`max_groups` must be at least 1"):
        fix(nn.BatchNorm2d(64), max_groups=0)


def test_vectors_keep_more_than_signs():
    # Two values less their mean, over their scale, are 1 and -1 whatever they were.
    fixed = fix(nn.BatchNorm1d(64, affine=False))
    outputs = fixed(torch.randn(3, 64))
    assert len(torch.unique(outputs.round(decimals=3))) > 100


# What a layer brings along


def test_settings_of_the_layer_are_kept():
    layer = nn.BatchNorm2d(8, eps=0.25, dtype=torch.bfloat16).eval()
    layer.bias.requires_grad_(False)
    fixed = fix(layer)
    assert fixed.eps == 0.25
    assert not fixed.training
    assert fixed.weight.dtype == torch.bfloat16
    assert fixed.weight.requires_grad
    assert not fixed.bias.requires_grad


def test_a_layer_without_affine_stays_without():
    fixed = fix(nn.BatchNorm2d(8, affine=False))
    assert fixed.weight is None
    assert fixed.bias is None
    assert not fixed.affine


def test_a_shared_layer_stays_shared():
    norm = nn.BatchNorm2d(8)
    fixed = fix(nn.ModuleDict({"a": norm, "b": nn.Sequential(norm), "c": nn.BatchNorm2d(8)}))
    assert fixed["a"] is fixed["b"][0]
    assert fixed["a"] is not fixed["c"]


def test_tied_parameters_stay_tied():
    model = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8))
    model[1].weight = model[0].weight
    fixed = fix(model)
    assert fixed[0].weight is fixed[1].weight
    assert fixed[0].weight is not model[0].weight


def test_in_place_an_optimizer_stays_valid():
    model = make_mlp()
    parameters = list(model.parameters())
    assert fix(model, inplace=True) is model
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert isinstance(model[1], nn.GroupNorm)


def test_instance_norm_loses_its_statistics_alone():
    model = nn.Sequential(
        nn.InstanceNorm2d(4, eps=0.5, affine=True, track_running_stats=True), nn.Conv2d(4, 4, 1)
    )
    nn.init.normal_(model[0].weight)
    fixed = fix(model)
    assert isinstance(fixed[0], nn.InstanceNorm2d)
    assert not fixed[0].track_running_stats
    assert list(fixed.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    x = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(fixed(x), model(x))  # in training it never used them


def test_a_lazy_layer_is_replaced_once_it_has_a_shape():
    model = nn.Sequential(nn.Linear(4, 20), nn.LazyBatchNorm1d())
    with pytest.raises(NotImplementedError, match=r"LazyBatchNorm1d at `1`.*Run the model"):
        fix(model)
    model(torch.randn(3, 4))
    assert isinstance(fix(model)[1], nn.GroupNorm)


# What is refused


class WithActivation(nn.BatchNorm2d):
    def forward(self, x):
        return torch.relu(super().forward(x))


def hooked():
    layer = nn.BatchNorm2d(8)
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    return layer


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (WithActivation(8), "WithActivation at `1`, a class derived from torch's"),
        (hooked(), "BatchNorm2d at `1`, with hooks"),
        (nn.BatchNorm1d(2), "BatchNorm1d at `1`, with 2 features"),
        (nn.SyncBatchNorm(1), "SyncBatchNorm at `1`, with 1 features"),
        (nn.LazyInstanceNorm2d(track_running_stats=True), "LazyInstanceNorm2d at `1`"),
    ],
)
def test_what_has_no_replacement_is_refused_and_nothing_is_changed(layer, message):
    model = nn.Sequential(nn.BatchNorm2d(8), layer)
    with pytest.raises(NotImplementedError, match=message):
        fix(model, inplace=True)
    assert isinstance(model[0], nn.BatchNorm2d)
    assert model[1] is layer


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"`model` must be a torch\.nn\.Module, got dict"):
        fix({})


# Training


def test_a_fixed_model_trains():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    fixed = fix(model)
    optimizer = DPOptimizer(
        torch.optim.SGD(fixed.parameters(), lr=0.5),
        fixed,
        loss_fn=nn.CrossEntropyLoss(),
        l2_clip_norm=1.0,
        noise_multiplier=0.0,
        expected_batch_size=8,
        seed=0,
    )
    x = torch.randn(8, 4)
    losses = []
    for _ in range(15):
        losses.append(float(optimizer.backward(x, (x[:, 0] > x[:, 1]).long())))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(fixed[0].weight, model[0].weight)
