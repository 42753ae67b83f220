"""Mixture of experts as grouped matrix products: exact, dropless, nothing read by the host.

With the residual and the norm behind it, where the rows of a token are weighed and added.

Every choice of a token becomes a row. Rows are sorted by expert, and each expert's rows begin at a
multiple of the tile height, so that a tile of rows has one expert. How many rows an expert has is
known on the device alone; all shapes are those of the worst case. Gradients are gathers and
segment sums in a fixed order: no atomics, so two runs agree bit for bit.

Letters at the end of a tensor's name are its dimensions:
T tokens, D width, E experts, K experts a token goes through, H hidden width,
S = T x K choices, R rows (S and what fills the tiles up), M tiles of rows.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from xdimo.model.fused import adaln
from xdimo.model.fused import expert_kernels as kernels

TILE = 128  # rows of a tile: each has one expert
CHUNK = 512  # choices that one program sorts
# A weight gradient is summed in parts: one an expert up to so many rows, 5 clips of S/2; then more.
ROWS_OF_ONE_PART = 320 * TILE
PARTS = 3


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
    begin_CE = torch.empty_like(counts_CE)
    first_E, last_E = (counts_CE.new_empty(experts) for _ in range(2))
    expert_M = counts_CE.new_empty(tiles)
    kernels.begin_chunks[(1,)](
        counts_CE, begin_CE, first_E, last_E, expert_M, chunks, tiles,
        experts, padded, triton.next_power_of_2(chunks), TILE, 256,
    )  # fmt: skip
    row_TK = torch.empty(experts_TK.shape, dtype=torch.int32, device=device)
    choice_R = torch.full((tiles * TILE,), choices, dtype=torch.int32, device=device)
    kernels.place_choices[(chunks,)](
        expert_S, begin_CE, row_TK, choice_R, choices, experts, padded, CHUNK
    )  # fmt: skip
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


def _has_copy_engine(device: torch.device) -> bool:
    """sm_90: later cards have one too, but nobody has measured there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _tiles(tensor: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, list(block))


def _can_move(*tensors: Tensor) -> bool:
    """Whether there is a copy engine, and all rows begin where it can."""
    aligned = all(each.shape[-1] * each.element_size() % 16 == 0 for each in tensors)
    return aligned and _has_copy_engine(tensors[0].device)


def _multiply(
    rows: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    choice_R: Tensor,
    expert_M: Tensor,
    *,
    transposed: bool,
    tokens_of: tuple[int, int] | None = None,
    before: Tensor | None = None,
    hidden: Tensor | None = None,
    sums: Tensor | None = None,
) -> Tensor:
    """[R, out]: each row times its expert's weights [E, out, in], or transposed [E, in, out].

    ``tokens_of``: (choices, K) where ``rows`` are tokens [T, in]. ``before``: takes the result,
    which then goes through GELU. ``hidden``: the result is multiplied by GELU's derivative there,
    ``sums`` [M, out] takes the sums of each tile, and ``hidden`` becomes its GELU.
    """
    experts = weights.shape[0]
    width_in, width_out = weights.shape[1:] if transposed else weights.shape[:0:-1]
    out = rows.new_empty(len(choice_R), width_out)
    shape = _shape(rows.device)
    has_gelu = before is not None or hidden is not None
    if has_gelu and rows.is_cuda:
        # Registers for two programs a multiprocessor: one's epilogue hides behind the other.
        shape = {**shape, "num_warps": 8, "maxnreg": 128}
    tile_n, tile_k = shape["tile_n"], shape["tile_k"]
    operands: tuple[Any, ...] = rows, weights, out
    # With GELU nothing is won: docs/performance.md.
    if not has_gelu and tokens_of is None and _can_move(*operands):
        operands = (
            _tiles(rows, TILE, tile_k),
            _tiles(weights.flatten(0, 1), *((tile_k, tile_n) if transposed else (tile_n, tile_k))),
            _tiles(out, TILE, tile_n),
        )
    choices, top_k = tokens_of or (0, 0)
    grid = (len(expert_M) * triton.cdiv(width_out, tile_n),)
    kernels.matmul_rows[grid](
        *operands[:2],
        bias if bias is not None else rows,
        operands[2],
        before if before is not None else hidden if hidden is not None else rows,
        sums if sums is not None else rows,
        choice_R,
        expert_M,
        choices,
        width_in,
        width_out,
        experts,
        gathered_by=top_k,
        transposed=transposed,
        has_bias=bias is not None,
        activates=before is not None,
        derives=hidden is not None,
        fast=rows.dtype == torch.bfloat16,
        tile_m=TILE,
        **shape,
    )
    return out


