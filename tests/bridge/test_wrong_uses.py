"""Wrong uses: each is refused in words that say what to do, before anything is released.

Those of single parts are in the tests of the parts: wrong numbers, batches, models and
optimizers in `test_optimizer.py`; loaders and their states in `test_loaders.py` and
`test_plan_loader.py`; draws that are skipped or repeated in `test_plan.py`; configs in
`test_config.py`; what would bypass clipping in `test_private_loop.py`. Here is what is made of
several parts, and what was in none of them.
"""

import copy
import io
import itertools
import warnings

import jax
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader, TensorDataset

from dpbridge import DPConfig, DPOptimizer, PlanLoader, PoissonLoader, make_private, make_public
from dpbridge.budget import PrivacyBudget
from dpkernels.execution_plan import BandMFConfig, DPSGDConfig

N, BATCH = 60, 12
PLAN = DPSGDConfig(iterations=5, sampling_prob=0.2, noise_multiplier=1.0).make()


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))


def make_data():
    generator = torch.Generator().manual_seed(7)
    return TensorDataset(torch.randn(N, 5, generator=generator), torch.arange(N) % 3)


def make_base(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def make_run(model=None, optimizer=None, loader=None, **options):
    """`make_private` of a small model, with these arguments in place of good ones."""
    model = make_model() if model is None else model
    optimizer = make_base(model) if optimizer is None else optimizer
    # Its generator decides the draws: the same in each test, so that each compiles the same sizes.
    given, generator = loader, torch.Generator().manual_seed(3)
    loader = given or DataLoader(make_data(), batch_size=BATCH, generator=generator)
    options = {"noise_multiplier": 1.0, "epochs": 2, "l2_clip_norm": 1.0} | options
    if options.get("plan") is not None or options.get("config") is not None:
        options = {
            n: x
            for n, x in options.items()
            if n not in ("noise_multiplier", "epochs", "l2_clip_norm")
        }
    return make_private(model, optimizer, loader, **{"self_check": False} | options)


def make_optimizer(**options):
    """A `DPOptimizer` of a small model."""
    model = options.pop("model", None) or make_model()
    options = {"loss_fn": nn.CrossEntropyLoss(), "self_check": False} | options
    return DPOptimizer(make_base(model), model, **options)


def make_endless(**options):
    numbers = {"l2_clip_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": BATCH}
    return make_optimizer(**numbers | options)


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


def use_dicts():
    return DataLoader([{"x": torch.ones(5), "y": 1}] * 20, batch_size=4)


# Arguments


@pytest.mark.parametrize(("use", "error", "text"), [
    # make_private
    (lambda: make_run(epsilon="3", delta=1e-3), TypeError, "`epsilon` must be a real number"),
    (lambda: make_run(epsilon=3.0, delta="1e-3"), TypeError, "`delta` must be a real number"),
    (lambda: make_run(epsilon=3.0, delta=3.0), ValueError, r"`delta` must be in \(0, 1\)"),
    (lambda: make_run(epsilon=-3.0, delta=1e-3), ValueError, "`epsilon` must be positive"),
    (lambda: make_run(noise_multiplier="1"), TypeError, "`noise_multiplier` must be a real number"),
    (lambda: make_run(noise_multiplier=-1.0), ValueError,
     "`noise_multiplier` must be non-negative"),
    (lambda: make_run(epochs="2"), TypeError, "`epochs` must be an integer"),
    (lambda: make_run(epochs=True), TypeError, "`epochs` must be an integer"),
    (lambda: make_run(l2_clip_norm="1"), TypeError, "`l2_clip_norm` must be a real number"),
    (lambda: make_run(l2_clip_norm=torch.tensor(1.0)), TypeError, "`l2_clip_norm` must be a real"),
    (lambda: make_run(l2_clip_norm={"head": 1.0}), ValueError, "a number for each trainable"),
    (lambda: make_run(loss_reduction=3), ValueError,
     "`loss_reduction` must be one of 'mean', 'sum'"),
    (lambda: make_run(loss_fn="ce"), TypeError, "`loss_fn` must be callable, got 'ce'"),
    (lambda: make_run(loss_fn=nn.MSELoss), TypeError, r"`loss_fn` must be callable, .* brackets"),
    (lambda: make_run(microbatch_size=2.5), TypeError, "`microbatch_size` must be an integer"),
    (lambda: make_run(microbatch_size=0), ValueError, "`microbatch_size` must be at least 1"),
    (lambda: make_run(seed=1.5), TypeError, "`seed` must be an integer"),
    (lambda: make_run(seed=-1), ValueError, "`seed` must be at least 0"),
    (lambda: make_run(seed=2**64), ValueError, "`seed` must be below"),
    (lambda: make_run(plan="dpsgd"), TypeError, "`plan` must be a DPExecutionPlan, got str"),
    (lambda: make_run(plan=PLAN.config), TypeError, "`plan` must be a DPExecutionPlan, got DPSGD"),
    (lambda: make_run(config={"epsilon": 3}), TypeError, "`config` must be a DPConfig, got dict"),
    (lambda: make_run(make_base(make_model()), make_model()), TypeError,
     "must be a plain torch opt"),
    (lambda: make_run(optimizer=torch.optim.SGD), TypeError, "must be a plain torch optimizer"),
    (lambda: make_run(optimizer=make_base(make_model())), ValueError,
     "parameters of `model` alone"),
    (lambda: make_run(model=make_model().requires_grad_(False)), ValueError, "Unfreeze one"),
    (lambda: make_run(model=nn.DataParallel(make_model())), NotImplementedError, "on one device"),
    (lambda: make_run(loader=PlanLoader(PLAN, make_data(), seed=3)), TypeError,
     "must be a torch DataLoader"),
    (lambda: make_run(loader=PoissonLoader(make_data(), sampling_prob=0.1, steps=3)), TypeError,
     "`loader` must be a torch DataLoader, got PoissonLoader"),
    (lambda: make_run(max_grad_norm=1.0), TypeError, "unexpected keyword argument 'max_grad_norm'"),
    # The criterion
    (lambda: make_run(criterion="ce"), TypeError, "`criterion` must be callable, got 'ce'"),
    (lambda: make_run(criterion=nn.CrossEntropyLoss), TypeError, "`criterion` must be callable"),
    (lambda: make_run(criterion=nn.CrossEntropyLoss(reduction="none")), ValueError,
     "return a scalar"),
    (lambda: make_run(criterion=lambda out, y: F.cross_entropy(out.detach(), y)), ValueError,
     "`criterion` must return a scalar of the model's output"),
    (lambda: make_run(criterion=lambda out, y: out.sum() * float("nan")), ValueError,
     "must be a mean over examples"),
    (lambda: make_run(criterion=nn.CrossEntropyLoss(), loss_reduction="sum"), ValueError,
     "must be a sum over examples"),
    (lambda: make_run(criterion=nn.MSELoss(), model=Pair(5, 3)), TypeError, "returns one tensor"),
    (lambda: make_run(criterion=nn.MSELoss(), loader=use_dicts()), TypeError,
     r"is \(\*inputs, targ"),
    # DPOptimizer
    (lambda: make_optimizer(), TypeError, "`l2_clip_norm` must be a real number, got None"),
    (lambda: make_optimizer(plan="dpsgd"), TypeError, "`plan` must be a DPExecutionPlan, got str"),
    (lambda: make_optimizer(plan=PLAN.config), TypeError,
     "Pass what the `make` of a config returns"),
    (lambda: make_optimizer(plan=PLAN, seed=1.0), TypeError, "`seed` must be an integer"),
    (lambda: make_optimizer(plan=PLAN, epsilon="1", delta=1e-3), TypeError,
     "`epsilon` must be a real"),
    (lambda: make_endless(loader=PlanLoader(PLAN, make_data(), seed=3)), TypeError,
     "`loader` must be left out"),
    (lambda: make_endless(loss_fn=nn.CrossEntropyLoss), TypeError, "`loss_fn` must be callable"),
    (lambda: make_endless().take_over_forward(), ValueError,
     "with a plan and its loader, got none"),
    (lambda: make_optimizer(plan=PLAN).take_over_forward(), ValueError, "only the loader can say"),
    (lambda: make_run()[1].epsilon("1e-3"), TypeError, "`delta` must be a real number"),
    (lambda: make_run()[1].epsilon(1e-3, accountant="gdp"), ValueError,
     "must be one of 'pld', 'rdp'"),
    # What is spent
    (lambda: PrivacyBudget("3", 1e-3), TypeError, "`epsilon` must be a real number, got '3'"),
    (lambda: PrivacyBudget(None, 1e-3), TypeError, "`epsilon` must be a real number, got None"),
    (lambda: PrivacyBudget(True, 1e-3), TypeError, "`epsilon` must be a real number, got True"),
    (lambda: PrivacyBudget(float("nan"), 1e-3), ValueError,
     "`epsilon` must be positive and finite"),
    (lambda: PrivacyBudget(float("inf"), 1e-3), ValueError,
     "`epsilon` must be positive and finite"),
    (lambda: PrivacyBudget(3.0, "x"), TypeError, "`delta` must be a real number, got 'x'"),
    (lambda: PrivacyBudget(3.0, 2), ValueError, r"`delta` must be in \(0, 1\), got 2"),
    (lambda: make_public(None), TypeError, r"`model` must be a torch.nn.Module, got NoneType"),
    (lambda: make_public(make_model()), ValueError, "got one that is public already"),
])  # fmt: skip
def test_wrong_arguments_are_refused(use, error, text):
    with pytest.raises(error, match=text):
        use()


# Checkpoints


def own(**changes):
    """Damages what a checkpoint says of privacy; a dotted name goes one level down."""

    def damage(state):
        for name, value in changes.items():
            part, _, key = name.partition("__")
            state["dpbridge"][part] = {**state["dpbridge"][part], key: value} if key else value
        return state

    return damage


def without(*path):
    def damage(state):
        inner = state
        for name in path[:-1]:
            inner = inner[name]
        del inner[path[-1]]
        return state

    return damage


DAMAGES = [
    (lambda state: None, "`state_dict` must be a dict, got NoneType"),
    (lambda state: [state], "`state_dict` must be a dict, got list"),
    (lambda state: {}, "must hold `dpbridge` with ledger, noise, version, got None"),
    (without("dpbridge"), "without its ledger no epsilon holds"),
    (without("dpbridge", "ledger"), "must hold `dpbridge` with ledger, noise, version"),
    (without("state"), "must hold the wrapped optimizer's state, got none"),
    (without("param_groups"), "must hold the wrapped optimizer's param_groups, got none"),
    (lambda state: {**state, "param_groups": state["param_groups"] * 2}, "parameter groups"),
    (own(version="1"), "must be of version 1, got '1'"),
    (own(noise=[1]), "must hold `dpbridge` with"),
    (own(noise__steps="3"), "`noise.steps` must be an integer, got '3'"),
    (own(noise__steps=1.0), "`noise.steps` must be an integer, got 1.0"),
    (own(noise__steps=-1), "`noise.steps` must be at least 0"),
    (own(noise__steps=2**32), r"`noise.steps` must be below 2\*\*32"),
    (
        own(noise__steps=2),
        "must count every release in its ledger, got 1 steps there and noise for 2",
    ),
    (own(noise__seed="a"), "`seed` must be an integer, got 'a'"),
    (without("dpbridge", "noise", "seed"), "`seed` must be an integer, got None"),
    (own(ledger=[]), r"`state` must have the keys"),
    (own(ledger__version=0), r"`state\['version'\]` must be [12], got 0"),
    (own(journal="3"), "`journal` must be an integer, got '3'"),
    (own(journal=-1), "`journal` must be at least 0, got -1"),
]
PLANNED = [
    (own(noise__run="a"), "`noise.run` must be an integer"),
    (own(noise__state="abc"), "must hold the noise of this plan"),
    (own(noise__state=[1, "a"]), "must hold the noise of this plan"),
    (own(noise__state=[torch.zeros(3)]), "got other shapes or types"),
    (without("dpbridge", "noise", "state"), "must hold the noise of this plan"),
    (own(ledger__steps="a"), r"`state\['steps'\]` must be an integer"),
    (own(ledger__steps=-1), r"`state\['steps'\]` must be at least 0"),
    (own(ledger__steps=99), r"`state\['steps'\]` must be at most the plan's 5, got 99"),
    (own(ledger__steps=0), "`state` must be whole, got 0 unknown steps and position 1 of 0"),
    (own(ledger__position=0), "must count every release in its ledger, got 0 steps"),
    (own(ledger__position=2), "`state` must be whole"),
    (own(ledger__position="a"), r"`state\['position'\]` must be an integer"),
    (own(noise__steps=0), "must be of a run without a failed step, got one that has drawn batch 1"),
    (own(ledger__unknown_steps=3), "`state` must be whole, got 3 unknown steps"),
    (own(ledger__draws=3), "`state` must be whole"),
    (own(ledger__plan="x"), "must be what `config_to_dict` returns, got 'x'"),
    (own(ledger__plan=None), "`state` must be of this plan"),
    (own(ledger__mechanism="f"), "`state` must be of this plan"),
]
ENDLESS = [
    (own(ledger__runs=3), r"`state\['runs'\]` must be a list, got 3"),
    (own(ledger__runs=[[1.0, 0.2]]), "must be noise multiplier, sampling probability and number"),
    (own(ledger__runs=[]), "must count every release in its ledger, got 0 steps"),
    (own(ledger__runs=[[1.0, 0.2, -1]]), r"runs'\]\[0\].steps` must be at least 1"),
    (own(ledger__runs=[[-1.0, 0.2, 1]]), "noise_multiplier` must be non-negative"),
    (own(noise__state=None), "must be of a run without a plan"),
]  # fmt: skip


@pytest.fixture(scope="module")
def planned_state():
    loader = PlanLoader(PLAN, make_data(), seed=3)
    optimizer = make_optimizer(plan=PLAN, loader=loader)
    optimizer.backward(*next(iter(loader)))
    optimizer.step()
    return optimizer.state_dict()


@pytest.fixture(scope="module")
def endless_state():
    optimizer = make_endless(sampling_prob=0.2)
    optimizer.backward(*make_data()[:BATCH])
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize(("damage", "text"), DAMAGES + PLANNED)
def test_damaged_checkpoint_of_a_plan_is_refused_and_changes_nothing(damage, text, planned_state):
    _refuse(make_optimizer(plan=PLAN), damage(copy.deepcopy(planned_state)), text)


@pytest.mark.parametrize(("damage", "text"), DAMAGES + ENDLESS)
def test_damaged_checkpoint_without_a_plan_is_refused_and_changes_nothing(
    damage, text, endless_state
):
    _refuse(make_endless(sampling_prob=0.2), damage(copy.deepcopy(endless_state)), text)


def _refuse(optimizer, state, text):
    before = str(optimizer.state_dict())
    with pytest.raises(ValueError, match=text):
        optimizer.load_state_dict(state)
    assert str(optimizer.state_dict()) == before


def test_checkpoint_of_another_kind_of_run_is_refused(planned_state, endless_state):
    with pytest.raises(ValueError, match="must"):
        make_endless().load_state_dict(planned_state)
    with pytest.raises(ValueError, match="`state` must have the keys"):
        make_optimizer(plan=PLAN).load_state_dict(endless_state)


@pytest.mark.parametrize("rename", [
    lambda: nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)),
    lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5)),
], ids=["names", "shapes"])  # fmt: skip
def test_checkpoint_of_other_parameters_is_refused(rename, endless_state):
    # Torch would give each its momentum by the place in the list.
    text = r"of these names and shapes, got a change of .*Make the model as it was"
    _refuse(make_endless(model=rename()), copy.deepcopy(endless_state), text)


