"""Every op of an exported program that JAX has no rule for, not the first one alone."""

import itertools
import operator
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch.fx import Graph, GraphModule, Node

from dpbridge._compat import x64
from dpbridge.dtypes import to_jax_dtype
from dpbridge.findings import Finding
from dpbridge.lowering import Program
from dpbridge.lowering.interpreter import Tensor, evaluate
from dpbridge.lowering.table import Run, at_line, op_name

# What tracing raises; NotImplementedError is a RuntimeError.
TRACE_ERRORS = (RuntimeError, TypeError, ValueError)

STATE = "order of ops"


def op_findings(program: Program) -> list[Finding]:
    """Returns a finding for each op that cannot be lowered, and none if the program can.

    The whole program is traced first, as training does. If that fails, each op is traced alone,
    so that one that fails does not hide those behind it.
    """
    try:
        _trace(program)
    except TRACE_ERRORS as error:
        places: dict[tuple[str, str, str], list[str]] = {}
        of_example = [name is None for name in program.inputs]
        # Which block an op lies in makes no difference to whether it can be lowered.
        half = {device: dtype for dtype in program.half_types for device in ("cpu", "cuda")}
        for node, text in _refusals(program.graph_module, of_example, half):
            what, where = op_name(node.target), at_line(node).removeprefix(" at ")
            text = text.removeprefix(f"`{what}`{at_line(node)} ")
            places.setdefault((what, *split(text)), []).append(where)
        findings = [
            Finding(what, _joined(where), why, replacement)
            for (what, why, replacement), where in places.items()
        ]
        # Ops that pass alone and not together: one writes into a buffer, say.
        return findings or [finding_of(error, STATE)]
    return []


def finding_of(error: BaseException, what: str) -> Finding:
    """Returns an error as a finding, at the last line of the user's that it came through."""
    return Finding(what, user_line(error), *split(str(error)))


def split(text: str) -> tuple[str, str]:
    """Returns why and what to do of an error's text: its first sentence, and the rest.

    >>> split("`x` must be positive, got -1. Pass its absolute value.")
    ('`x` must be positive, got -1', 'Pass its absolute value.')
    """
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()] or [""]
    if len(lines) > 1:  # The middle is the trace of a library.
        return lines[0].rstrip(":."), lines[-1]
    why, _, rest = lines[0].partition(". ")
    return why.rstrip("."), rest


def user_line(error: BaseException | None) -> str:
    """Returns the line that an error came from, as `path:12: code`; empty if it is no user's."""
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
        if own:
            return f"{own[-1].filename}:{own[-1].lineno}: `{own[-1].line}`"
        error = error.__cause__ or error.__context__
    return ""


_LIBRARIES = (
    *(str(Path(str(library.__file__)).parent) for library in (torch, jax, traceback)),
    str(Path(__file__).parent),
    "<",
)


def _trace(program: Program) -> None:
    placeholders = program.graph_module.graph.find_nodes(op="placeholder")
    with x64():
        structs = [_struct(node) for node in placeholders]
        pairs = list(zip(program.inputs, structs, strict=True))
        arrays = {name: struct for name, struct in pairs if name is not None}
        leaves = [struct for name, struct in pairs if name is None]
        jax.eval_shape(program, arrays, jax.random.key(0), jnp.array(True), *leaves)


def _refusals(
    graph_module: GraphModule, of_example: Sequence[bool], half: Mapping[str, torch.dtype]
) -> Iterator[tuple[Node, str]]:
    """Yields the ops that cannot be lowered, and why.

    Args:
        graph_module: The graph.
        of_example: For each of its inputs whether it depends on the example.
        half: See `Run.autocast`.
    """
    # What is written in place is passed over: then at worst an op is found that much later.
    dependent = set(itertools.compress(_inputs(graph_module), of_example))
    for node in graph_module.graph.nodes:
        if not dependent.isdisjoint(node.all_input_nodes):
            dependent.add(node)
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        inner: list[tuple[Node, str]] = []
        for body in _bodies(node):
            operands = node.args[len(node.args) - len(_inputs(body)) :]
            inner += _refusals(body, [operand in dependent for operand in operands], half)
        yield from inner
        text = None if inner else _refusal(node, dependent, half)
        if text is not None:
            yield node, text


def _inputs(graph_module: GraphModule) -> list[Node]:
    return list(graph_module.graph.find_nodes(op="placeholder"))


def _bodies(node: Node) -> list[GraphModule]:
    """Returns the graphs that an op such as a `no_grad` region runs."""
    held = [_held(source) for source in node.all_input_nodes]
    return [body for body in held if isinstance(body, GraphModule)]


def _held(node: Node) -> Any:
    return getattr(node.graph.owning_module, str(node.target)) if node.op == "get_attr" else None


def _refusal(node: Node, dependent: set[Node], half: Mapping[str, torch.dtype]) -> str | None:
    """Returns why an op cannot be lowered where nothing but its inputs is known, or None."""
    sources = node.all_input_nodes
    held = {source: _held(source) for source in sources}
    if not all(held[source] is not None or _is_static(source) for source in sources):
        return None  # What made this input has a finding of its own.
    alone = _alone(node)

    def run(*arrays: jax.Array) -> Any:
        waiting = iter(arrays)
        inputs: list[Any] = [
            Tensor.of(next(waiting), of_example=source in dependent)
            if held[source] is None
            else held[source]
            for source in sources
        ]
        return evaluate(alone, inputs, Run(jax.random.key(0), jnp.array(True), half))

    try:
        with x64():
            jax.eval_shape(run, *[_struct(source) for source in sources if held[source] is None])
    except TRACE_ERRORS as error:
        return str(error)
    return None


def _alone(node: Node) -> GraphModule:
    """Returns a graph of this op alone, with its inputs as placeholders."""
    graph = Graph()
    places = {source: graph.placeholder(source.name) for source in node.all_input_nodes}
    for source, place in places.items():
        place.meta = dict(source.meta)
    graph.output((graph.node_copy(node, places.__getitem__),))
    return GraphModule(torch.nn.Module(), graph)


def _is_static(node: Node) -> bool:
    fake = node.meta.get("val")
    return isinstance(fake, torch.Tensor) and all(type(size) is int for size in fake.shape)


def _struct(node: Node) -> jax.ShapeDtypeStruct:
    fake = node.meta["val"]
    return jax.ShapeDtypeStruct(tuple(fake.shape), to_jax_dtype(fake.dtype))


def _joined(places: list[str]) -> str:
    places = list(dict.fromkeys(places))
    more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
    return places[0] + more
