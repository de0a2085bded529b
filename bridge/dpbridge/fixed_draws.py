"""Fixed numbers in place of drawn ones in torch: those that a lowered program takes too."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode  # where torch documents it

from dpbridge.lowering.draws import DRAWS, Draw, fixed_numbers
from dpbridge.lowering.interpreter import functional_op


class FixedDraws(TorchDispatchMode):
    """Makes ops that draw return what they return in a lowered program without randomness.

    >>> with FixedDraws():
    ...     bool(torch.rand(3).equal(torch.rand(3)))
    True
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func`, unless it draws."""
        draw = DRAWS.get(functional_op(func) or func)
        if draw is None:
            return func(*args, **(kwargs or {}))
        result = _empty_result(func, draw, args, dict(kwargs or {}))
        return result.copy_(draw.transform(_numbers(result, draw), *args))


def _empty_result(func: Any, draw: Draw, args: tuple[Any, ...], kwargs: Any) -> torch.Tensor:
    kwargs.pop("generator", None)
    if func._schema.is_mutable:
        result: torch.Tensor = args[0]
        return result
    tensors = [argument for argument in args if isinstance(argument, torch.Tensor)]
    if tensors:
        return torch.empty_like(torch.broadcast_tensors(*tensors)[0], **kwargs)
    if draw.is_integral:
        kwargs.setdefault("dtype", torch.int64)
    return torch.empty(args[-1], **kwargs)


def _numbers(result: torch.Tensor, draw: Draw) -> torch.Tensor:
    dtype, shape = draw.dtype(result.dtype), tuple(result.shape)
    positions = torch.arange(result.numel(), device=result.device)
    numbers: torch.Tensor = fixed_numbers(
        positions, shape, draw.standard, dtype, lambda x: x.to(dtype)
    )
    return numbers
