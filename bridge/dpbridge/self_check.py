"""Compare the compiled program's gradients with torch's own, before anything is trained on them.

What it guards against is known to happen: an XLA release that computed wrong gradients for every
example but the first, an autograd.Function whose backward torch.export does not see, a wrong rule.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dpbridge.batches import Batch
from dpbridge.clipped_sum import ClippedSum
from dpbridge.exchange import to_jax, to_torch
from dpbridge.lowering.program import loss_of_example
from dpbridge.scaling import ScaledOptimizer
from dpbridge.streams import dropout_stream

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
    clipped_sum: ClippedSum,
    model: nn.Module,
    loss_fn: Callable[..., Any] | None,
    batch: Batch,
    tensors: tuple[torch.Tensor, ...],
    trainable: Tensors,
    *,
    scaling: ScaledOptimizer | None = None,
    is_clipped: bool = False,
) -> None:
    """Compares the gradients of the first and the last example, dropout off.

    They come from the executable that trains: at its batch size, all examples but one masked, the
    clip norm infinite. The last example is the one in the last row, so padding is in play too.
    A plan clips to a norm of its own, so that only the direction of each parameter's gradient is
    left to compare.

    Args:
        clipped_sum: The program.
        model: What it was lowered from.
        loss_fn: Likewise.
        batch: The batch, not empty.
        tensors: Its tensors, padded by repeating the last example.
        trainable: The parameters to differentiate, by name.
        scaling: How the program scales gradients before it clips them, or None. Here all of them
            alike, which is taken back from the result.
        is_clipped: Whether the program clips even if the norm it is given is infinite.

    Raises:
        RuntimeError: If they differ; the message names the parameter.
    """
    size = tensors[0].shape[0]
    moments = {} if scaling is None else {n: torch.ones_like(p) for n, p in trainable.items()}
    for row, example in ((0, 0), (size - 1, batch.size - 1)):
        result = clipped_sum(
            trainable,
            tensors,
            np.arange(size) != row,
            stream=dropout_stream(0, 0, 0),
            l2_clip_norm=float("inf"),
            second_moments=moments,
            randomness=False,
        )
        expected = _torch_gradients(model, loss_fn, batch, example, trainable)
        sums = result.sums
        if scaling is not None:
            sums = scaling.transform(to_jax(moments))(sums, inverse=True)
        found = to_torch(sums)
        if is_clipped:
            found = {name: _rescaled(found[name], expected[name]) for name in trainable}
        _compare(found, expected, trainable, example)


def _torch_gradients(
    model: nn.Module,
    loss_fn: Callable[..., Any] | None,
    batch: Batch,
    example: int,
    trainable: Tensors,
) -> dict[str, torch.Tensor]:
    # Without TensorFloat-32, which torch's convolutions use by default and JAX's here do not.
    no_tf32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with torch.enable_grad(), DropoutOff(), no_tf32:
        loss = loss_of_example(model, loss_fn, *batch.example(example))
    parameters = list(trainable.values())
    if not loss.requires_grad:
        return {name: torch.zeros_like(p) for name, p in trainable.items()}
    grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(trainable, grads, strict=True))


def _rescaled(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Undoes clipping: scales a gradient to the norm that it should have had."""
    found = found.double()
    norm = found.norm()
    return found * (expected.double().norm() / norm) if norm else found


def _compare(found: Tensors, expected: Tensors, trainable: Tensors, example: int) -> None:
    wide = {name: grad.double() for name, grad in expected.items()}
    total = torch.stack([grad.norm() for grad in wide.values()]).norm()
    if not torch.isfinite(total):
        return  # The example contributes zero here, and NaN in torch.
    for name, grad in wide.items():
        # A gradient that is zero but for rounding, as of a bias before a norm layer, is compared
        # with the whole gradient.
        scale = torch.maximum(grad.norm(), 1e-2 * total)
        error = (found[name].double() - grad).norm()
        tolerance = _TOLERANCE[_coarsest(trainable)]
        if not error <= tolerance * scale:
            raise RuntimeError(
                f"The gradient of `{name}` must agree between torch and JAX, got a relative "
                f"difference of {float(error / scale):.2g} for example {example}. Nothing was "
                "trained on it. Look for a custom backward or a hook in the model, and for a "
                "supported jaxlib; self_check=False turns this check off."
            )


def _coarsest(trainable: Tensors) -> torch.dtype:
    return max((p.dtype for p in trainable.values()), key=lambda dtype: _TOLERANCE.get(dtype, 0.0))


class DropoutOff(TorchFunctionMode):
    """Makes torch's dropout the identity, inside modules in training mode too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func` with its dropout turned off, if it has any."""
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func in _PROBABILITY_AT:
            name, position = _PROBABILITY_AT[func]
            if len(args) > position:
                args = (*args[:position], 0.0, *args[position + 1 :])
            else:
                kwargs[name] = 0.0
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

_PROBABILITY_AT: dict[Any, tuple[str, int]] = {
    functional.scaled_dot_product_attention: ("dropout_p", 4),
    functional.multi_head_attention_forward: ("dropout_p", 10),
    torch.lstm: ("dropout", 5),
    torch.gru: ("dropout", 5),
    torch.rnn_tanh: ("dropout", 5),
    torch.rnn_relu: ("dropout", 5),
}
