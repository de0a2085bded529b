"""The loop of the README: Poisson draws, few compilations, and resuming in a new process."""

import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import dpbridge

COMPILATION = "/jax/core/compile/backend_compile_duration"


def make_problem(steps, batch_size=32, seed=0):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(1000, 6), torch.randint(3, (1000,)))
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    sampling_prob = batch_size / len(data)
    optimizer = dpbridge.DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9),
        model,
        loss_fn=nn.CrossEntropyLoss(),
        l2_clip_norm=1.0,
        noise_multiplier=1.1,
        expected_batch_size=batch_size,
        sampling_prob=sampling_prob,
        seed=seed,
    )
    loader = dpbridge.PoissonLoader(data, sampling_prob=sampling_prob, steps=steps, seed=seed)
    return model, optimizer, loader


def test_200_poisson_batches_compile_a_handful_of_programs():
    _, optimizer, loader = make_problem(steps=200)
    compiled, sizes = [], set()
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event == COMPILATION else None
    )
    try:
        for step, (x, y) in enumerate(loader):
            optimizer.backward(x, y)
            optimizer.step()
            optimizer.zero_grad()
            sizes.add(len(x))
            if step == 99:
                at_half = len(compiled)
    finally:
        jax.monitoring.clear_event_listeners()
    assert len(sizes) > 15
    assert optimizer.ledger.steps == 200
    # Up to seven padded sizes, the noise, and a dozen tiny programs such as folding in a key.
    assert 0 < len(compiled) <= 30
    assert len(compiled) - at_half <= 3


RESUME = """
    import sys
    import torch
    sys.path.insert(0, {tests!r})
    from bridge_main_job import make_problem

    model, optimizer, loader = make_problem(steps=12, seed=1)
    saved = torch.load({path!r}, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    loader.load_state_dict(saved["loader"])
    for x, y in loader:
        optimizer.backward(x, y)
        optimizer.step()
        optimizer.zero_grad()
    torch.save(
        {{"model": model.state_dict(), "epsilon": optimizer.epsilon(1e-5)}}, {result!r}
    )
"""


@pytest.mark.slow
def test_resuming_in_a_new_process_equals_the_uninterrupted_run_bit_for_bit(tmp_path):
    model, optimizer, loader = make_problem(steps=12)
    path, result = tmp_path / "checkpoint.pt", tmp_path / "result.pt"
    for step, (x, y) in enumerate(loader, start=1):
        optimizer.backward(x, y)
        optimizer.step()
        optimizer.zero_grad()
        if step == 5:
            parts = {"model": model, "optimizer": optimizer, "loader": loader}
            torch.save({name: part.state_dict() for name, part in parts.items()}, path)

    (tmp_path / "bridge_main_job.py").write_text(Path(__file__).read_text())
    script = textwrap.dedent(RESUME).format(tests=str(tmp_path), path=str(path), result=str(result))
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
    resumed = torch.load(result, weights_only=True)
    for name, value in model.state_dict().items():
        assert torch.equal(resumed["model"][name], value), name
    assert resumed["epsilon"] == optimizer.epsilon(1e-5)
