"""Hugging Face's Trainer and accelerate around a private run, neither of them changed."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import dpbridge

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

N, BATCH, TIME, VOCABULARY, EPOCHS = 24, 12, 6, 19, 2  # two draws an epoch


class NextToken(nn.Module):
    """As small as a model can be that Trainer takes for one of transformers' own."""

    accepts_loss_kwargs = False

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids, labels=None, **kwargs):
        logits = self.head(self.table(input_ids).tanh())
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits.transpose(1, 2), labels), "logits": logits}


def make_model():
    torch.manual_seed(0)
    return NextToken()


def make_data():
    tokens = torch.randint(VOCABULARY, (N, TIME), generator=torch.Generator().manual_seed(7))
    labels = tokens.clone()
    labels[::2, 3:] = -100  # Half of the examples have half of the tokens.
    return [{"input_ids": x, "labels": y} for x, y in zip(tokens, labels, strict=True)]


def privately(model=None, seed=1):
    model = model or make_model()
    loader = DataLoader(
        make_data(),
        batch_size=BATCH,
        shuffle=True,
        collate_fn=transformers.default_data_collator,
        generator=torch.Generator().manual_seed(3),
    )
    return dpbridge.make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        loader,
        noise_multiplier=1.0,
        epochs=EPOCHS,
        l2_clip_norm=0.5,
        self_check=False,
        seed=seed,
    )


class SaveLoader(transformers.TrainerCallback):
    def __init__(self, loader):
        self.loader = loader

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        torch.save(self.loader.state_dict(), folder / "loader.pt")


def make_trainer(private, folder, *, callbacks=(), eval_dataset=None, **options):
    model, optimizer, loader = private

    class PrivateTrainer(transformers.Trainer):
        def get_train_dataloader(self):
            return loader

    defaults = {
        "num_train_epochs": EPOCHS,
        "dataloader_pin_memory": False,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = transformers.TrainingArguments(output_dir=str(folder), **{**defaults, **options})
    return PrivateTrainer(
        model=model,
        args=args,
        eval_dataset=eval_dataset,
        optimizers=(optimizer, None),
        callbacks=list(callbacks),
    )


def train_in_a_loop_of_ones_own():
    model, optimizer, loader = privately()
    for _ in range(EPOCHS):
        for batch in loader:
            optimizer.zero_grad()
            model(**batch)["loss"].backward()
            optimizer.step()
    return model


def assert_same_weights(model, expected):
    for (name, one), other in zip(
        model.state_dict().items(), expected.state_dict().values(), strict=True
    ):
        assert one.equal(other), name


def test_trainer_makes_the_steps_of_a_loop_of_ones_own(tmp_path):
    private = privately()
    # A norm that would clip whatever there is: p.grad is empty where Trainer looks for it.
    trainer = make_trainer(private, tmp_path, max_grad_norm=1e-6, logging_steps=1)
    trainer.train()
    model, optimizer, loader = private
    assert trainer.state.global_step == optimizer.ledger.steps == EPOCHS * len(loader)
    norms = {entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry}
    assert norms == {0.0}
    assert_same_weights(model, train_in_a_loop_of_ones_own())


@pytest.mark.slow
def test_trainer_evaluates_and_follows_its_schedule(tmp_path):
    private = privately()
    options = {"eval_strategy": "epoch", "logging_steps": 1, "lr_scheduler_type": "linear"}
    trainer = make_trainer(private, tmp_path, eval_dataset=make_data(), **options)
    trainer.train()
    history = trainer.state.log_history
    assert len([entry for entry in history if "eval_loss" in entry]) == EPOCHS
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])


