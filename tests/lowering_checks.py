"""Runs lowered torch functions and models, and holds them against torch itself."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

import oracles
from dpbridge.dtypes import to_jax_dtype
from dpbridge.lowering import lower
from dpbridge.lowering.interpreter import Tensor, evaluate
from dpbridge.lowering.table import Run
from dpbridge.self_check import DropoutOff
from oracles import QUICKEST_TO_COMPILE

BATCH = 3

_numbers = torch.Generator().manual_seed(0)


def normal(*shape):
    """Draws `(BATCH, *shape)` numbers in float64."""
    return torch.randn(BATCH, *shape, dtype=torch.float64, generator=_numbers)


def positive(*shape):
    """Draws numbers in [0.1, 1.1)."""
    return torch.rand(BATCH, *shape, dtype=torch.float64, generator=_numbers) + 0.1


def integers(*shape, low=-5, high=6):
    """Draws numbers in [low, high)."""
    return torch.randint(low, high, (BATCH, *shape), generator=_numbers)


def tied(*shape):
    """Draws from few values, so that many are equal, and some are 0."""
    return integers(*shape, low=-1, high=3).double()


class Function(nn.Module):
    """A torch function as a module, which is what torch.export takes."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def to_jax(tensor):
    """Copies a torch tensor; the exchange has tests of its own."""
    wide = tensor.detach().float() if tensor.dtype == torch.bfloat16 else tensor.detach()
    return jnp.asarray(wide.numpy().copy(), to_jax_dtype(tensor.dtype))


def lower_function(function, example):
    """Returns `function` in JAX: from arrays, and keys and checks, to the list of its outputs."""
    exported = torch.export.export(Function(function), tuple(example), strict=False)
    constants = [
        to_jax(exported.constants[spec.target])
        for spec in exported.graph_signature.input_specs
        if spec.kind.name != "USER_INPUT"
    ]

    def lowered(*arrays, run=None):
        run = run or Run(jax.random.key(0), jnp.array(False))
        tensors = [Tensor.of(array) for array in (*constants, *arrays)]
        return evaluate(exported.graph_module, tensors, run)

    return lowered


def requirements(function, *inputs):
    """Returns what rules ask the host to check of one example, `[(holds, message)]`."""
    with jax.enable_x64(True):
        run = Run(jax.random.key(0), jnp.array(False))
        lower_function(function, inputs)(*map(to_jax, inputs), run=run)
        return [(bool(holds), message) for holds, message in run.requirements]


def compare(cases):
    """Runs all cases in one jitted, vmapped program, and each in torch by a loop.

    Args:
        cases: For each name a torch function of one example and its inputs, `(batch, ...)` each.

    Returns:
        For each name pairs of what was found and what torch has: outputs, then the gradients of
        their product with random cotangents.
    """
    names = list(cases)
    functions = [cases[name][0] for name in names]
    inputs = [list(cases[name][1:]) for name in names]
    expected = [_torch_results(f, x) for f, x in zip(functions, inputs, strict=True)]
    cotangents = [[_cotangent(out) for out in outs if out.is_floating_point()] for outs in expected]
    gradients = [
        _torch_gradients(*each) for each in zip(functions, inputs, cotangents, strict=True)
    ]
    leaves, all_of = _as_one(functions, inputs)
    assert_no_float64(functions, inputs)
    with jax.enable_x64(True):
        lowered = lower_function(all_of, [leaf[0] for leaf in leaves])
        flat_cotangents = [to_jax(c) for group in cotangents for c in group]
        step = jax.vmap(partial(_outputs_and_gradients, lowered))
        found, found_gradients = jax.jit(step, compiler_options=QUICKEST_TO_COMPILE)(
            [to_jax(leaf) for leaf in leaves], flat_cotangents
        )
    waiting, waiting_gradients = iter(found), iter(found_gradients)
    return {
        name: [(next(waiting), out) for out in outs]
        + [(next(waiting_gradients), gradient) for gradient in grads]
        for name, outs, grads in zip(names, expected, gradients, strict=True)
    }


def assert_same(pairs, *, rtol=1e-9):
    """Asserts that every output and gradient of a case is torch's, NaN and infinity included."""
    assert pairs
    for found, expected in pairs:
        assert found.dtype == to_jax_dtype(expected.dtype)
        limit = rtol if expected.dtype == torch.float64 else 2e-6
        np.testing.assert_allclose(found, expected.detach().numpy(), rtol=limit, atol=limit / 2)


def assert_no_float64(functions, inputs):
    """Asserts that in float32 the functions make arrays of float64 only where torch does."""
    inputs = [[_narrow(leaf[0]) for leaf in leaves] for leaves in inputs]
    pairs = [
        (f, leaves)
        for f, leaves in zip(functions, inputs, strict=True)
        if all(out.dtype != torch.float64 for out in _outputs(f(*leaves)))
    ]
    kept, leaves = zip(*pairs, strict=True)
    flat, function = _as_one(kept, leaves)
    with jax.enable_x64(True):
        lowered = lower_function(function, flat)
        jaxpr = jax.make_jaxpr(lowered)(*map(to_jax, flat))
    wide = [var.aval for var in _all_outputs(jaxpr.jaxpr) if _is_wide(var.aval)]
    assert not wide, f"float64 arrays in a float32 program: {wide}"


