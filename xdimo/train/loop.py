"""One run, as every rank sees it: warm-up steps, then timed steps, then it ends by itself."""

import os
import time
from importlib import import_module
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
from xdimo.implementations import IMPLEMENTATIONS
from xdimo.model.diffusion import Diffusion
from xdimo.model.latte import Latte
from xdimo.records.writer import SCHEMA, Record
from xdimo.spec import RunSpec
from xdimo.train import checkpoint, distributed, identity
from xdimo.train.allreduce import Averaged
from xdimo.train.failure import LossNotFinite
from xdimo.train.instruments import (
    calibration,
    gpu_telemetry,
    observed_settings,
    profiled,
    step_timer,
)
from xdimo.train.step import EAGER_STEPS, CapturedStep, Step


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
    if spec.captured and spec.steps.warmup <= EAGER_STEPS:
        raise UserError(
            f"steps.warmup: {spec.steps.warmup}; {spec.implementation} is captured after "
            f"{EAGER_STEPS} steps, which must lie before the timed ones"
        )
    set_arithmetic(spec)
    rank, device = _join(spec)
    before = _calibration(spec, device)  # with nothing of the run on the device yet
    with Record(folder / "log.jsonl" if rank == 0 else None) as record:
        steps = _steps(
            record,
            spec,
            rank,
            device,
            before,
            data=data,
            videos=videos,
            vae_weights=vae_weights,
            folder=folder,
            resume=resume,
        )
        _record_calibration(record, "after", _calibration(spec, device))
        record.write("footer", steps=steps, wall_s=time.perf_counter() - started)
    distributed.leave()


def _steps(
    record: Record,
    spec: RunSpec,
    rank: int,
    device: torch.device,
    before: list[dict[str, Any]],
    *,
    data: Path,
    videos: Path | None,
    vae_weights: Path | None,
    folder: Path,
    resume: Path | None,
) -> int:
    """The steps and what is recorded of them; how many. What they had on the device is freed."""
    torch.manual_seed(spec.seed)  # the same weights on every rank
    # Noise differs by rank, and again by repeat: repeats have seeds of their own.
    generator = torch.Generator(device).manual_seed(spec.seed * 1000 + rank)
    graphs_before = observed_settings.compiled_graphs()

    model, ema = build(spec).to(device), build(spec).to(device).requires_grad_(False)
    ema.load_state_dict(model.state_dict())
    state = checkpoint.State(model, ema, optimizer_of(spec, model, ema), generator)
    done = checkpoint.load(resume, spec.hash, state) if resume else 0

    wrapped = data_parallel(spec, model, device)
    diffusion = Diffusion(compiled=spec.implementation == "fused").to(device)
    vae = None
    if spec.data.mode == "online":
        dtype = torch.bfloat16 if spec.precision == "bf16" else torch.float32
        vae = load_vae(spec.vae, vae_weights, device, dtype, compiled=spec.captured)
    last = spec.steps.warmup + spec.steps.timed
    steps = last - done + profiled.batches(spec)
    loader = clips.loader(spec, rank=rank, first_step=done, steps=steps, data=data, videos=videos)
    batches = iter(loader)
    take_step = stepper(spec, state, wrapped, diffusion, vae)
    clock = step_timer.Clock(device)
    timer = step_timer.StepMeter(clock)
    window_start = None  # a mark

    gpus = distributed.everyone(distributed.device_name(device))
    settings = observed_settings.at_start(spec, model, device)
    _header(record, spec, gpus, settings, folder, resumed_after=done if resume else None)
    observed_settings.check(spec, settings)
    _record_calibration(record, "before", before)
    progress = tqdm(total=last, initial=done, unit="step", disable=rank != 0, mininterval=1)
    for step in range(done + 1, last + 1):
        timed = step > spec.steps.warmup
        if step in (done + 1, spec.steps.warmup):
            # Every rank at once, its device idle. It is the last warm-up step that then waits for
            # its own launch; the first timed one, like all others, finds the device at work.
            clock.together()
            entered_s = time.monotonic()
            timer.start()
            entered = timer.last
        if step == spec.steps.warmup + 1:
            window_start = timer.last

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
        timer.step(fields, loss, grad_norm)
        _log_steps(record, timer.finished(), progress)
        if spec.steps.checkpoint_every and step % spec.steps.checkpoint_every == 0:
            began = time.perf_counter()
            checkpoint.save(folder / "checkpoint.pt", spec.hash, step, state)
            record.write("checkpoint", step=step, seconds=time.perf_counter() - began)

    clock.together()  # the one synchronisation at the window's far edge
    if window_start is not None:
        end_s = time.monotonic()
        start_s = entered_s + clock.seconds(entered, window_start)
        record.write(
            "window",
            phase="timed",
            first_step=spec.steps.warmup + 1,
            last_step=last,
            wall_s=end_s - start_s,
        )
        for sample in gpu_telemetry.within(folder / gpu_telemetry.FILE, start_s, end_s):
            record.write("telemetry", **sample)
    _log_steps(record, timer.finished(wait=True), progress)
    progress.close()
    for other, fields in enumerate(distributed.everyone(step_timer.memory(device))):
        record.write("memory", rank=other, **fields)

    if last > done:
        operators: list[Any] = []
        if spec.steps.profiled:
            clips_norm = last >= spec.optimizer.clip_from_step
            ledger, operators = profiled.window(
                take_step, batches, spec.steps.profiled, clips_norm, clock, keep=rank == 0
            )
            if ledger:
                record.write("ledger", **ledger)
            elif rank == 0:
                print("no ledger: the profiler saw no kernels (KINETO_LOG_LEVEL=1 says why)")
        settings = observed_settings.after_steps(
            settings,
            device=device,
            gpus=gpus,
            made_from=loader.dataset,
            batch=batch,
            take_step=take_step,
            compiled_graphs=observed_settings.compiled_graphs() - graphs_before,
            operators=operators,
        )
        record.write("effective", **settings)
        observed_settings.check(spec, settings)
    return last - done


