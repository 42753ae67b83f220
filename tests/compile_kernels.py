"""Compiles the fused step's kernels for a GPU that is not here.

    python compile_kernels.py 89 bfloat16 float32

Prints a line of JSON a kernel: its name, the shared memory it needs and what the GPU has, in bytes.
Tensors are fake and on "cuda"; launches compile down to machine code and go no further.
"""

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from xdimo.model.fused import adaln, experts, spatial, temporal
from xdimo.model.fused.optimizer import FlatAdamW
from xdimo.model.fused.storage import Stack, Storage, column_sums

# Compute capability -> the most shared memory that a thread block gets (CUDA C++ Programming Guide,
# technical specifications per compute capability).
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
FRAMES, POSITIONS, WIDTH, HEADS, EXPERTS, TOP_K = 16, 256, 384, 6, 4, 2  # S/2
CLIPS = 4


class Argument:
    """What a launch asks of a tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype

    def data_ptr(self) -> int:
        return 0


def pretend(capability: int) -> None:
    """Torch and Triton see a card of this capability; a launch compiles and tells."""
    target = GPUTarget("cuda", capability, 32)
    limit = SHARED_KIB[capability] * 1024
    card = SimpleNamespace(shared_memory_per_block_optin=limit, multi_processor_count=100)
    torch.cuda.get_device_capability = lambda device=None: divmod(capability, 10)
    torch.cuda.get_device_properties = lambda device=None: card
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    launch = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        given = [Argument(a) if isinstance(a, FakeTensor) else a for a in arguments]
        kernel = launch(self, *given, grid=grid, warmup=True, **named)
        line = {"kernel": self.__name__, "shared": kernel.metadata.shared, "limit": limit}
        print(json.dumps(line), flush=True)
        return kernel

    JITFunction.run = compile_only


def block(dtype: torch.dtype) -> None:
    """Forward and backward of what a block of the fused network launches."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="cuda")

    inside = 4 * WIDTH
    x = empty(CLIPS, FRAMES * POSITIONS, WIDTH, dtype=torch.float32)
    h, scale = empty(*x.shape), empty(CLIPS, WIDTH)
    qkv = empty(CLIPS, FRAMES, POSITIONS, 3 * WIDTH)
    attended = temporal.temporal_attention._init_fn(qkv, HEADS)
    temporal.temporal_attention_backward._init_fn(qkv, attended, HEADS)
    spatial.backward(qkv, *spatial.forward(qkv, HEADS), attended, HEADS)

    def stack(*shape: int) -> Stack:
        whole = empty(*shape, dtype=torch.float32)
        return Stack(empty(*shape), whole, (whole,))

    bias, router = stack(WIDTH), stack(EXPERTS, WIDTH)
    out, _ = adaln.forward(x, h, scale, None, scale, scale, bias)
    adaln.backward(x, h, out, h, scale, scale, bias)
    up, up_bias = stack(EXPERTS, inside, WIDTH), stack(EXPERTS, inside)
    down, down_bias = stack(EXPERTS, WIDTH, inside), stack(EXPERTS, WIDTH)
    weights = experts.Weights(up, up_bias, down, down_bias)
    column_sums(h.flatten(0, 1), bias.grad)
    context = SimpleNamespace(set_materialize_grads=bool)
    context.save_for_backward = lambda *saved: setattr(context, "saved_tensors", saved)
    experts._Mixture.forward(context, x, h, None, router, TOP_K, weights, *[scale] * 3, None)
    experts._Mixture.backward(context, x, h)


def optimizer(dtype: torch.dtype) -> None:
    weights, average = (
        Storage([[nn.Parameter(torch.empty(64, WIDTH, device="cuda"))]]) for _ in range(2)
    )
    weights.lend(dtype)
    for parameter in weights.parameters:
        parameter.grad = torch.empty_like(parameter)
    weights.gathered = lambda: weights.gradients
    weights.holds = average.holds = lambda parameters: True
    for clip_norm in (None, 1.0):
        weights.lend(dtype)
        FlatAdamW(weights.parameters, weights, average, lr=1e-4).update(clip_norm, 0.9)


if __name__ == "__main__":
    pretend(int(sys.argv[1]))
    with FakeTensorMode():
        for name in sys.argv[2:]:
            block(getattr(torch, name))
            optimizer(getattr(torch, name))
