"""Every example runs in its short form, and the loop of the README as it stands there."""

import importlib.util
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = {
    # Every draw is the whole set, so that there is one size, and one program to compile.
    "digits.py": [
        *("--steps", "15", "--batch-size", "1437", "--report-every", "10", "--floor", "0.4"),
    ],
    "flax_model.py": ["--steps", "15", "--batch-size", "1437", "--floor", "0.4"],
    "lightning_digits.py": ["--short"],
    "unchanged_loop.py": ["--epochs", "6", "--batch-size", "1437", "--floor", "0.4"],
    "resume.py": ["--epochs", "1", "--batch-size", "300", "--every", "2"],
    "lora_gpt2.py": [
        *("--examples", "256", "--batch-size", "256", "--epochs", "8", "--drop", "0.5"),
    ],
    "huggingface_trainer.py": [
        *("--examples", "64", "--batch-size", "64", "--epochs", "8", "--ceiling", "4.5"),
    ],
}
# What an example makes on demand: the option, the file, and how such a file begins.
MADE = {
    "digits.py": ("--plot", "digits.png", b"\x89PNG"),
    "flax_model.py": ("--checkpoint", "digits.pt", b"PK"),
    "lightning_digits.py": ("--checkpoint", "digits.ckpt", b"PK"),
    "resume.py": ("--checkpoint", "run.pt", b"PK"),
    "huggingface_trainer.py": ("--output", "trainer/checkpoint-8/loader.pt", b"PK"),
}
FOLDERS = {"huggingface_trainer.py": "trainer"}  # where the option names one, not the file
# The main job as a user runs it. The others run in this process.
ALONE = {"digits.py"}
NEEDED = {
    "flax_model.py": "flax",
    "lightning_digits.py": "lightning",
    "lora_gpt2.py": "peft",
    "huggingface_trainer.py": "accelerate",
}


def test_every_example_has_a_short_form():
    assert set(SHORT) == {path.name for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("name", SHORT)
def test_example_runs(name, tmp_path, monkeypatch, capsys):
    if name in NEEDED and importlib.util.find_spec(NEEDED[name]) is None:
        pytest.skip(f"needs {NEEDED[name]}")
    option, file, beginning = MADE.get(name, (None, None, None))
    path = tmp_path / (FOLDERS.get(name) or file or "")
    options = [*SHORT[name], *([option, str(path)] if option else [])]
    if name in ALONE:
        command = [sys.executable, EXAMPLES / name, *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        printed = done.stdout
    else:
        run_here(name, options, monkeypatch)
        printed = capsys.readouterr().out
    assert "target 8" in printed
    if file is not None:
        assert (tmp_path / file).read_bytes().startswith(beginning)


def run_here(name, options, monkeypatch):
    """Runs an example in this process: starting another takes longer than most of them."""
    monkeypatch.setattr(sys, "argv", [name, *options])
    with jax.numpy_dtype_promotion("standard"), warnings.catch_warnings():
        warnings.simplefilter("default")
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.slow
def test_digits_fails_its_own_check_below_the_floor(monkeypatch):
    options = ["--model", "mlp", "--batch-size", "32", "--steps", "1", "--floor", "1.1"]
    with pytest.raises(SystemExit, match=r"accuracy is below 1\.1"):
        run_here("digits.py", options, monkeypatch)


SETTING = """
import torch

def make_model():
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))

dataset = torch.utils.data.TensorDataset(torch.randn(1000, 4), torch.randint(3, (1000,)))
"""


def blocks_of_the_readme():
    text = (EXAMPLES.parent / "README.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_unchanged_loop_of_the_readme_runs(capsys):
    loop, *_ = blocks_of_the_readme()
    setting = """
model = make_model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = torch.utils.data.DataLoader(dataset, batch_size=500, shuffle=True)
"""
    exec(SETTING + setting + loop.replace("10", "2"), {})
    assert 2.8 < float(capsys.readouterr().out) <= 3.0


def test_the_other_loop_of_the_readme_runs(capsys):
    _, loop, helpers, *_ = blocks_of_the_readme()
    loop = "import dpbridge\nmodel = make_model()\n" + loop.replace("steps=300", "steps=3")
    exec(SETTING + loop + helpers + "print(optimizer.epsilon(delta=1e-5), noise_multiplier)", {})
    spent, noise_multiplier = map(float, capsys.readouterr().out.split())
    assert spent > 0
    assert noise_multiplier > 0


def test_the_plan_of_the_readme_runs(capsys):
    *_, plan, _ = blocks_of_the_readme()
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
    *_, explanation = blocks_of_the_readme()
    exec(setting + explanation, {})
    assert "dot_general" in capsys.readouterr().out
