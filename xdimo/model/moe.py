"""Mixture of experts in the place of a block's MLP: the reference all faster ones are held to.

A linear router without bias scores every expert for each token; the k highest logits choose, a
softmax over those k alone weighs. Dropless: no capacity limit and no auxiliary loss, so every
token gets exactly k experts, and an expert may get no token at all. At k = 1 the weight is 1
whatever the logit: then the router is not trained.

Letters at the end of a tensor's name are its dimensions:
T = tokens of the batch, D = width, E = experts, K = experts a token goes through.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Layer = Callable[[Tensor], Tensor]


def route(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Weights [T, K] (sum 1) and experts [T, K] (int64) of each token, the highest logit first.

    Of equal logits the lowest expert wins: a stable sort promises that and torch.topk does not,
    and under bf16, with 8 bits of mantissa, ties are common.
    """
    sorted_TE, order_TE = torch.sort(logits_TE, dim=-1, descending=True, stable=True)
    return torch.softmax(sorted_TE[:, :k], dim=-1), order_TE[:, :k]


def assigned(experts_TK: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """Token and choice (row and column of ``experts_TK``) of what ``expert`` was chosen for.

    The number of rows is data: on a GPU the host waits here, once an expert.
    """
    token, choice = torch.where(experts_TK == expert)
    return token, choice


def mixture(x_TD: Tensor, gate: Layer, experts: Iterable[Layer], k: int) -> Tensor:
    """Sum over each token's k experts of weight times expert(token): [T, D] -> [T, D].

    The plain loop, one expert after the other. An expert without tokens runs on 0 rows, so its
    parameters get a gradient of zero instead of none, which DDP would wait for.
    """
    weights_TK, experts_TK = route(gate(x_TD), k)
    out_TD = torch.zeros_like(x_TD)
    for index, expert in enumerate(experts):
        token, choice = assigned(experts_TK, index)
        weighted = weights_TK[token, choice, None] * expert(x_TD[token])
        out_TD.index_add_(0, token, weighted.to(out_TD.dtype))
    return out_TD
