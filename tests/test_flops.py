"""Closed forms against what torch counts, against known figures, and against the documentation."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from xdimo.config.load import load_hardware
from xdimo.config.schema import SIZES
from xdimo.implementations import IMPLEMENTATIONS
from xdimo.model import moe
from xdimo.model.dense import DenseLatte
from xdimo.model.describe import describe, text
from xdimo.model.flops import hardware_flops, model_flops, parameters
from xdimo.model.latte import Latte
from xdimo.spec import ModelSpec

ROOT = Path(__file__).parent.parent
SHAPE = {"frames": 16, "latent_size": 32, "latent_channels": 4}
ROUTINGS = [(1, 1), (2, 1), (4, 2)]
VARIANTS = [(size, *routing) for size in SIZES for routing in ROUTINGS]


def spec(size, experts, top_k):
    depth, width, heads = SIZES[size]
    return ModelSpec(
        size=size, depth=depth, width=width, heads=heads, patch=2, experts=experts, top_k=top_k
    )


def route_evenly(monkeypatch, model):
    """Replaces the one step that the meta device cannot do: looking at the choices.

    Dropless routing gives each token k rows however they fall, so an even share counts the same.
    """

    def assigned(experts_TK, expert):
        rows = experts_TK.new_empty(experts_TK.numel() // model.experts)
        return rows, rows

    monkeypatch.setattr(moe, "assigned", assigned)


def counted(model, *, frames, latent_size, latent_channels, device, batch=1, backward=False):
    x = torch.zeros(batch, frames, latent_channels, latent_size, latent_size, device=device)
    with FlopCounterMode(display=False) as counter:
        output = model(x, torch.zeros(batch, dtype=torch.int64, device=device))
        if backward:
            output.sum().backward()
    return counter.get_total_flops() / batch


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_closed_forms_equal_what_torch_counts(variant, monkeypatch):
    model = spec(*variant)
    route_evenly(monkeypatch, model)
    with torch.device("meta"):
        network = Latte(model, **SHAPE)
    flops = counted(network, **SHAPE, device="meta")
    assert flops == model_flops(model, **SHAPE).forward

    expected = parameters(model, **SHAPE)
    sizes = {name: p.numel() for name, p in network.named_parameters()}
    assert sum(sizes.values()) == expected.total
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == expected.trainable
    idle = [f".experts.{e}." for e in range(model.top_k, model.experts)]
    active = {name: n for name, n in sizes.items() if not any(e in name for e in idle)}
    assert sum(active.values()) == expected.active


@pytest.mark.parametrize("routing", ROUTINGS)
def test_training_is_three_forwards_within_a_thousandth(routing, monkeypatch):
    """Less than 3: nothing needs the gradient of the patches or of the timestep's waves."""
    model = spec("S/2", *routing)
    route_evenly(monkeypatch, model)
    with torch.device("meta"):
        network = Latte(model, **SHAPE)
    flops = counted(network, **SHAPE, device="meta", backward=True)
    assert flops == pytest.approx(model_flops(model, **SHAPE).training, rel=1e-3)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_what_dense_executes_is_what_torch_counts(routing):
    model = spec("S/2", *routing)
    with torch.device("meta"):
        network = DenseLatte(model, **SHAPE, compiled=False)
    executed = hardware_flops("dense", model, **SHAPE)
    assert counted(network, **SHAPE, device="meta") == executed.forward
    # On the meta device attention is torch's plain one, without q k^T once more.
    again = 6 * 4096 * 2 * 256 * model.width
    found = counted(network, **SHAPE, device="meta", backward=True)
    assert found + again == pytest.approx(executed.training, rel=1e-3)


def test_what_fused_executes():
    """At 16 frames and heads of a power of two its kernels pad nothing."""
    model = spec("S/2", 4, 2)
    needed, executed = model_flops(model, **SHAPE), hardware_flops("fused", model, **SHAPE)
    assert executed.forward == needed.forward
    # Of spatial attention three products more than needed, of temporal attention one.
    assert executed.training == needed.training + 6 * 4096 * 2 * 384 * (3 * 256 + 16)
    wide = spec("XL/2", 4, 2)  # heads of 72 channels, in tiles of 128
    needed, executed = model_flops(wide, **SHAPE), hardware_flops("fused", wide, **SHAPE)
    pairs = 256 * 16 * 16 + 16 * 256 * 256  # a head's: of frames, of positions
    assert executed.forward - needed.forward == 14 * 16 * 2 * 2 * pairs * (128 - 72)


def test_the_real_router_executes_the_same_however_tokens_fall():
    torch.manual_seed(0)
    model = ModelSpec(size="custom", depth=2, width=24, heads=3, patch=2, experts=3, top_k=2)
    shape = {"frames": 3, "latent_size": 8, "latent_channels": 2}
    network = Latte(model, **shape)
    flops = counted(network, **shape, device="cpu", batch=2)
    assert flops == model_flops(model, **shape).forward