class StopAfter(transformers.TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.steps


def checkpoint_of(tmp_path, steps):
    """Trains for so many steps, and returns where the checkpoint of the last is."""
    private = privately()
    callbacks = (SaveLoader(private[2]), StopAfter(steps))
    options = {"save_strategy": "steps", "save_steps": 1, "ignore_data_skip": True}
    make_trainer(private, tmp_path, callbacks=callbacks, **options).train()
    return tmp_path / f"checkpoint-{steps}"


@pytest.mark.parametrize("steps", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_trainer_resumes_to_what_it_would_have_been(tmp_path, steps):
    """After 1 step in the middle of an epoch, after 2 at its end."""
    checkpoint = checkpoint_of(tmp_path, steps)
    private = privately(seed=2)  # The seed of the noise comes with the checkpoint.
    private[2].load_state_dict(torch.load(checkpoint / "loader.pt"))
    trainer = make_trainer(private, tmp_path, ignore_data_skip=True)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert private[1].ledger.steps == EPOCHS * len(private[2])
    assert_same_weights(private[0], train_in_a_loop_of_ones_own())


def test_trainer_refuses_to_resume_without_the_loaders_state(tmp_path):
    checkpoint = checkpoint_of(tmp_path, 1)
    private = privately()
    trainer = make_trainer(private, tmp_path, ignore_data_skip=True)
    with pytest.raises(RuntimeError, match="load that of the loader too"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert private[1].ledger.steps == 1


def test_trainer_that_accumulates_is_refused(tmp_path):
    private = privately()
    trainer = make_trainer(private, tmp_path, gradient_accumulation_steps=2)
    with pytest.raises(RuntimeError, match=r"must be made on draw 1 of .*, got draw 2"):
        trainer.train()
    assert private[1].ledger.steps == 0


def test_trainer_that_counts_the_tokens_of_a_batch_is_refused(tmp_path):
    model = make_model()
    model.accepts_loss_kwargs = True
    private = privately(model)
    with pytest.raises(ValueError, match="must have the examples on axis 0 of every tensor"):
        make_trainer(private, tmp_path).train()
    assert private[1].ledger.steps == 0


@pytest.mark.slow
def test_trainer_in_half_precision_makes_the_steps_of_a_loop_under_autocast(tmp_path):
    """It wraps forward in autocast, and turns what that returns to float32."""
    private = privately()
    make_trainer(private, tmp_path, bf16=True).train()
    model, optimizer, loader = privately()
    for _ in range(EPOCHS):
        for batch in loader:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(**batch)["loss"]
            loss.backward()
            optimizer.step()
    assert private[1].ledger.steps == EPOCHS * len(private[2])
    assert_same_weights(private[0], model)
    single = train_in_a_loop_of_ones_own().state_dict()
    assert not all(single[name].equal(x) for name, x in private[0].state_dict().items())


def test_trainer_with_a_loader_of_its_own_is_refused(tmp_path):
    model, optimizer, _ = private = privately()
    args = make_trainer(private, tmp_path).args
    trainer = transformers.Trainer(
        model=model, args=args, train_dataset=make_data(), optimizers=(optimizer, None)
    )
    with pytest.raises(RuntimeError, match="must be made on draw 1 of the plan's loader"):
        trainer.train()
    assert optimizer.ledger.steps == 0


@pytest.mark.slow
def test_trainer_stops_where_the_plan_ends(tmp_path):
    private = privately()
    trainer = make_trainer(private, tmp_path, num_train_epochs=EPOCHS + 1)
    with pytest.raises(RuntimeError, match="The plan's batches are used up"):
        trainer.train()
    assert private[1].ledger.steps == EPOCHS * len(private[2])


def test_accelerate_makes_the_steps_of_a_loop_of_ones_own():
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(*privately())
    for _ in range(EPOCHS):
        for batch in loader:
            with accelerator.accumulate(model):
                optimizer.zero_grad()
                accelerator.backward(model(**batch)["loss"])
                accelerator.clip_grad_norm_(model.parameters(), 1e-6)
                optimizer.step()
    assert_same_weights(model, train_in_a_loop_of_ones_own())


def test_accelerate_that_accumulates_is_refused():
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, loader = accelerator.prepare(*privately())
    batches = iter(loader)
    with accelerator.accumulate(model):
        accelerator.backward(model(**next(batches))["loss"])
        optimizer.step()  # which accelerate leaves out
    loss = model(**next(batches))["loss"]
    with pytest.raises(RuntimeError, match="must be made on draw 1"):
        loss.backward()
