"""The training graph of one example's loss, by torch.export, and what that would let pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode


def export_loss(
    model: nn.Module,
    loss_fn: Callable[..., Any] | None,
    loss_of: Callable[..., Any],
    tensors: tuple[torch.Tensor, ...],
) -> ExportedProgram:
    """Exports `loss_of(*tensors)`, with what model and loss hold as further inputs.

    Raises:
        ValueError: If the loss is not a scalar floating-point tensor.
        NotImplementedError: If forward branches on data or keeps state, or if autocast or hooks
            on gradients would change what torch computes.
    """
    _check_no_autocast()
    _check_hooks(model)
    module = _LossModule(model, loss_fn, loss_of)
    exported = _export(module, tensors)
    _check_stateless(module, exported)
    _check_scalar(exported)
    return exported


def _check_no_autocast() -> None:
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        raise NotImplementedError(
            "torch.autocast must be off, got it on. Cast model and inputs instead."
        )


def _check_hooks(model: nn.Module) -> None:
    """Refuses hooks on gradients, which torch.export passes over."""
    hooked = [
        name
        for name, owner in [*model.named_modules(), *model.named_parameters()]
        if owner._backward_hooks or getattr(owner, "_backward_pre_hooks", None)
    ]
    if hooked:
        raise NotImplementedError(
            f"`{hooked[0]}` must have no backward hook: per-example gradients are computed in "
            "JAX, where it would not run. Remove the hook."
        )


class _LossModule(nn.Module):
    """Holds model and loss as submodules, so that export lifts the tensors of both."""

    def __init__(self, model: nn.Module, loss_fn: Any, loss_of: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn
        self.loss_of = loss_of
        self.training = model.training
        self.rewritten: set[str] = set()

    def forward(self, *leaves: torch.Tensor) -> Any:
        before = _attributes(self)
        with _kept_weights(self):
            loss = self.loss_of(*leaves)
        self.rewritten.update(_restore(self, before))
        return loss


@contextmanager
def _kept_weights(root: nn.Module) -> Iterator[None]:
    """Keeps the lists that recurrent layers have of their weights.

    They follow the stand-ins of the weights while those are traced, of which torch.export warns.
    """
    layers = [module for module in root.modules() if isinstance(module, nn.RNNBase)]
    kept = [(list(layer._flat_weights), list(layer._flat_weight_refs)) for layer in layers]
    try:
        yield
    finally:
        for layer, (weights, references) in zip(layers, kept, strict=True):
            layer._flat_weights, layer._flat_weight_refs = weights, references


def _attributes(root: nn.Module) -> dict[str, torch.Tensor]:
    """Returns buffers and plain tensor attributes of all modules, by their path."""
    return {
        f"{path}.{name}": value
        for path, module in root.named_modules()
        for name, value in [*vars(module).items(), *module.named_buffers(recurse=False)]
        if isinstance(value, torch.Tensor)
    }


def _restore(root: nn.Module, before: dict[str, torch.Tensor]) -> list[str]:
    """Undoes assignments to attributes, and returns which there were."""
    changed = [name for name, value in _attributes(root).items() if before.get(name) is not value]
    for name in changed:
        path, _, attribute = name.rpartition(".")
        if name in before:
            setattr(root.get_submodule(path), attribute, before[name])
        else:
            delattr(root.get_submodule(path), attribute)
    return changed


def _export(module: _LossModule, tensors: tuple[torch.Tensor, ...]) -> ExportedProgram:
    try:
        with (
            _replaced(nn.modules.transformer, "_detect_is_causal_mask", _no_causal_hint),
            _replaced(torch.Tensor, "register_hook", _no_tensor_hook),
            _replaced(nn.utils.rnn.PackedSequence, "__new__", _no_packing),
        ):
            return torch.export.export(module, tensors, strict=False)
    except RuntimeError as error:
        if _reads_data(error):
            raise NotImplementedError(
                f"The model must not branch on values of its data:\n{error}\n"
                "Use torch.where, or compute the branch outside forward."
            ) from error
        error.add_note(
            "dpbridge was exporting the model for one example, whose leading axis is 1. What "
            "torch.export cannot follow are .data, .numpy() and other ways around autograd."
        )
        raise


def _reads_data(error: RuntimeError) -> bool:
    # torch has no public name for what `.item()` on an example raises.
    by_name = type(error).__name__ == "DataDependentOutputException"
    return by_name or isinstance(error, GuardOnDataDependentSymNode)


@contextmanager
def _replaced(owner: Any, name: str, substitute: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, substitute)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _no_causal_hint(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
    """Keeps nn.TransformerEncoder from branching on the values of its mask.

    It looks whether the mask is causal only to choose a faster kernel; the mask itself is applied
    in either case.
    """
    return is_causal is True


def _no_tensor_hook(tensor: torch.Tensor, hook: Any) -> None:
    raise NotImplementedError(
        "The model must not register hooks on tensors: gradients are computed in JAX, where they "
        f"would not run, got {hook}. Write what it does into forward."
    )


def _no_packing(cls: type, *args: Any, **kwargs: Any) -> None:
    raise NotImplementedError(
        "The model must not pack sequences: how many of them go on is known only from the data. "
        "Pass them padded, and take what you need from the output."
    )


def _check_stateless(module: _LossModule, exported: ExportedProgram) -> None:
    placeholders = exported.graph.find_nodes(op="placeholder")
    specs = zip(placeholders, exported.graph_signature.input_specs, strict=True)
    read = {spec.target for node, spec in specs if node.users}
    kept = module.rewritten & (read | dict(module.named_buffers()).keys())
    if kept:
        raise NotImplementedError(
            f"`{min(kept).removeprefix('model.')}` must not carry data from one forward to the "
            "next, as examples are independent here, got an assignment to it in forward. Return "
            "the tensor instead."
        )


def _check_scalar(exported: ExportedProgram) -> None:
    (output,) = exported.graph.find_nodes(op="output")
    results = [
        result.meta["val"] if isinstance(result, torch.fx.Node) else result
        for result in output.args[0]
    ]
    if len(results) == 1 and _is_float_scalar(results[0]):
        return
    got = ", ".join(
        f"{result.dtype} of shape {tuple(result.shape)}"
        if isinstance(result, torch.Tensor)
        else repr(result)
        for result in results
    )
    raise ValueError(
        f"`loss_fn` must return one floating-point scalar for one example, got {got}. "
        "Use reduction='mean' or reduce the loss over all axes."
    )


def _is_float_scalar(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 0 and value.is_floating_point()
