"""Compare the compiled program's gradients with torch's own, before anything is trained on them.

What it guards against is known to happen: an XLA release that computed wrong gradients for every
example but the first, an autograd.Function whose backward torch.export does not see, a wrong rule.
"""

from collections.abc import Mapping, Sequence, Set
from typing import Any, Self

import jax
import numpy as np
import torch
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dpbridge.batches import Batch
from dpbridge.example_loss import ExampleLoss
from dpbridge.exchange import to_jax, to_torch
from dpbridge.fixed_draws import FixedDraws
from dpbridge.forward_program import ForwardProgram
from dpbridge.lowering import autocast
from dpbridge.parts import Part, Summing
from dpbridge.private_forward import plain_forward
from dpbridge.scaling import ScaledOptimizer
from dpbridge.streams import Stream

Tensors = Mapping[str, torch.Tensor]

# The share of a gradient's norm by which torch and JAX may differ. Rounding stays far below;
# the defects this looks for lie far above.
_TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.bfloat16: 1e-1,
    torch.float16: 2e-2,
}


def check_gradients(
    clipped_sum: Summing,
    part: Part,
    tensors: tuple[torch.Tensor, ...],
    trainable: Tensors,
    *,
    scaling: ScaledOptimizer | None = None,
    is_clipped: bool = False,
    clips_together: bool = True,
) -> None:
    """Compares the gradients of the first and the last example, dropout off.

    They come from the executable that trains: at its batch size, all examples but one masked, the
    clip norm infinite. The last example is the one in the last row, so padding is in play too.
    A plan clips to a norm of its own, so that only directions are left to compare: that of the
    whole gradient, or where layers are clipped each by itself, of each parameter's.

    Args:
        clipped_sum: The program.
        part: The batch, not empty.
        tensors: Its tensors, padded by repeating the last example.
        trainable: The parameters to differentiate, by name.
        scaling: How the program scales gradients before it clips them, or None. Here all of them
            alike, which is taken back from the result.
        is_clipped: Whether the program clips even if the norm it is given is infinite.
        clips_together: Whether one factor then clips the whole gradient, or one each parameter's.

    Raises:
        RuntimeError: If they differ; the message names the parameter.
    """
    size = tensors[0].shape[0]
    moments = {} if scaling is None else {n: torch.ones_like(p) for n, p in trainable.items()}
    for row, example in ((0, 0), (size - 1, part.size - 1)):
        result = clipped_sum(
            trainable,
            tensors,
            np.arange(size) != row,
            streams=part.streams,
            l2_clip_norm=float("inf"),
            second_moments=moments,
            randomness=False,
        )
        rows = [tensor[row : row + 1] for tensor in tensors]
        expected = _torch_gradients(clipped_sum.loss, rows, trainable)
        sums = result.sums
        if scaling is not None:
            sums = scaling.transform(to_jax(moments))(sums, inverse=True)
        found = to_torch(sums)
        if is_clipped:
            names = list(trainable)
            for group in [names] if clips_together else [[name] for name in names]:
                found |= _unclipped(found, expected, group)
        dtypes = {*(p.dtype for p in trainable.values()), *clipped_sum.loss.half_types}
        _compare(found, expected, _tolerance(dtypes), example)


def check_outputs(
    program: ForwardProgram,
    arrays: Mapping[str, jax.Array],
    rows: tuple[jax.Array, ...],
    batch: Batch,
    stream: Stream,
) -> None:
    """Compares what forward returns for the first and the last example, dropout off.

    Args:
        program: The program.
        arrays: What it takes beside the examples.
        rows: The batch, padded by repeating the last example.
        batch: The batch, not empty.
        stream: Of the batch.

    Raises:
        RuntimeError: If they differ.
    """
    size = rows[0].shape[0]
    found, _ = program(arrays, rows, np.zeros(size, bool), stream=stream, randomness=False)
    for row, example in ((0, 0), (size - 1, batch.size - 1)):
        args, kwargs = batch.example(example)
        no_tf32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.no_grad(), DropoutOff(), no_tf32:
            expected = program.in_torch(*args, **kwargs)
        for index, (one, all_rows) in enumerate(zip(expected, found, strict=True)):
            axis = program.layout.axes[index]
            own = all_rows[row] if axis is None else all_rows.narrow(axis, row, 1)
            wide = one.double() if one.is_floating_point() else one
            if wide.is_floating_point() and torch.isfinite(wide).all():
                error = (own.double() - wide).norm()
                tolerance = _tolerance({one.dtype, *program.program.half_types})
                if not error <= tolerance * wide.norm().clamp(min=1e-6):
                    raise RuntimeError(
                        f"Output {index} of the model must agree between torch and JAX, got a "
                        f"difference of norm {float(error):.2g} for example {example}. Nothing "
                        "was trained on it. Look for a hook in the model, and for a supported "
                        "jaxlib; self_check=False turns this check off."
                    )


