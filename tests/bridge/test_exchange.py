"""The exchange: the same memory, the same numbers, and no write that overtakes a read."""

import gc
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dpbridge import jax2torch, to_jax, to_torch

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.complex64,
]
WIDE = [torch.int64, torch.float64, torch.complex128]


def as_numpy(tensor):
    return tensor.resolve_conj().resolve_neg().detach().to("cpu").numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,), (0, 3), (3, 0, 2)])
def test_exchange_goes_both_ways(dtype, shape):
    tensor = (torch.randn(shape) * 3).to(dtype)
    back = to_torch(to_jax(tensor))
    assert back.dtype == dtype
    assert torch.equal(back, tensor)


@pytest.mark.parametrize("dtype", WIDE)
def test_exchange_goes_both_ways_with_64_bit_types(dtype):
    tensor = torch.tensor([2**40 + 1, -1]).to(dtype)
    with jax.enable_x64(True):
        back = to_torch(to_jax(tensor))
    assert back.dtype == dtype
    assert torch.equal(back, tensor)


def test_to_jax_shares_memory():
    tensor = torch.zeros(64)
    array = to_jax(tensor)
    tensor[0] = 7.0
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert array[0] == 7.0


def test_to_torch_shares_memory():
    array = jnp.arange(64.0)
    assert to_torch(array).data_ptr() == array.unsafe_buffer_pointer()


def test_to_jax_takes_parameters():
    parameter = torch.nn.Parameter(torch.ones(3))
    assert to_jax(parameter).tolist() == [1, 1, 1]
    assert parameter.requires_grad


def test_to_jax_takes_tensors_of_a_graph():
    hidden = torch.ones(3, requires_grad=True) * 2
    assert to_jax(hidden).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t(),
        lambda x: x[:, ::2],
        lambda x: x[1:],
        lambda x: x[:1].expand(4, 4),
        lambda x: x.flip(0),
        lambda x: x.diagonal(),
        lambda x: x.reshape(2, 2, 2, 2).to(memory_format=torch.channels_last),
    ],
)
def test_to_jax_takes_any_strides(view):
    tensor = view(torch.arange(16.0).reshape(4, 4))
    np.testing.assert_array_equal(to_jax(tensor), as_numpy(tensor))


shapes = hnp.array_shapes(min_dims=1, max_dims=4, max_side=4)


@given(shapes, st.data())
def test_to_jax_takes_random_strides(shape, data):
    tensor = torch.arange(float(np.prod(shape))).reshape(shape)
    tensor = tensor.permute(data.draw(st.permutations(range(len(shape)))))
    steps = [slice(data.draw(st.integers(0, n)), None, data.draw(st.integers(1, 3))) for n in shape]
    tensor = tensor[tuple(steps)] if data.draw(st.booleans()) else tensor
    np.testing.assert_array_equal(to_jax(tensor), as_numpy(tensor))


def test_to_jax_resolves_the_conjugate_bit():
    tensor = torch.tensor([1 + 2j, 3 - 4j]).conj()
    assert tensor.is_conj()
    np.testing.assert_array_equal(to_jax(tensor), as_numpy(tensor))


def test_to_jax_resolves_the_negative_bit():
    tensor = torch.tensor([1 + 2j, 3 - 4j]).conj().imag
    assert tensor.is_neg()
    np.testing.assert_array_equal(to_jax(tensor), [-2.0, 4.0])


def test_to_jax_narrows_int64_that_fits():
    array = to_jax(torch.tensor([-(2**31), 2**31 - 1]))
    assert array.dtype == jnp.int32
    assert array.tolist() == [-(2**31), 2**31 - 1]


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1])
def test_to_jax_refuses_int64_that_does_not_fit(value):
    with pytest.raises(ValueError, match=r"torch.int64 must keep its values.*beyond int32"):
        to_jax(torch.tensor([value]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_to_jax_refuses_to_narrow_floats(dtype):
    with pytest.raises(ValueError, match="must keep its values in JAX"):
        to_jax(torch.ones(2, dtype=dtype))


def test_to_jax_refuses_sparse():
    with pytest.raises(TypeError, match="must be strided"):
        to_jax(torch.eye(2).to_sparse())


def test_to_jax_refuses_a_type_jax_lacks():
    with pytest.raises(TypeError, match=r"to cross to JAX, got torch\.float8_e4m3fn"):
        to_jax(torch.ones(2).to(torch.float8_e4m3fn))


def test_to_jax_refuses_a_device_jax_does_not_see():
    with pytest.raises(ValueError, match="on a device that JAX sees, got meta"):
        to_jax(torch.empty(2, device="meta"))


def test_to_torch_refuses_typed_keys():
    with pytest.raises(TypeError, match=r"jax.random.key_data"):
        to_torch(jax.random.key(0))


def test_trees_keep_their_structure_and_other_leaves():
    tree = {"a": [torch.ones(2), 3], "b": (torch.zeros(1), None, "name")}
    there = to_jax(tree)
    assert isinstance(there["a"][0], jax.Array)
    assert (there["a"][1], there["b"][1:]) == (3, (None, "name"))
    assert torch.equal(to_torch(there)["a"][0], torch.ones(2))


def test_to_jax_keeps_freed_memory_alive():
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 30, lambda _, a: a @ x, x))
    eye = np.eye(500, dtype=np.float32)
    slow(jnp.asarray(eye)).block_until_ready()
    for _ in range(5):
        tensor = torch.eye(500)
        result = slow(to_jax(tensor))
        del tensor
        gc.collect()
        torch.full((500, 500), 7.0)  # Would land in the freed block.
        np.testing.assert_array_equal(result, eye)


