"""Everything a run needs to go on bit for bit, in one file written whole."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from xdimo.errors import UserError
from xdimo.files import read_torch, whole

PARTS = frozenset(["spec", "step", "model", "ema", "optimizer", "randomness"])


@dataclass
class State:
    """What changes from step to step. The sampler's position is the step itself."""

    model: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator  # timesteps, noise and posterior of this rank


def save(path: Path, spec_hash: str, step: int, state: State) -> None:
    """Collective: every rank calls it, rank 0 writes."""
    randomness = _gather(
        {
            "generator": state.generator.get_state(),
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }
    )
    if _rank() != 0:
        return
    with whole(path) as partial:
        torch.save(
            {
                "spec": spec_hash,
                "step": step,
                "model": state.model.state_dict(),
                "ema": state.ema.state_dict(),
                "optimizer": state.optimizer.state_dict(),
                "randomness": randomness,
            },
            partial,
        )


def load(path: Path, spec_hash: str, state: State) -> int:
    """Fills ``state`` in place and returns the last finished step.

    Raises UserError for a file that is missing, no checkpoint, or another spec's.
    """
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    saved = read_torch(path, "not a readable checkpoint")
    if not isinstance(saved, dict) or not saved.keys() >= PARTS:
        raise UserError(
            f"{path}: not a checkpoint of this program; expected an attempt's checkpoint.pt"
        )
    if saved["spec"] != spec_hash:
        raise UserError(f"{path}: made by spec {saved['spec']}, not by {spec_hash}")
    try:
        state.model.load_state_dict(saved["model"])
        state.ema.load_state_dict(saved["ema"])
        state.optimizer.load_state_dict(saved["optimizer"])
        randomness = saved["randomness"][_rank()]
        state.generator.set_state(randomness["generator"])
        torch.set_rng_state(randomness["cpu"])
        if randomness["cuda"] is not None:
            torch.cuda.set_rng_state(randomness["cuda"])
        return int(saved["step"])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: its content is not that of {spec_hash} ({reason})") from None


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _gather(value: Any) -> list[Any] | None:
    """``value`` of every rank, on rank 0."""
    if not dist.is_initialized():
        return [value]
    gathered = [None] * dist.get_world_size() if _rank() == 0 else None
    dist.gather_object(value, gathered)
    return gathered
