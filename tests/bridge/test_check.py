"""`check`: everything that training would refuse, at once, and nothing changed by looking."""

import copy
import dataclasses
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from dpbridge import DPOptimizer
from dpbridge.check import check
from dpbridge.findings import Finding, Report
from dpbridge.lowering import table

MSE = nn.MSELoss()


def make_batch(features=4, targets=4, size=6):
    return torch.randn(size, features), torch.randn(size, targets)


def found(report, *, blocks=True):
    return [(f.what, f.where) for f in report.findings if f.blocks == blocks]


def check_layer(model, loss_fn=MSE, **options):
    return check(model, *make_batch(), loss_fn=loss_fn, **options)


class Forward(nn.Module):
    """A linear layer and then what the test is about."""

    def __init__(self, then, **held):
        super().__init__()
        self.linear, self.then = nn.Linear(4, 4), then
        for name, value in held.items():
            if isinstance(value, nn.Module):
                self.add_module(name, value)
            else:
                self.register_buffer(name, value)

    def forward(self, x):
        return self.then(self, self.linear(x))


# Layers


def test_a_model_that_works_is_ok():
    report = check_layer(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4)))
    assert report.ok
    assert report.gradients_agree is True
    assert report.findings == ()
    report.raise_if_not_ok()


def test_every_batch_norm_is_named_with_its_replacement():
    block = nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64), nn.Linear(64, 4))
    report = check_layer(nn.Sequential(block, nn.BatchNorm1d(4).eval()))
    assert found(report) == [("BatchNorm1d", "0.1"), ("BatchNorm1d", "1")]
    assert not report.ok
    assert report.findings[0].replacement == "nn.GroupNorm(4, 64), or dpbridge.fix(model)"
    assert report.findings[1].replacement == "nn.GroupNorm(1, 4), or dpbridge.fix(model)"


def test_a_batch_norm_without_replacement_says_why():
    report = check_layer(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2), nn.Linear(2, 4)))
    assert found(report) == [("BatchNorm1d", "1")]
    assert "by hand: `model` must have layers" in report.findings[0].replacement
    assert found(report, blocks=False) == [("all that follows", "")]


def test_a_model_that_is_a_batch_norm_is_named():
    assert found(check_layer(nn.BatchNorm1d(4))) == [("BatchNorm1d", "model")]


def test_instance_norm_with_running_statistics_is_found():
    model = nn.Sequential(
        nn.Unflatten(1, (2, 2)),
        nn.InstanceNorm1d(2, affine=True, track_running_stats=True),
        nn.Flatten(),
    )
    report = check_layer(model)
    assert found(report) == [("InstanceNorm1d", "1")]
    assert report.findings[0].replacement == "track_running_stats=False, or dpbridge.fix(model)"


def test_what_check_says_of_batch_norm_is_what_the_optimizer_says():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(NotImplementedError, match=r"BatchNorm1d at `1`"):
        DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            model,
            loss_fn=MSE,
            l2_clip_norm=1.0,
            noise_multiplier=1.0,
            expected_batch_size=6,
        )
    assert found(check_layer(model)) == [("BatchNorm1d", "1")]


def test_a_wrapper_is_found_and_its_inside_looked_at():
    report = check_layer(nn.DataParallel(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))))
    assert found(report) == [("DataParallel", "model"), ("BatchNorm1d", "module.1")]
    assert report.findings[0].replacement == "The module inside it, .module"


def test_backward_hooks_are_all_found():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].register_full_backward_hook(lambda *_: None)
    model[1].weight.register_hook(lambda grad: 2 * grad)
    report = check_layer(model)
    assert found(report) == [("backward hook", "0"), ("backward hook", "1.weight")]


def test_frozen_parameters_are_a_note():
    model = nn.Linear(4, 4)
    model.bias.requires_grad_(False)
    report = check_layer(model)
    assert report.ok
    assert found(report, blocks=False) == [("frozen parameters", "bias")]
    assert report.findings[0].why.startswith("1 of 2 require no gradient")


def test_parameters_that_cannot_be_trained_are_found():
    assert found(check_layer(nn.Linear(4, 4).requires_grad_(False))) == [("parameters", "model")]
    assert found(check_layer(nn.Tanh())) == [("parameters", "model")]
    norm = nn.LazyInstanceNorm1d(affine=False, track_running_stats=False)
    lazy = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4), norm)
    assert found(check_layer(lazy)) == [("lazy layers", "1, 2")]
    several = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    assert found(check_layer(several)) == [("devices", "0.bias (cpu), 1.bias (meta)")]


def test_inference_mode_is_found():
    layer = nn.Linear(4, 4)
    with torch.inference_mode():
        report = check_layer(layer)
    assert found(report) == [("torch.inference_mode", "")]


