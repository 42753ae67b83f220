"""Triton kernels of residual, LayerNorm and modulation; xdimo.model.fused.adaln launches them."""

import triton
import triton.language as tl


@triton.jit
def _branch(branch, weight_TK, row_TK, token, at, d, ok, width: tl.constexpr, top_k: tl.constexpr):
    """A tile of the branch; ``top_k`` 0: it is a tensor."""
    if top_k == 0:
        total = tl.load(branch + at, mask=ok, other=0.0).to(tl.float32)
    else:
        total = tl.zeros(at.shape, tl.float32)
        for j in tl.static_range(top_k):
            row = tl.load(row_TK + token * top_k + j).to(tl.int64)
            weight = tl.load(weight_TK + token * top_k + j)
            place = branch + row[:, None] * width + d[None, :]
            total += weight[:, None] * tl.load(place, mask=ok, other=0.0).to(tl.float32)
    return total


@triton.jit
def residual_norm_forward(
    x, branch, bias, weight_TK, row_TK, gate, table, shift, scale, out, h,
    tokens, tokens_a_frame, stride_gate, stride_shift,
    eps: tl.constexpr, width: tl.constexpr, adds: tl.constexpr, has_bias: tl.constexpr,
    top_k: tl.constexpr, has_table: tl.constexpr,
    tile_t: tl.constexpr, tile_d: tl.constexpr,
):  # fmt: skip
    clip = tl.program_id(1)
    t = tl.program_id(0) * tile_t + tl.arange(0, tile_t)
    d = tl.arange(0, tile_d)
    d_ok = d < width
    ok = (t < tokens)[:, None] & d_ok[None, :]
    # Tokens past the end read the last one's rows and write nothing.
    token = clip.to(tl.int64) * tokens + tl.minimum(t, tokens - 1)
    at = token[:, None] * width + d[None, :]
    value = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    if adds:
        g = tl.load(gate + clip * stride_gate + d, mask=d_ok, other=0.0).to(tl.float32)
        added = _branch(branch, weight_TK, row_TK, token, at, d, ok, width, top_k)
        if has_bias:
            added += tl.load(bias + d, mask=d_ok, other=0.0).to(tl.float32)[None, :]
        value += g[None, :] * added
        if has_table:
            place = table + (t // tokens_a_frame)[:, None] * width + d[None, :]
            value += tl.load(place, mask=ok, other=0.0)
        tl.store(out + at, value, mask=ok)
    mean = tl.sum(value, axis=1) / width
    centred = tl.where(ok, value - mean[:, None], 0.0)
    normal = centred * tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)[:, None]
    s = tl.load(scale + clip * stride_shift + d, mask=d_ok, other=0.0).to(tl.float32)
    b = tl.load(shift + clip * stride_shift + d, mask=d_ok, other=0.0).to(tl.float32)
    result = normal * (1.0 + s)[None, :] + b[None, :]
    tl.store(h + at, result.to(h.dtype.element_ty), mask=ok)


