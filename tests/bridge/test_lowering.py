"""The mechanism: names, constants, stopped gradients, writes, and what is refused."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from dpbridge.lowering import Call, lower, register_lowering, supported_ops, table
from lowering_checks import (
    assert_model_matches,
    assert_same,
    compare,
    lower_function,
    normal,
    requirements,
    run_program,
)

BATCH = 3
aten = torch.ops.aten


class Net(nn.Module):
    """A module whose forward is the given function of itself and its input."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.function = function
        self.linear = nn.Linear(4, 4)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.function(self, x)


def net(**attributes):
    return lambda function: Net(function, **attributes)


def batch():
    return torch.randn(BATCH, 4), torch.randn(BATCH, 4)


def matches(function, **attributes):
    """Holds a model made of `function(self, x)` against torch."""
    model = Net(function, **attributes)
    assert_model_matches(model, F.mse_loss, batch())
    return model


# Names, constants and what is trainable


def test_parameters_have_the_names_of_the_model():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
    x, y = batch()
    program = lower(model, F.mse_loss, (x[:1], y[:1]), {})
    assert program.inputs == ("0.weight", "0.bias", "1.weight", "1.bias", None, None)
    assert not program.constants


def test_tied_parameter_has_one_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    _, gradients, _ = run_program(model, F.mse_loss, batch())
    assert gradients.keys() == {"0.weight", "0.bias", "1.bias"}
    assert_model_matches(model, F.mse_loss, batch())


def test_module_called_twice_equals_torch():
    matches(lambda self, x: self.linear(self.linear(x).tanh()))


def test_unused_parameter_has_zero_gradient():
    matches(lambda self, x: self.linear(x), other=nn.Linear(2, 2))


def test_frozen_parameter_has_no_gradient():
    model = Net(lambda self, x: self.linear(x))
    model.linear.weight.requires_grad_(False)
    assert_model_matches(model, F.mse_loss, batch())
    assert run_program(model, F.mse_loss, batch())[1].keys() == {"linear.bias"}


def test_buffers_and_tensors_of_all_origins_equal_torch():
    outside = torch.randn(4)
    model = Net(
        lambda self, x: (self.linear(x) + self.shift) * self.plain + outside + self.in_list[0],
        shift=nn.Buffer(torch.randn(4)),
        plain=torch.randn(4),
        in_list=[torch.randn(4)],
    )
    assert_model_matches(model, F.mse_loss, batch())


def test_constants_are_the_tensors_themselves():
    model = Net(lambda self, x: self.linear(x) + self.shift, shift=nn.Buffer(torch.randn(4)))
    x, y = batch()
    program = lower(model, nn.CrossEntropyLoss(weight=torch.ones(4)), (x[:1], y[:1].softmax(1)), {})
    assert program.constants.keys() == {"buffer shift", "buffer of the loss weight"}
    assert program.constants["buffer shift"].data_ptr() == model.shift.data_ptr()


def test_loss_may_use_parameters_of_the_model():
    model = Net(lambda self, x: self.linear(x))
    assert_model_matches(
        model, lambda out, y: F.mse_loss(out, y) + model.linear.weight.square().sum(), batch()
    )


def test_parameter_in_a_plain_list_is_refused():
    model = Net(lambda self, x: x @ self.weights[0])
    model.weights = [model.linear.weight]
    x, y = batch()
    with pytest.raises(NotImplementedError, match=r"nn\.ParameterList"):
        lower(model, F.mse_loss, (x[:1], y[:1]), {})


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_tensor_computed_from_a_parameter_beforehand_is_refused():
    model = Net(lambda self, x: x @ self.scaled)
    model.scaled = model.linear.weight * 2
    x, y = batch()
    with pytest.raises(NotImplementedError, match="`scaled` must be computed in forward"):
        lower(model, F.mse_loss, (x[:1], y[:1]), {})


def test_detached_parameter_as_an_attribute_is_a_constant():
    model = Net(lambda self, x: self.linear(x) @ self.copy)
    model.copy = model.linear.weight.detach()
    assert_model_matches(model, F.mse_loss, batch())


