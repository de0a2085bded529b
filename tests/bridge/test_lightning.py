"""Private training in Lightning: modules, data and trainers as users have them, with a callback."""

import copy
import csv
from types import SimpleNamespace

import jax
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    TensorDataset,
    WeightedRandomSampler,
)

pl = pytest.importorskip("lightning.pytorch")

from lightning.pytorch import callbacks as pl_callbacks  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

import dpbridge  # noqa: E402
from dpbridge.lightning import PrivacyCallback  # noqa: E402
from dpbridge.private_forward import attached_to  # noqa: E402
from dpkernels.execution_plan import BandMFConfig, DPSGDConfig  # noqa: E402

# Advice of Lightning's: more workers, more logging, the callbacks that wrote a checkpoint.
pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

# A draw has at most eight examples but for once in forty: one size to compile for.
N, BATCH, EPOCH = 16, 4, 4


def make_data():
    x = torch.randn(N, 5, generator=torch.Generator().manual_seed(7))
    return TensorDataset(x, torch.arange(N) % 3)


def make_loader(data=None, batch_size=BATCH, **options):
    """Seeded, so that its draws are the same in each run."""
    generator = torch.Generator().manual_seed(3)
    return DataLoader(data or make_data(), batch_size, generator=generator, **options)


class Net(pl.LightningModule):
    """Has no forward, and calls the child that has all parameters."""

    def __init__(self, **optimizer):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 3))
        self.options = {"lr": 0.5, "momentum": 0.5} | optimizer
        self.seen = []

    def outputs(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append(len(x))
        loss = F.cross_entropy(self.outputs(x), y)
        self.log("loss", loss.detach())
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.outputs(x), y))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.outputs(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), **self.options)


class Whole(Net):
    """Has a forward, and calls itself."""

    def forward(self, x):
        return self.net(x)

    def outputs(self, x):
        return self(x)


def private(**options):
    defaults = {"noise_multiplier": 1.0, "l2_clip_norm": 0.5, "seed": 1, "self_check": False}
    return PrivacyCallback(**defaults | options)


def make_trainer(*callbacks, **options):
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(c, pl_callbacks.Checkpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **defaults | options)


def fit(module, callback=None, *others, loader=None, **options):
    """Fits, and returns the trainer."""
    trainer = make_trainer(callback or private(), *others, **options)
    trainer.fit(module, make_loader() if loader is None else loader)
    return trainer


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.fixture(scope="module")
def plain():
    """One fit of two epochs, for comparisons."""
    module, privacy = Whole(), private()
    return SimpleNamespace(trainer=fit(module, privacy), module=module, privacy=privacy)


def test_fit_makes_the_steps_of_the_unchanged_loop(plain):
    looped = Whole()
    model, optimizer, loader = dpbridge.make_private(
        looped.net,
        looped.configure_optimizers(),
        make_loader(),
        noise_multiplier=1.0,
        l2_clip_norm=0.5,
        epochs=2,
        seed=1,
        self_check=False,
    )
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert plain.trainer.global_step == plain.privacy.optimizer.ledger.steps == 2 * EPOCH
    assert torch.equal(weights(plain.module), weights(looped))


def test_module_without_a_forward_is_trained_by_its_only_child(plain):
    module = Net()
    fit(module)
    assert torch.equal(weights(module), weights(plain.module))


def test_first_epoch_is_poisson_and_as_long_as_the_loader_was(plain):
    draws = plain.privacy.optimizer.plan.batch_selection_strategy
    assert draws.sampling_prob == BATCH / N
    assert len(plain.module.seen) == 2 * EPOCH
    assert len(set(plain.module.seen[:EPOCH])) > 1


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        pytest.param({"max_epochs": 3, "max_steps": 5}, 5, marks=pytest.mark.slow),
        ({"max_epochs": -1, "max_steps": 5}, 5),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6),
        ({"max_epochs": 2, "fast_dev_run": 2}, 2),
    ],
)
def test_plan_has_the_steps_that_the_trainer_makes(options, steps):
    privacy = private()
    trainer = fit(Net(), privacy, **options)
    assert trainer.global_step == steps
    assert privacy.optimizer.ledger.steps == steps
    assert privacy.optimizer.plan.iterations == steps


