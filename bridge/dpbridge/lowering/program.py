"""The boundary: a torch model and loss become the JAX program of one example's loss."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from dpbridge.lowering.interpreter import Tensor, evaluate
from dpbridge.lowering.table import Run

Arrays = Mapping[str, jax.Array]


@dataclass(frozen=True, eq=False)
class Program:
    """The loss of one example, as a JAX function of named arrays.

    Attributes:
        graph_module: The exported graph, all parameters and constants lifted to inputs.
        inputs: For each placeholder the name of its array, or None for a leaf of the example.
        constants: The torch tensors behind names that are not parameters of the model: buffers,
            and tensors that the model or the loss holds otherwise.
        messages: What may be wrong with an example, one line an entry of the second result;
            known once the program has been traced.
    """

    graph_module: torch.fx.GraphModule
    inputs: tuple[str | None, ...]
    constants: Mapping[str, torch.Tensor]
    messages: list[str]

    def __call__(
        self, arrays: Arrays, key: jax.Array, randomness: jax.Array, *leaves: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the scalar loss, and `(len(messages),)` bools that are True where all is well.

        Args:
            arrays: Parameters by their name in the model, and `constants` by theirs.
            key: PRNG key for dropout.
            randomness: Scalar bool; False makes dropout the identity.
            *leaves: The tensors of one example, with a leading axis of 1, in the order in which
                `jax.tree.leaves` gives those of the batch.
        """
        run = Run(key, randomness)
        waiting = iter(leaves)
        tensors = [
            Tensor.of(next(waiting)) if name is None else Tensor.of(arrays[name], _state(name))
            for name in self.inputs
        ]
        (loss,) = evaluate(self.graph_module, tensors, run)
        self.messages[:] = [message for _, message in run.requirements]
        held = [holds for holds, _ in run.requirements]
        return loss, jnp.stack(held) if held else jnp.ones((0,), bool)


def _state(name: str) -> str:
    return f"`{name}`, but as examples are independent, none can carry data to the next"


def lower(
    model: nn.Module,
    loss_fn: Callable[..., Any] | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Program:
    """Exports the training program of one example and prepares it for JAX.

    Args:
        model: Any module. Its training flags are kept.
        loss_fn: Called with the model's output and the last of `args`. None if the model returns
            the loss, or something with a `loss` attribute.
        args: One example: nested tuples, lists and dicts of tensors with a leading axis of 1, and
            bools, strings and None, which become part of the program.
        kwargs: Keywords of the model, likewise.

    Raises:
        ValueError: If the loss is not a scalar floating-point tensor.
        NotImplementedError: If forward branches on data, keeps state, or reaches a parameter by a
            way that its gradient cannot follow; when the program is traced, if an op has no rule.
    """
    _check_hooks(model)
    leaves, structure = jax.tree.flatten((args, dict(kwargs)), is_leaf=lambda leaf: leaf is None)
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))

    def loss_of(*example: torch.Tensor) -> Any:
        waiting = iter(example)
        filled = [next(waiting) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        return loss_of_example(model, loss_fn, *jax.tree.unflatten(structure, filled))

    exported = _export(_LossModule(model, loss_fn, loss_of), tensors)
    _check_scalar(exported)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state = {**exported.state_dict, **exported.constants}
    names = {id(tensor): name for name, tensor in reversed(parameters.items())}
    inputs: list[str | None] = []
    constants = {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT:
            inputs.append(None)
            continue
        tensor = state[spec.target]
        name = names.get(id(tensor))
        if name is None:
            _check_constant(spec, tensor, parameters)
            name = _constant_name(spec)
            constants[name] = tensor
        inputs.append(name)
    return Program(exported.graph_module, tuple(inputs), constants, [])


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


def loss_of_example(
    model: nn.Module,
    loss_fn: Callable[..., Any] | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Returns the loss as torch computes it."""
    if loss_fn is None:
        output = model(*args, **kwargs)
        return getattr(output, "loss", output)
    *inputs, target = args
    return loss_fn(model(*inputs, **kwargs), target)


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
        loss = self.loss_of(*leaves)
        self.rewritten.update(_restore(self, before))
        return loss


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
        ):
            exported = torch.export.export(module, tensors, strict=False)
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
    return exported


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


def _check_constant(
    spec: InputSpec, tensor: torch.Tensor, parameters: Mapping[str, nn.Parameter]
) -> None:
    """Refuses constants whose gradient torch would carry on to a parameter.

    torch.export detaches what it finds in lists and closures, so such a tensor is known by its
    memory alone. An attribute without a gradient of its own is the constant that it looks like.
    """
    reached = _path(spec)
    if tensor.grad_fn is None and not reached.startswith("lifted_tensor"):
        return
    for name, parameter in parameters.items():
        if tensor.grad_fn or (parameter.requires_grad and _memory(parameter) == _memory(tensor)):
            raise NotImplementedError(
                f"`{reached}` must be computed in forward from attributes of the modules, got a "
                f"tensor that was made before from a parameter (`{name}`?). Keep collections of "
                "parameters in nn.ParameterList or nn.ParameterDict."
            )


def _constant_name(spec: InputSpec) -> str:
    kind = spec.kind.name.lower().removesuffix("_tensor")
    if (spec.target or "").startswith("loss_fn."):
        return f"{kind} of the loss {_path(spec)}"
    return f"{kind} {_path(spec)}"


def _path(spec: InputSpec) -> str:
    return (spec.target or "").removeprefix("model.").removeprefix("loss_fn.")


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
