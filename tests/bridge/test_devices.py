"""Devices that torch and JAX share, or do not: with stand-ins, where there is no GPU."""

import warnings
from types import SimpleNamespace

import jax
import pytest
import torch
from torch import nn

import dpbridge
from dpbridge.devices import check_device

GIB = 2**30


def let_jax_see(monkeypatch, **stats):
    device = SimpleNamespace(local_hardware_id=0, memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda backend: [device])


def test_a_gpu_that_jax_cannot_see_is_refused():
    with pytest.raises(ValueError, match=r"must lie on a device that JAX sees, got cuda:7"):
        check_device(torch.device("cuda", 7))


def test_another_gpu_than_those_that_jax_sees_is_refused(monkeypatch):
    let_jax_see(monkeypatch)
    check_device(torch.device("cuda"))
    with pytest.raises(ValueError, match=r"got cuda:1 with JAX on"):
        check_device(torch.device("cuda", 1))


def test_a_model_without_memory_is_refused_where_the_optimizer_is_made():
    model = nn.Linear(2, 1, device="meta")
    with pytest.raises(ValueError, match=r"must lie on a device that JAX sees, got meta"):
        dpbridge.DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            model,
            loss_fn=nn.MSELoss(),
            l2_clip_norm=1.0,
            noise_multiplier=1.0,
            expected_batch_size=4,
        )


def test_jax_that_was_started_with_most_of_the_gpu_is_warned_of(monkeypatch):
    let_jax_see(monkeypatch, pool_bytes=60 * GIB, bytes_in_use=GIB, bytes_limit=60 * GIB)
    with pytest.warns(RuntimeWarning, match=r"JAX holds 60 GiB of .* and uses 1"):
        check_device(torch.device("cuda"))


@pytest.mark.parametrize("used", [0, 50])
def test_memory_that_jax_took_as_it_was_needed_is_fine(monkeypatch, used):
    let_jax_see(monkeypatch, pool_bytes=used * GIB, bytes_in_use=used * GIB, bytes_limit=60 * GIB)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_device(torch.device("cuda"))
