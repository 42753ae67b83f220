"""One process trains a small model on real (generated) video: the record, and going on exactly."""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.videos import write_video
from xdimo.config.schema import Bench
from xdimo.data import latents, manifest
from xdimo.errors import UserError
from xdimo.model.latte import Block
from xdimo.spec import RunSpec, latents_plan, plan, resolve, vae_spec
from xdimo.train import step
from xdimo.train.failure import LossNotFinite
from xdimo.train.instruments import gpu_telemetry, step_timer
from xdimo.train.loop import train

Train = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run_once(tmp_path: Path, small_bench: Bench) -> Train:
    """Trains a changed spec of cpu_1-bs2 in a folder of its own; returns its log."""
    for number, frames in enumerate((20, 31, 9)):
        write_video(tmp_path / f"videos/{number}.mp4", frames, width=32, height=32)
    found = manifest.build(
        tmp_path / "videos",
        tmp_path / "manifest.json",
        window=small_bench.clips.window,
        expected=None,
        decoder="pyav",
        timeout_s=60,
        workers=1,
    )
    made = latents_plan(small_bench)
    latents.build(
        tmp_path / "manifest.json",
        tmp_path / "videos",
        vae_spec(made.vae, None),
        None,
        tmp_path / "index.json",
        size=made.size,
        flip=made.flip,
        batch_frames=made.batch_frames,
        device="cpu",
    )

    def run(
        folder: str, *, mode: str = "cached", resume: str | None = None, **changes: Any
    ) -> list[dict[str, Any]]:
        cell = "cpu_1-bs2" if mode == "cached" else "cpu_1-bs1-online"
        base = resolve(plan(small_bench, f"{cell}-r1"), found.dataset, None).to_json()
        spec = RunSpec.model_validate(_changed(base, changes))
        (tmp_path / folder).mkdir()
        train(
            spec,
            data=tmp_path / ("index.json" if mode == "cached" else "manifest.json"),
            videos=tmp_path / "videos",
            vae_weights=None,
            folder=tmp_path / folder,
            resume=tmp_path / resume if resume else None,
        )
        return read(tmp_path / folder / "log.jsonl")

    return run


