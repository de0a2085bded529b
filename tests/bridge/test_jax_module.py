"""JaxModule: torch's everywhere but in private training, where JAX differentiates the function."""

import copy
import dataclasses
import functools
import gc
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.custom_batching import custom_vmap
from jax.experimental import io_callback
from torch import nn

import dpbridge
import dpkernels
from dpbridge import JaxModule
from dpbridge.lowering import jax_call
from oracles import assert_close, clipped_sum

BATCH, FEATURES, CLASSES = 6, 3, 2
CLIP = 0.5


def make_params(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {
        "first": {
            "kernel": rng.normal(size=(FEATURES, 4)).astype(dtype),
            "bias": np.ones(4, dtype),
        },
        "layers": [{"kernel": rng.normal(size=(4, CLASSES)).astype(dtype)}],
    }


def mlp(params, x):
    """Both defaults of JAX are in it: of floats, and of integers."""
    positions = jnp.arange(1, 5)
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    scaled = hidden * positions.astype(x.dtype) + jnp.zeros(4).astype(x.dtype)
    return scaled @ params["layers"][0]["kernel"]


def dense(params, x):
    return jnp.tanh(x @ params["w"])


def add(params, x):
    return x + params["w"]


def batch():
    return torch.randn(BATCH, FEATURES), torch.randint(CLASSES, (BATCH,))


def make_optimizer(model, *, loss_fn=None, l2_clip_norm=CLIP, size=BATCH):
    """Without noise, so that `p.grad` is the clipped sum divided by the size."""
    return dpbridge.DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        loss_fn=loss_fn or nn.CrossEntropyLoss(),
        l2_clip_norm=l2_clip_norm,
        noise_multiplier=0.0,
        expected_batch_size=size,
        sampling_prob=0.1,
        self_check=False,  # It compiles as much again; `check` below does what it does.
        seed=0,
    )


def private_sums(model, *args, **options):
    optimizer = make_optimizer(model, size=1, **options)
    optimizer.backward(*args)
    optimizer.step()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# As a module of torch's.


def test_forward_is_the_function():
    x, _ = batch()
    params = make_params()
    expected = mlp(params, jnp.asarray(x.numpy()))
    found = JaxModule(mlp, params)(x)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-5)


def test_gradients_under_autograd_are_those_of_jax():
    x, _ = batch()
    params = make_params()
    model = JaxModule(mlp, params)
    x.requires_grad_()
    model(x).square().sum().backward()
    expected = jax.grad(lambda p, x: jnp.sum(mlp(p, x) ** 2), argnums=(0, 1))(
        params, jnp.asarray(x.detach().numpy())
    )
    torch.testing.assert_close(x.grad, torch.tensor(np.asarray(expected[1])))
    grad = torch.tensor(np.asarray(expected[0]["layers"][0]["kernel"]))
    torch.testing.assert_close(model.get_parameter("layers.0.kernel").grad, grad)


def test_forward_without_grad_keeps_no_graph():
    model = JaxModule(add, {"w": jnp.ones(FEATURES)})
    with torch.no_grad():
        assert not model(torch.ones(1, FEATURES)).requires_grad


def test_a_write_to_a_parameter_before_backward_is_noticed():
    model = JaxModule(add, {"w": jnp.ones(FEATURES)})
    loss = model(torch.ones(1, FEATURES)).sum()
    with torch.no_grad():
        model.w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.slow
def test_an_optimizer_of_torch_trains_it():
    x, y = batch()
    model = JaxModule(mlp, make_params())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_parameters_have_memory_of_their_own():
    array = jnp.zeros(FEATURES)
    model = JaxModule(add, {"w": array})
    with torch.no_grad():
        model.w.add_(1)
    assert not array.any()


