"""Slow and obvious references: float64, one example at a time, no code under test."""

import math

import numpy as np


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