# State


def counting(module, x):
    module.count.add_(1)
    return x


def rolling(module, x):
    module.mean = 0.9 * module.mean + 0.1 * x.mean()
    return x + module.mean


def test_every_buffer_that_forward_writes_to_is_found():
    first = Forward(counting, count=torch.zeros(()))
    # What is written need not differ from what was there.
    second = Forward(lambda module, x: x + module.zero.zero_(), zero=torch.zeros(()))
    report = check_layer(nn.Sequential(first, second, nn.BatchNorm1d(4)))
    assert found(report) == [
        ("BatchNorm1d", "2"),
        ("state of Forward", "0.count"),
        ("state of Forward", "1.zero"),
    ]


def test_a_buffer_that_forward_replaces_is_found():
    report = check_layer(Forward(rolling, mean=torch.zeros(())))
    ((what, _),) = found(report)
    assert what == "forward"
    assert report.findings[0].why.startswith("`mean` must not carry data")


def test_an_embedding_that_renormalises_itself_is_found():
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=0.5))
    before = model[0].weight.detach().clone()
    report = check(model, torch.arange(6), torch.randn(6, 4), loss_fn=MSE)
    assert ("state of Embedding", "0.weight") in found(report)
    assert torch.equal(model[0].weight, before)


# Ops


class Many(nn.Linear):
    def forward(self, x):
        x = torch.special.bessel_j0(super().forward(x))
        x = torch.special.bessel_j1(x)
        x = torch.special.bessel_j0(x)
        with torch.no_grad():
            inside = torch.special.airy_ai(x)
        return x + inside


def test_every_op_without_a_rule_is_found_once_with_its_line():
    report = check_layer(Many(4, 4))
    assert [what for what, _ in found(report)] == [
        "aten.special_bessel_j0.default",
        "aten.special_bessel_j1.default",
        "aten.special_airy_ai.default",
    ]
    first, second, third = report.findings
    assert first.where.endswith("`x = torch.special.bessel_j0(super().forward(x))` (and 1 more)")
    assert second.where.endswith("`x = torch.special.bessel_j1(x)`")
    assert "test_check.py:" in third.where
    assert third.why == "has no lowering rule"
    assert "register_lowering" in third.replacement


def test_ops_behind_a_loss_that_is_no_scalar_are_found():
    model = Forward(lambda module, x: torch.special.bessel_j0(x))
    report = check_layer(model, loss_fn=nn.MSELoss(reduction="none"))
    assert [what for what, _ in found(report)] == ["loss", "aten.special_bessel_j0.default"]
    assert "torch.float32 of shape (1, 4)" in report.findings[0].why


@pytest.mark.parametrize(
    "loss_fn", [lambda output, y: None, lambda output, y: (output.sum(), y.sum()), None]
)
def test_what_is_no_loss_is_found(loss_fn):
    args = make_batch() if loss_fn else make_batch()[:1]
    report = check(nn.Linear(4, 4), *args, loss_fn=loss_fn)
    assert [what for what, _ in found(report)] == ["loss"]


def test_a_use_of_an_op_that_its_rule_refuses_is_found():
    # One refused by its arguments, one by the batch norm's own rule.
    def forward(module, x):
        return functional.batch_norm(x[:, :, None].expand(-1, -1, 2), None, None, training=True)

    report = check_layer(
        Forward(lambda module, x: forward(module, x).mean(-1)), loss_fn=nn.L1Loss()
    )
    assert [what for what, _ in found(report)] == ["aten.batch_norm.default"]
    assert report.findings[0].why.endswith("batch normalisation mixes examples")
    assert report.findings[0].replacement == "Use nn.GroupNorm."


def test_a_batch_norm_of_weights_is_no_finding_beside_one_of_examples():
    def norm(x):
        return functional.batch_norm(x[None], None, None, training=True)[0]

    def forward(module, x):
        with torch.no_grad():
            scale = norm(module.linear.weight).mean()
        y = x @ norm(module.linear.weight) * scale
        return torch.special.bessel_j0(y) + norm(y.expand(4, -1)).mean()

    report = check_layer(Forward(forward))
    assert [what for what, _ in found(report)] == [
        "aten.special_bessel_j0.default",
        "aten.batch_norm.default",
    ]
    assert "norm(y" in report.findings[1].where or "in norm" in report.findings[1].where


def test_a_shape_that_depends_on_data_is_found_and_what_is_behind_it():
    def forward(module, x):
        return x[x > 0].sum() + torch.special.bessel_j0(x)

    kinds = [what for what, _ in found(check_layer(Forward(forward)))]
    assert "aten.special_bessel_j0.default" in kinds
    assert len(kinds) == 2


