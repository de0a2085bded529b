"""Read the program of one example: what does not depend on it, and where parameters meet data."""

import collections
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import jax.extend.core as jexc
import jax.numpy as jnp
from jax.extend.core import primitives

from dpkernels._compat import bind, inner_jaxpr, scan_counts

_CALLS = frozenset({primitives.jit_p, primitives.remat_p, primitives.closed_call_p})


@dataclass(frozen=True)
class Outer:
    """A value without a batch axis: a parameter, a constant, or computed from these alone."""

    index: int


@dataclass(frozen=True)
class Local:
    """A value that depends on the example, or changes from turn to turn of a loop."""

    index: int


@dataclass(frozen=True)
class Value:
    """A literal."""

    value: Any


Atom: TypeAlias = Outer | Local | Value


@dataclass(frozen=True)
class OuterStep:
    """An equation that no example takes part in."""

    eqn: Any
    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Plain:
    """An equation without trainable inputs."""

    eqn: Any
    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Site:
    """An equation that takes both data and something computed from parameters.

    Attributes:
        eqn: The equation; None for a value without data that a loop makes depend on data.
        inputs: What it takes.
        outputs: Its results.
        avals: Their shapes and types.
        weights: Positions of the trainable inputs.
        loops: Lengths of the loops around it, outermost first.
        has_tap: Whether its gradient is taken here; otherwise that of another site stands for it.
    """

    eqn: Any
    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]
    avals: tuple[Any, ...]
    weights: tuple[int, ...]
    loops: tuple[int, ...]
    has_tap: bool = True

    @property
    def saved(self) -> tuple[int, ...]:
        """Positions of the inputs to keep, a value for each example, for its gradient."""
        local = tuple(i for i, atom in enumerate(self.inputs) if isinstance(atom, Local))
        if local or self.eqn is None:
            return local
        return tuple(i for i in range(len(self.inputs)) if i not in self.weights)

    @property
    def weight_refs(self) -> tuple[int, ...]:
        """What its trainable inputs are, as indices into the graph's outer values."""
        return tuple(self.inputs[i].index for i in self.weights)  # type: ignore[union-attr]


@dataclass(frozen=True)
class Loop:
    """A `lax.scan` with sites inside."""

    eqn: Any
    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]
    body: "Level"


Step: TypeAlias = Plain | Site | Loop


@dataclass
class Level:
    """The steps of the program, or of a loop's body.

    Attributes:
        inputs: Indices of the local values that it is given.
        steps: In order of evaluation.
        outputs: What it returns.
        skips: Values whose gradients are to be computed once, see `once`. Those of inputs are, by
            themselves: nothing here takes them.
    """

    inputs: tuple[int, ...] = ()
    steps: list[Step] = field(default_factory=list)
    outputs: tuple[Atom, ...] = ()
    skips: frozenset[int] = frozenset()

    def sites(self) -> list[Site]:
        """Returns all sites, those of inner loops included, in order."""
        nested = ([s] if isinstance(s, Site) else _sites_of(s) for s in self.steps)
        return list(itertools.chain.from_iterable(nested))

    def use_counts(self) -> collections.Counter[int]:
        """Counts how often each local value is taken by a step, or returned."""
        taken = [*self.outputs, *(atom for step in self.steps for atom in step.inputs)]
        return collections.Counter(atom.index for atom in taken if isinstance(atom, Local))


def _sites_of(step: Step) -> list[Site]:
    return step.body.sites() if isinstance(step, Loop) else []


class Graph:
    """What `read` finds.

    Attributes:
        avals: Shape and type of each outer value.
        trains: Whether an outer value depends on a parameter in a way that gradients follow.
        constants: Outer values that are known already.
        outer_steps: How the other outer values are computed, in order.
        made_by: The outer step that makes an outer value, by index.
        top: The program of the example.
    """

    def __init__(self) -> None:
        self.avals: list[Any] = []
        self.trains: list[bool] = []
        self.constants: dict[int, Any] = {}
        self.outer_steps: list[OuterStep] = []
        self.made_by: dict[int, OuterStep] = {}
        self.top = Level()

    def add(self, aval: Any, trains: bool) -> int:
        """Adds an outer value; returns its index."""
        self.avals.append(aval)
        self.trains.append(trains)
        return len(self.avals) - 1

    def evaluate(self, inputs: Sequence[Any], constants: dict[int, Any]) -> dict[int, Any]:
        """Returns all outer values, by index, from the first ones: parameters and constants."""
        values = {**constants, **dict(enumerate(inputs))}
        for step in self.outer_steps:
            operands = [self.read(atom, values) for atom in step.inputs]
            values.update(zip(step.outputs, bind(step.eqn, operands), strict=True))
        return values

    def read(self, atom: Atom, values: dict[int, Any]) -> Any:
        """Returns what an atom without a batch axis stands for."""
        return atom.value if isinstance(atom, Value) else values[atom.index]

    def ancestors(self, refs: Sequence[int]) -> list[OuterStep]:
        """Returns the outer steps that these outer values are computed by, in order."""
        wanted, found = set(refs), []
        for step in reversed(self.outer_steps):
            if wanted.intersection(step.outputs):
                found.append(step)
                wanted.update(x.index for x in step.inputs if isinstance(x, Outer))
        return found[::-1]


