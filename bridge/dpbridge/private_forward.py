"""The unchanged loop: a model whose forward runs in JAX while it trains.

`attach` puts a `PrivateForward` in the place of a module's `forward`. In training it has the batch
run in JAX, and gives torch's autograd one node for it, whose backward hands on the cotangents.
"""

import copy
import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import nn

_IS_PLAIN: ContextVar[bool] = ContextVar("dpbridge_plain_forward", default=False)


@contextmanager
def plain_forward() -> Iterator[None]:
    """Gives a context in which every model runs in torch."""
    token = _IS_PLAIN.set(True)
    try:
        yield
    finally:
        _IS_PLAIN.reset(token)


class Runner(Protocol):
    """What runs a model in JAX."""

    @property
    def model(self) -> nn.Module: ...  # noqa: D102

    def forward(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Runs `original` for each example of a batch by itself."""
        ...

    def remove(self) -> None:
        """Gives the model its own forward back."""
        ...


class PrivateForward:
    """Stands in a module's `forward`.

    A copy or a pickle of the module has its own forward back: it is a public model.

    Args:
        module: The module.
        runner: What runs it in JAX.
    """

    def __init__(self, module: nn.Module, runner: Runner) -> None:
        self.module = module
        self.runner = runner
        self.was_replaced = "forward" in vars(module)
        self.original: Callable[..., Any] = module.forward
        functools.update_wrapper(self, self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs in JAX if the model is in training and gradients are on, and else in torch."""
        if not self._is_private():
            return self.original(*args, **kwargs)
        return self.runner.forward(self.original, args, kwargs)

    def _is_private(self) -> bool:
        is_plain = _IS_PLAIN.get() or torch.compiler.is_exporting() or not torch.is_grad_enabled()
        if is_plain or not self.runner.model.training:
            return False
        return any(parameter.requires_grad for parameter in self.module.parameters())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # The module's copy is in the memo before its attributes are copied.
        return _public_forward(*self._parts(lambda value: copy.deepcopy(value, memo)))

    def __reduce__(self) -> tuple[Any, ...]:
        return _public_forward, self._parts(lambda value: value)

    def _parts(self, copied: Callable[[Any], Any]) -> tuple[Any, ...]:
        own = copied(self.original) if self.was_replaced else None
        return copied(self.module), own

    def remove(self) -> None:
        """Gives the module its forward back."""
        del self.module.forward
        if self.was_replaced:
            self.module.forward = self.original


def _public_forward(module: nn.Module, replaced: Callable[..., Any] | None) -> Callable[..., Any]:
    return replaced or types.MethodType(type(module).forward, module)


def attached_to(model: nn.Module) -> PrivateForward | None:
    """Returns what stands in a model's `forward`, if it trains privately."""
    found = vars(model).get("forward")
    return found if isinstance(found, PrivateForward) else None


def attach(runner: Runner) -> list[PrivateForward]:
    """Puts a model's forward into JAX, and that of a module which has all of its parameters.

    Raises:
        ValueError: If it is there already.
    """
    modules = list(_entries(runner.model))
    if any(attached_to(module) for module in modules):
        raise ValueError(
            "`model` must be trained by one private optimizer, got one that is private already. "
            "Call dpbridge.make_public(model) first."
        )
    attached = [PrivateForward(module, runner) for module in modules]
    for forward in attached:
        forward.module.forward = forward
    return attached


def _entries(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the model, and as long as one child holds all parameters, that child."""
    everything = set(model.parameters())
    yield model
    while everything:
        children = [child for child in model.children() if set(child.parameters())]
        if len(children) != 1 or set(children[0].parameters()) != everything:
            return
        (model,) = children
        if not isinstance(model, (nn.ModuleList, nn.ModuleDict)):
            yield model


class Outputs(torch.autograd.Function):
    """One node of torch's graph: outputs that were computed elsewhere."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        anchor: torch.Tensor,
        compute: Callable[[], list[torch.Tensor]],
        receive: Callable[[dict[int, torch.Tensor]], None],
    ) -> tuple[torch.Tensor, ...]:
        outputs = tuple(compute())
        ctx.receive, ctx.is_spent = receive, False
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[x for x in outputs if not x.is_floating_point()])
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> Any:  # noqa: D102
        if ctx.is_spent:
            raise RuntimeError(
                "`backward` must go once through each forward of a private model, got a second "
                "time: its gradient would count twice. Add the losses up and call backward once."
            )
        ctx.is_spent = True
        ctx.receive({i: x for i, x in enumerate(cotangents) if x is not None})
        return None, None, None
