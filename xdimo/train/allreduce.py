"""Gradients averaged over the ranks, without the copies that DDP makes of them."""

from math import isnan
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xdimo.train import distributed

BUCKET = 25 * 2**20  # bytes of a launch, DDP's; it goes as soon as it has them, or with the last


class Averaged(nn.Module):
    """``model``, whose gradients are means over the ranks when a backward pass ends.

    As the pass leaves gradients, they are all-reduced where they lie, ``BUCKET`` bytes a launch,
    while it goes on. DistributedDataParallel copies each into a bucket first: one more kernel a
    parameter, and 0.6 GB of S/2 4E2A through memory.

    Every parameter must have a gradient, in the same order on all ranks, as one network has them.
    The second call compares the order and the weights of all ranks. Raises RuntimeError where they
    differ, or where a parameter had no gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        for parameter in self.names:
            parameter.register_post_accumulate_grad_hook(self._take)
        self.order: list[str] = []
        self.compared = False
        self._begin()

    def forward(self, *inputs: Tensor) -> Any:
        if self.left != len(self.names):
            raise RuntimeError(f"{self.left} parameters had no gradient in the last backward pass")
        if self.order and not self.compared:
            self._compare()
            self.compared = True
        return self.model(*inputs)

    def _begin(self) -> None:
        self.left = len(self.names)
        self.bucket: list[Tensor] = []
        self.bytes = 0
        self.sent: list[Any] = []

    def _take(self, parameter: Tensor) -> None:
        if not self.compared:
            self.order.append(self.names[parameter])
        grad = parameter.grad
        assert grad is not None
        self.left -= 1
        self.bucket.append(grad)
        self.bytes += grad.nbytes
        if self.bytes >= BUCKET or not self.left:
            self._send()
        if not self.left:
            for each in self.sent:
                each.wait()  # on a GPU its stream does, not the host
            self._begin()

    def _send(self) -> None:
        with dist._coalescing_manager(async_ops=True) as sent:
            for grad in self.bucket:
                dist.all_reduce(grad, op=dist.ReduceOp.AVG)
        self.sent.append(sent)
        self.bucket, self.bytes = [], 0

    @torch.no_grad()
    def _compare(self) -> None:
        norms = torch.stack(torch._foreach_norm(list(self.names))).tolist()
        ranks = distributed.everyone((self.order, norms))
        for rank, (order, theirs) in enumerate(ranks):
            if order != ranks[0][0]:
                raise RuntimeError(f"ranks 0 and {rank} have gradients in different orders")
            for name, mine, other in zip(self.names.values(), ranks[0][1], theirs, strict=True):
                if mine != other and not (isnan(mine) and isnan(other)):  # the loss tells of NaN
                    raise RuntimeError(
                        f"{name}: ranks 0 and {rank} have different weights after a step"
                    )
