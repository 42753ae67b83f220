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
def begin_chunks(
    counts_CE, begin_CE, first_E, last_E, expert_M, chunks, tiles,
    experts: tl.constexpr, padded: tl.constexpr, padded_chunks: tl.constexpr,
    tile_m: tl.constexpr, step: tl.constexpr,
):  # fmt: skip
    """Where each chunk's part of each expert begins, and which expert each tile of rows has.

    One program: a few thousand numbers.
    """
    chunk = tl.arange(0, padded_chunks)
    before = tl.zeros((), tl.int32)
    index = tl.arange(0, step)
    for expert in tl.static_range(experts):
        ok = chunk < chunks
        counts = tl.load(counts_CE + chunk * experts + expert, mask=ok, other=0)
        tl.store(begin_CE + chunk * experts + expert, before + tl.cumsum(counts) - counts, mask=ok)
        rows = (tl.sum(counts) + tile_m - 1) // tile_m * tile_m
        tl.store(first_E + expert, before)
        tl.store(last_E + expert, before + rows)
        for tile in range(before // tile_m, (before + rows) // tile_m, step):
            mine = tile + index < (before + rows) // tile_m
            tl.store(expert_M + tile + index, expert, mask=mine)
        before += rows
    for tile in range(before // tile_m, tiles, step):
        tl.store(expert_M + tile + index, experts, mask=tile + index < tiles)


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
def derive(grad, hidden, out, sums, at, ok, sums_at, sums_ok, fast: tl.constexpr):
    """Leaves grad x GELU'(z), its sums over rows, and GELU(z) in the place of z."""
    z = tl.load(hidden + at, mask=ok, other=0.0).to(tl.float32)
    s = sigmoid_of_gelu(z, fast)
    tl.store(hidden + at, (z * s).to(hidden.dtype.element_ty), mask=ok)
    grad *= s + z * s * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * z * z))
    tl.store(out + at, grad.to(out.dtype.element_ty), mask=ok)
    tl.store(sums + sums_at, tl.sum(grad, axis=0), mask=sums_ok)


@triton.jit
def matmul_rows(
    rows, weights, bias, out, hidden, sums, choice_R, expert_M,
    choices, width_in: tl.constexpr, width_out: tl.constexpr, experts: tl.constexpr,
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
                derive(
                    left, hidden, out, sums, at + column[None, :], ok[None, :],
                    tile * width_out + column, ok, fast,
                )  # fmt: skip
            column += tile_n // 2
            ok = column < width_out
            if activates:
                activate(right, hidden, out, at + column[None, :], ok[None, :], fast)
            else:
                derive(
                    right, hidden, out, sums, at + column[None, :], ok[None, :],
                    tile * width_out + column, ok, fast,
                )  # fmt: skip
        elif isinstance(out, tl.tensor_descriptor):
            out.store([tile * tile_m, first], total.to(out.dtype))
        else:
            at += column[None, :]
            tl.store(out + at, total.to(out.dtype.element_ty), mask=column_ok[None, :])


@triton.jit
def parts_of(expert, first_E, last_E, part_rows: tl.constexpr):
    """How many parts an expert's rows make."""
    rows = tl.load(last_E + expert) - tl.load(first_E + expert)
    return (rows + part_rows - 1) // part_rows


@triton.jit
def weight_gradient(
    left, right, partial, first_E, last_E,
    width_left: tl.constexpr, width_right: tl.constexpr, experts: tl.constexpr,
    part_rows: tl.constexpr,
    tile_m: tl.constexpr, tile_n: tl.constexpr, tile_k: tl.constexpr,
):  # fmt: skip
    """partial[p] = left^T right over the p-th part of all experts' rows.

    ``part_rows``, which tile_k divides: of a part; an expert's last part may have fewer. Left and
    right are descriptors where the card's copy engine moves their tiles.
    """
    part = tl.program_id(1)
    before = 0  # parts
    begin = 0
    end = 0
    for expert in tl.static_range(experts):
        parts = parts_of(expert, first_E, last_E, part_rows)
        if (part >= before) & (part < before + parts):
            begin = tl.load(first_E + expert) + (part - before) * part_rows
            end = tl.minimum(begin + part_rows, tl.load(last_E + expert))
        before += parts
    if begin < end:
        columns: tl.constexpr = (width_right + tile_n - 1) // tile_n
        first_m = tl.program_id(0) // columns * tile_m
        first_n = tl.program_id(0) % columns * tile_n
        m = first_m + tl.arange(0, tile_m)
        n = first_n + tl.arange(0, tile_n)
        m_ok = m < width_left
        n_ok = n < width_right
        inner = tl.arange(0, tile_k)
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
        place = part.to(tl.int64) * width_left * width_right
        at = place + m[:, None] * width_right + n[None, :]
        tl.store(partial + at, total, mask=m_ok[:, None] & n_ok[None, :])


@triton.jit
def sum_parts(
    partial, out_EN, first_E, last_E, size,
    part_rows: tl.constexpr, experts: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """out[e] = sum of e's parts, in their order."""
    mine = tl.program_id(0)
    before = tl.zeros((), tl.int64)
    parts = 0
    for expert in tl.static_range(experts):
        count = parts_of(expert, first_E, last_E, part_rows)
        before += tl.where(expert < mine, count, 0)
        parts += tl.where(expert == mine, count, 0)
    at = tl.program_id(1) * block + tl.arange(0, block)
    ok = at < size
    total = tl.zeros((block,), tl.float32)
    part = partial + before * size + at
    for _ in range(parts):
        total += tl.load(part, mask=ok, other=0.0)
        part += size
    tl.store(out_EN + mine.to(tl.int64) * size + at, total.to(out_EN.dtype.element_ty), mask=ok)


@triton.jit
def sum_tiles(
    sums, out_EN, first_E, last_E, tile_m: tl.constexpr, width: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    """out[e] = sum of the sums of e's tiles, each of tile_m rows."""
    expert = tl.program_id(0)
    n = tl.program_id(1) * block_n + tl.arange(0, block_n)
    last = tl.load(last_E + expert) // tile_m
    total = tl.zeros((block_n,), tl.float32)
    for first in range(tl.load(first_E + expert) // tile_m, last, block_m):
        m = first + tl.arange(0, block_m)
        ok = (m < last)[:, None] & (n < width)[None, :]
        total += tl.sum(tl.load(sums + m[:, None] * width + n[None, :], mask=ok, other=0.0), axis=0)
    tl.store(out_EN + expert * width + n, total.to(out_EN.dtype.element_ty), mask=n < width)


@triton.jit
def sum_choices(
    y, row_TK, out, tokens, width: tl.constexpr,
    top_k: tl.constexpr, tile_t: tl.constexpr, tile_d: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over t's choices of y[its row]."""
    t = tl.program_id(0) * tile_t + tl.arange(0, tile_t)
    d = tl.program_id(1) * tile_d + tl.arange(0, tile_d)
    t_ok = t < tokens
    ok = t_ok[:, None] & (d < width)[None, :]
    total = tl.zeros((tile_t, tile_d), tl.float32)
    for j in tl.static_range(top_k):
        row = tl.load(row_TK + t * top_k + j, mask=t_ok, other=0).to(tl.int64)
        total += tl.load(y + row[:, None] * width + d[None, :], mask=ok, other=0.0).to(tl.float32)
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
