"""All trained weights of a network in one buffer, so that one kernel can update them all.

Beside the float32 weights stand their copies in the type of the matrix products, and the gradients,
each in the same order. Layers get views (``Stack``): nothing is cast or stacked in a step, and a
backward pass writes each gradient where the optimizer reads it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional as F

ALIGN = 64  # elements; the copy engine wants addresses of 16 bytes


class Stack(NamedTuple):
    """One parameter, or several that lie one behind the other, as one tensor."""

    value: Tensor  # in the type of the products
    grad: Tensor  # float32, of the same shape: takes the gradient
    parameters: tuple[Tensor, ...]

    def grads(self) -> list[Tensor]:
        """The gradient of each parameter, as a backward pass returns them."""
        parts = self.grad.flatten().split([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]


def stacked(parameters: Sequence[Tensor], dtype: torch.dtype) -> Stack:
    """Parameters of one shape that lie anywhere: [n, ...], copied."""
    value = torch.stack(list(parameters)).detach()
    return Stack(value.to(dtype), torch.empty_like(value), tuple(parameters))


class Storage:
    """``groups``: parameters; those of a group lie one behind the other, without gaps."""

    def __init__(self, groups: Sequence[Sequence[nn.Parameter]]) -> None:
        self.parameters = [parameter for group in groups for parameter in group]
        self.places: dict[nn.Parameter, int] = {}
        end = 0
        for group in groups:
            end = -(-end // ALIGN) * ALIGN
            for parameter in group:
                self.places[parameter] = end
                end += parameter.numel()
        self.has_gaps = end > sum(parameter.numel() for parameter in self.parameters)
        self.weights = torch.zeros(end, device=self.parameters[0].device)
        self.gradients: Tensor | None = None  # of the last backward pass
        self.copy: Tensor | None = None
        self.copied = -1  # what ``versions`` was when the copy was made
        with torch.no_grad():
            for parameter in self.parameters:
                view = self.view(self.weights, parameter)
                parameter.data = view.copy_(parameter)

    def view(self, buffer: Tensor, parameter: nn.Parameter) -> Tensor:
        """The part of a buffer in this order that is a parameter's."""
        place = self.places[parameter]
        return buffer[place : place + parameter.numel()].view(parameter.shape)

    def lies_in(self, buffer: Tensor, tensor: Tensor | None, parameter: nn.Parameter) -> bool:
        """Whether a tensor is that part."""
        at = buffer.data_ptr() + self.places[parameter] * buffer.element_size()
        return tensor is not None and tensor.data_ptr() == at

    def holds(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether these lie here: ``.to(device)`` moves them away, or makes others."""
        return all(p in self.places and self.lies_in(self.weights, p, p) for p in parameters)

    def versions(self) -> int:
        """Grows with each change that torch makes to the weights."""
        return sum(parameter._version for parameter in self.parameters)

    @torch.no_grad()
    def values(self, dtype: torch.dtype) -> Tensor:
        """All weights in the type of the products; copied where torch has changed any."""
        if dtype == self.weights.dtype:
            return self.weights
        if self.copy is None or self.copy.dtype != dtype:
            self.copy, self.copied = torch.empty_like(self.weights, dtype=dtype), -1
        if self.copied != self.versions():
            self.copy.copy_(self.weights)
            self.copied = self.versions()
        return self.copy

    def lend(self, dtype: torch.dtype) -> "Loan":
        """For one forward and backward pass."""
        # A gap has no gradient, and must not count in the norm.
        make = torch.zeros_like if self.has_gaps else torch.empty_like
        self.gradients = make(self.weights)
        return Loan(self, self.values(dtype), self.gradients)

    @torch.no_grad()
    def gathered(self) -> Tensor:
        """All gradients in one buffer: those that other code left elsewhere are copied into it.

        Raises RuntimeError where a parameter has none.
        """
        assert self.gradients is not None
        to, source = [], []
        for parameter in self.parameters:
            if parameter.grad is None:
                raise RuntimeError(f"a parameter of shape {[*parameter.shape]} has no gradient")
            if not self.lies_in(self.gradients, parameter.grad, parameter):
                to.append(self.view(self.gradients, parameter))
                source.append(parameter.grad)
        if to:
            torch._foreach_copy_(to, source)
        return self.gradients


class Loan(NamedTuple):
    storage: Storage
    values: Tensor
    gradients: Tensor

    def __call__(self, parameters: Sequence[nn.Parameter], *shape: int) -> Stack:
        """Parameters of one group, in their order, as a tensor of this shape."""
        first = self.storage.places[parameters[0]]
        part = slice(first, first + sum(parameter.numel() for parameter in parameters))
        value, grad = (buffer[part].view(shape) for buffer in (self.values, self.gradients))
        return Stack(value.detach(), grad, tuple(parameters))

    def one(self, parameter: nn.Parameter) -> Stack:
        return self([parameter], *parameter.shape)


@triton.jit
def sum_columns(
    x, out, rows, part_rows, columns: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr
):
    """out[p] = sum of the p-th part of x's rows."""
    part = tl.program_id(1)
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    total = tl.zeros((block_n,), tl.float32)
    end = tl.minimum(rows, (part + 1) * part_rows)
    for first in range(part * part_rows, end, block_m):
        m = first + tl.arange(0, block_m)
        ok = (m < end)[:, None] & (n < columns)[None, :]
        at = m.to(tl.int64)[:, None] * columns + n[None, :]
        total += tl.sum(tl.load(x + at, mask=ok, other=0.0).to(tl.float32), axis=0)
    tl.store(out + part * columns + n, total, mask=n < columns)


def column_sums(x: Tensor, out: Tensor) -> None:
    """out [columns] = sum over the rows of x, contiguous: of parts, then of these, in order."""
    rows, columns = x.shape
    part_rows = max(128, triton.cdiv(rows, 64))
    parts = triton.cdiv(rows, part_rows)
    partial = out if parts == 1 else out.new_empty(parts, columns)
    sum_columns[(triton.cdiv(columns, 64), parts)](x, partial, rows, part_rows, columns, 128, 64)
    if parts > 1:
        sum_columns[(triton.cdiv(columns, 32), 1)](partial, out, parts, parts, columns, 64, 32)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Stack, bias: Stack | None, *parameters: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias = weight, bias
        return F.linear(x, weight.value, bias.value if bias else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (x,), weight, bias = ctx.saved_tensors, ctx.weight, ctx.bias
        grad_TD, x_TD = grad.flatten(0, -2), x.flatten(0, -2)
        grads = weight.grads()
        if x.dtype == torch.float32:
            torch.mm(grad_TD.T, x_TD, out=weight.grad)
        else:
            torch.ops.aten.mm.dtype_out(grad_TD.T, x_TD, torch.float32, out=weight.grad)
        if bias:
            column_sums(grad_TD.contiguous(), bias.grad)
            grads += bias.grads()
        grad_x = (grad_TD @ weight.value).view_as(x) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, *grads


def linear(x: Tensor, weight: Stack, bias: Stack | None = None) -> Tensor:
    """x [..., in] times weight [out, in], in the type of both; the gradients are float32."""
    parameters = (*weight.parameters, *(bias.parameters if bias else ()))
    out: Tensor = _Linear.apply(x, weight, bias, *parameters)
    return out
