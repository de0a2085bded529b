"""Views, joins, padding and the tensors that a model makes for itself."""

import pytest
import torch
import torch.nn.functional as F

from lowering_checks import assert_same, compare, integers, normal

CASES = {
    "reshape": (
        lambda x: [
            x.view(-1), x.view(6, 4), x.reshape(3, -1), x.flatten(), x.flatten(1), x.ravel(),
            x.unflatten(2, (2, -1)), x.view_as(x.transpose(0, 1).contiguous().view(2, 3, 4)),
            x.transpose(0, 1).reshape(-1), x.reshape_as(x),
        ],
        normal(2, 3, 4),
    ),
    "squeeze": (
        lambda x: [
            x.squeeze(), x.squeeze(0), x.squeeze(1), x.squeeze((0, 2)), x.unsqueeze(1),
            x[0].unsqueeze(-1), torch.atleast_2d(x[0, 0, 0]), torch.atleast_3d(x[0, :, 0]),
        ],
        normal(1, 3, 1, 2),
    ),
    "transpose": (
        lambda x: [
            x.transpose(1, 2), x[0].t(), x[0].T, x.mT, x.permute(2, 0, 1), x.movedim(0, -1),
            x.movedim((0, 1), (2, 0)), x.swapaxes(0, 1), x.swapdims(0, 2), x[0, 0].t(),
        ],
        normal(2, 3, 4),
    ),
    "expand": (
        lambda x: [x.expand(2, -1, 4), x.expand_as(torch.zeros(1, 3, 2)), x.broadcast_to(1, 3, 4)],
        normal(1, 3, 1),
    ),
    "slices": (
        lambda x: [
            x[0], x[-1], x[:, 1:], x[..., ::2], x[:, None], x[:, -1], x[1:1], x[:, -2:-1],
            x[:, 5:], x.select(1, 0), x.narrow(1, 1, 2), x[0, 1, 2], x[:, :100], x[..., 1::3],
        ],
        normal(2, 3, 4),
    ),
    "splits": (
        lambda x: [
            x.split(2, 1), x.split([1, 3], 2), x.chunk(3, 2), x.tensor_split(3, 2), x.unbind(1),
            x.tensor_split([1], 1), x.hsplit(3), x.vsplit(2), x.split(5), torch.unbind(x),
        ],
        normal(2, 3, 4),
    ),
    "diagonals": (
        lambda x: [
            x.diagonal(), x.diagonal(1, 1, 2), x[0].diag(), x[0, 0].diag(1), x[0].diag(-1),
            x[0].diag_embed(), x.diag_embed(1, 0, 2), x.diag_embed(-1),
        ],
        normal(2, 3, 4),
    ),
    "unfold": (lambda x: [x.unfold(1, 2, 1), x.unfold(-1, 3, 2)], normal(2, 5)),
    "joins": (
        lambda x, y: [
            torch.cat([x, y]), torch.cat([x, y[:, :1]], 1), torch.stack([x, y]),
            torch.stack([x, y], -1), torch.hstack([x, y]), torch.vstack([x, y]),
            torch.dstack([x, y]), torch.column_stack([x[0], y[0]]), torch.concat([x, y], dim=-1),
            torch.cat([x, torch.zeros(0)]),
        ],
        normal(2, 3),
        normal(2, 3),
    ),
    "joins of types": (
        lambda x, y: [torch.cat([x, y]), torch.stack([y, x])], normal(3), integers(3),
    ),
    "broadcast_tensors": (
        lambda x, y: [torch.broadcast_tensors(x, y), torch.meshgrid(x[:, 0], y, indexing="xy")],
        normal(2, 1),
        normal(3),
    ),
    "repeats": (
        lambda x: [
            x.repeat(2, 1), x.repeat(2, 1, 3), x.tile(2), x.repeat_interleave(2, 1),
            x.repeat_interleave(3), x.repeat_interleave(2, dim=-2),
        ],
        normal(2, 3),
    ),
    "turns": (
        lambda x: [
            x.flip(0), x.flip((0, 1)), x.roll(1), x.roll(2, 1), x.roll((1, -1), (0, 1)),
            torch.rot90(x), torch.rot90(x, 2, (1, 0)),
        ],
        normal(2, 3),
    ),
    "triangles": (
        lambda x: [x.tril(), x.triu(1), x.tril(-1), x.triu(-1), (x[0] > 0).tril()],
        normal(2, 3, 4),
    ),
    "constant padding": (
        lambda x: [
            F.pad(x, (1, 2)), F.pad(x, (1, 0, 2, 1), value=3.0), F.pad(x, (-1, 1)),
            F.pad(x, (0, 0, -1, -1), value=1.0), F.pad(x, (0, 0)),
        ],
        normal(2, 3, 4),
    ),
    "other padding": (
        lambda x: [
            F.pad(x, (2, 1, 1, 1), mode=mode) for mode in ("reflect", "replicate", "circular")
        ],
        normal(1, 2, 3, 4),
    ),
    "padding of integers": (lambda x: F.pad(x, (1, 1), value=7), integers(3)),
    "pixels": (
        lambda x: [
            F.pixel_shuffle(x, 2), F.pixel_unshuffle(x, 2), F.channel_shuffle(x, 4),
        ],
        normal(1, 8, 2, 4),
    ),
    "copies": (
        lambda x: [x.clone(), x.contiguous(), x.transpose(0, 1).contiguous(), x.detach()],
        normal(2, 3),
    ),
    "tensors of numbers": (
        lambda x: [
            x + torch.zeros(2, 3), x * torch.ones(3), x + torch.full((3,), 2.0), x.new_zeros(3),
            x.new_ones(2, dtype=torch.int64), x.new_full((3,), 1.5), torch.zeros_like(x),
            torch.ones_like(x, dtype=torch.bool), torch.full_like(x, 2), torch.eye(3),
            torch.eye(2, 3), torch.arange(5), torch.arange(1, 6, 2), torch.arange(0.5, 2, 0.5),
            torch.arange(5.0),
            torch.arange(5, 0, -2), torch.linspace(0, 1, 5), torch.tensor([1, 2]),
            torch.tensor(2.5) * x, torch.tril_indices(3, 4, 1), torch.triu_indices(3, 3),
            torch.full((), True), torch.scalar_tensor(2.0), x.new_tensor([1.0, 2.0]),
            torch.empty(3).fill_(2), x.new_empty(2).zero_(), torch.empty_like(x).fill_(1.0),
        ],
        normal(2, 3),
    ),
    "a mask made in forward": (
        lambda x: x.masked_fill(torch.triu(torch.ones(3, 3), diagonal=1).bool(), float("-inf")),
        normal(3, 3),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def results():
    return compare(CASES)


@pytest.mark.parametrize("name", CASES)
def test_shape_op_equals_torch(results, name):
    assert_same(results[name])
