"""Scaled dot-product attention."""

import math

import jax
import jax.numpy as jnp
import torch
from jax import lax

from dpbridge.lowering.dropout import drop
from dpbridge.lowering.dtypes import widen
from dpbridge.lowering.table import Call, register_lowering

aten = torch.ops.aten


@register_lowering(aten.scaled_dot_product_attention.default)
def _scaled_dot_product_attention(
    call: Call,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    attn_mask: jax.Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> jax.Array:
    # (..., heads, time, features)
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (jnp.repeat(array, repeats, axis=-3) for array in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = widen(jnp.einsum("...td,...sd->...ts", query, key)) * scale
    if is_causal:
        is_past = jnp.tri(scores.shape[-2], scores.shape[-1], dtype=bool)
        scores = jnp.where(is_past, scores, -jnp.inf)
    if attn_mask is not None:
        scores = _masked(scores, attn_mask)
    return _attended(call, scores, value, dropout_p)


def _masked(scores: jax.Array, mask: jax.Array) -> jax.Array:
    if mask.dtype == jnp.bool_:
        return jnp.where(mask, scores, -jnp.inf)
    return scores + mask.astype(scores.dtype)


def _attended(call: Call, scores: jax.Array, value: jax.Array, dropout_p: float) -> jax.Array:
    """Returns softmax(scores) @ value; rows that are masked throughout give zeros, as in torch.

    It is divided last: so the derivative needs one pass less over the scores, and none is made to
    divide them (Dao et al. 2022, section 3.1).
    """
    largest = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf))
    weights = jnp.exp(scores - jnp.where(largest == -jnp.inf, 0, largest))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = drop(call, weights, dropout_p)
    attended = widen(jnp.einsum("...ts,...sd->...td", weights.astype(value.dtype), value))
    return (attended / jnp.where(total == 0, 1, total)).astype(value.dtype)