def test_truncated_checkpoint_is_refused_where_it_is_read(planned_state):
    file = io.BytesIO()
    torch.save(planned_state, file)
    with pytest.raises(RuntimeError, match=r"PytorchStreamReader failed|central directory"):
        torch.load(io.BytesIO(file.getvalue()[:-200]), weights_only=True)


def test_checkpoint_of_the_loader_left_out_is_noticed(planned_state):
    loader = PlanLoader(PLAN, make_data(), seed=3)
    optimizer = make_optimizer(plan=PLAN, loader=loader)
    optimizer.load_state_dict(copy.deepcopy(planned_state))
    batch = next(iter(loader))
    with pytest.raises(
        RuntimeError, match=r"Step 2 must be made on draw 2 .*that of the loader too"
    ):
        optimizer.backward(*batch)


def test_checkpoint_of_the_loader_of_another_run_is_noticed(planned_state):
    stranger, loader = PlanLoader(PLAN, make_data(), seed=4), PlanLoader(PLAN, make_data(), seed=3)
    next(iter(stranger))
    optimizer = make_optimizer(plan=PLAN, loader=loader)
    optimizer.load_state_dict(copy.deepcopy(planned_state))
    loader.load_state_dict(stranger.state_dict())
    batch = next(iter(loader))
    with pytest.raises(RuntimeError, match="got a loader that drew others"):
        optimizer.backward(*batch)


