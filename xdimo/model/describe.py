"""What a model is, in numbers: `xdimo describe S/2 --experts 4 --top-k 2 [--json]`. No torch."""

from dataclasses import asdict
from typing import Any

from xdimo.model.flops import model_flops, parameters, tokens_per_frame
from xdimo.spec import ModelSpec

# The reference computes a token's chosen experts alone, adaLN once a sample, and nothing twice.
HARDWARE_NOTE = "the reference implementation executes what the model needs, so HFU = MFU"


def describe(
    model: ModelSpec, frames: int, latent_size: int, latent_channels: int
) -> dict[str, Any]:
    """Parameters, and FLOPs of one sample, of a model on clips of ``frames`` latents."""
    shape = {"frames": frames, "latent_size": latent_size, "latent_channels": latent_channels}
    flops = model_flops(model, **shape)
    totals = {"forward": flops.forward, "training": flops.training}
    return {
        "model": model.model_dump(),
        "sample": {**shape, "tokens": frames * tokens_per_frame(model, latent_size)},
        "parameters": asdict(parameters(model, **shape)),
        "flops_per_sample": {
            "model": {**totals, "forward_parts": asdict(flops)},
            "hardware": {**totals, "implementation": "reference", "note": HARDWARE_NOTE},
        },
    }


def text(description: dict[str, Any]) -> str:
    """The same for a person: parameters whole, FLOPs in 10^9 (G)."""
    model, sample = description["model"], description["sample"]
    counts, flops = description["parameters"], description["flops_per_sample"]
    experts = (
        f"{model['experts']} experts, top-{model['top_k']}" if model["experts"] > 1 else "dense"
    )
    title = (
        f"Latte-{model['size']}, {experts}: "
        f"depth {model['depth']}, width {model['width']}, heads {model['heads']}"
    )
    size = sample["latent_size"]
    clip = (
        f"sample: {sample['frames']} frames of {sample['latent_channels']} x {size} x {size}, "
        f"{sample['tokens']:,} tokens"
    )
    lines = [title, clip, "", "parameters"]
    lines += [f"  {name:<16}{count:>14,}" for name, count in counts.items()]
    lines += ["", "model FLOPs a sample (2 per multiply-add), G"]
    parts = flops["model"]["forward_parts"]
    lines += [_row(name, value) for name, value in parts.items()]
    lines += [_row(name, flops["model"][name]) for name in ("forward", "training")]
    hardware = flops["hardware"]
    lines += ["", f"hardware FLOPs a sample, {hardware['implementation']}, G"]
    lines += [_row(name, hardware[name]) for name in ("forward", "training")]
    lines += [f"  ({hardware['note']})"]
    return "\n".join(lines)


def _row(name: str, flops: int) -> str:
    return f"  {name.replace('_', ' '):<16}{flops / 1e9:>14,.2f}"
