"""Attention over the positions of a frame, read and written where they lie.

Queries, keys and values stay as the linear layer left them, a token's side by side, and so do their
gradients: nothing is moved, and no sum is kept in float32. The softmax is taken block by block
(Dao, arXiv 2307.08691), so any number of positions fits; the backward pass makes it again.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634  # exp2 is the card's own


@triton.jit
def _rows(base, row, rows, channel, stride, width: tl.constexpr):
    ok = (row < rows)[:, None] & (channel < width)[None, :]
    return tl.load(base + row[:, None] * stride + channel[None, :], mask=ok, other=0.0)


@triton.jit
def _store(base, row, rows, channel, stride, width: tl.constexpr, value):
    ok = (row < rows)[:, None] & (channel < width)[None, :]
    place = base + row[:, None] * stride + channel[None, :]
    tl.store(place, value.to(base.dtype.element_ty), mask=ok)


@triton.jit
def spatial_forward(
    qkv, out, norms, tokens, heads: tl.constexpr, width: tl.constexpr, scale,
    tile_m: tl.constexpr, tile_n: tl.constexpr, tile_c: tl.constexpr,
):  # fmt: skip
    """``norms``: of each query, log2 of the sum that its weights are divided by."""
    head = tl.program_id(1) % heads
    sequence = (tl.program_id(1) // heads).to(tl.int64)
    channels: tl.constexpr = heads * width
    q_row = tl.program_id(0) * tile_m + tl.arange(0, tile_m)
    channel = tl.arange(0, tile_c)
    base = qkv + sequence * tokens * 3 * channels + head * width
    q = _rows(base, q_row, tokens, channel, 3 * channels, width)
    total = tl.zeros((tile_m, tile_c), tl.float32)
    highest = tl.full((tile_m,), float("-inf"), tl.float32)
    weights = tl.zeros((tile_m,), tl.float32)
    for first in range(0, tokens, tile_n):
        row = first + tl.arange(0, tile_n)
        k = _rows(base + channels, row, tokens, channel, 3 * channels, width)
        v = _rows(base + 2 * channels, row, tokens, channel, 3 * channels, width)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        logits = tl.where((row < tokens)[None, :], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, axis=1))
        p = tl.exp2(logits - higher[:, None])
        shrink = tl.exp2(highest - higher)
        weights = weights * shrink + tl.sum(p, axis=1)
        total = tl.dot(p.to(v.dtype), v, total * shrink[:, None], input_precision="ieee")
        highest = higher
    place = out + sequence * tokens * channels + head * width
    _store(place, q_row, tokens, channel, channels, width, total / weights[:, None])
    place = norms + tl.program_id(1).to(tl.int64) * tokens + q_row
    tl.store(place, highest + tl.log2(weights), mask=q_row < tokens)


@triton.jit
def spatial_backward(
    qkv, out, norms, grad, grad_qkv, tokens, heads: tl.constexpr, width: tl.constexpr, scale,
    factor, tile_m: tl.constexpr, tile_n: tl.constexpr, tile_c: tl.constexpr,
):  # fmt: skip
    """Half of the programs make the gradient of tile_m queries each, half that of as many keys and
    values, so that nothing is summed by several. ``scale``: of exponents of 2, ``factor`` of e.
    """
    blocks = tl.num_programs(0) // 2
    head = tl.program_id(1) % heads
    sequence = (tl.program_id(1) // heads).to(tl.int64)
    channels: tl.constexpr = heads * width
    stride: tl.constexpr = 3 * channels
    channel = tl.arange(0, tile_c)
    offset = sequence * tokens * stride + head * width
    q_at = qkv + offset
    k_at = q_at + channels
    v_at = k_at + channels
    out_at = out + sequence * tokens * channels + head * width
    grad_at = grad + sequence * tokens * channels + head * width
    norms_at = norms + tl.program_id(1).to(tl.int64) * tokens
    mine = tl.program_id(0) % blocks * tile_m + tl.arange(0, tile_m)
    if tl.program_id(0) < blocks:
        k = _rows(k_at, mine, tokens, channel, stride, width)
        v = _rows(v_at, mine, tokens, channel, stride, width)
        grad_k = tl.zeros((tile_m, tile_c), tl.float32)
        grad_v = tl.zeros((tile_m, tile_c), tl.float32)
        for first in range(0, tokens, tile_n):
            row = first + tl.arange(0, tile_n)
            q = _rows(q_at, row, tokens, channel, stride, width)
            g = _rows(grad_at, row, tokens, channel, channels, width)
            o = _rows(out_at, row, tokens, channel, channels, width)
            along = tl.sum(g.to(tl.float32) * o.to(tl.float32), axis=1)
            # A query past the end has no weights.
            norm = tl.load(norms_at + row, mask=row < tokens, other=float("inf"))
            logits = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
            p = tl.exp2(logits - norm[None, :])
            grad_v = tl.dot(p.to(g.dtype), g, grad_v, input_precision="ieee")
            grad_p = tl.dot(v, tl.trans(g), input_precision="ieee")
            grad_logits = (p * (grad_p - along[None, :])).to(q.dtype)
            grad_k = tl.dot(grad_logits, q, grad_k, input_precision="ieee")
        place = grad_qkv + offset + channels
        _store(place, mine, tokens, channel, stride, width, grad_k * factor)
        _store(place + channels, mine, tokens, channel, stride, width, grad_v)
    else:
        q = _rows(q_at, mine, tokens, channel, stride, width)
        g = _rows(grad_at, mine, tokens, channel, channels, width)
        o = _rows(out_at, mine, tokens, channel, channels, width)
        along = tl.sum(g.to(tl.float32) * o.to(tl.float32), axis=1)
        norm = tl.load(norms_at + mine, mask=mine < tokens, other=float("inf"))
        grad_q = tl.zeros((tile_m, tile_c), tl.float32)
        for first in range(0, tokens, tile_n):
            row = first + tl.arange(0, tile_n)
            k = _rows(k_at, row, tokens, channel, stride, width)
            v = _rows(v_at, row, tokens, channel, stride, width)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            p = tl.exp2(logits - norm[:, None])  # keys past the end are zeros: they add nothing
            grad_p = tl.dot(g, tl.trans(v), input_precision="ieee")
            grad_logits = (p * (grad_p - along[:, None])).to(k.dtype)
            grad_q = tl.dot(grad_logits, k, grad_q, input_precision="ieee")
        _store(grad_qkv + offset, mine, tokens, channel, stride, width, grad_q * factor)


def _tiles(qkv: Tensor, width: int) -> dict[str, int]:
    tile = 64 if qkv.dtype == torch.bfloat16 else 32
    tile_c = max(16, triton.next_power_of_2(width))
    return {"tile_m": 64, "tile_n": tile, "tile_c": tile_c, "num_warps": 4, "num_stages": 3}


def forward(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Attended tokens, and the queries' norms [b, f, heads, t]."""
    b, f, t, channels = qkv.shape
    width = channels // 3 // heads
    out = qkv.new_empty(b, f, t, channels // 3)
    norms = qkv.new_empty(b, f, heads, t, dtype=torch.float32)
    tiles = _tiles(qkv, width)
    spatial_forward[(triton.cdiv(t, tiles["tile_m"]), b * f * heads)](
        qkv, out, norms, t, heads, width, width**-0.5 * LOG2_E, **tiles
    )
    return out, norms


def backward(qkv: Tensor, out: Tensor, norms: Tensor, grad: Tensor, heads: int) -> Tensor:
    b, f, t, channels = qkv.shape
    width = channels // 3 // heads
    grad_qkv = torch.empty_like(qkv)
    tiles, factor = _tiles(qkv, width), width**-0.5
    spatial_backward[(2 * triton.cdiv(t, tiles["tile_m"]), b * f * heads)](
        qkv, out, norms, grad, grad_qkv, t, heads, width, factor * LOG2_E, factor, **tiles
    )
    return grad_qkv


class _SpatialAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:  # type: ignore[override]
        out, norms = forward(qkv, heads)
        ctx.save_for_backward(qkv, out, norms)
        ctx.heads = heads
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return backward(*ctx.saved_tensors, grad.contiguous(), ctx.heads), None


def spatial_attention(qkv: Tensor, heads: int) -> Tensor:
    """qkv [b, f, t, 3d], contiguous, -> [b, f, t, d]: for each frame f, over its positions t."""
    out: Tensor = _SpatialAttention.apply(qkv, heads)
    return out
