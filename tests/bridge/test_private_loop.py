"""The unchanged loop: what `make_private` makes of a model, an optimizer and a loader."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import dpbridge
from dpbridge import make_private, make_public
from dpkernels.execution_plan import DPSGDConfig

N, BATCH = 60, 12


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def make_data(classes=3):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(N, 5, generator=generator)
    return TensorDataset(x * torch.linspace(0.1, 4, N)[:, None], torch.arange(N) % classes)


def privately(model, *, lr=1.0, data=None, batch_size=BATCH, **options):
    """`make_private` without noise, unless told otherwise, on seeded draws."""
    data = data or make_data()
    options = {
        "noise_multiplier": 0.0,
        "epochs": 4,
        "l2_clip_norm": 0.5,
        "self_check": False,
    } | options
    if "plan" in options or "config" in options:
        for name in ("noise_multiplier", "epochs", "l2_clip_norm"):
            del options[name]
    loader = DataLoader(
        data, batch_size=batch_size, generator=torch.Generator().manual_seed(3), shuffle=True
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return make_private(model, optimizer, loader, seed=1, **options)


def clipped_mean(model, losses_of, rows, *, clip=0.5, divide_by=BATCH):
    """A float64 loop over single examples: the oracle."""
    wide = copy.deepcopy(model).double()
    total = {name: torch.zeros_like(p) for name, p in wide.named_parameters()}
    for row in rows:
        loss = losses_of(
            wide, *[leaf.double() if leaf.is_floating_point() else leaf for leaf in row]
        )
        grads = torch.autograd.grad(loss, list(wide.parameters()), allow_unused=True)
        grads = [
            torch.zeros_like(p) if g is None else g
            for g, p in zip(grads, wide.parameters(), strict=True)
        ]
        norm = torch.stack([g.norm() for g in grads]).norm()
        for name, grad in zip(total, grads, strict=True):
            total[name] += grad * min(1.0, clip / float(norm)) if norm else grad
    return {name: value / divide_by for name, value in total.items()}


def assert_grads(model, expected, rtol=1e-5):
    for name, parameter in model.named_parameters():
        scale = float(expected[name].norm())
        error = (parameter.grad.double() - expected[name]).norm()
        assert error <= rtol * max(scale, 1e-6), name


def rows_of(*tensors):
    return [tuple(tensor[i : i + 1] for tensor in tensors) for i in range(len(tensors[0]))]


def cross_entropy_of(model, x, y):
    return F.cross_entropy(model(x), y)


def test_loop_gives_the_clipped_mean_of_each_example_by_itself():
    model, optimizer, loader = privately(make_model())
    for x, y in loader:
        optimizer.zero_grad()
        expected = clipped_mean(make_public_copy(model), cross_entropy_of, rows_of(x, y))
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert_grads(model, expected)


def make_public_copy(model):
    return copy.deepcopy(model)


def test_loop_releases_what_optimizer_backward_does_noise_included():
    grads = []
    for is_unchanged in (False, True):
        model, optimizer, loader = privately(
            make_model(), noise_multiplier=1.0, loss_fn=nn.CrossEntropyLoss()
        )
        x, y = next(iter(loader))
        if is_unchanged:
            F.cross_entropy(model(x), y).backward()
        else:
            optimizer.backward(x, y)
        optimizer.step()
        grads.append([p.grad for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_loss_is_torchs():
    model, _, loader = privately(make_model())
    x, y = next(iter(loader))
    plain = copy.deepcopy(model)
    torch.testing.assert_close(F.cross_entropy(model(x), y), F.cross_entropy(plain(x), y))


def test_grad_of_a_sum_has_the_scale_of_a_sum():
    model, optimizer, loader = privately(make_model(), loss_reduction="sum")
    x, y = next(iter(loader))
    expected = clipped_mean(copy.deepcopy(model), cross_entropy_of, rows_of(x, y), divide_by=1)
    F.cross_entropy(model(x), y, reduction="sum").backward()
    optimizer.step()
    assert_grads(model, expected)


def test_two_forwards_of_a_batch_are_one_gradient_of_each_example():
    def loss_of(model, x, y):
        return F.cross_entropy(model(x) - 0.5 * model(-x).tanh(), y)

    model, optimizer, loader = privately(make_model())
    x, y = next(iter(loader))
    expected = clipped_mean(copy.deepcopy(model), loss_of, rows_of(x, y))
    loss_of(model, x, y).backward()
    optimizer.step()
    assert_grads(model, expected)


def test_outputs_may_be_written_to():
    def loss_of(model, x, y):
        logits = model(x)
        logits /= 2
        logits[:, 0] = 0
        return F.cross_entropy(logits, y)

    model, optimizer, loader = privately(make_model())
    x, y = next(iter(loader))
    expected = clipped_mean(
        copy.deepcopy(model), lambda m, x, y: F.cross_entropy(m(x) * MASK / 2, y), rows_of(x, y)
    )
    loss_of(model, x, y).backward()
    optimizer.step()
    assert_grads(model, expected)


MASK = torch.tensor([0.0, 1.0, 1.0])


def test_self_check_of_both_halves_passes():
    model, optimizer, loader = privately(make_model(), self_check=True)
    x, y = next(iter(loader))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert optimizer.ledger.steps == 1


def test_constants_made_in_forward_pass_the_self_check():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(5, 3)

        def forward(self, x):
            return self.inner(x) * torch.tensor([1.0, 2.0, 3.0])

    model, optimizer, loader = privately(Scaled(), self_check=True)
    x, y = next(iter(loader))
    expected = clipped_mean(copy.deepcopy(model), of_the_scaled, rows_of(x, y))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert_grads(model, expected)


def of_the_scaled(model, x, y):
    return F.cross_entropy(model.inner(x) * torch.tensor([1.0, 2.0, 3.0]).double(), y)


def test_self_check_of_both_halves_finds_a_wrong_gradient():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(5, 4)
            self.outer = nn.Linear(4, 3)

        def forward(self, x):
            return self.outer(Wrong.apply(self.inner(x)))

    model, optimizer, loader = privately(Net(), self_check=True)
    x, y = next(iter(loader))
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="must agree between torch and JAX"):
        optimizer.step()
    assert optimizer.ledger.steps == 0


@pytest.mark.slow
def test_two_losses_of_a_batch_are_clipped_together():
    def loss_of(model, x, y):
        return F.cross_entropy(model(x), y) + model(x + 1).square().mean()

    model, optimizer, loader = privately(make_model())
    x, y = next(iter(loader))
    expected = clipped_mean(copy.deepcopy(model), loss_of, rows_of(x, y))
    F.cross_entropy(model(x), y).backward()
    model(x + 1).square().mean().backward()
    optimizer.step()
    assert_grads(model, expected)


class Scalar(nn.Module):
    """Returns what Hugging Face's models do: a loss and more, in a dict."""

    def __init__(self):
        super().__init__()
        self.net = make_model()

    def forward(self, x, labels=None, *, flag=True, **nothing):
        logits = self.net(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits, "flag": flag, "cache": object()}


