"""`JaxModule`: a JAX model as a torch module, for plain training and for private."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from dpbridge._compat import x64
from dpbridge.exchange import to_jax, to_torch
from dpbridge.jax_autograd import TorchCall
from dpbridge.lowering.jax_call import JaxCall, fixed_key, has_torch_dtype

PyTree = Any
Path = tuple[Any, ...]


class JaxModule(nn.Module):
    """A JAX function of parameters and inputs, as a module with torch parameters.

    Whatever takes a module takes this one: torch optimizers, `nn.Sequential`, `state_dict`, `to`,
    `copy.deepcopy`. In private training JAX differentiates the function itself, example by
    example; everywhere else it runs compiled, under torch's autograd.

    A parameter is named by its path, as in `encoder.layers.0.kernel`. The level of a tree that is
    `{"params": ...}` and nothing else, as Flax makes it, is left out. What torch does not take as
    a name is changed: a dot becomes an underscore, and the name of a method gets one at its end.

    JAX computes with 64-bit types if a parameter or an input is float64 or complex128, and as it
    does by itself otherwise: an int64 tensor then comes in as int32, if its values fit.

    Args:
        apply_fn: Called as `apply_fn(params, *inputs, **kwargs)`; returns an array or a pytree of
            arrays, and no state. It must be what `jax.jit` can compile: pure, and without Python
            branches on values. In private training it sees each example alone, with a leading
            axis of 1, so that it cannot mix examples.
        params: A pytree of arrays: nested dicts, lists, dataclasses and what else is registered
            with JAX. They are copied. Floating-point arrays become parameters, others buffers.
        takes_key: Whether it is called as `apply_fn(params, key, *inputs, **kwargs)`, with a PRNG
            key for dropout and the like. In private training each example and step has a fresh
            one; otherwise it comes from torch's generator. In eval mode it is None.

    Raises:
        TypeError: If `apply_fn` is not callable, or a leaf is not an array that torch can hold.
        NotImplementedError: If the tree holds running statistics of Flax.

    Guarantees:
        In private training no example's output depends on another example.

    Example:
        >>> def apply_fn(params, x):
        ...     return jnp.tanh(x @ params["kernel"])
        >>> params = {"kernel": jnp.ones((3, 2))}
        >>> model = nn.Sequential(JaxModule(apply_fn, params), nn.Linear(2, 1))
        >>> [name for name, _ in model.named_parameters()]
        ['0.kernel', '1.weight', '1.bias']
        >>> model(torch.ones(4, 3)).shape
        torch.Size([4, 1])
    """

    def __init__(
        self, apply_fn: Callable[..., PyTree], params: PyTree, *, takes_key: bool = False
    ) -> None:
        super().__init__()
        if not callable(apply_fn):
            raise TypeError(
                f"`apply_fn` must be callable, got {type(apply_fn).__name__}. Pass a function of "
                "parameters and inputs, such as the `apply` of a Flax module."
            )
        _check_collections(params)
        leaves, structure = jax.tree_util.tree_flatten_with_path(params)
        tensors = [_tensor(path, leaf) for path, leaf in leaves]
        self._function = _Function(apply_fn, structure, bool(takes_key))
        self._names: tuple[str, ...] = ()  # Here already, so that no parameter takes its name.
        names = _Names(self)
        paths = [path for path, _ in leaves]
        if isinstance(params, Mapping) and set(params) == {"params"}:
            paths = [path[1:] for path in paths]
        self._names = tuple(map(names.add, paths, tensors))

    def params(self) -> PyTree:
        """Returns the parameters as the pytree of JAX arrays that they were made of.

        The arrays share memory with the parameters, as with `to_jax`: copy what shall outlive
        the next step of an optimizer.

        Raises:
                ValueError: If one is float64 and JAX's 64-bit types are off.
        """
        return jax.tree.unflatten(self._function.structure, to_jax(self._tensors()))

    def forward(self, *inputs: Any, **kwargs: Any) -> PyTree:
        """Calls `apply_fn` with the parameters and these inputs.

        Args:
            *inputs: Pytrees of tensors, and of bools, numbers and strings, which are settings:
                each value of one is compiled for itself.
            **kwargs: Likewise.

        Returns:
            What `apply_fn` returns, with tensors for arrays.

        Raises:
            TypeError: If a leaf is anything else, or `apply_fn` returns what is no array.
            ValueError: If an int64 tensor must become int32 and its values do not fit.
        """
        draws = self._function.takes_key and self.training
        torch_call, tensors = self._function.call_for(inputs, kwargs, draws=draws)
        tensors = [*self._tensors(), *tensors]
        if torch.compiler.is_exporting():
            structure, _ = torch_call.call.outline(tensors)
            outputs = torch.ops.dpbridge.jax_call(torch_call.call.handle, tensors)
            return jax.tree.unflatten(structure, outputs)
        return torch_call(_torch_key() if draws else None, tensors)

    def extra_repr(self) -> str:
        """Returns the name of the function."""
        name = getattr(self._function.apply_fn, "__qualname__", None)
        shown = name or type(self._function.apply_fn).__name__
        return f"{shown}, takes_key=True" if self._function.takes_key else shown

    def _tensors(self) -> list[torch.Tensor]:
        found = []
        for name in self._names:
            path, _, own = name.rpartition(".")
            found.append(getattr(self.get_submodule(path), own))
        return found


class _Function:
    """`apply_fn` on a list of arrays: one call for each structure and setting of its inputs."""

    def __init__(self, apply_fn: Callable[..., PyTree], structure: Any, takes_key: bool) -> None:
        self.apply_fn = apply_fn
        self.structure = structure
        self.takes_key = takes_key
        self._calls: dict[Hashable, TorchCall] = {}

    def __reduce__(self) -> Any:
        # Compiled functions stay behind.
        return _Function, (self.apply_fn, self.structure, self.takes_key)

    def __deepcopy__(self, memo: Any) -> "_Function":
        return _Function(self.apply_fn, self.structure, self.takes_key)

    def call_for(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, draws: bool
    ) -> tuple[TorchCall, list[torch.Tensor]]:
        """Returns the call for such inputs, and their tensors.

        Raises:
            TypeError: If a leaf is neither a tensor nor a setting.
        """
        leaves, structure = jax.tree_util.tree_flatten_with_path((args, kwargs))
        settings = tuple(_setting(path, leaf) for path, leaf in leaves)
        kind = structure, tuple((type(s), s) for s in settings), draws
        if kind not in self._calls:
            self._calls[kind] = TorchCall(self._call(structure, settings, draws))
        return self._calls[kind], [leaf for _, leaf in leaves if isinstance(leaf, torch.Tensor)]

    def _call(self, inputs: Any, settings: tuple[Any, ...], draws: bool) -> JaxCall:
        count = self.structure.num_leaves

        def function(key: jax.Array | None, arrays: list[jax.Array]) -> PyTree:
            params = jax.tree.unflatten(self.structure, arrays[:count])
            waiting = iter(arrays[count:])
            leaves = [next(waiting) if s is None else s for s in settings]
            args, kwargs = jax.tree.unflatten(inputs, leaves)
            first = (params, key) if self.takes_key else (params,)
            return self.apply_fn(*first, *args, **kwargs)

        return JaxCall(function, takes_key=draws)


class _Names:
    """Puts tensors into a module under the names of their paths."""

    def __init__(self, root: nn.Module) -> None:
        self._owners: dict[tuple[str, ...], tuple[nn.Module, str]] = {(): (root, "")}

    def add(self, path: Path, tensor: torch.Tensor) -> str:
        """Returns the name that the tensor got."""
        keys = tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path) or ("value",)
        owner, prefix = self._owner(keys[:-1])
        name = _free_name(owner, keys[-1])
        if tensor.is_floating_point() or tensor.is_complex():
            owner.register_parameter(name, nn.Parameter(tensor))
        else:
            owner.register_buffer(name, tensor)
        return prefix + name

    def _owner(self, keys: tuple[str, ...]) -> tuple[nn.Module, str]:
        if keys not in self._owners:
            parent, prefix = self._owner(keys[:-1])
            name = _free_name(parent, keys[-1])
            parent.add_module(name, _Branch())
            self._owners[keys] = parent.get_submodule(name), f"{prefix}{name}."
        return self._owners[keys]


class _Branch(nn.Module):
    """A node of the tree of parameters."""


def _free_name(owner: nn.Module, key: str) -> str:
    name = key.replace(".", "_") or "_"
    while hasattr(owner, name):
        name += "_"
    return name


def _check_collections(params: PyTree) -> None:
    if isinstance(params, Mapping) and "batch_stats" in params:
        raise NotImplementedError(
            "`params` must hold what is trained alone, got the collection `batch_stats`: running "
            "statistics carry data from one example to the next. Use a norm without them; or, to "
            'leave them as they are, pass params["params"] and let apply_fn add the rest.'
        )


def _tensor(path: Path, leaf: Any) -> torch.Tensor:
    """Returns a leaf as a tensor with memory of its own: JAX takes arrays to be immutable."""
    is_array = isinstance(leaf, (jax.Array, np.ndarray, np.generic))
    if not is_array or not has_torch_dtype(leaf.dtype):
        got = f"an array of {leaf.dtype}" if is_array else type(leaf).__name__
        raise TypeError(
            f"`params{jax.tree_util.keystr(path)}` must be an array of a type that torch has, got "
            f"{got}. Keep what is not trained out of `params`, and let apply_fn hold it; Equinox "
            "has `partition` for that."
        )
    kind = leaf.dtype
    if not isinstance(leaf, jax.Array) and jnp.issubdtype(kind, jnp.inexact):
        kind = jax.dtypes.canonicalize_dtype(kind)  # NumPy's float64 is nobody's choice.
    with x64():
        tensor: torch.Tensor = to_torch(jnp.asarray(leaf, kind))
    return tensor.clone()


def _setting(path: Path, leaf: Any) -> Any:
    """Returns what stands for a leaf in the kind of a call: itself, or None for a tensor."""
    if isinstance(leaf, torch.Tensor):
        return None
    if isinstance(leaf, (bool, int, float, str, bytes)):
        return leaf
    raise TypeError(
        f"`inputs{jax.tree_util.keystr(path)}` must be a tensor, or a bool, number or string as a "
        f"setting, got {type(leaf).__name__}. Pass dpbridge.to_torch of an array; let apply_fn "
        "hold what is the same in every call."
    )


def _torch_key() -> jax.Array:
    """Draws a key from torch's generator, or gives the one that the self-check compares with."""
    # The self-check turns torch's dropout off. Asked to drop all, it then drops nothing.
    if functional.dropout(torch.ones((), device="cpu"), p=1.0, training=True):
        return fixed_key()
    words = torch.randint(2**32, (2,), dtype=torch.int64, device="cpu").numpy()
    return jax.random.wrap_key_data(jnp.asarray(words.astype(np.uint32)), impl="threefry2x32")
