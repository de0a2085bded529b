"""The command line: which rows, which contenders, how often, and where to write."""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

from benchmarks.chart import draw
from benchmarks.contenders import CONTENDERS
from benchmarks.processor import name_in
from benchmarks.report import markdown
from benchmarks.rows import ROWS, TINY
from benchmarks.run import run_row, set_threads

_LIBRARIES = ("torch", "jax", "jaxlib", "opacus", "jax-privacy", "dpbridge")
_VARIABLES = ("OMP_WAIT_POLICY", "XLA_FLAGS")


def main() -> None:
    """Runs the rows one after another, and writes what is known after each."""
    args = _parser().parse_args()
    if args.render:
        report = json.loads(args.render.read_text())
        _write(report, args.render.parent, args.render.stem)
        return
    report = {
        "machine": _machine(),
        "versions": _versions(),
        "settings": {
            "repeats": args.repeats,
            "threads": set_threads(args.threads),
            "environment": {k: os.environ[k] for k in _VARIABLES if k in os.environ},
        },
        "rows": {},
    }
    name = args.name or re.sub(r"\W+", "-", "{cpu} {cores} cores".format(**report["machine"]))
    for key in args.rows:
        row = TINY if key == "tiny" else ROWS[key]
        start = time.perf_counter()
        report["rows"][key] = run_row(
            row, args.contenders, repeats=args.repeats, with_bridge=args.bridge
        )
        print(f"{row.title}: {time.perf_counter() - start:.0f} s", flush=True)
        _write(report, args.out, name.lower())
    print(markdown(report))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument(
        "--rows", nargs="+", default=list(ROWS), choices=[*ROWS, "tiny"], help="default: all"
    )
    parser.add_argument(
        "--contenders", nargs="*", default=list(CONTENDERS), choices=CONTENDERS, help="default: all"
    )
    parser.add_argument(
        "--bridge",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time the parts of a whole step too",
    )
    parser.add_argument("--repeats", type=int, default=9, help="rounds; the default is 9")
    parser.add_argument("--threads", type=int, help="of torch; by default as many as it takes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", help="of the files; by default the processor's")
    parser.add_argument("--render", type=Path, help="write table and chart of this JSON anew")
    return parser


def _write(report: dict[str, Any], folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / f"{name}.md").write_text(markdown(report))
    draw(report, folder / f"{name}.png")


def _machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    described = Path("/proc/cpuinfo")
    if described.exists():
        cpu = name_in(described.read_text()) or cpu
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version()}


def _versions() -> dict[str, str]:
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = "not installed"
    return found


if __name__ == "__main__":
    main()
