"""Latte's forward pass over its own parameters, as the fused kernels want it.

The same function as xdimo.model.latte, which tells what each line is for. Tokens stay in the order
[clips, frames, positions] throughout, written n; each layer takes the modulated norm h and leaves a
branch, and one kernel adds that to x and makes the next layer's h.
"""

from itertools import islice
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from xdimo.model import latte
from xdimo.model.fused.adaln import norm, residual_norm
from xdimo.model.fused.experts import Weights, mixture_residual_norm
from xdimo.model.fused.spatial import spatial_attention
from xdimo.model.fused.storage import Loan, Storage, linear, stacked
from xdimo.model.fused.temporal import temporal_attention


class FusedLatte(latte.Latte):
    """``compiled``: through torch.compile; without, the kernels alone (tests, debugging)."""

    implementation = "fused"

    def __init__(self, *arguments: Any, compiled: bool = True, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.storage: Storage | None = None
        self.embed = torch.compile(embed, dynamic=False) if compiled else embed

    def stored(self) -> Storage:
        """Where its weights lie: in one buffer, from the first call on the present device."""
        groups = self._groups()
        if self.storage is None or not self.storage.holds([p for group in groups for p in group]):
            self.storage = Storage(groups)
        return self.storage

    def _groups(self) -> list[list[nn.Parameter]]:
        """All but the fixed tables: what is multiplied at once together, the others alone."""
        layers = self._modulations()
        groups = [[layer.weight for layer in layers], [layer.bias for layer in layers]]
        for block in self.blocks:
            groups += [] if block.dense else expert_groups(block)
        apart = {id(p) for group in groups for p in group} | {
            id(self.pos_embed),
            id(self.temp_embed),
        }
        return groups + [[p] for p in self.parameters() if id(p) not in apart]

    def _modulations(self) -> list[nn.Linear]:
        return [layer.adaLN_modulation[1] for layer in (*self.blocks, self.final_layer)]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Noisy latents x [b, f, c, h, w] at steps t [b] -> [b, f, 2c, h, w]: noise, variance."""
        frames, width = x.shape[1], self.pos_embed.shape[-1]
        lent = self.stored().lend(computed_in(x))
        c, x = self.embed(self, x, t)
        layers = self._modulations()
        steering = linear(
            c,
            lent([layer.weight for layer in layers], -1, width),
            lent([layer.bias for layer in layers], -1),
        )
        vectors = iter(steering.split(width, -1))  # b d each: the first two are the first norm's
        h = norm(x, *islice(vectors, 2))
        for i, block in enumerate(self.blocks):
            gate1, shift2, scale2, gate2, shift, scale = islice(vectors, 6)
            qkv, proj = block.attn.qkv, block.attn.proj
            qkv = linear(h, lent.one(qkv.weight), lent.one(qkv.bias))
            qkv = rearrange(qkv, "b (f t) e -> b f t e", f=frames)
            mix = temporal_attention if i % 2 == 1 else spatial_attention
            attended = mix(qkv, block.attn.heads).flatten(1, 2)
            branch, bias = linear(attended, lent.one(proj.weight)), lent.one(proj.bias)
            x, h = residual_norm(x, branch, gate1, shift2, scale2, bias=bias)
            table = self.temp_embed[0] if i == 0 else None
            if block.dense:
                up, down = block.mlp.fc1, block.mlp.fc2
                h = F.gelu(linear(h, lent.one(up.weight), lent.one(up.bias)), approximate="tanh")
                branch, bias = linear(h, lent.one(down.weight)), lent.one(down.bias)
                x, h = residual_norm(x, branch, gate2, shift, scale, table, bias)
            else:
                chosen = lent.one(block.gate.weight), block.top_k, expert_weights(block, lent)
                x, h = mixture_residual_norm(x, h, *chosen, gate2, shift, scale, table)
        final = self.final_layer.linear
        x = linear(h, lent.one(final.weight), lent.one(final.bias))  # b (f t) (p q 2c)
        (h, w), (p, q) = self.x_embedder.grid_size, self.x_embedder.patch_size
        shape = "b (f h w) (p q c) -> b f c (h p) (w q)"
        return rearrange(x, shape, f=frames, h=h, w=w, p=p, q=q)


def computed_in(x: Tensor) -> torch.dtype:
    """The type of matrix products: autocast's, or x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def embed(network: latte.Latte, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """What steers all blocks [b, d], and the tokens of noisy latents [b, n, d] in float32."""
    c = F.silu(network.t_embedder(t))
    patches, (p, q) = network.x_embedder.proj, network.x_embedder.patch_size
    # A convolution whose patches do not overlap is a linear layer.
    x = rearrange(x, "b f c (h p) (w q) -> b f (h w) (c p q)", p=p, q=q)
    x = F.linear(x, patches.weight.flatten(1), patches.bias) + network.pos_embed
    return c, x.flatten(1, 2)


def expert_groups(block: latte.Block) -> list[list[nn.Parameter]]:
    """Weights and biases of all experts, in the order of Weights."""
    layers = [[getattr(expert, layer) for expert in block.experts] for layer in ("fc1", "fc2")]
    return [[getattr(each, n) for each in layer] for layer in layers for n in ("weight", "bias")]


def expert_weights(block: latte.Block, lent: Loan) -> Weights:
    groups = expert_groups(block)
    return Weights(*(lent(group, len(group), *group[0].shape) for group in groups))


def dispatch(block: latte.Block, h: Tensor) -> tuple[Tensor, int, Weights]:
    """What mixture_residual_norm wants of a block that stands alone: its weights lie anywhere."""
    weights = Weights(*(stacked(group, h.dtype) for group in expert_groups(block)))
    return block.gate(h), block.top_k, weights
