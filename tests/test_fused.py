"""The parts of the fused network; the whole and its mixture: test_implementations.py.

On a machine without a GPU the kernels run in Triton's interpreter, in float32.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="torch comes without Triton on this system")

from xdimo.model import latte, moe
from xdimo.model.fused import experts as fused_experts
from xdimo.model.fused.adaln import norm, residual_norm
from xdimo.model.fused.experts import route
from xdimo.model.fused.spatial import spatial_attention
from xdimo.model.fused.temporal import temporal_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def relative(found: Tensor, wanted: Tensor) -> float:
    error = (found.double() - wanted.double()).norm()
    return float((error / wanted.double().norm().clamp(min=1e-30)).detach())


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6).flatmap(lambda e: st.tuples(st.just(e), st.integers(1, e))),
    st.integers(1, 40),
    st.integers(0, 10_000),
    st.booleans(),
)
def test_route_is_the_references(
    shape: tuple[int, int], tokens: int, seed: int, ties: bool
) -> None:
    experts, k = shape
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    logits = logits.round() if ties else logits
    weights, chosen = (found.cpu() for found in route(logits.to(DEVICE), k))
    wanted_weights, wanted = moe.route(logits, k)
    assert torch.equal(chosen.long(), wanted)
    assert torch.allclose(weights, wanted_weights, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 700), st.integers(0, 10_000))
def test_rows_hold_every_choice_once_and_tiles_one_expert(
    experts: int, k: int, tokens: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(experts, (tokens, k), generator=generator, dtype=torch.int32)
    chosen = chosen.to(DEVICE)
    rows = fused_experts.sort_rows(chosen, experts)
    assert sorted(rows.choice_R[rows.choice_R < tokens * k].tolist()) == list(range(tokens * k))
    for token in range(tokens):
        for j in range(k):
            row = int(rows.row_TK[token, j])
            assert int(rows.choice_R[row]) == token * k + j
            assert int(rows.expert_M[row // fused_experts.TILE]) == int(chosen[token, j])
    sizes = (rows.last_E - rows.first_E).tolist()
    counts = torch.bincount(chosen.flatten().long(), minlength=experts).tolist()
    assert sizes == [-(-n // fused_experts.TILE) * fused_experts.TILE for n in counts]


# Tiles of a weight gradient of S/2, B/2, L/2, XL/2 on 132 multiprocessors.
@pytest.mark.parametrize("tiles", [18, 72, 128, 162])
def test_equal_parts_keep_the_multiprocessors_busy(tiles: int) -> None:
    programs = tiles * fused_experts.even_parts(tiles, 132)
    assert programs / (-(-programs // 132) * 132) > 0.95


@pytest.mark.parametrize(("frames", "width", "heads"), [(16, 32, 2), (5, 24, 3), (16, 144, 2)])
def test_temporal_attention_and_its_gradient(frames: int, width: int, heads: int) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, frames, 3, 3 * width, device=DEVICE, requires_grad=True)
    upstream = torch.randn(2, frames, 3, width, device=DEVICE)
    split = qkv.view(2, frames, 3, 3, heads, width // heads).permute(3, 0, 2, 4, 1, 5)
    wanted = latte.attention(*split).permute(0, 3, 1, 2, 4).reshape(2, frames, 3, width)
    (wanted_grad,) = torch.autograd.grad(wanted, qkv, upstream)
    found = temporal_attention(qkv, heads)
    (grad,) = torch.autograd.grad(found, qkv, upstream)
    assert relative(found, wanted) < 1e-5
    assert relative(grad, wanted_grad) < 1e-5


@pytest.mark.parametrize(("positions", "width", "heads"), [(256, 32, 2), (70, 24, 3)])
def test_spatial_attention_and_its_gradient(positions: int, width: int, heads: int) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(1, 2, positions, 3 * width, device=DEVICE, requires_grad=True)
    upstream = torch.randn(1, 2, positions, width, device=DEVICE)
    split = qkv.view(1, 2, positions, 3, heads, width // heads).permute(3, 0, 1, 4, 2, 5)
    wanted = latte.attention(*split).transpose(2, 3).reshape(1, 2, positions, width)
    (wanted_grad,) = torch.autograd.grad(wanted, qkv, upstream)
    found = spatial_attention(qkv, heads)
    (grad,) = torch.autograd.grad(found, qkv, upstream)
    assert relative(found, wanted) < 1e-5
    assert relative(grad, wanted_grad) < 1e-5


@pytest.mark.parametrize(("tokens", "width", "frames"), [(12, 48, 3), (7, 32, 7), (70, 80, 2)])
@pytest.mark.parametrize("has_table", [False, True])
def test_residual_norm_and_all_its_gradients(
    tokens: int, width: int, frames: int, has_table: bool
) -> None:
    torch.manual_seed(tokens)
    x, branch, up_x, up_h = (torch.randn(2, tokens, width, device=DEVICE) for _ in range(4))
    gate, shift, scale = torch.randn(2, 3 * width, device=DEVICE).chunk(3, dim=-1)
    table = torch.randn(frames, width, device=DEVICE) if has_table else None
    inputs = [tensor.clone().requires_grad_() for tensor in (x, branch)]
    inputs += [tensor.detach().requires_grad_() for tensor in (gate, shift, scale)]

    def reference(x, branch, gate, shift, scale, table):  # type: ignore[no-untyped-def]
        x = x + gate[:, None] * branch
        if table is not None:
            x = x + table.repeat_interleave(tokens // frames, dim=0)
        normal = latte.LayerNorm(width)(x)
        return x, normal * (1 + scale[:, None]) + shift[:, None]

    found, wanted = residual_norm(*inputs, table), reference(*inputs, table)
    for mine, theirs in zip(found, wanted, strict=True):
        assert relative(mine, theirs) < 1e-5
    gradients = [torch.autograd.grad(out, inputs, (up_x, up_h)) for out in (found, wanted)]
    for mine, theirs in zip(*gradients, strict=True):
        assert relative(mine, theirs) < 1e-5
    # As at the end of the network, where x' has no other use, and at its start, without a branch.
    alone = [
        torch.autograd.grad(f(*inputs, table)[1], inputs, up_h) for f in (residual_norm, reference)
    ]
    for mine, theirs in zip(*alone, strict=True):
        assert relative(mine, theirs) < 1e-5
    x, _, _, shift, scale = inputs
    first = norm(x, shift, scale)
    plain = latte.LayerNorm(width)(x) * (1 + scale[:, None]) + shift[:, None]
    assert relative(first, plain) < 1e-5
    first, plain = (torch.autograd.grad(out, [x, shift, scale], up_h) for out in (first, plain))
    for mine, theirs in zip(first, plain, strict=True):
        assert relative(mine, theirs) < 1e-5