def test_buffers_of_model_and_loss_do_not_collide():
    model = Net(lambda self, x: self.linear(x) * self.loss_fn.shift)
    model.loss_fn = nn.Module()
    model.loss_fn.shift = nn.Buffer(torch.randn(4))
    loss_fn = Net(lambda self, x: x)
    loss_fn.shift = nn.Buffer(torch.randn(4))
    loss_fn.forward = lambda out, y: F.mse_loss(out + loss_fn.shift, y)
    assert_model_matches(model, loss_fn, batch())


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    "weight_norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm]
)
def test_weight_norm_equals_torch(weight_norm):
    layers = [weight_norm(nn.Linear(4, 4), dim=dim) for dim in (0, 1, None)]
    assert_model_matches(nn.Sequential(*layers), F.mse_loss, batch())


@pytest.mark.parametrize(
    "spectral_norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm]
)
def test_spectral_norm_is_refused(spectral_norm):
    with pytest.raises(NotImplementedError, match=r"has no lowering rule|must not carry data"):
        run_program(spectral_norm(nn.Linear(4, 4)), F.mse_loss, batch())


# Inputs


def test_nested_inputs_and_keywords_equal_torch():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, pair, named, *, scale, flag, mode=None):
            x = self.linear(pair[0]) * named["a"] + pair[1]
            assert mode is None
            return x * scale if flag else x

    def loss(output, target):
        return F.mse_loss(output, target["y"]) + target["z"].mean()

    args = (
        (torch.randn(BATCH, 4), torch.randn(BATCH, 4)),
        {"a": torch.randn(BATCH, 4)},
        {"z": torch.randn(BATCH, 2), "y": torch.randn(BATCH, 4)},
    )
    kwargs = {"scale": torch.randn(BATCH, 1), "flag": True, "mode": None}
    assert_model_matches(Nested(), loss, args, kwargs)


def test_static_leaf_becomes_part_of_the_program():
    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)

        def forward(self, x, *, negate):
            return -self.linear(x).sum() if negate else self.linear(x).sum()

    model, x = Switch(), torch.randn(BATCH, 4)
    plus, minus = (run_program(model, None, (x,), {"negate": n})[0] for n in (False, True))
    np.testing.assert_allclose(plus, -minus)


def test_model_that_returns_its_loss_equals_torch():
    assert_model_matches(Net(lambda self, x: self.linear(x).square().mean()), None, batch()[:1])


def test_model_whose_output_has_a_loss_equals_torch():
    class Output(dict):
        loss = property(lambda self: self["loss"])

    model = Net(lambda self, x: Output(loss=self.linear(x).square().mean(), logits=x))
    assert_model_matches(model, None, batch()[:1])


def test_leaves_come_in_the_order_of_the_tree():
    class Two(nn.Module):
        def forward(self, named):
            return (named["b"] - 10 * named["a"]).sum()

    example = {"b": torch.ones(1), "a": torch.full((1,), 2.0)}
    program = lower(Two(), None, (example,), {})
    (loss,), _ = program({}, jax.random.key(0), jnp.array(False), jnp.full(1, 2.0), jnp.ones(1))
    assert loss == -19


# Where gradients stop


def test_no_grad_stops_gradients():
    def forward(self, x):
        with torch.no_grad():
            scale = self.linear(x).exp()
            scale = scale / scale.sum()
        return self.linear(x) * scale

    matches(forward)


def test_writes_into_tensors_of_no_grad_equal_torch():
    def forward(self, x):
        with torch.no_grad():
            scale = x * 2
            scale[:, 0] = 1.0
            scale.add_(1)
        scale.mul_(self.linear(x))
        return scale

    matches(forward)


def test_enable_grad_within_no_grad_equals_torch():
    def forward(self, x):
        with torch.no_grad():
            a = self.linear(x)
            with torch.enable_grad():
                b = self.linear(x) * a
            c = b * 3
        return a + b + c

    matches(forward)


def test_detach_stops_gradients():
    matches(lambda self, x: self.linear(x) * self.linear(x).detach())


def test_detach_in_place_stops_gradients():
    matches(lambda self, x: self.linear(x) + self.linear(x).exp().detach_())


def test_write_into_a_detached_tensor_is_refused():
    expect_refusal(lambda self, x: self.linear(x).detach().mul_(2), "was detached from")


