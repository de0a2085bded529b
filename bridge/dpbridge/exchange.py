"""Tensors across the bridge without copies: `to_jax`, `to_torch`, `jax2torch`.

JAX runs asynchronously on memory that torch may write to. So whoever hands torch's memory to a
JAX computation must call `finish` on a result of it before torch code runs again; `jax2torch`
and the optimizer do. `to_jax` alone cannot: see its docstring.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from dpbridge._compat import x64
from dpbridge.dtypes import to_jax_dtype

PyTree = Any

_INT32 = torch.iinfo(torch.int32)


def to_jax(tree: PyTree) -> PyTree:
    """Turns the tensors of a pytree into JAX arrays on the same device and the same memory.

    A tensor is copied only where JAX cannot read its memory as it lies: overlapping or gapped
    strides, a set conjugate or negative bit, or on the CPU an address that is not a multiple of 64.
    With JAX's 64-bit types off, int64 becomes int32 if every value fits.

    The arrays share memory with the tensors. Do not write to a tensor before every JAX
    computation on its array has finished (`jax.block_until_ready` on the results): JAX runs
    asynchronously and would read the new values. `jax2torch` waits by itself.

    Args:
        tree: A tensor, or nested tuples, lists, dicts or other pytrees of tensors. Leaves that are
            not tensors stay as they are. `requires_grad` is ignored: gradients end here.

    Returns:
        The same structure with `jax.Array` leaves.

    Raises:
        TypeError: If a tensor is not strided, or of a type JAX does not have.
        ValueError: If 64-bit types are off and a tensor is float64 or complex128, or int64 with
            a value beyond int32; or if JAX does not see the tensor's device.

    Example:
        >>> to_jax({"x": torch.arange(3.0)})["x"].tolist()
        [0.0, 1.0, 2.0]
    """
    return jax.tree.map(
        lambda leaf: _tensor_to_jax(leaf) if isinstance(leaf, torch.Tensor) else leaf, tree
    )


def to_torch(tree: PyTree) -> PyTree:
    """Turns the JAX arrays of a pytree into tensors on the same device and the same memory.

    On a GPU, torch's current stream waits for JAX; on the CPU, this call does. The tensor may be
    written to only if nothing else will read the array: JAX takes arrays to be immutable.

    Args:
        tree: A JAX array, or a pytree of them. Leaves that are not arrays stay as they are.

    Returns:
        The same structure with `torch.Tensor` leaves, without gradient.

    Raises:
        TypeError: If an array is a typed PRNG key, or of a type torch does not have.
        ValueError: If an array lies on several devices.

    Example:
        >>> to_torch(jnp.arange(3)).tolist()
        [0, 1, 2]
    """
    return jax.tree.map(
        lambda leaf: _array_to_torch(leaf) if isinstance(leaf, jax.Array) else leaf, tree
    )


def finish(results: PyTree) -> PyTree:
    """Returns `results` as tensors once no torch code can overtake the JAX work behind them.

    On the CPU this waits for JAX. On a GPU the host does not wait: torch's current stream does,
    which orders every later write of torch's behind the reads that made `results`.
    """
    return to_torch(results)


def jax2torch(fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Makes a JAX function callable on torch tensors, and differentiable by torch's autograd.

    Args:
        fn: A function of pytrees of arrays that returns a pytree of arrays. It is jitted.

    Returns:
        A function of the same pytrees with tensors in place of arrays. Leaves that are not
        tensors are passed on as they are, and their gradient is zero. Floating-point tensors get
        gradients, of first order only.

    Raises:
        TypeError: When called, if a tensor cannot cross (see `to_jax`).
        ValueError: When called, likewise.

    Example:
        >>> square_sum = jax2torch(lambda x: jnp.sum(x**2))
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> square_sum(x).backward()
        >>> x.grad.tolist()
        [2.0, 4.0]
    """

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def forward(structure: Any, wanted: tuple[bool, ...], *leaves: Any) -> Any:
        def of_wanted(*values: Any) -> PyTree:
            waiting = iter(values)
            merged = [next(waiting) if w else x for x, w in zip(leaves, wanted, strict=True)]
            args, kwargs = jax.tree.unflatten(structure, merged)
            return fn(*args, **kwargs)

        if not any(wanted):
            return of_wanted(), None
        return jax.vjp(of_wanted, *[x for x, w in zip(leaves, wanted, strict=True) if w])

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def backward(structure: Any, plain: tuple[Any, ...], pullback: Any, *grads: Any) -> Any:
        waiting = iter(grads)
        leaves = [
            next(waiting) if shape is None else np.zeros(shape, jax.dtypes.float0)
            for shape in plain
        ]
        return pullback(jax.tree.unflatten(structure, leaves))

    class Bridge(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, structure: Any, result: list[Any], *leaves: Any) -> Any:
            ctx.wanted = ctx.needs_input_grad[2:]
            # Backward may come outside of the caller's context, and from another thread.
            ctx.is_wide = jax.config.read("jax_enable_x64")
            arrays, ctx.pullback = forward(structure, ctx.wanted, *to_jax(leaves))
            flat, ctx.structure = jax.tree.flatten(arrays)
            ctx.plain = tuple(
                None if jnp.issubdtype(array.dtype, jnp.inexact) else array.shape for array in flat
            )
            result.append(ctx.structure)
            # JAX may keep an input's own memory for backward: torch must notice a write to it.
            ctx.save_for_backward(*[leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
            tensors = tuple(finish(flat))
            pairs = zip(tensors, ctx.plain, strict=True)
            ctx.mark_non_differentiable(*[tensor for tensor, shape in pairs if shape is not None])
            return tensors

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            _ = ctx.saved_tensors  # Raises if an input was written to since forward.
            floats = [grad for grad, shape in zip(grads, ctx.plain, strict=True) if shape is None]
            with x64(ctx.is_wide):
                arrays = iter(backward(ctx.structure, ctx.plain, ctx.pullback, *to_jax(floats)))
                found = finish([next(arrays) if wanted else None for wanted in ctx.wanted])
            return (None, None, *found)

    @functools.wraps(fn)
    def on_tensors(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree.flatten((args, kwargs))
        result: list[Any] = []
        tensors = Bridge.apply(structure, result, *leaves)
        return jax.tree.unflatten(result[0], tensors)

    return on_tensors


def _tensor_to_jax(tensor: torch.Tensor) -> jax.Array:
    if tensor.layout is not torch.strided:
        raise TypeError(
            f"A tensor must be strided to cross to JAX, got {tensor.layout}. Call .to_dense()."
        )
    kind = to_jax_dtype(tensor.dtype)
    plain = tensor.detach().resolve_conj().resolve_neg()
    if jax.dtypes.canonicalize_dtype(kind) != kind:
        plain = _narrow(plain)
    if not _is_dense(plain):
        plain = plain.contiguous()
    try:
        return jax.dlpack.from_dlpack(plain)
    except (RuntimeError, ValueError, BufferError) as error:
        raise ValueError(
            f"A tensor must be on a device that JAX sees, got {tensor.device} with JAX on "
            f"{', '.join(str(device) for device in jax.devices())}. Move the tensor, or install "
            "JAX for that device."
        ) from error


def _narrow(tensor: torch.Tensor) -> torch.Tensor:
    """Does what JAX would do with 64-bit types off, unless it would change a value."""
    fits = tensor.dtype == torch.int64 and (
        tensor.numel() == 0 or (tensor.min() >= _INT32.min and tensor.max() <= _INT32.max)
    )
    if not fits:
        raise ValueError(
            f"A tensor of {tensor.dtype} must keep its values in JAX, got 64-bit types turned off"
            f"{' and a value beyond int32' if tensor.dtype == torch.int64 else ''}. "
            'Call jax.config.update("jax_enable_x64", True), or cast the tensor.'
        )
    return tensor.to(torch.int32)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill a block of memory, in any order of the axes."""
    expected = 1
    axes = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(axis for axis in axes if axis[1] != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _array_to_torch(array: jax.Array) -> torch.Tensor:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        raise TypeError(
            "A PRNG key must be turned into its words to cross to torch, got a typed key. "
            "Pass jax.random.key_data(key)."
        )
    if len(array.devices()) > 1:
        raise ValueError(
            f"An array must lie on one device to cross to torch, got {len(array.devices())}. "
            "Gather it first."
        )
    return torch.utils.dlpack.from_dlpack(array)
