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
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from xdimo.model.fused import adaln, experts, temporal

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

    tokens, inside = CLIPS * FRAMES * POSITIONS, 4 * WIDTH
    x = empty(CLIPS, FRAMES * POSITIONS, WIDTH, dtype=torch.float32)
    h, scale = empty(*x.shape), empty(CLIPS, WIDTH)
    qkv = empty(CLIPS, FRAMES, POSITIONS, 3 * WIDTH)
    attended = temporal.temporal_attention._init_fn(qkv, HEADS)
    temporal.temporal_attention_backward._init_fn(qkv, attended, HEADS)
    out, _ = adaln.forward(x, h, scale, None, scale, scale)
    adaln.backward(x, h, out, h, scale, scale)

    chosen = empty(tokens, TOP_K, dtype=torch.int64)
    rows = experts.Rows(*experts._sort_rows._init_fn(chosen, EXPERTS))
    weight = empty(tokens, TOP_K, dtype=torch.float32)
    up, up_bias = empty(EXPERTS, inside, WIDTH), empty(EXPERTS, inside)
    down, down_bias = empty(EXPERTS, WIDTH, inside), empty(EXPERTS, WIDTH)
    h_TD = h.flatten(0, 1)
    out, _, y, z = experts._experts._init_fn(
        x, h_TD, weight, up, up_bias, down, down_bias, scale, None, scale, scale, *rows
    )
    adaln.backward(x, h, out, adaln.Choices(y, weight, rows.row_TK), scale, scale)
    experts._experts_backward(h_TD, h_TD, weight, up, down, y, z, rows)


if __name__ == "__main__":
    pretend(int(sys.argv[1]))
    with FakeTensorMode():
        for name in sys.argv[2:]:
            block(getattr(torch, name))
