"""`check`: what will not work in private training, and what to put in its place, beforehand."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import torch
from torch import nn

from dpbridge.batches import Batch, take_apart
from dpbridge.check_layers import WRAPPERS, other_findings, replaceable_layers
from dpbridge.check_ops import STATE, TRACE_ERRORS, finding_of, op_findings, split, user_line
from dpbridge.findings import Finding, Report, ordered
from dpbridge.fix import fix, keeps_statistics
from dpbridge.lowering import autocast, loss_of_example, lower
from dpbridge.mechanism import GaussianMechanism
from dpbridge.private_gradient import PrivateGradient
from dpbridge.self_check import DropoutOff
from dpbridge.untouched import untouched

Loss = Callable[..., Any] | None

# What a user's forward may raise on one example that it does not raise on a batch.
_FORWARD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def check(model: nn.Module, *args: Any, loss_fn: Loss = None, **kwargs: Any) -> Report:
    """Says what `DPOptimizer` would refuse of a model, before training, all of it at once.

    If nothing is refused, the gradients of the compiled program are compared with torch's own on
    this batch, as at the first step of training. Behind a batch norm, the rest is looked at as if
    `dpbridge.fix` had replaced it. Where what comes after a refusal cannot be seen, a note says so.

    Nothing is trained. Model, loss module, batch and random numbers are as they were afterwards;
    meanwhile there is a second copy of all weights. What a note says of losses, and whether
    gradients agree, comes from the data without noise: it is not private.

    Args:
        model: The module, in the mode in which it will be trained.
        *args: As for `DPOptimizer.backward`: inputs of the model and, last, the target; or inputs
            alone if `loss_fn` is None. A few examples are enough.
        loss_fn: As for `DPOptimizer`.
        **kwargs: Keywords of the model.

    Returns:
        A report: `print` it, ask `report.ok`, or call `report.raise_if_not_ok()`.

    Raises:
        TypeError: If the model is no module, the loss is not callable or a leaf of the batch is
            neither a tensor nor a bool, string or None.
        ValueError: If the batch is empty, its leaves disagree on the first axis or lie on another
            device than the parameters.
        Exception: Whatever the model itself raises on this batch in torch.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> report = check(model, torch.ones(4, 4), torch.ones(4, 2), loss_fn=nn.MSELoss())
        >>> [(finding.what, finding.where) for finding in report.findings]
        [('BatchNorm1d', '1')]
    """
    _check_arguments(model, args, loss_fn)
    layers = replaceable_layers(model)
    rest = other_findings(model)
    if any(finding.blocks for finding in rest):
        return Report(ordered([*layers, *rest, _NOT_SEEN]))
    inner: Any = model.module if isinstance(model, WRAPPERS) else model
    batch = _own_batch(args, kwargs, next(inner.parameters()).device)
    is_fixed = any(keeps_statistics(module) for module in inner.modules())
    no_cache = autocast.entered(autocast.current())
    with untouched(inner, loss_fn, has_tensors=False), torch.enable_grad(), no_cache:
        try:
            inner = fix(inner, inplace=True)
        except NotImplementedError:
            return Report(ordered([*layers, *rest, _NOT_SEEN]))
        forward = _forward(inner, loss_fn, batch, is_fixed=is_fixed)
        with untouched(inner, loss_fn):
            findings = [*layers, *rest, *forward, *_program(inner, loss_fn, batch, forward)]
            if any(finding.blocks for finding in findings):
                return Report(ordered(findings))
            agree, more = _agreement(inner, loss_fn, batch)
            more += _together(inner, loss_fn, batch)
            return Report(ordered([*findings, *more]), agree)


_NOT_SEEN = Finding(
    "all that follows",
    "",
    "What is refused above keeps the rest of the model from being looked at",
    "Make the replacements and check again.",
    blocks=False,
)


def _check_arguments(model: Any, args: tuple[Any, ...], loss_fn: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be a torch.nn.Module, got {type(model).__name__}. Pass the module to "
            "be trained."
        )
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(
            f"`loss_fn` must be callable, got {loss_fn!r}. Pass a loss module or a function."
        )
    if loss_fn is not None and not args:
        raise TypeError(
            "`check` must be given the target last, got no positional argument. "
            "Call check(model, *inputs, target, loss_fn=loss_fn)."
        )


def _own_batch(args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> Batch:
    """Returns the batch in memory of its own, which a model may write to."""
    batch = take_apart(args, kwargs, device)
    if not batch.size:
        raise ValueError("A batch must hold examples to check, got none. Pass a few.")
    return dataclasses.replace(batch, tensors=tuple(x.detach().clone() for x in batch.tensors))


# What a forward and the exported program say


def _forward(model: nn.Module, loss_fn: Loss, batch: Batch, *, is_fixed: bool) -> list[Finding]:
    """Runs one example in torch: does that work, is its loss a scalar, what is written to?"""
    with untouched(model, loss_fn) as snapshot:
        try:
            loss = _loss(model, loss_fn, batch, 0)
        except _FORWARD_ERRORS as error:
            return [_failure(error, model, loss_fn, batch, is_fixed=is_fixed)]
        findings = [_state(owner, name) for owner, name in snapshot.written()]
        is_scalar = isinstance(loss, torch.Tensor) and loss.ndim == 0 and loss.is_floating_point()
        return findings if is_scalar else [*findings, _not_scalar(loss)]


def _program(
    model: nn.Module, loss_fn: Loss, batch: Batch, forward: list[Finding]
) -> list[Finding]:
    """Exports one example, and looks for ops that cannot be lowered."""
    kinds = {finding.what for finding in forward}
    if _FORWARD in kinds or (_LOSS in kinds and loss_fn is None):
        return [_NOT_SEEN]
    if loss_fn is not None and _LOSS in kinds:
        loss_fn = _Summed(loss_fn)
    try:
        program = lower(model, loss_fn, *batch.example(0))
    except _FORWARD_ERRORS as error:
        return [finding_of(error, _FORWARD), _NOT_SEEN]
    # What forward writes to is known by name already; ops know no more.
    return [op for op in op_findings(program) if not (forward and op.what == STATE)]


_FORWARD, _LOSS = "forward", "loss"


def _loss(model: nn.Module, loss_fn: Loss, batch: Batch, row: int | None = None) -> Any:
    tensors = [x.clone() for x in batch.tensors]
    own = batch.rebuild(tensors if row is None else [x[row : row + 1] for x in tensors])
    return loss_of_example(model, loss_fn, *own)


def _failure(
    error: Exception, model: nn.Module, loss_fn: Loss, batch: Batch, *, is_fixed: bool
) -> Finding:
    """Returns what it means that one example fails; raises if that is the user's own error."""
    try:
        _loss(model, loss_fn, batch)
    except _FORWARD_ERRORS:
        if not is_fixed:
            raise
        why = f"Forward fails where dpbridge.fix replaced layers: {split(str(error))[0]}"
        replacement = "Make it work without what only the replaced layers have."
    else:
        why = f"It runs on the batch, but not on one example: {split(str(error))[0]}"
        replacement = "Take the batch size from the input; let no op need several examples."
    return Finding(_FORWARD, user_line(error), why, replacement)


