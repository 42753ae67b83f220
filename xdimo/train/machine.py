"""What a run needs of the machine that it is started on."""

import json
import os
import subprocess
import sys

from xdimo.config.schema import Hardware
from xdimo.errors import UserError
from xdimo.spec import RunSpec

SHM = "/dev/shm"
MORE_SHM = "give it more (docker: --shm-size), or set train.workers: 0"


def cards_here() -> list[tuple[str, str]]:
    """Name and UUID of each GPU that torch sees. Raises UserError where it cannot tell."""
    # Asked of torch in a child: what it sees is what the run would get.
    probe = "import json, torch; cuda = torch.cuda; "
    probe += "found = [cuda.get_device_properties(i) for i in range(cuda.device_count())]; "
    probe += "print(json.dumps([[card.name, str(card.uuid)] for card in found]))"
    answer = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    if answer.returncode != 0:
        raise UserError(f"torch cannot list this machine's GPUs: {answer.stderr.strip()[-300:]}")
    return [(name, uuid) for name, uuid in json.loads(answer.stdout.splitlines()[-1])]


def require_devices(spec: RunSpec, hardware: Hardware) -> list[str]:
    """NVML's names of the GPUs that the ranks will use, in their order; none on a CPU.

    Raises UserError where this machine has fewer or other GPUs than the spec names.
    """
    if spec.device == "cpu":
        return []
    cards = cards_here()
    found = [name for name, _ in cards]
    card = hardware.cards.get(spec.card)
    if card is None:
        raise UserError(f"{spec.run}: its card {spec.card!r} is not in hardware.yaml")
    wanted = f"{spec.run} needs {spec.gpus} x {card.label}"
    elsewhere = f"where the queue has them: snakemake --profile profiles/lsf {spec.cell}"
    if len(found) < spec.gpus:
        raise UserError(f"{wanted}; this machine has {len(found)} GPUs; {elsewhere}")
    others = sorted({name for name in found[: spec.gpus] if name not in card.devices})
    if others:
        raise UserError(
            f"{wanted} ({', '.join(card.devices)}); this machine has {', '.join(others)}; "
            f"{elsewhere}, or list the name under cards.{spec.card}.devices in hardware.yaml"
        )
    return ["GPU-" + uuid.removeprefix("GPU-") for _, uuid in cards[: spec.gpus]]


def require_shared_memory(spec: RunSpec) -> None:
    """Raises UserError where /dev/shm has no room for the batches under way from the loaders.

    A loader that finds none says so to nobody, and its rank would wait for the batch.
    """
    if not spec.workers:
        return
    if spec.data.mode == "online":
        clip = 3 * spec.data.size**2
    else:  # mean and std, two bytes each
        clip = 2 * 2 * spec.vae.latent_channels * spec.latent_size**2
    batch = spec.clips_per_gpu * spec.data.frames * clip
    needed = spec.gpus * (2 * spec.workers + 1) * batch  # two a loader, and the one in use
    free = shared_memory_bytes()
    if free < needed:
        raise UserError(
            f"{SHM}: {free / 2**20:.1f} MiB free; the {spec.workers} loaders of each of "
            f"{spec.gpus} ranks need {needed / 2**20:.1f} MiB: {MORE_SHM}"
        )


def shared_memory_bytes() -> int:
    """Free in /dev/shm, where loader processes put their batches."""
    try:
        memory = os.statvfs(SHM)
    except OSError:  # no such place: whatever is used instead
        return sys.maxsize
    return memory.f_bavail * memory.f_frsize