def test_state_dict_goes_to_another_module():
    x, _ = batch()
    model = JaxModule(mlp, make_params())
    zeros = jax.tree.map(np.zeros_like, make_params())
    other = JaxModule(mlp, zeros)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_parameters_of_its_own(copied):
    x, _ = batch()
    model = JaxModule(mlp, make_params())
    before = model(x)
    other = copied(model)
    with torch.no_grad():
        other.first.bias.add_(1)
    assert torch.equal(model(x), before)
    assert not torch.equal(other(x), before)


@pytest.mark.slow
def test_double_computes_and_differentiates_in_float64():
    x, _ = batch()
    model = JaxModule(mlp, make_params()).to(torch.float64)
    output = model(x.double())
    output.sum().backward()
    assert output.dtype == model.first.bias.grad.dtype == torch.float64
    with jax.enable_x64(True):
        wide = jax.tree.map(jnp.asarray, make_params(np.float64))
        expected = jax.grad(lambda p: jnp.sum(mlp(p, jnp.asarray(x.double().numpy()))))(
            jax.tree.map(lambda a, b: jnp.asarray(b, jnp.float64), wide, make_params())
        )
    np.testing.assert_allclose(model.first.bias.grad, expected["first"]["bias"], rtol=1e-12)


def test_second_derivatives_are_refused():
    model = JaxModule(add, {"w": jnp.ones(1)})
    (grad,) = torch.autograd.grad(model(torch.ones(1)).square().sum(), model.w, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_inputs_and_outputs_are_trees():
    def apply_fn(params, inputs, *, scale, mode):
        assert mode == "sum"
        total = inputs["a"] + inputs["b"][0] * params["w"]
        return {"total": total * scale, "most": jnp.argmax(total, -1), "none": None, "three": 3}

    model = JaxModule(apply_fn, {"w": jnp.ones(2)})
    inputs = {"a": torch.tensor([[1.0, 2.0]]), "b": [torch.tensor([[3.0, 1.0]])]}
    found = model(inputs, scale=2.0, mode="sum")
    assert found["total"].tolist() == [[8.0, 6.0]]
    assert found["most"].tolist() == [0]
    assert found["none"] is None
    assert found["three"].item() == 3


def test_each_setting_is_a_program_of_its_own():
    model = JaxModule(lambda params, x, flag: x if flag is True else -x, {})
    assert [model(torch.ones(1), flag).item() for flag in (True, False, 1)] == [1, -1, -1]


# From tree to parameters and back.


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w", "rest"], meta_fields=[])
@dataclasses.dataclass
class Layer:
    w: object
    rest: object


def test_params_gives_the_tree_back_on_the_same_memory():
    model = JaxModule(add, {"layer": Layer(np.ones(3, np.float32), [jnp.zeros(2)])})
    params = model.params()
    assert isinstance(params["layer"], Layer)
    assert params["layer"].w.unsafe_buffer_pointer() == model.layer.w.data_ptr()
    jax.block_until_ready(params)
    with torch.no_grad():
        model.layer.rest.get_parameter("0").add_(7)
    assert model.params()["layer"].rest[0].tolist() == [7, 7]


@pytest.mark.parametrize(
    ("params", "names"),
    [
        (make_params(), ["first.bias", "first.kernel", "layers.0.kernel"]),
        ({"layer": Layer(np.ones(1), (np.ones(1),))}, ["layer.w", "layer.rest.0"]),
        ({"params": {"Dense_0": np.ones(1)}}, ["Dense_0"]),
        ({"params": np.ones(1), "other": np.ones(1)}, ["other", "params_"]),
        ({"a.b": np.ones(1), "a_b": np.ones(1)}, ["a_b", "a_b_"]),
        ({"mlp/~/linear": {"": np.ones(1)}}, ["mlp/~/linear._"]),
        ({"train": {"forward": np.ones(1)}}, ["train_.forward_"]),
        (np.ones(1), ["value"]),
    ],
)
def test_names_are_paths(params, names):
    model = JaxModule(add, params)
    assert [name for name, _ in model.named_parameters()] == names
    found = jax.tree.map(np.shape, model.params())
    assert found == jax.tree.map(np.shape, params)


def test_integers_and_bools_are_buffers():
    model = JaxModule(add, {"w": np.ones(1), "steps": np.arange(3), "mask": jnp.ones(2, bool)})
    assert [name for name, _ in model.named_parameters()] == ["w"]
    assert [name for name, _ in model.named_buffers()] == ["mask", "steps"]


def test_float64_of_numpy_is_what_it_is_to_jax():
    assert JaxModule(add, {"w": np.ones(1)}).w.dtype == torch.float32
    with jax.enable_x64(True):
        assert JaxModule(add, {"w": np.ones(1)}).w.dtype == torch.float64


# In private training.


@functools.cache
def looped():
    """A batch, and the clipped sum of its gradients by a loop in float64, in JAX alone."""
    torch.manual_seed(1)
    x, y = batch()

    @jax.jit
    @jax.grad
    def gradient(params, x, y):
        return -jax.nn.log_softmax(mlp(params, x))[0, y]

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), make_params())
        rows = [gradient(wide, x[i : i + 1].double().numpy(), y[i].item()) for i in range(BATCH)]
    return x, y, clipped_sum([flat(row) for row in rows], CLIP)


