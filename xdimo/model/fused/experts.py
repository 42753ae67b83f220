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
from torch import Tensor

from xdimo.model.fused import expert_kernels as kernels

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


@torch.library.custom_op("xdimo::sort_rows", mutates_args=())
def _sort_rows(experts_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    choices, device = experts_TK.numel(), experts_TK.device
    tiles = triton.cdiv(choices, TILE) + experts  # every expert may leave one tile unfilled
    padded, chunks = triton.next_power_of_2(experts), triton.cdiv(choices, CHUNK)
    expert_S = experts_TK.reshape(-1)
    counts_CE = torch.empty(chunks, experts, dtype=torch.int32, device=device)
    kernels.count_choices[(chunks,)](expert_S, counts_CE, choices, experts, padded, CHUNK)
    seen_CE = counts_CE.cumsum(0, dtype=torch.int32)
    rows_E = (seen_CE[-1] + (TILE - 1)) // TILE * TILE
    last_E = rows_E.cumsum(0, dtype=torch.int32)
    first_E = last_E - rows_E
    begin_CE = seen_CE - counts_CE + first_E
    row_TK = torch.empty(experts_TK.shape, dtype=torch.int32, device=device)
    choice_R = torch.full((tiles * TILE,), choices, dtype=torch.int32, device=device)
    kernels.place_choices[(chunks,)](
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
    kernels.matmul_rows[grid](
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
    kernels.weight_gradient[(tiles, experts, splits)](
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
    kernels.combine[grid](y_RD, weight, row_TK, out, tokens, width, top_k, weighs, 32, tile_d)
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
    kernels.spread[spread](
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
