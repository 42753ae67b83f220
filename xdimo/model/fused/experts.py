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
from xdimo.model.fused.routing import TILE, Rows, route, sort_rows
from xdimo.model.fused.storage import Stack


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
    ``sums`` [M, out and more] takes the sums of each tile, and ``hidden`` becomes its GELU.
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
        sums.shape[1] if sums is not None else 0,
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


def _gradient(left: Tensor, right: Tensor, rows: Rows, out: Tensor) -> None:
    """out [E, left, right] = left^T right of each expert's rows."""
    width_left, width_right, experts = left.shape[1], right.shape[1], len(rows.first_E)
    shape = _gradient_shape(left, wide=width_right > width_left)
    tiles = triton.cdiv(width_left, shape["tile_m"]) * triton.cdiv(width_right, shape["tile_n"])
    parts = _parts(left.device, tiles)
    part_rows = triton.cdiv(triton.cdiv(len(left), parts), TILE) * TILE
    partial = left.new_empty(parts + experts, width_left, width_right, dtype=torch.float32)
    operands: tuple[Any, Any] = left, right
    if _can_move(left, right):
        tile_k = shape["tile_k"]
        operands = _tiles(left, tile_k, shape["tile_m"]), _tiles(right, tile_k, shape["tile_n"])
    kernels.weight_gradient[(tiles, parts)](
        *operands,
        partial,
        rows.first_E,
        rows.last_E,
        part_rows,
        width_left,
        width_right,
        experts,
        **shape,
    )
    size, block = width_left * width_right, 1024
    kernels.sum_parts[(experts, triton.cdiv(size, block))](
        partial, out, rows.first_E, rows.last_E, size, part_rows, block
    )


def _parts(device: torch.device, tiles: int) -> int:
    """In how many equal parts the rows are multiplied, ``tiles`` programs each."""
    if device.type == "cpu":
        return 3
    return even_parts(tiles, torch.cuda.get_device_properties(device).multi_processor_count)


def even_parts(tiles: int, multiprocessors: int) -> int:
    """Up to 8, so that the multiprocessors idle least while the last programs run."""

    def busy(parts: int) -> float:
        rounds = triton.cdiv(tiles * parts, multiprocessors)
        return tiles * parts / (rounds * multiprocessors)

    return max(range(1, 9), key=busy)


def _gradient_shape(left: Tensor, wide: bool) -> dict[str, int]:
    """``wide``: right is the longer side."""
    device = left.device
    if _has_copy_engine(device) and left.element_size() == 2:  # four stages fill its shared memory
        tile_m, tile_n = (128, 256) if wide else (256, 128)
        return {"tile_m": tile_m, "tile_n": tile_n, "tile_k": 64, "num_warps": 8, "num_stages": 4}
    return {"tile_m": 128 if device.type == "cuda" else 64, **_shape(device)}


class Weights(NamedTuple):
    """Of all experts, contiguous, in one type."""

    up_EHD: Stack
    up_bias_EH: Stack
    down_EDH: Stack
    down_bias_ED: Stack


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        h: Tensor,
        logits: Tensor | None,
        router: Stack | None,
        top_k: int,
        weights: Weights,
        gate: Tensor,
        shift: Tensor,
        scale: Tensor,
        table: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        up_EHD, up_bias_EH, down_EDH, down_bias_ED = (stack.value for stack in weights)
        weight_TK, expert_TK = route(h if logits is None else logits, top_k, router)
        rows = sort_rows(expert_TK, len(up_EHD))
        z_RH = h.new_empty(len(rows.choice_R), up_EHD.shape[1])
        places = rows.choice_R, rows.expert_M
        tokens_of = rows.row_TK.numel(), top_k
        a_RH = _multiply(
            h.flatten(0, 1), up_EHD, up_bias_EH, *places,
            transposed=False, tokens_of=tokens_of, before=z_RH,
        )  # fmt: skip
        y_RD = _multiply(a_RH, down_EDH, down_bias_ED, *places, transposed=False)
        branch = _branch(y_RD, weight_TK, rows)
        out, next_h = adaln.forward(x, branch, gate, table, shift, scale)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, h, y_RD, z_RH, gate, scale, logits, weight_TK, expert_TK, *rows)
        ctx.router, ctx.weights = router, weights
        return out, next_h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        out, h, y_RD, z_RH, gate, scale, logits, weight_TK, expert_TK, *places = ctx.saved_tensors
        rows, weights, router = Rows(*places), ctx.weights, ctx.router
        branch = _branch(y_RD, weight_TK, rows)
        found = adaln.backward(*grads, out, branch, gate, scale, tile_rows=TILE)
        chosen = found.logit_TK, expert_TK
        grad_h = _experts_backward(found.branch, h, z_RH, chosen, router, weights, rows)
        grad_logits = None
        if logits is not None:
            grad_TE = torch.zeros_like(logits).view(-1, logits.shape[-1])
            grad_TE.scatter_(1, expert_TK.long(), found.logit_TK.to(logits.dtype))
            grad_logits = grad_TE.view_as(logits)
        stacks = [*weights, *([router] if router else [])]
        of_weights = [grad for stack in stacks for grad in stack.grads()]
        of_norm = found.gate, found.shift, found.scale, None
        return found.x, grad_h, grad_logits, None, None, None, *of_norm, *of_weights