def _state(owner: nn.Module, name: str) -> Finding:
    why = "Forward writes to it, so that it carries data from one example to the next"
    replacement = "Compute it without state, or outside forward."
    return Finding(f"state of {type(owner).__name__}", name, why, replacement)


def _not_scalar(loss: Any) -> Finding:
    got = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
    if isinstance(loss, torch.Tensor):
        got = f"{loss.dtype} of {got}"
    why = f"The loss of one example must be one floating-point scalar, got {got}"
    return Finding(_LOSS, "", why, "Use reduction='mean', or reduce it over all axes.")


def _together(model: nn.Module, loss_fn: Loss, batch: Batch) -> list[Finding]:
    """Notes if the loss of two examples is neither mean nor sum of their losses alone."""
    if batch.size < 2:
        return []
    pair = dataclasses.replace(batch, tensors=tuple(x[:2] for x in batch.tensors), size=2)
    try:
        with DropoutOff(), torch.no_grad():
            both, *alone = (float(_loss(model, loss_fn, pair, row)) for row in (None, 0, 1))
    except _FORWARD_ERRORS as error:
        why = f"It runs on one example, but not on two: {split(str(error))[0]}"
        return [Finding(_FORWARD, user_line(error), why, _EACH_ALONE, blocks=False)]
    total = sum(alone)
    if not math.isfinite(both + total):
        return []
    is_wide = all(p.dtype in (torch.float32, torch.float64) for p in model.parameters())
    tolerance = 1e-3 if is_wide and not autocast.current() else 5e-2
    if any(math.isclose(both, x, rel_tol=tolerance, abs_tol=1e-6) for x in (total, total / 2)):
        return []
    why = (
        f"The loss of two examples together is {both:.4g}, the mean of theirs alone {total / 2:.4g}"
        ": they influence each other or have weights, or forward draws random numbers"
    )
    return [Finding("loss of a batch", "", why, _EACH_ALONE, blocks=False)]


_EACH_ALONE = "None, if that is meant: in private training each example is alone in its batch."


class _Summed(nn.Module):
    """A loss made scalar, to see the ops of one that is not."""

    def __init__(self, loss_fn: Callable[..., Any]) -> None:
        super().__init__()
        self.inner = loss_fn

    def forward(self, *args: Any) -> torch.Tensor:
        leaves = jax.tree.leaves(self.inner(*args))
        tensors = [leaf.float().sum() for leaf in leaves if isinstance(leaf, torch.Tensor)]
        return torch.stack([torch.zeros(()), *tensors]).sum()


def _agreement(model: nn.Module, loss_fn: Loss, batch: Batch) -> tuple[bool | None, list[Finding]]:
    """Does what `backward` does at the first step, its self-check included, and drops the sum."""
    trainable = {name: p for name, p in sorted(model.named_parameters()) if p.requires_grad}
    mechanism = GaussianMechanism(1.0, 1.0, float(batch.size))
    gradient = PrivateGradient(model, loss_fn, mechanism, 0, None, self_check=True)
    try:
        gradient.add(gradient.part_of(batch), trainable)
    except IndexError as error:
        return None, [finding_of(error, "batch")]
    except TRACE_ERRORS as error:
        # The self-check raises RuntimeError itself; JAX, when it runs out of memory, a subclass.
        is_disagreement = type(error) is RuntimeError
        return False if is_disagreement else None, [finding_of(error, "gradients")]
    finally:
        gradient.discard()
    return True, []
