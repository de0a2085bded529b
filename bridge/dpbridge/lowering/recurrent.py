"""Recurrent layers: one scan for each layer and direction, and the step of it for cells.

The product of all inputs with their weights stands before the scan; inside is the state's alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch
from jax import lax

from dpbridge.lowering.dropout import drop
from dpbridge.lowering.dtypes import widen
from dpbridge.lowering.table import Call, register_lowering

aten = torch.ops.aten

State = tuple[jax.Array, ...]
"""What a step hands on, `(batch, features)` each: what the layer returns comes first."""


class Weights(NamedTuple):
    """The parameters of one layer in one direction, `(gates * features, ...)` each."""

    inputs: jax.Array
    hidden: jax.Array
    inputs_bias: jax.Array | None = None
    hidden_bias: jax.Array | None = None
    projection: jax.Array | None = None


Step = Callable[[jax.Array, State, Weights], State]


def _layers(
    call: Call,
    step: Step,
    x: jax.Array,
    states: Sequence[jax.Array],
    params: Sequence[jax.Array],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> list[jax.Array]:
    """Returns the output of the last layer, then the final states of all layers."""
    directions = 2 if bidirectional else 1
    weights = _grouped(params, has_biases, layers * directions)
    x = jnp.swapaxes(x, 0, 1) if batch_first else x  # (time, batch, features)
    finals = []
    for layer in range(layers):
        if layer and train:
            x = drop(call, x, dropout)
        outputs = []
        for i in range(layer * directions, (layer + 1) * directions):
            first = tuple(state[i] for state in states)
            is_backward = i > layer * directions
            final, output = _scan(step, x, first, weights[i], reverse=is_backward)
            finals.append(final)
            outputs.append(output)
        x = jnp.concatenate(outputs, axis=-1)
    x = jnp.swapaxes(x, 0, 1) if batch_first else x
    return [x, *map(jnp.stack, zip(*finals, strict=True))]


def _grouped(params: Sequence[jax.Array], has_biases: bool, groups: int) -> list[Weights]:
    size, count = len(params) // groups, 4 if has_biases else 2
    parts = [params[i : i + size] for i in range(0, len(params), size)]
    return [
        Weights(*part[:count])._replace(projection=part[count] if size > count else None)
        for part in parts
    ]


def _scan(
    step: Step, x: jax.Array, first: State, weights: Weights, *, reverse: bool
) -> tuple[State, jax.Array]:
    gates, weights = _before_scan(step, x, weights)

    def advance(state: State, gates: jax.Array) -> tuple[State, jax.Array]:
        state = _advanced(step, gates, state, weights)
        return state, state[0]

    return lax.scan(advance, first, gates, reverse=reverse)


def _before_scan(step: Step, x: jax.Array, weights: Weights) -> tuple[jax.Array, Weights]:
    """Returns what the inputs add to the gates, and the weights that are left for the step."""
    gates = _affine(x, weights.inputs, weights.inputs_bias)
    if step is _gru_step or weights.hidden_bias is None:
        return gates, weights
    return gates + weights.hidden_bias, weights._replace(hidden_bias=None)


def _advanced(step: Step, gates: jax.Array, state: State, weights: Weights) -> State:
    after = step(gates, state, weights)
    return tuple(new.astype(old.dtype) for new, old in zip(after, state, strict=True))


def _affine(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    y = lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))
    return y if bias is None else y + bias


def _lstm_step(gates: jax.Array, state: State, weights: Weights) -> State:
    hidden, cell = state
    gates = widen(gates + _affine(hidden, weights.hidden, weights.hidden_bias))
    take, keep, new, show = jnp.split(gates, 4, axis=-1)
    cell = jax.nn.sigmoid(keep) * widen(cell) + jax.nn.sigmoid(take) * jnp.tanh(new)
    output = jax.nn.sigmoid(show) * jnp.tanh(cell)
    if weights.projection is not None:
        output = _affine(output.astype(hidden.dtype), weights.projection, None)
    return output, cell


def _gru_step(gates: jax.Array, state: State, weights: Weights) -> State:
    (hidden,) = state
    from_hidden = _affine(hidden, weights.hidden, weights.hidden_bias)
    reset, keep, new = jnp.split(widen(gates), 3, axis=-1)
    hidden_reset, hidden_keep, hidden_new = jnp.split(widen(from_hidden), 3, axis=-1)
    new = jnp.tanh(new + jax.nn.sigmoid(reset + hidden_reset) * hidden_new)
    return (new + jax.nn.sigmoid(keep + hidden_keep) * (widen(hidden) - new),)


def _tanh_step(gates: jax.Array, state: State, weights: Weights) -> State:
    return (jnp.tanh(gates + _affine(state[0], weights.hidden, weights.hidden_bias)),)


def _relu_step(gates: jax.Array, state: State, weights: Weights) -> State:
    total = gates + _affine(state[0], weights.hidden, weights.hidden_bias)
    return (jnp.where(total <= 0, 0, total),)


@register_lowering(aten.lstm.input)
def _lstm(call: Call, x: jax.Array, states: Sequence[jax.Array], *how: Any) -> list[jax.Array]:
    return _layers(call, _lstm_step, x, states, *how)


@register_lowering(aten.lstm_cell.default)
def _lstm_cell(
    call: Call, x: jax.Array, states: Sequence[jax.Array], *params: jax.Array | None
) -> State:
    return _cell(_lstm_step, x, tuple(states), params)


def _cell(step: Step, x: jax.Array, state: State, params: Sequence[Any]) -> State:
    gates, weights = _before_scan(step, x, Weights(*params))
    return _advanced(step, gates, state, weights)


def _register(name: str, step: Step) -> None:
    @register_lowering(getattr(aten, name).input)
    def layers(call: Call, x: jax.Array, state: jax.Array, *how: Any) -> list[jax.Array]:
        return _layers(call, step, x, (state,), *how)

    @register_lowering(getattr(aten, f"{name}_cell").default)
    def cell(call: Call, x: jax.Array, state: jax.Array, *params: jax.Array | None) -> jax.Array:
        return _cell(step, x, (state,), params)[0]


_register("gru", _gru_step)
_register("rnn_tanh", _tanh_step)
_register("rnn_relu", _relu_step)
