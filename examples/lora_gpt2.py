"""Fine-tune a GPT-2 with LoRA adapters on text, with differential privacy.

The model is transformers' own, from a small random configuration, and the adapters are PEFT's. The
text are the help pages that every Python brings along (`help("FOR")`), cut into pieces of 32 bytes:
a piece is an example, and a byte a token. The loss is the one that the model computes of `labels`.

    python examples/lora_gpt2.py                     # epsilon 8
    python examples/lora_gpt2.py --epsilon 3 --rank 4
"""

import argparse
import time
from pydoc_data.topics import topics

import peft
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, random_split
from transformers import GPT2Config, GPT2LMHeadModel

import dpbridge

LENGTH = 32  # bytes
HELD_OUT = 512  # pieces
DELTA = 1e-5  # Well below one over the number of pieces.


def load_text(count: int, seed: int) -> list[Subset]:
    """Returns so many pieces of the help pages to train on, and others to test on."""
    words = " ".join(text for _, text in sorted(topics.items())).split()
    tokens = torch.tensor(list(" ".join(words).encode("ascii", "ignore")))
    pieces = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    rest = len(pieces) - count - HELD_OUT
    generator = torch.Generator().manual_seed(seed)
    return random_split(TensorDataset(pieces), [count, HELD_OUT, rest], generator)[:2]


def make_model(rank: int) -> nn.Module:
    """Returns a random GPT-2 of one layer with adapters, which alone are trainable."""
    config = GPT2Config(
        vocab_size=128,
        n_positions=LENGTH,
        n_embd=64,
        n_layer=1,
        n_head=4,
        initializer_range=0.2,  # What is random here stays so, and has to be large enough to use.
        bos_token_id=0,
        eos_token_id=0,
    )
    adapters = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
    )
    return peft.get_peft_model(GPT2LMHeadModel(config), adapters)


@torch.no_grad()
def mean_loss(model: nn.Module, data: Dataset) -> float:
    """Returns the next-token loss in nats a byte."""
    model.eval()
    losses = [
        model(input_ids=tokens, labels=tokens).loss.item()
        for (tokens,) in DataLoader(data, batch_size=HELD_OUT)
    ]
    model.train()
    return sum(losses) / len(losses)


def train(args: argparse.Namespace, model: nn.Module, train_data: Dataset) -> float:
    """Trains the adapters; returns the epsilon spent."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    # The generator and the seed make the run repeatable. Leave them out when privacy is at stake.
    generator = torch.Generator().manual_seed(args.seed)
    model, optimizer, loader = dpbridge.make_private(
        model,
        torch.optim.AdamW(trainable, lr=args.lr, weight_decay=0.0),
        DataLoader(train_data, batch_size=args.batch_size, shuffle=True, generator=generator),
        epsilon=args.epsilon,
        delta=DELTA,
        epochs=args.epochs,
        l2_clip_norm=1.0,
        seed=args.seed,
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(loader))
    for _ in range(args.epochs):
        for (tokens,) in loader:
            optimizer.zero_grad()
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            scheduler.step()
            if optimizer.ledger.steps % 16 == 0:
                print(f"step {optimizer.ledger.steps}: loss of the draw {loss.item():.3f}")
    dpbridge.make_public(model)
    return optimizer.epsilon(DELTA)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epsilon", type=float, default=8.0, help="target epsilon, such as 3 or 8")
    parser.add_argument("--examples", type=int, default=4096, help="pieces of text to train on")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-2)
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drop", type=float, default=1.0, help="by how much the loss is to fall")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    train_data, test_data = load_text(args.examples, args.seed)
    model = make_model(args.rank)
    model.print_trainable_parameters()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first, start = mean_loss(model, test_data), time.perf_counter()
    spent = train(args, model, train_data)
    last = mean_loss(model, test_data)
    moved = {name for name, p in model.named_parameters() if not p.equal(before[name])}

    print(f"trained {len(moved)} of {len(before)} tensors in {time.perf_counter() - start:.0f} s")
    print(f"held-out loss {first:.3f} before, {last:.3f} after, in nats a byte")
    print(f"epsilon {spent:.4f} at delta {DELTA:g}, target {args.epsilon:g}")
    if spent > args.epsilon:
        raise SystemExit("The epsilon spent is above the target.")
    if moved != {name for name in before if "lora_" in name}:
        raise SystemExit("Not the adapters, all of them and they alone, were trained.")
    if last > first - args.drop:
        raise SystemExit(f"The loss has fallen by less than {args.drop}.")


if __name__ == "__main__":
    main()
