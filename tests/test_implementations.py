"""Every implementation is the reference network: outputs and all gradients, on any routing.

On a machine without a GPU nothing is compiled, and Triton's kernels run in its interpreter.
"""

import copy
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.conftest import spec_of
from xdimo.config.schema import Bench
from xdimo.implementations import IMPLEMENTATIONS
from xdimo.model import latte, moe
from xdimo.model.dense import DenseLatte, dense_mixture
from xdimo.spec import ModelSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_TRITON = find_spec("triton") is not None
Mixture = Callable[..., Tensor]


def fused_mixture(x: Tensor, gate: nn.Linear, experts: nn.ModuleList, k: int) -> Tensor:
    """The fused one alone: added to zeros, with a gate of one."""
    from xdimo.model.fused.network import dispatch, mixture_residual_norm

    block = nn.Module()
    block.gate, block.experts, block.top_k = gate, experts, k
    ones = torch.ones(1, x.shape[1], device=x.device)
    zeros, h = torch.zeros_like(ones), x[None]
    chosen = dispatch(block, h)
    return mixture_residual_norm(torch.zeros_like(h), h, *chosen, ones, zeros, zeros)[0][0]


MIXTURES = {"dense": dense_mixture, "fused": fused_mixture}
OTHERS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name == "fused" and not HAS_TRITON, reason="torch comes without Triton on this system"
        ),
    )
    for name in IMPLEMENTATIONS
    if name != "reference"
]


def relative(found: Tensor, wanted: Tensor) -> float:
    error = (found.detach().double() - wanted.detach().double()).norm()
    return float(error / wanted.detach().double().norm().clamp(min=1e-30))


def routed(tokens: int, experts: int, width: int, seed: int, empty: bool) -> tuple[Any, ...]:
    """x [T, D] and a router; ``empty``: its last expert is behind all others for every token."""
    torch.manual_seed(seed)
    gate = nn.Linear(width, experts, bias=False)
    layers = nn.ModuleList(latte.mlp(width) for _ in range(experts))
    for layer in layers:
        nn.init.normal_(layer.fc1.bias, std=0.1)
    x = torch.randn(tokens, width)
    if empty:
        x = x.abs()
        gate.weight.data = torch.cat([gate.weight.data[:-1].abs(), torch.zeros(1, width)])
    return x.to(DEVICE), gate.to(DEVICE), layers.to(DEVICE)


def results(mixture: Mixture, x: Tensor, gate: Any, experts: Any, k: int, upstream: Tensor) -> Any:
    """Output, and the gradients of x, the router and all experts."""
    inputs = x.clone().requires_grad_()
    out = mixture(inputs, gate, experts, k)
    parameters = {"gate": gate.weight, **dict(experts.named_parameters())}
    sources = [inputs, *parameters.values()]
    found = torch.autograd.grad(out, sources, upstream.to(out.dtype), allow_unused=True)
    return dict(zip(["out", "x", *parameters], [out, *found], strict=True))


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    scale = max(float(value.detach().norm()) for value in wanted.values())
    for name, value in wanted.items():
        assert found[name] is not None, f"{name} has no gradient, which DDP would wait for"
        if value.norm() < 1e-6 * scale:  # k = 1: the router has no gradient; an unused expert
            assert found[name].norm() < 1e-5 * scale, name
        else:
            assert relative(found[name], value) < 1e-5, name


# tokens, experts, k, width, whether the last expert has no token. Counts are no multiples of 8;
# more rows than one program sorts; a width of more than one tile; one token.
SHAPES = [(300, 4, 2, 48, True), (1, 3, 1, 16, False), (130, 2, 1, 80, True), (90, 5, 3, 24, False)]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(("tokens", "experts", "k", "width", "empty"), SHAPES)
def test_mixture_and_all_its_gradients(
    name: str, tokens: int, experts: int, k: int, width: int, empty: bool
) -> None:
    x, gate, layers = routed(tokens, experts, width, tokens, empty)
    upstream = torch.randn_like(x)
    wanted = results(moe.mixture, x, gate, layers, k, upstream)
    assert_same(results(MIXTURES[name], x, gate, layers, k, upstream), wanted)