def flat(tree):
    return {
        "first.kernel": np.asarray(tree["first"]["kernel"]),
        "first.bias": np.asarray(tree["first"]["bias"]),
        "layers.0.kernel": np.asarray(tree["layers"][0]["kernel"]),
    }


def test_private_sum_is_that_of_a_loop_in_float64():
    x, y, expected = looped()
    found = private_sums(JaxModule(mlp, make_params()), x, y)
    assert_close(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_private_sum_of_float64_is_as_precise():
    x, y, expected = looped()
    found = private_sums(JaxModule(mlp, make_params()).double(), x.double(), y)
    assert_close(found, expected, rtol=1e-12)


@pytest.mark.slow
def test_private_sum_is_that_of_the_kernel_on_the_same_function():
    x, y = batch()

    def loss(params, x, y):
        return -jax.nn.log_softmax(mlp(params, x))[0, y[0]]

    clipped = dpkernels.clipped_grad(loss, l2_clip_norm=CLIP, batch_argnums=(1, 2))
    params = jax.tree.map(jnp.asarray, make_params())
    expected = jax.jit(clipped)(params, jnp.asarray(x.numpy()), jnp.asarray(y.numpy(), jnp.int32))
    found = private_sums(JaxModule(mlp, make_params()), x, y)
    assert_close(found, flat(expected), rtol=1e-5)


def test_a_jax_module_stands_between_layers_of_torch():
    x, y = batch()
    model = nn.Sequential(
        nn.Linear(3, 3), JaxModule(dense, {"w": np.eye(3)}), nn.Linear(3, CLASSES)
    )
    gradients = []
    for i in range(BATCH):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        gradients.append({name: p.grad.numpy().copy() for name, p in model.named_parameters()})
    model.zero_grad()
    assert_close(private_sums(model, x, y), clipped_sum(gradients, CLIP), rtol=1e-5)


def test_the_kernel_sees_the_equations_inside():
    def apply_fn(params, images):
        kernel = params["conv"]
        x = jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME")
        return x.reshape(x.shape[0], -1) @ params["dense"]

    model = JaxModule(apply_fn, {"conv": np.ones((2, 1, 3, 3)), "dense": np.ones((32, CLASSES))})
    explanation = make_optimizer(model).explain(torch.ones(5, 1, 4, 4), torch.zeros(5).long())
    sites = {row.parameters: row.sites for row in explanation.rows}
    assert "conv_general_dilated" in str(sites["['conv']",])
    assert "dot_general" in str(sites["['dense']",])


def test_frozen_parameters_stay_and_cost_nothing():
    x, y = batch()
    model = JaxModule(mlp, make_params())
    model.first.requires_grad_(False)
    optimizer = make_optimizer(model)
    names = str(optimizer.explain(x, y))
    assert "layers.0.kernel" in names
    assert "first" not in names


@pytest.mark.slow
def test_private_training_learns_and_states_an_epsilon():
    x = torch.randn(200, FEATURES)
    y = (x[:, 0] > 0).long()
    model = JaxModule(dense, {"w": np.zeros((FEATURES, CLASSES))})
    optimizer = dpbridge.DPOptimizer(
        torch.optim.Adam(model.parameters(), lr=0.1),
        model,
        loss_fn=nn.CrossEntropyLoss(),
        l2_clip_norm=1.0,
        noise_multiplier=5.0,
        expected_batch_size=200,
        sampling_prob=1.0,  # Every draw has one size, and so one program.
        seed=0,
    )
    for _ in range(30):
        optimizer.backward(x, y)
        optimizer.step()
    assert (model(x).argmax(1) == y).float().mean() > 0.85
    steps = {"noise_multiplier": 5.0, "sampling_prob": 1.0, "steps": 30}
    expected = dpbridge.accounting.compute_epsilon(**steps, delta=1e-3)
    assert optimizer.epsilon(1e-3) == pytest.approx(expected)


# Which types JAX computes in.


def record_types(seen):
    def apply_fn(params, x, tokens):
        seen.add((str(jnp.zeros(1).dtype), str(jnp.arange(1).dtype), str(tokens.dtype)))
        return (x + params["w"]).sum(-1) + tokens.sum(-1).astype(x.dtype)

    return apply_fn


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, ("float32", "int32", "int32")),
        (torch.float64, ("float64", "int64", "int64")),
        (torch.bfloat16, ("float32", "int32", "int32")),
    ],
)
@pytest.mark.parametrize("is_on", [False, True])
def test_64_bit_types_are_on_where_the_model_has_them(dtype, expected, is_on):
    seen = set()
    model = JaxModule(record_types(seen), {"w": np.ones(FEATURES)}).to(dtype)
    x, tokens = torch.ones(BATCH, FEATURES, dtype=dtype), torch.ones(BATCH, 2).long()
    optimizer = make_optimizer(model, loss_fn=nn.MSELoss())
    with jax.enable_x64(is_on):
        model(x, tokens).sum().backward()
        optimizer.explain(x, tokens, torch.zeros(BATCH, dtype=dtype))
    assert seen == {expected}


