"""Every example runs in its short form, and the loop of the README as it stands there."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = {
    "digits.py": ["--steps", "25", "--batch-size", "64", "--report-every", "15", "--floor", "0.6"],
}


def test_every_example_has_a_short_form():
    assert set(SHORT) == {path.name for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("name", SHORT)
def test_example_runs(name, tmp_path):
    picture = tmp_path / "picture.png"
    command = [sys.executable, EXAMPLES / name, *SHORT[name], "--plot", picture]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "target 8" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_digits_fails_its_own_check_below_the_floor(monkeypatch):
    """In this process: starting another takes longer than the example."""
    options = ["--model", "mlp", "--batch-size", "32", "--steps", "1", "--floor", "1.1"]
    monkeypatch.setattr(sys, "argv", ["digits.py", *options])
    with pytest.raises(SystemExit, match=r"accuracy is below 1\.1"):
        runpy.run_path(str(EXAMPLES / "digits.py"), run_name="__main__")


SETTING = """
import torch

def make_model():
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))

dataset = torch.utils.data.TensorDataset(torch.randn(1000, 4), torch.randint(3, (1000,)))
"""


def blocks_of_the_readme():
    text = (EXAMPLES.parent / "README.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_loop_of_the_readme_runs(capsys):
    loop, helpers, _, _ = blocks_of_the_readme()
    exec(SETTING + loop.replace("steps=300", "steps=3") + helpers + "print(noise_multiplier)", {})
    spent, noise_multiplier = map(float, capsys.readouterr().out.split())
    assert spent > 0
    assert noise_multiplier > 0


def test_the_plan_of_the_readme_runs(capsys):
    _, _, plan, _ = blocks_of_the_readme()
    setting = (
        SETTING + "import dpbridge\nmodel, loss_fn = make_model(), torch.nn.CrossEntropyLoss()\n"
    )
    exec(setting + plan.replace("iterations=300", "iterations=3"), {})
    assert 2.9 < float(capsys.readouterr().out) <= 3.0


def test_the_explanation_of_the_readme_prints(capsys):
    setting = """
import dpkernels, jax.numpy as jnp

def loss(params, x):
    return jnp.sum(jnp.tanh(x @ params))

params, batch = jnp.ones((3, 2)), jnp.ones((5, 3))
"""
    _, _, _, explanation = blocks_of_the_readme()
    exec(setting + explanation, {})
    assert "dot_general" in capsys.readouterr().out
