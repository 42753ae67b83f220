"""AdamW, gradient norm and clipping, and the average of the weights, over flat storage.

One pass over all weights: 38 bytes a weight, of which the copy for the products is two.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xdimo.model.fused.storage import Storage

BLOCK = 1024


@triton.jit
def adamw_squares(gradients, parts, size, block: tl.constexpr):
    """parts[i] = the sum of squares of the i-th block."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    gradient = tl.load(gradients + at, mask=at < size, other=0.0)
    tl.store(parts + tl.program_id(0), tl.sum(gradient * gradient, axis=0))


@triton.jit
def adamw_norm(parts, norm, scale, limit, count, clips: tl.constexpr, block: tl.constexpr):
    """The gradients' norm, and what clips them to ``limit``."""
    total = tl.zeros((block,), tl.float32)
    for first in range(0, count, block):
        at = first + tl.arange(0, block)
        total += tl.load(parts + at, mask=at < count, other=0.0)
    found = tl.sqrt(tl.sum(total, axis=0))
    tl.store(norm, found)
    if clips:
        ratio = limit / (found + 1e-6)
        tl.store(scale, tl.where(ratio > 1.0, 1.0, ratio))  # what is not a number stays so


@triton.jit
def adamw_rates(
    steps, rates, rate, parameters,
    log_beta1: tl.constexpr, log_beta2: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """One more step of each parameter, and what corrects the moments then."""
    step = tl.load(steps) + 1.0
    tl.debug_barrier()  # all have read it
    index = tl.arange(0, padded)
    tl.store(steps + index, step + tl.zeros((padded,), tl.float32), mask=index < parameters)
    # In float64: 1 - beta2 ** 1 has three digits left of float32.
    correction1 = 1.0 - tl.exp(step.to(tl.float64) * tl.full((), log_beta1, tl.float64))
    correction2 = 1.0 - tl.exp(step.to(tl.float64) * tl.full((), log_beta2, tl.float64))
    tl.store(rates, rate / correction1.to(tl.float32))
    tl.store(rates + 1, tl.sqrt(correction2.to(tl.float32)))


@triton.jit
def adamw_update(
    weights, copy, gradients, first, second, average, rates, scale, parts, size,
    change1, beta2, change2, epsilon, decay, change,
    copies: tl.constexpr, clips: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """``clips``: multiplies the gradients by scale; else it leaves their sums of squares, as
    adamw_squares does, and spares a pass over them.
    """
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    ok = at < size
    gradient = tl.load(gradients + at, mask=ok, other=0.0)
    m = tl.load(first + at, mask=ok)
    v = tl.load(second + at, mask=ok)
    weight = tl.load(weights + at, mask=ok)
    mean = tl.load(average + at, mask=ok)
    if clips:
        gradient *= tl.load(scale)
    else:
        tl.store(parts + tl.program_id(0), tl.sum(gradient * gradient, axis=0))
    m += change1 * (gradient - m)
    v = beta2 * v + change2 * gradient * gradient
    weight -= decay * weight
    weight -= tl.load(rates) * m / (tl.sqrt(v) / tl.load(rates + 1) + epsilon)
    tl.store(first + at, m, mask=ok)
    tl.store(second + at, v, mask=ok)
    tl.store(weights + at, weight, mask=ok)
    tl.store(average + at, mean + change * (weight - mean), mask=ok)
    if copies:
        tl.store(copy + at, weight.to(copy.dtype.element_ty), mask=ok)


class FlatAdamW(torch.optim.AdamW):
    """torch's AdamW in one kernel, with its state under the same names.

    ``weights``: of the model. ``average``: of the model of averaged weights, in the same order.
    """

    def __init__(self, parameters: list[Any], weights: Storage, average: Storage, lr: float):
        super().__init__(parameters, lr=lr, weight_decay=0.0, fused=True, capturable=True)
        self.weights, self.average = weights, average
        device = weights.weights.device
        self.steps = torch.zeros(len(parameters), device=device)  # all alike
        self.moments = [torch.zeros_like(weights.weights) for _ in range(2)]
        self._adopt()

    def _adopt(self) -> None:
        """The state that torch knows of are views."""
        for step, parameter in zip(self.steps, self.weights.parameters, strict=True):
            self.state[parameter] = {
                "step": step,
                "exp_avg": self.weights.view(self.moments[0], parameter),
                "exp_avg_sq": self.weights.view(self.moments[1], parameter),
            }

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise TypeError("FlatAdamW: update() takes the step, and averages the weights too")

    @torch.no_grad()
    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        for step, parameter in zip(self.steps, self.weights.parameters, strict=True):
            loaded = self.state[parameter]
            step.copy_(loaded["step"])
            for moment, key in zip(self.moments, ("exp_avg", "exp_avg_sq"), strict=True):
                self.weights.view(moment, parameter).copy_(loaded[key])
        self._adopt()

    @torch.no_grad()
    def update(self, clip_norm: float | None, ema_decay: float) -> Tensor:
        """One step on the parameters' gradients, and one of the average. Returns the gradients'
        norm, before they are clipped; they are gone afterwards.
        """
        assert all(each.holds(each.parameters) for each in (self.weights, self.average))
        gradients, weights = self.weights.gathered(), self.weights.weights
        group = self.param_groups[0]
        rate, (beta1, beta2) = group["lr"], group["betas"]
        size, clips, copy = weights.numel(), clip_norm is not None, self.weights.copy
        programs = triton.cdiv(size, BLOCK)
        parts, rates = weights.new_empty(programs), weights.new_empty(2)
        norm, scale = weights.new_empty(()), weights.new_empty(1)
        adamw_rates[(1,)](
            self.steps, rates, rate, len(self.steps),
            math.log(beta1), math.log(beta2), triton.next_power_of_2(len(self.steps)),
        )  # fmt: skip

        def measure() -> None:
            adamw_norm[(1,)](
                parts, norm, scale, clip_norm or 0.0, programs, clips, 8192, num_warps=16
            )

        if clips:
            adamw_squares[(programs,)](gradients, parts, size, BLOCK)
            measure()
        adamw_update[(programs,)](
            weights,
            copy if copy is not None else weights,
            gradients,
            *self.moments,
            self.average.weights,
            rates,
            scale,
            parts,
            size,
            1 - beta1,
            beta2,
            1 - beta2,
            group["eps"],
            rate * group["weight_decay"],
            1 - ema_decay,
            copy is not None,
            clips,
            BLOCK,
        )
        if not clips:
            measure()
        self.weights.gradients = None
        self.zero_grad(set_to_none=True)
        return norm
