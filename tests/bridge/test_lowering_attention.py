"""Scaled dot-product attention with all its arguments."""

import pytest
import torch

from lowering_checks import BATCH, assert_same, compare, integers, normal

attend = torch.nn.functional.scaled_dot_product_attention

QUERY, KEY, VALUE = normal(1, 2, 3, 4), normal(1, 2, 5, 4), normal(1, 2, 5, 6)


def key_padding():
    """Masks that leave the first key open, except in the last example, whose last row has none."""
    mask = integers(1, 1, 3, 5, low=0, high=2).bool()
    mask[..., 0] = True
    mask[-1, ..., -1, :] = False
    return mask


def additive():
    return torch.zeros(BATCH, 1, 1, 3, 5).double().masked_fill(~key_padding(), float("-inf"))


CASES = {
    "plain": (attend, QUERY, KEY, VALUE),
    "without heads": (attend, normal(1, 3, 4), normal(1, 5, 4), normal(1, 5, 4)),
    "causal": (lambda q, k, v: attend(q, k, v, is_causal=True), QUERY, KEY, VALUE),
    "causal, more queries than keys": (
        lambda q, k, v: attend(k, q, v[..., :3, :], is_causal=True),
        QUERY,
        KEY,
        VALUE,
    ),
    "scale": (lambda q, k, v: attend(q, k, v, scale=0.3), QUERY, KEY, VALUE),
    "bool mask": (attend, QUERY, KEY, VALUE, key_padding()),
    "additive mask": (attend, QUERY, KEY, VALUE, normal(1, 1, 3, 5)),
    "additive mask with infinities": (
        lambda q, k, v, m: attend(q, k, v, m.detach()),
        QUERY,
        KEY,
        VALUE,
        additive(),
    ),
    "mask for all heads": (attend, QUERY, KEY, VALUE, key_padding()[:, 0, 0]),
    "grouped queries": (
        lambda q, k, v: attend(q, k, v, is_causal=True, enable_gqa=True),
        normal(1, 4, 3, 4),
        normal(1, 2, 3, 4),
        normal(1, 2, 3, 4),
    ),
}


@pytest.fixture(scope="module")
def results():
    return compare(CASES)


@pytest.mark.parametrize("name", CASES)
def test_attention_equals_torch(results, name):
    assert_same(results[name])
