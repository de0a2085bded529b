"""A JAX function inside a torch model: torch.export keeps it whole, and JAX calls it as it is."""

import functools
import itertools
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from dpbridge._compat import x64
from dpbridge.dtypes import to_jax_dtype, to_torch_dtype
from dpbridge.lowering.table import Call, register_lowering
from dpkernels.mixing import refuse_mixing

PyTree = Any
Outline = tuple[Any, list[jax.ShapeDtypeStruct]]

_WIDE = (jnp.dtype(jnp.float64), jnp.dtype(jnp.complex128))
_NARROW = {jnp.dtype(jnp.int64): jnp.int32, jnp.dtype(jnp.uint64): jnp.uint32}


class JaxCall:
    """A JAX function of a list of arrays, and a number by which an exported graph knows it.

    It is traced as JAX does by itself: with 64-bit types off, unless one of its arrays is float64
    or complex128. So `jnp.zeros(3)` is float32 in it, and an int64 array comes in as int32.

    Args:
        function: From a PRNG key or None, and a list of arrays, to a pytree of arrays.
        takes_key: Whether it is to be given a key.

    Attributes:
        takes_key: Whether it is to be given a key.
        handle: The number; valid in this process, for as long as this object lives.
    """

    def __init__(
        self, function: Callable[[jax.Array | None, list[Any]], PyTree], *, takes_key: bool
    ) -> None:
        self._function = function
        self._outlines: dict[Hashable, Outline] = {}
        self.takes_key = takes_key
        self.handle = next(_COUNT)
        _CALLS[self.handle] = self

    def __call__(self, key: jax.Array | None, arrays: Sequence[jax.Array]) -> PyTree:
        """Calls the function, inside a trace or not.

        Args:
            key: PRNG key, or None if it takes none.
            arrays: What it is called with. Integers that do not fit are cut off: check before.

        Raises:
            TypeError: If it returns what is no array, or one of a type torch does not have.
            NotImplementedError: If it returns state of Flax.
        """
        wide = needs_wide(array.dtype for array in arrays)
        own = list(arrays) if wide else [_narrowed(array) for array in arrays]
        with x64(wide):
            return jax.tree_util.tree_map_with_path(_output, self._function(key, own))

    def outline(self, tensors: Sequence[torch.Tensor]) -> Outline:
        """Returns tree structure and leaves' shapes of what it returns for one example.

        Raises:
            NotImplementedError: If the function, or its gradient with respect to the tensors that
                require one, may mix examples.
        """
        kind = tuple(
            (tuple(map(int, x.shape)), to_jax_dtype(x.dtype), x.requires_grad) for x in tensors
        )
        if kind not in self._outlines:
            with x64():
                self._outlines[kind] = self._traced(kind)
        return self._outlines[kind]

    def _traced(self, kind: tuple[Any, ...]) -> Outline:
        structs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in kind]
        is_wanted = [wanted for _, _, wanted in kind]
        key = fixed_key() if self.takes_key else None
        closed, result = jax.make_jaxpr(self, return_shape=True)(key, structs)
        refuse_mixing(closed, "apply_fn")
        if any(is_wanted):
            # The gradient may hold what the function does not: custom derivatives.
            gradient = functools.partial(_gradient_of_sum, self, is_wanted)
            refuse_mixing(jax.make_jaxpr(gradient)(key, structs), "apply_fn")
        leaves, structure = jax.tree.flatten(result)
        return structure, leaves


# A graph holds integers, not objects. Weak, so that a model that is dropped takes its calls along.
_CALLS: "weakref.WeakValueDictionary[int, JaxCall]" = weakref.WeakValueDictionary()
_COUNT = itertools.count()


def needs_wide(dtypes: Iterable[Any]) -> bool:
    """Returns whether JAX needs 64-bit types for these dtypes; integers alone do not."""
    return any(jnp.dtype(dtype) in _WIDE for dtype in dtypes)


