"""Latte's forward pass over its own parameters, as the fused kernels want it.

The same function as xdimo.model.latte, which tells what each line is for. Tokens stay in the order
[clips, frames, positions] throughout, written n; each layer takes the modulated norm h and leaves a
branch, and one kernel adds that to x and makes the next layer's h.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from xdimo.model import latte
from xdimo.model.compiled import places
from xdimo.model.fused.adaln import norm, residual_norm
from xdimo.model.fused.experts import Weights, mixture_residual_norm
from xdimo.model.fused.temporal import temporal_attention


class FusedLatte(latte.Latte):
    """``compiled``: through torch.compile; without, the kernels alone (tests, debugging)."""

    implementation = "fused"

    def __init__(self, *arguments: Any, compiled: bool = True, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.attend, self.dispatch = attend, dispatch
        if compiled:
            self.attend = torch.compile(attend, dynamic=False)
            self.dispatch = torch.compile(dispatch, dynamic=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Noisy latents x [b, f, c, h, w] at steps t [b] -> [b, f, 2c, h, w]: noise, variance."""
        b, frames = x.shape[:2]
        c = F.silu(self.t_embedder(t))  # b d, the same of every block's modulation
        x = self.x_embedder(x.flatten(0, 1)) + self.pos_embed
        x = rearrange(x, "(b f) t d -> b (f t) d", b=b)
        steering = modulation(self.blocks[0], c)
        h = norm(x, *steering[:2])
        for i, block in enumerate(self.blocks):
            _, _, gate1, shift2, scale2, gate2 = steering
            # Here, not for all blocks at once: so its gradient is there when the block's are, and
            # an all-reduce of it hides behind the other blocks.
            steering = modulation((*self.blocks, self.final_layer)[i + 1], c)
            x, h = residual_norm(
                x, self.attend(block, h, frames, i % 2 == 1), gate1, shift2, scale2
            )
            table = self.temp_embed[0] if i == 0 else None
            if block.dense:
                x, h = residual_norm(x, block.mlp(h), gate2, *steering[:2], table)
            else:
                chosen = self.dispatch(block, h)
                x, h = mixture_residual_norm(x, h, *chosen, gate2, *steering[:2], table)
        x = self.final_layer.linear(h)  # b (f t) (p q 2c)
        (h, w), (p, q) = self.x_embedder.grid_size, self.x_embedder.patch_size
        shape = "b (f h w) (p q c) -> b f c (h p) (w q)"
        return rearrange(x, shape, f=frames, h=h, w=w, p=p, q=q)


def modulation(block: latte.Block | latte.FinalLayer, c: Tensor) -> tuple[Tensor, ...]:
    """Shift, scale (and gate) of its norms, [b, d] each."""
    layer = block.adaLN_modulation[1]
    vectors: Tensor = layer(c)
    return vectors.chunk(layer.out_features // layer.in_features, dim=-1)


def attend(block: latte.Block, h: Tensor, frames: int, temporal: bool) -> Tensor:
    """Modulated norm h [b, n, d] -> [b, n, d], before its gate."""
    heads = block.attn.heads
    qkv = rearrange(block.attn.qkv(h), "b (f t) e -> b f t e", f=frames)
    if temporal:
        attended = temporal_attention(qkv.contiguous(), heads)
    else:
        q, k, v = rearrange(qkv, "b f t (a g e) -> a (b f) g t e", a=3, g=heads)
        attended = F.scaled_dot_product_attention(q, k, v)
        attended = rearrange(attended, "(b f) g t e -> b f t (g e)", f=frames)
    return block.attn.proj(attended.flatten(1, 2))


def dispatch(block: latte.Block, h: Tensor) -> tuple[Tensor, Tensor, Weights]:
    """Weights and experts of each token's choices, and all experts' layers, stacked."""

    def stacked(layer: str, name: str) -> Tensor:
        tensors = [getattr(getattr(expert, layer), name) for expert in block.experts]
        return torch.stack(tensors).to(h.dtype)

    names = [(layer, name) for layer in ("fc1", "fc2") for name in ("weight", "bias")]
    weight_TK, experts_TK = route(block.gate(h.flatten(0, 1)), block.top_k)
    return weight_TK, experts_TK, Weights(*(stacked(*each) for each in names))


def route(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Weights [T, K] (float32) and experts [T, K], as xdimo.model.moe.route, without a sort."""
    logits_TE = logits_TE.float()
    index = torch.arange(logits_TE.shape[1], device=logits_TE.device)
    chosen_TKE = places(logits_TE)[:, None, :] == index[:k, None]
    experts_TK = (chosen_TKE * index).sum(-1, dtype=torch.int32)
    logits_TK = torch.where(chosen_TKE, logits_TE[:, None, :], 0.0).sum(-1)
    return torch.softmax(logits_TK, dim=-1), experts_TK