def _as_one(functions, inputs):
    """Flattens the inputs, and returns them with one function of them all."""
    leaves, structure = pytree.tree_flatten(list(map(list, inputs)))

    def function(*flat):
        grouped = pytree.tree_unflatten(flat, structure)
        return [_outputs(f(*x)) for f, x in zip(functions, grouped, strict=True)]

    return leaves, function


def run_program(
    model, loss_fn, args, kwargs=None, *, randomness=False, seed=0, options=QUICKEST_TO_COMPILE
):
    """Returns losses, gradients and checks `(batch, ...)` of the lowered, jitted, vmapped model."""
    kwargs = kwargs or {}
    leaves, structure = pytree.tree_flatten((args, kwargs))
    first = [leaf[:1] if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    program = lower(model, loss_fn, *pytree.tree_unflatten(first, structure))
    tensors = [leaf for leaf in jax.tree.leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    with jax.enable_x64(True):
        arrays = {name: to_jax(p) for name, p in model.named_parameters()}
        constants = {name: to_jax(tensor) for name, tensor in program.constants.items()}
        trainable = {n: arrays.pop(n) for n, p in model.named_parameters() if p.requires_grad}

        def loss(parameters, key, *example):
            rows = [leaf[None] for leaf in example]
            named = {**arrays, **constants, **parameters}
            (value,), held = program(named, key, jnp.array(randomness), *rows)
            return value, held

        step = jax.vmap(
            jax.value_and_grad(loss, has_aux=True), in_axes=(None, 0) + (0,) * len(tensors)
        )
        keys = jax.random.split(jax.random.key(seed), len(tensors[0]))
        run = jax.jit(step, compiler_options=options)
        (losses, held), gradients = run(trainable, keys, *map(to_jax, tensors))
    return np.asarray(losses), {n: np.asarray(g) for n, g in gradients.items()}, np.asarray(held)


def assert_model_matches(
    model, loss_fn, args, kwargs=None, *, rtol=1e-4, options=QUICKEST_TO_COMPILE
):
    """Asserts the loss and all per-example gradients, each relative to its own norm."""
    losses, gradients, held = run_program(model, loss_fn, args, kwargs, options=options)
    assert held.all()
    with DropoutOff():
        expected_losses, expected = oracles.torch_per_example_gradients(
            model, loss_fn, args, kwargs
        )
    np.testing.assert_allclose(losses, expected_losses.numpy(), rtol=rtol)
    assert gradients.keys() == expected.keys()
    for i in range(len(losses)):
        found = {name: gradient[i] for name, gradient in gradients.items()}
        oracles.assert_close(found, {n: g[i].numpy() for n, g in expected.items()}, rtol=rtol)
        for name, gradient in found.items():
            assert gradient.dtype == to_jax_dtype(expected[name].dtype)
            error = np.linalg.norm(gradient - expected[name][i].numpy())
            scale = max(np.linalg.norm(expected[name][i].numpy()), 1e-2 * _norm(found))
            assert error <= 10 * rtol * scale, f"{name} of example {i}: {error} of {scale}"


def _norm(tree):
    return np.sqrt(sum(float((np.asarray(a, np.float64) ** 2).sum()) for a in tree.values()))


def _cotangent(out):
    return torch.randn(out.shape, dtype=out.dtype, generator=_numbers)


def _outputs(result):
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def _torch_results(function, inputs):
    results = [
        _outputs(function(*(leaf[i].clone() for leaf in inputs))) for i in range(len(inputs[0]))
    ]
    return [torch.stack(outs) for outs in zip(*results, strict=True)]


def _torch_gradients(function, inputs, cotangents):
    is_float = [leaf.is_floating_point() for leaf in inputs]
    per_example = []
    for i in range(len(inputs[0])):
        leaves = [x[i].clone().requires_grad_(f) for x, f in zip(inputs, is_float, strict=True)]
        outs = [out for out in _outputs(function(*leaves)) if out.is_floating_point()]
        pairs = [(o, c[i]) for o, c in zip(outs, cotangents, strict=True) if o.requires_grad]
        wanted = [leaf for leaf, f in zip(leaves, is_float, strict=True) if f]
        if not (pairs and wanted):
            per_example.append([torch.zeros_like(leaf) for leaf in wanted])
            continue
        outs, weights = zip(*pairs, strict=True)
        grads = torch.autograd.grad(outs, wanted, weights, allow_unused=True)
        per_example.append(
            [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, grads, strict=True)]
        )
    return [torch.stack(grads) for grads in zip(*per_example, strict=True)]


def _outputs_and_gradients(lowered, arrays, cotangents):
    is_float = [jnp.issubdtype(x.dtype, jnp.floating) for x in arrays]

    def floats_of(*floats):
        waiting = iter(floats)
        outs = lowered(*(next(waiting) if f else x for x, f in zip(arrays, is_float, strict=True)))
        return [out for out in outs if jnp.issubdtype(out.dtype, jnp.floating)], outs

    floats = [x for x, f in zip(arrays, is_float, strict=True) if f]
    _, pull_back, outs = jax.vjp(floats_of, *floats, has_aux=True)
    return outs, pull_back(cotangents)


def _narrow(leaf):
    return leaf.float() if leaf.dtype == torch.float64 else leaf


def _all_outputs(jaxpr):
    for equation in jaxpr.eqns:
        yield from equation.outvars
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from _all_outputs(getattr(inner, "jaxpr", inner))


def _is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def _is_wide(aval):
    return getattr(aval, "dtype", None) == jnp.float64 and aval.ndim > 0
