"""What a model is, in numbers: `xdimo describe S/2 --experts 4 --top-k 2 [--json]`. No torch."""

from dataclasses import asdict
from typing import Any

from xdimo.implementations import Name
from xdimo.model.flops import hardware_flops, model_flops, parameters, tokens_per_frame
from xdimo.spec import ModelSpec

# docs/mfu.md has the formulas.
EXECUTES: dict[Name, str] = {
    "reference": "what the model needs",
    "dense": "all experts; q k^T of spatial attention once more",
    "fused": "q k^T once more, spatial attention three products; rows that fill up tiles apart: "
    "below 128 an expert and layer",
}


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
            "hardware": {
                name: {**asdict(hardware_flops(name, model, **shape)), "executes": executes}
                for name, executes in EXECUTES.items()
            },
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
    lines += ["", "hardware FLOPs a sample, training, G"]
    lines += [
        f"{_row(name, executed['training'])}  ({executed['executes']})"
        for name, executed in flops["hardware"].items()
    ]
    return "\n".join(lines)


def _row(name: str, flops: int) -> str:
    return f"  {name.replace('_', ' '):<16}{flops / 1e9:>14,.2f}"
