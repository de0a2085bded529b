"""`make_private`: a model, an optimizer and a loader, made to train privately."""

import os
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dpbridge.budget import PrivacyBudget, needed_delta
from dpbridge.config import DPConfig
from dpbridge.conversion import check_loader, private_loader_of
from dpbridge.criterion import check_criterion
from dpbridge.foreign_gradients import Regularizer
from dpbridge.optimizer import DPOptimizer
from dpbridge.plan_loader import PlanLoader
from dpbridge.private_forward import attached_to
from dpbridge.private_loop import REDUCTIONS
from dpbridge.scaling import ScaledOptimizer
from dpkernels import _validate
from dpkernels.execution_plan import DPExecutionPlan, DPSGDConfig, PerformanceFlags


def make_private(
    model: nn.Module,
    optimizer: Optimizer | ScaledOptimizer,
    loader: DataLoader[Any],
    *,
    epsilon: float | None = None,
    delta: float | None = None,
    noise_multiplier: float | None = None,
    epochs: int | None = None,
    l2_clip_norm: float | None = None,
    plan: DPExecutionPlan | None = None,
    config: DPConfig | None = None,
    loss_reduction: str = "mean",
    regularizer: Regularizer | None = None,
    criterion: Callable[..., Any] | None = None,
    loss_fn: Callable[..., Any] | None = None,
    microbatch_size: int | None = None,
    self_check: bool = True,
    journal: str | os.PathLike[str] | None = None,
    seed: int | None = None,
) -> tuple[nn.Module, DPOptimizer, PlanLoader]:
    """Makes a training run private, and leaves its loop as it is.

    In training mode the model's forward then runs in JAX, for each example by itself, and
    `loss.backward()` carries the gradient of its outputs there, where the gradient of each example
    is clipped; `optimizer.step()` noises their sum and puts it into `p.grad`. In eval mode and
    under `torch.no_grad()` the model is what it was. The loader draws Poisson batches of the
    dataset: each example with probability batch_size / len(dataset), and as many batches an
    epoch as the loader given. `make_public` takes the model back.

    Say what is to be spent in one of four ways: `epsilon`, `delta`, `epochs` and `l2_clip_norm`;
    `noise_multiplier` in place of or beside `epsilon`; `plan`; or `config`.

    The loss is computed in torch, of the whole batch, and it must be a mean or a sum over
    examples. **A loss in which one example's value depends on others** (a contrastive loss, a
    class weight or `ignore_index` that changes what the mean divides by, statistics of the batch)
    **breaks the guarantee, and cannot be seen from its gradients.** Pass it as `criterion` to have
    it probed, or use `optimizer.backward(x, y)` in place of forward and backward, which runs the
    loss for each example by itself. Likewise a row of the inputs must be one example (no mixup),
    and where the model is called several times in a step, row i the same example each time.

    Args:
        model: The module; it is returned as it is, with the same class and `state_dict`.
        optimizer: Any torch optimizer over its parameters, or what `scale_then_privatize` makes.
        loader: A loader over a map-style dataset. Dataset, `collate_fn`, workers, `pin_memory`
            and generator are kept.
        epsilon: The most that may be spent, at `delta`. The noise is calibrated to it if
            `noise_multiplier` is not given.
        delta: In (0, 1); well below 1 / len(dataset).
        noise_multiplier: Standard deviation of the noise over `l2_clip_norm`.
        epochs: How many passes over the loader there will be.
        l2_clip_norm: Bound on the L2 norm of each example's gradient.
        plan: A plan, whose draws the loader then makes; `epsilon` and `delta` may limit it.
        config: What the run may spend and do.
        loss_reduction: "mean" or "sum": what the loss does over examples. The gradient has the
            scale that plain torch would give it.
        regularizer: Returns a scalar of the model's weights, whose gradient is added after the
            noise. A term of the loss on the weights is refused, unless it is this very one.
        criterion: The loss, `criterion(model(*inputs), target)`, to have it probed on a few
            examples for whether it mixes them. It is not kept.
        loss_fn: For `optimizer.backward`, as in `DPOptimizer`.
        microbatch_size: How many examples JAX works on at once in backward: a batch of any size
            then fits.
        self_check: As in `DPOptimizer`.
        journal: As in `DPOptimizer`.
        seed: Of noise and dropout, as in `DPOptimizer`; for tests alone.

    Returns:
        The model, a `DPOptimizer` and a `PlanLoader`.

    Raises:
        TypeError: If an argument has the wrong type, or arguments are missing or contradict each
            other, or the dataset cannot be indexed.
        ValueError: If an argument is out of range, the noise given spends more than `epsilon`,
            dataset or batch size are not those of the config, the loader samples in a way that
            would be lost, `criterion` mixes examples, or the model is private already.
        NotImplementedError: As `DPOptimizer`.

    Guarantees:
        Every step is a draw of the plan, each of its examples clipped by itself, and they spend at
        most `epsilon`, whatever the model does; if each row of inputs is one example, the same in
        all calls of a step, and each row of outputs affects the loss by itself.
        A gradient that reaches a parameter by another way raises.

    Example:
        >>> import torch
        >>> dataset = torch.utils.data.TensorDataset(torch.randn(100, 2), torch.randn(100, 1))
        >>> model = nn.Linear(2, 1)
        >>> model, optimizer, loader = make_private(
        ...     model, torch.optim.SGD(model.parameters(), lr=0.1),
        ...     DataLoader(dataset, batch_size=10),
        ...     epsilon=2.0, delta=1e-3, epochs=1, l2_clip_norm=1.0)
        >>> for x, y in loader:
        ...     optimizer.zero_grad()
        ...     loss = nn.functional.mse_loss(model(x), y)
        ...     loss.backward()
        ...     optimizer.step()
        >>> 1.5 < optimizer.epsilon(delta=1e-3) <= 2.0
        True
    """
    _validate.one_of("loss_reduction", loss_reduction, REDUCTIONS)
    if regularizer is not None and not callable(regularizer):
        raise TypeError(
            f"`regularizer` must be callable, got {regularizer!r:.80}. Pass a function of the "
            "model that returns a scalar."
        )
    check_loader(loader)
    given = {
        "epochs": epochs,
        "l2_clip_norm": l2_clip_norm,
        "noise_multiplier": noise_multiplier,
        "microbatch_size": microbatch_size,
    }
    accumulation_steps, seed_of_draws = 1, None
    if config is not None:
        _refuse("config", {**given, "epsilon": epsilon, "delta": delta, "plan": plan})
        _check_config(config, loader)
        plan, epsilon, delta = config.make(), config.epsilon, config.delta
        accumulation_steps, seed_of_draws = config.gradient_accumulation_steps, config.seed
    elif plan is not None:
        _refuse("plan", given)
    else:
        if microbatch_size is not None:
            hint = "Pass how many examples fit in memory at once, or None."
            microbatch_size = _validate.integer("microbatch_size", microbatch_size, hint, minimum=1)
        flags = PerformanceFlags(noise_seed=seed, microbatch_size=microbatch_size)
        numbers = _numbers(
            loader, epochs, l2_clip_norm, noise_multiplier, is_mean=loss_reduction == "mean"
        )
        plan = _within(numbers, epsilon, delta).make(flags)
    if criterion is not None:
        check_criterion(criterion, model, loader, is_mean=loss_reduction == "mean")
    private_loader = private_loader_of(
        loader, plan, accumulation_steps=accumulation_steps, seed=seed_of_draws
    )
    private_optimizer = DPOptimizer(
        optimizer,
        model,
        loss_fn=loss_fn,
        plan=plan,
        loader=private_loader,
        epsilon=epsilon,
        delta=None if epsilon is None else delta,
        self_check=self_check,
        journal=journal,
        seed=seed,
    )
    private_optimizer.take_over_forward(loss_reduction=loss_reduction, regularizer=regularizer)
    return model, private_optimizer, private_loader


