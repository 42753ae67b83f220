"""How exact the fast implementations are on this machine's GPU, beside the reference.

    python benchmarks/exact.py
    python benchmarks/exact.py --curves config/lent.yaml --figure docs/loss_curves.png
    python benchmarks/exact.py --overfit config/lent.yaml

Each part, and two blocks as a whole, in bfloat16 against float64, as relative errors of output and
gradients. With --curves: loss of all implementations over 200 steps on the same clips of a config,
and the same noise. With --overfit: what the loss of its model falls to on 8 of them. Both want the
config's latents to be there: snakemake --configfile <config> -- <results>/data/latents/index.json
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from matplotlib import pyplot as plt
from step import spec_of
from tabulate import tabulate
from torch import Tensor, nn

from xdimo.config.load import load
from xdimo.data import clips
from xdimo.data.vae import locate
from xdimo.errors import UserError
from xdimo.implementations import Name, refusal
from xdimo.model import latte, moe
from xdimo.model.dense import dense_mixture
from xdimo.model.fused import network as fused
from xdimo.model.fused.temporal import temporal_attention
from xdimo.spec import ModelSpec, RunSpec, dataset_in, plan, resolve
from xdimo.train import loop
from xdimo.train.timing import losses

STEPS = 200
CLIPS = 4
OVERFIT_STEPS, OVERFIT_CLIPS = 1000, 8
WIDTH, HEADS, FRAMES, POSITIONS = 384, 6, 16, 64


def errors(
    run: Callable[[Any, Tensor], Tensor],
    module: Any,
    x: Tensor,
    upstream: Tensor,
    exact: list[Tensor],
) -> tuple[list[Tensor], list[float]]:
    """Output and gradients of x and all parameters, and their relative errors."""
    inputs = x.clone().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.float32):
        out = run(module, inputs)
    parameters = [p for _, p in trained(module)]
    found = [out, *torch.autograd.grad(out, [inputs, *parameters], upstream.to(out.dtype))]
    relative = [
        float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=False)
    ]
    return found, relative


def trained(module: Any) -> list[tuple[str, Tensor]]:
    """Parameters by name; none of what is a function."""
    named = module.named_parameters() if module is not None else []
    return [(name, parameter) for name, parameter in named if parameter.requires_grad]


def compare(
    name: str,
    module: Any,
    reference: Any,
    candidate: Any,
    x: Tensor,
    upstream: Tensor,
    same: Any = None,
) -> list[Any]:
    """The largest ratio of errors over output and gradients, and both errors there.

    ``same``: what the candidate runs instead of ``module``, with the same weights.
    """
    double = copy.deepcopy(module).double() if module is not None else None
    exact, _ = errors(reference, double, x.double(), upstream.double(), [])
    _, theirs = errors(reference, module, x, upstream, exact)
    _, ours = errors(candidate, same or module, x, upstream, exact)
    names = ["output", "input", *(name for name, _ in trained(module))]
    rows = zip(ours, theirs, names, strict=True)
    ratio, ours_there, theirs_there, where = max((a / b, a, b, c) for a, b, c in rows)
    return [f"{name}: {where}", f"{theirs_there:.2e}", f"{ours_there:.2e}", f"{ratio:.2f}"]


class Experts(nn.Module):
    """A block's mixture alone; its router routes as float64 does, so that no choice differs."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = 2
        self.gate = nn.Linear(WIDTH, 4, bias=False)
        self.experts = nn.ModuleList(latte.mlp(WIDTH) for _ in range(4))


def mixture(block: Any, x: Tensor) -> Tensor:
    """The fused mixture alone: added to zeros, with a gate of one."""
    ones = torch.ones(1, WIDTH, device=x.device, dtype=torch.bfloat16)
    h, zeros = x.bfloat16()[None], torch.zeros_like(ones)
    chosen = fused.dispatch(block, h)
    x = torch.zeros_like(x)[None]
    return fused.mixture_residual_norm(x, h, *chosen, ones, zeros, zeros)[0][0]