def test_the_figures_of_the_benchmarked_model():
    sparse, dense = spec("S/2", 4, 2), spec("S/2", 1, 1)
    assert round(model_flops(sparse, **SHAPE).forward / 1e12, 4) == 0.3005
    assert round(model_flops(sparse, **SHAPE).training / 1e12, 4) == 0.9015
    assert round(model_flops(dense, **SHAPE).forward / 1e12, 4) == 0.1844
    assert round(model_flops(dense, **SHAPE).training / 1e12, 3) == 0.553
    every_expert = model_flops(spec("S/2", 4, 4), **SHAPE)
    assert round(every_expert.forward / 1e12, 4) == 0.5324
    assert round(every_expert.training / 1e12, 3) == 1.597
    assert (parameters(sparse, **SHAPE).total, parameters(sparse, **SHAPE).trainable) == (
        75_140_000,
        75_035_552,
    )
    assert (parameters(dense, **SHAPE).total, parameters(dense, **SHAPE).trainable) == (
        32_585_120,
        32_480_672,
    )


def test_description_for_people_and_programs():
    found = describe(spec("S/2", 4, 2), 16, 32, 4)
    assert found["sample"]["tokens"] == 4096
    assert found["parameters"]["active"] == 46_782_368
    flops = found["flops_per_sample"]
    assert sum(flops["model"]["forward_parts"].values()) == flops["model"]["forward"]
    assert flops["model"]["training"] == 901_506_760_704
    assert flops["hardware"].keys() == IMPLEMENTATIONS.keys()
    assert flops["hardware"]["reference"]["training"] == flops["model"]["training"]
    shown = text(found)
    for figure in ("Latte-S/2, 4 experts, top-2", "4,096 tokens", "75,140,000", "901.51"):
        assert figure in shown
    assert "Latte-S/2, dense" in text(describe(spec("S/2", 1, 1), 16, 32, 4))


def test_describing_needs_no_torch():
    code = "import sys, xdimo.model.describe; assert not {'torch', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def rows(heading):
    """Cells of the table under a heading of docs/mfu.md, without its two head lines."""
    section = (ROOT / "docs/mfu.md").read_text(encoding="utf-8").split(f"## {heading}\n")[1]
    table = re.search(r"(^\|.*\n)+", section, re.M)[0].splitlines()[2:]
    return [[cell.strip(" `*") for cell in row.strip("|").split("|")] for row in table]


def test_documented_variants_are_the_code_s():
    expected = []
    for variant in VARIANTS:
        counts, flops = (f(spec(*variant), **SHAPE) for f in (parameters, model_flops))
        size, experts, top_k = variant
        expected.append(
            [
                size,
                "dense" if experts == 1 else f"{experts}, top-{top_k}",
                *(f"{n:,}" for n in (counts.total, counts.trainable, counts.active)),
                f"{flops.forward / 1e12:.4f}",
                f"{flops.training / 1e12:.4f}",
            ]
        )
    assert rows("Models") == expected


def test_documented_hardware_flops_are_the_code_s():
    model = spec("S/2", 4, 2)
    trained = {name: hardware_flops(name, model, **SHAPE).training for name in IMPLEMENTATIONS}
    expected = [[name, f"{flops / 1e12:.4f}"] for name, flops in trained.items()]
    assert [row[:2] for row in rows("Hardware FLOPs of a sample")] == expected


def test_documented_chain_is_arithmetic():
    d, layers, f, s = 384, 12, 16, 256
    n = f * 32 * 32
    wrong = 3 * layers * (4 * n * d**2 + 2 * n**2 * d + 8 * n * d**2)
    tokens, keys = f * s, (s + f) / 2

    def step(attention_keys, mlps):
        return 6 * layers * tokens * (4 * d**2 + 2 * attention_keys * d + 8 * mlps * d**2)

    links = [wrong, 2 * wrong, step(tokens, 1), step(keys, 1), step(keys, 2)]
    links.append(model_flops(spec("S/2", 4, 2), **SHAPE).training)
    digits = [3, 3, 3, 3, 4, 4]
    expected = [f"{link / 1e12:.{k}f}" for link, k in zip(links, digits, strict=True)]
    assert [row[0] for row in rows("The two historical claims")] == expected


def test_documented_peaks_are_those_of_the_config():
    cards = load_hardware(ROOT / "config/hardware.yaml").cards
    expected = [
        [
            device.removeprefix("NVIDIA "),
            f"{card.declared_peak_tflops:g}" if card.declared_peak_tflops else "-",
            f"{peak:g}",
        ]
        for card in cards.values()
        for device, peak in card.devices.items()
    ]
    assert [row[:3] for row in rows("Peaks")] == expected


def test_documented_example_follows_from_its_inputs():
    (inputs, rate, declared, tensor), *_ = rows("Worked example")
    steps, batch, gpus = (float(n) for n in re.findall(r"[\d.]+", inputs))
    achieved = steps * batch * model_flops(spec("S/2", 4, 2), **SHAPE).training / 1e12
    card = load_hardware(ROOT / "config/hardware.yaml").cards["rtx6000ada"]
    (peak,) = card.devices.values()
    assert rate == f"{achieved:.1f} TFLOP/s"
    assert declared == f"{achieved / gpus / card.declared_peak_tflops:.2%}".replace("%", " %")
    assert tensor == f"{achieved / gpus / peak:.2%}".replace("%", " %")