def test_to_torch_keeps_freed_memory_alive():
    tensors = [to_torch(jnp.full(1000, float(i))) for i in range(20)]
    gc.collect()
    _ = [jnp.full(1000, -1.0).block_until_ready() for _ in range(20)]
    assert [t[0].item() for t in tensors] == [float(i) for i in range(20)]


def slow_sum(x):
    """Reads `x` for long: 30 products before the sum."""
    return jax.lax.fori_loop(0, 30, lambda _, a: 0.5 * (a + x @ x), x).sum()


def test_a_bare_jax_call_is_overtaken_by_a_write():
    # The hazard itself. If this fails, JAX has become synchronous and `finish` is not needed.
    slow = jax.jit(slow_sum)
    expected = float(slow(to_jax(torch.eye(600))))
    overtaken = 0
    for _ in range(10):
        x = torch.eye(600)
        result = slow(to_jax(x))
        x.zero_()
        overtaken += float(result) != expected
    assert overtaken


def test_jax2torch_is_not_overtaken_by_a_write():
    slow = jax2torch(slow_sum)
    expected = slow(torch.eye(600)).item()
    for _ in range(10):
        x = torch.eye(600)
        result = slow(x)
        x.zero_()
        assert result.item() == expected


def test_jax2torch_backward_is_not_overtaken_by_a_write():
    slow = jax2torch(slow_sum)
    x = torch.eye(300, requires_grad=True)
    (expected,) = torch.autograd.grad(slow(x), x)
    for _ in range(5):
        weight = torch.ones(())
        loss = slow(x)
        (grad,) = torch.autograd.grad(loss, x, weight)
        weight.zero_()
        assert torch.equal(grad, expected)


def test_jax2torch_gradients_equal_autograd():
    def both(module):
        return lambda x, y: module.sin(x["w"] @ y).sum() + (x["b"] ** 3).sum()

    def leaves():
        torch.manual_seed(0)
        return [torch.randn(3, 4), torch.randn(5), torch.randn(4, 2)]

    def grads(function):
        w, b, y = (leaf.requires_grad_() for leaf in leaves())
        value = function({"w": w, "b": b}, y)
        return [value, *torch.autograd.grad(value, [w, b, y])]

    for found, expected in zip(grads(jax2torch(both(jnp))), grads(both(torch)), strict=True):
        torch.testing.assert_close(found, expected)


def test_jax2torch_carries_trees_keywords_and_integers():
    @jax2torch
    def function(x, *, scale):
        return {"top": jnp.argmax(x), "all": (x * scale, [x])}

    x = torch.tensor([1.0, 5.0], requires_grad=True)
    result = function(x, scale=2.0)
    assert result["top"].item() == 1
    assert not result["top"].requires_grad
    (result["all"][0].sum() + 3 * result["all"][1][0].sum()).backward()
    assert x.grad.tolist() == [5.0, 5.0]


def test_jax2torch_differentiates_only_what_requires_it():
    product = jax2torch(lambda x, y: (x * y).sum())
    x, y = torch.ones(2, requires_grad=True), torch.full((2,), 3.0)
    product(x, y).backward()
    assert x.grad.tolist() == [3.0, 3.0]
    assert y.grad is None


def test_jax2torch_needs_no_graph_without_gradients():
    assert not jax2torch(jnp.sin)(torch.ones(2)).requires_grad
    with torch.no_grad():
        assert not jax2torch(jnp.sin)(torch.ones(2, requires_grad=True)).requires_grad


def test_jax2torch_notices_an_input_written_before_backward():
    x = torch.ones(64, requires_grad=True)
    hidden = x * 2
    result = jax2torch(lambda a: (a**2).sum())(hidden)
    hidden.mul_(5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


def test_jax2torch_refuses_a_second_derivative():
    x = torch.ones(2, requires_grad=True)
    (grad,) = torch.autograd.grad(jax2torch(lambda a: (a**3).sum())(x), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_jax2torch_works_from_several_threads():
    function = jax2torch(lambda a: (a**2).sum())
    found = {}

    def work(i):
        x = torch.full((100,), float(i), requires_grad=True)
        function(x).backward()
        found[i] = x.grad[0].item()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    _ = [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert found == {i: 2.0 * i for i in range(8)}


@pytest.mark.gpu
def test_exchange_shares_memory_on_the_gpu():
    tensor = torch.zeros(64, device="cuda")
    array = to_jax(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert to_torch(array).data_ptr() == tensor.data_ptr()


@pytest.mark.gpu
def test_jax2torch_is_not_overtaken_by_a_write_on_the_gpu():
    slow = jax2torch(slow_sum)
    eye = torch.eye(4000, device="cuda")
    expected = slow(eye.clone()).item()
    for _ in range(10):
        x = eye.clone()
        result = slow(x)
        x.zero_()
        assert result.item() == expected


@pytest.mark.gpu
def test_to_jax_waits_for_torch_on_the_gpu():
    total = jax.jit(jnp.sum)
    for _ in range(10):
        x = torch.zeros(4000, 4000, device="cuda")
        for _ in range(20):
            x = x @ x + 1
        x = x * 0 + 1  # Still running when JAX is told to read.
        assert float(total(to_jax(x))) == 4000.0 * 4000


@pytest.mark.gpu
def test_exchange_works_on_a_side_stream():
    stream = torch.cuda.Stream()
    double = jax2torch(lambda a: a * 2)
    with torch.cuda.stream(stream):
        for i in range(20):
            x = torch.full((2000, 2000), float(i), device="cuda")
            y = double(x)
            x.zero_()
            assert y.sum().item() == 2.0 * i * 4e6


def test_jax2torch_goes_back_as_wide_as_it_came():
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    with jax.enable_x64(True):
        total = jax2torch(lambda x: jnp.sum(x**3))(x)
    total.backward()
    assert x.grad.tolist() == [3.0, 12.0]
