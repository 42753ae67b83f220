"""The model: public names and shapes, which axis a block mixes, its start, its gradients."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from xdimo.model.latte import Latte, attention
from xdimo.spec import ModelSpec

NAMES = Path(__file__).parent / "data" / "latte_xl2_names.txt"
PUBLIC = [
    -0.36411, -0.99270, -0.71977, 0.58519, -1.00672, -0.28222, -0.85520, 0.90662,
    -0.72492, 0.08749, -0.01501, 0.74057, 0.58054, -0.90614, -0.79143, 0.72514,
    0.28924, -0.57143, -0.77595, 0.31494, -0.83634, -0.39646, 1.50360, 0.32317,
]  # fmt: skip
FRAMES, SIZE, CHANNELS = 3, 6, 4  # 3 x 3 tokens a frame


def tiny(depth=2, experts=4, top_k=2):
    """A small model in which every parameter but the tables is random: none is left at zero."""
    torch.manual_seed(7)
    spec = ModelSpec(
        size="custom", depth=depth, width=24, heads=3, patch=2, experts=experts, top_k=top_k
    )
    model = Latte(spec, latent_size=SIZE, latent_channels=CHANNELS, frames=FRAMES)
    for parameter in trainable(model).values():
        nn.init.normal_(parameter, std=0.1)
    return model


def trainable(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def clips(b=2):
    x = torch.randn(b, FRAMES, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([3, 977])[:b]


def on_meta(size, depth, width, heads, experts, top_k):
    spec = ModelSpec(
        size=size, depth=depth, width=width, heads=heads, patch=2, experts=experts, top_k=top_k
    )
    with torch.device("meta"):
        return Latte(spec, latent_size=32, latent_channels=4, frames=16)


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def published(depth):
    rows = [r.split() for r in NAMES.read_text().splitlines() if not r.startswith("#")]
    return {
        name.replace(".N.", f".{n}."): tuple(int(side) for side in shape.split("x"))
        for name, shape in rows
        for n in range(depth if ".N." in name else 1)
    }


def test_a_published_checkpoint_loads_strictly():
    model = on_meta("XL/2", 28, 1152, 16, experts=1, top_k=1)
    names = published(28)
    assert len(names) == 292
    assert shapes(model) == names
    state = {name: torch.empty(shape, device="meta") for name, shape in names.items()}
    model.load_state_dict(state, strict=True)


def test_output_is_the_public_model_s():
    """Every 131st value that the source named in NAMES gives for these weights: it fixes the
    order of heads, tokens, patches and channels, which names and shapes leave open."""
    spec = ModelSpec(size="custom", depth=4, width=24, heads=3, patch=2, experts=1, top_k=1)
    model = Latte(spec, latent_size=8, latent_channels=4, frames=3)
    with torch.no_grad():
        for i, (_, p) in enumerate(sorted(model.named_parameters())):
            if p.requires_grad:
                p.copy_((wave(p.numel(), 0.7, i) / 5).view_as(p))
    x = wave(2 * 3 * 4 * 8 * 8, 0.3, 0).float().view(2, 3, 4, 8, 8)
    output = model(x, torch.tensor([3, 977]))
    assert output.shape == (2, 3, 8, 8, 8)
    torch.testing.assert_close(output.flatten()[::131], torch.tensor(PUBLIC), atol=1e-4, rtol=1e-4)


def wave(length, step, offset):
    return torch.sin(step * torch.arange(length, dtype=torch.float64) + offset)


def test_with_experts_only_the_mlp_has_other_names():
    dense, sparse = (shapes(on_meta("S/2", 12, 384, 6, *experts)) for experts in ((1, 1), (4, 2)))
    mlps = {name for name in dense if ".mlp." in name and name.startswith("blocks.")}
    expected = {name: shape for name, shape in dense.items() if name not in mlps}
    for n in range(12):
        expected[f"blocks.{n}.gate.weight"] = (4, 384)
        for e in range(4):
            expected |= {
                f"blocks.{n}.experts.{e}.fc1.weight": (1536, 384),
                f"blocks.{n}.experts.{e}.fc1.bias": (1536,),
                f"blocks.{n}.experts.{e}.fc2.weight": (384, 1536),
                f"blocks.{n}.experts.{e}.fc2.bias": (384,),
            }
    assert sparse == expected


def test_position_tables_are_fixed_sines_and_cosines():
    model = tiny()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["pos_embed", "temp_embed"]

    def table(position, channels):
        angles = [position / 10_000 ** (2 * i / channels) for i in range(channels // 2)]
        return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles])

    for row in range(3):
        for column in range(3):
            expected = torch.cat([table(column, 12), table(row, 12)])
            torch.testing.assert_close(model.pos_embed[0, 3 * row + column], expected)
    for frame in range(FRAMES):
        torch.testing.assert_close(model.temp_embed[0, frame], table(frame, 24))


def test_the_first_prediction_is_zero_and_blocks_start_as_the_identity():
    torch.manual_seed(0)
    spec = ModelSpec(size="custom", depth=2, width=24, heads=3, patch=2, experts=4, top_k=2)
    model = Latte(spec, latent_size=SIZE, latent_channels=CHANNELS, frames=FRAMES)
    x, t = clips()
    assert torch.equal(model(x, t), torch.zeros(2, FRAMES, 2 * CHANNELS, SIZE, SIZE))
    tokens, c = torch.randn(2 * FRAMES, 9, 24), torch.randn(2, 24)
    for block in model.blocks:
        assert torch.equal(block(tokens, c), tokens)


def test_weights_start_as_the_public_model_s():
    torch.manual_seed(0)
    spec = ModelSpec(size="custom", depth=2, width=96, heads=3, patch=2, experts=4, top_k=2)
    model = Latte(spec, latent_size=SIZE, latent_channels=CHANNELS, frames=FRAMES)
    parameters = trainable(model)
    for name, parameter in parameters.items():
        if name.endswith("bias") or "adaLN" in name or name.startswith("final_layer"):
            assert not parameter.any(), name
        elif name.startswith("t_embedder"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
        else:  # xavier: uniform up to its bound, whose variance is 2 / (inputs + outputs)
            outputs, inputs = parameter.flatten(1).shape
            assert parameter.abs().max() <= math.sqrt(6 / (inputs + outputs)), name
            deviation = math.sqrt(2 / (inputs + outputs))
            assert parameter.std().item() == pytest.approx(deviation, rel=0.1), name


@pytest.mark.parametrize("experts", [1, 4])
@pytest.mark.parametrize("mixing", ["spatial", "temporal"])
def test_each_kind_of_block_mixes_its_own_axis_alone(mixing, experts):
    model = tiny(experts=experts, top_k=min(experts, 2))
    identity = model.blocks[1 if mixing == "spatial" else 0]
    nn.init.zeros_(identity.adaLN_modulation[1].weight)
    nn.init.zeros_(identity.adaLN_modulation[1].bias)
    x, t = clips(1)
    frame, row, column = 1, 2, 0
    touched = x.clone()
    touched[:, frame, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1
    change = (model(touched, t) - model(x, t)).abs().amax(2)[0]  # f h w
    change = change.unflatten(2, (3, 2)).unflatten(1, (3, 2)).amax((2, 4))  # f rows columns
    expected = torch.zeros(FRAMES, 3, 3, dtype=torch.bool)
    if mixing == "spatial":
        expected[frame] = True
    else:
        expected[:, row, column] = True
    assert change[expected].min() > 1e-3
    assert change[~expected].max() < 1e-5  # another grouping of an expert's rows rounds otherwise


def test_clips_of_a_batch_do_not_touch_each_other():
    """Holds only if each clip's own timestep reaches all of its sequences, in both orders."""
    model = tiny(depth=4)
    x, t = clips()
    together = model(x, t)
    for i in range(2):
        torch.testing.assert_close(together[i : i + 1], model(x[i : i + 1], t[i : i + 1]))
    assert not torch.allclose(together[:1], model(x[:1], t[1:]), atol=1e-2)