def _gradient(left: Tensor, right: Tensor, rows: Rows) -> Tensor:
    """left^T right of each expert's rows: [E, left, right]."""
    width_left, width_right, experts = left.shape[1], right.shape[1], len(rows.first_E)
    shape = _gradient_shape(left, wide=width_right > width_left)
    part_rows = _part_rows(len(left), experts)
    parts = len(left) // part_rows + experts  # at most: an expert's last one need not be full
    partial = left.new_empty(parts, width_left, width_right, dtype=torch.float32)
    tiles = triton.cdiv(width_left, shape["tile_m"]) * triton.cdiv(width_right, shape["tile_n"])
    operands: tuple[Any, Any] = left, right
    if _can_move(left, right):
        tile_k = shape["tile_k"]
        operands = _tiles(left, tile_k, shape["tile_m"]), _tiles(right, tile_k, shape["tile_n"])
    kernels.weight_gradient[(tiles, parts)](
        *operands,
        partial,
        rows.first_E,
        rows.last_E,
        width_left,
        width_right,
        experts,
        part_rows,
        **shape,
    )
    out = left.new_empty(experts, width_left, width_right)
    size, block = width_left * width_right, 1024
    kernels.sum_parts[(experts, triton.cdiv(size, block))](
        partial, out, rows.first_E, rows.last_E, size, part_rows, experts, block
    )
    return out


def _part_rows(rows: int, experts: int) -> int:
    """Rows of a partial sum: about an expert's average share, or a third of it beyond
    ROWS_OF_ONE_PART. Shares are uneven, and the largest would be waited for.
    """
    parts = experts * (PARTS if rows > ROWS_OF_ONE_PART else 1)
    return triton.cdiv(triton.cdiv(rows, parts), TILE) * TILE


def _gradient_shape(left: Tensor, wide: bool) -> dict[str, int]:
    """``wide``: right is the longer side."""
    device = left.device
    if _has_copy_engine(device) and left.element_size() == 2:  # four stages fill its shared memory
        tile_m, tile_n = (128, 256) if wide else (256, 128)
        return {"tile_m": tile_m, "tile_n": tile_n, "tile_k": 64, "num_warps": 8, "num_stages": 4}
    return {"tile_m": 128 if device.type == "cuda" else 64, **_shape(device)}


