"""Every activation of torch.nn, at corners as well: values and gradients."""

import pytest
import torch
from torch import nn

from lowering_checks import BATCH, assert_same, compare, normal

CORNERS = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 6.0, 30.0, -30.0, -3.1, 2.9])

SIMPLE = [
    nn.CELU(), nn.CELU(0.7), nn.ELU(), nn.ELU(0.7), nn.GELU(), nn.GELU("tanh"), nn.Hardshrink(),
    nn.Hardsigmoid(), nn.Hardswish(), nn.Hardtanh(), nn.Hardtanh(-0.5, 3.0), nn.LeakyReLU(),
    nn.LeakyReLU(0.3), nn.LogSigmoid(), nn.Mish(), nn.ReLU(), nn.ReLU6(), nn.SELU(), nn.SiLU(),
    nn.Sigmoid(), nn.Softplus(), nn.Softplus(2.0, 3.0), nn.Softshrink(), nn.Softsign(), nn.Tanh(),
    nn.Tanhshrink(), nn.Threshold(0.5, 2.0), nn.RReLU().eval(),
]  # fmt: skip
IN_PLACE = [
    nn.CELU, nn.ELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.Mish, nn.ReLU,
    nn.ReLU6, nn.SELU, nn.SiLU,
]  # fmt: skip


def corners():
    return torch.stack([CORNERS.roll(i) for i in range(BATCH)]).double()


def in_place(kind):
    return lambda x: kind(inplace=True)(x * 1)


CASES = {
    **{repr(module): (module, corners()) for module in SIMPLE},
    **{f"{kind.__name__} in place": (in_place(kind), corners()) for kind in IN_PLACE},
    "relu6": (nn.functional.relu6, corners()),
    "prelu, one slope": (nn.functional.prelu, corners().unsqueeze(1), normal(1)),
    "prelu, a slope a channel": (nn.functional.prelu, normal(1, 4, 5), normal(4)),
    "glu": (nn.GLU(), normal(2, 6)),
    "glu over channels": (nn.GLU(1), normal(2, 6, 3)),
    "softmax": (nn.Softmax(1), normal(2, 6)),
    "softmin": (nn.Softmin(1), normal(2, 6)),
    "log_softmax": (nn.LogSoftmax(-1), normal(2, 6)),
    "softmax2d": (nn.Softmax2d(), normal(1, 3, 2, 2)),
    "softmax in another dtype": (lambda x: x.softmax(0, dtype=torch.float64), normal(3)),
    "softmax of one number": (lambda x: [x.softmax(0), x.log_softmax(-1)], normal()),
}


@pytest.fixture(scope="module")
def results():
    return compare(CASES)


@pytest.mark.parametrize("name", CASES)
def test_activation_equals_torch(results, name):
    assert_same(results[name], rtol=1e-7)  # torch rounds some of the constants to float32