def test_write_under_no_grad_into_a_tensor_with_gradient_is_refused():
    def forward(self, x):
        y = self.linear(x)
        with torch.no_grad():
            y.mul_(2)
        return y

    expect_refusal(forward, r"outside `torch.no_grad\(\)`")


def test_view_made_under_no_grad_is_not_written_to():
    def forward(self, x):
        y = x * 1
        with torch.no_grad():
            first = y[:, 0]
        first.zero_()
        return self.linear(y)

    expect_refusal(forward, r"outside `torch.no_grad\(\)`")


def test_checkpoint_equals_torch():
    def forward(self, x):
        h = self.linear(x)
        return checkpoint(lambda h: self.linear(h).relu_(), h, use_reentrant=False)

    matches(forward)


# Views and writes


def test_write_through_views_equals_torch():
    def forward(self, x):
        y = self.linear(x)
        y[:, 0] = 0.0
        y[:, 1:3] *= 2
        y.view(2, 2)[1] += y[0, 0] + 1
        y.t()[3].copy_(x[:, 1])
        return y

    matches(forward)


def test_reader_of_a_view_sees_a_later_write():
    def forward(self, x):
        y = self.linear(x)
        head = y[:, :2]
        y.mul_(3)
        return torch.cat([head, y[:, 2:].exp_()], 1) + y

    matches(forward)


def test_parts_are_views():
    def forward(self, x):
        y = x * 1
        left, right = y.split(2, 1)
        left.mul_(2)
        right.unbind(1)[0].add_(1)
        return self.linear(y)

    matches(forward)


def test_copies_are_not_views():
    def forward(self, x):
        y = self.linear(x)
        kept = [y.clone(), y.t().reshape(-1), y.t().contiguous(), y.to(torch.float64), y[[0]]]
        y.zero_()
        return y + sum(each.sum() for each in kept).float()

    matches(forward)


def test_cast_to_its_own_type_is_a_view():
    def forward(self, x):
        y = self.linear(x)
        y.float().mul_(2)
        y.contiguous().add_(1)
        y.reshape(-1)[1:].exp_()
        return y

    matches(forward)


def test_change_of_shape_in_place_equals_torch():
    def forward(self, x):
        y = self.linear(x)
        first = y[:, 0]
        y.unsqueeze_(0).transpose_(1, 2)
        y[0, 1] = 5.0
        y.squeeze_(0).t_()
        first.mul_(2)
        return y * first

    matches(forward)


def test_write_of_a_tensor_made_in_forward_equals_torch():
    def forward(self, x):
        table = torch.tensor([1.0, 2.0, 3.0, 4.0])
        table[1] = self.linear(x).sum()
        out = torch.zeros(1, 4)
        out[:, 1:] = self.linear(x)[:, 1:]
        return table * x + out

    matches(forward)


def test_write_into_the_input_equals_torch():
    def forward(self, x):
        x += 1
        return self.linear(x)

    matches(forward)


def test_write_where_results_share_memory_is_refused():
    def forward(self, x):
        y = self.linear(x)
        z = torch.einsum("ij->ji", y)
        y.mul_(2)
        return z.t()

    expect_refusal(forward, "another tensor shares")


VIEWS = {
    "row": lambda x: x[1],
    "slice": lambda x: x[..., 1:],
    "stride": lambda x: x[::2],
    "flat": lambda x: x.reshape(-1),
    "transpose": lambda x: x.transpose(0, -1),
    "half": lambda x: x.narrow(-1, 0, x.shape[-1] // 2),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "diagonal": lambda x: x.diagonal() if x.ndim > 1 else x,
}
WRITES = {
    "mul": lambda x: x.mul_(1.5),
    "add": lambda x: x.add_(x.sum() * 0.1),
    "zero": lambda x: x.zero_(),
    "sin": lambda x: x.sin_(),
    "fill": lambda x: x.fill_(0.3),
    "copy": lambda x: x.copy_(x.flip(0) * 2),
    "mask": lambda x: x.masked_fill_(x > 0, 0.5),
    "assign": lambda x: x.__setitem__(0, 0.7),
}
STEPS = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from([*VIEWS, *WRITES])), min_size=1, max_size=8
)


