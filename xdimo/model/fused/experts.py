"""Mixture of experts as grouped matrix products: exact, dropless, nothing read by the host.

Every choice of a token becomes a row. Rows are sorted by expert, and each expert's rows begin at a
multiple of the tile height, so that a tile of rows has one expert. How many rows an expert has is
known on the device alone; all shapes are those of the worst case. Gradients are gathers and
segment sums in a fixed order: no atomics, so two runs agree bit for bit.

Letters at the end of a tensor's name are its dimensions:
T tokens, D width, E experts, K experts a token goes through, H hidden width,
S = T x K choices, R rows (S and what fills the tiles up), M tiles of rows.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 128  # rows of a tile: each has one expert
CHUNK = 512  # choices that one program sorts
SPLITS = 8  # partial sums of a weight gradient, added in order


class Rows(NamedTuple):
    """Where each choice of each token went."""

    choice_R: Tensor  # int32: token x K + choice; S where a row only fills up its tile
    row_TK: Tensor  # int32
    expert_M: Tensor  # int32: of each tile; E where no row is in it
    first_E: Tensor  # int32: first row of each expert
    last_E: Tensor  # int32: one past its last, filled-up row


@triton.jit
def _count(
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
def _place(
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


@torch.library.custom_op("xdimo::sort_rows", mutates_args=())
def _sort_rows(experts_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    choices, device = experts_TK.numel(), experts_TK.device
    tiles = triton.cdiv(choices, TILE) + experts  # every expert may leave one tile unfilled
    padded, chunks = triton.next_power_of_2(experts), triton.cdiv(choices, CHUNK)
    expert_S = experts_TK.reshape(-1)
    counts_CE = torch.empty(chunks, experts, dtype=torch.int32, device=device)
    _count[(chunks,)](expert_S, counts_CE, choices, experts, padded, CHUNK)
    seen_CE = counts_CE.cumsum(0, dtype=torch.int32)
    rows_E = (seen_CE[-1] + (TILE - 1)) // TILE * TILE
    last_E = rows_E.cumsum(0, dtype=torch.int32)
    first_E = last_E - rows_E
    begin_CE = seen_CE - counts_CE + first_E
    row_TK = torch.empty(experts_TK.shape, dtype=torch.int32, device=device)
    choice_R = torch.full((tiles * TILE,), choices, dtype=torch.int32, device=device)
    _place[(chunks,)](
        expert_S, begin_CE, row_TK, choice_R, choices, experts, padded, CHUNK
    )  # fmt: skip
    tile_M = torch.arange(0, tiles * TILE, TILE, dtype=torch.int32, device=device)
    expert_M = torch.searchsorted(last_E, tile_M, right=True, out_int32=True)
    return choice_R, row_TK, expert_M, first_E, last_E


@_sort_rows.register_fake
def _(experts_TK, experts):  # type: ignore[no-untyped-def]
    tiles = triton.cdiv(experts_TK.numel(), TILE) + experts
    sizes = ((tiles * TILE,), experts_TK.shape, (tiles,), (experts,), (experts,))
    return tuple(experts_TK.new_empty(size, dtype=torch.int32) for size in sizes)


def sort_rows(experts_TK: Tensor, experts: int) -> Rows:
    """Rows in the order of their experts, and of tokens within one. Any T, empty experts too.

    ``experts_TK``: integers, contiguous.
    """
    return Rows(*_sort_rows(experts_TK, experts))


@triton.jit
def _sigmoid_of_gelu(z, fast: tl.constexpr):
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
def _matmul_rows(
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
            s = _sigmoid_of_gelu(total, fast)
            tl.store(activated + at, (total * s).to(activated.dtype.element_ty), mask=ok)
        if derives:
            z = tl.load(hidden + at, mask=ok, other=0.0).to(tl.float32)
            s = _sigmoid_of_gelu(z, fast)
            slope = 1.5957691216057308 * (1.0 + 0.134145 * z * z)
            total *= s + z * s * (1.0 - s) * slope
            place = sums + tile * width_out + column
            tl.store(place, tl.sum(total, axis=0), mask=column_ok)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=ok)


@triton.jit
def _weight_gradient(
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
def _combine(
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
def _spread(
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


def _shape(device: torch.device) -> dict[str, int]:
    """Tile and pipeline that fit the card's shared memory (99 KiB on sm_89 and sm_120)."""
    if device.type == "cpu":  # Triton's interpreter
        return {"tile_n": 64, "tile_k": 32, "num_warps": 4, "num_stages": 1}
    if torch.cuda.get_device_capability(device)[0] in (8, 9, 10) and _roomy(device):
        return {"tile_n": 128, "tile_k": 64, "num_warps": 4, "num_stages": 3}
    return {"tile_n": 128, "tile_k": 32, "num_warps": 8, "num_stages": 3}


