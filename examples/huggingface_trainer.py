"""Train a Hugging Face model privately with its own `Trainer`, which is not changed.

`Trainer` gets the optimizer that `make_private` returns through `optimizers`, and the loader
through `get_train_dataloader`, the method that it names for this. Epochs, learning rate schedule,
evaluation, logs and checkpoints are its own. The text are the help pages that every Python brings
along, byte by byte; the model is a GPT-2 from a small random configuration.

    python examples/huggingface_trainer.py           # epsilon 8
    python examples/huggingface_trainer.py --epsilon 3 --output folder

What is different from public training:

* `model.accepts_loss_kwargs = False`, or Trainer passes the number of tokens in the batch to the
  model, which would divide each example's loss by what others have; dpbridge refuses that.
* `gradient_accumulation_steps` stays 1: Trainer fetches all batches of a step before the first
  forward, which dpbridge refuses. To save memory pass `microbatch_size` to `make_private`.
* `bf16` and `fp16` stay off: the model computes in the type of its parameters.
* `label_smoothing_factor` and `compute_loss_func` compute the loss of the whole batch: it must be a
  mean over examples there, which no one can check. Leave them out where labels hold -100.
* `max_grad_norm` finds nothing to clip: gradients are clipped example by example, and there is
  none in `p.grad` before the step. The `grad_norm` in the logs is 0.
* A checkpoint of Trainer's lacks the state of the loader, which `SaveLoader` adds. Without it a
  resumed run is refused, because epsilon would not hold.
"""

import argparse
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch.utils.data import DataLoader
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import dpbridge

LENGTH = 32  # bytes of an example
HELD_OUT = 512  # examples
DELTA = 1e-5  # Well below one over the number of examples.


def load_text(count: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Returns so many pieces of the help pages to train on, and others to test on."""
    words = " ".join(text for _, text in sorted(topics.items())).split()
    tokens = torch.tensor(list(" ".join(words).encode("ascii", "ignore")))
    pieces = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))
    rows = [{"input_ids": piece, "labels": piece} for piece in pieces[order]]
    return rows[HELD_OUT : HELD_OUT + count], rows[:HELD_OUT]


def make_model() -> GPT2LMHeadModel:
    """Returns a random GPT-2 of one layer."""
    config = GPT2Config(
        vocab_size=128,
        n_positions=LENGTH,
        n_embd=64,
        n_layer=1,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    model.accepts_loss_kwargs = False
    return model


class SaveLoader(TrainerCallback):
    """Adds the loader's place in the plan to each of Trainer's checkpoints."""

    def __init__(self, loader: dpbridge.PlanLoader) -> None:
        self.loader = loader

    def on_save(self, args, state, control, **kwargs) -> None:  # noqa: D102
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        torch.save(self.loader.state_dict(), folder / "loader.pt")


def train(args: argparse.Namespace, output: Path) -> tuple[Trainer, dpbridge.DPOptimizer]:
    """Trains; returns the trainer and its optimizer."""
    train_data, test_data = load_text(args.examples, args.seed)
    model = make_model()
    # The generator and the seed make the run repeatable. Leave them out when privacy is at stake.
    generator = torch.Generator().manual_seed(args.seed)
    model, optimizer, loader = dpbridge.make_private(
        model,
        torch.optim.AdamW(model.parameters(), lr=args.lr),
        DataLoader(
            train_data,
            batch_size=args.batch_size,
            shuffle=True,
            collate_fn=default_data_collator,
            generator=generator,
        ),
        epsilon=args.epsilon,
        delta=DELTA,
        epochs=args.epochs,
        l2_clip_norm=1.0,
        seed=args.seed,
    )

    class PrivateTrainer(Trainer):
        def get_train_dataloader(self) -> dpbridge.PlanLoader:
            return loader

    trainer = PrivateTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output),
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,  # for its log alone
            per_device_eval_batch_size=HELD_OUT,
            dataloader_pin_memory=False,
            eval_strategy="epoch",
            save_strategy="epoch",
            logging_steps=10,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=args.seed,
        ),
        eval_dataset=test_data,
        optimizers=(optimizer, None),  # The schedule is Trainer's own.
        callbacks=[SaveLoader(loader)],
    )
    trainer.train()
    return trainer, optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epsilon", type=float, default=8.0, help="target epsilon, such as 3 or 8")
    parser.add_argument("--examples", type=int, default=4096, help="pieces of text to train on")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ceiling", type=float, default=3.4, help="loss to get below")
    parser.add_argument("--output", type=Path, help="where to put Trainer's checkpoints")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer, optimizer = train(args, args.output or Path(folder))
    steps, spent = trainer.state.global_step, optimizer.epsilon(DELTA)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    print(f"trained {steps} steps in {trainer.state.epoch:g} epochs")
    print(f"held-out loss {losses[-1]:.3f}, in nats a byte")
    print(f"epsilon {spent:.4f} at delta {DELTA:g}, target {args.epsilon:g}")
    if spent > args.epsilon:
        raise SystemExit("The epsilon spent is above the target.")
    if optimizer.ledger.steps != steps:
        raise SystemExit(f"The ledger has {optimizer.ledger.steps} steps, and Trainer {steps}.")
    if losses[-1] > args.ceiling:
        raise SystemExit(f"The loss is above {args.ceiling}.")


if __name__ == "__main__":
    main()
