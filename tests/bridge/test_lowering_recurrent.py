"""Recurrent layers and cells: outputs, final states and gradients, and how they are computed."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpbridge import DPOptimizer
from dpbridge.lowering import lower
from dpbridge.lowering.table import Run
from lowering_checks import (
    QUICKEST_TO_COMPILE,
    assert_model_matches,
    assert_same,
    compare,
    lower_function,
    normal,
    run_program,
    to_jax,
)

BATCH, TIME, FEATURES, HIDDEN = 3, 4, 3, 4
LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN, "rnn_relu": nn.RNN}
CELLS = {
    "lstm_cell": nn.LSTMCell,
    "gru_cell": nn.GRUCell,
    "rnn_tanh_cell": nn.RNNCell,
    "rnn_relu_cell": nn.RNNCell,
}


def layer_case(name, layers=1, bidirectional=False, batch_first=False, bias=True, proj_size=0):
    """The op with numbers for its input of two rows, its initial states and its parameters."""
    options = {"num_layers": layers, "bidirectional": bidirectional, "bias": bias}
    options |= {"proj_size": proj_size} if proj_size else {}
    params = [normal(*p.shape) for p in LAYERS[name](FEATURES, HIDDEN, **options).parameters()]
    count = layers * (2 if bidirectional else 1)
    states = [normal(count, 2, proj_size or HIDDEN)]
    if name == "lstm":
        states.append(normal(count, 2, HIDDEN))

    def function(x, *leaves):
        states, params = leaves[: 1 + (name == "lstm")], leaves[1 + (name == "lstm") :]
        state = states if name == "lstm" else states[0]
        how = (bias, layers, 0.0, True, bidirectional, batch_first)
        return getattr(torch, name)(x, state, params, *how)

    x = normal(2, TIME, FEATURES) if batch_first else normal(TIME, 2, FEATURES)
    return function, x, *states, *params


def cell_case(name, bias=True):
    params = [normal(*p.shape) for p in CELLS[name](FEATURES, HIDDEN, bias).parameters()]

    def function(x, h, c, *params):
        return getattr(torch, name)(x, (h, c) if name == "lstm_cell" else h, *params)

    return function, normal(2, FEATURES), normal(2, HIDDEN), normal(2, HIDDEN), *params


CASES = {
    **{name: layer_case(name) for name in LAYERS},
    **{
        f"{name}, two layers, both ways": layer_case(name, 2, True, batch_first=True)
        for name in ("lstm", "gru", "rnn_tanh")
    },
    **{f"{name} without biases": layer_case(name, bias=False) for name in ("lstm", "gru")},
    "lstm with projections": layer_case("lstm", bidirectional=True, proj_size=2),
    "lstm with a projection, without biases": layer_case("lstm", bias=False, proj_size=2),
    **{name: cell_case(name) for name in CELLS},
    **{f"{name} without biases": cell_case(name, bias=False) for name in CELLS},
}


@pytest.fixture(scope="module")
def results():
    with warnings.catch_warnings():
        # Torch itself says so, whatever runs the layer.
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
        return compare(CASES)


@pytest.mark.parametrize("name", CASES)
def test_recurrent_op_equals_torch(results, name):
    assert_same(results[name])


class Tagger(nn.Module):
    """A recurrent layer under a linear one; its initial state is zero, or learned."""

    def __init__(self, layer, learns_state=False):
        super().__init__()
        self.layer = layer
        self.head = nn.LazyLinear(2)
        self.state = nn.Parameter(torch.randn(2, 2, 1, HIDDEN)) if learns_state else None

    def forward(self, x):
        state = None if self.state is None else self.state.unbind()
        output, final = self.layer(x, state)
        return self.head(output + (final[0] if isinstance(final, tuple) else final)[-1:].mT.mean())


class Loop(nn.Module):
    """Cells in a Python loop."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LSTMCell(FEATURES, HIDDEN), nn.GRUCell(HIDDEN, HIDDEN)

    def forward(self, x):
        state, hidden = None, None
        for row in x.unbind(1):
            state = self.first(row, state)
            hidden = self.second(state[0], hidden)
        return hidden


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, FEATURES)
        self.layer = nn.GRU(FEATURES, HIDDEN, 2, dropout=0.5, batch_first=True)
        self.head = nn.Linear(HIDDEN, 2)

    def forward(self, ids):
        return self.head(self.layer(self.embedding(ids))[1][-1])


def sequences():
    return torch.randn(BATCH, TIME, FEATURES)


def tagger(layer, **options):
    model = Tagger(layer, **options)
    model(sequences()[:1])
    return model, lambda y, target: F.mse_loss(y.mean(1), target), (sequences(), numbers(2))


def numbers(size):
    return torch.randn(BATCH, size)