def test_tokens_beyond_int32_are_refused_in_private_training():
    model = JaxModule(lambda p, t: p["e"][t].mean(1), {"e": np.ones((9, CLASSES))})
    tokens = torch.tensor([[1, 2], [3, 2**40]])
    with pytest.raises(IndexError, match="out of range for int32"):
        make_optimizer(model).backward(tokens, torch.zeros(2).long())


def test_tokens_beyond_int32_are_refused_in_torch():
    model = JaxModule(lambda p, t: p["e"][t].mean(1), {"e": np.ones((9, CLASSES))})
    with pytest.raises(ValueError, match="must fit in int32"):
        model(torch.tensor([[-(2**31) - 1]]))


# Random numbers.


def masked(params, key, x):
    if key is None:
        return x * params["w"]
    return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x * params["w"], jnp.zeros_like(x))


def mean_loss(output, target):
    return (output.sum(-1) - target).mean()


@functools.cache
def shares():
    """Of 64 examples the share that keeps each of 8 features: by step, and by module."""
    modules = [JaxModule(masked, {"w": np.ones(8)}, takes_key=True) for _ in range(2)]
    model = nn.ModuleList(modules)
    model.forward = lambda x: torch.cat([module(x) for module in modules], -1)
    optimizer = make_optimizer(model, loss_fn=mean_loss, l2_clip_norm=100.0, size=64)
    found = []
    for _ in range(2):
        optimizer.backward(torch.ones(64, 8), torch.zeros(64))
        optimizer.step()
        found.append([module.w.grad.clone() for module in modules])
    return found


