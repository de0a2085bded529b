"""`make_private`: a model, an optimizer and a loader, made to train privately."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from dpbridge.config import DPConfig
from dpbridge.optimizer import DPOptimizer
from dpbridge.plan_loader import PlanLoader


def make_private(
    model: nn.Module,
    optimizer: Optimizer,
    loader: DataLoader[Any],
    *,
    config: DPConfig,
    loss_fn: Callable[..., Any] | None = None,
) -> tuple[nn.Module, DPOptimizer, PlanLoader]:
    """Makes a training run private.

    The loop iterates over the loader that is returned, and calls `optimizer.backward(x, y)` in
    place of the model, the loss and `loss.backward()`. The loader keeps dataset, `collate_fn` and
    workers of the one given, and draws batches as the config says: as many an epoch as the one
    given, and `config.gradient_accumulation_steps` of them for each step.

    Args:
        model: The module; it is returned as it is.
        optimizer: Any torch optimizer over its parameters.
        loader: A loader over a map-style dataset, with the config's batch size.
        config: What the run may spend and do.
        loss_fn: As in `DPOptimizer`.

    Returns:
        The model, a `DPOptimizer` that refuses to go past `config.train_steps` and past
        `config.epsilon`, and a `PlanLoader`.

    Raises:
        TypeError: If an argument has the wrong type, or the dataset cannot be indexed.
        ValueError: If dataset or batch size are not those of the config, or the loader samples in
            a way that would be lost.

    Guarantees:
        Every step is a draw of the config's plan, and they spend at most `config.epsilon`.

    Example:
        >>> import torch
        >>> dataset = torch.utils.data.TensorDataset(torch.randn(100, 2), torch.randn(100, 1))
        >>> model = nn.Linear(2, 1)
        >>> config = DPConfig(
        ...     epsilon=2.0, delta=1e-3, clipping_norm=1.0, batch_size=10,
        ...     gradient_accumulation_steps=1, train_steps=5, train_size=100, noise_multiplier=1.0)
        >>> model, optimizer, loader = make_private(
        ...     model, torch.optim.SGD(model.parameters(), lr=0.1),
        ...     DataLoader(dataset, batch_size=10), config=config, loss_fn=nn.MSELoss())
        >>> for x, y in loader:
        ...     loss = optimizer.backward(x, y)
        ...     optimizer.step()
        >>> optimizer.epsilon(delta=1e-3) <= 2.0
        True
    """
    if not isinstance(config, DPConfig):
        raise TypeError(f"`config` must be a DPConfig, got {type(config).__name__}. Pass one.")
    _check_loader(loader, config)
    plan = config.make()
    private_loader = PlanLoader(
        plan,
        loader.dataset,
        accumulation_steps=config.gradient_accumulation_steps,
        draws_per_pass=max(1, len(loader) // config.gradient_accumulation_steps),
        seed=config.seed,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
    private_optimizer = DPOptimizer(
        optimizer,
        model,
        loss_fn=loss_fn,
        plan=plan,
        loader=private_loader,
        epsilon=config.epsilon,
        delta=config.delta,
    )
    return model, private_optimizer, private_loader


def _check_loader(loader: Any, config: DPConfig) -> None:
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"`loader` must be a torch DataLoader, got {type(loader).__name__}. Pass one, or make "
            "a PlanLoader from config.make() and a dataset."
        )
    if isinstance(loader.dataset, IterableDataset):
        raise TypeError(
            "`loader` must have a map-style dataset, got an IterableDataset, from which no "
            "example can be drawn by its index. Load it into a list, or write a Dataset."
        )
    is_usual = type(loader.batch_sampler) is BatchSampler
    if not is_usual or type(loader.sampler) not in (RandomSampler, SequentialSampler):
        raise ValueError(
            f"`loader` must sample uniformly, got {type(loader.sampler).__name__} in "
            f"{type(loader.batch_sampler).__name__}, which private sampling takes the place of. "
            "Leave the sampler out; weigh the loss instead."
        )
    if loader.drop_last:
        raise ValueError(
            "`loader` must not drop examples, got drop_last=True. Leave it out: every draw has a "
            "size of its own."
        )
    if len(loader.dataset) != config.train_size:  # type: ignore[arg-type]
        raise ValueError(
            f"`config.train_size` must be the size of the dataset, {len(loader.dataset)}, "  # type: ignore[arg-type]
            f"got {config.train_size}. Make the config for this dataset."
        )
    if loader.batch_size != config.batch_size:
        raise ValueError(
            f"`config.batch_size` must be that of the loader, {loader.batch_size}, got "
            f"{config.batch_size}. Make them equal."
        )
