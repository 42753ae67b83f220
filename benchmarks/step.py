"""The training step on this machine's GPU: reference and fused side by side, in one run.

    python benchmarks/step.py [--batches 1 4 8 32] [--implementations reference fused]
    python benchmarks/step.py --online 4 32              # frames through the VAE in each step
    torchrun --nproc-per-node 2 benchmarks/step.py       # with DDP over two GPUs

Latents and frames are random numbers on the device: data and decoding are not part of this.
"""

import argparse
import gc
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile

from xdimo.data.vae import encode
from xdimo.data.vae import load as load_vae
from xdimo.load import load, load_hardware
from xdimo.model.diffusion import Diffusion
from xdimo.model.flops import model_flops
from xdimo.spec import RunSpec, plan, resolve
from xdimo.train import loop
from xdimo.train.checkpoint import State
from xdimo.train.ledger import KERNELS, kernel_kind
from xdimo.train.step import EAGER_STEPS, Step

ROOT = Path(__file__).parent.parent
NOWHERE = "sha256:" + "0" * 64


def spec_of(clips: int, implementation: str, world: int, mode: str = "cached") -> RunSpec:
    config = {
        "hardware": str(ROOT / "config/hardware.yaml"),
        "train": {"implementation": implementation, "precision": "bf16"},
    }
    bench = load(ROOT / "config/config.yaml", config)
    base = resolve(plan(bench, "gpu_h200-bs1-r1"), NOWHERE, None).to_json()
    data = {
        **base["data"],
        "mode": mode,
        "latents": base["data"]["latents"] if mode == "cached" else None,
    }
    changed = {"clips_per_gpu": clips, "gpus": world, "data": data}
    return RunSpec.model_validate({**base, **changed})


def parts(spec: RunSpec, device: torch.device) -> tuple[Any, ...]:
    torch.manual_seed(0)
    model, ema = loop.build(spec).to(device), loop.build(spec).to(device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    state = State(model, ema, loop._optimizer(spec, model), generator)
    vae = None
    if spec.data.mode == "online":
        compiled = spec.implementation != "reference"
        vae = load_vae(spec.vae, None, device, torch.bfloat16, compiled=compiled)
    return state, loop._distributed(spec, model, device), Diffusion().to(device), vae


def batch_of(spec: RunSpec, device: torch.device) -> dict[str, torch.Tensor]:
    side, frames = spec.latent_size, spec.data.frames
    if spec.data.mode == "online":
        pixels = (spec.clips_per_gpu, frames, 3, spec.data.size, spec.data.size)
        return {"frames": torch.randint(256, pixels, device=device, dtype=torch.uint8)}
    shape = (spec.clips_per_gpu, frames, spec.vae.latent_channels, side, side)
    mean = torch.randn(shape, device=device, dtype=torch.float16) * 5
    return {"mean": mean, "std": torch.rand_like(mean) * 0.1}


def measure(spec: RunSpec, device: torch.device, steps: int) -> dict[str, float]:
    torch.cuda.reset_peak_memory_stats()
    step, batch = loop.stepper(spec, *parts(spec, device)), batch_of(spec, device)
    for _ in range(EAGER_STEPS + 4):
        step(batch, False)
    torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        loss, _ = step(batch, False)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / steps
    assert torch.isfinite(loss)
    return {
        "step_s": seconds,
        "clips_per_s": spec.global_batch / seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }


def vae_rate(spec: RunSpec, device: torch.device, frames: int, compiled: bool) -> float:
    """Frames encoded a second, ``frames`` at once."""
    vae = load_vae(spec.vae, None, device, torch.bfloat16, compiled=compiled)
    shape = (frames, 3, spec.data.size, spec.data.size)
    pixels = torch.randint(256, shape, device=device, dtype=torch.uint8)
    for _ in range(3):
        encode(vae, pixels)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(10):
        encode(vae, pixels)
    torch.cuda.synchronize()
    return 10 * frames / (time.perf_counter() - started)


def shares(spec: RunSpec, device: torch.device) -> Counter[str]:
    """Milliseconds of each kind of kernels in one step, run as it stands."""
    step, batch = Step(spec, *parts(spec, device)), batch_of(spec, device)
    for _ in range(4):
        step(batch, False)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step(batch, False)
        torch.cuda.synchronize()
    found: Counter[str] = Counter()
    for event in profiler.key_averages():
        found[kernel_kind(event.key)] += event.self_device_time_total / 1e3
    return found


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 32])
    arguments.add_argument("--implementations", nargs="+", default=["reference", "fused"])
    arguments.add_argument("--online", type=int, nargs="*", default=[], metavar="BATCH")
    arguments.add_argument("--vae", type=int, nargs="*", default=[], metavar="FRAMES")
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--profile", type=int, nargs="*", default=[1, 32], metavar="BATCH")
    asked = arguments.parse_args()
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    if world > 1:
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        dist.init_process_group("nccl")
    name = torch.cuda.get_device_name(device)
    peak = load_hardware(ROOT / "config/hardware.yaml").tensor_peak_tflops(name)
    rows, profiles = [], []
    for implementation in asked.implementations:
        cells = [(clips, "cached") for clips in asked.batches]
        for clips, mode in [*cells, *((clips, "online") for clips in asked.online)]:
            spec = spec_of(clips, implementation, world, mode)
            found = measure(spec, device, asked.steps)
            print(implementation, mode, clips, found, flush=True)
            free()
            flops = model_flops(
                spec.model,
                frames=spec.data.frames,
                latent_size=spec.latent_size,
                latent_channels=spec.vae.latent_channels,
            ).training
            rate = found["clips_per_s"] * flops / 1e12
            mfu = f"{100 * rate / (world * peak):.1f} %" if peak else "n/a"
            rows.append(
                [
                    *(
                        implementation,
                        mode,
                        clips,
                        found["clips_per_s"],
                        1e3 * found["step_s"],
                        mfu,
                    ),
                    *(found["peak_gib"], found["reserved_gib"]),
                ]
            )
            if clips in asked.profile and mode == "cached":
                profiles.append([implementation, clips, shares(spec, device)])
                free()
    if rank == 0:
        print(f"{world} x {name}, torch {torch.__version__}, S/2 4E2A, bf16")
        heads = ["implementation", "latents", "clips/GPU", "clips/s", "step ms", "MFU", "peak GiB"]
        print(tabulate(rows, [*heads, "reserved GiB"], floatfmt=".2f"))
        print("\nkernel ms of one step, not captured")
        table = [
            [implementation, clips, *(found[kind] for kind in KERNELS), sum(found.values())]
            for implementation, clips, found in profiles
        ]
        print(tabulate(table, ["implementation", "clips", *KERNELS, "sum"], floatfmt=".1f"))
        for frames in asked.vae:
            rates = [vae_rate(spec_of(1, "fused", world), device, frames, c) for c in (False, True)]
            print(f"VAE, {frames} frames at once: {rates[0]:.0f} frames/s, compiled {rates[1]:.0f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