def read(
    closed: jexc.ClosedJaxpr,
    *,
    num_trainable: int,
    num_differentiated: int,
    keeps_site: Callable[[Any, tuple[int, ...]], bool],
) -> Graph:
    """Reads the program of one example.

    Args:
        closed: Its inputs are the trainable parameters, then the example. Its first outputs are
            what is differentiated.
        num_trainable: How many inputs are trainable.
        num_differentiated: How many outputs are differentiated.
        keeps_site: Asked of an equation without data, and the positions of its trainable inputs,
            whether it is to be a site all the same.
    """
    graph = Graph()
    reader = _Reader(graph, keeps_site)
    invars = closed.jaxpr.invars
    for var in invars[:num_trainable]:
        graph.add(var.aval, _is_float(var.aval))
    atoms: list[Atom] = [Outer(i) for i in range(num_trainable)]
    locals_ = [reader.new_local() for _ in invars[num_trainable:]]
    env = reader.environment(closed, [*atoms, *locals_])
    graph.top.inputs = tuple(x.index for x in locals_)
    reader.walk(closed.jaxpr, env, graph.top.steps, ())
    outputs = [reader.look_up(env, var) for var in closed.jaxpr.outvars]
    for i in range(num_differentiated):
        outputs[i] = reader.joined(outputs[i], graph.top.steps, ())
    graph.top.outputs = tuple(outputs)
    graph.top.steps = _drop_dead_ends(graph.top.steps, outputs[:num_differentiated])
    return graph


class _MustStayInLoopError(Exception):
    """A derivative rule of the user's, on parameters alone, that must be asked at every turn.

    It need not be linear, so that what it makes of the sum over turns says nothing.
    """