def _join(spec: RunSpec) -> tuple[int, torch.device]:
    """This process's rank and device, in a group of as many as the spec has GPUs."""
    if distributed.world() != spec.gpus:
        raise UserError(
            f"{distributed.world()} processes for a run of {spec.gpus}: start it with xdimo launch"
        )
    if spec.captured:
        # Its watchdog asks events of the captured collectives, which are never there.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    return distributed.join(spec.device)


def set_arithmetic(spec: RunSpec) -> None:
    """How this process multiplies and sums, before it has touched the device."""
    torch.backends.cuda.matmul.allow_tf32 = spec.precision == "tf32"
    torch.backends.cudnn.allow_tf32 = spec.precision == "tf32"
    torch.backends.cudnn.deterministic = spec.deterministic
    torch.use_deterministic_algorithms(spec.deterministic)
    if spec.deterministic:  # cuBLAS shares no workspace between streams
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def build(spec: RunSpec) -> Latte:
    """The spec's model in its implementation, on the CPU."""
    implementation = IMPLEMENTATIONS[spec.implementation]
    kind = getattr(import_module(implementation.module), implementation.kind)
    options = {"compiled": spec.captured} if implementation.captured else {}
    return kind(
        spec.model,
        latent_size=spec.latent_size,
        latent_channels=spec.vae.latent_channels,
        frames=spec.data.frames,
        **options,
    )


def stepper(spec: RunSpec, *parts: Any) -> Step | CapturedStep:
    """Captured where the implementation never makes the host wait; ``parts``: those of Step."""
    step = Step(spec, *parts)
    return CapturedStep(step) if spec.captured else step


def optimizer_of(spec: RunSpec, model: Any, ema: Any) -> torch.optim.Optimizer:
    """AdamW; for the fused network the one that keeps the average too."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rate = spec.optimizer.learning_rate
    if spec.implementation == "fused":
        from xdimo.model.fused.optimizer import FlatAdamW

        return FlatAdamW(parameters, model.stored(), ema.stored(), lr=rate)
    options: dict[str, Any] = {"fused": True, "capturable": True} if spec.captured else {}
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, **options)


def data_parallel(spec: RunSpec, model: nn.Module, device: torch.device) -> nn.Module:
    if not dist.is_initialized():
        return model
    if spec.captured:
        return Averaged(model)
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


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


def _calibration(spec: RunSpec, device: torch.device) -> list[dict[str, Any]]:
    """Each rank's rates; none where the spec wants no calibration."""
    if not spec.calibrate:
        return []
    products = calibration.model_products(spec.model, spec.clips_per_gpu * spec.tokens_per_clip)
    return distributed.everyone(calibration.measure(device, spec.precision, products))


def _record_calibration(record: Record, when: str, rates: list[dict[str, Any]]) -> None:
    for rank, fields in enumerate(rates):
        record.write("calibration", when=when, rank=rank, **fields)


def _header(
    record: Record,
    spec: RunSpec,
    gpus: list[str],
    settings: dict[str, Any],
    folder: Path,
    resumed_after: int | None,
) -> None:
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
        devices=gpus,
        declared=spec.to_json(),
        effective=settings,
        seed=spec.seed,
        resumed_after=resumed_after,
    )
