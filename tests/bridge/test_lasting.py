"""Arrays that are kept from step to step: never of other memory, nor of other values, than now."""

import gc
import weakref

import jax
import numpy as np
import pytest
import torch
from torch import nn

from dpbridge import lasting
from dpbridge.lasting import lasting_to_jax


def cross(tensor):
    return lasting_to_jax({"x": tensor})["x"]


def aligned(*shape, kind=torch.float32):
    """Whose memory JAX can take: the first address that is a multiple of 64."""
    size = torch.Size(shape).numel()
    room = torch.zeros(size + 64, dtype=kind)
    skipped = -room.data_ptr() % 64 // room.element_size()
    return room[skipped : skipped + size].view(shape)


def test_a_tensor_crosses_once():
    parameter = nn.Parameter(aligned(3, 4))
    assert cross(parameter) is cross(parameter)


@pytest.mark.parametrize("offset", [0, 1], ids=["shared", "copied"])
def test_writes_are_seen(offset):
    tensor = aligned(65)[offset : offset + 64]
    before = np.array(cross(tensor))
    tensor.add_(1)
    np.testing.assert_array_equal(np.array(cross(tensor)), before + 1)


def test_what_is_copied_is_not_kept():
    tensor = aligned(65)[1:]
    assert cross(tensor) is not cross(tensor)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: aligned(*x.shape).fill_(7),
        lambda x: x.data.view(4, 3),
        lambda x: x.data.t(),
        lambda x: x.data[:2],
        lambda x: x.data.view(torch.int32),
        lambda x: x.data.double(),
    ],
    ids=["memory", "shape", "strides", "rows", "view as another type", "type"],
)
def test_a_parameter_with_other_data_crosses_anew(change):
    parameter = nn.Parameter(aligned(3, 4).copy_(torch.arange(12.0).view(3, 4)))
    with jax.enable_x64():
        cross(parameter)
        parameter.requires_grad_(False)
        parameter.data = change(parameter)
        for _ in range(2):
            np.testing.assert_array_equal(np.array(cross(parameter)), parameter.numpy())


def test_lazy_conjugates_cross_as_they_read():
    tensor = aligned(4, kind=torch.complex64).fill_(1 + 2j)
    for view in (tensor, tensor.conj(), tensor.conj().imag):
        for _ in range(2):
            np.testing.assert_array_equal(np.array(cross(view)), view.resolve_neg().resolve_conj())


def test_an_address_that_is_taken_anew_is_not_mistaken():
    """Memory that is freed and given out again, to a tensor whose identity is another's too."""
    for value in range(50):
        tensor = torch.full((16,), float(value))
        assert cross(tensor)[0] == value
        del tensor


def test_nothing_is_kept_of_a_tensor_that_is_gone():
    tensor = aligned(16)
    array = weakref.ref(cross(tensor))
    key = id(tensor)
    assert key in lasting._kept
    del tensor
    gc.collect()
    assert key not in lasting._kept
    assert array() is None


def test_memory_that_a_tensor_gave_up_is_let_go_at_the_next_crossing():
    parameter = nn.Parameter(aligned(16))
    array = weakref.ref(cross(parameter))
    parameter.data = aligned(16)
    cross(parameter)
    gc.collect()
    assert array() is None


def test_numbers_that_are_narrowed_are_not_kept():
    tensor = aligned(16, kind=torch.int64)
    for value in (1, 2):
        tensor.fill_(value)
        assert cross(tensor).dtype == np.int32
        assert cross(tensor)[0] == value


def test_what_cannot_cross_is_refused_each_time():
    sparse = torch.eye(2).to_sparse()
    for _ in range(2):
        with pytest.raises(TypeError, match="strided"):
            cross(sparse)


@pytest.mark.gpu
def test_on_the_gpu_each_crossing_orders_the_streams():
    tensor = torch.zeros(16, device="cuda")
    assert cross(tensor) is not cross(tensor)