def _by_expert(sums: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """Sums of tiles [n, width], however high a tile, -> of experts [E, width]."""
    width, experts = sums.shape[1], len(rows.first_E)
    out = sums.new_empty(experts, width, dtype=dtype)
    height = len(rows.choice_R) // len(sums)
    grid = (experts, triton.cdiv(width, 32))
    kernels.sum_tiles[grid](sums, out, rows.first_E, rows.last_E, height, width, 64, 32)
    return out


@torch.library.custom_op("xdimo::experts", mutates_args=())
def _experts(
    x: Tensor,
    h_TD: Tensor,
    weight_TK: Tensor,
    up_EHD: Tensor,
    up_bias_EH: Tensor,
    down_EDH: Tensor,
    down_bias_ED: Tensor,
    gate: Tensor,
    table: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    choice_R: Tensor,
    row_TK: Tensor,
    expert_M: Tensor,
    first_E: Tensor,
    last_E: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x' and the next h, and what the backward pass needs, a row a choice."""
    tokens, top_k = row_TK.shape
    z_RH = h_TD.new_empty(len(choice_R), up_EHD.shape[1])
    a_RH = _multiply(
        h_TD,
        up_EHD,
        up_bias_EH,
        choice_R,
        expert_M,
        transposed=False,
        tokens_of=(tokens * top_k, top_k),
        before=z_RH,
    )
    y_RD = _multiply(a_RH, down_EDH, down_bias_ED, choice_R, expert_M, transposed=False)
    branch = adaln.Choices(y_RD, weight_TK, row_TK)
    return *adaln.forward(x, branch, gate, table, shift, scale), y_RD, z_RH


def _experts_backward(
    grad_TD: Tensor,
    h_TD: Tensor,
    weight_TK: Tensor,
    up_EHD: Tensor,
    down_EDH: Tensor,
    y_RD: Tensor,
    z_RH: Tensor,
    rows: Rows,
) -> tuple[Tensor, ...]:
    """Gradients of h, the weights of the choices, up, its bias, down, its bias. Uses up z."""
    choices, top_k, width = rows.row_TK.numel(), rows.row_TK.shape[1], h_TD.shape[1]
    grad_y = torch.empty_like(y_RD)
    grad_weight = torch.empty_like(weight_TK)
    tile_d = min(128, triton.next_power_of_2(width))
    spread = (len(y_RD) // 32,)
    sums_D = grad_y.new_empty(*spread, width, dtype=torch.float32)
    kernels.spread[spread](
        grad_TD, y_RD, weight_TK, rows.choice_R, grad_y, grad_weight, sums_D,
        choices, width, top_k, 32, tile_d,
    )  # fmt: skip
    sums_H = grad_y.new_empty(len(rows.expert_M), z_RH.shape[1], dtype=torch.float32)
    places = rows.choice_R, rows.expert_M
    grad_z = _multiply(grad_y, down_EDH, None, *places, transposed=True, hidden=z_RH, sums=sums_H)
    down = _gradient(grad_y, z_RH, rows)  # GELU(z) by now
    # Gathered once: the product reads each row several times. Rows that fill up have no gradient.
    token_R = (rows.choice_R // top_k).clamp_(max=len(h_TD) - 1)
    up = _gradient(grad_z, h_TD.index_select(0, token_R), rows)
    grad_rows = _multiply(grad_z, up_EHD, None, *places, transposed=True)
    up_bias, down_bias = (_by_expert(sums, rows, h_TD.dtype) for sums in (sums_H, sums_D))
    return _sum_choices(grad_rows, rows.row_TK), grad_weight, up, up_bias, down, down_bias


def _sum_choices(y_RD: Tensor, row_TK: Tensor) -> Tensor:
    """[T, D]: over each token's choices."""
    (tokens, top_k), width = row_TK.shape, y_RD.shape[1]
    out = y_RD.new_empty(tokens, width)
    tile_d = min(128, triton.next_power_of_2(width))
    grid = (triton.cdiv(tokens, 32), triton.cdiv(width, tile_d))
    kernels.sum_choices[grid](y_RD, row_TK, out, tokens, width, top_k, 32, tile_d)
    return out


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, h, weight, up, _, down, _, gate, _, _, scale, *indices = inputs
    out, _, y, z = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(out, h, weight, up, down, y, z, gate, scale, *indices)


def _backward(ctx, grad_out, grad_h, *unused):  # type: ignore[no-untyped-def]
    out, h, weight, up, down, y, z, gate, scale, *indices = ctx.saved_tensors
    rows = Rows(*indices)
    if grad_h is None:
        grad_h = torch.zeros_like(out, dtype=h.dtype)
    branch = adaln.Choices(y, weight, rows.row_TK)
    grad_x, grad_branch, sums = adaln.backward(grad_out, grad_h, out, branch, gate, scale)
    inner = _experts_backward(grad_branch.flatten(0, 1), h, weight, up, down, y, z, rows)
    shifts, scales, gates = sums.to(scale.dtype).unbind(1)
    return grad_x, *inner, gates, None, shifts, scales, *[None] * 5


_experts.register_autograd(_backward, setup_context=_save)


class Weights(NamedTuple):
    """Of all experts, contiguous, in one type."""

    up_EHD: Tensor
    up_bias_EH: Tensor
    down_EDH: Tensor
    down_bias_ED: Tensor


def mixture_residual_norm(
    x: Tensor,
    h: Tensor,
    weight_TK: Tensor,
    experts_TK: Tensor,
    weights: Weights,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """xdimo.model.fused.adaln.residual_norm with the mixture of h [b, n, d] as its branch.

    ``weight_TK`` in float32; h in the weights' type. The backward pass overwrites what it saved:
    it runs once.
    """
    rows = sort_rows(experts_TK, len(weights.up_EHD))
    h_TD = h.flatten(0, 1)
    return _experts(x, h_TD, weight_TK, *weights, gate, table, shift, scale, *rows)[:2]
