"""What each verb does with its arguments. Each imports what it needs only when it runs."""

import json
import os
import shlex
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdimo.errors import UserError

if TYPE_CHECKING:
    from xdimo.config.schema import Bench

CONFIG = [Path("config/config.yaml")]


def _bench(arguments: Namespace) -> "Bench":
    from xdimo.config.load import load

    if getattr(arguments, "records", None) and arguments.config == CONFIG:
        arguments.config = [arguments.records / "config.json"]
    return load(arguments.config, _json(arguments.override, "--override"))


def named(paths: Iterable[str | Path]) -> str:
    """As a person types them; bytes of a name that are no UTF-8 are written as \\xNN."""
    names = (os.fsencode(path).decode("utf-8", "backslashreplace") for path in paths)
    return shlex.join(names)


def _json(text: str, option: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{option}: not JSON ({error})") from None


def _vae_weights(weights: Path | str | None) -> Path | None:
    """The weights file of an AutoencoderKL folder; None for random weights."""
    if weights is None or str(weights) == "random":
        return None
    from xdimo.data.vae import locate

    _, file = locate(Path(weights))
    return file


def fetch(arguments: Namespace) -> None:
    from xdimo.config.load import parse
    from xdimo.config.schema import Dataset
    from xdimo.current import receipt
    from xdimo.data.fetch import fetch
    from xdimo.data.videos import stamp
    from xdimo.files import file_hash, write_json

    if arguments.plan:
        dataset = parse(Dataset, _json(arguments.plan, "--plan"))
    else:
        dataset = _bench(arguments).dataset
    if not dataset.fetched:
        raise UserError(
            f"dataset.videos: {dataset.videos}: a folder of your own, into which nothing is "
            "fetched; `fetched` is the folder for the packages of dataset.fetch"
        )
    folder = Path(dataset.videos)
    fetch(dataset.fetch, folder, arguments.cache)
    there = {name: folder / name for name in dataset.fetched}
    told = {n: {"sha256": file_hash(path), "stamp": stamp(path)} for n, path in there.items()}
    write_json(receipt(dataset), told)


def manifest(arguments: Namespace) -> None:
    from xdimo.data.manifest import build

    manifest = build(
        arguments.videos,
        arguments.output,
        window=arguments.window,
        expected=arguments.expected,
        decoder=arguments.decoder,
        timeout_s=arguments.timeout_s,
        workers=arguments.workers,
    )
    print(f"{arguments.output}: {manifest.counts}")


def latents(arguments: Namespace) -> None:
    from xdimo.config.load import parse
    from xdimo.data.latents import build
    from xdimo.spec import LatentsPlan, latents_plan, vae_spec

    if arguments.plan:
        plan = parse(LatentsPlan, _json(arguments.plan, "--plan"))
    else:
        plan = latents_plan(_bench(arguments))
    weights = _vae_weights(plan.vae.weights)
    build(
        arguments.manifest,
        arguments.videos,
        vae_spec(plan.vae, weights),
        weights,
        arguments.output,
        size=plan.size,
        flip=plan.flip,
        batch_frames=plan.batch_frames,
        device=arguments.device,
    )


def choose(arguments: Namespace) -> None:
    from xdimo.config.load import load_hardware, parse
    from xdimo.files import alone
    from xdimo.spec import ChoicePlan, choice_plan
    from xdimo.train.choose import choose, text

    if arguments.plan:
        plan = parse(ChoicePlan, _json(arguments.plan, "--plan"))
    else:
        bench = _bench(arguments)
        if arguments.target not in bench.targets:
            known = ", ".join(bench.targets)
            raise UserError(f"{arguments.target!r} is no target; allowed: {known}")
        plan = choice_plan(bench, arguments.target)
    with alone(f"choose {arguments.target}", arguments.queued):
        print(text(choose(plan, load_hardware(arguments.hardware), arguments.output)))


def spec(arguments: Namespace) -> None:
    from xdimo.data.manifest import read
    from xdimo.files import write_json
    from xdimo.spec import chosen_in, plan, resolve

    if arguments.plan:
        planned, vae = _json(arguments.plan, "--plan"), arguments.vae
    else:
        bench = _bench(arguments)
        planned, vae = plan(bench, arguments.run_name), arguments.vae or bench.vae.weights
    chosen = planned["implementation"]
    if chosen is None:
        if arguments.choice is None:
            raise UserError("train.implementation: auto; give --choice <what xdimo choose wrote>")
        clips = planned["clips_per_gpu"]
        chosen = chosen_in(arguments.choice, clips)
        if chosen is None:
            raise UserError(f"{arguments.choice}: nothing of {clips} clips a GPU; choose again")
    spec = resolve(planned, read(arguments.manifest).dataset, _vae_weights(vae), chosen)
    write_json(arguments.output, spec.to_json())
    print(f"{arguments.output}: {spec.hash}")


def launch(arguments: Namespace) -> int:
    from xdimo.config.load import load_hardware
    from xdimo.train.launch import launch

    return launch(
        arguments.spec,
        data=arguments.data,
        videos=arguments.videos,
        vae=arguments.vae,
        output=arguments.output,
        hardware=load_hardware(arguments.hardware),
        walltime_min=arguments.walltime_min,
        queued=arguments.queued,
        tries=arguments.tries,
    )


def train(arguments: Namespace) -> None:
    from xdimo.train.worker import run

    run(
        arguments.spec,
        arguments.folder,
        data=arguments.data,
        videos=arguments.videos,
        vae_weights=_vae_weights(arguments.vae),
        resume=arguments.resume,
    )


def calibrate(arguments: Namespace) -> None:
    from xdimo.config.load import load_hardware, parse
    from xdimo.config.schema import Model
    from xdimo.spec import model_spec
    from xdimo.train.instruments.calibration import by_hand, text

    model = model_spec(parse(Model, {"size": arguments.size}))
    if min(arguments.clips) < 1:
        raise UserError(f"--clips: {min(arguments.clips)}; expected 1 or more")
    found = by_hand(model, arguments.clips, arguments.precision, arguments.device)
    if found is None:  # another rank prints
        return
    rates, devices = found
    if arguments.json:
        print(json.dumps({"devices": devices, "ranks": rates}, indent=1))
    else:
        print(text(rates, devices, load_hardware(arguments.hardware), arguments.precision))


def metrics(arguments: Namespace) -> None:
    from xdimo.analysis.metrics import write
    from xdimo.config.load import load_hardware

    write(arguments.run_json, load_hardware(arguments.hardware), arguments.output)


def report(arguments: Namespace) -> None:
    from xdimo.config.load import load_hardware
    from xdimo.report.summary import render, write

    bench = _bench(arguments)
    summary = render(
        bench, load_hardware(bench.hardware), named(arguments.config), arguments.records
    )
    folder = arguments.records or Path(bench.results)
    write(summary, folder)
    print(folder / "summary.md")


def plot(arguments: Namespace) -> None:
    from xdimo.config.load import load_hardware
    from xdimo.report.plots.draw import draw

    bench = _bench(arguments)
    folder = (arguments.records or Path(bench.results)) / "plots"
    for path in draw(bench, load_hardware(bench.hardware), folder, arguments.records):
        print(path)


def describe(arguments: Namespace) -> None:
    from xdimo.config.load import check_model, parse
    from xdimo.config.schema import Model, Vae
    from xdimo.model.describe import describe, text
    from xdimo.spec import model_spec

    vae = Vae()
    top_k = min(2, arguments.experts) if arguments.top_k is None else arguments.top_k
    model = parse(Model, {"size": arguments.size, "experts": arguments.experts, "top_k": top_k})
    check_model(model)
    if arguments.frames < 1:
        raise UserError(f"--frames: {arguments.frames}; expected 1 or more")
    unit = vae.factor * model.patch
    if arguments.pixels < 1 or arguments.pixels % unit:
        raise UserError(f"--pixels: {arguments.pixels}; expected a multiple of {unit}")
    description = describe(
        model_spec(model),
        frames=arguments.frames,
        latent_size=arguments.pixels // vae.factor,
        latent_channels=vae.latent_channels,
    )
    print(json.dumps(description, indent=1) if arguments.json else text(description))


def audit(arguments: Namespace) -> int:
    from xdimo.config.load import load_hardware
    from xdimo.report.explain import as_json, as_text, broken, collect

    hardware = load_hardware(arguments.hardware)
    if arguments.card is not None and arguments.card not in hardware.cards:
        known = ", ".join(hardware.cards)
        raise UserError(f"--card: {arguments.card!r} is no card; allowed: {known}")
    paths = arguments.paths or [Path("config/history.csv")]
    findings = list(broken(paths, hardware)) if arguments.strict else []
    for finding in findings:
        print(f"{finding} [{finding.rule}]")
    found = collect(
        paths,
        hardware,
        card=arguments.card,
        gpus=arguments.gpus,
        global_batch=arguments.global_batch,
        model=arguments.model,
    )
    print(as_json(found, hardware) if arguments.json else as_text(found, hardware))
    if arguments.strict and not arguments.json:
        print(f"\n{len(found)} with figures; rules broken: {len(findings)}")
    return 1 if findings else 0


def doctor(arguments: Namespace) -> int:
    from xdimo.config.load import load_hardware
    from xdimo.doctor.login import look

    bench = _bench(arguments)
    hardware = load_hardware(bench.hardware)
    for name in filter(None, (arguments.on, arguments.here)):
        if name not in bench.targets:
            raise UserError(f"{name!r} is no target; allowed: {', '.join(bench.targets)}")
    if arguments.here:
        from xdimo.doctor.node import check

        findings = check(bench, hardware, arguments.here)
    elif arguments.on:
        from xdimo.doctor.login import look_on

        override = _json(arguments.override, "--override")
        findings = look_on(bench, arguments.on, list(map(str, arguments.config)), override)
    else:
        findings = look(bench, hardware, arguments.transcript)
    found = []
    for finding in findings:
        print(finding, flush=True)
        found.append(finding)
    if arguments.output:
        from dataclasses import asdict

        from xdimo.files import write_json

        write_json(arguments.output, {"lines": [asdict(finding) for finding in found]})
    return int(not all(finding.ok for finding in found))


def status(arguments: Namespace) -> None:
    from xdimo.scheduler.queue_session import site_of
    from xdimo.scheduler.status import lines

    bench = _bench(arguments)
    for line in lines(bench, site_of(bench)):
        print(line)


def cancel(arguments: Namespace) -> None:
    from xdimo.scheduler.queue_session import cancel

    bench = _bench(arguments)
    print(cancel(bench, arguments.names))


def keep(arguments: Namespace) -> None:
    from xdimo.config.load import load_hardware
    from xdimo.report.keep import keep

    bench = _bench(arguments)
    folder = Path("results/records") / bench.campaign
    runs = keep(bench, load_hardware(bench.hardware), folder)
    print(f"{folder}: {len(runs)} runs; git has them once you commit them")


def history(arguments: Namespace) -> None:
    from xdimo.config.load import load_hardware
    from xdimo.report.history import add

    bench = _bench(arguments)
    if arguments.campaign != bench.campaign:
        raise UserError(
            f"campaign {arguments.campaign!r} is not that of "
            f"{named(arguments.config)}: {bench.campaign!r}"
        )
    if bench.demo:
        raise UserError("a demo's figures say nothing about any hardware: no history of it")
    # Kept records last; those of a campaign not kept yet are the config's own.
    kept = Path("results/records") / bench.campaign
    _require_same(Path(bench.runs_folder), kept)
    records = kept if kept.exists() else None
    new, changed = add(bench, load_hardware(bench.hardware), Path(bench.history), records)
    print(f"{bench.history}: {new} rows added, {changed} brought up to date")


def _require_same(runs: Path, kept: Path) -> None:
    """Raises UserError where a run has been measured again since it was kept."""
    for copy in sorted(kept.glob("*/run.json")):
        newest = runs / copy.parent.name / "run.json"
        if newest.exists() and newest.read_bytes() != copy.read_bytes():
            raise UserError(f"{newest}: not what {copy} keeps; run `xdimo keep` first")
