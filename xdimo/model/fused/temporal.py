"""Attention over the frames of one position, read and written where they lie.

A clip's tokens stay in the order [frames, positions]; the frames of a position are far apart, but a
head's channels are together, so nothing is moved. One program does one head of one position: with
16 frames all of it fits in registers, and the backward pass makes the weights again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _load(base, frame, channel, stride, ok):
    return tl.load(base + frame[:, None] * stride + channel[None, :], mask=ok, other=0.0)


@triton.jit
def _weights(q, k, frame, frames, scale):
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    logits = tl.where((frame < frames)[None, :], logits, float("-inf"))
    exponential = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return exponential / tl.sum(exponential, axis=1)[:, None]


@triton.jit
def temporal_forward(
    qkv, out, frames, positions, heads: tl.constexpr, width: tl.constexpr, scale,
    tile_f: tl.constexpr, tile_c: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    place = (tl.program_id(0) // heads).to(tl.int64)  # clip x positions + position
    clip, position = place // positions, place % positions
    frame = tl.arange(0, tile_f)
    channel = tl.arange(0, tile_c)
    ok = (frame < frames)[:, None] & (channel < width)[None, :]
    token = clip * frames * positions + position
    base = qkv + token * (3 * heads * width) + head * width
    stride = positions * 3 * heads * width
    q = _load(base, frame, channel, stride, ok)
    k = _load(base + heads * width, frame, channel, stride, ok)
    v = _load(base + 2 * heads * width, frame, channel, stride, ok)
    p = _weights(q, k, frame, frames, scale)
    o = tl.dot(p.to(v.dtype), v, input_precision="ieee")
    place_out = out + token * (heads * width) + head * width
    place_out += frame[:, None] * positions * heads * width + channel[None, :]
    tl.store(place_out, o.to(out.dtype.element_ty), mask=ok)


@triton.jit
def temporal_backward(
    qkv, grad, grad_qkv, frames, positions, heads: tl.constexpr, width: tl.constexpr, scale,
    tile_f: tl.constexpr, tile_c: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    place = (tl.program_id(0) // heads).to(tl.int64)
    clip, position = place // positions, place % positions
    frame = tl.arange(0, tile_f)
    channel = tl.arange(0, tile_c)
    ok = (frame < frames)[:, None] & (channel < width)[None, :]
    token = clip * frames * positions + position
    offset = token * (3 * heads * width) + head * width
    stride = positions * 3 * heads * width
    q = _load(qkv + offset, frame, channel, stride, ok)
    k = _load(qkv + offset + heads * width, frame, channel, stride, ok)
    v = _load(qkv + offset + 2 * heads * width, frame, channel, stride, ok)
    base = grad + token * (heads * width) + head * width
    g = _load(base, frame, channel, positions * heads * width, ok)
    p = _weights(q, k, frame, frames, scale)
    grad_v = tl.dot(tl.trans(p.to(g.dtype)), g, input_precision="ieee")
    grad_p = tl.dot(g, tl.trans(v), input_precision="ieee")
    grad_logits = p * (grad_p - tl.sum(p * grad_p, axis=1)[:, None]) * scale
    grad_logits = grad_logits.to(q.dtype)
    grad_q = tl.dot(grad_logits, k, input_precision="ieee")
    grad_k = tl.dot(tl.trans(grad_logits), q, input_precision="ieee")
    at = grad_qkv + offset + frame[:, None] * stride + channel[None, :]
    tl.store(at, grad_q.to(grad_qkv.dtype.element_ty), mask=ok)
    tl.store(at + heads * width, grad_k.to(grad_qkv.dtype.element_ty), mask=ok)
    tl.store(at + 2 * heads * width, grad_v.to(grad_qkv.dtype.element_ty), mask=ok)


def _tiles(frames: int, width: int) -> tuple[int, int]:
    return max(16, triton.next_power_of_2(frames)), max(16, triton.next_power_of_2(width))


@torch.library.custom_op("xdimo::temporal_attention", mutates_args=())
def temporal_attention(qkv: Tensor, heads: int) -> Tensor:
    """qkv [b, f, t, 3d], contiguous, -> [b, f, t, d]: for each position t, over its frames f."""
    b, f, t, channels = qkv.shape
    out = qkv.new_empty(b, f, t, channels // 3)
    width = channels // 3 // heads
    grid = (b * t * heads,)
    temporal_forward[grid](
        qkv, out, f, t, heads, width, width**-0.5, *_tiles(f, width), num_warps=1
    )
    return out


@temporal_attention.register_fake
def _(qkv, heads):  # type: ignore[no-untyped-def]
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


@torch.library.custom_op("xdimo::temporal_attention_backward", mutates_args=())
def temporal_attention_backward(qkv: Tensor, grad: Tensor, heads: int) -> Tensor:
    b, f, t, channels = qkv.shape
    out = torch.empty_like(qkv)
    width = channels // 3 // heads
    grid = (b * t * heads,)
    tiles = _tiles(f, width)
    temporal_backward[grid](qkv, grad, out, f, t, heads, width, width**-0.5, *tiles, num_warps=1)
    return out


@temporal_attention_backward.register_fake
def _(qkv, grad, heads):  # type: ignore[no-untyped-def]
    return torch.empty_like(qkv)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[0])
    ctx.heads = inputs[1]


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    (qkv,) = ctx.saved_tensors
    return temporal_attention_backward(qkv, grad.contiguous(), ctx.heads), None


temporal_attention.register_autograd(_backward, setup_context=_save)