def read(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def _changed(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``steps__timed=9`` changes base["steps"]["timed"]."""
    changed = json.loads(json.dumps(base))
    for path, value in changes.items():
        *parents, last = path.split("__")
        inside = changed
        for parent in parents:
            inside = inside[parent]
        inside[last] = value
    return changed


def named(log: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [line for line in log if line["event"] == event]


def steps(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return named(log, "step")


def losses(log: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return [(step["loss"], step["grad_norm"]) for step in steps(log)]


def test_record(run_once: Train) -> None:
    log = run_once("out")
    assert [event["event"] for event in log] == [
        "header",
        "calibration",
        *["step"] * 6,
        "window",
        "memory",
        "ledger",
        "effective",
        "calibration",
        "footer",
    ]
    header, window, memory = (named(log, name)[0] for name in ("header", "window", "memory"))
    assert [step["phase"] for step in steps(log)] == ["warmup"] * 2 + ["timed"] * 4
    assert [step["step"] for step in steps(log)] == [1, 2, 3, 4, 5, 6]
    assert (window["first_step"], window["last_step"]) == (3, 6)
    timed = sum(step["step_s"] for step in steps(log)[2:])
    # The window holds its steps, and the log's own writing: no step is outside of it.
    assert 0 < timed <= window["wall_s"]
    assert header["effective"]["experts"] == 4
    assert header["effective"]["parameters"] > header["effective"]["trainable_parameters"]
    assert header["declared"]["clips_per_gpu"] == 2
    assert len(header["devices"]) == 1
    assert memory["device_gib"] is None
    assert memory["host_peak_gib"] > 0


def test_the_window_begins_behind_a_step_and_not_with_a_wait_for_the_device(
    run_once: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a synchronisation a GPU is idle until the host has launched a step: no timed one."""
    taken, waited_at = 0, []
    take, together = step.Step.__call__, step_timer.Clock.together

    def counted(self: step.Step, *arguments: Any) -> Any:
        nonlocal taken
        taken += 1
        time.sleep(1.0 if taken == 2 else 0)  # the last warm-up step is no part of the window
        return take(self, *arguments)

    def noted(self: step_timer.Clock) -> None:
        waited_at.append(taken)
        together(self)

    monkeypatch.setattr(step.Step, "__call__", counted)
    monkeypatch.setattr(step_timer.Clock, "together", noted)
    log = run_once("out", calibrate=False, steps__profiled=0)
    assert waited_at == [0, 1, 6]  # before the first step and the last warm-up step, and at the end
    (window,) = named(log, "window")
    timed = sum(line["step_s"] for line in steps(log)[2:])
    assert timed <= window["wall_s"] < timed + 0.5
    assert log[0]["schema"] == 2


def test_calibration_ledger_and_proof(run_once: Train) -> None:
    log = run_once("out")
    calibrations = named(log, "calibration")
    assert [(c["when"], c["rank"]) for c in calibrations] == [("before", 0), ("after", 0)]
    # 2 clips of 4 frames of 4 x 4 tokens, width 16.
    shapes = {"128x16x64", "128x64x16", "128x16x48", "128x16x16"}
    assert all(set(c["model_gemm_tflops"]) == shapes for c in calibrations)
    (ledger,) = named(log, "ledger")
    assert sum(ledger["shares"].values()) == pytest.approx(1)
    assert all(ledger["shares"][part] > 0 for part in ("forward", "backward", "optimizer"))
    assert ledger["shares"]["all_reduce"] == ledger["shares"]["vae"] == 0  # one rank, cached
    assert ledger["source"] == "profiled window"
    (proof,) = named(log, "effective")
    assert {**log[0]["effective"], **proof} == proof
    assert proof["matmul_flops"] == {"fp32": 1.0}
    assert (proof["compiled"], proof["captured"], proof["checkpointing"]) == (False,) * 3
    assert proof["gpus"] == log[0]["devices"]


def test_neither_calibration_nor_profile_changes_what_is_trained(run_once: Train) -> None:
    plain = run_once("plain", calibrate=False, steps__profiled=0)
    assert [event["event"] for event in plain[-3:]] == ["memory", "effective", "footer"]
    assert not named(plain, "calibration") + named(plain, "ledger")
    assert plain[-2]["matmul_dtype"] is plain[-2]["checkpointing"] is None  # not seen
    assert losses(plain) == losses(run_once("all"))


def test_online_mode_has_a_share_for_the_vae(run_once: Train) -> None:
    log = run_once("out", mode="online")
    assert named(log, "ledger")[0]["shares"]["vae"] > 0


def test_samples_of_the_window_come_into_the_log(
    run_once: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    samples = [{"monotonic_s": now + i / 1000, "gpu": 0, "power_w": i} for i in range(120_000)]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    monkeypatch.setattr(gpu_telemetry, "FILE", str(path))
    log = run_once("out")
    (window,) = named(log, "window")
    times = [sample["t_s"] for sample in named(log, "telemetry")]
    assert times == sorted(times)
    assert times and times[0] >= 0 and times[-1] <= window["wall_s"]
    assert log.index(window) < log.index(named(log, "telemetry")[0])


def test_products_in_another_type_fail_the_run(
    run_once: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The setting is there, and the step does not keep to it.
    monkeypatch.setattr(step, "autocast", lambda spec: nullcontext())
    with pytest.raises(UserError, match="matmul_dtype: the spec says bf16, the run does fp32"):
        run_once("out", precision="bf16")
    proof = read(tmp_path / "out/log.jsonl")[-1]
    assert (proof["event"], proof["precision"], proof["matmul_dtype"]) == (
        "effective",
        "bf16",
        "fp32",
    )


def test_products_of_the_step_run_in_the_specs_type(run_once: Train) -> None:
    (proof,) = named(run_once("out", precision="bf16"), "effective")
    assert proof["matmul_flops"] == {"bf16": 1.0}


@pytest.mark.parametrize("implementation", ["reference", "dense"])
def test_deterministic_runs_are_the_same_bit_for_bit(run_once: Train, implementation: str) -> None:
    changes = {"deterministic": True, "implementation": implementation}
    first, again = run_once("first", **changes), run_once("again", **changes)
    assert losses(first) == losses(again)
    (proof,) = named(first, "effective")
    assert (proof["deterministic"], proof["implementation"]) == (True, implementation)
    assert proof["compiled"] is proof["captured"] is False  # on a CPU
    assert named(run_once("as it comes"), "effective")[0]["deterministic"] is False


def test_a_run_that_is_not_deterministic_fails(
    run_once: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: None)
    with pytest.raises(UserError, match="deterministic: the spec says True, the run does False"):
        run_once("out", deterministic=True)


def test_implementations_train_alike(run_once: Train) -> None:
    """Losses on the same clips, steps and noise, in float32."""
    reference, dense = (run_once(n, implementation=n) for n in ("reference", "dense"))
    for mine, theirs in zip(losses(dense), losses(reference), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_hidden_recomputation_fails_the_run(
    run_once: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Block.forward
    monkeypatch.setattr(
        Block, "forward", lambda *arguments: checkpoint(plain, *arguments, use_reentrant=False)
    )
    with pytest.raises(UserError, match="checkpointing: the spec says False, the run does True"):
        run_once("out")


def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(run_once: Train) -> None:
    whole = run_once("whole", steps__checkpoint_every=4)
    rest = run_once("rest", steps__checkpoint_every=4, resume="whole/checkpoint.pt")
    assert [step["step"] for step in steps(rest)] == [5, 6]
    assert losses(rest) == losses(whole)[4:]
    # Half a window is no throughput: none is recorded.
    assert not [event for event in rest if event["event"] == "window"]
    assert rest[0]["resumed_after"] == 4


def test_a_checkpoint_of_another_spec_or_a_damaged_one_is_refused(
    run_once: Train, tmp_path: Path
) -> None:
    run_once("whole", steps__checkpoint_every=4)
    with pytest.raises(UserError, match=r"checkpoint\.pt: made by spec sha256:"):
        run_once("other", steps__checkpoint_every=5, resume="whole/checkpoint.pt")
    damaged = tmp_path / "whole/checkpoint.pt"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"checkpoint\.pt: not a readable checkpoint"):
        run_once("again", steps__checkpoint_every=4, resume="whole/checkpoint.pt")


def test_workers_change_no_loss(run_once: Train) -> None:
    assert losses(run_once("in_loop")) == losses(run_once("in_workers", workers=2))


def test_repeats_differ_and_the_same_seed_does_not(run_once: Train) -> None:
    first, again, other = run_once("a"), run_once("b"), run_once("c", seed=1)
    assert losses(first) == losses(again)
    assert losses(first) != losses(other)


def test_online_mode_encodes_the_clips(run_once: Train) -> None:
    log = run_once("out", mode="online")
    assert log[0]["effective"]["data_mode"] == "online"
    assert all(step["loss"] > 0 for step in steps(log))


def test_clipping_begins_at_its_step(run_once: Train) -> None:
    free = run_once("free", optimizer__clip_from_step=100)
    clipped = run_once("clipped", optimizer__clip_from_step=3, optimizer__clip_norm=1e-6)
    # The norm that is logged is the one before clipping; weights differ from step 3's update on.
    assert losses(free)[:3] == losses(clipped)[:3]
    assert losses(free)[3:] != losses(clipped)[3:]


def test_a_loss_that_is_not_finite_ends_the_run(run_once: Train, tmp_path: Path) -> None:
    with pytest.raises(LossNotFinite, match=r"step \d+: loss"):
        run_once("out", optimizer__learning_rate=1e30)
    log = read(tmp_path / "out/log.jsonl")
    assert log[-1]["event"] == "step"  # what was measured before is on disk
    assert None in (log[-1]["loss"], log[-1]["grad_norm"])


def test_declared_must_be_effective(run_once: Train) -> None:
    with pytest.raises(UserError, match="precision: the spec says tf32, the run does fp32"):
        run_once("out", precision="tf32")


def test_a_process_outside_its_group_is_refused(run_once: Train) -> None:
    with pytest.raises(UserError, match="1 processes for a run of 2: start it with xdimo launch"):
        run_once("out", gpus=2)


def test_a_captured_step_leaves_its_callers_batches_alone() -> None:
    taken = step.CapturedStep.__new__(step.CapturedStep)  # without a GPU no stream can be made
    taken.buffers = {}
    taken.step = SimpleNamespace(state=SimpleNamespace(generator=torch.Generator()))
    first, second = ({"mean": torch.full((2,), value), "epoch": 0} for value in (1.0, 2.0))
    for batch in (first, second):
        taken._take(batch)
    assert taken.buffers["mean"].tolist() == [2.0, 2.0]
    assert first["mean"].tolist() == [1.0, 1.0]