def test_fit_without_batches_makes_no_step():
    privacy = private()
    fit(Net(), privacy, limit_train_batches=0)
    with pytest.raises(RuntimeError, match=r"made by `Trainer\.fit`, got asked for before"):
        privacy.epsilon()


# Loaders


class Data(pl.LightningDataModule):
    def __init__(self, make=make_loader):
        super().__init__()
        self.make = make

    def setup(self, stage):
        self.data = make_data()

    def train_dataloader(self):
        return self.make(self.data)

    def val_dataloader(self):
        return DataLoader(self.data, batch_size=20)


class WithLoader(Net):
    def setup(self, stage):
        self.data = make_data()

    def train_dataloader(self):
        return make_loader(self.data)


class OneCycle(WithLoader):
    """Asks for the loader before the optimizer is made."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def test_loader_is_taken_over_wherever_it_comes_from(plain):
    from_module, from_data = WithLoader(), Net()
    make_trainer(private()).fit(from_module)
    again = make_trainer(private(), reload_dataloaders_every_n_epochs=1)
    again.fit(from_data, datamodule=Data())
    assert from_module.seen == from_data.seen == plain.module.seen
    assert torch.equal(weights(from_module), weights(plain.module))
    assert torch.equal(weights(from_data), weights(plain.module))


@pytest.mark.slow
def test_limit_holds_when_the_loader_is_made_again():
    module = WithLoader()
    make_trainer(private(), reload_dataloaders_every_n_epochs=1, limit_train_batches=0.5).fit(
        module
    )
    assert len(module.seen) == EPOCH


def test_loader_asked_for_by_configure_optimizers_is_private_too(plain):
    module = OneCycle()
    make_trainer(private()).fit(module)
    assert module.seen == plain.module.seen


@pytest.mark.slow
def test_other_data_in_a_later_epoch_are_refused():
    trainer = make_trainer(private(), reload_dataloaders_every_n_epochs=1)
    data = Data(lambda _: make_loader(make_data()))
    with pytest.raises(NotImplementedError, match="a loader of the same dataset each time"):
        trainer.fit(Net(), datamodule=data)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(make_data())


@pytest.mark.parametrize(
    ("loader", "error", "text"),
    [
        (lambda: DataLoader(Stream(), BATCH), TypeError, "map-style dataset"),
        (
            lambda: DataLoader(make_data(), BATCH, sampler=WeightedRandomSampler([1.0] * N, N)),
            ValueError,
            "must sample uniformly",
        ),
        (lambda: make_loader(drop_last=True), ValueError, "got drop_last=True"),
        (lambda: make_loader(batch_size=20), ValueError, "at most the dataset's 16 examples"),
        (lambda: [make_loader(), make_loader()], NotImplementedError, "one DataLoader, got list"),
        (lambda: {"a": make_loader()}, NotImplementedError, "one DataLoader, got dict"),
        (lambda: [torch.ones(3, 5)], TypeError, "a torch DataLoader, got Tensor"),
    ],
)
def test_loader_that_cannot_be_drawn_from_is_refused(loader, error, text):
    with pytest.raises(error, match=text):
        fit(Net(), loader=loader())


# What the trainer is set to


class Clips(Net):
    def configure_gradient_clipping(self, optimizer, **options):
        raise AssertionError


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"gradient_clip_val": 1.0}, ValueError, r"`gradient_clip_val` .* set `l2_clip_norm`"),
        ({"overfit_batches": 2}, ValueError, "Use `limit_train_batches`"),
        (
            {"plugins": MixedPrecision("16-mixed", "cpu")},
            NotImplementedError,
            'a scaler .* pass precision="bf16-mixed"',
        ),
        ({"max_epochs": -1}, ValueError, "Set `max_epochs` or `max_steps`"),
        (
            {"accumulate_grad_batches": 2, "limit_train_batches": 3},
            ValueError,
            "a multiple of `accumulate_grad_batches`, 2, got 3",
        ),
    ],
)
def test_setting_that_would_break_the_guarantee_is_refused(options, error, text):
    with pytest.raises(error, match=text):
        fit(Net(), **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"devices": 2}, "must run on one device, got 2 with DDPStrategy"),
        ({"devices": 1, "strategy": "ddp"}, "must run on one device, got 1 with DDPStrategy"),
        ({"devices": 1, "num_nodes": 2}, "must run on one device, got 2 with DDPStrategy"),
    ],
)
def test_several_devices_are_refused(options, text):
    """As `fit` has it refused in each process that it starts."""
    privacy = private()
    with pytest.raises(NotImplementedError, match=text):
        privacy.setup(make_trainer(privacy, **options), Net(), "fit")


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (lambda: pl_callbacks.GradientAccumulationScheduler({0: 2}), "`accumulate_grad_batches`"),
        (lambda: pl_callbacks.LearningRateFinder(), "that is to be protected"),
        (lambda: pl_callbacks.BatchSizeFinder(), "Set `microbatch_size`"),
    ],
)
def test_callback_that_makes_other_steps_is_refused(other, text):
    with pytest.raises(NotImplementedError, match=text):
        make_trainer(private(), other()).fit(HasBatchSize(), datamodule=Data())


class HasBatchSize(Net):
    batch_size = BATCH


def test_tuner_is_refused():
    tuner = pl.tuner.Tuner(make_trainer(private()))
    with pytest.raises(NotImplementedError, match="must not hold a LearningRateFinder"):
        tuner.lr_find(Net(), make_loader())


def test_clipping_by_the_module_is_refused():
    with pytest.raises(ValueError, match="`configure_gradient_clipping` must be left as it is"):
        fit(Clips())


def test_trainer_of_the_other_package_is_refused():
    other = SimpleNamespace()
    with pytest.raises(TypeError, match=r"Import Lightning as lightning\.pytorch"):
        private().setup(other, Net(), "fit")


def test_two_callbacks_are_refused():
    """By Lightning, because both would have their state in one place."""
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        fit(Net(), private(), private())


def test_a_second_fit_is_refused():
    privacy = private()
    trainer = fit(Net(), privacy, max_steps=1)
    with pytest.raises(RuntimeError, match="a second one after 1 steps"):
        trainer.fit(Net(), make_loader())


def test_fit_that_failed_before_its_first_step_can_be_made_again():
    privacy = private()
    with pytest.raises(ValueError, match="gradient_clip_val"):
        fit(Net(), privacy, gradient_clip_val=1.0)
    assert fit(Net(), privacy, max_steps=1).global_step == 1


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"l2_clip_norm": 1.0}, TypeError, "`epsilon` or `noise_multiplier` must be given"),
        ({"noise_multiplier": 1.0}, TypeError, "`l2_clip_norm` must be given"),
        ({"epsilon": 1.0, "l2_clip_norm": 1.0}, TypeError, "`delta` must be given"),
        ({"noise_multiplier": -1.0, "l2_clip_norm": 1.0}, ValueError, "noise_multiplier"),
        ({"noise_multiplier": 1.0, "l2_clip_norm": 0.0}, ValueError, "l2_clip_norm"),
        (
            {"noise_multiplier": 1.0, "l2_clip_norm": 1.0, "microbatch_size": 0},
            ValueError,
            "microbatch_size",
        ),
        ({"noise_multiplier": 1.0, "l2_clip_norm": 1.0, "delta": 2.0}, ValueError, "delta"),
        (
            {"noise_multiplier": 1.0, "l2_clip_norm": 1.0, "loss_reduction": "none"},
            ValueError,
            "loss_reduction",
        ),
        (
            {"noise_multiplier": 1.0, "l2_clip_norm": 1.0, "regularizer": 1e-3},
            TypeError,
            "`regularizer` must be callable",
        ),
        ({"plan": 3}, TypeError, "`plan` must be a DPExecutionPlan, got int"),
        (
            {"plan": 3, "l2_clip_norm": 1.0},
            TypeError,
            "`l2_clip_norm` must be left out with `plan`",
        ),
    ],
)
def test_argument_that_makes_no_sense_is_refused_at_once(arguments, error, text):
    with pytest.raises(error, match=text):
        PrivacyCallback(**arguments)


# What is spent


@pytest.mark.slow
def test_epsilon_is_in_the_progress_bar_and_the_logger(tmp_path):
    module, privacy = Net(), private(delta=1e-3)
    trainer = fit(module, privacy, logger=CSVLogger(tmp_path), log_every_n_steps=2)
    assert trainer.progress_bar_metrics["epsilon"] == pytest.approx(privacy.epsilon())
    assert trainer.callback_metrics["epsilon"] == pytest.approx(privacy.epsilon())
    with open(f"{trainer.logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    logged = {int(row["step"]) + 1: float(row["epsilon"]) for row in rows if row["epsilon"]}
    ledger = privacy.optimizer.ledger
    expected = {step: ledger.epsilon_after(step, 1e-3) for step in (2, 4, 6, 8)}
    assert logged == pytest.approx(expected)


def test_without_a_delta_epsilon_is_not_logged_and_must_be_told_one():
    privacy = private()
    trainer = fit(Net(), privacy, max_steps=1)
    assert "epsilon" not in trainer.callback_metrics
    with pytest.raises(TypeError, match="`delta` must be given to the callback or to `epsilon`"):
        privacy.epsilon()
    assert privacy.epsilon(1e-3) > 0


def epsilon_of(steps):
    return DPSGDConfig(iterations=steps, sampling_prob=0.25, noise_multiplier=1.0).epsilon(1e-3)


@pytest.mark.parametrize("options", [{"min_epochs": 2}, pytest.param({}, marks=pytest.mark.slow)])
def test_training_stops_at_the_budget(options):
    module, privacy = Net(), private(epsilon=epsilon_of(3) * 1.001, delta=1e-3)
    trainer = fit(module, privacy, **options)
    assert trainer.global_step == privacy.optimizer.ledger.steps == 3
    assert privacy.epsilon() == pytest.approx(epsilon_of(3))


@pytest.mark.slow
def test_run_that_is_resumed_at_its_budget_makes_no_step(tmp_path):
    def privacy():
        return private(epsilon=epsilon_of(3) * 1.001, delta=1e-3)

    module, path = Net(), tmp_path / "spent.ckpt"
    trainer = fit(module, privacy())
    trainer.save_checkpoint(path)
    other, again = Net(), privacy()
    resumed = make_trainer(again)
    resumed.fit(other, make_loader(), ckpt_path=path)
    assert resumed.global_step == again.optimizer.ledger.steps == 3
    assert torch.equal(weights(other), weights(module))


@pytest.mark.slow
def test_early_stopping_by_others_is_theirs():
    stop = pl_callbacks.EarlyStopping("loss", patience=1, stopping_threshold=100.0)
    privacy = private()
    assert fit(Net(), privacy, stop).global_step == EPOCH
    assert privacy.optimizer.ledger.steps == EPOCH


# Plans


@pytest.mark.slow
def test_plan_is_followed():
    plan = BandMFConfig.default(
        num_bands=2, iterations=8, expected_participations=2, noise_multiplier=1.0
    ).make()
    privacy = PrivacyCallback(plan=plan, self_check=False)
    assert fit(Net(), privacy).global_step == 8
    assert privacy.epsilon(1e-3) == pytest.approx(plan.epsilon(1e-3))


@pytest.mark.slow
def test_plan_ends_an_endless_fit():
    plan = DPSGDConfig(iterations=6, sampling_prob=0.25, noise_multiplier=1.0).make()
    privacy = PrivacyCallback(plan=plan, self_check=False)
    assert fit(Net(), privacy, max_epochs=-1).global_step == 6


def test_plan_of_too_few_iterations_is_refused():
    plan = DPSGDConfig(iterations=6, sampling_prob=0.25, noise_multiplier=1.0).make()
    with pytest.raises(ValueError, match="at least the 8 steps of the fit, got 6"):
        fit(Net(), PrivacyCallback(plan=plan))


# Checkpoints


class Scheduled(Whole):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def state_of(trainer, privacy):
    """What a run is, after its last step."""
    (optimizer,) = trainer.optimizers
    momentum = [state["momentum_buffer"] for state in optimizer.state.values()]
    return (
        weights(trainer.lightning_module),
        torch.cat([m.flatten() for m in momentum]),
        optimizer.param_groups[0]["lr"],
        optimizer.ledger.state_dict(),
        privacy.state_dict(),
        trainer.global_step,
        trainer.current_epoch,
    )


def assert_same_run(one, other):
    for mine, theirs in zip(one, other, strict=True):
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What a run is after eight steps, and where its checkpoints are."""
    folder = tmp_path_factory.mktemp("run")
    privacy = private(journal=folder / "journal.jsonl")
    saver = pl_callbacks.ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
    at_epochs = pl_callbacks.ModelCheckpoint(folder, "end-{epoch}", save_top_k=-1)
    trainer = fit(Scheduled(), privacy, saver, at_epochs)
    return state_of(trainer, privacy), folder