# The order of calls


class Run:
    """An unchanged loop that has begun: a private model, and the first batch."""

    def __init__(self, model=None, **options):
        self.model, self.optimizer, self.loader = make_run(model, **options)
        self.batches = iter(self.loader)
        self.next()

    def next(self):
        self.x, self.y = next(self.batches)

    def backward(self, model=None, batch=None):
        x, y = batch or (self.x, self.y)
        F.cross_entropy((model or self.model)(x), y).backward()

    def step(self):
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def use_old_loader(run):
    for batch in DataLoader(make_data(), batch_size=BATCH):
        run.backward(batch=batch)
        run.optimizer.step()


def use_old_loader_beside(run):
    run.backward(batch=next(iter(DataLoader(make_data(), batch_size=len(run.x) + 1))))


def skip_a_batch(run):
    run.next()
    run.backward()


def accumulate_two_batches(run):
    run.backward()
    run.next()
    run.backward()


def repeat_a_batch(run):
    run.step()
    run.backward()


def look_ahead(run):
    ahead, behind = itertools.tee(run.batches)
    next(ahead), next(ahead)
    run.backward(batch=next(behind))


def iterate_twice(run):
    next(iter(run.loader))
    run.next()


def break_before_use(run):
    run.step()
    for _ in run.loader:
        break
    for batch in run.loader:
        run.backward(batch=batch)


