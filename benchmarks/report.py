"""The table, in Markdown, from what the JSON holds."""

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.measure import spread
from benchmarks.targets import geometric_mean, limits, overhead, ratio, verdicts

Record = Mapping[str, Any]
Cells = Iterable[str]

_INTRODUCTION = """
One gradient of one batch. A private contender clips the gradient of every example, at the median
of their norms, and adds them up; nobody adds noise. Before it is timed, each is compared with what
torch finds one example at a time, and left out if it differs. `–`: see the end.

Times are medians of {repeats} rounds, with quartiles; in each round every contender has its turn.
Temporaries and FLOPs are what XLA says of the compiled program (a loop's body counts once); FLOPs
of torch are those of its products and convolutions alone. Memory is by how much the resident set
grows while one gradient is computed, that gradient included. The first call holds all that is done
once: export, trace, compile; for the best microbatch, of every size that was tried.
"""


def markdown(report: Record) -> str:
    """Returns the whole report."""
    rows = report["rows"]
    parts = [
        "# What a private step costs",
        _machine(report),
        _INTRODUCTION.format(repeats=report["settings"]["repeats"]).strip(),
        "## Table",
        _table_of_all(rows),
        "## Geometric means",
        _table_of_means(rows),
        "## What the bridge adds",
        _table_of_bridge(rows),
        "## Targets",
        _table_of_targets(rows),
        _table_of_limits(rows),
        "## Left out",
        _refusals(rows),
    ]
    return "\n\n".join(parts) + "\n"


def _machine(report: Record) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    variables = ", ".join(f"{k}={v}" for k, v in report["settings"]["environment"].items())
    loads = ", ".join(_number(row["load_before"]) for row in report["rows"].values())
    return (
        f"{machine['cpu']}, {machine['cores']} cores; torch uses {report['settings']['threads']} "
        f"threads. {versions}. {variables}. Load before each row: {loads}."
    )


def _table_of_all(rows: Record) -> str:
    lines = []
    for row in rows.values():
        lines.append([f"**{row['title']}**", *[""] * 8])
        for name, found in row["contenders"].items():
            lines.append(_line(row, name, found))
    heads = [
        "contender", "ms", "quartiles", "/ torch", "/ JAX", "temporaries MB", "memory MB",
        "first call s", "GFLOP",
    ]  # fmt: skip
    return _table(heads, lines)


def _line(row: Record, name: str, found: Record) -> list[str]:
    if "refused" in found:
        return [found["title"], *["–"] * 8]
    time = spread([1e3 * value for value in found["seconds"]])
    return [
        found["title"],
        _number(time.median),
        f"{_number(time.low)}–{_number(time.high)}",
        _number(ratio(row, name, "torch")),
        _number(ratio(row, name, "jax")),
        _number(found["temporary_bytes"], 1e-6),
        _number(found["rss_growth_bytes"], 1e-6),
        _number(found["first_call_seconds"]),
        _number(found["flops"], 1e-9),
    ]


def _table_of_means(rows: Record) -> str:
    titles = {
        name: found["title"] for row in rows.values() for name, found in row["contenders"].items()
    }
    lines = []
    for name, title in titles.items():
        to_torch = [ratio(row, name, "torch") for row in rows.values()]
        to_jax = [ratio(row, name, "jax") for row in rows.values()]
        count = sum(value is not None for value in to_torch)
        means = (_number(geometric_mean(values)) for values in (to_torch, to_jax))
        lines.append([title, *means, f"{count} of {len(rows)}"])
    return _table(["contender", "/ torch", "/ JAX", "rows"], lines)


def _table_of_bridge(rows: Record) -> str:
    lines = []
    for row in rows.values():
        found = overhead(row)
        if found is None:
            lines.append([row["title"], *["–"] * 5])
            continue
        low, median, high = (_number(value, 1e3) for value in found.difference)
        lines.append(
            [
                row["title"],
                _number(found.step.median, 1e3),
                _number(found.parts.median, 1e3),
                f"{median} ({low}–{high})",
                f"{100 * found.difference.median / found.step.median:.1f} %",
                _number(found.hollow.median, 1e3),
            ]
        )
    note = (
        "A whole step of `DPOptimizer` (`backward` and `step`, with noise and SGD) beside its "
        "parts, each alone: the jitted program, the noise, the base optimizer. Last, a step whose "
        "program is replaced by its stored result, less noise and optimizer. All in ms."
    )
    heads = ["row", "step", "parts", "difference", "of the step", "hollow step"]
    return f"{note}\n\n{_table(heads, lines)}"


def _table_of_targets(rows: Record) -> str:
    words = {True: "reached", False: "**short**", None: "–"}
    lines = [
        [
            verdict.target,
            verdict.row,
            f"{_number(verdict.figure)} {verdict.unit}",
            f"≤ {_number(verdict.bound)} {verdict.unit}",
            words[verdict.is_reached],
        ]
        for verdict in verdicts(rows)
    ]
    return _table(["dpbridge", "row", "figure", "target", ""], lines)


def _table_of_limits(rows: Record) -> str:
    note = "What bounds them (geometric means); for the rest see `benchmarks/FINDINGS.md`."
    lines = [[what, f"{_number(figure)} ×"] for what, figure in limits(rows).items()]
    return f"{note}\n\n{_table(['bound', 'figure'], lines)}"


def _refusals(rows: Record) -> str:
    lines = []
    for row in rows.values():
        for found in row["contenders"].values():
            if "refused" in found:
                lines.append(f"- {row['title']}, {found['title']}: {found['refused']}")
            elif found["note"]:
                lines.append(f"- {row['title']}, {found['title']}, not left out: {found['note']}")
        if "refused" in row["bridge"]:
            lines.append(f"- {row['title']}, bridge: {row['bridge']['refused']}")
    return "\n".join(lines) or "Nobody."


def _table(heads: Cells, lines: Iterable[Cells]) -> str:
    heads = list(heads)
    ruled = [heads, ["---"] + ["---:"] * (len(heads) - 1), *lines]
    return "\n".join(f"| {' | '.join(cells).replace('  ', ' ')} |" for cells in ruled)


def _number(value: float | None, scale: float = 1.0) -> str:
    if value is None:
        return "–"
    value *= scale
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