def play(steps, x):
    """Applies views and writes to tensors chosen among all made so far; returns all of them."""
    tensors = [x * 1]
    for which, name in steps:
        target = tensors[which % len(tensors)]
        if name in VIEWS and target.ndim and target.shape[0] > 1:
            tensors.append(VIEWS[name](target))
        elif name in WRITES and target.ndim and target.numel():
            WRITES[name](target)
    return tensors


@settings(max_examples=6)
@given(sequences=st.lists(STEPS, min_size=4, max_size=4))
def test_random_views_and_writes_equal_torch(sequences):
    cases = {str(steps): (functools.partial(play, steps), normal(3, 4)) for steps in sequences}
    for pairs in compare(cases).values():
        assert_same(pairs)


# What is refused, and how it is said


def expect_refusal(forward, text, **attributes):
    with pytest.raises(NotImplementedError, match=text):
        run_program(Net(forward, **attributes), F.mse_loss, batch())


def test_op_without_a_rule_names_itself_and_the_line():
    class Special(nn.Module):
        def forward(self, x):
            return torch.special.airy_ai(x)

    with pytest.raises(NotImplementedError) as error:
        run_program(Special(), F.mse_loss, batch())
    text = str(error.value)
    assert text.startswith("`aten.special_airy_ai.default` at ")
    assert "test_lowering.py" in text
    assert "return torch.special.airy_ai(x)" in text
    assert "dpbridge.register_lowering" in text


def test_write_into_a_buffer_is_refused():
    def forward(self, x):
        self.count += 1
        return self.linear(x)

    expect_refusal(forward, r"writes into `buffer count`", count=nn.Buffer(torch.zeros(())))


def test_assignment_to_a_buffer_is_refused():
    def forward(self, x):
        self.count = self.count + 1
        return self.linear(x)

    expect_refusal(forward, "`count` must not carry data", count=nn.Buffer(torch.zeros(())))


def test_attribute_that_forward_reads_and_rewrites_is_refused():
    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.linear(x) - self.mean

    expect_refusal(forward, "`mean` must not carry data", mean=torch.zeros(4))


def test_attribute_that_forward_only_writes_is_let_pass_and_restored():
    def forward(self, x):
        self.new, self.old = self.linear(x), x
        return self.new

    old = torch.zeros(4)
    model = Net(forward, old=old)
    run_program(model, F.mse_loss, batch())
    assert model.old is old
    assert not hasattr(model, "new")


def test_batch_norm_in_training_is_refused():
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4))
    with pytest.raises(NotImplementedError, match=r"writes into `buffer 1\.num"):
        run_program(model, F.mse_loss, (torch.randn(BATCH, 4, 2), torch.randn(BATCH, 4, 2)))


def test_hook_on_a_gradient_is_refused():
    on_module, on_parameter = Net(lambda self, x: x), Net(lambda self, x: x)
    on_module.linear.register_full_backward_hook(lambda *args: None)
    on_parameter.linear.weight.register_hook(lambda gradient: gradient * 2)
    for model, name in ((on_module, "`linear`"), (on_parameter, "`linear.weight`")):
        with pytest.raises(NotImplementedError, match=f"{name} must have no backward hook"):
            run_program(model, F.mse_loss, batch())


def test_hook_on_a_tensor_is_refused():
    def forward(self, x):
        y = self.linear(x)
        y.register_hook(lambda gradient: gradient * 2)
        return y

    expect_refusal(forward, "must not register hooks on tensors")


def test_branch_on_data_is_refused():
    expect_refusal(
        lambda self, x: x if x.sum() > 0 else self.linear(x), "must not branch on values"
    )


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.linear(x) + self.linear(x)[x > 0].sum(),
        lambda self, x: self.linear(x) + self.linear(x).masked_select(x > 0).sum(),
        lambda self, x: self.linear(x) + x.nonzero().sum(),
    ],
)
def test_shape_that_depends_on_data_is_refused(forward):
    expect_refusal(forward, "depends on the data")


def test_number_read_from_a_tensor_is_refused():
    expect_refusal(lambda self, x: self.linear(x) * x.sum().item(), "Compute with the tensor")


def test_autocast_that_is_off_equals_torch():
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.linear(x)

    matches(forward)