@pytest.mark.slow
def test_each_example_has_a_key_of_its_own():
    # With one key for all, each share would be 0 or 1. By Hoeffding's inequality one of these 32
    # is off by 0.4 with a probability below 32 * 2 * exp(-2 * 64 * 0.4**2) = 9e-8.
    for share in [share for step in shares() for share in step]:
        assert ((share - 0.5).abs() < 0.4).all()


def test_each_step_has_keys_of_its_own():
    (first, _), (second, _) = shares()
    assert not torch.equal(first, second)


def test_each_module_has_keys_of_its_own():
    (first, second), _ = shares()
    assert not torch.equal(first, second)


def test_the_key_comes_from_the_generator_of_torch():
    model = JaxModule(masked, {"w": np.ones(64)}, takes_key=True)
    x = torch.ones(1, 64)
    first = model(x)
    assert not torch.equal(first, model(x))
    torch.manual_seed(5)
    again = model(x)
    torch.manual_seed(5)
    assert torch.equal(model(x), again)


def test_gradients_agree_in_the_self_check_although_numbers_are_drawn():
    model = JaxModule(masked, {"w": np.ones(8)}, takes_key=True)
    report = dpbridge.check(model, torch.ones(BATCH, 8), torch.zeros(BATCH), loss_fn=mean_loss)
    assert report.ok
    assert report.gradients_agree


def test_in_eval_mode_there_is_no_key():
    model = JaxModule(masked, {"w": np.ones(64)}, takes_key=True).eval()
    assert model(torch.ones(1, 64)).min() == 1


def test_in_eval_mode_there_is_no_key_in_private_training():
    seen = []

    def apply_fn(params, key, x):
        seen.append(key)
        return x * params["w"]

    model = JaxModule(apply_fn, {"w": np.ones(8)}, takes_key=True).eval()
    make_optimizer(model, loss_fn=mean_loss).explain(torch.ones(2, 8), torch.zeros(2))
    assert seen
    assert not any(seen)


# What is refused.


@pytest.mark.parametrize(
    ("leaf", "got"),
    [
        (1.0, "float"),
        (jnp.tanh, "function|custom_jvp|PjitFunction"),
        ("relu", "str"),
        (torch.ones(1), "Tensor"),
        (np.array(["a"]), "an array of <U1"),
        (jax.random.key(0), "an array of key<fry>"),
    ],
)
def test_a_leaf_that_is_no_array_is_named(leaf, got):
    match = rf"`params\['layer'\]\[1\]` must be an array of a type that torch has, got ({got})"
    with pytest.raises(TypeError, match=match):
        JaxModule(add, {"layer": [np.ones(1), leaf]})


def test_what_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="`apply_fn` must be callable, got dict"):
        JaxModule({}, add)


def test_running_statistics_are_refused():
    with pytest.raises(NotImplementedError, match="got the collection `batch_stats`"):
        JaxModule(add, {"params": {"w": np.ones(1)}, "batch_stats": {"mean": np.ones(1)}})


@pytest.mark.parametrize(
    ("result", "error", "match"),
    [
        (lambda x: (x, {"batch_stats": {"mean": x}}), NotImplementedError, "got state in"),
        (lambda x: {"name": "a"}, TypeError, r"got str in `apply_fn\(\.\.\.\)\['name'\]`"),
        (lambda x: jax.random.key(0), TypeError, "got key<fry>"),
        (lambda x: x.astype(jnp.float8_e4m3fn), TypeError, "got float8_e4m3fn"),
    ],
)
def test_outputs_that_are_not_torchs_are_refused(result, error, match):
    model = JaxModule(lambda params, x: result(x), {})
    with pytest.raises(error, match=match):
        model(torch.ones(1, 1))


@pytest.mark.parametrize("leaf", [np.ones(1), jnp.ones(1), object()])
def test_inputs_that_are_not_tensors_are_named(leaf):
    with pytest.raises(TypeError, match=r"`inputs\[0\]\[0\]\['x'\]` must be a tensor, or a bool"):
        JaxModule(add, {"w": np.ones(1)})({"x": leaf})


