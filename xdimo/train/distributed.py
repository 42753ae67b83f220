"""The processes of one run: one a GPU, as torchrun starts them; or one alone."""

import os
from typing import Any, Literal

import torch
import torch.distributed as dist

from xdimo.errors import UserError
from xdimo.train import identity


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(kind: Literal["cuda", "cpu"]) -> tuple[int, torch.device]:
    """This process's rank and device; joins the group where there are several.

    Raises UserError where there is no GPU for it.
    """
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"rank {rank} has no GPU: there are {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
    if world() > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return rank, device


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def everyone(value: Any) -> list[Any]:
    """``value`` of every rank, in rank order, on every rank. Collective."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def device_name(device: torch.device) -> str:
    """As the driver, or the CPU, calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else identity.processor()
