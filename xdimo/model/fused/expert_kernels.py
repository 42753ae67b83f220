"""Triton kernels of the mixture of experts; xdimo.model.fused.experts launches them.

Names end in their dimensions' letters, which stand there.
"""

import triton
import triton.language as tl


@triton.jit
def count_choices(
    expert_S, counts_CE, choices,
    experts: tl.constexpr, padded: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """How many of a chunk of choices each expert has."""
    choice = tl.program_id(0) * chunk + tl.arange(0, chunk)
    expert = tl.load(expert_S + choice, mask=choice < choices, other=experts)
    index = tl.arange(0, padded)
    mine = (expert[:, None] == index[None, :]).to(tl.int32)
    place = counts_CE + tl.program_id(0) * experts + index
    tl.store(place, tl.sum(mine, axis=0), mask=index < experts)


@triton.jit
def place_choices(
    expert_S, begin_CE, row_S, choice_R, choices,
    experts: tl.constexpr, padded: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """The row of each choice of a chunk: where the chunk's part of its expert begins, and on."""
    choice = tl.program_id(0) * chunk + tl.arange(0, chunk)
    ok = choice < choices
    expert = tl.load(expert_S + choice, mask=ok, other=experts)
    index = tl.arange(0, padded)
    begin = tl.load(begin_CE + tl.program_id(0) * experts + index, mask=index < experts, other=0)
    mine = (expert[:, None] == index[None, :]).to(tl.int32)
    row = tl.sum(mine * (begin[None, :] + tl.cumsum(mine, axis=0) - 1), axis=1)
    tl.store(row_S + choice, row, mask=ok)
    tl.store(choice_R + row, choice, mask=ok)


@triton.jit
def sigmoid_of_gelu(z, fast: tl.constexpr):
    """gelu(z) = z sigmoid(2u), u = sqrt(2/pi) (z + 0.044715 z^3): the tanh form, rewritten.

    ``fast``: one instruction with 11 bits, more than bfloat16 keeps.
    """
    u = 0.7978845608028654 * z * (1.0 + 0.044715 * z * z)
    if fast:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1
        )
        return 0.5 + 0.5 * tanh
    else:
        return tl.sigmoid(2.0 * u)


@triton.jit
def matmul_rows(
    rows, weights, bias, hidden, out, activated, sums, choice_R, expert_M,
    choices, width_in: tl.constexpr, width_out: tl.constexpr, experts: tl.constexpr,
    gathered_by: tl.constexpr,  # K where rows are tokens, to be gathered; 0 where they are rows
    stride_in: tl.constexpr, stride_out: tl.constexpr,  # of a weight, per input and output channel
    has_bias: tl.constexpr, activates: tl.constexpr, derives: tl.constexpr, fast: tl.constexpr,
    tile_m: tl.constexpr, tile_n: tl.constexpr, tile_k: tl.constexpr,
):  # fmt: skip
    """out[row] = rows[row] @ weights[expert of its tile], then bias, GELU, or GELU's derivative.

    With the derivative it also leaves the sum of each tile's rows, for the gradient of the bias.
    """
    columns: tl.constexpr = (width_out + tile_n - 1) // tile_n
    tile = tl.program_id(0) // columns
    expert = tl.load(expert_M + tile)
    if expert < experts:
        row = tile * tile_m + tl.arange(0, tile_m)
        column = tl.program_id(0) % columns * tile_n + tl.arange(0, tile_n)
        inner = tl.arange(0, tile_k)
        column_ok = column < width_out
        if gathered_by > 0:
            choice = tl.load(choice_R + row)
            row_ok = choice < choices
            source = (choice // gathered_by).to(tl.int64)
        else:
            row_ok = row >= 0
            source = row.to(tl.int64)
        a = rows + source[:, None] * width_in + inner[None, :]
        w = weights + expert.to(tl.int64) * width_in * width_out
        w += inner[:, None] * stride_in + column[None, :] * stride_out
        total = tl.zeros((tile_m, tile_n), tl.float32)
        for k in range(0, width_in, tile_k):
            inner_ok = inner < width_in - k
            a_tile = tl.load(a, mask=row_ok[:, None] & inner_ok[None, :], other=0.0)
            w_tile = tl.load(w, mask=inner_ok[:, None] & column_ok[None, :], other=0.0)
            total = tl.dot(a_tile, w_tile, total, input_precision="ieee")
            a += tile_k
            w += tile_k * stride_in
        at = row.to(tl.int64)[:, None] * width_out + column[None, :]
        ok = (row >= 0)[:, None] & column_ok[None, :]
        if has_bias:
            b = tl.load(bias + expert * width_out + column, mask=column_ok, other=0.0)
            total += b.to(tl.float32)[None, :]
        if activates:
            s = sigmoid_of_gelu(total, fast)
            tl.store(activated + at, (total * s).to(activated.dtype.element_ty), mask=ok)
        if derives:
            z = tl.load(hidden + at, mask=ok, other=0.0).to(tl.float32)
            s = sigmoid_of_gelu(z, fast)
            slope = 1.5957691216057308 * (1.0 + 0.134145 * z * z)
            total *= s + z * s * (1.0 - s) * slope
            place = sums + tile * width_out + column
            tl.store(place, tl.sum(total, axis=0), mask=column_ok)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=ok)


@triton.jit
def weight_gradient(
    left, right, partial, first_E, last_E,
    width_left: tl.constexpr, width_right: tl.constexpr, experts: tl.constexpr,
    splits: tl.constexpr,
    tile_m: tl.constexpr, tile_n: tl.constexpr, tile_k: tl.constexpr,
):  # fmt: skip
    """partial[split, e] = left^T right over a part of e's rows."""
    columns: tl.constexpr = (width_right + tile_n - 1) // tile_n
    expert = tl.program_id(1)
    split = tl.program_id(2)
    m = tl.program_id(0) // columns * tile_m + tl.arange(0, tile_m)
    n = tl.program_id(0) % columns * tile_n + tl.arange(0, tile_n)
    m_ok = m < width_left
    n_ok = n < width_right
    first = tl.load(first_E + expert)
    last = tl.load(last_E + expert)
    part = tl.cdiv(tl.cdiv(last - first, tile_k), splits) * tile_k
    begin = first + split * part
    end = tl.minimum(begin + part, last)
    total = tl.zeros((tile_m, tile_n), tl.float32)
    inner = tl.arange(0, tile_k)
    for k in range(begin, end, tile_k):
        row = k + inner
        row_ok = row < end
        l_tile = tl.load(
            left + row.to(tl.int64)[:, None] * width_left + m[None, :],
            mask=row_ok[:, None] & m_ok[None, :], other=0.0,
        )  # fmt: skip
        r_tile = tl.load(
            right + row.to(tl.int64)[:, None] * width_right + n[None, :],
            mask=row_ok[:, None] & n_ok[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(tl.trans(l_tile), r_tile, total, input_precision="ieee")
    at = (split * experts + expert).to(tl.int64)
    place = partial + at * width_left * width_right + m[:, None] * width_right + n[None, :]
    tl.store(place, total.to(partial.dtype.element_ty), mask=m_ok[:, None] & n_ok[None, :])


@triton.jit
def combine(
    y, weight_TK, row_TK, out, tokens, width: tl.constexpr,
    top_k: tl.constexpr, weighs: tl.constexpr, tile_t: tl.constexpr, tile_d: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over t's choices of y[its row], weighed or not."""
    t = tl.program_id(0) * tile_t + tl.arange(0, tile_t)
    d = tl.program_id(1) * tile_d + tl.arange(0, tile_d)
    t_ok = t < tokens
    ok = t_ok[:, None] & (d < width)[None, :]
    total = tl.zeros((tile_t, tile_d), tl.float32)
    for j in tl.static_range(top_k):
        row = tl.load(row_TK + t * top_k + j, mask=t_ok, other=0).to(tl.int64)
        value = tl.load(y + row[:, None] * width + d[None, :], mask=ok, other=0.0).to(tl.float32)
        if weighs:
            weight = tl.load(weight_TK + t * top_k + j, mask=t_ok, other=0.0).to(tl.float32)
            value *= weight[:, None]
        total += value
    place = out + t.to(tl.int64)[:, None] * width + d[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=ok)


@triton.jit
def spread(
    grad, y, weight_S, choice_R, grad_y, grad_weight_S, sums, choices, width: tl.constexpr,
    top_k: tl.constexpr, tile_r: tl.constexpr, tile_d: tl.constexpr,
):  # fmt: skip
    """grad_y[row] = weight x grad[its token], 0 in rows that only fill up; grad_weight = grad . y.

    And the sum of each tile's rows of grad_y.
    """
    row = (tl.program_id(0) * tile_r + tl.arange(0, tile_r)).to(tl.int64)
    choice = tl.load(choice_R + row)
    row_ok = choice < choices
    token = (choice // top_k).to(tl.int64)
    weight = tl.load(weight_S + choice, mask=row_ok, other=0.0).to(tl.float32)
    product = tl.zeros((tile_r,), tl.float32)
    for first in tl.static_range(0, width, tile_d):
        d = first + tl.arange(0, tile_d)
        ok = row_ok[:, None] & (d < width)[None, :]
        g = tl.load(grad + token[:, None] * width + d[None, :], mask=ok, other=0.0).to(tl.float32)
        v = tl.load(y + row[:, None] * width + d[None, :], mask=ok, other=0.0).to(tl.float32)
        product += tl.sum(g * v, axis=1)
        place = grad_y + row[:, None] * width + d[None, :]
        value = g * weight[:, None]
        all_ok = (row >= 0)[:, None] & (d < width)[None, :]
        tl.store(place, value.to(grad_y.dtype.element_ty), mask=all_ok)
        tl.store(sums + tl.program_id(0) * width + d, tl.sum(value, axis=0), mask=d < width)
    tl.store(grad_weight_S + choice, product.to(grad_weight_S.dtype.element_ty), mask=row_ok)
