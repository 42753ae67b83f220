"""Two ranks: gradients are DDP's, and ranks that differ are found."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from xdimo.model import latte
from xdimo.train import allreduce
from xdimo.train.allreduce import Averaged


class Network(nn.Module):
    def __init__(self, seed: int, turned: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = latte.mlp(8), latte.mlp(8)
        self.turned = turned

    def forward(self, x: Tensor) -> Tensor:
        if self.turned:
            return self.first(self.second(x))
        return self.second(self.first(x))


CASES = ("same", "different orders", "different weights", "unused weight", "not a number")


def rank_of(rank: int, folder: Path) -> None:
    """One of two ranks: all cases; leaves what was found in ``folder``."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    allreduce.BUCKET = 1500  # of bytes; a layer's weights have 1,024
    torch.save({case: train(rank, case) for case in CASES}, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def train(rank: int, case: str) -> dict[str, Any]:
    """Two backward passes."""
    seed = rank if case == "different weights" else 0
    model = Network(seed, turned=case == "different orders" and rank == 1)
    if case == "unused weight":
        model.unused = nn.Parameter(torch.ones(3))
    if case == "not a number":
        model.first.fc1.weight.data.fill_(float("nan"))
    other = DistributedDataParallel(copy.deepcopy(model)) if case == "same" else None
    mine = Averaged(model)
    sent: list[int] = []
    send = mine._send

    def counted() -> None:
        sent.append(len(mine.bucket))
        send()

    mine._send = counted  # type: ignore[method-assign]
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(100 + rank))
    apart, error = 0.0, None
    try:
        for _ in range(2):
            for each in (mine, other):
                if each is not None:
                    each.zero_grad(set_to_none=True)
                    each(x).square().sum().backward()
            if other is not None:
                for a, b in zip(mine.parameters(), other.parameters(), strict=True):
                    apart = max(apart, float((a.grad - b.grad).abs().max() / b.grad.abs().max()))
    except RuntimeError as raised:
        error = str(raised)
    return {"apart": apart, "error": error, "sent": sent}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Each rank's findings, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(rank_of, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_gradients_are_those_of_ddp_and_go_in_several_launches(ranks: list[dict[str, Any]]) -> None:
    for found in (rank["same"] for rank in ranks):
        assert found["error"] is None
        assert found["apart"] < 1e-6
        assert sum(found["sent"]) == 2 * 8  # two passes over two layers of two weights and biases
        assert len(found["sent"]) > 2


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("different orders", "ranks 0 and 1 have gradients in different orders"),
        ("different weights", "first.fc1.weight: ranks 0 and 1 have different weights"),
        ("unused weight", "1 parameters had no gradient"),
    ],
)
def test_what_cannot_be_averaged_is_found(
    ranks: list[dict[str, Any]], case: str, message: str
) -> None:
    for rank in ranks:
        assert message in str(rank[case]["error"])


def test_a_loss_that_is_no_number_is_left_to_the_loop(ranks: list[dict[str, Any]]) -> None:
    assert [rank["not a number"]["error"] for rank in ranks] == [None, None]