class SeesLedger(pl.Callback):
    """Notes how many steps are counted before any is made."""

    def on_train_start(self, trainer, pl_module):
        (optimizer,) = trainer.optimizers
        self.steps, self.position = optimizer.ledger.steps, optimizer.ledger.position


def assert_resumed(path, expected, journal=None):
    """Where it is resumed seeds are other ones: those of the checkpoint are to be used."""
    privacy, seen = private(seed=99, journal=journal), SeesLedger()
    trainer = make_trainer(privacy, seen)
    trainer.fit(Scheduled(), DataLoader(make_data(), BATCH), ckpt_path=path)
    assert_same_run(state_of(trainer, privacy), expected)
    return seen


@pytest.mark.parametrize("name", ["step=3", "step=4", "end-epoch=0"])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(uninterrupted, name):
    expected, folder = uninterrupted
    seen = assert_resumed(folder / f"{name}.ckpt", expected, folder / "journal.jsonl")
    assert seen.position < seen.steps == expected[5]  # All are counted from the beginning.


class Fails(Scheduled):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.global_step == 5:
            raise KeyError("a power cut")
        return loss


# Lightning says of this callback that it would go on from the last checkpoint.
@pytest.mark.filterwarnings("ignore:.*was called without a model", "ignore:.*is no last checkpoint")
def test_run_that_failed_in_a_step_makes_it_again(uninterrupted, tmp_path):
    with pytest.raises(KeyError, match="a power cut"):
        fit(Fails(), private(), pl_callbacks.OnExceptionCheckpoint(tmp_path, "cut"))
    assert_resumed(tmp_path / "cut.ckpt", uninterrupted[0])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of the first step of two."""
    folder = tmp_path_factory.mktemp("checkpoints")
    saver = pl_callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(Net(), private(), saver, max_steps=2)
    return torch.load(folder / "step=1.ckpt")


@pytest.mark.parametrize(
    ("change", "options", "error", "text"),
    [
        (lambda c: c["callbacks"].clear(), {}, RuntimeError, "must hold the loader's place beside"),
        (
            lambda c: c["callbacks"]["PrivacyCallback"].pop("version"),
            {},
            ValueError,
            "that of a PrivacyCallback of this release",
        ),
        (
            lambda c: c["optimizer_states"][0].pop("dpbridge"),
            {},
            ValueError,
            "without its ledger no epsilon holds",
        ),
        (lambda c: None, {"noise_multiplier": 2.0}, ValueError, "must be of this plan"),
    ],
)
def test_checkpoint_that_is_not_of_this_run_is_refused(
    checkpoint, tmp_path, change, options, error, text
):
    path, changed = tmp_path / "changed.ckpt", copy.deepcopy(checkpoint)
    change(changed)
    torch.save(changed, path)
    trainer = make_trainer(private(**options), max_steps=2)
    with pytest.raises(error, match=text):
        trainer.fit(Net(), make_loader(), ckpt_path=path)


# What is left as it was


def test_module_is_public_after_fit_and_its_keys_are_the_same(plain):
    module = plain.module
    assert list(module.state_dict()) == list(Whole().state_dict())
    assert "forward" not in vars(module)
    assert "forward" not in vars(module.net)
    assert "process_dataloader" not in vars(plain.trainer.strategy)
    module.train()
    F.cross_entropy(module(torch.ones(2, 5)), torch.zeros(2, dtype=torch.long)).backward()
    assert all(p.grad is not None for p in module.parameters())
    module.zero_grad()


@pytest.mark.slow
def test_module_is_public_after_an_error():
    module = Fails()
    with pytest.raises(KeyError, match="a power cut"):
        fit(module)
    assert "forward" not in vars(module)


class Watches(Whole):
    """Notes the validation loss and whether the module ran in torch."""

    def validation_step(self, batch, batch_idx):
        x, _ = batch
        assert not self.training
        torch.testing.assert_close(self(x), self.net(x), rtol=0, atol=0)
        super().validation_step(batch, batch_idx)


def test_validation_test_and_prediction_are_untouched():
    module, data = Watches(), Data()
    trainer = make_trainer(private())
    trainer.fit(module, datamodule=data)
    (validated,) = trainer.validate(module, datamodule=data, verbose=False)
    x, y = make_data().tensors
    with torch.no_grad():
        expected = float(F.cross_entropy(module.net(x), y))
    assert validated["val_loss"] == pytest.approx(expected)
    (tested,) = trainer.test(module, DataLoader(make_data(), 20), verbose=False)
    assert tested["val_loss"] == pytest.approx(expected)
    predicted = trainer.predict(module, DataLoader(make_data(), 20))
    torch.testing.assert_close(torch.cat(predicted), module.net(x).detach())


class Rates(Net):
    """Notes the learning rate of each step; one scheduler changes it each step, one each epoch."""

    def __init__(self):
        super().__init__()
        self.rates = []

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        by_step = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        by_epoch = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.3)
        return [optimizer], [{"scheduler": by_step, "interval": "step"}, by_epoch]

    def on_train_batch_start(self, batch, batch_idx):
        self.rates.append(self.optimizers().param_groups[0]["lr"])


def test_learning_rates_are_those_of_the_public_fit():
    module, public = Rates(), Rates()
    fit(module)
    make_trainer().fit(public, make_loader())
    assert module.rates == public.rates
    assert module.rates[4] == pytest.approx(0.5**4 * 0.3 * module.rates[0])


@pytest.mark.slow
def test_averages_and_monitors_of_lightning_work(tmp_path, plain):
    averaging = pl_callbacks.EMAWeightAveraging(decay=0.5)
    monitor = pl_callbacks.LearningRateMonitor()
    swa = pl_callbacks.StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    logger = CSVLogger(tmp_path)
    for others in ([averaging], [monitor, swa]):
        module, privacy = Whole(), private()
        fit(module, privacy, *others, logger=logger, log_every_n_steps=1)
        assert privacy.optimizer.ledger.steps == 8
        assert not torch.equal(weights(module), weights(plain.module))
        assert torch.isfinite(weights(module)).all()


# Precision, accumulation, manual optimization


class Typed(Whole):
    """Notes of which types its outputs are."""

    def outputs(self, x):
        found = self(x)
        self.dtypes = {*getattr(self, "dtypes", ()), found.dtype}
        return found


def test_mixed_precision_is_followed():
    module = Typed()
    trainer = fit(module, private(self_check=True), max_steps=1, precision="bf16-mixed")
    assert trainer.global_step == 1
    assert module.dtypes == {torch.bfloat16}
    assert weights(module).dtype == torch.float32
    assert not torch.equal(weights(module), weights(Whole()))
    assert torch.isfinite(weights(module)).all()


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("bf16-true", torch.bfloat16),
        pytest.param("16-true", torch.float16, marks=pytest.mark.slow),
        pytest.param("64-true", torch.float64, marks=pytest.mark.slow),
    ],
)
def test_true_precisions_are_followed(precision, dtype):
    module = Whole()
    # Not strict: the cotangents of the loop are promoted to float32.
    with jax.numpy_dtype_promotion("standard"):
        fit(module, max_steps=1, precision=precision)
    before = weights(Whole())
    assert weights(module).dtype == dtype
    assert not torch.equal(weights(module).float(), before.to(dtype).float())
    assert torch.isfinite(weights(module)).all()


@pytest.mark.parametrize("reduction", ["mean", pytest.param("sum", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_accumulated_batches_are_one_draw_clipped_and_scaled_as_one(reduction):
    """Half a batch, twice, and the loss that Lightning divides by 2."""

    class Summed(Whole):
        def training_step(self, batch, batch_idx):
            x, y = batch
            self.seen.append(len(x))
            return F.cross_entropy(self(x), y, reduction=reduction)

    whole, parts = Summed(lr=0.02), Summed(lr=0.02 * (1 if reduction == "mean" else 2))
    # Some gradients are longer than the norm, and some are not, and some only if they are doubled.
    options = {"noise_multiplier": 0.0, "l2_clip_norm": 1.5, "loss_reduction": reduction}
    privacy = [private(**options) for _ in range(2)]
    first = fit(whole, privacy[0])
    second = fit(
        parts, privacy[1], loader=make_loader(batch_size=BATCH // 2), accumulate_grad_batches=2
    )
    assert first.global_step == second.global_step == 8
    assert [sum(pair) for pair in zip(parts.seen[::2], parts.seen[1::2], strict=True)] == whole.seen
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-5, atol=1e-6)
    assert privacy[1].optimizer.plan.dp_event == privacy[0].optimizer.plan.dp_event


def test_accumulation_with_a_regularizer_is_refused():
    with pytest.raises(NotImplementedError, match="must be 1 with `regularizer`"):
        fit(Net(), private(regularizer=penalty), accumulate_grad_batches=2)


def penalty(module):
    return 0.1 * sum(p.square().sum() for p in module.parameters())


class Penalised(Whole):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + penalty(self)


@pytest.mark.slow
def test_regularizer_that_is_told_of_is_let_in(plain):
    module = Penalised()
    fit(module, private(regularizer=penalty))
    assert weights(module).norm() < weights(plain.module).norm()


def test_regularizer_that_is_not_told_of_is_refused():
    with pytest.raises(RuntimeError, match="for a penalty on the weights pass `regularizer`"):
        fit(Penalised())


class Manual(Whole):
    def __init__(self, way):
        super().__init__()
        self.automatic_optimization, self.way = False, way

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        if self.way == "loss":
            self.manual_backward(F.cross_entropy(self(x), y))
        else:
            optimizer.backward(x, y)
        optimizer.step()


@pytest.mark.parametrize("way", ["batch", pytest.param("loss", marks=pytest.mark.slow)])
def test_manual_optimization_makes_the_same_steps(way, plain):
    module = Manual(way)
    trainer = fit(module, private(loss_fn=nn.CrossEntropyLoss()))
    assert trainer.global_step == 2 * EPOCH
    torch.testing.assert_close(weights(module), weights(plain.module))


class Two(Manual):
    def configure_optimizers(self):
        return [torch.optim.SGD([p], 0.1) for p in self.net.parameters()]


def test_several_optimizers_are_refused():
    with pytest.raises(NotImplementedError, match="must return one optimizer, got 2"):
        fit(Two("loss"))


# Modules


class Parts(Net):
    def __init__(self):
        super().__init__()
        self.net, self.head = self.net[0], nn.Linear(3, 3)

    def outputs(self, x):
        return self.head(self.net(x))


def test_module_that_is_called_by_parts_is_refused():
    with pytest.raises(RuntimeError, match="a part of the model called by itself"):
        fit(Parts())


class Skips(Net):
    def training_step(self, batch, batch_idx):
        return None


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_step_without_a_loss_is_refused():
    """Whether a step is skipped would depend on the data."""
    with pytest.raises(RuntimeError, match="`step` must follow a call of `backward`"):
        fit(Skips())


class Metered(Net):
    def __init__(self):
        super().__init__()
        torchmetrics = pytest.importorskip("torchmetrics")
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(3, average="micro")
        self.right, self.losses = 0, []

    def training_step(self, batch, batch_idx):
        x, y = batch
        outputs = self.net(x)
        self.right += int((outputs.argmax(1) == y).sum())
        self.seen.append(len(x))
        self.accuracy(outputs, y)
        self.log("accuracy", self.accuracy, on_epoch=True)
        self.losses.append(F.cross_entropy(outputs, y))
        return self.losses[-1]


def test_metrics_and_lists_of_the_module_are_torchs_and_compile_nothing_again():
    module = Metered()
    lowered = []
    with pytest.MonkeyPatch.context() as patch:
        make = dpbridge.private_loop.ForwardProgram
        patch.setattr(
            dpbridge.private_loop,
            "ForwardProgram",
            lambda *args: lowered.append(args) or make(*args),
        )
        trainer = fit(module, max_epochs=1)
    assert trainer.callback_metrics["accuracy"] == pytest.approx(module.right / sum(module.seen))
    assert len(lowered) == 1


def test_batch_norm_is_refused_before_training():
    module = Net()
    module.net.append(nn.BatchNorm1d(3))
    with pytest.raises(NotImplementedError, match="must not mix examples, got BatchNorm1d"):
        fit(module)
    assert not module.seen


def test_batches_are_not_to_be_had_before_training():
    class Curious(WithLoader):
        def configure_optimizers(self):
            assert self.trainer.estimated_stepping_batches == 8
            next(iter(self.trainer.train_dataloader))

    with pytest.raises(RuntimeError, match="drawn once training starts"):
        make_trainer(private()).fit(Curious())


@pytest.mark.slow
def test_copy_of_the_module_in_training_is_public():
    class Copies(Whole):
        def on_train_batch_end(self, *_):
            assert attached_to(self) is not None
            assert attached_to(copy.deepcopy(self)) is None

    fit(Copies(), max_steps=1)
