"""The boundary: a torch model, or its loss, becomes the JAX program of one example."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec

from dpbridge.lowering.autocast import State, current, half_types
from dpbridge.lowering.export import check_scalar, export_program
from dpbridge.lowering.interpreter import Tensor, evaluate
from dpbridge.lowering.table import Run

Arrays = Mapping[str, jax.Array]


@dataclass(frozen=True, eq=False)
class Program:
    """What is computed of one example, as a JAX function of named arrays.

    Attributes:
        graph_module: The exported graph, all parameters and constants lifted to inputs.
        inputs: For each placeholder the name of its array, or None for a leaf of the example.
        constants: The torch tensors behind names that are not parameters of the model: buffers,
            and tensors that the model or the loss holds otherwise.
        messages: What may be wrong with an example, one line an entry of the second result;
            known once the program has been traced.
        autocast: The state in which it was exported.
    """

    graph_module: torch.fx.GraphModule
    inputs: tuple[str | None, ...]
    constants: Mapping[str, torch.Tensor]
    messages: list[str]
    autocast: State = ()

    @property
    def half_types(self) -> frozenset[torch.dtype]:
        """The types to which `torch.autocast` casts, around forward or in it."""
        return half_types(self.graph_module, self.autocast)

    def __call__(
        self, arrays: Arrays, key: jax.Array, randomness: jax.Array, *leaves: jax.Array
    ) -> tuple[list[jax.Array], jax.Array]:
        """Returns the outputs, and `(len(messages),)` bools that are True where all is well.

        Args:
            arrays: Parameters by their name in the model, and `constants` by theirs.
            key: PRNG key for dropout.
            randomness: Scalar bool; False makes dropout the identity.
            *leaves: The tensors of one example, with a leading axis of 1, in the order in which
                `jax.tree.leaves` gives those of the batch.
        """
        run = Run(key, randomness, dict(self.autocast))
        waiting = iter(leaves)
        tensors = [
            Tensor.of(next(waiting))
            if name is None
            else Tensor.of(arrays[name], _state(name), of_example=False)
            for name in self.inputs
        ]
        outputs = evaluate(self.graph_module, tensors, run)
        self.messages[:] = [message for _, message in run.requirements]
        held = [holds for holds, _ in run.requirements]
        return list(outputs), jnp.stack(held) if held else jnp.ones((0,), bool)


def _state(name: str) -> str:
    return f"`{name}`, but as examples are independent, none can carry data to the next"


def lower(
    model: nn.Module,
    loss_fn: Callable[..., Any] | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Program:
    """Exports the loss of one example and prepares it for JAX.

    Args:
        model: Any module. Its training flags are kept, and the state of `torch.autocast`.
        loss_fn: Called with the model's output and the last of `args`. None if the model returns
            the loss, or something with a `loss` attribute.
        args: One example: nested tuples, lists and dicts of tensors with a leading axis of 1, and
            bools, strings and None, which become part of the program.
        kwargs: Keywords of the model, likewise.

    Returns:
        A program with the loss as its one output.

    Raises:
        ValueError: If the loss is not a scalar floating-point tensor.
        NotImplementedError: If forward branches on data, keeps state, or reaches a parameter by a
            way that its gradient cannot follow; if there are hooks on gradients; and, when the
            program is traced, if an op has no rule.

    >>> example = (torch.ones(1, 2), torch.ones(1, 1))
    >>> lower(nn.Linear(2, 1), nn.MSELoss(), example, {}).inputs
    ('weight', 'bias', None, None)
    """

    def loss_of(*args: Any, **kwargs: Any) -> Any:
        return loss_of_example(model, loss_fn, args, kwargs)

    exported = _export(model, loss_fn, loss_of, args, kwargs)
    check_scalar(exported)
    return _program(exported, model)


def lower_outputs(
    root: nn.Module,
    call: Callable[..., tuple[torch.Tensor, ...]],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Program:
    """Exports what `call` computes of one example; otherwise as `lower`.

    Args:
        root: Holds the parameters and buffers that `call` uses; they have their names from it.
        call: Returns tensors.
        args: One example, as in `lower`.
        kwargs: Likewise.
    """
    return _program(_export(root, None, call, args, kwargs), root)


def _export(
    model: nn.Module,
    loss_fn: Callable[..., Any] | None,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> ExportedProgram:
    leaves, structure = jax.tree.flatten((args, dict(kwargs)), is_leaf=lambda leaf: leaf is None)
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))

    def call_on_tensors(*example: torch.Tensor) -> Any:
        waiting = iter(example)
        filled = [next(waiting) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = jax.tree.unflatten(structure, filled)
        return call(*args, **kwargs)

    return export_program(model, loss_fn, call_on_tensors, tensors)


def _program(exported: ExportedProgram, model: nn.Module) -> Program:
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
    return Program(exported.graph_module, tuple(inputs), constants, [], current())


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
