"""Runs one row: makes the contenders, checks what they find, and times them in turns."""

import gc
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bridge import make_parts
from benchmarks.contenders import CONTENDERS, Contender
from benchmarks.measure import interleave, rss_growth
from benchmarks.rows import Row
from benchmarks.task import Task, make_task

Record = dict[str, Any]

# Above this a contender computes something else. Opacus adds 1e-6 to norms; and where an input of
# a ReLU is zero but for rounding, libraries disagree about its sign: a flip in one example of the
# MLP is 3e-3 of the first layer's gradient.
_TOLERANCE = 1e-2


def run_row(row: Row, names: Sequence[str], *, repeats: int, with_bridge: bool) -> Record:
    """Runs one row.

    Args:
        row: The row.
        names: Which contenders.
        repeats: How many rounds.
        with_bridge: Whether to time the parts of a whole step too.

    Returns:
        What the JSON holds of it: times in seconds, one a round, sizes in bytes.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    task = make_task(row)
    contenders, results = {}, {}
    for name in names:
        made, results[name] = _admit(CONTENDERS[name], task)
        if made is not None:
            contenders[name] = made
    calls: dict[str, Callable[[], None]] = dict(contenders)
    bridge: Record = {}
    if with_bridge:
        bridge, parts = _admit_bridge(task)
        calls |= {f"bridge {name}": part for name, part in parts.items()}

    def clear(name: str) -> None:
        if name in contenders:
            contenders[name].clear()

    seconds = interleave(calls, repeats=repeats, clear=clear)
    for name in contenders:
        results[name]["seconds"] = seconds[name]
    if "refused" not in bridge and with_bridge:
        bridge["seconds"] = {name: seconds[f"bridge {name}"] for name in parts}
    return {
        "title": row.title,
        "l2_clip_norm": task.l2_clip_norm,
        "parameters": sum(p.numel() for p in task.weights.parameters()),
        "trainable": sum(p.numel() for p in task.weights.parameters() if p.requires_grad),
        "load_before": load,
        "contenders": results,
        "bridge": bridge,
    }


def _admit(kind: type[Contender], task: Task) -> tuple[Contender | None, Record]:
    """Makes a contender and runs it once; if that fails, or it finds something else, says why."""
    record: Record = {"title": kind.title, "is_private": kind.is_private}
    gc.collect()
    try:
        start = time.perf_counter()
        contender = kind(task)
        contender()
        record["first_call_seconds"] = time.perf_counter() - start
        record["relative_error"] = task.error(contender.gradients(), kind.is_private)
    except Exception as error:  # noqa: BLE001, whatever another library raises is its answer.
        return None, record | {"refused": _reason(error)}
    record["note"] = contender.note
    if not record["relative_error"] < _TOLERANCE:
        return None, record | {"refused": f"wrong by {record['relative_error']:.2g}"}
    contender.clear()
    record["rss_growth_bytes"] = rss_growth(contender)
    contender.clear()
    return contender, record | _size(contender)


def _size(contender: Contender) -> Record:
    """Returns temporaries and FLOPs, as XLA counts them, or FLOPs alone, as torch does."""
    compiled = contender.compiled()
    if compiled is not None:
        return {
            "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
            "flops": compiled.cost_analysis()["flops"],
        }
    counter = FlopCounterMode(display=False)
    if not contender.is_watchable:
        return {"temporary_bytes": None, "flops": None}
    try:
        with counter:
            contender()
    except Exception:  # noqa: BLE001, some libraries cannot be watched.
        return {"temporary_bytes": None, "flops": None}
    contender.clear()
    return {"temporary_bytes": None, "flops": counter.get_total_flops() or None}


def _admit_bridge(task: Task) -> tuple[Record, dict[str, Callable[[], None]]]:
    start = time.perf_counter()
    try:
        parts = dict(make_parts(task))
        record = {"made_seconds": time.perf_counter() - start}
        for part in parts.values():
            part()
    except Exception as error:  # noqa: BLE001, as above.
        return {"refused": _reason(error)}, {}
    return record, parts


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"


def set_threads(threads: int | None) -> int:
    """Sets how many threads torch uses, if asked to, and returns how many those are."""
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()