def _roomy(device: torch.device) -> bool:
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin >= 160 * 1024


def _multiply(
    rows: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    choice_R: Tensor,
    expert_M: Tensor,
    *,
    transposed: bool,
    tokens_of: tuple[int, int] | None = None,
    activated: Tensor | None = None,
    hidden: Tensor | None = None,
    sums: Tensor | None = None,
) -> Tensor:
    """[R, out]: each row times its expert's weights [E, out, in], or transposed [E, in, out].

    ``tokens_of``: (choices, K) where ``rows`` are tokens [T, in]. ``activated``: takes the GELU of
    the result. ``hidden``: the result is multiplied by the GELU's derivative there, and ``sums``
    [M, out] takes the sums of each tile.
    """
    experts = weights.shape[0]
    width_in, width_out = weights.shape[1:] if transposed else weights.shape[:0:-1]
    out = rows.new_empty(len(choice_R), width_out)
    shape = _shape(rows.device)
    choices, top_k = tokens_of or (0, 0)
    grid = (len(expert_M) * triton.cdiv(width_out, shape["tile_n"]),)
    _matmul_rows[grid](
        rows,
        weights,
        bias if bias is not None else rows,
        hidden if hidden is not None else rows,
        out,
        activated if activated is not None else rows,
        sums if sums is not None else rows,
        choice_R,
        expert_M,
        choices,
        width_in,
        width_out,
        experts,
        gathered_by=top_k,
        stride_in=width_out if transposed else 1,
        stride_out=1 if transposed else width_in,
        has_bias=bias is not None,
        activates=activated is not None,
        derives=hidden is not None,
        fast=rows.dtype == torch.bfloat16,
        tile_m=TILE,
        **shape,
    )
    return out


def _gradient(left: Tensor, right: Tensor, rows: Rows) -> Tensor:
    """left^T right of each expert's rows: [E, left, right]."""
    width_left, width_right, experts = left.shape[1], right.shape[1], len(rows.first_E)
    splits = SPLITS if len(left) > 256 * TILE else 1
    # One part is the result itself; several are added in float32.
    dtype = torch.float32 if splits > 1 else left.dtype
    partial = left.new_empty(splits, experts, width_left, width_right, dtype=dtype)
    shape = _gradient_shape(left.device)
    tiles = triton.cdiv(width_left, shape["tile_m"]) * triton.cdiv(width_right, shape["tile_n"])
    _weight_gradient[(tiles, experts, splits)](
        left,
        right,
        partial,
        rows.first_E,
        rows.last_E,
        width_left,
        width_right,
        experts,
        splits=splits,
        **shape,
    )
    return partial.sum(0, dtype=torch.float32).to(left.dtype) if splits > 1 else partial[0]


def _gradient_shape(device: torch.device) -> dict[str, int]:
    return {"tile_m": 128 if device.type == "cuda" else 64, **_shape(device)}


