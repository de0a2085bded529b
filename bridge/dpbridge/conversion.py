"""From a user's DataLoader to one that draws as a plan says."""

from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from dpbridge.plan_loader import PlanLoader
from dpkernels.execution_plan import DPExecutionPlan


def check_loader(loader: Any) -> None:
    """Raises unless Poisson sampling can take the place of how a loader samples.

    Raises:
        TypeError: If it is not a DataLoader over a map-style dataset.
        ValueError: If it samples in a way that would be lost.
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"`loader` must be a torch DataLoader, got {type(loader).__name__}. Pass one, or make "
            "a PlanLoader from a plan and a dataset."
        )
    if isinstance(loader.dataset, IterableDataset):
        raise TypeError(
            "`loader` must have a map-style dataset, got an IterableDataset, from which no "
            "example can be drawn by its index. Load it into a list, or write a Dataset."
        )
    sampler: Any = loader.sampler
    is_usual = type(loader.batch_sampler) is BatchSampler
    if not is_usual or type(sampler) not in (RandomSampler, SequentialSampler):
        raise ValueError(
            f"`loader` must sample uniformly, got {type(sampler).__name__} in "
            f"{type(loader.batch_sampler).__name__}, which private sampling takes the place of. "
            "Leave the sampler out; weigh the loss instead."
        )
    total = len(loader.dataset)  # type: ignore[arg-type]
    if getattr(sampler, "replacement", False) or len(sampler) != total:
        raise ValueError(
            f"`loader` must pass over all {total} examples once, got a "
            f"{type(sampler).__name__} that draws {len(sampler)}, perhaps with replacement. Leave "
            "the sampler out: each example is drawn by itself."
        )
    if loader.drop_last:
        raise ValueError(
            "`loader` must not drop examples, got drop_last=True. Leave it out: every draw has a "
            "size of its own."
        )


def private_loader_of(
    loader: DataLoader[Any],
    plan: DPExecutionPlan,
    *,
    accumulation_steps: int = 1,
    seed: int | None = None,
) -> PlanLoader:
    """Returns a loader of the plan's draws with all else as the user's has it.

    Args:
        loader: What `check_loader` has let pass.
        plan: Says how batches are drawn.
        accumulation_steps: As how many physical batches each draw is yielded.
        seed: Of the draws. By default one that the loader's own generator gives, if it has one.
    """
    generator = loader.generator or getattr(loader.sampler, "generator", None)
    if seed is None and generator is not None:
        words = torch.randint(2**32, (4,), generator=generator, device=generator.device)
        seed = sum(int(word) << 32 * i for i, word in enumerate(words))
    return PlanLoader(
        plan,
        loader.dataset,
        accumulation_steps=accumulation_steps,
        draws_per_pass=max(1, len(loader) // accumulation_steps),
        seed=seed,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