def test_a_branch_on_data_is_found_at_its_line():
    def forward(module, x):
        return x if x.sum() > 0 else -x

    report = check_layer(Forward(forward))
    ((what, where),) = found(report)
    assert what == "forward"
    assert where.endswith("`return x if x.sum() > 0 else -x`")
    assert report.findings[0].replacement.startswith("Use torch.where")
    assert found(report, blocks=False) == [("all that follows", "")]


def test_a_packed_sequence_is_found_at_its_line():
    def forward(module, x):
        lengths = torch.full((len(x),), 2)
        packed = nn.utils.rnn.pack_padded_sequence(x[..., None], lengths, batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(module.lstm(packed)[0], batch_first=True)[0].sum(1)

    model = Forward(forward, lstm=nn.LSTM(1, 4, batch_first=True))
    report = check_layer(model)
    ((what, where),) = found(report)
    assert what == "forward"
    assert "pack_padded_sequence(" in where
    assert "must not pack sequences" in report.findings[0].why


# One example and the batch


def test_a_model_that_needs_the_whole_batch_is_found():
    report = check_layer(Forward(lambda module, x: x.view(6, 4)))
    ((what, where),) = found(report)
    assert what == "forward"
    assert where.endswith("x.view(6, 4)))`")
    assert "not on one example" in report.findings[0].why


def test_a_model_that_needs_what_the_replaced_layer_has_is_found():
    norm = nn.BatchNorm1d(4)
    report = check_layer(Forward(lambda module, x: module.norm(x) + module.norm.eps, norm=norm))
    assert found(report) == [("BatchNorm1d", "norm")]
    scaled = Forward(lambda module, x: module.norm(x) * module.norm.running_var, norm=norm)
    report = check_layer(scaled)
    assert [what for what, _ in found(report)] == ["BatchNorm1d", "forward"]
    assert "running_var" in report.findings[1].why


def test_a_model_that_runs_on_one_example_alone_is_ok_with_a_note():
    report = check_layer(Forward(lambda module, x: x.view(1, 4)))
    assert report.ok
    assert found(report, blocks=False)[0][0] == "forward"
    assert "not on two" in report.findings[0].why


def test_what_fails_in_torch_too_is_raised():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        check(nn.Linear(5, 4), *make_batch(), loss_fn=MSE)


def test_examples_that_influence_each_other_are_a_note():
    report = check_layer(Forward(lambda module, x: 3 * (x - x.mean(0))))
    assert report.ok
    assert found(report, blocks=False) == [("loss of a batch", "")]


def test_a_loss_that_is_a_sum_is_no_note():
    assert check_layer(nn.Linear(4, 4), loss_fn=nn.MSELoss(reduction="sum")).findings == ()


def test_a_label_out_of_range_is_found():
    x, _ = make_batch()
    report = check(nn.Linear(4, 3), x, torch.tensor([0, 1, 2, 3, 0, 1]), loss_fn=nn.NLLLoss())
    assert [what for what, _ in found(report)] == ["batch"]
    assert "[0, 3)" in report.findings[0].why
    assert report.gradients_agree is None


# Gradients


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_gradients_that_differ_are_found():
    report = check_layer(Forward(lambda module, x: Doubled.apply(x)))
    assert report.gradients_agree is False
    assert not report.ok
    assert "gradient of `linear.bias` must agree" in report.findings[0].why


def test_a_wrong_rule_is_found(monkeypatch):
    op = torch.ops.aten.mish.default
    monkeypatch.setitem(table._ENTRIES, op, table.Entry(lambda call, x: 2 * x))
    report = check_layer(Forward(lambda module, x: functional.mish(x)))
    assert report.gradients_agree is False


# Nothing is changed


class Busy(nn.Module):
    """Changes whatever it can when it runs."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.calls, self.seen, self.nested = 0, [], {"calls": {"all": 0}}
        self.register_buffer("count", torch.zeros(()))
        self.plain = torch.zeros(3)

    def forward(self, x):
        self.calls += 1
        self.seen.append(len(x))
        self.nested["calls"]["all"] += 1
        self.count.add_(random.random() + np.random.rand())
        self.plain = self.plain + torch.rand(3)
        self.linear.eval()
        self.last = self.norm(self.linear(x.add_(1)))
        with torch.no_grad():
            self.linear.weight.mul_(0.5)
        return self.last


def state_of(model):
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    own = {name: value for name, value in vars(model).items() if name in ("calls", "training")}
    modes = [module.training for module in model.modules()]
    return tensors, own, modes, [id(p) for p in model.parameters()], repr(model)


@pytest.mark.parametrize("mode", [True, False])
def test_model_batch_and_random_numbers_are_as_they_were(mode):
    model = Busy().train(mode)
    model.linear.weight.grad = torch.ones(4, 4)
    plain, (x, y) = model.plain, make_batch()
    before, batch = state_of(model), (x.clone(), y.clone())
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    report = check(model, x, y, loss_fn=MSE)
    kinds = found(report)
    assert ("state of Busy", "count") in kinds
    assert ("state of Linear", "linear.weight") in kinds
    tensors, *rest = state_of(model)
    assert rest == list(before[1:])
    assert tensors.keys() == before[0].keys()
    assert all(torch.equal(tensors[name], value) for name, value in before[0].items())
    assert (model.seen, model.nested) == ([], {"calls": {"all": 0}})
    assert model.plain is plain
    assert not hasattr(model, "last")
    assert torch.equal(model.linear.weight.grad, torch.ones(4, 4))
    assert model.linear.bias.grad is None
    assert (torch.equal(x, batch[0]), torch.equal(y, batch[1])) == (True, True)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_a_model_that_fails_is_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(5, 4))
    before = copy.deepcopy(model.state_dict())
    assert [what for what, _ in found(check_layer(model))] == ["BatchNorm1d", "forward"]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        check_layer(model[2])
    assert isinstance(model[1], nn.BatchNorm1d)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_that_keeps_its_last_output_is_ok():
    class Keeps(nn.Linear):
        def forward(self, x):
            self.last = super().forward(x)
            return self.last

    model = Keeps(4, 4)
    assert check_layer(model).ok
    assert not hasattr(model, "last")


def test_training_after_a_check_releases_what_it_would_have():
    model = nn.Linear(4, 4)
    batch = make_batch()
    released = []
    for is_checked in (False, True):
        own = copy.deepcopy(model)
        if is_checked:
            assert check(own, *batch, loss_fn=MSE).ok
        optimizer = DPOptimizer(
            torch.optim.SGD(own.parameters(), lr=0.5),
            own,
            loss_fn=MSE,
            l2_clip_norm=1.0,
            noise_multiplier=1.0,
            expected_batch_size=6,
            seed=3,
        )
        optimizer.backward(*batch)
        optimizer.step()
        released.append(own.state_dict())
    assert all(torch.equal(released[0][name], released[1][name]) for name in released[0])


# Arguments


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        (({},), {}, TypeError, "`model` must be a torch.nn.Module, got dict"),
        ((nn.Linear(4, 4),), {"loss_fn": 3}, TypeError, "`loss_fn` must be callable, got 3"),
        ((nn.Linear(4, 4),), {"loss_fn": MSE}, TypeError, "must be given the target last"),
        ((nn.Linear(4, 4),), {}, ValueError, "at least one tensor"),
        ((nn.Linear(4, 4), torch.ones(0, 4)), {}, ValueError, "must hold examples to check"),
        ((nn.Linear(4, 4), 3), {}, TypeError, "got int"),
    ],
)
def test_wrong_arguments_are_refused(args, options, error, message):
    with pytest.raises(error, match=message):
        check(*args, **options)


def test_keywords_reach_the_model_that_returns_its_loss():
    class Losing(nn.Linear):
        def forward(self, x, *, labels, is_odd):
            error = super().forward(x) - labels
            return (torch.special.bessel_j0(error) if is_odd else error.abs()).mean()

    x, y = make_batch()
    report = check(Losing(4, 4), x, labels=y, is_odd=True)
    assert [what for what, _ in found(report)] == ["aten.special_bessel_j0.default"]


# The report


def test_report_prints_an_aligned_table():
    findings = (
        Finding("BatchNorm1d", "0.1", "It mixes " + "many " * 20, "GroupNorm"),
        Finding("frozen parameters", "2.weight", "Frozen", "None.", blocks=False),
    )
    lines = str(Report(findings)).splitlines()
    columns = {lines[0].index(name) for name in ("what", "where", "why", "replacement")}
    for line in lines[:-2]:
        assert all(column >= len(line) or line[column - 1] == " " for column in columns)
    assert lines[1].split()[:3] == ["refused", "BatchNorm1d", "0.1"]
    assert "note     frozen parameters" in str(Report(findings))
    assert lines[-1] == "Gradients were not compared."


def test_report_raises_its_table():
    report = check_layer(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    with pytest.raises(NotImplementedError, match=r"`model` must be one(.|\n)*BatchNorm1d +1 "):
        report.raise_if_not_ok()


def test_report_is_not_ok_without_a_comparison():
    assert not Report(()).ok
    assert not Report((), gradients_agree=False).ok
    assert Report((), gradients_agree=True).ok


def test_findings_are_frozen():
    finding = Finding("a", "b", "c", "d")
    with pytest.raises(dataclasses.FrozenInstanceError):
        finding.what = "e"
