"""The training graph of one example, by torch.export, and what that would let pass."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from dpbridge.lowering import autocast


def export_program(
    model: nn.Module,
    loss_fn: Callable[..., Any] | None,
    call: Callable[..., Any],
    tensors: tuple[torch.Tensor, ...],
) -> ExportedProgram:
    """Exports `call(*tensors)`, with what model and loss hold as further inputs.

    Raises:
        NotImplementedError: If forward branches on data or keeps state, or if hooks on gradients
            would change what torch computes.
    """
    _check_hooks(model)
    _check_not_scripted(model)
    module = _CallModule(model, loss_fn, call)
    with autocast.entered(autocast.current()):
        exported = _export(module, tensors)
    _check_no_generator(exported)
    _check_stateless(module, exported)
    return exported


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


def _check_not_scripted(model: nn.Module) -> None:
    scripted = [
        name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)
    ]
    if scripted:
        raise NotImplementedError(
            f"`{scripted[0] or 'model'}` must be a module in Python, got a torch.jit.ScriptModule. "
            "Use the module that it was made of."
        )


class _CallModule(nn.Module):
    """Holds model and loss as submodules, so that export lifts the tensors of both."""

    def __init__(self, model: nn.Module, loss_fn: Any, call: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn
        self.call = call
        self.training = model.training
        self.rewritten: set[str] = set()

    def forward(self, *leaves: torch.Tensor) -> Any:
        before = _attributes(self)
        with _draws_of_torch_alone():
            with _kept_weights(self):
                outputs = self.call(*leaves)
            self.rewritten.update(_restore(self, before))
        return outputs


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


@contextmanager
def _draws_of_torch_alone() -> Iterator[None]:
    """Refuses draws that the program would keep, the same for all examples and steps."""
    before = _random_states()
    yield
    for library, state in _random_states().items():
        if state != before[library]:
            raise NotImplementedError(
                f"The model must not draw from `{library}` in forward: its numbers would become "
                "part of the program, the same for all examples and steps. Draw with torch."
            )


def _random_states() -> dict[str, Any]:
    _, keys, position, *_ = np.random.get_state()
    return {"random": random.getstate(), "numpy.random": (position, np.asarray(keys).tobytes())}


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


def _export(module: _CallModule, tensors: tuple[torch.Tensor, ...]) -> ExportedProgram:
    try:
        with (
            _replaced(nn.modules.transformer, "_detect_is_causal_mask", _no_causal_hint),
            _replaced(torch.Tensor, "register_hook", _no_tensor_hook),
            _replaced(nn.utils.rnn.PackedSequence, "__new__", _no_packing),
            _replaced(torch, "manual_seed", _no_seed),
            # It branches on the values of parameters, only to raise an error.
            _replaced(torch.distributions.Distribution, "_validate_args", False),
        ):
            return torch.export.export(module, tensors, strict=False)
    except RuntimeError as error:
        # torch has no public name for this one either.
        if type(error).__name__ == "DynamicOutputShapeException":
            raise NotImplementedError(
                f"`{error}` is not supported: the shape of what it keeps for backward depends on "
                "the data. Write the model without it."
            ) from error
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


def _no_seed(seed: int) -> None:
    raise NotImplementedError(
        f"The model must not call torch.manual_seed in forward, got a seed of {seed}. There, "
        "numbers are drawn from the seed of the run, others for each example and step; draw "
        "outside forward what is to be the same."
    )


def _check_no_generator(exported: ExportedProgram) -> None:
    if any(isinstance(constant, torch.Generator) for constant in exported.constants.values()):
        raise NotImplementedError(
            "The model must not draw from a torch.Generator in forward: there, numbers are drawn "
            "from the seed of the run, others for each example and step. Leave out `generator`."
        )


def _check_stateless(module: _CallModule, exported: ExportedProgram) -> None:
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


def check_scalar(exported: ExportedProgram) -> None:
    """Raises ValueError unless the program computes one floating-point scalar."""
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