def _torch_gradients(
    example_loss: ExampleLoss, rows: list[torch.Tensor], trainable: Tensors
) -> dict[str, torch.Tensor]:
    # Without TensorFloat-32, which torch's convolutions use by default and JAX's here do not.
    no_tf32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    # Autocast is for forward alone; backward computes in the types of forward.
    no_autocast = autocast.entered(())
    with torch.enable_grad(), DropoutOff(), no_tf32, plain_forward(), no_autocast:
        loss = example_loss.in_torch(*rows)
        parameters = list(trainable.values())
        if not loss.requires_grad:
            return {name: torch.zeros_like(p) for name, p in trainable.items()}
        # What is checkpointed is computed once more, without dropout again: that lasts through a
        # call with edges, and not through one with tensors, which modes take for an op.
        edges = [get_gradient_edge(parameter) for parameter in parameters]
        grads: Sequence[torch.Tensor | None] = torch.autograd.grad(
            get_gradient_edge(loss), edges, allow_unused=True
        )
    return {
        name: torch.zeros_like(parameter) if grad is None else grad
        for (name, parameter), grad in zip(trainable.items(), grads, strict=True)
    }


def _unclipped(found: Tensors, expected: Tensors, group: list[str]) -> dict[str, torch.Tensor]:
    """Undoes clipping: scales gradients to the norm that they should have had together."""
    norm = _norm(found, group)
    factor = _norm(expected, group) / norm if norm else norm
    return {name: found[name].double() * factor for name in group}


def _norm(gradients: Tensors, names: list[str]) -> torch.Tensor:
    return torch.stack([gradients[name].double().norm() for name in names]).norm()


def _compare(found: Tensors, expected: Tensors, tolerance: float, example: int) -> None:
    wide = {name: grad.double() for name, grad in expected.items()}
    total = torch.stack([grad.norm() for grad in wide.values()]).norm()
    if not torch.isfinite(total):
        return  # The example contributes zero here, and NaN in torch.
    for name, grad in wide.items():
        # A gradient that is zero but for rounding, as of a bias before a norm layer, is compared
        # with the whole gradient.
        scale = torch.maximum(grad.norm(), 1e-2 * total)
        error = (found[name].double() - grad).norm()
        if not error <= tolerance * scale:
            raise RuntimeError(
                f"The gradient of `{name}` must agree between torch and JAX, got a relative "
                f"difference of {float(error / scale):.2g} for example {example}. Nothing was "
                "trained on it. Look for a custom backward or a hook in the model, and for a "
                "supported jaxlib; self_check=False turns this check off."
            )


def _tolerance(dtypes: Set[torch.dtype]) -> float:
    """Returns that of the coarsest type."""
    return max(_TOLERANCE.get(dtype, 0.0) for dtype in dtypes)


class DropoutOff(TorchFunctionMode):
    """Makes torch's dropout the identity, in training mode too, and fixes what is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self._fixed_draws = FixedDraws()

    def __enter__(self) -> Self:
        """Enters both modes: that of torch's functions and that of the ops below."""
        self._fixed_draws.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Leaves both modes."""
        super().__exit__(*error)
        self._fixed_draws.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func` with its dropout turned off, if it has any."""
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func in _OFF_AT:
            name, position, off = _OFF_AT[func]
            if len(args) > position:
                args = (*args[:position], off, *args[position + 1 :])
            else:
                kwargs[name] = off
        return func(*args, **kwargs)


_DROPOUTS: frozenset[Any] = frozenset(
    {
        functional.dropout,
        functional.dropout1d,
        functional.dropout2d,
        functional.dropout3d,
        functional.alpha_dropout,
        functional.feature_alpha_dropout,
        torch.dropout,
        torch.dropout_,
        torch.alpha_dropout,
        torch.alpha_dropout_,
        torch.feature_dropout,
        torch.feature_dropout_,
        torch.feature_alpha_dropout,
        torch.feature_alpha_dropout_,
    }
)

_OFF_AT: dict[Any, tuple[str, int, float | bool]] = {
    functional.scaled_dot_product_attention: ("dropout_p", 4, 0.0),
    functional.multi_head_attention_forward: ("dropout_p", 10, 0.0),
    functional.rrelu: ("training", 3, False),
    torch.rrelu: ("training", 3, False),
    torch.rrelu_: ("training", 3, False),
    torch.lstm: ("dropout", 5, 0.0),
    torch.gru: ("dropout", 5, 0.0),
    torch.rnn_tanh: ("dropout", 5, 0.0),
    torch.rnn_relu: ("dropout", 5, 0.0),
}
