"""Latte (arXiv 2401.03048): a diffusion transformer for video, with DiT's adaLN-zero blocks.

Blocks take turns: a spatial one, in which the tokens of one frame attend to each other, then a
temporal one, in which the tokens of one position do. Parameter names and shapes are those of the
public Latte, unconditional (timestep only). With experts, a block's ``mlp`` becomes ``gate`` and
``experts``.

Letters in shapes: b clips, f frames, c latent channels, h w latent positions, t tokens of a frame,
d width; in a block s sequences of n tokens each.
"""

import math
from functools import partial

import torch
from einops import rearrange, repeat
from timm.layers import Mlp, PatchEmbed
from torch import Tensor, nn

from xdimo.model import moe
from xdimo.model.flops import MLP_RATIO, TIMESTEP_FREQUENCIES
from xdimo.spec import ModelSpec

# adaLN brings shift and scale, so the norms have none of their own.
LayerNorm = partial(nn.LayerNorm, elementwise_affine=False, eps=1e-6)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head width)) v, the matrix of weights materialised: [s, heads, n, -]."""
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return logits.softmax(dim=-1) @ v


class Attention(nn.Module):
    attend = staticmethod(attention)

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "s n (qkv g e) -> qkv s g n e", qkv=3, g=self.heads)
        return self.proj(rearrange(self.attend(q, k, v), "s g n e -> s n (g e)"))


def mlp(width: int) -> Mlp:
    return Mlp(width, MLP_RATIO * width, act_layer=partial(nn.GELU, approximate="tanh"))


def modulation(width: int, vectors: int) -> nn.Sequential:
    """Timestep embedding [b, d] -> ``vectors`` vectors [b, vectors x d] that steer a block."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, vectors * width))


def per_sequence(steering: Tensor, sequences: int, vectors: int) -> Tensor:
    """[b, vectors x d], computed once a clip, -> [vectors, s, 1, d] for all its sequences."""
    each = sequences // len(steering)
    return repeat(steering, "b (v d) -> v (b each) 1 d", v=vectors, each=each)


class Block(nn.Module):
    mix = staticmethod(moe.mixture)

    def __init__(self, width: int, heads: int, experts: int, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.norm1 = LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = LayerNorm(width)
        self.dense = experts == 1
        if self.dense:
            self.mlp = mlp(width)
        else:
            self.gate = nn.Linear(width, experts, bias=False)
            self.experts = nn.ModuleList(mlp(width) for _ in range(experts))
        self.adaLN_modulation = modulation(width, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x [s, n, d], the sequences of one clip side by side; c [b, d] -> [s, n, d]."""
        steering = per_sequence(self.adaLN_modulation(c), len(x), 6)
        shift1, scale1, gate1, shift2, scale2, gate2 = steering
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        x = x + gate2 * self.feed_forward(self.norm2(x) * (1 + scale2) + shift2)
        return x

    def feed_forward(self, x: Tensor) -> Tensor:
        if self.dense:
            return self.mlp(x)
        mixed = self.mix(x.flatten(0, 1), self.gate, self.experts, self.top_k)
        return mixed.view_as(x)


class FinalLayer(nn.Module):
    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.norm_final = LayerNorm(width)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = modulation(width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = per_sequence(self.adaLN_modulation(c), len(x), 2)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIMESTEP_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, t: Tensor) -> Tensor:
        """Diffusion steps [b] -> [b, d]."""
        angles = wave_angles(t.float(), TIMESTEP_FREQUENCIES)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


def wave_angles(positions: Tensor, channels: int) -> Tensor:
    """[positions] -> [positions, channels / 2], of wavelengths 2 pi to nearly 20,000 pi."""
    half = channels // 2
    powers = torch.arange(half, dtype=positions.dtype, device=positions.device)
    return positions[:, None] * torch.exp(-math.log(10_000) * powers / half)


def position_table(length: int, channels: int) -> Tensor:
    """[length, channels] in float64: sines, then cosines."""
    angles = wave_angles(torch.arange(length, dtype=torch.float64), channels)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Latte(nn.Module):
    """Predicts noise and the range of the variance of noisy latents.

    ``latent_size``: latent positions a side (32 for 256 pixels). ``latent_channels``: 4 with
    Stable Diffusion's VAE. ``frames``: of a clip, the length of the temporal position table.
    """

    implementation = "reference"

    def __init__(self, model: ModelSpec, *, latent_size: int, latent_channels: int, frames: int):
        super().__init__()
        width, patch = model.width, model.patch
        self.x_embedder = PatchEmbed(latent_size, patch, latent_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        tokens = self.x_embedder.num_patches
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, width), requires_grad=False)
        self.temp_embed = nn.Parameter(torch.empty(1, frames, width), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(width, model.heads, model.experts, model.top_k) for _ in range(model.depth)
        )
        self.final_layer = FinalLayer(width, patch * patch * 2 * latent_channels)
        self.initialise()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Noisy latents x [b, f, c, h, w] at steps t [b] -> [b, f, 2c, h, w]: noise, variance."""
        b = len(x)
        c = self.t_embedder(t)  # b d
        x = rearrange(x, "b f c h w -> (b f) c h w")
        x = self.x_embedder(x) + self.pos_embed  # (b f) t d
        for i in range(0, len(self.blocks), 2):
            spatial, temporal = self.blocks[i], self.blocks[i + 1]
            x = spatial(x, c)  # (b f) t d
            x = rearrange(x, "(b f) t d -> (b t) f d", b=b)
            if i == 0:
                x = x + self.temp_embed
            x = temporal(x, c)  # (b t) f d
            x = rearrange(x, "(b t) f d -> (b f) t d", b=b)
        x = self.final_layer(x, c)  # (b f) t (p q 2c)
        (h, w), (p, q) = self.x_embedder.grid_size, self.x_embedder.patch_size
        shape = "(b f) (h w) (p q c) -> b f c (h p) (w q)"
        return rearrange(x, shape, b=b, h=h, w=w, p=p, q=q)  # b f 2c h w

    @torch.no_grad()
    def initialise(self) -> None:
        """The public Latte's start, from torch's global generator."""
        # Linear layers, experts and routers too: variance kept through the depth.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # The patch embedding is a linear layer of patches, stored as a convolution.
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        # Small, so that at first all steps are embedded much alike.
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        # adaLN-zero: all gates are 0, so every block starts as the identity.
        for block in self.blocks:
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.adaLN_modulation[1].weight)
        # The first prediction is 0: no noise, and a variance in the middle of its range.
        nn.init.zeros_(self.final_layer.linear.weight)
        # Fixed tables: half of the channels tell the column, half the row.
        (h, w), width = self.x_embedder.grid_size, self.pos_embed.shape[-1]
        columns = position_table(w, width // 2).repeat(h, 1)
        rows = position_table(h, width // 2).repeat_interleave(w, dim=0)
        self.pos_embed.copy_(torch.cat([columns, rows], dim=-1))
        self.temp_embed.copy_(position_table(self.temp_embed.shape[1], width))