class _Reader:
    """Sorts equations into outer and local ones while it follows calls and loops."""

    def __init__(self, graph: Graph, keeps_site: Callable[[Any, tuple[int, ...]], bool]) -> None:
        self.graph = graph
        self.keeps_site = keeps_site
        self._fresh = itertools.count()

    def new_local(self) -> Local:
        return Local(next(self._fresh))

    def environment(self, closed: jexc.ClosedJaxpr, inputs: Sequence[Atom]) -> dict[Any, Atom]:
        env: dict[Any, Atom] = dict(zip(closed.jaxpr.invars, inputs, strict=True))
        for var, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
            index = self.graph.add(var.aval, False)
            self.graph.constants[index] = value
            env[var] = Outer(index)
        return env

    def look_up(self, env: dict[Any, Atom], var: Any) -> Atom:
        return Value(var.val) if isinstance(var, jexc.Literal) else env[var]

    def is_trainable(self, atom: Atom) -> bool:
        return isinstance(atom, Outer) and self.graph.trains[atom.index]

    def walk(
        self, jaxpr: Any, env: dict[Any, Atom], steps: list[Step], loops: tuple[int, ...]
    ) -> None:
        for eqn in jaxpr.eqns:
            inputs = [self.look_up(env, var) for var in eqn.invars]
            outputs = self._read(eqn, inputs, steps, loops)
            env.update(zip(eqn.outvars, outputs, strict=True))

    def _read(
        self, eqn: Any, inputs: list[Atom], steps: list[Step], loops: tuple[int, ...]
    ) -> Sequence[Atom]:
        is_trainable = any(self.is_trainable(atom) for atom in inputs)
        is_local = any(isinstance(atom, Local) for atom in inputs)
        if is_local and not is_trainable:
            return self._plain(eqn, inputs, steps)
        if eqn.primitive in _CALLS:
            body = inner_jaxpr(eqn)
            env = self.environment(body, inputs)
            self.walk(body.jaxpr, env, steps, loops)
            return [self.look_up(env, var) for var in body.jaxpr.outvars]
        if not is_local and not (is_trainable and self.keeps_site(eqn, self._weights(inputs))):
            if loops and is_trainable and eqn.primitive is primitives.custom_vjp_call_p:
                raise _MustStayInLoopError
            return self._outer(eqn, inputs, is_trainable)
        if eqn.primitive is primitives.scan_p and self._can_enter(eqn, inputs):
            try:
                return self._loop(eqn, list(inputs), steps, loops)
            except _MustStayInLoopError:
                pass
        return self._site(eqn, inputs, steps, loops)

    def _outer(self, eqn: Any, inputs: list[Atom], is_trainable: bool) -> list[Atom]:
        passes = is_trainable and eqn.primitive is not primitives.stop_gradient_p
        outputs = tuple(
            self.graph.add(var.aval, passes and _is_float(var.aval)) for var in eqn.outvars
        )
        step = OuterStep(eqn, tuple(inputs), outputs)
        self.graph.outer_steps.append(step)
        self.graph.made_by.update(dict.fromkeys(outputs, step))
        return [Outer(index) for index in outputs]

    def _plain(self, eqn: Any, inputs: list[Atom], steps: list[Step]) -> list[Atom]:
        outputs = [self.new_local() for _ in eqn.outvars]
        steps.append(Plain(eqn, tuple(inputs), tuple(x.index for x in outputs)))
        return list(outputs)

    def _site(
        self, eqn: Any, inputs: list[Atom], steps: list[Step], loops: tuple[int, ...]
    ) -> Sequence[Atom]:
        outputs = [self.new_local() for _ in eqn.outvars]
        steps.append(
            Site(
                eqn,
                tuple(inputs),
                tuple(x.index for x in outputs),
                tuple(var.aval for var in eqn.outvars),
                self._weights(inputs),
                loops,
            )
        )
        return outputs

    def _weights(self, inputs: Sequence[Atom]) -> tuple[int, ...]:
        return tuple(i for i, atom in enumerate(inputs) if self.is_trainable(atom))

    def joined(self, atom: Atom, steps: list[Step], loops: tuple[int, ...]) -> Atom:
        """Makes a trainable value without data a site of its own, where it becomes local."""
        if not self.is_trainable(atom):
            return atom
        output = self.new_local()
        aval = self.graph.avals[atom.index]  # type: ignore[union-attr]
        steps.append(Site(None, (atom,), (output.index,), (aval,), (0,), loops))
        return output

    def _can_enter(self, eqn: Any, inputs: list[Atom]) -> bool:
        num_consts, num_carry, _ = scan_counts(eqn)
        return not any(self.is_trainable(atom) for atom in inputs[num_consts + num_carry :])

    def _loop(
        self, eqn: Any, inputs: list[Atom], steps: list[Step], loops: tuple[int, ...]
    ) -> Sequence[Atom]:
        num_consts, num_carry, _ = scan_counts(eqn)
        carry = slice(num_consts, num_consts + num_carry)
        inputs[carry] = [self.joined(atom, steps, loops) for atom in inputs[carry]]
        inside: list[Atom] = [
            atom if isinstance(atom, Outer) and position < num_consts else self.new_local()
            for position, atom in enumerate(inputs)
        ]
        body, level = inner_jaxpr(eqn), Level()
        env = self.environment(body, inside)
        around = (*loops, eqn.params["length"])
        self.walk(body.jaxpr, env, level.steps, around)
        outputs = [self.look_up(env, var) for var in body.jaxpr.outvars]
        level.inputs = tuple(x.index for x in inside if isinstance(x, Local))
        level.outputs = tuple(self.joined(atom, level.steps, around) for atom in outputs)
        results = [self.new_local() for _ in eqn.outvars]
        taken = tuple(
            given for given, atom in zip(inputs, inside, strict=True) if isinstance(atom, Local)
        )
        steps.append(Loop(eqn, taken, tuple(x.index for x in results), level))
        return results


def _drop_dead_ends(steps: list[Step], outputs: Sequence[Atom]) -> list[Step]:
    """Turns sites that what is differentiated does not depend on into plain steps."""
    alive = {atom.index for atom in outputs if isinstance(atom, Local)}
    kept: list[Step] = []
    for step in reversed(steps):
        is_alive = bool(alive.intersection(step.outputs))
        if is_alive:
            alive.update(_followed(step))
        if isinstance(step, Loop):
            ends = step.body.outputs if is_alive else ()
            inner = Level(
                step.body.inputs, _drop_dead_ends(step.body.steps, ends), step.body.outputs
            )
            kept.append(Loop(step.eqn, step.inputs, step.outputs, inner))
        elif isinstance(step, Site) and not is_alive:
            kept.append(Plain(step.eqn, step.inputs, step.outputs))
        else:
            kept.append(step)
    return kept[::-1]


def _followed(step: Step) -> set[int]:
    """Returns the inputs that a gradient at the outputs is carried on to."""
    if isinstance(step, Loop) or step.eqn is None:
        return {atom.index for atom in step.inputs if isinstance(atom, Local)}
    if step.eqn.primitive is primitives.stop_gradient_p:
        return set()
    if not any(_is_float(var.aval) for var in step.eqn.outvars):
        return set()
    return {
        atom.index
        for atom, var in zip(step.inputs, step.eqn.invars, strict=True)
        if isinstance(atom, Local) and _is_float(var.aval)
    }


def _is_float(aval: Any) -> bool:
    # A random key has a dtype of its own kind.
    return bool(
        not jnp.issubdtype(aval.dtype, jax.dtypes.extended)
        and jnp.issubdtype(aval.dtype, jnp.inexact)
    )
