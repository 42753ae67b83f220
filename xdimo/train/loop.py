"""One run, as every rank sees it: warm-up steps, then timed steps, then it ends by itself."""

import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from xdimo.data import clips
from xdimo.data.vae import load as load_vae
from xdimo.errors import UserError
from xdimo.model.diffusion import Diffusion
from xdimo.model.latte import Latte
from xdimo.spec import RunSpec
from xdimo.train import checkpoint, identity, telemetry
from xdimo.train.failure import LossNotFinite
from xdimo.train.record import SCHEMA, Record
from xdimo.train.step import EAGER_STEPS, CapturedStep, Step, autocast


def train(
    spec: RunSpec,
    *,
    data: Path,
    videos: Path | None,
    vae_weights: Path | None,
    folder: Path,
    resume: Path | None = None,
) -> None:
    """Trains what ``spec`` says and leaves ``log.jsonl`` (and checkpoints) in ``folder``.

    ``data``: index of cached latents, or the manifest in online mode (then with ``videos``).
    Raises UserError (declared is not effective), DataError, LossNotFinite, and torch's own errors.
    """
    started = time.perf_counter()
    if captures(spec) and spec.steps.warmup <= EAGER_STEPS:
        raise UserError(
            f"steps.warmup: {spec.steps.warmup}; {spec.implementation} is captured after "
            f"{EAGER_STEPS} steps, which must lie before the timed ones"
        )
    rank, device = _join(spec)
    torch.manual_seed(spec.seed)  # the same weights on every rank
    # Noise differs by rank, and again by repeat: repeats have seeds of their own.
    generator = torch.Generator(device).manual_seed(spec.seed * 1000 + rank)
    torch.backends.cuda.matmul.allow_tf32 = spec.precision == "tf32"
    torch.backends.cudnn.allow_tf32 = spec.precision == "tf32"

    model, ema = build(spec).to(device), build(spec).to(device).requires_grad_(False)
    ema.load_state_dict(model.state_dict())
    state = checkpoint.State(model, ema, _optimizer(spec, model), generator)
    done = checkpoint.load(resume, spec.hash, state) if resume else 0

    ddp = _distributed(spec, model, device)
    diffusion = Diffusion().to(device)
    vae = None
    if spec.data.mode == "online":
        dtype = torch.bfloat16 if spec.precision == "bf16" else torch.float32
        vae = load_vae(spec.vae, vae_weights, device, dtype, compiled=captures(spec))
    last = spec.steps.warmup + spec.steps.timed
    batches = iter(
        clips.loader(spec, rank=rank, first_step=done, steps=last - done, data=data, videos=videos)
    )
    take_step = stepper(spec, state, ddp, diffusion, vae)
    clock = telemetry.Clock(device)
    meter = telemetry.StepMeter(clock)
    window_start = None

    with Record(folder / "log.jsonl" if rank == 0 else None) as record:
        _header(record, spec, model, device, folder, resumed_after=done if resume else None)
        progress = tqdm(total=last, initial=done, unit="step", disable=rank != 0, mininterval=1)
        for step in range(done + 1, last + 1):
            timed = step > spec.steps.warmup
            if step in (done + 1, spec.steps.warmup + 1):
                _together(clock)  # every rank enters the window at once, its device idle
                if step == spec.steps.warmup + 1:
                    window_start = time.perf_counter()
                meter.start()

            # data
            waited = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - waited

            # forward, backward, optimizer, average
            loss, grad_norm = take_step(batch, step >= spec.optimizer.clip_from_step)

            # log
            fields = {
                "step": step,
                "phase": "timed" if timed else "warmup",
                "data_wait_s": waited,
                "lr": spec.optimizer.learning_rate,
                "epoch": int(batch["epoch"]),
                "kind": take_step.kind,
            }
            meter.step(fields, loss, grad_norm)
            _log_steps(record, meter.finished(), progress)
            if spec.steps.checkpoint_every and step % spec.steps.checkpoint_every == 0:
                began = time.perf_counter()
                checkpoint.save(folder / "checkpoint.pt", spec.hash, step, state)
                record.write("checkpoint", step=step, seconds=time.perf_counter() - began)

        _together(clock)  # the one synchronisation at the window's far edge
        if window_start is not None:
            record.write(
                "window",
                phase="timed",
                first_step=spec.steps.warmup + 1,
                last_step=last,
                wall_s=time.perf_counter() - window_start,
            )
        _log_steps(record, meter.finished(wait=True), progress)
        progress.close()
        for other, fields in enumerate(_everyone(telemetry.memory(device))):
            record.write("memory", rank=other, **fields)
        record.write("footer", steps=last - done, wall_s=time.perf_counter() - started)
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(spec: RunSpec) -> tuple[int, torch.device]:
    """This process's rank and device; joins the group that torchrun started."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != spec.gpus:
        raise UserError(f"{world} processes for a run of {spec.gpus}: start it with xdimo launch")
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if spec.device == "cuda" else torch.device("cpu")
    if spec.device == "cuda":
        torch.cuda.set_device(device)
    if captures(spec):
        # Its watchdog asks events of the captured collectives, which are never there.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    if world > 1:
        dist.init_process_group("nccl" if spec.device == "cuda" else "gloo")
    return rank, device


def build(spec: RunSpec) -> Latte:
    """The spec's model in its implementation, on the CPU."""
    kind: type[Latte] = Latte
    if spec.implementation == "fused":
        from xdimo.model.fused.latte import FusedLatte as kind
    return kind(
        spec.model,
        latent_size=spec.latent_size,
        latent_channels=spec.vae.latent_channels,
        frames=spec.data.frames,
    )


