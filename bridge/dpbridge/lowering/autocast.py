"""`torch.autocast`: the state it is in, and the casts that torch makes under it.

What torch.export keeps has no casts of autocast in it, but each result has the type that torch
gives it there. The casts are made again from these types.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch.fx import GraphModule

from dpbridge.dtypes import to_jax_dtype
from dpbridge.lowering.table import Call, OpOverload

State = tuple[tuple[str, torch.dtype], ...]
"""The devices for which autocast is on, each with the type it casts to."""

_DEVICES = ("cpu", "cuda")
_HALVES = frozenset({jnp.dtype(jnp.float16), jnp.dtype(jnp.bfloat16)})
_SINGLE = jnp.dtype(jnp.float32)


def current() -> State:
    """Returns the state that torch is in.

    >>> with torch.autocast("cpu", dtype=torch.bfloat16):
    ...     current()
    (('cpu', torch.bfloat16),)
    """
    return tuple(
        (device, torch.get_autocast_dtype(device))
        for device in _DEVICES
        if torch.is_autocast_enabled(device)
    )


@contextmanager
def entered(state: State) -> Iterator[None]:
    """Gives a context in which torch is in that state.

    Casts of weights are not kept for the next op: those that torch.export makes of its stand-ins
    would stay in memory until the user's own block ends.
    """
    dtypes = dict(state)
    with ExitStack() as stack:
        for device in _DEVICES:
            is_on = device in dtypes
            if is_on or torch.is_autocast_enabled(device):
                stack.enter_context(
                    torch.autocast(device, dtypes.get(device), is_on, cache_enabled=False)
                )
        yield


def half_types(graph_module: GraphModule, state: State) -> frozenset[torch.dtype]:
    """Returns the types that autocast casts to anywhere in a graph exported in that state."""
    found = {dtype for _, dtype in state}
    for module in graph_module.modules():
        if isinstance(module, GraphModule):
            target = torch.ops.higher_order.wrap_with_autocast
            for node in module.graph.find_nodes(op="call_function", target=target):
                _, dtype, is_on, *_ = node.args
                found |= {dtype} if is_on else set()
    return frozenset(found)


def cast_operands(call: Call, operands: Any) -> Any:
    """Returns an op's operands in the types in which torch computes it under autocast."""
    target = call.node.target
    if not (call.run.autocast and isinstance(target, OpOverload) and target.namespace == "aten"):
        return operands  # An op that is not torch's own is given what there is.
    name = target._schema.name.removeprefix("aten::")
    kinds = {x.dtype for x in jax.tree.leaves(operands) if _is_float(x)}
    result, device = _result(call)
    if name in _RECURRENT and kinds <= {*_HALVES, _SINGLE}:
        # On a CPU torch.export says float32 of them, but the products within are of halves.
        half = call.run.autocast.get(device)
        return operands if half is None else _cast(operands, kinds, to_jax_dtype(half))
    if kinds <= {result}:
        return operands
    if result in _HALVES and name in _LOWER_PRECISION:
        return _cast(operands, kinds, result)
    if kinds & _HALVES and _SINGLE in {*kinds, result}:
        return _cast(operands, _HALVES, _SINGLE)
    return operands


def _result(call: Call) -> tuple[Any, str]:
    """Returns the type of the op's first floating-point result, if any, and the device."""
    results = call.result if isinstance(call.result, (tuple, list)) else [call.result]
    tensors = [result for result in results if isinstance(result, torch.Tensor)]
    floats = [to_jax_dtype(tensor.dtype) for tensor in tensors if tensor.is_floating_point()]
    return next(iter(floats), None), tensors[0].device.type if tensors else ""


def _cast(operands: Any, kinds: Any, kind: Any) -> Any:
    return jax.tree.map(
        lambda x: x.astype(kind) if _is_float(x) and x.dtype in kinds else x, operands
    )


def _is_float(value: Any) -> bool:
    return isinstance(value, jax.Array) and bool(jnp.issubdtype(value.dtype, jnp.floating))


_RECURRENT = frozenset(
    f"{layer}{kind}" for layer in ("lstm", "gru", "rnn_tanh", "rnn_relu") for kind in ("", "_cell")
)

# Those of https://docs.pytorch.org/docs/stable/amp.html for a CPU and for CUDA, and what torch
# makes of them.
_LOWER_PRECISION = frozenset(
    {
        *("matmul", "mm", "bmm", "mv", "addmm", "addmv", "addr", "baddbmm", "addbmm"),
        *("linear", "einsum", "linalg_matmul", "linalg_multi_dot", "linalg_vecdot", "chain_matmul"),
        *("inner", "tensordot", "bilinear"),
        *("conv1d", "conv2d", "conv3d", "conv_tbc", "convolution", "_convolution"),
        *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        *("scaled_dot_product_attention", "prelu"),
    }
)