def test_loss_computed_inside_the_model_is_the_mean_over_examples():
    model, optimizer, loader = privately(Scalar())
    x, y = next(iter(loader))
    plain = copy.deepcopy(model)
    expected = clipped_mean(plain, lambda m, x, y: m(x, labels=y)["loss"], rows_of(x, y))
    output = model(x, labels=y, flag=True)
    torch.testing.assert_close(output["loss"], plain(x, labels=y)["loss"])
    torch.testing.assert_close(output["logits"], plain(x, labels=y)["logits"])
    assert output["flag"] is True
    output["loss"].backward()
    optimizer.step()
    assert_grads(model, expected)


def test_what_is_not_made_of_tensors_refuses_when_asked():
    model, _, loader = privately(Scalar())
    x, y = next(iter(loader))
    with pytest.raises(RuntimeError, match="must not be asked of the object"):
        model(x, y)["cache"].keys()


class Hidden(nn.Module):
    """Returns a state with the batch on axis 1, as recurrent layers do."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(5, 4, batch_first=True)

    def forward(self, x):
        return self.rnn(x)


def test_examples_may_lie_on_another_axis_of_an_output():
    def loss_of(model, x, y):
        outputs, hidden = model(x)
        assert hidden.shape == (1, len(x), 4)
        return outputs[:, -1].square().mean() + F.cross_entropy(hidden[0], y)

    data = TensorDataset(torch.randn(N, 6, 5), torch.arange(N) % 4)
    model, optimizer, loader = privately(Hidden(), data=data)
    x, y = next(iter(loader))
    expected = clipped_mean(copy.deepcopy(model), loss_of, rows_of(x, y))
    loss_of(model, x, y).backward()
    optimizer.step()
    assert_grads(model, expected)


def test_dropout_falls_alike_forward_and_backward():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(40))

        def forward(self, x):
            return F.dropout(self.scale * x, 0.5)

    data = TensorDataset(torch.ones(N, 40), torch.zeros(N))
    model, optimizer, loader = privately(Dropped(), lr=0.0, data=data, l2_clip_norm=1e6)
    masks = []
    for x, _ in loader:
        optimizer.zero_grad()
        kept = model(x)
        masks.append(kept.detach())
        kept.sum(1).mean().backward()
        optimizer.step()
        # The derivative of the sum by each scale is what is left of the input.
        torch.testing.assert_close(model.scale.grad, kept.detach().sum(0) / BATCH)
        if len(masks) == 2:
            break
    first, second = masks
    assert set(first.unique().tolist()) == {0.0, 2.0}
    assert (first[0] != first[1]).any()
    assert (first[0] != second[0]).any()


def test_microbatches_change_nothing():
    grads = []
    for microbatch_size in (None, 4):
        model, optimizer, loader = privately(make_model(), microbatch_size=microbatch_size)
        x, y = next(iter(loader))
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        grads.append([p.grad for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_parts_of_a_draw_are_one_step():
    config = dpbridge.DPConfig(
        epsilon=50.0,
        delta=1e-3,
        clipping_norm=0.5,
        batch_size=BATCH,
        train_size=N,
        gradient_accumulation_steps=2,
        train_steps=3,
        noise_multiplier=1.0,
        seed=5,
    )
    grads = []
    for is_unchanged in (True, False):
        model, optimizer, loader = privately(
            make_model(), config=config, loss_fn=nn.CrossEntropyLoss()
        )
        for number, (x, y) in enumerate(loader, 1):
            if is_unchanged:
                F.cross_entropy(model(x), y).backward()
            else:
                optimizer.backward(x, y)
            if number == 2:
                break
        optimizer.step()
        grads.append([p.grad for p in model.parameters()])
        assert optimizer.ledger.steps == 1
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_frozen_parameters_get_no_gradient():
    model = make_model()
    model[0].requires_grad_(False)
    model, optimizer, loader = privately(model)
    x, y = next(iter(loader))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None


def test_empty_draw_does_not_crash_a_loop():
    data = make_data()
    plan = DPSGDConfig(iterations=40, sampling_prob=1e-6, noise_multiplier=1.0).make()
    model, optimizer, loader = privately(make_model(), plan=plan, data=data)
    sizes = []
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        sizes.append(len(x))
        assert model[0].weight.grad.count_nonzero()  # noise alone
        if len(sizes) == 2:
            break
    assert sizes == [0, 0]
    assert optimizer.ledger.steps == 2


def test_eval_and_no_grad_run_in_torch():
    model, _, loader = privately(make_model())
    x, _ = next(iter(loader))
    with torch.no_grad():
        assert model(x[:2]).grad_fn is None
    model.eval()
    assert type(model(x).grad_fn).__name__ == "AddmmBackward0"
    assert type(model.train()(x).grad_fn).__name__ != "AddmmBackward0"


def test_model_stays_what_it_was():
    model = make_model()
    keys, kind = list(model.state_dict()), type(model)
    private, _, _ = privately(model)
    assert private is model
    assert type(private) is kind
    assert list(private.state_dict()) == keys


@pytest.mark.parametrize("copied", [
    copy.deepcopy,
    lambda model: pickle.loads(pickle.dumps(model)),
    lambda model: torch.load(_saved(model), weights_only=False),
], ids=["deepcopy", "pickle", "torch.save"])  # fmt: skip
def test_copies_are_public_models_of_their_own(copied):
    model, _, loader = privately(make_model())
    x, _ = next(iter(loader))
    other = copied(model)
    assert type(other(x).grad_fn).__name__ == "AddmmBackward0"
    with torch.no_grad():
        other[2].weight.zero_()
        other[2].bias.fill_(3.0)
        assert (other(x) == 3).all()
    assert not (model(x) == 3).any()


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_make_public_takes_the_model_back():
    model = make_model()
    before = dict(vars(model))
    private, optimizer, loader = privately(model)
    x, y = next(iter(loader))
    assert make_public(private) is model
    assert vars(model) == before
    F.cross_entropy(model(x), y).backward()
    assert model[0].weight.grad.count_nonzero()
    with pytest.raises(RuntimeError, match="must follow a call of `backward`"):
        optimizer.step()


def test_a_forward_of_the_users_own_comes_back():
    model = make_model()
    own = type(model).forward.__get__(model)
    model.forward = own
    private, _, _ = privately(model)
    assert private.forward is not own
    make_public(private)
    assert vars(model)["forward"] is own


def test_hooks_of_the_model_run_on_the_batch():
    model, _, loader = privately(make_model())
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    x, _ = next(iter(loader))
    model(x)
    assert seen == [(len(x), 3)]


# What would break the guarantee


def begun(**options):
    model, optimizer, loader = privately(make_model(), **options)
    x, y = next(iter(loader))
    return model, optimizer, x, y


def test_a_penalty_on_the_weights_is_refused():
    model, _, x, y = begun()
    loss = F.cross_entropy(model(x), y) + model[0].weight.square().sum()
    with pytest.raises(RuntimeError, match=r"`0.weight` must get its gradient from the model's"):
        loss.backward()
    assert model[0].weight.grad is None


def test_a_regularizer_is_added_after_the_noise():
    def penalty(model):
        return 0.1 * sum(p.square().sum() for p in model.parameters())

    for is_in_loss in (False, True):
        model, optimizer, x, y = begun(regularizer=penalty)
        plain = copy.deepcopy(model)
        expected = clipped_mean(plain, cross_entropy_of, rows_of(x, y))
        loss = F.cross_entropy(model(x), y)
        (loss + penalty(model) if is_in_loss else loss).backward()
        optimizer.step()
        for name, parameter in plain.named_parameters():
            expected[name] += 0.2 * parameter.detach().double()
        assert_grads(model, expected)


def test_a_term_that_is_not_the_regularizer_is_refused():
    model, optimizer, x, y = begun(regularizer=lambda model: model[0].weight.square().sum())
    (F.cross_entropy(model(x), y) + (x.mean(0) * model[0].weight).sum()).backward()
    with pytest.raises(RuntimeError, match="and that of `regularizer`, got another"):
        optimizer.step()
    assert optimizer.ledger.steps == 0


def test_a_part_of_the_model_called_by_itself_is_refused():
    model, _, x, y = begun()
    with pytest.raises(RuntimeError, match="a part of the model called by itself"):
        F.cross_entropy(model[2](model[1](model[0](x))), y).backward()


def test_training_in_eval_mode_is_refused():
    model, _, x, y = begun()
    model.eval()
    with pytest.raises(RuntimeError, match=r"Call model.train\(\)"):
        F.cross_entropy(model(x), y).backward()


def test_a_second_backward_is_refused():
    model, _, x, y = begun()
    loss = F.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="must go once through each forward"):
        loss.backward()


def test_grads_changed_before_step_are_refused():
    model, optimizer, loader = privately(make_model())
    for number, (x, y) in enumerate(loader):
        F.cross_entropy(model(x), y).backward()
        if number == 1:
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            with pytest.raises(RuntimeError, match=r"`0.bias.grad` must stay as it is between"):
                optimizer.step()
            assert optimizer.ledger.steps == 1
            return
        optimizer.step()


def test_grads_put_in_before_step_are_refused():
    model, optimizer, x, y = begun()
    F.cross_entropy(model(x), y).backward()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with pytest.raises(RuntimeError, match="must be left to DPOptimizer, got one from elsewhere"):
        optimizer.step()


@pytest.mark.parametrize("write", [
    lambda model: model[0].weight.mul_(2),
    lambda model: setattr(model[0].weight, "data", torch.ones(8, 5)),
], ids=["in place", "data"])  # fmt: skip
@pytest.mark.parametrize("when", ["before backward", "after backward"])
def test_weights_changed_after_forward_are_refused(write, when):
    model, optimizer, x, y = begun()
    loss = F.cross_entropy(model(x), y)
    if when == "after backward":
        loss.backward()
    with torch.no_grad():
        write(model)
    with pytest.raises(RuntimeError, match=r"`0.weight` must stay as forward read it until"):
        loss.backward() if when == "before backward" else optimizer.step()
    assert optimizer.ledger.steps == 0


def test_inputs_changed_after_forward_are_refused():
    model, optimizer, x, y = begun()
    F.cross_entropy(model(x), y).backward()
    x.zero_()
    with pytest.raises(RuntimeError, match="Input 0 of the model must stay as forward read it"):
        optimizer.step()


def test_a_gradient_changed_after_backward_is_refused():
    model, optimizer, x, _ = begun()
    gradient = torch.ones(len(x), 3)
    model(x).backward(gradient)
    gradient.mul_(100)
    with pytest.raises(RuntimeError, match="The gradient of output 0 must stay"):
        optimizer.step()


def test_a_part_of_the_batch_is_refused():
    model, _, x, y = begun()
    with pytest.raises(RuntimeError, match=r"`backward` must be called once on each batch"):
        F.cross_entropy(model(x[:2]), y[:2]).backward()


def test_rows_of_other_examples_in_a_second_forward_are_refused():
    model, _, x, y = begun()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="Every forward of a step must be on the whole batch"):
        F.cross_entropy(model(x[1:]), y[1:]).backward()


def test_backward_after_the_next_batch_is_refused():
    model, _, loader = privately(make_model())
    batches = iter(loader)
    x, y = next(batches)
    loss = F.cross_entropy(model(x), y)
    next(batches)
    with pytest.raises(RuntimeError, match="must come before the loader's next batch"):
        loss.backward()


def test_inputs_with_a_gradient_are_refused():
    model, _, x, _ = begun()
    with pytest.raises(NotImplementedError, match="must not require a gradient"):
        model(x.requires_grad_())


def test_functional_call_with_other_weights_is_refused():
    model, _, x, _ = begun()
    others = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="must be the parameter that the optimizer holds"):
        torch.func.functional_call(model, others, (x,))


def test_outputs_without_a_row_for_each_example_are_refused():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(5, 3)

        def forward(self, x):
            return self.inner(x).mean(0)

    model, _, loader = privately(Pooled())
    x, _ = next(iter(loader))
    with pytest.raises(NotImplementedError, match="must return tensors with one row an example"):
        model(x)


def test_a_private_model_is_not_made_private_again():
    model, _, _ = privately(make_model())
    with pytest.raises(ValueError, match="got one that is private already"):
        privately(model)


def test_zero_grad_drops_what_backward_brought():
    model, optimizer, x, y = begun()
    F.cross_entropy(model(x), y).backward()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="must follow a call of `backward`"):
        optimizer.step()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert optimizer.ledger.steps == 1


def test_state_is_not_saved_between_backward_and_step():
    model, optimizer, x, y = begun()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="must not fall between"):
        optimizer.state_dict()


def test_labels_out_of_range_are_refused():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(4, 3)

        def forward(self, tokens):
            return self.table(tokens)

    data = TensorDataset(torch.full((N,), 9), torch.zeros(N, dtype=torch.long))
    model, _, loader = privately(Embedded(), data=data, self_check=False)
    x, _ = next(iter(loader))
    with pytest.raises(IndexError):
        model(x)


# What is spent


def test_epsilon_form_spends_no_more_and_little_less():
    model, optimizer, loader = privately(
        make_model(), noise_multiplier=None, epsilon=3.0, delta=1e-3, epochs=2
    )
    assert len(loader) == N // BATCH
    for _ in range(2):
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert 2.9 < optimizer.epsilon(delta=1e-3) <= 3.0
    with pytest.raises(RuntimeError, match="used up"):
        next(iter(loader))


def test_sampling_is_poisson_with_exactly_the_batch_size():
    _, optimizer, loader = privately(make_model(), batch_size=7)
    assert optimizer.sampling_prob == 7 / N
    assert len(loader) == 9


def test_noise_and_budget_that_disagree_are_refused():
    with pytest.raises(ValueError, match="`noise_multiplier` must keep within epsilon=1"):
        privately(make_model(), noise_multiplier=0.5, epsilon=1.0, delta=1e-3)


@pytest.mark.parametrize(("options", "text"), [
    ({"noise_multiplier": None}, "`epsilon` or `noise_multiplier` must be given"),
    ({"noise_multiplier": None, "epsilon": 1.0}, "`delta` must be given with `epsilon`"),
    ({"epochs": None}, "`epochs` must be given"),
    ({"l2_clip_norm": None}, "`l2_clip_norm` must be given"),
    ({"regularizer": 3}, "`regularizer` must be callable"),
    ({"config": 3}, "`config` must be a DPConfig"),
])  # fmt: skip
def test_missing_and_wrong_arguments_are_refused(options, text):
    with pytest.raises(TypeError, match=text):
        privately(make_model(), **options)


@pytest.mark.parametrize(("options", "text"), [
    ({"epochs": 0}, "`epochs` must be at least 1"),
    ({"loss_reduction": "max"}, "`loss_reduction` must be one of"),
    ({"batch_size": 100}, "`loader.batch_size` must be at most the dataset's"),
    ({"l2_clip_norm": -1.0}, "`l2_clip_norm` must be positive"),
])  # fmt: skip
def test_arguments_out_of_range_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        privately(make_model(), **options)


def test_plan_and_numbers_are_one_form_each():
    plan = DPSGDConfig(iterations=2, sampling_prob=0.1, noise_multiplier=1.0).make()
    loader = DataLoader(make_data(), batch_size=BATCH)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="`epochs` must be left out with `plan`"):
        make_private(model, optimizer, loader, plan=plan, epochs=3)


# The loader


def test_generator_of_the_loader_decides_the_draws():
    draws = []
    for seed in (1, 1, 2):
        loader = DataLoader(
            make_data(),
            batch_size=BATCH,
            shuffle=True,
            generator=torch.Generator().manual_seed(seed),
        )
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        _, _, private = make_private(
            model, optimizer, loader, noise_multiplier=1.0, epochs=1, l2_clip_norm=1.0
        )
        draws.append([x.tolist() for x, _ in private])
    assert draws[0] == draws[1] != draws[2]


class Streamed(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield torch.ones(5)


@pytest.mark.parametrize(("make", "error", "text"), [
    (lambda d: d, TypeError, "`loader` must be a torch DataLoader"),
    (lambda d: DataLoader(Streamed(), batch_size=2), TypeError, "got an IterableDataset"),
    (lambda d: DataLoader(d, batch_size=2, drop_last=True), ValueError, "drop_last=True"),
    (lambda d: DataLoader(d, batch_size=2, sampler=torch.utils.data.WeightedRandomSampler(
        [1.0] * N, N)), ValueError, "must sample uniformly, got WeightedRandomSampler"),
    (lambda d: DataLoader(d, batch_size=2, sampler=torch.utils.data.RandomSampler(
        d, replacement=True)), ValueError, "must pass over all 60 examples once"),
    (lambda d: DataLoader(d, batch_size=None), ValueError, "must sample uniformly"),
])  # fmt: skip
def test_loaders_that_sample_otherwise_are_refused(make, error, text):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(error, match=text):
        make_private(
            model, optimizer, make(make_data()), noise_multiplier=1.0, epochs=1, l2_clip_norm=1.0
        )


# The criterion


@pytest.mark.parametrize(("criterion", "options"), [
    (nn.CrossEntropyLoss(), {}),
    (nn.CrossEntropyLoss(reduction="sum"), {"loss_reduction": "sum"}),
    (nn.CrossEntropyLoss(label_smoothing=0.1), {}),
])  # fmt: skip
def test_criterion_that_does_not_mix_passes(criterion, options):
    privately(make_model(), criterion=criterion, **options)


@pytest.mark.parametrize(("criterion", "options"), [
    (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])), {}),
    (nn.CrossEntropyLoss(ignore_index=1), {}),
    (nn.CrossEntropyLoss(reduction="sum"), {}),
    (lambda output, y: F.cross_entropy(output - output.mean(0), y), {}),
    (lambda output, y: (output @ output.T).square().mean(), {}),
], ids=["weights", "ignored", "sum", "centred", "pairs"])  # fmt: skip
def test_criterion_that_mixes_examples_is_refused(criterion, options):
    with pytest.raises(ValueError, match="`criterion` must be a mean over examples"):
        privately(make_model(), criterion=criterion, **options)


def test_criterion_is_probed_without_a_trace():
    class Counted(Dataset):
        def __len__(self):
            return N

        def __getitem__(self, index):
            return torch.rand(5), index % 3

    model = make_model()
    before = torch.get_rng_state()
    privately(model, data=Counted(), criterion=nn.CrossEntropyLoss())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())
