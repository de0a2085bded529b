"""Convolutions of every rank, with every argument."""

import warnings

import pytest
import torch.nn.functional as F

from lowering_checks import assert_same, compare, normal

CONV1D = {
    "plain": (2, 3, {}),
    "stride and padding": (2, 3, {"stride": 2, "padding": 1}),
    "dilation": (2, 3, {"dilation": 2, "padding": 2}),
    "same": (2, 3, {"padding": "same"}),
    "same with dilation": (2, 4, {"padding": "same", "dilation": 2}),
    "valid": (2, 3, {"padding": "valid"}),
    "groups": (4, 3, {"groups": 2, "padding": 1}),
    "groups, stride, dilation": (4, 2, {"groups": 2, "stride": 2, "dilation": 3}),
    "depthwise": (4, 3, {"groups": 4, "padding": 1}),
    "pointwise": (4, 1, {}),
}
CONV2D = {
    "plain": (2, (3, 3), {}),
    "uneven": (2, (3, 2), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    "same": (2, (5, 3), {"padding": "same"}),
    "same, even": (2, (4, 2), {"padding": "same"}),
    "groups": (4, (3, 3), {"groups": 2, "stride": 2, "padding": 1}),
    "groups, uneven": (4, (3, 2), {"groups": 2, "padding": (2, 1), "dilation": (2, 1)}),
    "depthwise with multiplier": (2, (3, 3), {"groups": 2, "padding": 1}),
}
TRANSPOSED = {
    "plain": (2, 3, {}),
    "stride": (2, 3, {"stride": 2, "padding": 1, "output_padding": 1}),
    "dilation": (2, 3, {"dilation": 2, "padding": 3}),
    "groups": (4, 3, {"groups": 2, "stride": 2}),
    "wide padding": (2, 2, {"padding": 2, "stride": 3}),
}


def case(function, channels, kernel, options, space):
    """The function of input, weight and bias; weights differ between the examples."""
    groups = options.get("groups", 1)
    outputs = 4
    sizes = (kernel,) * len(space) if isinstance(kernel, int) else kernel
    transposed = "transpose" in function.__name__
    ends = (channels, outputs // groups) if transposed else (outputs, channels // groups)
    inputs = normal(1, channels, *space), normal(*ends, *sizes), normal(outputs)
    return (lambda x, w, b: function(x, w, b, **options)), *inputs


CASES = {
    **{f"conv1d, {name}": case(F.conv1d, *rest, (9,)) for name, rest in CONV1D.items()},
    **{f"conv2d, {name}": case(F.conv2d, *rest, (6, 7)) for name, rest in CONV2D.items()},
    "conv3d": case(F.conv3d, 2, (2, 3, 2), {"padding": 1, "stride": (1, 2, 1)}, (3, 4, 4)),
    "conv3d, groups": case(F.conv3d, 4, 2, {"groups": 2}, (3, 3, 4)),
    **{f"transposed 1d, {n}": case(F.conv_transpose1d, *r, (5,)) for n, r in TRANSPOSED.items()},
    **{f"transposed 2d, {n}": case(F.conv_transpose2d, *r, (4, 5)) for n, r in TRANSPOSED.items()},
    "transposed 3d": case(F.conv_transpose3d, 2, 2, {"stride": 2}, (2, 3, 2)),
    "without batch": (lambda x, w: F.conv2d(x, w), normal(2, 5, 5), normal(3, 2, 3, 3)),
    "transposed without batch": (F.conv_transpose1d, normal(2, 5), normal(2, 3, 3)),
}


@pytest.fixture(scope="module")
def results():
    # torch pads even kernels unevenly too, and warns that it does.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")
        return compare(CASES)


@pytest.mark.parametrize("name", CASES)
def test_convolution_equals_torch(results, name):
    assert_same(results[name])
