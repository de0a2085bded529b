"""Every example runs in its short form, and the loop of the README as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = {
    "digits.py": ["--steps", "30", "--report-every", "15", "--floor", "0.6"],
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


def test_digits_fails_its_own_check_below_the_floor():
    command = [sys.executable, EXAMPLES / "digits.py", "--steps", "2", "--floor", "1.1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "accuracy is below 1.1" in done.stderr


SETTING = """
import torch

def make_model():
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))

dataset = torch.utils.data.TensorDataset(torch.randn(1000, 4), torch.randint(3, (1000,)))
"""


def test_the_loop_of_the_readme_runs():
    text = (EXAMPLES.parent / "README.md").read_text()
    loop, helpers, _ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = SETTING + loop.replace("steps=300", "steps=3") + helpers + "print(noise_multiplier)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    spent, noise_multiplier = map(float, done.stdout.split())
    assert spent > 0
    assert noise_multiplier > 0


def test_the_explanation_of_the_readme_prints():
    text = (EXAMPLES.parent / "README.md").read_text()
    _, _, explanation = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    setting = """
import dpkernels, jax.numpy as jnp

def loss(params, x):
    return jnp.sum(jnp.tanh(x @ params))

params, batch = jnp.ones((3, 2)), jnp.ones((5, 3))
"""
    command = [sys.executable, "-c", setting + explanation]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "dot_general" in done.stdout
