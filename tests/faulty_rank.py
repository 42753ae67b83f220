"""A rank whose training ends in the way it is told: python faulty_rank.py <fault> <spec> <folder>.

Everything around it is real: the parent, torchrun, and the rank's own error handling.
"""

import os
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from xdimo.errors import DataError, UserError
from xdimo.train import distributed, worker
from xdimo.train.failure import LossNotFinite


def meet() -> None:
    """What a run does before its first step: every rank, and a batch of a loader process."""
    distributed.join("cpu")
    distributed.everyone(os.getpid())
    loaded = DataLoader(TensorDataset(torch.arange(4)), batch_size=None, num_workers=1, timeout=20)
    assert len(list(loaded)) == 4


def fail(fault: str, folder: Path) -> None:
    if fault == "met":
        meet()
        raise LossNotFinite("met")
    if fault.isdigit():  # a signal, of which the other rank sees a lost connection alone
        distributed.join("cpu")
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), int(fault))
        distributed.everyone(os.getpid())
    if os.environ["RANK"] == "0" and os.environ["WORLD_SIZE"] == "2":
        time.sleep(120)  # waits for the rank that fails, as in a collective
    if fault in ("hang", "deaf"):
        time.sleep(120)
    if fault == "sigkill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "silent":
        return  # exit 0 with half a log
    errors = {
        "oom": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        "nan": LossNotFinite("step 7: loss nan, gradient norm nan"),
        "data": DataError("shard x.safetensors: sha256 differs"),
        "config": UserError("top_k: the spec says 2, the run does 1"),
        "comm": torch.distributed.DistBackendError("NCCL error: unhandled system error"),
        "crash": ValueError("deep down\nsecond line"),
    }
    raise errors[fault]


def main() -> None:
    fault, spec, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if fault == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def train(spec: Any, *, folder: Path, **arguments: Any) -> None:
        (folder / "log.jsonl").write_text('{"event": "header"}\n')
        (folder / f"begun-{os.environ['RANK']}").touch()
        fail(fault, folder)

    loop = types.ModuleType("xdimo.train.loop")
    loop.train = train  # type: ignore[attr-defined]
    sys.modules[loop.__name__] = loop
    worker.run(spec, folder)


if __name__ == "__main__":
    main()