def _by_expert(sums: Tensor, expert_M: Tensor, experts: int) -> Tensor:
    """Sums of tiles [n x M, width] -> of experts [E, width], float32."""
    expert = expert_M.repeat_interleave(len(sums) // len(expert_M))
    mine = expert[None, :] == torch.arange(experts, device=expert.device)[:, None]
    # Tiles that no expert has hold whatever was in memory.
    return mine.float() @ torch.where(expert[:, None] < experts, sums, 0.0)


@torch.library.custom_op("xdimo::experts", mutates_args=())
def experts_forward(
    x_TD: Tensor,
    weight_TK: Tensor,
    up_EHD: Tensor,
    up_bias_EH: Tensor,
    down_EDH: Tensor,
    down_bias_ED: Tensor,
    choice_R: Tensor,
    row_TK: Tensor,
    expert_M: Tensor,
    first_E: Tensor,
    last_E: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mixture's output [T, D], and what the backward pass needs of it, a row a choice."""
    tokens, top_k = row_TK.shape
    a_RH = x_TD.new_empty(len(choice_R), up_EHD.shape[1])
    z_RH = _multiply(
        x_TD,
        up_EHD,
        up_bias_EH,
        choice_R,
        expert_M,
        transposed=False,
        tokens_of=(tokens * top_k, top_k),
        activated=a_RH,
    )
    y_RD = _multiply(a_RH, down_EDH, down_bias_ED, choice_R, expert_M, transposed=False)
    return _sum_choices(y_RD, row_TK, weight_TK), y_RD, z_RH, a_RH


def _sum_choices(y_RD: Tensor, row_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
    """[T, D]: over each token's choices."""
    (tokens, top_k), width = row_TK.shape, y_RD.shape[1]
    out = y_RD.new_empty(tokens, width)
    tile_d = min(128, triton.next_power_of_2(width))
    grid = (triton.cdiv(tokens, 32), triton.cdiv(width, tile_d))
    weight = weight_TK if weight_TK is not None else row_TK
    weighs = weight_TK is not None
    _combine[grid](y_RD, weight, row_TK, out, tokens, width, top_k, weighs, 32, tile_d)
    return out


@experts_forward.register_fake
def _(x_TD, weight_TK, up_EHD, up_bias_EH, down_EDH, down_bias_ED, choice_R, *indices):  # type: ignore[no-untyped-def]
    rows, hidden = choice_R.shape[0], up_EHD.shape[1]
    y_RD, z_RH = x_TD.new_empty(rows, x_TD.shape[1]), x_TD.new_empty(rows, hidden)
    return torch.empty_like(x_TD), y_RD, z_RH, torch.empty_like(z_RH)


@torch.library.custom_op("xdimo::experts_backward", mutates_args=())
def experts_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    weight_TK: Tensor,
    up_EHD: Tensor,
    down_EDH: Tensor,
    y_RD: Tensor,
    z_RH: Tensor,
    a_RH: Tensor,
    choice_R: Tensor,
    row_TK: Tensor,
    expert_M: Tensor,
    first_E: Tensor,
    last_E: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, the weights of the choices, up, its bias, down, its bias."""
    rows = Rows(choice_R, row_TK, expert_M, first_E, last_E)
    choices, top_k, width = row_TK.numel(), row_TK.shape[1], x_TD.shape[1]
    grad_y = torch.empty_like(y_RD)
    grad_weight = torch.empty_like(weight_TK)
    tile_d = min(128, triton.next_power_of_2(width))
    spread = (len(choice_R) // 32,)
    sums_D = grad_y.new_empty(*spread, width, dtype=torch.float32)
    _spread[spread](
        grad_TD, y_RD, weight_TK, choice_R, grad_y, grad_weight, sums_D,
        choices, width, top_k, 32, tile_d,
    )  # fmt: skip
    down = _gradient(grad_y, a_RH, rows)
    sums_H = grad_y.new_empty(len(expert_M), z_RH.shape[1], dtype=torch.float32)
    grad_z = _multiply(
        grad_y, down_EDH, None, choice_R, expert_M, transposed=True, hidden=z_RH, sums=sums_H
    )
    # Gathered once: the product reads each row several times. Rows that fill up have no gradient.
    token_R = (choice_R // top_k).clamp_(max=len(x_TD) - 1)
    up = _gradient(grad_z, x_TD.index_select(0, token_R), rows)
    grad_rows = _multiply(grad_z, up_EHD, None, choice_R, expert_M, transposed=True)
    up_bias, down_bias = (
        _by_expert(sums, expert_M, len(first_E)).to(x_TD.dtype) for sums in (sums_H, sums_D)
    )
    grad_x = _sum_choices(grad_rows, row_TK, None)
    return grad_x, grad_weight, up, up_bias, down, down_bias


@experts_backward.register_fake
def _(grad_TD, x_TD, weight_TK, up_EHD, down_EDH, *saved):  # type: ignore[no-untyped-def]
    empty = torch.empty_like
    up_bias, down_bias = up_EHD.new_empty(up_EHD.shape[:2]), down_EDH.new_empty(down_EDH.shape[:2])
    return empty(x_TD), empty(weight_TK), empty(up_EHD), up_bias, empty(down_EDH), down_bias


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x_TD, weight_TK, up_EHD, _, down_EDH, _, *indices = inputs
    _, y_RD, z_RH, a_RH = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_TD, weight_TK, up_EHD, down_EDH, y_RD, z_RH, a_RH, *indices)


def _backward(ctx, grad_TD, *unused):  # type: ignore[no-untyped-def]
    gradients = experts_backward(grad_TD.contiguous(), *ctx.saved_tensors)
    return *gradients, *[None] * 5


experts_forward.register_autograd(_backward, setup_context=_save)


def mixture(
    x_TD: Tensor,
    weight_TK: Tensor,
    experts_TK: Tensor,
    up_EHD: Tensor,
    up_bias_EH: Tensor,
    down_EDH: Tensor,
    down_bias_ED: Tensor,
) -> Tensor:
    """Sum over each token's experts of weight x expert(token): [T, D], in x's type.

    ``weight_TK``: float32. Weights and biases in x's type, contiguous.
    """
    rows = sort_rows(experts_TK, len(up_EHD))
    return experts_forward(x_TD, weight_TK, up_EHD, up_bias_EH, down_EDH, down_bias_ED, *rows)[0]