def step_twice(run):
    run.step()
    run.optimizer.step()


def step_after_zero_grad(run):
    run.backward()
    run.optimizer.zero_grad()
    run.optimizer.step()


def stay_in_eval(run):
    run.model.eval()
    run.backward()


def train_a_copy(run):
    run.backward(copy.deepcopy(run.model))
    run.optimizer.step()


def share_a_layer(run):
    run.backward(nn.Sequential(run.model[0], nn.Linear(5, 3)))


def replace_forward(run):
    run.model.forward = lambda x: run.model[2](run.model[0](x))
    run.backward()


def train_a_trace(run):
    run.model.eval()
    with warnings.catch_warnings(action="ignore"):
        traced = torch.jit.trace(run.model, (run.x,), check_trace=False)
    run.model.train()
    run.backward(traced.train())


def differentiate_by_hand(run):
    run.model.eval()
    loss = F.cross_entropy(run.model(run.x), run.y)
    grads = torch.autograd.grad(loss, list(run.model.parameters()))
    run.model.train()
    run.backward()
    for parameter, grad in zip(run.model.parameters(), grads, strict=True):
        parameter.grad = grad
    run.optimizer.step()


def differentiate_functionally(run):
    weights = {name: p.detach() for name, p in run.model.named_parameters()}

    def loss_of(weights):
        return F.cross_entropy(torch.func.functional_call(run.model, weights, (run.x,)), run.y)

    torch.func.grad(loss_of)(weights)