def stepper(spec: RunSpec, *parts: Any) -> Step | CapturedStep:
    """Captured where the implementation never makes the host wait; ``parts``: those of Step."""
    step = Step(spec, *parts)
    return CapturedStep(step) if captures(spec) else step


def captures(spec: RunSpec) -> bool:
    return spec.implementation != "reference" and spec.device == "cuda"


def _optimizer(spec: RunSpec, model: nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    options: dict[str, Any] = {"fused": True, "capturable": True} if captures(spec) else {}
    rate = spec.optimizer.learning_rate
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, **options)


def _distributed(spec: RunSpec, model: nn.Module, device: torch.device) -> nn.Module:
    if not dist.is_initialized():
        return model
    ids = [device.index] if device.type == "cuda" else None
    if not captures(spec):
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    # Compiled functions are parts of a block: nothing to cut at the buckets' edges.
    torch._dynamo.config.optimize_ddp = False
    # Its streams must not be tied to the default one, which no capture may wait for.
    with torch.cuda.stream(torch.cuda.Stream()):
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def _together(clock: telemetry.Clock) -> None:
    clock.synchronize()
    if dist.is_initialized():
        dist.barrier()
        clock.synchronize()


def _everyone(value: Any) -> list[Any]:
    """``value`` of every rank, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _log_steps(record: Record, steps: list[dict[str, Any]], progress: Any) -> None:
    for fields in steps:
        record.write("step", **fields)
        progress.update()
        progress.set_postfix(loss=f"{fields['loss']:.4f}", refresh=False)
        values = fields["loss"], fields["grad_norm"]
        if any(value - value != 0 for value in values):
            raise LossNotFinite(
                f"step {fields['step']}: loss {values[0]}, gradient norm {values[1]}"
            )


def _header(
    record: Record,
    spec: RunSpec,
    model: Latte,
    device: torch.device,
    folder: Path,
    resumed_after: int | None,
) -> None:
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else identity.processor()
    effective = _effective(spec, model, device)
    record.write(
        "header",
        schema=SCHEMA,
        spec=spec.hash,
        run=spec.run,
        attempt=int(folder.name) if folder.name.isdigit() else None,
        started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        host=identity.host(),
        job=identity.job(),
        code=identity.code_identity(),
        versions=identity.versions(),
        devices=_everyone(name),
        declared=spec.to_json(),
        effective=effective,
        seed=spec.seed,
        resumed_after=resumed_after,
    )
    declared = {
        "precision": spec.precision,
        "experts": spec.model.experts,
        "top_k": spec.model.top_k,
        "world_size": spec.gpus,
        "implementation": spec.implementation,
    }
    for key, value in declared.items():
        if effective[key] != value:
            raise UserError(f"{key}: the spec says {value}, the run does {effective[key]}")


def _effective(spec: RunSpec, model: Latte, device: torch.device) -> dict[str, Any]:
    """Settings as the objects that do the work have them.

    Batch, data and VAE stand as the spec has them: the loader is built from it and refuses data of
    another name, and the VAE's weights are held to their hash where they are loaded.
    """
    counts = [p.numel() for p in model.parameters()]
    trainable = [p.numel() for p in model.parameters() if p.requires_grad]
    block = model.blocks[0]
    with autocast(spec):
        probe = torch.ones(8, 8, device=device)
        dtype = (probe @ probe).dtype
    tf32 = device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    precision = {torch.bfloat16: "bf16", torch.float32: "tf32" if tf32 else "fp32"}[dtype]
    return {
        "parameters": sum(counts),
        "trainable_parameters": sum(trainable),
        "precision": precision,
        "experts": 1 if block.dense else len(block.experts),
        "top_k": block.top_k,
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
        "clips_per_gpu": spec.clips_per_gpu,
        "data_mode": spec.data.mode,
        "dataset": spec.data.dataset,
        "implementation": model.implementation,
        "vae": spec.vae.id,
    }
