"""The spec of a run: self-contained, named by content, holding only what changes the run."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import (
    BaseModel,
    Field,
    SerializerFunctionWrapHandler,
    field_serializer,
    model_serializer,
)

from xdimo.config.load import STEPS, naming, parse
from xdimo.config.schema import (
    Bench,
    Cell,
    Mode,
    Model,
    Positive,
    Strict,
    Train,
    Vae,
    dimensions,
    split_run,
)
from xdimo.errors import UserError
from xdimo.files import content_hash, file_hash, read_json
from xdimo.implementations import IMPLEMENTATIONS, Device, Name, Precision

SCHEMA = 1
TRANSFORM = 1  # of xdimo.data.transform: raised when the same video gives other pixels


class Part(Strict):
    """What a spec is made of. A key with a default was added later: at its default it is left out
    of the JSON, so that specs and latents from before it keep their hash.
    """

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields.items()
        left_out = {
            name for name, f in fields if not f.is_required() and getattr(self, name) == f.default
        }
        return {key: value for key, value in serialize(self).items() if key not in left_out}


class LatentsPlan(Strict):
    """What the cached latents are made with."""

    vae: Vae
    size: int  # pixels
    flip: bool
    batch_frames: int

    @field_serializer("vae", mode="wrap")
    def _as_before(self, vae: Vae, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = serialize(vae)
        return {k: v for k, v in content.items() if (k, v) != ("precision", None)}


class ModelSpec(Part):
    size: str  # "S/2", or "custom"
    depth: Positive
    width: Positive
    heads: Positive
    patch: Positive
    experts: Positive  # 1 = dense
    top_k: Positive


class VaeSpec(Part):
    id: str  # sha256 of the weights file, or "random:<seed>"
    block_out_channels: list[Positive] = Field(min_length=1)
    layers_per_block: Positive
    latent_channels: Positive
    norm_num_groups: Positive
    scaling_factor: float
    precision: Literal["bf16", "fp32"] | None = None  # as the config has it

    @property
    def random(self) -> bool:
        return self.id.startswith("random:")


class DataSpec(Part):
    mode: Mode
    dataset: str  # content of the manifest: hash over the usable videos
    latents: str | None  # name of the cached latents; None in online mode
    frames: Positive
    interval: Positive
    size: Positive  # pixels
    flip: bool
    transform: int = 1


class StepsSpec(Part):
    warmup: int
    timed: int
    checkpoint_every: int | None
    profiled: int  # after the timed ones


class OptimizerSpec(Part):
    learning_rate: float
    ema_decay: float
    clip_norm: float
    clip_from_step: int


class RunSpec(Part):
    schema_version: Literal[1] = Field(alias="schema")
    campaign: str
    run: str
    cell: str
    target: str
    card: str
    device: Device
    gpus: Positive
    clips_per_gpu: Positive
    model: ModelSpec
    vae: VaeSpec
    data: DataSpec
    precision: Precision
    implementation: Name
    deterministic: bool
    steps: StepsSpec
    optimizer: OptimizerSpec
    workers: int
    calibrate: bool
    seed: int
    environment: dict[str, str]

    @property
    def global_batch(self) -> int:
        """Clips an optimizer step consumes."""
        return self.gpus * self.clips_per_gpu

    @property
    def vae_precision(self) -> str:
        """What the VAE computes in that makes the latents, now or when they were cached."""
        if self.vae.precision is not None:
            return self.vae.precision
        bf16 = self.precision == "bf16" if self.data.mode == "online" else self.device == "cuda"
        return "bf16" if bf16 else "fp32"

    @property
    def captured(self) -> bool:
        """Whether the model is compiled and the step captured as a CUDA graph."""
        return IMPLEMENTATIONS[self.implementation].captured and self.device == "cuda"

    @property
    def latent_size(self) -> int:
        """Latent positions a side."""
        return self.data.size // int(2 ** (len(self.vae.block_out_channels) - 1))

    @property
    def tokens_per_clip(self) -> int:
        """One token = one patch of the latent of one frame."""
        return int(self.data.frames * (self.latent_size // self.model.patch) ** 2)

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)

    @property
    def hash(self) -> str:
        """``sha256:<hex>`` over the content, wherever the file lies and whoever wrote it."""
        return content_hash(self.to_json())


def plan(bench: Bench, run: str) -> dict[str, Any]:
    """What the config says of a run: its spec without the hashes of data and VAE weights.

    ``implementation`` is None where it is to be chosen (``auto``). Raises UserError where ``run``
    names no cell of the matrix, or no repeat of it.
    """
    name, repeat = split_run(run)
    cell = cell_named(bench, name)
    if repeat > bench.train.repeats:
        raise UserError(f"run {run}: train.repeats is {bench.train.repeats}")
    target, clips, vae, train = bench.targets[cell.target], bench.clips, bench.vae, bench.train
    return {
        "schema": SCHEMA,
        "campaign": bench.campaign,
        "run": run,
        "cell": cell.name,
        "target": cell.target,
        "card": target.card,
        "device": target.device,
        "gpus": target.gpus,
        "clips_per_gpu": cell.clips_per_gpu,
        "model": model_spec(bench.model).model_dump(),
        "vae": {"id": f"random:{vae.seed}" if vae.random else None, **shape(vae)},
        "data": {
            "mode": cell.mode,
            "dataset": None,
            "latents": None,
            "frames": clips.frames,
            "interval": clips.interval,
            "size": clips.size,
            "flip": clips.flip,
            **({"transform": TRANSFORM} if TRANSFORM != 1 else {}),
        },
        "precision": train.precision,
        "implementation": None if cell.implementation == "auto" else cell.implementation,
        "deterministic": train.deterministic,
        "steps": {
            "warmup": train.warmup_steps,
            "timed": train.timed_steps,
            "checkpoint_every": train.checkpoint_every,
            "profiled": train.profile_steps,
        },
        "optimizer": {
            "learning_rate": train.learning_rate,
            "ema_decay": train.ema_decay,
            "clip_norm": train.clip_norm,
            "clip_from_step": train.clip_from_step,
        },
        "workers": train.workers,
        "calibrate": train.calibrate,
        "seed": train.seed + repeat - 1,
        "environment": target.environment,
    }


def latents_plan(bench: Bench) -> LatentsPlan:
    return LatentsPlan(
        vae=bench.vae,
        size=bench.clips.size,
        flip=bench.clips.flip,
        batch_frames=bench.latents.batch_frames,
    )


def model_spec(model: Model) -> ModelSpec:
    """The dimensions of a checked model."""
    depth, width, heads = dimensions(model)
    return ModelSpec(
        size=model.size or "custom",
        depth=depth,
        width=width,
        heads=heads,
        patch=model.patch,
        experts=model.experts,
        top_k=model.top_k,
    )


def vae_spec(vae: Vae, weights: Path | None) -> VaeSpec:
    """``weights``: the file that ``xdimo.data.vae.locate`` found; None for random weights."""
    if vae.random:
        return VaeSpec(id=f"random:{vae.seed}", **shape(vae))
    if weights is None:
        raise UserError(f"vae.weights: {vae.weights}: no weights file given")
    return VaeSpec(id=file_hash(weights), **shape(vae))


def shape(vae: Vae) -> dict[str, Any]:
    """All of a VaeSpec but its id."""
    spec = VaeSpec(id="", **vae.model_dump(exclude={"weights", "seed"}))
    return spec.model_dump(exclude={"id"})


def cell_named(bench: Bench, name: str) -> Cell:
    cell = bench.cells.get(name) or bench.twins.get(name)
    if cell is None:
        raise UserError(no_target(bench, name))
    return cell


def no_target(bench: Bench, name: str) -> str:
    """Why nothing is called ``name``, and what was meant."""
    for cell in bench.cells:
        if name == f"{cell}-{bench.latents.mode}":
            return f"no target {name}; data mode {bench.latents.mode} is the config's own: {cell}"
        if name == f"{cell}-reference" and bench.train.implementation == "reference":
            return f"no target {name}; the config's implementation is the reference: {cell}"
    cells = [*bench.cells, *bench.twins]
    steps = [f"{step}_{target}" for step in ("train", "choose") for target in bench.targets]
    near = difflib.get_close_matches(name, [*bench.targets, *cells, *steps, *sorted(STEPS)], n=3)
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    return (
        f"no target {name}{meant}; targets: {', '.join(bench.targets)}; cells: {', '.join(cells)}"
    )


def require_in_service(bench: Bench, target: str) -> None:
    """Raises UserError with the reason where the config has switched a target off."""
    if not bench.targets[target].enabled:
        raise UserError(f"{target} is out of service: {bench.targets[target].reason}")


class ChoicePlan(Strict):
    """Runs of one process on random latents, which `xdimo choose` times: one at each batch.

    It holds only what changes how fast a step is: an edited seed or learning rate makes no choice
    anew. ``run``: a RunSpec without its implementation.
    """

    run: dict[str, Any]
    clips_per_gpu: list[int]

    @property
    def hash(self) -> str:
        """Of what is the same at every batch; which cell is the baseline decides nothing."""
        whole, apart = self.spec("reference", 1).to_json(), ("run", "cell", "clips_per_gpu")
        return content_hash({key: value for key, value in whole.items() if key not in apart})

    def spec(self, implementation: Name, clips_per_gpu: int) -> RunSpec:
        changed = {"implementation": implementation, "clips_per_gpu": clips_per_gpu}
        return parse(RunSpec, {**self.run, **changed})


def choice_plan(bench: Bench, target: str) -> ChoicePlan:
    """What decides between the implementations on a target."""
    same = {key: getattr(bench.train, key) for key in ("precision", "deterministic")}
    alike = bench.model_copy(update={"train": Train(implementation="auto", **same)})
    planned = plan(alike, f"{bench.baseline_cell(target).name}-r1")
    random = {"mode": "cached", "dataset": "random", "latents": "random"}
    run = {
        **planned,
        "gpus": 1,
        "vae": {**planned["vae"], "id": "random:0"},
        "data": {**planned["data"], **random},
    }
    return ChoicePlan(run=run, clips_per_gpu=bench.targets[target].variants)


def resolve(
    planned: dict[str, Any],
    dataset: str,
    vae_weights: Path | None,
    chosen: Name = "reference",
) -> RunSpec:
    """A plan with its hashes filled in.

    ``dataset``: the manifest's content hash. ``vae_weights``: the weights file that
    ``xdimo.data.vae.locate`` found; None for random weights, whose id is their seed.
    ``chosen``: the implementation where the plan leaves it open.
    """
    vae_id = planned["vae"]["id"]
    if vae_id is None:
        if vae_weights is None:
            raise UserError(f"run {planned['run']}: its VAE has weights; give --vae <folder>")
        vae_id = file_hash(vae_weights)
    return parse(RunSpec, filled(planned, dataset, vae_id, planned["implementation"] or chosen))


def filled(
    planned: dict[str, Any], dataset: str | None, vae_id: str, implementation: str | None
) -> dict[str, Any]:
    """A plan with what it leaves open, and the name of its latents, which follows from that."""
    vae = {**planned["vae"], "id": vae_id}
    data = {**planned["data"], "dataset": dataset}
    if data["mode"] == "cached":
        transform = data.get("transform", 1)
        data["latents"] = latents_name(dataset, vae, data["size"], data["flip"], transform)
    return {**planned, "vae": vae, "data": data, "implementation": implementation}


def dataset_of(videos: Iterable[tuple[str | None, int | None]]) -> str:
    """The name of a dataset: a hash over sha256 and frames of its videos."""
    return content_hash(sorted(list(video) for video in videos))


def latents_name(
    dataset: str | None, vae: dict[str, Any], size: int, flip: bool, transform: int = TRANSFORM
) -> str:
    """Content name of cached latents: the same videos, VAE and transform give the same name."""
    named = {"dataset": dataset, "vae": vae, "size": size, "flip": flip}
    return content_hash(named if transform == 1 else {**named, "transform": transform})


def read_spec(path: str | Path) -> RunSpec:
    """Raises UserError that names the file and the wrong key."""
    with naming(path):
        return parse(RunSpec, read_json(path))


def dataset_in(manifest: str | Path) -> str | None:
    """The content hash that a manifest carries; None where there is no manifest yet.

    Raises UserError where the file carries none.
    """
    if not os.path.lexists(manifest):
        return None
    told = read_json(manifest)
    dataset = told.get("dataset") if isinstance(told, dict) else None
    if not isinstance(dataset, str):
        raise UserError(f"{manifest}: names no dataset; remove it, and the same command makes it")
    return dataset


class _Chosen(BaseModel):
    chosen: Name


class _Choice(BaseModel):
    variants: dict[str, _Chosen]


def choice_path(runs: Path, target: str) -> Path:
    """What ``xdimo choose`` found for a target, in the folder of a campaign's runs."""
    return runs / f"choice-{target}.json"


def implementation_of(planned: dict[str, Any], runs: Path) -> Name | None:
    """The plan's own, or the one that was chosen for its target and batch; None: not chosen yet."""
    if planned["implementation"] is not None:
        return cast(Name, planned["implementation"])
    path = choice_path(runs, planned["target"])
    return chosen_in(path, planned["clips_per_gpu"]) if path.exists() else None


def chosen_in(choice: Path, clips_per_gpu: int) -> Name | None:
    """None where no implementation has been timed at this batch. Raises UserError."""
    with naming(choice):
        variant = parse(_Choice, read_json(choice)).variants.get(str(clips_per_gpu))
    return variant.chosen if variant else None


def as_planned(
    planned: dict[str, Any], ran: RunSpec, dataset: str | None, implementation: str | None
) -> dict[str, Any]:
    """The spec that the config asks for now, where a run's own can be held against it.

    Only the run knows the hash of its VAE's weights: that is its own.
    """
    vae_id = planned["vae"]["id"] or weights_like(ran.vae.id)
    return filled(planned, dataset, vae_id, implementation)


def weights_like(vae_id: str) -> str:
    """The id of weights that are not here: that of what was made with weights, else no VAE's."""
    return "weights" if vae_id.startswith("random:") else vae_id
