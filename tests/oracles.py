"""Slow and obvious references: float64, one example at a time, no code under test."""

import importlib.metadata
import math

import numpy as np

# In tests of tiny programs compiling costs most and running nothing.
QUICK_TO_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
# A third of that again, by another code generator for fusions than is in use, up to jaxlib 0.10.
# For references, and the lowering of torch's ops: a wrong rule is wrong whatever XLA makes of it.
QUICKEST_TO_COMPILE = dict(QUICK_TO_COMPILE)
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    QUICKEST_TO_COMPILE["xla_cpu_use_fusion_emitters"] = False


def clipped_sum(gradients, l2_clip_norm, *, rescale=False, normalize_by=1.0):
    """Adds up per-example gradients (dicts of arrays), each clipped, in float64."""
    total = {name: np.zeros(np.shape(array)) for name, array in gradients[0].items()}
    for gradient in gradients:
        wide = {name: np.asarray(array, np.float64) for name, array in gradient.items()}
        norm = math.sqrt(sum(float((array**2).sum()) for array in wide.values()))
        if not math.isfinite(norm):
            continue
        factor = min(1.0, l2_clip_norm / norm) if norm > 0 else 1.0
        if rescale:
            factor /= l2_clip_norm
        for name, array in wide.items():
            total[name] += factor * array
    return {name: array / normalize_by for name, array in total.items()}


def torch_gradients(model, loss_fn, batch):
    """Per-example gradients of a float64 copy of `model`, one example at a time."""
    import copy

    import torch

    wide = copy.deepcopy(model).double()
    gradients = []
    for i in range(len(batch[0])):
        *inputs, target = [
            leaf[i : i + 1].double() if leaf.is_floating_point() else leaf[i : i + 1]
            for leaf in batch
        ]
        loss = loss_fn(wide(*inputs), target)
        named = {name: p for name, p in wide.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(loss, list(named.values()))
        gradients.append({n: g.numpy() for n, g in zip(named, grads, strict=True)})
    return gradients


def assert_close(found, expected, *, rtol):
    """Compares two dicts of arrays, relative to the norm of all of them together."""
    assert found.keys() == expected.keys()
    flat = {
        key: np.concatenate([np.asarray(tree[n], np.float64).reshape(-1) for n in sorted(tree)])
        for key, tree in (
            ("found", {n: _plain(a) for n, a in found.items()}),
            ("expected", expected),
        )
    }
    error = np.linalg.norm(flat["found"] - flat["expected"])
    assert error <= rtol * np.linalg.norm(flat["expected"])


def _plain(array):
    return array.double().numpy() if hasattr(array, "double") else array


def torch_per_example_gradients(model, loss_fn, args, kwargs=None):
    """Losses and gradients of each example alone, in the model's own dtype.

    Args:
        model: Any module.
        loss_fn: As in DPOptimizer: called with the output and the last of `args`, or None.
        args: Trees of tensors, `(batch, ...)` each; other leaves go to every example as they are.
        kwargs: Keywords of the model, likewise.

    Returns:
        Losses `(batch,)` and for each trainable parameter its gradients `(batch, ...)`.
    """
    import torch
    from torch.utils import _pytree as pytree

    leaves, structure = pytree.tree_flatten((args, kwargs or {}))
    batch = next(len(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    losses, gradients = [], {name: [] for name in named}
    for i in range(batch):
        example = [x[i : i + 1].clone() if isinstance(x, torch.Tensor) else x for x in leaves]
        one_args, one_kwargs = pytree.tree_unflatten(example, structure)
        if loss_fn is None:
            output = model(*one_args, **one_kwargs)
            loss = getattr(output, "loss", output)
        else:
            loss = loss_fn(model(*one_args[:-1], **one_kwargs), one_args[-1])
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        losses.append(loss.detach())
        for (name, p), grad in zip(named.items(), grads, strict=True):
            gradients[name].append(torch.zeros_like(p) if grad is None else grad)
    return torch.stack(losses), {name: torch.stack(grads) for name, grads in gradients.items()}


def jax_per_example_gradients(model):
    """Float64 losses and gradients of a model of `kernel_models`, one example at a time.

    Returns:
        A list of losses, and a list of gradients as dicts from the path of a leaf to its array.
    """
    import jax

    options = model.clipped_grad_options
    argnums = options["argnums"]
    with jax.enable_x64(True):
        args = jax.tree.map(_in_float64, model.args)
        size = len(jax.tree.leaves(args[model.batch_argnums[0]])[0])
        keys = None
        if "prng_argnum" in options:
            keys = jax.random.split(args[options["prng_argnum"]], size)
        has_aux = options.get("has_aux", False)
        function = jax.jit(
            jax.value_and_grad(model.loss, argnums, has_aux=has_aux),
            compiler_options=QUICKEST_TO_COMPILE,
        )
        values, gradients = [], []
        for i in range(size):
            row = slice(i, i + 1) if options["keep_batch_dim"] else i
            example = list(args)
            for argnum in model.batch_argnums:
                example[argnum] = jax.tree.map(lambda leaf, row=row: leaf[row], args[argnum])
            if keys is not None:
                example[options["prng_argnum"]] = keys[i]
            value, gradient = function(*example)
            values.append(float(value[0] if has_aux else value))
            gradients.append(by_path(gradient))
    return values, gradients


def by_path(tree):
    """Turns a pytree of arrays into a dict from the path of a leaf to its array in float64."""
    import jax

    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in leaves}


def norm(tree):
    """The L2 norm of a dict of arrays, in float64 and safe from overflow."""
    return math.hypot(*(float(np.linalg.norm(array)) for array in tree.values()))


def _in_float64(leaf):
    import jax
    import jax.numpy as jnp

    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jax.numpy.asarray(np.asarray(leaf, np.float64)) if is_float else leaf
