"""The training step on this machine's GPU: all implementations side by side, in one run.

    python benchmarks/step.py [--batches 1 4 8 32] [--implementations reference dense fused]
    python benchmarks/step.py --online 4 32              # frames through the VAE in each step
    torchrun --nproc-per-node 2 benchmarks/step.py       # over two GPUs

Latents and frames are random numbers on the device: loading and decoding are not part of this. What
cannot run says why in its row; a kernel that broke the device takes the rows behind it along.
"""

import argparse
import gc
import os
import time
from collections import Counter
from itertools import repeat
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from tabulate import tabulate

from xdimo.config.load import load, load_hardware
from xdimo.data.vae import encode
from xdimo.data.vae import load as load_vae
from xdimo.implementations import Name
from xdimo.model.flops import model_flops
from xdimo.spec import RunSpec, plan, resolve
from xdimo.train import loop
from xdimo.train.failure import first_line
from xdimo.train.instruments.profiled import window
from xdimo.train.instruments.step_breakdown import KERNELS, PARTS, kernel_kind
from xdimo.train.instruments.step_timer import Clock
from xdimo.train.step import EAGER_STEPS
from xdimo.train.timing import parts, random_batch, step_s

ROOT = Path(__file__).parent.parent
NOWHERE = "sha256:" + "0" * 64
Shares = dict[str, float]  # of ledger.PARTS


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


def measure(spec: RunSpec, device: torch.device, steps: int) -> dict[str, float]:
    torch.cuda.reset_peak_memory_stats()
    seconds = step_s(spec, device, steps)
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


def profiled(spec: RunSpec, device: torch.device, keep: bool) -> tuple[Shares, Counter[str]]:
    """Shares of a step's parts as it is timed; of one step as it stands the milliseconds of each
    kind of kernels, their sum and their number. Collective; both empty on ranks that do not
    ``keep`` them.
    """
    take_step, batch = loop.stepper(spec, *parts(spec, device)), random_batch(spec, device)
    for _ in range(EAGER_STEPS + 4):
        take_step(batch, False)
    ledger, events = window(take_step, repeat(batch), 3, False, Clock(device), keep=keep)
    kinds: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "kernel":
            for kind in (kernel_kind(event["name"]), "sum"):
                kinds[kind] += event["dur"] / 1e3
            kinds["kernels"] += 1
    return ledger["shares"] if ledger else {}, kinds


def free() -> None:
    torch._dynamo.reset()  # it keeps few graphs of a function, and each batch is another
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--batches", type=int, nargs="*", default=[1, 4, 8, 32])
    arguments.add_argument("--implementations", nargs="*", default=get_args(Name))
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
            row: list[Any] = [implementation, mode, clips]
            rows.append(row)
            try:
                found = measure(spec, device, asked.steps)
            except Exception as error:  # CUDA's, Triton's or the compiler's
                row.append(f"{type(error).__name__}: {first_line(error)[:80]}")
                continue
            finally:
                free()
            print(implementation, mode, clips, found, flush=True)
            flops = model_flops(
                spec.model,
                frames=spec.data.frames,
                latent_size=spec.latent_size,
                latent_channels=spec.vae.latent_channels,
            ).training
            rate = found["clips_per_s"] * flops / 1e12
            mfu = f"{100 * rate / (world * peak):.1f} %" if peak else "n/a"
            row += [found["clips_per_s"], 1e3 * found["step_s"], mfu]
            row += [found["peak_gib"], found["reserved_gib"]]
            if clips in asked.profile:
                try:
                    profiles.append([*row[:3], *profiled(spec, device, keep=rank == 0)])
                except Exception as error:
                    row.append(f"no profile: {type(error).__name__}: {first_line(error)[:60]}")
                finally:
                    free()
    if rank == 0:
        print(f"{world} x {name}, torch {torch.__version__}, S/2 4E2A, bf16")
        heads = ["implementation", "latents", "clips/GPU", "clips/s", "step ms", "MFU", "peak GiB"]
        print(tabulate(rows, [*heads, "reserved GiB", ""], floatfmt=".2f"))
        print("\nshares of the step in a profiled window, %; an all-reduce where nothing hides it")
        table = [
            [*row, *(100 * told[part] for part in PARTS if told)] for *row, told, _ in profiles
        ]
        print(tabulate(table, [*heads[:3], *PARTS], floatfmt=".1f"))
        print("\nkernel ms of one step, not captured")
        table = [
            [*row, *(kinds[kind] for kind in (*KERNELS, "sum", "kernels"))]
            for *row, _, kinds in profiles
        ]
        print(tabulate(table, [*heads[:3], *KERNELS, "sum", "kernels"], floatfmt=".2f"))
        for frames in asked.vae:
            rates = [vae_rate(spec_of(1, "fused", world), device, frames, c) for c in (False, True)]
            print(f"VAE, {frames} frames at once: {rates[0]:.0f} frames/s, compiled {rates[1]:.0f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
