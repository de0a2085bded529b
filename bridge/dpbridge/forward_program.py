"""A model's forward in JAX, for each example of a batch by itself."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from dpbridge._compat import matmul_precision
from dpbridge.batches import Batch
from dpbridge.clipped_sum import check_messages
from dpbridge.dtypes import to_jax_dtype
from dpbridge.example_loss import tensors_of
from dpbridge.exchange import finish
from dpbridge.fingerprint import Fingerprint
from dpbridge.lowering import autocast, lower_outputs
from dpbridge.mechanism import Mechanism
from dpbridge.outputs import Layout, find_layout, tensors_in
from dpbridge.streams import Stream
from dpkernels.tree_clipping import widest

Arrays = Mapping[str, jax.Array]


class ForwardProgram:
    """The lowered forward of one kind of batch, compiled once for each padded size.

    Args:
        root: Holds all parameters and buffers.
        forward: What is called, of `root` or of a module in it.
        batch: A batch of the kind that it is for.
        trainable: Names of the parameters that are differentiated.
        mechanism: How gradients will be clipped; None if forward is to keep nothing for that.

    Attributes:
        forward: Likewise.
        structure: Of the batch.
        layout: Of what is returned.
        program: Of one example.
        tensors: What the program takes beside the example, by name.
        ready_sizes: Padded sizes at which it has run and, unless that is off, was checked.
        fingerprint: What the model was when it was last looked up.

    Raises:
        NotImplementedError: As `lower`, and as `find_layout`.
    """

    def __init__(
        self,
        root: nn.Module,
        forward: Callable[..., Any],
        batch: Batch,
        trainable: Sequence[str],
        mechanism: Mechanism | None,
    ) -> None:
        self.forward = forward
        self.structure = batch.without_rows()
        with autocast.entered(autocast.current()):
            self.layout: Layout = find_layout(forward, batch, root)
        self.program = lower_outputs(root, self._call, *batch.example(0))
        self.tensors = tensors_of(self.program, root)
        self.ready_sizes: set[int] = set()
        self.fingerprint: Fingerprint | None = None
        self._trainable = frozenset(trainable)
        self._mechanism = mechanism
        self._forward = jax.jit(self._run)
        self._backward = jax.jit(partial(self._sum, False))
        self._fast_backward = jax.jit(partial(self._sum, True))

    def in_torch(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """Returns the tensors that torch's own forward returns, under the program's autocast."""
        with autocast.entered(self.program.autocast):
            return self._call(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return tensors_in(self.forward(*args, **kwargs))

    def __call__(
        self,
        arrays: Arrays,
        rows: Sequence[jax.Array],
        is_padding_example: np.ndarray,
        *,
        stream: Stream,
        randomness: bool = True,
    ) -> tuple[list[torch.Tensor], Any]:
        """Runs on a batch that is padded already.

        Args:
            arrays: Those of `tensors`.
            rows: Leaves of the batch, `(padded size, ...)`.
            is_padding_example: `(padded size,)` bools.
            stream: Random numbers for dropout.
            randomness: False makes dropout the identity, and fixes what is drawn.

        Returns:
            The outputs, padded, each with the axis of examples where `layout` has it; of a scalar
            one for each example. And what `clipped_sum` takes, or None.

        Raises:
            IndexError: If a label or token of the batch is out of range.
        """
        trainable = {name: x for name, x in arrays.items() if name in self._trainable}
        frozen = {name: x for name, x in arrays.items() if name not in self._trainable}
        with matmul_precision():
            outputs, holds, kept = self._forward(
                trainable, frozen, tuple(rows), is_padding_example, stream, np.bool_(randomness)
            )
        if jax.default_backend() == "cpu":
            jax.block_until_ready((outputs, holds, kept))  # Torch may write to what was read.
        tensors: list[torch.Tensor] = finish(outputs)
        check_messages(self.program.messages, holds)
        return tensors, kept

    def clipped_sum(
        self, kept: Any, cotangents: Mapping[int, jax.Array], is_padding_example: np.ndarray
    ) -> dict[str, jax.Array]:
        """Returns the clipped sum of gradients, by parameter.

        Args:
            kept: What a call returned.
            cotangents: `(padded size, ...)`, by the index of the output; zeros where missing.
            is_padding_example: `(padded size,)` bools.
        """
        with matmul_precision():
            sums: dict[str, jax.Array] = self._backward(kept, dict(cotangents), is_padding_example)
        return sums

    def fast_clipped_sum(
        self, kept: Any, cotangents: Mapping[int, jax.Array], is_padding_example: np.ndarray
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """Returns the same by the fast program, and whether it needs care: see `FastFirst`.

        Args:
            kept: As in `clipped_sum`.
            cotangents: Likewise.
            is_padding_example: Likewise.
        """
        with matmul_precision():
            found: tuple[dict[str, jax.Array], jax.Array] = self._fast_backward(
                kept, dict(cotangents), is_padding_example
            )
        return found

    def _run(
        self,
        trainable: Arrays,
        frozen: Arrays,
        rows: tuple[jax.Array, ...],
        is_padding_example: jax.Array,
        stream: Stream,
        randomness: jax.Array,
    ) -> tuple[list[jax.Array], list[jax.Array], Any]:
        def of_example(wide: Arrays, key: jax.Array, row: tuple[jax.Array, ...]) -> Any:
            own = {name: wide[name].astype(x.dtype) for name, x in trainable.items()}
            # A plan may cut off the example's axis of 1, which the program has.
            row = tuple(x.reshape(1, *y.shape[1:]) for x, y in zip(row, rows, strict=True))
            outputs, holds = self.program({**frozen, **own}, key, randomness, *row)
            placed = [
                # torch.export may say float32 where torch's kernel of an LSTM returns halves.
                (x if axis is None else jnp.squeeze(x, axis)).astype(to_jax_dtype(empty.dtype))
                for x, axis, empty in zip(outputs, self.layout.axes, self.layout.empty, strict=True)
            ]
            floats = {i: x for i, x in enumerate(placed) if _is_float(x)}
            return floats, ({i: x for i, x in enumerate(placed) if i not in floats}, holds)

        wide = {name: x.astype(widest([x])) for name, x in trainable.items()}
        halves = None if self._mechanism is None else self._mechanism.clipped_vjp(of_example)
        kept = None
        if halves is not None:
            floats, (others, holds), kept = halves.forward(wide, stream.key(), rows)
        else:
            # The keys that `clipped_grad` gives to the examples, so that dropout falls alike.
            keys = jax.random.split(stream.key(), is_padding_example.shape[0])
            mapped = jax.vmap(of_example, in_axes=(None, 0, 0))
            floats, (others, holds) = mapped(wide, keys, rows)
        fine = jnp.all(holds | is_padding_example[:, None], axis=0)
        outputs = [
            jnp.moveaxis({**floats, **others}[i], 0, axis or 0)
            for i, axis in enumerate(self.layout.axes)
        ]
        return outputs, [fine[i] for i in range(fine.shape[0])], kept

    def _sum(
        self,
        is_fast: bool,
        kept: Any,
        cotangents: dict[int, jax.Array],
        is_padding_example: jax.Array,
    ) -> Any:
        assert self._mechanism is not None
        halves = self._mechanism.clipped_vjp(lambda *_: None)
        assert halves is not None
        size = is_padding_example.shape[0]
        filled = {
            i: cotangents[i] if i in cotangents else jnp.zeros(shape, kind)
            for i, (shape, kind) in self._kinds(size).items()
        }
        backward = halves.backward.fast_fun if is_fast else halves.backward
        assert backward is not None
        return backward(kept, filled, is_padding_example=is_padding_example)

    def _kinds(self, size: int) -> dict[int, tuple[tuple[int, ...], Any]]:
        """Returns shape, examples first, and type of each output that has a gradient."""
        found = {}
        for i, tensor in enumerate(self.layout.empty):
            if tensor.is_floating_point():
                shape = self.layout.rows(i, tensor).shape[1:]
                found[i] = (size, *shape), to_jax_dtype(tensor.dtype)
        return found


def _is_float(array: jax.Array) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))