def make_public(model: nn.Module) -> nn.Module:
    """Takes a model back from private training: its forward runs in torch again.

    Weights and ledger stay as they are. What backward has brought since the last step is dropped.

    Args:
        model: What `make_private` returned.

    Raises:
        TypeError: If it is not a module.
        ValueError: If it is not private.

    >>> make_public(nn.Linear(1, 1))
    Traceback (most recent call last):
    ValueError: `model` must be what make_private returned, got one that is public already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}. Pass one.")
    attached = attached_to(model)
    if attached is None:
        raise ValueError(
            "`model` must be what make_private returned, got one that is public already."
        )
    attached.runner.remove()
    return model


def _numbers(
    loader: DataLoader[Any],
    epochs: int | None,
    l2_clip_norm: float | None,
    noise_multiplier: float | None,
    *,
    is_mean: bool,
) -> DPSGDConfig:
    for name, value in (("epochs", epochs), ("l2_clip_norm", l2_clip_norm)):
        if value is None:
            raise TypeError(f"`{name}` must be given without a plan or config, got None. Pass it.")
    epochs = _validate.integer("epochs", epochs, "Pass how many passes there will be.", minimum=1)
    size, total = loader.batch_size or 1, len(loader.dataset)  # type: ignore[arg-type]
    if size > total:
        raise ValueError(
            f"`loader.batch_size` must be at most the dataset's {total} examples, got {size}. "
            "Make it smaller: it is the mean size of a draw."
        )
    return DPSGDConfig(
        iterations=epochs * len(loader),
        sampling_prob=size / total,
        noise_multiplier=noise_multiplier,
        l2_clip_norm=l2_clip_norm,
        normalize_by=float(size) if is_mean else 1.0,
    )


def _within(numbers: DPSGDConfig, epsilon: float | None, delta: float | None) -> DPSGDConfig:
    """Returns the numbers with the noise that `epsilon` needs."""
    if epsilon is None and numbers.noise_multiplier is None:
        raise TypeError(
            "`epsilon` or `noise_multiplier` must be given, got neither. Pass what may be spent."
        )
    if epsilon is None:
        return numbers
    budget = PrivacyBudget(epsilon, needed_delta(delta))
    if numbers.noise_multiplier is None:
        return numbers.calibrate(epsilon=budget.epsilon, delta=budget.delta)
    spent = numbers.epsilon(budget.delta)
    if spent > budget.epsilon:
        raise ValueError(
            f"`noise_multiplier` must keep within epsilon={epsilon:g}, got "
            f"{numbers.noise_multiplier!r}, which spends {spent:.6g}. Leave it out to have it "
            "calibrated."
        )
    return numbers


def _refuse(form: str, others: dict[str, Any]) -> None:
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise TypeError(
            f"`{given[0]}` must be left out with `{form}`, which says it, got "
            f"{others[given[0]]!r:.80}. Pass one form of what is to be spent."
        )


def _check_config(config: Any, loader: DataLoader[Any]) -> None:
    if not isinstance(config, DPConfig):
        raise TypeError(f"`config` must be a DPConfig, got {type(config).__name__}. Pass one.")
    total = len(loader.dataset)  # type: ignore[arg-type]
    if total != config.train_size:
        raise ValueError(
            f"`config.train_size` must be the size of the dataset, {total}, got "
            f"{config.train_size}. Make the config for this dataset."
        )
    if loader.batch_size != config.batch_size:
        raise ValueError(
            f"`config.batch_size` must be that of the loader, {loader.batch_size}, got "
            f"{config.batch_size}. Make them equal."
        )
