"""Which experts each token goes through, and the row of each choice: sorted by expert.

Letters at the end of a tensor's name are its dimensions, as xdimo.model.fused.experts has them;
C are chunks of choices.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xdimo.model.fused.storage import Stack

TILE = 128  # rows of a tile: each has one expert
CHUNK = 512  # choices that one program sorts


@triton.jit
def route_choices(
    logits_TE, h_TD, router_ED, weight_TK, expert_TK, tokens,
    width: tl.constexpr,  # 0 where the logits are there; else they are h router
    experts: tl.constexpr, padded: tl.constexpr, top_k: tl.constexpr,
    tile_t: tl.constexpr, tile_d: tl.constexpr,
):  # fmt: skip
    """Each token's K experts of the highest logits, the lowest of equals first; softmax of those.

    An expert's place is the number of those before it. NaN is the highest, so that it is seen.
    """
    t = tl.program_id(0) * tile_t + tl.arange(0, tile_t)
    t_ok = (t < tokens)[:, None]
    index = tl.arange(0, padded)
    index_ok = (index < experts)[None, :]
    if width > 0:
        logits = tl.zeros((tile_t, padded), tl.float32)
        for first in range(0, width, tile_d):
            d = first + tl.arange(0, tile_d)
            d_ok = d < width
            place = h_TD + t.to(tl.int64)[:, None] * width + d[None, :]
            h = tl.load(place, mask=t_ok & d_ok[None, :], other=0.0)
            place = router_ED + index[None, :] * width + d[:, None]
            w = tl.load(place, mask=index_ok & d_ok[:, None], other=0.0)
            logits = tl.dot(h, w, logits, input_precision="ieee")
    else:
        place = logits_TE + t.to(tl.int64)[:, None] * experts + index[None, :]
        logits = tl.load(place, mask=t_ok & index_ok, other=0.0).to(tl.float32)
    rank = tl.where(logits == logits, logits, float("inf"))
    place = tl.zeros((tile_t, padded), tl.int32)
    for expert in tl.static_range(experts):
        other = tl.sum(tl.where((index == expert)[None, :], rank, 0.0), axis=1)[:, None]
        before = (other > rank) | ((other == rank) & (expert < index)[None, :])
        place += before.to(tl.int32)
    chosen = t_ok & index_ok & (place < top_k)
    highest = tl.max(tl.where(chosen, rank, float("-inf")), axis=1)
    weight = tl.where(chosen, tl.exp(logits - highest[:, None]), 0.0)
    weight /= tl.sum(weight, axis=1)[:, None]
    to = t.to(tl.int64)[:, None] * top_k + place
    tl.store(weight_TK + to, weight, mask=chosen)
    tl.store(expert_TK + to, index[None, :] + tl.zeros_like(place), mask=chosen)


@triton.jit
def count_choices(
    expert_S, counts_CE, choice_R, choices, rows,
    experts: tl.constexpr, padded: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """How many of a chunk of choices each expert has; and no row has a choice yet."""
    choice = tl.program_id(0) * chunk + tl.arange(0, chunk)
    expert = tl.load(expert_S + choice, mask=choice < choices, other=experts)
    index = tl.arange(0, padded)
    mine = (expert[:, None] == index[None, :]).to(tl.int32)
    place = counts_CE + tl.program_id(0) * experts + index
    tl.store(place, tl.sum(mine, axis=0), mask=index < experts)
    for row in range(tl.program_id(0) * chunk, rows, tl.num_programs(0) * chunk):
        at = row + tl.arange(0, chunk)
        tl.store(choice_R + at, choices + tl.zeros_like(at), mask=at < rows)


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


class Rows(NamedTuple):
    """Where each choice of each token went."""

    choice_R: Tensor  # int32: token x K + choice; S where a row only fills up its tile
    row_TK: Tensor  # int32
    expert_M: Tensor  # int32: of each tile; E where no row is in it
    first_E: Tensor  # int32: first row of each expert
    last_E: Tensor  # int32: one past its last, filled-up row


def route(source: Tensor, k: int, router: Stack | None = None) -> tuple[Tensor, Tensor]:
    """Weights (float32) and experts (int32) [T, K], as xdimo.model.moe.route.

    ``source``: the logits [..., E]; with a router h [..., D], of which it makes them, in float32.
    """
    experts = len(router.value) if router else source.shape[-1]
    width = source.shape[-1] if router else 0
    tokens = source.numel() // (width or experts)
    weight_TK = source.new_empty(tokens, k, dtype=torch.float32)
    expert_TK = source.new_empty(tokens, k, dtype=torch.int32)
    padded, tile_t = max(16, triton.next_power_of_2(experts)), 64  # 16: of a product
    route_choices[(triton.cdiv(tokens, tile_t),)](
        source.contiguous(), source, router.value if router else source, weight_TK, expert_TK,
        tokens, width, experts, padded, k, tile_t, 64,
    )  # fmt: skip
    return weight_TK, expert_TK


def sort_rows(experts_TK: Tensor, experts: int) -> Rows:
    """Rows in the order of their experts, and of tokens within one. Any T, empty experts too.

    ``experts_TK``: integers, contiguous.
    """
    choices, device = experts_TK.numel(), experts_TK.device
    tiles = triton.cdiv(choices, TILE) + experts  # every expert may leave one tile unfilled
    padded, chunks = triton.next_power_of_2(experts), triton.cdiv(choices, CHUNK)
    expert_S = experts_TK.reshape(-1)
    counts_CE = torch.empty(chunks, experts, dtype=torch.int32, device=device)
    choice_R = counts_CE.new_empty(tiles * TILE)
    count_choices[(chunks,)](
        expert_S, counts_CE, choice_R, choices, len(choice_R), experts, padded, CHUNK
    )  # fmt: skip
    begin_CE = torch.empty_like(counts_CE)
    first_E, last_E = (counts_CE.new_empty(experts) for _ in range(2))
    expert_M = counts_CE.new_empty(tiles)
    begin_chunks[(1,)](
        counts_CE, begin_CE, first_E, last_E, expert_M, chunks, tiles,
        experts, padded, triton.next_power_of_2(chunks), TILE, 256,
    )  # fmt: skip
    row_TK = torch.empty(experts_TK.shape, dtype=torch.int32, device=device)
    place_choices[(chunks,)](
        expert_S, begin_CE, row_TK, choice_R, choices, experts, padded, CHUNK
    )  # fmt: skip
    return Rows(choice_R, row_TK, expert_M, first_E, last_E)