def _gradient_of_sum(
    call: JaxCall, is_wanted: list[bool], key: jax.Array | None, arrays: list[jax.Array]
) -> Any:
    def floats(*values: jax.Array) -> list[jax.Array]:
        waiting = iter(values)
        merged = [next(waiting) if w else x for x, w in zip(arrays, is_wanted, strict=True)]
        leaves = jax.tree.leaves(call(key, merged))
        return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    wanted = [x for x, w in zip(arrays, is_wanted, strict=True) if w]
    outputs, pullback = jax.vjp(floats, *wanted)
    return pullback([jnp.ones_like(output) for output in outputs])


def has_torch_dtype(dtype: Any) -> bool:
    """Returns whether torch has tensors of a JAX dtype."""
    try:
        to_torch_dtype(dtype)
    except (KeyError, TypeError):  # A PRNG key's dtype is none of NumPy's.
        return False
    return True


def fixed_key() -> jax.Array:
    """Returns the key that stands for all others while torch and JAX are compared."""
    return jax.random.wrap_key_data(jnp.zeros(2, jnp.uint32), impl="threefry2x32")


def _narrowed(array: jax.Array) -> jax.Array:
    narrow = _NARROW.get(jnp.dtype(array.dtype))
    return array if narrow is None else array.astype(narrow)


def _output(path: tuple[Any, ...], leaf: Any) -> jax.Array:
    place = f"apply_fn(...){jax.tree_util.keystr(path)}"
    if "['batch_stats']" in place:
        raise NotImplementedError(
            f"`apply_fn` must return outputs alone, got state in `{place}`. Examples are "
            "independent, so none can change what the next one sees: leave `mutable` out, and "
            "use a norm without running statistics."
        )
    if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float, complex)):
        raise TypeError(
            f"`apply_fn` must return arrays, got {type(leaf).__name__} in `{place}`. Leave it out."
        )
    array = jnp.asarray(leaf)
    if not has_torch_dtype(array.dtype):
        raise TypeError(
            f"`apply_fn` must return arrays of a type that torch has, got {array.dtype} in "
            f"`{place}`. Cast it."
        )
    return array


@torch.library.custom_op("dpbridge::jax_call", mutates_args=())
def jax_call(handle: int, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Stands in an exported graph for the JAX function of that handle; torch cannot run it."""
    raise NotImplementedError(
        "An exported model with a JaxModule in it must be run by dpbridge, got a call of its graph "
        "in torch. Call the model itself."
    )


@jax_call.register_fake
def _outputs(handle: int, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    _, leaves = find_call(handle).outline(tensors)
    device = tensors[0].device if tensors else torch.device("cpu")
    return [
        torch.empty(leaf.shape, dtype=to_torch_dtype(leaf.dtype), device=device) for leaf in leaves
    ]


def find_call(handle: int) -> JaxCall:
    """Returns the call of a handle; raises RuntimeError if it is gone."""
    found = _CALLS.get(handle)
    if found is None:
        raise RuntimeError(
            f"`dpbridge.jax_call` must name a JaxModule of this process, got handle {handle}. "
            "Export the model in the process that runs it, and keep the model."
        )
    return found


@register_lowering(torch.ops.dpbridge.jax_call.default)
def _jax_call(call: Call, handle: int, tensors: Sequence[jax.Array]) -> list[jax.Array]:
    function = find_call(handle)
    if not needs_wide(array.dtype for array in tensors):
        for array in tensors:
            _require_narrow(call, array)
    key = _key(call) if function.takes_key else None
    leaves: list[jax.Array] = jax.tree.leaves(function(key, tensors))
    return leaves


def _require_narrow(call: Call, array: jax.Array) -> None:
    narrow = _NARROW.get(jnp.dtype(array.dtype))
    if narrow is not None:
        limits = jnp.iinfo(narrow)
        fits = (array >= int(limits.min)) & (array <= int(limits.max))
        call.require(fits, f"an integer is out of range for {limits.dtype}, which JAX computes in")


def _key(call: Call) -> jax.Array:
    drawn = call.key()
    words = jax.random.key_data(drawn)
    words = jnp.where(call.randomness, words, jnp.zeros_like(words))
    return jax.random.wrap_key_data(words, impl=jax.random.key_impl(drawn))