@pytest.mark.skipif(not HAS_TRITON, reason="torch comes without Triton on this system")
@pytest.mark.parametrize(("tokens", "width", "empty"), [(300, 48, True), (130, 36, False)])
def test_tiles_moved_by_a_copy_engine_are_the_same(
    tokens: int, width: int, empty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xdimo.model.fused import experts as fused

    moved: list[tuple[int, ...]] = []
    tiles = fused._tiles
    x, gate, layers = routed(tokens, 4, width, tokens, empty)
    upstream = torch.randn_like(x)
    wanted = results(moe.mixture, x, gate, layers, 2, upstream)
    monkeypatch.setattr(fused, "_has_copy_engine", lambda device: True)
    monkeypatch.setattr(
        fused, "_tiles", lambda tensor, *block: moved.append(block) or tiles(tensor, *block)
    )
    shape = fused._shape(x.device)
    monkeypatch.setattr(fused, "_gradient_shape", lambda left, wide: {"tile_m": 64, **shape})
    monkeypatch.setattr(fused, "_parts", lambda device, tiles: 4)  # so that experts have several
    assert_same(results(fused_mixture, x, gate, layers, 2, upstream), wanted)
    assert len(moved) == 2 * 3 + 2 * 2  # two plain products, two weight gradients


@st.composite
def routings(draw: Any) -> tuple[Tensor, int]:
    """Logits [T, E] of few distinct values, so that ties are common and some experts get no token;
    and k."""
    tokens, experts = draw(st.integers(1, 40)), draw(st.integers(2, 6))
    row = st.lists(st.integers(-1, 2), min_size=experts, max_size=experts)
    logits = torch.tensor(draw(st.lists(row, min_size=tokens, max_size=tokens))).float()
    return logits, draw(st.integers(1, experts))


class Prescribed(nn.Module):
    """A router whose logits do not depend on x."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight


@pytest.mark.parametrize("name", OTHERS)
def test_ties_and_empty_experts_are_the_references(name: str) -> None:
    @settings(deadline=None, max_examples=5 if name == "fused" else 40)
    @given(routings(), st.integers(0, 1000))
    def same(routing: tuple[Tensor, int], seed: int) -> None:
        logits, k = routing
        x, _, layers = routed(len(logits), logits.shape[1], 16, seed, empty=False)
        gate, upstream = Prescribed(logits).to(DEVICE), torch.randn_like(x)
        wanted = results(moe.mixture, x, gate, layers, k, upstream)
        assert_same(results(MIXTURES[name], x, gate, layers, k, upstream), wanted)

    same()


@pytest.mark.parametrize("name", ["dense"])  # the fused one: benchmarks/exact.py, on a GPU
def test_bfloat16_is_as_exact_as_the_reference(name: str) -> None:
    x, gate, layers = routed(1500, 4, 128, 0, empty=False)
    logits = gate(x).sort(descending=True).values
    x = x[logits[:, 1] - logits[:, 2] > 0.05]  # a choice that flips is no rounding
    upstream = torch.randn_like(x)
    double = [copy.deepcopy(module).double() for module in (gate, layers)]
    exact = results(moe.mixture, x.double(), *double, 2, upstream.double())
    with torch.autocast(DEVICE, torch.bfloat16):
        plain = results(moe.mixture, x, gate, layers, 2, upstream)
        mine = results(MIXTURES[name], x, gate, layers, 2, upstream)
    for key, value in exact.items():
        assert relative(mine[key], value) < 1.2 * relative(plain[key], value), key


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (4, 2)])
def test_network_is_the_reference(name: Any, experts: int, k: int) -> None:
    size = ModelSpec(size="custom", depth=2, width=32, heads=2, patch=2, experts=experts, top_k=k)
    shape = {"latent_size": 4, "latent_channels": 4, "frames": 3}
    torch.manual_seed(0)
    reference = latte.Latte(size, **shape).to(DEVICE)
    for parameter in reference.parameters():  # adaLN-zero would hide the blocks
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    kind = getattr(import_module(IMPLEMENTATIONS[name].module), IMPLEMENTATIONS[name].kind)
    mine = kind(size, **shape, compiled=DEVICE == "cuda").to(DEVICE)
    assert list(mine.state_dict()) == list(reference.state_dict())
    mine.load_state_dict(reference.state_dict())
    x = torch.randn(2, 3, 4, 4, 4, device=DEVICE)
    t = torch.tensor([3, 700], device=DEVICE)
    upstream = torch.randn(2, 3, 8, 4, 4, device=DEVICE)
    for model in (reference, mine):
        model(x, t).backward(upstream)
    assert relative(mine(x, t), reference(x, t)) < 1e-5
    for (key, wanted), found in zip(reference.named_parameters(), mine.parameters(), strict=True):
        if wanted.grad is not None:
            assert relative(found.grad, wanted.grad) < 1e-5, key


def test_all_blocks_of_a_kind_compile_to_one_whole_graph() -> None:
    size = ModelSpec(size="custom", depth=12, width=16, heads=2, patch=2, experts=3, top_k=2)
    model = DenseLatte(size, latent_size=4, latent_channels=2, frames=3, compiled=False)
    torch._dynamo.reset()
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    for block in model.blocks:
        block.compile(dynamic=False, fullgraph=True, backend=count)
    model(torch.randn(2, 3, 2, 4, 4), torch.tensor([3, 700]))
    assert 2 <= len(graphs) <= 3  # spatial and temporal; what comes first has other strides


def test_on_a_gpu_all_but_the_reference_are_captured(small_bench: Bench) -> None:
    spec = spec_of(small_bench, "cpu_1-bs1-r1")

    def captured(device: str) -> list[str]:
        runs = (spec.model_copy(update={"implementation": n, "device": device}) for n in names)
        return [run.implementation for run in runs if run.captured]

    names = list(IMPLEMENTATIONS)
    assert captured("cuda") == [name for name in names if name != "reference"]
    assert captured("cpu") == []


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_names_are_the_classes_own(name: Any) -> None:
    can = IMPLEMENTATIONS[name]
    if name == "fused" and not HAS_TRITON:
        pytest.skip("torch comes without Triton on this system")
    kind = getattr(import_module(can.module), can.kind)
    assert issubclass(kind, latte.Latte) and kind.implementation == name