def attention(qkv: Tensor) -> Tensor:
    b, f, t, _ = qkv.shape
    split = qkv.view(b, f, t, 3, HEADS, WIDTH // HEADS).permute(3, 0, 2, 4, 1, 5)
    return latte.attention(*split).permute(0, 3, 1, 2, 4).reshape(b, f, t, WIDTH)


def networks(device: torch.device) -> dict[str, latte.Latte]:
    """Two blocks of S/2, embeddings and final layer, with the same weights in each implementation.

    Without a router, whose choices flip: that is no rounding.
    """
    size = ModelSpec(size="custom", depth=2, width=WIDTH, heads=HEADS, patch=2, experts=1, top_k=1)
    found: dict[str, latte.Latte] = {}
    for name in get_args(Name):
        if refusal(name, device.type, "bf16", deterministic=False):
            continue
        spec = spec_of(1, name, 1).model_copy(update={"model": size, "device": device.type})
        made = loop.build(spec).to(device)
        for parameter in made.parameters():  # adaLN-zero would hide the blocks
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.05)
        if found:
            made.load_state_dict(found["reference"].state_dict())
        found[name] = made
    return found


def denoise(network: latte.Latte, x: Tensor) -> Tensor:
    """All of a network; in float64 its waves of the diffusion step, float32 by themselves, too."""
    embed = network.t_embedder.mlp
    cast = embed.register_forward_pre_hook(lambda _, given: (given[0].to(x.dtype),))
    try:
        return network(x, torch.tensor([3, 700], device=x.device))
    finally:
        cast.remove()


def separated(x: Tensor, gate: nn.Linear) -> Tensor:
    """Tokens whose second and third logit differ by far more than bfloat16 rounds."""
    logits = gate(x).sort(descending=True).values
    return x[(logits[:, 1] - logits[:, 2]) > 0.05]


def curves(spec: RunSpec, batches: list[dict[str, Any]]) -> dict[Name, Tensor]:
    """Loss of each implementation's steps on these batches in turn, [STEPS]."""
    device = torch.device(spec.device)
    return {
        name: losses(spec.model_copy(update={"implementation": name}), batches, device, STEPS)
        for name in get_args(Name)
        if not refusal(name, spec.device, spec.precision, spec.deterministic)
    }


def table_of(found: dict[Name, Tensor]) -> list[list[Any]]:
    rows = []
    for first in range(0, STEPS, 40):
        part = slice(first, first + 40)
        rows += [
            [
                f"{first + 1} to {first + 40}",
                name,
                curve[part].mean(),
                (curve - found["reference"])[part].abs().max(),
            ]
            for name, curve in found.items()
        ]
    return rows


def draw(found: dict[Name, Tensor], title: str, path: Path) -> None:
    """The curves, and below how far each step's loss is from the reference's."""
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
    steps = range(1, STEPS + 1)
    for number, (name, curve) in enumerate(found.items()):
        look = {"label": name, "color": f"C{number}", "linewidth": 1}
        above.plot(steps, curve, **look)
        if name != "reference":
            below.plot(steps, (curve - found["reference"]).abs(), **look)
    above.set_ylabel("loss")
    below.set(xlabel="step", ylabel="distance to the reference", yscale="log")
    above.set_title(title, fontsize=10)
    above.legend()
    below.legend()
    figure.savefig(path, dpi=150)


def unit_latents(batch: dict[str, Any], spec: RunSpec) -> dict[str, Any]:
    """The posterior's means, of variance 1 in each channel, as a trained VAE's are: those of a
    random one hardly differ from clip to clip, and its posterior is broad.
    """
    mean = batch["mean"].float()
    axes = (0, 1, 3, 4)  # clips, frames, latent positions
    mean = (mean - mean.mean(axes, keepdim=True)) / mean.std(axes, keepdim=True)
    return {**batch, "mean": mean / spec.vae.scaling_factor, "std": torch.zeros_like(mean)}


