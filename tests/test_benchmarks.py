"""The benchmarks' harness, on a row that takes seconds."""

import json
import os
import runpy
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

# The harness runs for a quarter of a minute, and no user of the library runs it.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "benchmarks", "--rows", "tiny", "--repeats", "2"]
    command += ["--contenders", "torch", "jax", "ours", "hooks", "--out", out, "--name", "tiny"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def row(results):
    return json.loads((results / "tiny.json").read_text())["rows"]["tiny"]


@pytest.mark.parametrize("name", ["torch", "jax", "ours"])
def test_contender_finds_the_gradient_and_is_timed(row, name):
    found = row["contenders"][name]
    assert "refused" not in found, found
    assert found["relative_error"] < 1e-4
    assert len(found["seconds"]) == 2


def test_peer_that_is_not_installed_is_left_out_with_the_reason(row):
    found = row["contenders"]["hooks"]
    assert "seconds" in found or "No module named" in found["refused"]


def test_compiled_programs_have_memory_and_flops(row):
    for name in ("jax", "ours"):
        assert row["contenders"][name]["temporary_bytes"] > 0
        assert row["contenders"][name]["flops"] > 0


def test_every_part_of_a_step_is_timed(row):
    parts = row["bridge"]["seconds"]
    assert {len(seconds) for seconds in parts.values()} == {2}
    assert set(parts) == {"step", "kernel", "noise", "base", "stub"}


def test_report_holds_table_targets_and_chart(results):
    text = (results / "tiny.md").read_text()
    assert "| dpbridge |" in text
    assert "| time over torch eager | geometric mean |" in text
    assert (results / "tiny.png").read_bytes().startswith(b"\x89PNG")


def test_report_says_what_bounds_the_figures(results, row):
    text = (results / "tiny.md").read_text()
    torch, jax, ours = (row["contenders"][name] for name in ("torch", "jax", "ours"))
    times = [statistics.median(found["seconds"]) for found in (jax, torch)]
    assert f"| time of JAX without privacy, over torch | {times[0] / times[1]:.3g} × |" in text
    assert f"over JAX without privacy | {ours['flops'] / jax['flops']:.3g} × |" in text
    # Of Opacus nobody takes part: it is not installed.
    assert "were it torch's without privacy | – × |" in text


@pytest.mark.parametrize(
    ("description", "name"),
    [
        (
            "processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: A B\n",
            "A B (family 26, model 2)",
        ),
        ("processor\t: 0\nmodel name\t: ARMv7 rev 4\n", "ARMv7 rev 4"),
        ("processor\t: 0\nCPU part\t: 0xd0c\n", None),
    ],
)
def test_processors_are_named_as_far_as_they_say(description, name):
    name_in = runpy.run_path(str(ROOT / "benchmarks" / "processor.py"))["name_in"]
    assert name_in(description) == name
