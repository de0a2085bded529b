"""Time and memory of calls that share a machine."""

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

_VISIT_SECONDS = 0.3
_PAUSE_SECONDS = 0.02


class Spread(NamedTuple):
    """Median and quartiles."""

    low: float
    median: float
    high: float


def spread(values: list[float]) -> Spread:
    """Returns median and quartiles of at least one value."""
    if len(values) == 1:
        return Spread(*values * 3)
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


def interleave(
    calls: Mapping[str, Callable[[], None]],
    *,
    repeats: int,
    clear: Callable[[str], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Times calls round by round, so that whatever slows the machine slows them alike.

    A visit warms the caches by one call that does not count, then times calls for about 0.3
    seconds and keeps their median. Calls longer than that are warm after the first round; they
    are timed once a visit.

    Args:
        calls: What to time, each warm already.
        repeats: How many rounds.
        clear: Called with a name after each visit.

    Returns:
        For each name the seconds of a call, one for each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    guess = dict.fromkeys(calls, 0.0)
    for _ in range(repeats):
        for name, call in calls.items():
            time.sleep(_PAUSE_SECONDS)  # The threads of the one before fall asleep.
            if guess[name] < _VISIT_SECONDS:
                guess[name] = _time(call)
            count = max(1, min(9, int(_VISIT_SECONDS / guess[name])))
            guess[name] = statistics.median(_time(call) for _ in range(count))
            seconds[name].append(guess[name])
            clear(name)
    return seconds


def _time(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rss_growth(call: Callable[[], None]) -> int | None:
    """Returns by how many bytes the resident memory grows while a call runs; None off Linux.

    The call should have run before. What it returns or keeps counts too: gradients do.
    """
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # Free memory goes back to the system, so it grows anew.
    reset.write_text("5")  # Sets the peak to what is resident now.
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found.group(1)) if found else 0
