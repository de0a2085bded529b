"""The lines of a journal: what they say of a run and its releases, and how they are read.

The first is `{"dpbridge_journal": 1, "run": "4f…", "first": 0}`, and each of the others a step.

Example:
    >>> step_of(line_of(EndlessStep(1, noise_multiplier=1.1, sampling_prob=0.01)))
    EndlessStep(step=1, noise_multiplier=1.1, sampling_prob=0.01)
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from dpkernels import _validate

_MARK, _VERSION = "dpbridge_journal", 1
# What any journal begins with.
BEGINNING = f'{{"{_MARK}": '.encode()


class EndlessStep(NamedTuple):
    """A release of a run without a plan.

    Attributes:
        step: Its number in the noise stream, from 1 on.
        noise_multiplier: As in `Ledger.record`.
        sampling_prob: As in `Ledger.record`.
    """

    step: int
    noise_multiplier: float
    sampling_prob: float | None


class PlannedStep(NamedTuple):
    """A release of a run that follows a plan.

    Attributes:
        step: Its number in the plan, from 1 on.
        draws: The loader's hash of all draws up to this step's, or None without a loader.
        release: The hash of what was released.
    """

    step: int
    draws: str | None
    release: str


Step = EndlessStep | PlannedStep


def name_of(seed: int, run: int | None) -> str:
    """Returns what tells a run's journal from that of another, and does not tell its seed.

    Whoever tries all seeds finds it; but so they do in the released gradients.
    """
    return hashlib.sha256(f"dpbridge journal of run {run} of seed {seed}".encode()).hexdigest()


def digest_of(released: Mapping[str, torch.Tensor]) -> str:
    """Returns a hash of tensors with their names, types and shapes."""
    whole = hashlib.sha256()
    for name in sorted(released):
        tensor = released[name].detach().cpu().contiguous()
        whole.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def header_line(run: str, first: int) -> bytes:
    """Returns the first line of a run's journal, which lacks its first so many steps."""
    return json.dumps({_MARK: _VERSION, "run": run, "first": first}).encode() + b"\n"


def line_of(step: Step) -> bytes:
    """Returns the line of a release."""
    return json.dumps(step._asdict(), allow_nan=False).encode() + b"\n"


def header_of(line: bytes) -> dict[str, Any] | None:
    """Returns what a first line says, or None if it is none."""
    found = _parsed(line)
    is_header = set(found) == {_MARK, "run", "first"} and found[_MARK] == _VERSION
    is_whole = is_header and isinstance(found["run"], str) and _is_count(found["first"])
    return found if is_whole else None


def step_of(line: bytes) -> Step | None:
    """Returns the release that a line is of, or None if it is none."""
    found = _parsed(line)
    if not _is_count(found.get("step")):
        return None
    if set(found) == set(EndlessStep._fields):
        return _endless_step(**found)
    if set(found) == set(PlannedStep._fields):
        is_whole = isinstance(found["release"], str) and isinstance(found["draws"], str | None)
        return PlannedStep(**found) if is_whole else None
    return None


def _endless_step(step: int, noise_multiplier: Any, sampling_prob: Any) -> EndlessStep | None:
    try:
        _validate.non_negative("noise_multiplier", noise_multiplier, "")
        if sampling_prob is not None:
            _validate.probability("sampling_prob", sampling_prob, "")
    except (TypeError, ValueError):
        return None
    return EndlessStep(step, noise_multiplier, sampling_prob)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**32


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