def normalize_weights(run):
    parametrizations.weight_norm(run.model[0])
    run.backward()


def prune_weights(run):
    prune.l1_unstructured(run.model[0], "weight", 0.5)
    run.backward()


def tie_weights(run):
    run.model[2].weight = run.model[0].weight
    run.backward()


def replace_a_parameter(run):
    run.model[0].bias = nn.Parameter(torch.ones(5))
    run.backward()


def replace_a_layer(run):
    run.model[0] = nn.Linear(5, 5)
    run.backward()


def freeze_in_the_middle(run):
    run.step()
    run.model[0].requires_grad_(False)
    run.next()
    run.step()


def add_a_layer_in_the_middle(run):
    run.step()
    run.model.append(nn.Linear(5, 3))
    run.optimizer.add_param_group({"params": run.model[3].parameters()})
    run.next()
    run.step()


def penalize_a_layer_added_later(run):
    run.model.append(nn.Linear(5, 3))
    run.optimizer.add_param_group({"params": run.model[3].parameters()})
    loss = F.cross_entropy(run.model(run.x), run.y) + run.model[3].weight.square().sum()
    loss.backward()
    run.optimizer.step()


def move_the_model(run):
    run.model.to("meta")
    run.backward()


def move_model_and_batch(run):
    run.model.to("meta")
    run.backward(batch=(run.x.to("meta"), run.y.to("meta")))


def change_dtype_of_the_model(run):
    run.model.double()
    run.backward()


def change_width_of_the_batch(run):
    run.backward(batch=(run.x[:, :4], run.y))