@triton.jit
def residual_norm_backward(
    grad_out, grad_h, x, branch, bias, weight_TK, row_TK, choice_R, first_E, last_E, gate, scale,
    grad_x, grad_branch, grad_logit_TK, sums,
    tokens, choices, stride_gate, stride_scale, rounds,
    eps: tl.constexpr, width: tl.constexpr, adds: tl.constexpr, has_bias: tl.constexpr,
    top_k: tl.constexpr, padded_k: tl.constexpr, fillers: tl.constexpr, tile_rows: tl.constexpr,
    passes: tl.constexpr, tile_t: tl.constexpr, tile_d: tl.constexpr,
):  # fmt: skip
    """``passes``: x' is used further on, so it has a gradient of its own.

    ``top_k``: of a mixture; its rows get their gradients, and the logits of the choices theirs.
    ``fillers``: rows that may only fill up an expert's last tile, of all experts.
    """
    clip = tl.program_id(1)
    d = tl.arange(0, tile_d)
    d_ok = d < width
    s = tl.load(scale + clip * stride_scale + d, mask=d_ok, other=0.0).to(tl.float32)
    if adds:
        g = tl.load(gate + clip * stride_gate + d, mask=d_ok, other=0.0).to(tl.float32)
    sum_shift = tl.zeros((tile_d,), tl.float32)
    sum_scale = tl.zeros((tile_d,), tl.float32)
    sum_gate = tl.zeros((tile_d,), tl.float32)
    sum_total = tl.zeros((tile_d,), tl.float32)
    for i in range(rounds):
        t = (tl.program_id(0) * rounds + i) * tile_t + tl.arange(0, tile_t)
        t_ok = t < tokens
        ok = t_ok[:, None] & d_ok[None, :]
        token = clip.to(tl.int64) * tokens + tl.minimum(t, tokens - 1)
        at = token[:, None] * width + d[None, :]
        # All that is read comes before anything is written, so that the reads do not wait.
        value = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
        up = tl.load(grad_h + at, mask=ok, other=0.0).to(tl.float32)
        if passes:
            through = tl.load(grad_out + at, mask=ok, other=0.0).to(tl.float32)
        if adds and top_k == 0:
            added = tl.load(branch + at, mask=ok, other=0.0).to(tl.float32)
        mean = tl.sum(value, axis=1) / width
        centred = tl.where(ok, value - mean[:, None], 0.0)
        inverse = tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)
        normal = centred * inverse[:, None]
        sum_shift += tl.sum(up, axis=0)
        sum_scale += tl.sum(up * normal, axis=0)
        up *= (1.0 + s)[None, :]
        along = tl.sum(up * normal, axis=1) / width
        total = (up - (tl.sum(up, axis=1) / width)[:, None] - normal * along[:, None]) * (
            inverse[:, None]
        )
        if passes:
            total += through
        total = tl.where(ok, total, 0.0)
        if adds and top_k == 0:
            sum_gate += tl.sum(total * added, axis=0)
            if has_bias:
                sum_total += tl.sum(total, axis=0)
            product = total * g[None, :]
            tl.store(grad_branch + at, product.to(grad_branch.dtype.element_ty), mask=ok)
        if top_k > 0:
            choice = token[:, None] * top_k + tl.arange(0, padded_k)[None, :]
            choice_ok = (tl.arange(0, padded_k) < top_k)[None, :]
            weights = tl.load(weight_TK + choice, mask=choice_ok, other=0.0)
            grads = tl.zeros((tile_t, padded_k), tl.float32)
            for j in tl.static_range(top_k):
                row = tl.load(row_TK + token * top_k + j).to(tl.int64)
                weight = tl.load(weight_TK + token * top_k + j)
                place = branch + row[:, None] * width + d[None, :]
                y = total * tl.load(place, mask=ok, other=0.0).to(tl.float32)
                sum_gate += tl.sum(weight[:, None] * y, axis=0)
                grad = tl.sum(y * g[None, :], axis=1)
                grads += tl.where((tl.arange(0, padded_k) == j)[None, :], grad[:, None], 0.0)
            # Of the softmax over the chosen: weight (its gradient - the weighted mean of all).
            grads = weights * (grads - tl.sum(weights * grads, axis=1)[:, None])
            tl.store(grad_logit_TK + choice, grads, mask=choice_ok & t_ok[:, None])
            for j in tl.static_range(top_k):
                row = tl.load(row_TK + token * top_k + j).to(tl.int64)
                weight = tl.load(weight_TK + token * top_k + j)
                product = total * (weight[:, None] * g[None, :])
                place = grad_branch + row[:, None] * width + d[None, :]
                tl.store(place, product.to(grad_branch.dtype.element_ty), mask=ok)
        tl.store(grad_x + at, total, mask=ok)
    if top_k > 0:
        # Rows that only fill up an expert's last tile have no token, and no gradient.
        program = clip * tl.num_programs(0) + tl.program_id(0)
        for filler in range(program, fillers, tl.num_programs(0) * tl.num_programs(1)):
            row = tl.load(last_E + filler // tile_rows) - 1 - filler % tile_rows
            fills = row >= tl.load(first_E + filler // tile_rows)
            fills = fills & (tl.load(choice_R + row, mask=fills, other=0) == choices)
            place = grad_branch + row.to(tl.int64) * width + d
            zeros = tl.zeros((tile_d,), grad_branch.dtype.element_ty)
            tl.store(place, zeros, mask=d_ok & fills)
    if has_bias:
        sum_gate += sum_total * tl.load(bias + d, mask=d_ok, other=0.0).to(tl.float32)
    kinds: tl.constexpr = 3 + has_bias
    place = sums + (clip * tl.num_programs(0) + tl.program_id(0)) * kinds * width + d
    tl.store(place, sum_shift, mask=d_ok)
    tl.store(place + width, sum_scale, mask=d_ok)
    tl.store(place + 2 * width, sum_gate, mask=d_ok)
    if has_bias:
        tl.store(place + 3 * width, sum_total * g, mask=d_ok)


@triton.jit
def residual_norm_sums(
    sums, grad_steering, grad_bias, clips, programs, width: tl.constexpr, has_bias: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    """Sums [clips, programs, 3 or 4, d] -> those of each clip for steering [3, clips, d], and of
    all clips for the bias [d].
    """
    size: tl.constexpr = (3 + has_bias) * width
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    clip = tl.program_id(1)  # one more than there are: the bias
    is_bias = clip == clips
    n += tl.where(is_bias, 3 * width, 0)
    ok = (n < 3 * width) | (is_bias & (n < size))
    first = tl.where(is_bias, 0, clip) * programs
    total = tl.zeros((block_n,), tl.float32)
    for m in range(first, tl.where(is_bias, clips, clip + 1) * programs, block_m):
        row = m + tl.arange(0, block_m)
        row_ok = row < tl.where(is_bias, clips, clip + 1) * programs
        at = row.to(tl.int64)[:, None] * size + n[None, :]
        total += tl.sum(tl.load(sums + at, mask=row_ok[:, None] & ok[None, :], other=0.0), axis=0)
    if is_bias:
        tl.store(grad_bias + n - 3 * width, total, mask=ok)
    else:
        place = grad_steering + (n // width * clips + clip) * width + n % width
        tl.store(place, total.to(grad_steering.dtype.element_ty), mask=ok)