def test_module_that_is_scripted_is_refused():
    with pytest.warns(DeprecationWarning, match="script"):
        scripted = torch.jit.script(nn.Linear(4, 4))
    with pytest.raises(NotImplementedError, match=r"`1` must be a module in Python"):
        run_program(nn.Sequential(nn.Linear(4, 4), scripted), F.mse_loss, batch())


def test_op_that_keeps_what_has_a_shape_of_data_is_refused_by_name():
    def loss(output, y):
        return F.ctc_loss(output[:, None].log_softmax(-1), y, torch.tensor([1]), torch.tensor([1]))

    with pytest.raises(NotImplementedError, match=r"`aten\._ctc_loss\.Tensor` is not supported"):
        run_program(nn.Linear(4, 4), loss, (torch.randn(BATCH, 4), torch.ones(BATCH, 1).long()))


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (lambda out, y: out - y, r"torch.float32 of shape \(1, 4\)"),
        (lambda out, y: (out > y).sum(), r"torch.int64 of shape \(\)"),
        (lambda out, y: 3.0, "3.0"),
        (lambda out, y: (out.sum(), y.sum()), r"shape \(\), torch.float32 of shape \(\)"),
    ],
)
def test_loss_that_is_no_scalar_is_an_error(loss, got):
    x, y = batch()
    with pytest.raises(ValueError, match=f"one floating-point scalar for one example, got.*{got}"):
        lower(Net(lambda self, x: self.linear(x)), loss, (x[:1], y[:1]), {})


def test_error_of_the_model_itself_is_kept():
    x, y = batch()
    with pytest.raises(RuntimeError, match="same reduction dim") as error:
        lower(nn.Linear(3, 2), F.mse_loss, (x[:1], y[:1]), {})
    assert "one example" in error.value.__notes__[0]


# The table


@pytest.fixture
def forget_rules():
    before = dict(table._ENTRIES)
    yield
    table._ENTRIES.clear()
    table._ENTRIES.update(before)


@pytest.mark.usefixtures("forget_rules")
def test_registered_rule_is_used():
    @register_lowering(aten.special_bessel_j0.default)
    def rule(call: Call, x):
        assert call.shape == (1, 4)
        assert call.dtype == jnp.float32
        return x * 0 + 7

    losses, _, _ = run_program(
        Net(lambda self, x: torch.special.bessel_j0(x).sum()), None, batch()[:1]
    )
    np.testing.assert_array_equal(losses, [28.0] * BATCH)


@pytest.mark.usefixtures("forget_rules")
def test_rule_with_a_wrong_shape_is_an_error():
    register_lowering(aten.special_bessel_j0.default)(lambda call, x: x[:, :2])
    with pytest.raises(RuntimeError, match=r"special_bessel_j0.*shape \(1, 4\), got \(1, 2\)"):
        run_program(Net(lambda self, x: torch.special.bessel_j0(x)), F.mse_loss, batch())


@pytest.mark.usefixtures("forget_rules")
def test_result_is_cast_to_the_dtype_of_torch():
    register_lowering(aten.special_bessel_j0.default)(lambda call, x: x.astype(jnp.float64))
    lowered = lower_function(torch.special.bessel_j0, [torch.ones(2)])
    with jax.enable_x64(True):
        assert lowered(jnp.ones(2, jnp.float32))[0].dtype == jnp.float32


def test_rule_is_registered_once():
    with pytest.raises(ValueError, match=r"`aten.relu.default` has a lowering rule already"):
        register_lowering(aten.relu.default)(lambda call, x: x)


def test_rules_take_all_arguments_of_their_ops():
    wrong = []
    for op, entry in table._ENTRIES.items():
        positional = [object()] * sum(not a.kwarg_only for a in op._schema.arguments)
        named = {a.name: None for a in op._schema.arguments if a.kwarg_only}
        try:
            inspect.signature(entry.rule).bind(None, *positional, **named)
        except TypeError as error:
            wrong.append(f"{op}: {error}")
    assert not wrong


def test_supported_ops_are_sorted_names():
    ops = supported_ops()
    assert "aten.linear.default" in ops
    assert list(ops) == sorted(ops)


def test_checks_name_the_op():
    (held,) = requirements(F.embedding, torch.tensor([5]), torch.ones(3, 2))
    assert not held[0]
    assert held[1].startswith("token ids must be in [0, 3) (aten.embedding.default")
