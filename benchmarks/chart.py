"""The bar chart: time over torch's plain step, one group a row."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.targets import ratio

Record = Mapping[str, Any]


def draw(report: Record, path: Path) -> None:
    """Writes the chart as PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = list(report["rows"].values())
    titles = {name: found["title"] for row in rows for name, found in row["contenders"].items()}
    titles.pop("torch", None)
    figure, axes = plt.subplots(figsize=(4 + 1.6 * len(rows), 5), layout="constrained")
    width = 0.85 / max(1, len(titles))
    colours = plt.get_cmap("tab10")
    for i, (name, title) in enumerate(titles.items()):
        found = [(at, ratio(row, name, "torch")) for at, row in enumerate(rows)]
        at = [place + (i - (len(titles) - 1) / 2) * width for place, r in found if r is not None]
        axes.bar(at, [r for _, r in found if r is not None], width, label=title, color=colours(i))
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set_yscale("log")
    axes.set_ylabel("time over torch's plain step")
    axes.set_xticks(range(len(rows)), [row["title"].replace(", ", ",\n") for row in rows])
    axes.tick_params(axis="x", labelsize=7)
    axes.legend(fontsize=7, ncols=3)
    axes.set_title(f"{report['machine']['cpu']}, {report['machine']['cores']} cores")
    figure.savefig(path, dpi=120)
    plt.close(figure)
