"""The same network in plain torch that never makes the host wait, for torch.compile. Any card.

Letters at the end of a tensor's name are its dimensions:
T tokens, D width, E experts, H hidden width of an expert.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor
from torch.nn import functional as F

from xdimo.model import latte
from xdimo.model.moe import Layer


class DenseLatte(latte.Latte):
    """Every expert computes every token, in one pair of products; the router's weights are 0 where
    it did not choose.

    ``compiled``: block by block, through torch.compile.
    """

    implementation = "dense"

    def __init__(self, *arguments: Any, compiled: bool = True, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for i, block in enumerate(self.blocks):
            block.mix = dense_mixture
            if i % 2 == 0:  # spatial; over 16 frames a compiled softmax beats kernels that pad
                block.attn.attend = F.scaled_dot_product_attention
            if compiled:
                block.compile(dynamic=False)


def dense_mixture(x_TD: Tensor, gate: Layer, experts: Sequence[Mlp], k: int) -> Tensor:
    """xdimo.model.moe.mixture: [T, D] -> [T, D]."""
    weight_TE = k_hot(gate(x_TD), k)
    up = torch.cat([expert.fc1.weight for expert in experts])  # EH D
    up_bias = torch.cat([expert.fc1.bias for expert in experts])
    down = torch.cat([expert.fc2.weight for expert in experts], dim=1)  # D EH
    down_bias_ED = torch.stack([expert.fc2.bias for expert in experts])

    hidden = F.gelu(F.linear(x_TD, up, up_bias), approximate="tanh")  # T EH
    hidden_TEH = hidden.unflatten(-1, (len(experts), -1)) * weight_TE[:, :, None]
    # Not a product: under autocast that rounds both sides.
    bias_TD = (weight_TE[:, :, None] * down_bias_ED).sum(1)
    return F.linear(hidden_TEH.flatten(1), down) + bias_TD


def k_hot(logits_TE: Tensor, k: int) -> Tensor:
    """Weights [T, E] of xdimo.model.moe.route, 0 for experts that were not chosen."""
    return logits_TE.masked_fill(places(logits_TE) >= k, float("-inf")).softmax(dim=-1)


def places(logits_TE: Tensor) -> Tensor:
    """How many experts come before each, without a sort: of a higher logit, or the same and a
    lower index. [T, E]
    """
    mine, other = logits_TE[:, :, None], logits_TE[:, None, :]
    index = torch.arange(logits_TE.shape[1], device=logits_TE.device)
    before = (other > mine) | ((other == mine) & (index[None, :] < index[:, None]))
    return before.sum(-1)