def pass_an_array(run):
    run.model(run.x.numpy())


def pass_a_number(run):
    run.model(run.x, 3)


def hook_backward(run):
    run.model[0].register_full_backward_hook(lambda module, before, after: None)
    run.backward()


def make_private_twice(run):
    run.optimizer.take_over_forward()


def copy_the_optimizer(run):
    copy.deepcopy(run.optimizer)


def save_in_the_middle(run):
    run.backward()
    run.optimizer.state_dict()


def load_in_the_middle(run):
    state = run.optimizer.state_dict()
    run.backward()
    run.optimizer.load_state_dict(state)


@pytest.mark.parametrize(("use", "error", "text"), [
    (use_old_loader, RuntimeError, "must be called once on each batch of the plan's loader|draw 2"),
    (use_old_loader_beside, RuntimeError, "must be called once on each batch of the plan's loader"),
    (skip_a_batch, RuntimeError,
     "Step 1 must be made on draw 1 .*got draw 2. Make one step of each"),
    (accumulate_two_batches, RuntimeError, "Step 1 must be made on draw 1"),
    (repeat_a_batch, RuntimeError,
     "Step 2 must be made on draw 2 of the plan's loader, got draw 1"),
    (look_ahead, RuntimeError, "Step 1 must be made on draw 1"),
    (iterate_twice, RuntimeError, "Use one iterator at a time"),
    (break_before_use, RuntimeError, "Step 2 must be made on draw 2 .*got draw 3"),
    (step_twice, RuntimeError, "`step` must follow a call of `backward`"),
    (step_after_zero_grad, RuntimeError, "`step` must follow a call of `backward`"),
    (stay_in_eval, RuntimeError, r"Call model.train\(\) and the model as a whole"),
    (train_a_copy, RuntimeError, "`step` must follow a call of `backward`"),
    (share_a_layer, RuntimeError, "a part of the model called by itself"),
    (replace_forward, RuntimeError, "must get its gradient from the model's own forward"),
    (train_a_trace, RuntimeError, "must get its gradient from the model's own forward"),
    (differentiate_by_hand, RuntimeError, "must be left to DPOptimizer, got one from elsewhere"),
    (differentiate_functionally, ValueError, "must be the parameter that the optimizer holds"),
    (normalize_weights, ValueError, "`0.weight` must be the parameter that the optimizer holds"),
    (prune_weights, ValueError, "`0.weight` must be the parameter that the optimizer holds"),
    (tie_weights, ValueError, "`2.weight` must be the parameter that the optimizer holds"),
    (replace_a_parameter, ValueError, "`0.bias` must be the parameter that the optimizer holds"),
    (replace_a_layer, ValueError, "Make a new optimizer after replacing parameters"),
    (freeze_in_the_middle, RuntimeError, "must stay frozen or trainable for the whole of a plan"),
    (add_a_layer_in_the_middle, RuntimeError, "got a change of 3.bias, 3.weight. Make a plan for"),
    (penalize_a_layer_added_later, RuntimeError, r"`3.\w+.grad` must be left to DPOptimizer"),
    (move_the_model, ValueError, "must be on the parameters' device meta, got cpu"),
    (move_model_and_batch, ValueError, "must be the parameter that the optimizer holds"),
    (change_dtype_of_the_model, RuntimeError, "must have the same dtype"),
    (change_width_of_the_batch, RuntimeError, "shapes cannot be multiplied"),
    (pass_an_array, TypeError, "A batch must hold tensors, .* got ndarray"),
    (pass_a_number, TypeError, "A batch must hold tensors, .* got int"),
    (hook_backward, NotImplementedError, "`0` must have no backward hook"),
    (make_private_twice, ValueError, "got one that is private already"),
    (copy_the_optimizer, NotImplementedError, "with a plan must not be copied or pickled"),
    (save_in_the_middle, RuntimeError, "`state_dict` must not fall between"),
    (load_in_the_middle, RuntimeError, "`load_state_dict` must not fall between"),
])  # fmt: skip
def test_wrong_loops_are_refused(use, error, text):
    run = Run()
    with pytest.raises(error, match=text):
        use(run)
    assert run.optimizer.ledger.steps <= 1


