"""Triton kernels of the mixture of experts; xdimo.model.fused.experts launches them.

Names end in their dimensions' letters, which stand there.
"""

import triton
import triton.language as tl


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
def halves(tile, tile_m: tl.constexpr, tile_n: tl.constexpr):
    """Left and right half of a tile, so that an epilogue keeps less in flight at once."""
    return tl.split(tl.permute(tl.reshape(tile, (tile_m, 2, tile_n // 2)), (0, 2, 1)))


@triton.jit
def activate(z, hidden, activated, at, ok, fast: tl.constexpr):
    """Leaves z and GELU(z)."""
    tl.store(hidden + at, z.to(hidden.dtype.element_ty), mask=ok)
    result = z * sigmoid_of_gelu(z, fast)
    tl.store(activated + at, result.to(activated.dtype.element_ty), mask=ok)


@triton.jit
def derive(grad, hidden, out, sums, at, ok, sums_ok, fast: tl.constexpr):
    """Leaves grad x GELU'(z), its sums over rows, and GELU(z) in the place of z."""
    z = tl.load(hidden + at, mask=ok, other=0.0).to(tl.float32)
    s = sigmoid_of_gelu(z, fast)
    tl.store(hidden + at, (z * s).to(hidden.dtype.element_ty), mask=ok)
    grad *= s + z * s * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * z * z))
    tl.store(out + at, grad.to(out.dtype.element_ty), mask=ok)
    tl.store(sums, tl.sum(grad, axis=0), mask=sums_ok)


@triton.jit
def matmul_rows(
    rows, weights, bias, out, hidden, sums, choice_R, expert_M,
    choices, sums_width,
    width_in: tl.constexpr, width_out: tl.constexpr, experts: tl.constexpr,
    gathered_by: tl.constexpr,  # K where rows are tokens, to be gathered; 0 where they are rows
    transposed: tl.constexpr,  # weights are [E, in, out]; else [E, out, in]
    has_bias: tl.constexpr, activates: tl.constexpr, derives: tl.constexpr, fast: tl.constexpr,
    tile_m: tl.constexpr, tile_n: tl.constexpr, tile_k: tl.constexpr,
):  # fmt: skip
    """out[row] = rows[row] @ weights[expert of its tile], then bias.

    ``activates``: hidden takes that and out its GELU. ``derives``: hidden holds what GELU had; out
    is multiplied by GELU's derivative there, sums takes the sum of each tile's rows for the
    gradient of the bias, and hidden becomes its GELU. Without either, and not gathered, the card's
    copy engine may move the tiles: rows, weights [E out, in] and out are descriptors then.
    """
    columns: tl.constexpr = (width_out + tile_n - 1) // tile_n
    tile = tl.program_id(0) // columns
    expert = tl.load(expert_M + tile)
    if expert < experts:
        row = tile * tile_m + tl.arange(0, tile_m)
        first = tl.program_id(0) % columns * tile_n
        column = first + tl.arange(0, tile_n)
        column_ok = column < width_out
        total = tl.zeros((tile_m, tile_n), tl.float32)
        if isinstance(rows, tl.tensor_descriptor):
            # A tile over an expert's end meets zeros of a row's, or columns that are not stored.
            for k in range(0, width_in, tile_k):
                if transposed:
                    w_tile = weights.load([expert * width_in + k, first])
                else:
                    w_tile = weights.load([expert * width_out + first, k]).T
                a_tile = rows.load([tile * tile_m, k])
                total = tl.dot(a_tile, w_tile, total, input_precision="ieee")
        else:
            inner = tl.arange(0, tile_k)
            if gathered_by > 0:
                choice = tl.load(choice_R + row)
                row_ok = choice < choices
                source = (choice // gathered_by).to(tl.int64)
            else:
                row_ok = row >= 0
                source = row.to(tl.int64)
            stride_in: tl.constexpr = width_out if transposed else 1
            stride_out: tl.constexpr = 1 if transposed else width_in
            a = rows + source[:, None] * width_in + inner[None, :]
            w = weights + expert.to(tl.int64) * width_in * width_out
            w += inner[:, None] * stride_in + column[None, :] * stride_out
            for k in range(0, width_in, tile_k):
                inner_ok = inner < width_in - k
                a_tile = tl.load(a, mask=row_ok[:, None] & inner_ok[None, :], other=0.0)
                w_tile = tl.load(w, mask=inner_ok[:, None] & column_ok[None, :], other=0.0)
                total = tl.dot(a_tile, w_tile, total, input_precision="ieee")
                a += tile_k
                w += tile_k * stride_in
        if has_bias:
            b = tl.load(bias + expert * width_out + column, mask=column_ok, other=0.0)
            total += b.to(tl.float32)[None, :]
        at = row.to(tl.int64)[:, None] * width_out
        if activates or derives:
            left, right = halves(total, tile_m, tile_n)
            column = first + tl.arange(0, tile_n // 2)
            ok = column < width_out
            if activates:
                activate(left, hidden, out, at + column[None, :], ok[None, :], fast)
            else:
                place = sums + tile * sums_width + column
                derive(left, hidden, out, place, at + column[None, :], ok[None, :], ok, fast)
            column += tile_n // 2
            ok = column < width_out
            if activates:
                activate(right, hidden, out, at + column[None, :], ok[None, :], fast)
            else:
                place = sums + tile * sums_width + column
                derive(right, hidden, out, place, at + column[None, :], ok[None, :], ok, fast)
        elif isinstance(out, tl.tensor_descriptor):
            out.store([tile * tile_m, first], total.to(out.dtype))
        else:
            at += column[None, :]
            tl.store(out + at, total.to(out.dtype.element_ty), mask=column_ok[None, :])


@triton.jit
def weight_gradient(
    left, right, partial, first_E, last_E, part_rows,
    width_left: tl.constexpr, width_right: tl.constexpr, experts: tl.constexpr,
    tile_m: tl.constexpr, tile_n: tl.constexpr, tile_k: tl.constexpr,
):  # fmt: skip
    """left^T right over equal parts of all experts' rows, so that all programs have as much to do.

    ``part_rows``, which tile_k divides: of a part. Where an expert e ends within part p, the part
    makes two sums: partial[p + e], and the next. Left and right are descriptors where the card's
    copy engine moves their tiles.
    """
    part = tl.program_id(1)
    columns: tl.constexpr = (width_right + tile_n - 1) // tile_n
    first_m = tl.program_id(0) // columns * tile_m
    first_n = tl.program_id(0) % columns * tile_n
    m = first_m + tl.arange(0, tile_m)
    n = first_n + tl.arange(0, tile_n)
    m_ok = m < width_left
    n_ok = n < width_right
    inner = tl.arange(0, tile_k)
    for expert in range(experts):
        begin = tl.maximum(tl.load(first_E + expert), part * part_rows)
        end = tl.minimum(tl.load(last_E + expert), (part + 1) * part_rows)
        if begin < end:
            total = tl.zeros((tile_m, tile_n), tl.float32)
            for k in range(begin, end, tile_k):
                if isinstance(left, tl.tensor_descriptor):
                    l_tile = left.load([k, first_m])
                    r_tile = right.load([k, first_n])
                else:
                    row = (k + inner).to(tl.int64)[:, None]
                    l_at = row * width_left + m[None, :]
                    r_at = row * width_right + n[None, :]
                    l_tile = tl.load(left + l_at, mask=m_ok[None, :], other=0.0)
                    r_tile = tl.load(right + r_at, mask=n_ok[None, :], other=0.0)
                total = tl.dot(tl.trans(l_tile), r_tile, total, input_precision="ieee")
            place = (part + expert).to(tl.int64) * width_left * width_right
            at = place + m[:, None] * width_right + n[None, :]
            tl.store(partial + at, total, mask=m_ok[:, None] & n_ok[None, :])


@triton.jit
def sum_parts(
    partial, out_EN, first_E, last_E, size, part_rows, block: tl.constexpr,
):  # fmt: skip
    """out[e] = sum of e's parts, in their order."""
    expert = tl.program_id(0)
    begin = tl.load(first_E + expert)
    end = tl.load(last_E + expert)
    at = tl.program_id(1) * block + tl.arange(0, block)
    ok = at < size
    total = tl.zeros((block,), tl.float32)
    for part in range(begin // part_rows, tl.where(begin < end, tl.cdiv(end, part_rows), 0)):
        place = partial + (part + expert).to(tl.int64) * size
        total += tl.load(place + at, mask=ok, other=0.0)
    tl.store(out_EN + expert.to(tl.int64) * size + at, total, mask=ok)


@triton.jit
def sum_tiles(
    sums, up_bias_EH, down_bias_ED, router_ED, first_E, last_E,
    hidden: tl.constexpr, width: tl.constexpr, has_router: tl.constexpr,
    tile_m: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    """Of each expert, the sum of its tiles' sums [M, H + D + D]."""
    size: tl.constexpr = hidden + 2 * width
    expert = tl.program_id(0)
    n = tl.program_id(1) * block_n + tl.arange(0, block_n)
    last = tl.load(last_E + expert) // tile_m
    total = tl.zeros((block_n,), tl.float32)
    for first in range(tl.load(first_E + expert) // tile_m, last, block_m):
        m = first + tl.arange(0, block_m)
        ok = (m < last)[:, None] & (n < size)[None, :]
        total += tl.sum(tl.load(sums + m[:, None] * size + n[None, :], mask=ok, other=0.0), axis=0)
    tl.store(up_bias_EH + expert * hidden + n, total, mask=n < hidden)
    n -= hidden
    tl.store(down_bias_ED + expert * width + n, total, mask=(n >= 0) & (n < width))
    if has_router:
        n -= width
        tl.store(router_ED + expert * width + n, total, mask=(n >= 0) & (n < width))


@triton.jit
def sum_choices(
    y, row_TK, grad_logit_TK, expert_TK, router_ED, out, tokens, width: tl.constexpr,
    top_k: tl.constexpr, has_router: tl.constexpr, tile_t: tl.constexpr, tile_d: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over t's choices of y[its row], and what h gets through the router."""
    t = tl.program_id(0) * tile_t + tl.arange(0, tile_t)
    d = tl.program_id(1) * tile_d + tl.arange(0, tile_d)
    ok = (t < tokens)[:, None] & (d < width)[None, :]
    token = tl.minimum(t, tokens - 1)
    total = tl.zeros((tile_t, tile_d), tl.float32)
    for j in tl.static_range(top_k):
        choice = token * top_k + j
        row = tl.load(row_TK + choice).to(tl.int64)
        total += tl.load(y + row[:, None] * width + d[None, :], mask=ok, other=0.0).to(tl.float32)
        if has_router:
            place = router_ED + tl.load(expert_TK + choice)[:, None] * width + d[None, :]
            w = tl.load(place, mask=ok, other=0.0).to(tl.float32)
            total += tl.load(grad_logit_TK + choice)[:, None] * w
    place = out + t.to(tl.int64)[:, None] * width + d[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=ok)


@triton.jit
def gather_choices(
    h_TD, grad_y_RD, grad_logit_TK, choice_R, expert_M, out_RD, sums, choices,
    hidden: tl.constexpr, width: tl.constexpr, experts: tl.constexpr, top_k: tl.constexpr,
    has_router: tl.constexpr, tile_m: tl.constexpr, tile_d: tl.constexpr,
):  # fmt: skip
    """out[row] = h[its token]; any token's in rows that only fill up: their gradient is 0.

    Each tile's sums over rows of grad_y, and of h times the gradient of the row's logit, go behind
    those for the hidden bias: sums [M, H + D + D].
    """
    tile = tl.program_id(0)
    if tl.load(expert_M + tile) < experts:
        row = tile * tile_m + tl.arange(0, tile_m)
        choice = tl.load(choice_R + row)
        filled = choice < choices
        token = tl.minimum(choice, choices - 1) // top_k
        d = tl.program_id(1) * tile_d + tl.arange(0, tile_d)
        d_ok = d < width
        ok = filled[:, None] & d_ok[None, :]
        place = h_TD + token.to(tl.int64)[:, None] * width + d[None, :]
        h = tl.load(place, mask=ok, other=0.0)
        at = row.to(tl.int64)[:, None] * width + d[None, :]
        tl.store(out_RD + at, h, mask=d_ok[None, :])
        grad_y = tl.load(grad_y_RD + at, mask=ok, other=0.0).to(tl.float32)
        place = sums + tile * (hidden + 2 * width) + hidden + d
        tl.store(place, tl.sum(grad_y, axis=0), mask=d_ok)
        if has_router:
            grad = tl.load(grad_logit_TK + choice, mask=filled, other=0.0)
            tl.store(place + width, tl.sum(grad[:, None] * h.to(tl.float32), axis=0), mask=d_ok)
