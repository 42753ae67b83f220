"""Latte's forward pass over its own parameters, as the fused kernels want it.

The same function as xdimo.model.latte, which tells what each line is for. Tokens stay in the order
[clips, frames, positions] throughout; a block is compiled once for spatial and once for temporal
attention, and what compilers do well (norms, modulation, residuals) is left to the compiler.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from xdimo.model import latte
from xdimo.model.fused import experts
from xdimo.model.fused.temporal import temporal_attention


class FusedLatte(latte.Latte):
    """``compiled``: through torch.compile; without, the kernels alone (tests, debugging)."""

    implementation = "fused"

    def __init__(self, *arguments: Any, compiled: bool = True, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.block_pass = torch.compile(block_pass, dynamic=False) if compiled else block_pass

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Noisy latents x [b, f, c, h, w] at steps t [b] -> [b, f, 2c, h, w]: noise, variance."""
        b = len(x)
        c = self.t_embedder(t)  # b d
        x = self.x_embedder(x.flatten(0, 1)) + self.pos_embed
        x = rearrange(x, "(b f) t d -> b f t d", b=b)
        for i, block in enumerate(self.blocks):
            if i == 1:
                x = x + self.temp_embed[:, :, None]
            x = self.block_pass(block, x, c, i % 2 == 1)  # b f t d
        x = self.final_layer(x.flatten(0, 1), c)  # (b f) t (p q 2c)
        (h, w), (p, q) = self.x_embedder.grid_size, self.x_embedder.patch_size
        return rearrange(x, "(b f) (h w) (p q c) -> b f c (h p) (w q)", b=b, h=h, w=w, p=p, q=q)


def block_pass(block: latte.Block, x: Tensor, c: Tensor, temporal: bool) -> Tensor:
    """x [b, f, t, d], c [b, d] -> [b, f, t, d]."""
    steering = rearrange(block.adaLN_modulation(c), "b (v d) -> v b 1 1 d", v=6)
    shift1, scale1, gate1, shift2, scale2, gate2 = steering
    qkv = block.attn.qkv(block.norm1(x) * (1 + scale1) + shift1)
    if temporal:
        attended = temporal_attention(qkv.contiguous(), block.attn.heads)
    else:
        q, k, v = rearrange(qkv, "b f n (a g e) -> a (b f) g n e", a=3, g=block.attn.heads)
        attended = F.scaled_dot_product_attention(q, k, v)
        attended = rearrange(attended, "(b f) g n e -> b f n (g e)", b=len(x))
    x = x + gate1 * block.attn.proj(attended)
    h = (block.norm2(x) * (1 + scale2) + shift2).to(attended.dtype)
    h = block.mlp(h) if block.dense else mixture(block, h.flatten(0, 2)).view_as(h)
    return x + gate2 * h


def mixture(block: latte.Block, x_TD: Tensor) -> Tensor:
    weight_TK, experts_TK = route(block.gate(x_TD), block.top_k)

    def stacked(layer: str, name: str) -> Tensor:
        tensors = [getattr(getattr(expert, layer), name) for expert in block.experts]
        return torch.stack(tensors).to(x_TD.dtype)

    return experts.mixture(
        x_TD,
        weight_TK,
        experts_TK,
        stacked("fc1", "weight"),
        stacked("fc1", "bias"),
        stacked("fc2", "weight"),
        stacked("fc2", "bias"),
    )


def route(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Weights [T, K] (float32) and experts [T, K], as xdimo.model.moe.route, without a sort.

    An expert's place is the number of those that come before it: of a higher logit, or of the same
    and a lower index.
    """
    logits_TE = logits_TE.float()
    mine, other = logits_TE[:, :, None], logits_TE[:, None, :]
    index = torch.arange(logits_TE.shape[1], device=logits_TE.device)
    before = (other > mine) | ((other == mine) & (index[None, :] < index[:, None]))
    place_TE = before.sum(-1)
    chosen_TKE = place_TE[:, None, :] == torch.arange(k, device=logits_TE.device)[:, None]
    experts_TK = (chosen_TKE * index).sum(-1, dtype=torch.int32)
    logits_TK = torch.where(chosen_TKE, logits_TE[:, None, :], 0.0).sum(-1)
    return torch.softmax(logits_TK, dim=-1), experts_TK