MODELS = {
    "lstm": lambda: tagger(nn.LSTM(FEATURES, HIDDEN, 2, batch_first=True), learns_state=True),
    "gru": lambda: tagger(nn.GRU(FEATURES, HIDDEN, 2, bidirectional=True, batch_first=True)),
    "rnn": lambda: tagger(nn.RNN(FEATURES, HIDDEN, nonlinearity="relu", batch_first=True)),
    "cells": lambda: (Loop(), F.mse_loss, (sequences(), numbers(HIDDEN))),
    "words": lambda: (
        Words().eval(),
        nn.CrossEntropyLoss(),
        (torch.randint(7, (BATCH, TIME)), torch.randint(2, (BATCH,))),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_recurrent_model_equals_torch(name):
    assert_model_matches(*MODELS[name]())


def test_recurrent_model_in_float64_equals_torch():
    model, loss_fn, args = MODELS["lstm"]()
    assert_model_matches(model.double(), loss_fn, [x.double() for x in args], rtol=1e-9)


@pytest.mark.slow
def test_recurrent_model_in_bfloat16_is_near_torch():
    model, loss_fn, args = MODELS["lstm"]()
    exact, _, _ = run_program(model, loss_fn, args)
    halves = [x.bfloat16() for x in args]
    losses, gradients, _ = run_program(model.bfloat16(), loss_fn, halves)
    np.testing.assert_allclose(losses.astype(np.float32), exact, rtol=0.1)
    assert {str(g.dtype) for g in gradients.values()} == {"bfloat16"}


def scans(function, *inputs):
    """The scans of a lowered function."""
    with jax.enable_x64(True):
        lowered = lower_function(function, inputs)
        jaxpr = jax.make_jaxpr(lowered)(*map(to_jax, inputs))
    return [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh"])
def test_recurrent_layer_is_a_scan_for_each_layer_and_direction(name):
    function, *inputs = CASES[f"{name}, two layers, both ways"]
    assert len(scans(function, *(x[0] for x in inputs))) == 4


@pytest.mark.parametrize("name", LAYERS)
def test_scan_multiplies_the_state_alone(name):
    function, *inputs = CASES[name]
    (scan,) = scans(function, *(x[0] for x in inputs))
    names = [equation.primitive.name for equation in scan.params["jaxpr"].jaxpr.eqns]
    assert names.count("dot_general") == 1
    assert scan.params["length"] == TIME


def drawing(layer):
    """Returns the layer's outputs for equal examples, each with a key of its own."""
    lowered = lower_function(lambda x: layer(x)[0].detach(), [torch.ones(1, TIME, FEATURES)])
    x = jnp.ones((1, TIME, FEATURES), jnp.float32)
    step = jax.vmap(lambda key, flag: lowered(x, run=Run(key, flag))[0], in_axes=(0, None))
    run = jax.jit(step, compiler_options=QUICKEST_TO_COMPILE)

    def draw(seed=0, *, randomness=True):
        keys = jax.random.split(jax.random.key(seed), BATCH)
        return np.asarray(run(keys, jnp.array(randomness)))

    return draw


def dropping(layers=3, p=0.5):
    return nn.LSTM(FEATURES, 16, layers, dropout=p, batch_first=True).requires_grad_(False)


def test_dropout_between_layers_differs_between_examples_and_steps():
    draw = drawing(dropping())
    first, second = draw(0), draw(1)
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], second[0])
    np.testing.assert_array_equal(first, draw(0))


def test_dropout_between_layers_drops_all_but_the_last_output():
    layer = dropping(layers=2, p=1.0)
    x, last = torch.zeros(1, TIME, 16), nn.LSTM(16, 16, batch_first=True)
    last.load_state_dict(
        {n.replace("l1", "l0"): p for n, p in layer.state_dict().items() if "l1" in n}
    )
    expected = last(x)[0].detach().numpy()
    np.testing.assert_allclose(drawing(layer)()[-1], expected, rtol=1e-5, atol=1e-6)


def test_dropout_between_layers_is_off_without_randomness():
    layer = dropping()
    off = drawing(layer)(randomness=False)
    expected = layer.eval()(torch.ones(1, TIME, FEATURES))[0].numpy()
    np.testing.assert_allclose(off[-1], expected, rtol=1e-5, atol=1e-6)


def test_layer_keeps_its_weights_when_it_is_lowered():
    model, loss_fn, args = MODELS["gru"]()
    lower(model, loss_fn, [x[:1] for x in args], {})
    flat = model.layer._flat_weights
    assert all(a is b for a, b in zip(flat, model.layer.parameters(), strict=True))


class Packing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(FEATURES, HIDDEN, batch_first=True)

    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([2]), batch_first=True)
        return self.layer(packed)[1][0]


def test_packed_sequence_is_refused():
    x = sequences()
    with pytest.raises(NotImplementedError, match=r"must not pack sequences.*padded"):
        lower(Packing(), F.mse_loss, (x[:1], torch.ones(1, 1, HIDDEN)), {})
    assert Packing()(x[:1]).shape == (1, 1, HIDDEN)


def test_recurrent_model_is_trained_with_one_program():
    model, loss_fn, args = MODELS["lstm"]()
    before = model.layer.weight_hh_l0.detach().clone()
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        loss_fn=loss_fn,
        l2_clip_norm=1.0,
        noise_multiplier=0.0,
        expected_batch_size=BATCH,
    )
    for _ in range(3):
        optimizer.backward(*args)
        optimizer.step()
        model(args[0][:1])
    assert not torch.equal(before, model.layer.weight_hh_l0)
    assert len(optimizer._gradient._programs) == 1