@custom_vmap
def centred(x):
    return x


@centred.def_vmap
def _centred_batch(size, is_batched, x):
    return x - x.mean(0, keepdims=True), True


def called(x, method):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(lambda array: np.asarray(array) * 2, shape, x, vmap_method=method)


@jax.custom_vjp
def centred_backward(x):
    return x


centred_backward.defvjp(lambda x: (x, None), lambda _, grad: (centred(grad),))

MIXING = {
    "custom_vmap_call": centred,
    "custom_vmap_call`: its": lambda x: jax.lax.cond(x[0, 0] > 0, jax.jit(centred), jnp.tanh, x),
    "pure_callback": lambda x: called(x, "broadcast_all"),
    "io_callback": lambda x: io_callback(np.asarray, jax.ShapeDtypeStruct(x.shape, x.dtype), x),
}


@pytest.mark.parametrize("name", MIXING)
def test_what_may_mix_examples_is_refused(name):
    def apply_fn(params, x):
        return MIXING[name](jax.lax.stop_gradient(x)) @ params["w"]

    model = JaxModule(apply_fn, {"w": np.ones((FEATURES, CLASSES))})
    with pytest.raises(NotImplementedError, match=f"must keep examples apart, got `{name}"):
        make_optimizer(model).backward(*batch())


def test_what_may_mix_examples_is_found_in_a_custom_backward():
    model = nn.Sequential(
        nn.Linear(FEATURES, CLASSES), JaxModule(lambda params, x: centred_backward(x), {})
    )
    with pytest.raises(NotImplementedError, match="got `custom_vmap_call`"):
        make_optimizer(model).backward(*batch())


@pytest.mark.slow
def test_a_callback_for_one_example_at_a_time_is_let_through():
    x, _ = batch()
    model = JaxModule(lambda params, x: called(x, "sequential") * params["w"], {"w": np.ones(3)})
    found = private_sums(model, x, torch.zeros(BATCH), loss_fn=mean_loss, l2_clip_norm=100.0)
    torch.testing.assert_close(found["w"], 2 * x.sum(0))


def test_a_branch_on_data_is_refused():
    model = JaxModule(lambda params, x: x if x.sum() > 0 else -x, {"w": np.ones(1)})
    with pytest.raises(TypeError, match="boolean conversion of traced array"):
        make_optimizer(model).backward(*batch())


def test_torch_does_not_run_an_exported_graph():
    model = JaxModule(add, {"w": np.ones(1)})
    exported = torch.export.export(model, (torch.ones(1),), strict=False)
    with pytest.raises(NotImplementedError, match="must be run by dpbridge"):
        exported.module()(torch.ones(1))


def test_a_graph_does_not_outlive_its_module():
    handle = jax_call.JaxCall(lambda key, arrays: arrays, takes_key=False).handle
    gc.collect()
    with pytest.raises(RuntimeError, match=f"got handle {handle}"):
        jax_call.find_call(handle)


# Flax, where it is installed.


def test_variables_of_flax_are_parameters():
    linen = pytest.importorskip("flax.linen")
    layer = linen.Dense(CLASSES)
    x, _ = batch()
    model = JaxModule(layer.apply, layer.init(jax.random.key(0), x.numpy()))
    assert [name for name, _ in model.named_parameters()] == ["bias", "kernel"]
    torch.testing.assert_close(model(x), x @ model.kernel + model.bias)


def test_mutable_state_of_flax_is_refused():
    linen = pytest.importorskip("flax.linen")
    norm = linen.BatchNorm(use_running_average=False)
    x, _ = batch()
    variables = norm.init(jax.random.key(0), x.numpy())

    def apply_fn(params, x):
        return norm.apply({**variables, "params": params}, x, mutable=["batch_stats"])

    with pytest.raises(NotImplementedError, match="`apply_fn` must return outputs alone"):
        JaxModule(apply_fn, variables["params"])(x)
