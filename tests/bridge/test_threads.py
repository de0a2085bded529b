"""How many threads the base optimizer's step has, and that nothing else notices."""

import pytest
import torch
from torch import nn

from dpbridge import DPOptimizer, threads
from dpbridge.threads import one_thread_for_few


@pytest.fixture(autouse=True)
def three_threads(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def threads_inside(*tensors):
    with one_thread_for_few(tensors):
        inside = torch.get_num_threads()
    assert torch.get_num_threads() == 3
    return inside


def test_few_numbers_are_updated_on_one_thread():
    assert threads_inside(torch.zeros(2, 3), torch.zeros(4)) == 1


def test_many_numbers_are_updated_on_all(monkeypatch):
    monkeypatch.setattr(threads, "_AT_MOST", 9)
    assert threads_inside(torch.zeros(2, 3), torch.zeros(4)) == 3


def test_another_device_is_left_alone():
    assert threads_inside(torch.zeros(2), torch.zeros(2, device="meta")) == 3


@pytest.mark.parametrize(("policy", "inside"), [("PASSIVE", 3), ("passive", 3), ("ACTIVE", 1)])
def test_threads_that_do_not_stay_awake_are_left_alone(monkeypatch, policy, inside):
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    assert threads_inside(torch.zeros(2)) == inside


def test_an_error_inside_gives_the_threads_back():
    with pytest.raises(KeyError), one_thread_for_few([torch.zeros(2)]):
        raise KeyError
    assert torch.get_num_threads() == 3


def test_the_base_optimizer_steps_on_one_thread():
    seen = []

    class Base(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(torch.get_num_threads())
            return super().step(closure)

    model = nn.Linear(2, 1)
    optimizer = DPOptimizer(
        Base(model.parameters(), lr=0.1),
        model,
        loss_fn=nn.MSELoss(),
        l2_clip_norm=1.0,
        noise_multiplier=1.0,
        expected_batch_size=4.0,
        sampling_prob=0.1,
    )
    optimizer.backward(torch.ones(4, 2), torch.ones(4, 1))
    optimizer.step()
    assert seen == [1]
    assert torch.get_num_threads() == 3