def test_forgetting_the_private_loader_is_refused():
    model, optimizer, _ = make_run()
    x, y = next(iter(DataLoader(make_data(), batch_size=BATCH)))
    with pytest.raises(RuntimeError, match=r"Step 1 must be made on draw 1 .* got draw 0"):
        F.cross_entropy(model(x), y).backward()
    assert optimizer.ledger.steps == 0


def test_step_after_the_plans_end_is_refused():
    run = Run(plan=DPSGDConfig(iterations=1, sampling_prob=0.2, noise_multiplier=1.0).make())
    run.step()
    with pytest.raises(RuntimeError, match="past the plan's 1 iterations, which are used up"):
        run.backward()


def test_closure_that_goes_backward_twice_on_a_draw_is_refused():
    loader = PlanLoader(PLAN, make_data(), seed=3)
    optimizer = make_optimizer(plan=PLAN, loader=loader)
    batch = next(iter(loader))

    def closure():
        optimizer.backward(*batch)
        return optimizer.backward(*batch)

    with pytest.raises(RuntimeError, match="must be called once on each batch"):
        optimizer.step(closure)
    assert optimizer.ledger.steps == 0


def test_config_for_another_dataset_is_refused():
    config = DPConfig(
        epsilon=3.0,
        delta=1e-3,
        clipping_norm=1.0,
        batch_size=BATCH,
        train_size=N + 1,
        gradient_accumulation_steps=1,
        train_steps=2,
        noise_multiplier=2.0,
    )
    with pytest.raises(ValueError, match="must be the size of the dataset, 60, got 61"):
        make_run(config=config)


@pytest.mark.parametrize(("value", "text"), [
    (lambda model: 3.0, "`regularizer` must return a scalar tensor, got 3.0"),
    (lambda model: model[0].weight, "`regularizer` must return a scalar tensor"),
])  # fmt: skip
def test_regularizer_that_is_no_scalar_is_refused(value, text):
    run = Run(regularizer=value)
    run.backward()
    with pytest.raises(TypeError, match=text):
        run.optimizer.step()
    assert run.optimizer.ledger.steps == 0


# Devices


def test_device_that_jax_does_not_see_is_named(monkeypatch):
    def unknown(*args, **kwargs):
        raise RuntimeError("Unknown backend cuda")

    optimizer = make_endless()
    monkeypatch.setattr(jax.dlpack, "from_dlpack", unknown)
    with pytest.raises(
        ValueError, match=r"on a device that JAX sees, .*install JAX for that device"
    ):
        optimizer.backward(*make_data()[:BATCH])
    assert optimizer.ledger.steps == 0


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(NotImplementedError, match=r"must be in one process, got .* with 2"):
        make_run()


# What works


class Mean(nn.Linear):
    def forward(self, x):
        return super().forward(x.mean(1))


@pytest.mark.slow
def test_shapes_may_change_between_steps():
    x, y = make_data()[:BATCH]
    optimizer = make_endless(model=Mean(5, 3))
    for length in (2, 3):
        optimizer.backward(x[:, None].expand(-1, length, -1), y)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.ledger.steps == 2


@pytest.mark.slow
def test_model_may_change_its_dtype_between_steps():
    # Noise with a memory goes on too.
    plan = BandMFConfig(
        iterations=2, expected_participations=0.4, strategy=(1.0, 0.5), noise_multiplier=1.0
    ).make()
    loader, model = PlanLoader(plan, make_data()), nn.Linear(5, 3)
    optimizer = make_optimizer(plan=plan, loader=loader, model=model)
    for x, y in loader:
        optimizer.backward(x.to(model.weight.dtype), y)
        optimizer.step()
        assert model.weight.grad.dtype == model.weight.dtype
        assert model.weight.grad.isfinite().all()
        optimizer.zero_grad()
        model.double()
    assert optimizer.ledger.steps == 2


@pytest.mark.slow
def test_workers_change_nothing():
    weights = []
    for num_workers in (0, 2):
        plan, model = PLAN.config.make(), make_model()
        torch.manual_seed(0)
        loader = PlanLoader(plan, make_data(), seed=3, num_workers=num_workers)
        optimizer = make_optimizer(plan=plan, loader=loader, model=model, seed=1)
        sums = []
        for x, y in loader:
            optimizer.backward(x, y)
            sums.append(optimizer._gradient._sums["0.weight"].tolist())
            optimizer.step()
            optimizer.zero_grad()
            model.load_state_dict(make_model().state_dict())
        weights.append(sums)
    assert weights[0] == weights[1]