def real_clips(config: Path, clips_per_batch: int, steps: int) -> tuple[str, RunSpec, list[Any]]:
    """The dataset's name, a spec of the config's model on one device, and as many batches."""
    bench = load(config)
    if bench.latents.mode != "cached":
        raise UserError(f"{config}: latents.mode: {bench.latents.mode}; expected cached")
    data = Path(bench.results) / "data"
    planned = plan(bench, f"{bench.baseline}-r1")
    weights = None if bench.vae.random else locate(Path(bench.vae.weights))[1]
    spec = resolve(planned, str(dataset_in(data / "manifest.json")), weights)
    spec = spec.model_copy(update={"gpus": 1, "clips_per_gpu": clips_per_batch})
    index = data / "latents/index.json"
    loader = clips.loader(spec, rank=0, first_step=0, steps=steps, data=index, videos=None)
    loop.set_arithmetic(spec)
    return bench.dataset.name, spec, [unit_latents(batch, spec) for batch in loader]


def overfit(config: Path, steps: int) -> str:
    """Loss of the config's model over ``steps`` steps on 8 of its clips, on one device."""
    dataset, spec, batches = real_clips(config, OVERFIT_CLIPS, 1)
    curve = losses(spec, batches, torch.device(spec.device), steps)
    first, last = (float(part.mean()) for part in (curve[:10], curve[-100:]))
    return (
        f"overfit: {spec.model.size} {spec.model.experts}E{spec.model.top_k}A, "
        f"{spec.implementation}, {spec.precision}, {OVERFIT_CLIPS} clips of {dataset}: "
        f"loss {first:.4f} over the first 10 steps, {last:.4f} over the last 100 of {steps}"
    )


def show_curves(config: Path, figure: Path | None) -> None:
    dataset, spec, batches = real_clips(config, CLIPS, STEPS)
    title = f"{spec.model.size} {spec.model.experts}E{spec.model.top_k}A, {spec.precision}, "
    title += f"{CLIPS} clips of {dataset} a step, same clips and noise"
    found = curves(spec, batches)
    print(title)
    heads = ["steps", "implementation", "loss", "largest difference of a step"]
    print(tabulate(table_of(found), heads, floatfmt=".4f"))
    if figure:
        draw(found, title, figure)


def show_parts(device: torch.device) -> None:
    torch.manual_seed(0)
    experts = Experts().to(device)
    x = separated(torch.randn(5000, WIDTH, device=device), experts.gate)
    qkv = torch.randn(2, FRAMES, POSITIONS, 3 * WIDTH, device=device)
    upstream = torch.randn_like(x)
    mixtures = {
        "dense": lambda m, x: dense_mixture(x, m.gate, m.experts, m.top_k),
        "fused": mixture,
    }
    plain, *others = networks(device).items()
    latents = torch.randn(2, FRAMES, 4, 32, 32, device=device)
    noise = torch.randn(2, FRAMES, 8, 32, 32, device=device)
    rows = [
        *(
            compare(f"{name} network", plain[1], denoise, denoise, latents, noise, same)
            for name, same in others
        ),
        *(
            compare(
                f"{name} experts, {len(x)} tokens",
                experts,
                lambda m, x: moe.mixture(x, m.gate, m.experts, m.top_k),
                candidate,
                x,
                upstream,
            )
            for name, candidate in mixtures.items()
        ),
        compare(
            "fused temporal attention",
            None,
            lambda _, x: attention(x.bfloat16() if x.dtype == torch.float32 else x),
            lambda _, x: temporal_attention(x.bfloat16().contiguous(), HEADS),
            qkv,
            torch.randn(2, FRAMES, POSITIONS, WIDTH, device=device),
        ),
    ]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; relative errors in bfloat16")
    print(tabulate(rows, ["part (worst of output, gradients)", "reference", "it", "ratio"]))


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--curves", type=Path, metavar="CONFIG")
    arguments.add_argument("--figure", type=Path, help="PNG of the curves to write")
    arguments.add_argument("--overfit", type=Path, metavar="CONFIG")
    arguments.add_argument("--steps", type=int, default=OVERFIT_STEPS, help="of --overfit")
    asked = arguments.parse_args()
    if asked.overfit:
        print(overfit(asked.overfit, asked.steps))
    elif asked.curves:
        show_curves(asked.curves, asked.figure)
    else:
        show_parts(torch.device("cuda"))


if __name__ == "__main__":
    main()