def _branch(y_RD: Tensor, weight_TK: Tensor, rows: Rows) -> adaln.Choices:
    return adaln.Choices(y_RD, weight_TK, rows.row_TK, rows.choice_R, rows.first_E, rows.last_E)


def _experts_backward(
    grad_y: Tensor,
    h: Tensor,
    z_RH: Tensor,
    chosen: tuple[Tensor, Tensor],
    router: Stack | None,
    weights: Weights,
    rows: Rows,
) -> Tensor:
    """The gradient of h; those of the weights go where these are. Uses up z.

    ``chosen``: the gradients of the choices' logits, and their experts.
    """
    up, up_bias, down, down_bias = weights
    (tokens, top_k), width, inside = rows.row_TK.shape, h.shape[-1], z_RH.shape[1]
    experts, tiles, places = len(rows.first_E), len(rows.expert_M), (rows.choice_R, rows.expert_M)
    sums = grad_y.new_empty(tiles, inside + 2 * width, dtype=torch.float32)
    grad_z = _multiply(grad_y, down.value, None, *places, transposed=True, hidden=z_RH, sums=sums)
    _gradient(grad_y, z_RH, rows, down.grad)  # GELU(z) by now
    # Gathered once: the product reads each row several times.
    h_RD = torch.empty_like(grad_y)
    tile_d = min(64, triton.next_power_of_2(width))
    kernels.gather_choices[(tiles, triton.cdiv(width, tile_d))](
        h, grad_y, chosen[0], *places, h_RD, sums, tokens * top_k,
        inside, width, experts, top_k, router is not None, TILE, tile_d,
    )  # fmt: skip
    _gradient(grad_z, h_RD, rows, up.grad)
    kernels.sum_tiles[(experts, triton.cdiv(sums.shape[1], 32))](
        sums, up_bias.grad, down_bias.grad, router.grad if router else sums,
        rows.first_E, rows.last_E, inside, width, router is not None, TILE, 64, 32,
    )  # fmt: skip
    grad_rows = _multiply(grad_z, up.value, None, *places, transposed=True)
    grad_h = torch.empty_like(h)
    tile_d = min(128, triton.next_power_of_2(width))
    kernels.sum_choices[(triton.cdiv(tokens, 16), triton.cdiv(width, tile_d))](
        grad_rows, rows.row_TK, *chosen, router.value if router else h, grad_h, tokens,
        width, top_k, router is not None, 16, tile_d,
    )  # fmt: skip
    return grad_h


def mixture_residual_norm(
    x: Tensor,
    h: Tensor,
    chooser: Tensor | Stack,
    top_k: int,
    weights: Weights,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """xdimo.model.fused.adaln.residual_norm with the mixture of h [b, n, d] as its branch.

    ``chooser``: the router's weights [e, d], or the logits [b, n, e] of any other; h in the
    weights' type. The backward pass overwrites what it saved: it runs once.
    """
    given = isinstance(chooser, Tensor)
    logits, router = (chooser, None) if given else (None, chooser)
    stacks = [*weights, *([] if given else [chooser])]
    parameters = [parameter for stack in stacks for parameter in stack.parameters]
    found: tuple[Tensor, Tensor] = _Mixture.apply(
        x, h, logits, router, top_k, weights, gate, shift, scale, table, *parameters
    )
    return found
