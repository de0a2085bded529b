"""A JAX function under torch's autograd, for all that is not private training."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from dpbridge._compat import matmul_precision, x64
from dpbridge.dtypes import to_jax_dtype
from dpbridge.exchange import finish, to_jax
from dpbridge.lowering.jax_call import JaxCall, needs_wide

PyTree = Any


class TorchCall:
    """Runs a `JaxCall` on tensors, compiled, with first-order gradients.

    Unlike `jax2torch`, it does not go by the setting of the process: forward and backward have
    64-bit types if the call needs them.

    Args:
        call: The function.

    Attributes:
        call: The function.
    """

    def __init__(self, call: JaxCall) -> None:
        self.call = call
        self._forward = jax.jit(self._linearized, static_argnums=0)
        self._backward = jax.jit(_pulled_back, static_argnums=0)

    def __call__(self, key: jax.Array | None, tensors: Sequence[torch.Tensor]) -> PyTree:
        """Returns what the function returns, as tensors.

        Args:
            key: PRNG key, or None if the function takes none.
            tensors: In place of its arrays.

        Raises:
            ValueError: If an integer does not fit in the type that JAX computes in.
        """
        result: list[Any] = []
        wanted = tuple(torch.is_grad_enabled() and x.requires_grad for x in tensors)
        leaves = _Autograd.apply(self, key, wanted, result, *tensors)
        return jax.tree.unflatten(result[0], leaves)

    def forward(
        self, wanted: tuple[bool, ...], key: jax.Array | None, tensors: Sequence[torch.Tensor]
    ) -> tuple[PyTree, Any]:
        """Returns arrays, and what takes cotangents of them back to the wanted tensors."""
        result: tuple[PyTree, Any] = self._forward(wanted, key, *to_jax(tuple(tensors)))
        return result

    def backward(self, pullback: Any, plain: Any, grads: Sequence[torch.Tensor]) -> Any:
        """Returns the gradients of the wanted tensors; `plain` as in `_pulled_back`."""
        return self._backward(plain, pullback, *to_jax(tuple(grads)))

    def _linearized(
        self, wanted: tuple[bool, ...], key: jax.Array | None, *arrays: jax.Array
    ) -> tuple[PyTree, Any]:
        def of_wanted(*values: jax.Array) -> PyTree:
            waiting = iter(values)
            merged = [next(waiting) if w else x for x, w in zip(arrays, wanted, strict=True)]
            return self.call(key, merged)

        if not any(wanted):
            return of_wanted(), None
        return jax.vjp(of_wanted, *[x for x, w in zip(arrays, wanted, strict=True) if w])


def _pulled_back(plain: Any, pullback: Any, *grads: jax.Array) -> Any:
    """Applies a pullback; `plain` holds the tree structure of outputs, and shapes of integers."""
    structure, shapes = plain
    waiting = iter(grads)
    leaves = [
        next(waiting) if shape is None else np.zeros(shape, jax.dtypes.float0) for shape in shapes
    ]
    return pullback(jax.tree.unflatten(structure, leaves))


def _narrowed(tensor: torch.Tensor) -> torch.Tensor:
    """Does to a tensor what JAX does without 64-bit types, unless it would change a value."""
    if tensor.dtype != torch.int64:
        return tensor
    limits = torch.iinfo(torch.int32)
    if tensor.numel() and not limits.min <= tensor.min() <= tensor.max() <= limits.max:
        raise ValueError(
            "An integer must fit in int32 for a JAX function without 64-bit types, got one beyond. "
            "Check the input; with float64 parameters the function has 64-bit types."
        )
    return tensor.to(torch.int32)


class _Autograd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, torch_call: TorchCall, key: Any, wanted: Any, result: Any, *xs: Any
    ) -> Any:
        ctx.wide = needs_wide(to_jax_dtype(x.dtype) for x in xs)
        with x64(ctx.wide), matmul_precision():
            own = xs if ctx.wide else [_narrowed(x) for x in xs]
            arrays, ctx.pullback = torch_call.forward(wanted, key, own)
        flat, structure = jax.tree.flatten(arrays)
        result.append(structure)
        shapes = [None if jnp.issubdtype(x.dtype, jnp.inexact) else x.shape for x in flat]
        ctx.torch_call, ctx.wanted, ctx.plain = torch_call, wanted, (structure, tuple(shapes))
        # JAX may keep an input's own memory for backward: torch must notice a write to it.
        ctx.save_for_backward(*xs if any(wanted) else ())
        tensors = tuple(finish(flat))
        pairs = zip(tensors, shapes, strict=True)
        ctx.mark_non_differentiable(*[tensor for tensor, shape in pairs if shape is not None])
        return tensors

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        _ = ctx.saved_tensors  # Raises if an input was written to since forward.
        _, shapes = ctx.plain
        floats = [grad for grad, shape in zip(grads, shapes, strict=True) if shape is None]
        # Autograd may be in another thread, which does not know forward's settings.
        with x64(ctx.wide), matmul_precision():
            arrays = iter(ctx.torch_call.backward(ctx.pullback, ctx.plain, floats))
        found = finish([next(arrays) if wanted else None for wanted in ctx.wanted])
        return (None, None, None, None, *found)
