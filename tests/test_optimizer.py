"""The fused network's storage and optimizer are torch's, step by step.

On a machine without a GPU the kernels run in Triton's interpreter.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="torch comes without Triton on this system")

from xdimo.model.fused.network import FusedLatte
from xdimo.model.fused.optimizer import FlatAdamW
from xdimo.model.fused.storage import Storage
from xdimo.spec import ModelSpec
from xdimo.train.checkpoint import State, load, save

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(40, 30), (7,), (2100,), (3, 5, 2)]  # more than a block; gaps


def network() -> nn.ParameterList:
    torch.manual_seed(0)
    return nn.ParameterList(nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in SHAPES)


def flat(model: nn.ParameterList) -> tuple[FlatAdamW, nn.ParameterList]:
    """The optimizer, and the average it keeps; parameters lie in another order than torch's."""
    average = copy.deepcopy(model)
    stored = [Storage([[each[2]], [each[0], each[1]], [each[3]]]) for each in (model, average)]
    stored[0].lend(torch.bfloat16)
    return FlatAdamW(list(model), *stored, lr=1e-2), average


@torch.no_grad()
def plain(
    model: Any, optimizer: Any, average: Any, clip_norm: float | None, decay: float
) -> Tensor:
    """The same step as xdimo.train.step takes it with torch's optimizer."""
    norm = nn.utils.get_total_norm([p.grad for p in model])
    if clip_norm is not None:
        nn.utils.clip_grads_with_norm_(list(model), clip_norm, norm)
    optimizer.step()
    torch._foreach_lerp_(list(average), list(model), 1 - decay)
    return norm


def draw(models: Any, seed: int) -> None:
    """The same gradients for all models."""
    for i in range(len(SHAPES)):
        generator = torch.Generator().manual_seed(10 * seed + i)
        grad = torch.randn(SHAPES[i], generator=generator).to(DEVICE)
        for model in models:
            model[i].grad = grad.clone()


def close(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip_norm", [None, 0.5, 1e6])
def test_steps_and_average_are_torchs_and_go_on_from_each_others_state(
    clip_norm: float | None,
) -> None:
    mine, theirs = network(), network()
    average = copy.deepcopy(theirs)
    optimizer, my_average = flat(mine)
    reference = torch.optim.AdamW(list(theirs), lr=1e-2, weight_decay=0.0)
    for step in range(6):
        if step == 3:  # each with what the other saved
            saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(reference.state_dict())
            assert saved[0]["state"].keys() == saved[1]["state"].keys()
            assert saved[0]["state"][0].keys() == saved[1]["state"][0].keys()
            reference.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        draw((mine, theirs), step)
        optimizer.weights.lend(torch.bfloat16)
        norm = optimizer.update(clip_norm, 0.9)
        assert close(norm, plain(theirs, reference, average, clip_norm, 0.9))
        assert all(parameter.grad is None for parameter in mine)
    for found, wanted in zip((*mine, *my_average), (*theirs, *average), strict=True):
        assert close(found, wanted)
    storage = optimizer.weights
    assert storage.copied == storage.versions()  # nothing is copied in the next forward pass
    # Triton's interpreter cuts bits off where a card rounds.
    assert storage.copy is not None
    assert torch.allclose(storage.copy.float(), storage.weights, rtol=2**-7, atol=0)


def test_a_checkpoint_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model = network()
    optimizer, average = flat(model)
    generator = torch.Generator(DEVICE)
    for step in range(4):
        if step == 2:
            state = State(model, average, optimizer, generator)
            save(tmp_path / "checkpoint.pt", "hash", step, state)
        draw((model,), step)
        optimizer.weights.lend(torch.bfloat16)
        optimizer.update(1.0, 0.9)
    again = network()
    other, other_average = flat(again)
    state = State(again, other_average, other, torch.Generator(DEVICE))
    assert load(tmp_path / "checkpoint.pt", "hash", state) == 2
    for step in range(2, 4):
        draw((again,), step)
        other.weights.lend(torch.bfloat16)
        other.update(1.0, 0.9)
    for found, wanted in zip((*again, *other_average), (*model, *average), strict=True):
        assert torch.equal(found, wanted)


def test_a_gradient_that_is_not_a_number_is_seen() -> None:
    model = network()
    optimizer, _ = flat(model)
    draw((model,), 0)
    model[1].grad[2] = float("nan")
    assert optimizer.update(1.0, 0.9).isnan()
    assert all(parameter.isnan().all() for parameter in model)


def test_a_missing_gradient_is_told() -> None:
    model = network()
    optimizer, _ = flat(model)
    draw((model,), 0)
    model[1].grad = None
    with pytest.raises(RuntimeError, match=r"a parameter of shape \[7\] has no gradient"):
        optimizer.update(None, 0.9)


def test_a_networks_gradients_lie_in_one_buffer_and_changed_weights_are_seen() -> None:
    size = ModelSpec(size="custom", depth=2, width=32, heads=2, patch=2, experts=4, top_k=2)
    model = FusedLatte(size, latent_size=4, latent_channels=4, frames=2, compiled=False).to(DEVICE)
    names = list(model.state_dict())
    storage = model.stored()
    assert list(model.state_dict()) == names
    assert model.stored() is storage
    for parameter in storage.parameters:
        nn.init.normal_(parameter, std=0.2)
    x, t = torch.randn(1, 2, 4, 4, 4, device=DEVICE), torch.tensor([3], device=DEVICE)
    model(x, t).square().sum().backward()
    buffer = storage.gradients
    assert buffer is not None
    # What a backward pass of ours made lies there already; embeddings are torch's own.
    ours = [p for n, p in model.named_parameters() if n.startswith(("blocks", "final"))]
    assert all(storage.lies_in(buffer, p.grad, p) for p in ours)
    grads = {p: p.grad.clone() for p in storage.parameters}
    gathered = storage.gathered()
    assert all(torch.equal(storage.view(gathered, p), grad) for p, grad in grads.items())
    # A second backward pass adds to the first, wherever that left its gradients.
    model(x, t).square().sum().backward()
    gathered = storage.gathered()
    assert all(close(storage.view(gathered, p), 2 * grad) for p, grad in grads.items())
    before = storage.values(torch.bfloat16)
    with torch.no_grad():
        model.blocks[0].gate.weight.mul_(2)
    after = storage.values(torch.bfloat16)
    assert after is before and torch.equal(after, storage.weights.bfloat16())
    moved = model.to(torch.device("meta")).stored()
    assert moved is not storage and moved.weights.is_meta
