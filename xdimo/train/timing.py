"""How fast a spec's step is on random latents: no data, no record.

`python -m xdimo.train.timing < spec.json` prints it as JSON; `xdimo choose` runs that, a process
for each candidate, because a kernel that fails may take the process's device with it.
"""

import json
import sys
import time
import traceback
from typing import Any

import torch

from xdimo.config.load import parse
from xdimo.data.vae import load as load_vae
from xdimo.model.diffusion import Diffusion
from xdimo.spec import RunSpec
from xdimo.train import distributed, loop
from xdimo.train.checkpoint import State
from xdimo.train.failure import first_line
from xdimo.train.instruments.step_timer import Clock
from xdimo.train.step import EAGER_STEPS

STEPS = 20  # timed, after those that compile and capture


def parts(spec: RunSpec, device: torch.device) -> tuple[Any, ...]:
    """What ``loop.stepper`` wants besides the spec; a VAE in online mode, random."""
    torch.manual_seed(spec.seed)
    model, ema = loop.build(spec).to(device), loop.build(spec).to(device).requires_grad_(False)
    ema.load_state_dict(model.state_dict())
    generator = torch.Generator(device).manual_seed(spec.seed)
    state = State(model, ema, loop.optimizer_of(spec, model, ema), generator)
    vae = None
    if spec.data.mode == "online":
        dtype = torch.bfloat16 if spec.precision == "bf16" else torch.float32
        vae = load_vae(spec.vae, None, device, dtype, compiled=spec.captured)
    diffusion = Diffusion(compiled=spec.implementation == "fused").to(device)
    return state, loop.data_parallel(spec, model, device), diffusion, vae


def random_batch(spec: RunSpec, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch as the loader gives it: latents' mean and std, or frames in online mode."""
    side, frames = spec.latent_size, spec.data.frames
    if spec.data.mode == "online":
        pixels = (spec.clips_per_gpu, frames, 3, spec.data.size, spec.data.size)
        return {"frames": torch.randint(256, pixels, device=device, dtype=torch.uint8)}
    shape = (spec.clips_per_gpu, frames, spec.vae.latent_channels, side, side)
    mean = torch.randn(shape, device=device).half() * 5
    return {"mean": mean, "std": torch.rand(shape, device=device).half() * 0.1}


def losses(
    spec: RunSpec, batches: list[dict[str, Any]], device: torch.device, steps: int
) -> torch.Tensor:
    """Of each of ``steps`` steps, [steps] on the CPU; the batches in turn."""
    take_step = loop.stepper(spec, *parts(spec, device))
    taken = [take_step(batches[i % len(batches)], False)[0].clone() for i in range(steps)]
    return torch.stack(taken).cpu()


def step_s(spec: RunSpec, device: torch.device, steps: int = STEPS) -> float:
    """Seconds a step, over ``steps`` of them. Collective. Raises whatever the step raises."""
    take_step, batch = loop.stepper(spec, *parts(spec, device)), random_batch(spec, device)
    clock = Clock(device)
    for _ in range(EAGER_STEPS + 4):
        take_step(batch, False)
    clock.together()
    started = time.perf_counter()
    for _ in range(steps):
        loss, _ = take_step(batch, False)
    clock.together()
    seconds = time.perf_counter() - started
    if not torch.isfinite(loss):
        raise FloatingPointError(f"loss {float(loss)} after {EAGER_STEPS + 4 + steps} steps")
    return seconds / steps


def main() -> None:
    spec = parse(RunSpec, json.load(sys.stdin))
    try:
        loop.set_arithmetic(spec)
        _, device = distributed.join(spec.device)
        rate = spec.clips_per_gpu / step_s(spec, device)
    except Exception as error:
        traceback.print_exc()
        print(json.dumps({"error": f"{type(error).__name__}: {first_line(error)}"}))
    else:
        card = distributed.device_name(device)
        print(json.dumps({"clips_per_s": rate, "device": card, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