def test_only_the_temporal_table_tells_the_order_of_frames():
    model = tiny(depth=4)
    x, t = clips()
    order = torch.tensor([2, 0, 1])
    assert not torch.allclose(model(x[:, order], t), model(x, t)[:, order], atol=1e-2)
    nn.init.zeros_(model.temp_embed)
    torch.testing.assert_close(model(x[:, order], t), model(x, t)[:, order], atol=1e-4, rtol=1e-4)


def test_attention_equals_torch_s_own():
    q, k, v = torch.randn(3, 5, 2, 7, 4, dtype=torch.float64)
    expected = nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attention(q, k, v), expected)


@pytest.mark.parametrize("experts", [1, 4])
@pytest.mark.parametrize("bf16", [False, True])
def test_every_trainable_parameter_gets_a_gradient(experts, bf16):
    model = tiny(experts=experts, top_k=min(experts, 2))
    x, t = clips()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = model(x, t)
    assert output.shape == (2, FRAMES, 2 * CHANNELS, SIZE, SIZE)
    output.float().square().mean().backward()
    for name, parameter in trainable(model).items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    assert model.pos_embed.grad is None and model.temp_embed.grad is None


def test_bf16_autocast_stays_near_float32():
    model = tiny(experts=1, top_k=1)  # a router's choice may flip, which is no rounding error
    x, t = clips()
    exact = model(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(x, t)
    assert rounded.dtype == torch.bfloat16
    error = (rounded - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 1e-4 < error < 0.03
