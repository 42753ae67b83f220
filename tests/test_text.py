"""Text of a config is data: never a pattern of Snakemake, a word of a shell, or HTML."""

import copy
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import records
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tests.conftest import DATASET, ROOT, SMALL
from xdimo.config.load import check, load, load_hardware, parse, read_yaml
from xdimo.config.schema import Bench, Card
from xdimo.errors import UserError
from xdimo.files import read_json, write_json
from xdimo.report.summary import render

HOSTILE = (
    "{b} {wildcards.x} ${HOME} $(touch pwned) `touch pwned` \"'\n$'\\ | \\| <script>alert(1)"
    "</script> &lt; <img src=x onerror=alert(1)> $x_1$ 名 "
)
SECRET = "tok3n-0f-mine"
# Of another kind than text: a cell's name, an entry of hardware.yaml, and what is shell by design.
NAMED = {"baseline", "card", "setup"}


def text_keys(kind: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key that takes any text; `*` stands for the names and places inside a container."""
    for name, field in kind.model_fields.items():
        here = (*path, name)
        inner = [one for one in _parts(field.annotation) if isinstance(one, type)]
        models = [one for one in inner if issubclass(one, BaseModel)]
        container = any(one in (dict, list) for one in inner)
        for model in models:
            yield from text_keys(model, (*here, "*") if container else here)
        if str in inner and not models and not _has_pattern(field) and name not in NAMED:
            yield (*here, "*") if container else here


def _parts(annotation: Any) -> Iterator[Any]:
    """The types that an annotation names; of a mapping that of its values."""
    yield getattr(annotation, "__origin__", annotation)
    arguments = get_args(annotation)
    for argument in arguments[1:] if _is_dict(annotation) else arguments:
        yield from _parts(argument)


def _is_dict(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is dict


def _has_pattern(field: FieldInfo) -> bool:
    values = get_args(field.annotation)[-1:] if _is_dict(field.annotation) else [field]
    return "pattern=" in repr(values if _is_dict(field.annotation) else field)


# What rules have as input or output cannot hold these: the next test says that they are refused.
TAME = HOSTILE.translate(str.maketrans("", "", "{}>")).replace("</script", "")


def hostile(kind: type[BaseModel], value: dict[str, Any]) -> dict[str, Any]:
    """``value`` with every text of it replaced by the worst that may stand there."""
    for keys in text_keys(kind):
        for inside, last in _places(value, keys):
            before = copy.deepcopy(inside)
            for text in (HOSTILE, TAME):
                inside[last] = f"{text}{keys[-1]}"
                if _is_taken(kind, value):
                    break
            else:
                inside.clear()
                inside.update(before)
    return value


def _is_taken(kind: type[BaseModel], value: dict[str, Any]) -> bool:
    try:
        parsed = parse(kind, value)
        if isinstance(parsed, Bench):
            check(parsed, records.hardware())
    except UserError as refusal:
        assert "\n" not in str(refusal)
        return False
    return True


def _places(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[Any, Any]]:
    """Each place in ``value`` that ``keys`` name, as its container and the key in there."""
    first, *rest = keys
    if not rest:
        named = list(value) if isinstance(value, dict) else list(range(len(value)))
        for name in (named or ["NAME"]) if first == "*" else [first]:
            yield value, name
    elif first == "*":
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _places(inner, tuple(rest))
    elif first in value or len(rest) == 1:
        yield from _places(value.setdefault(first, {}), tuple(rest))


STUB = """
import json, os, sys
from pathlib import Path
given = sys.argv[1:]
with open("calls.jsonl", "a") as file:
    file.write(json.dumps(given) + "\\n")
told = {"manifest": {"dataset": os.environ["DATASET"]}}
told["choose"] = {"variants": {"1": {"chosen": "reference"}, "2": {"chosen": "reference"}}}
if "--output" in given:
    Path(given[given.index("--output") + 1]).write_text(json.dumps(told.get(given[2], {})))
from xdimo.report import PLOTS, TABLES
for name in {"plot": PLOTS, "report": TABLES}.get(given[2], ()):
    ends = [f"plots/{name}.png", f"plots/{name}.svg"] if given[2] == "plot" else [name]
    for end in ends:
        path = Path(os.environ["RESULTS"], end)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("-")
"""


class Place:
    """A folder with a config whose every text is hostile, and a workflow in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "{b} $(touch pwned) 'q' 名.yaml"
        base = json.loads(json.dumps(SMALL))
        base["train"] |= {"repeats": 1, "implementation": "auto"}
        base["targets"]["cpu_1"] |= {
            "variants": [1],
            "queue": None,
            "setup": ["export KEPT=${HOME}", f"export HF_TOKEN={SECRET}"],
        }
        base["targets"]["cpu_2"] |= {"queue": None, "enabled": False, "reason": "off"}
        cards = read_yaml(ROOT / "config/hardware.yaml")
        self.values = hostile(Bench, base)
        cards["cards"]["cpu"] = hostile(Card, cards["cards"]["cpu"])
        self.write(self.values["hardware"], yaml.safe_dump(cards, allow_unicode=True))
        self.write(self.values["history"], (ROOT / "config/history.csv").read_text())
        self.write(f"{self.values['dataset']['videos']}/a.mp4", "-")
        weights = self.values["vae"]["weights"]
        self.write(f"{weights}/config.json", '{"_class_name": "AutoencoderKL"}')
        self.write(f"{weights}/diffusion_pytorch_model.safetensors", "-")
        self.config.write_text(yaml.safe_dump(self.values, allow_unicode=True))

    def write(self, path: str, text: str) -> None:
        assert not Path(path).is_absolute()  # a file of the checkout
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(text, encoding="utf-8")

    def snakemake(self, *arguments: str) -> None:
        self.write("stub.py", STUB)
        self.write("bash_env", f'python() {{ {shlex.quote(sys.executable)} stub.py "$@"; }}\n')
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")]
        command += ["--cores", "2", "--configfile", str(self.config), *arguments]
        more = {"BASH_ENV": str(self.folder / "bash_env"), "PYTHONPATH": str(ROOT)}
        more |= {"DATASET": DATASET, "RESULTS": self.values["results"]}
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**os.environ, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-3000:]

    @property
    def calls(self) -> dict[str, list[str]]:
        """The words that each verb was given."""
        lines = (self.folder / "calls.jsonl").read_text().splitlines()
        return {call[2]: call[3:] for call in map(json.loads, lines)}


def test_every_text_of_the_config_reaches_its_verb_as_it_is(tmp_path: Path) -> None:
    place = Place(tmp_path)
    values = place.values
    place.snakemake()
    calls = place.calls
    assert set(calls) == {
        *("manifest", "latents", "choose", "spec", "launch", "metrics", "plot", "report")
    }
    assert calls["manifest"][0] == values["dataset"]["videos"]
    assert values["vae"]["weights"] in calls["spec"]
    assert json.loads(calls["latents"][4])["vae"]["weights"] == values["vae"]["weights"]
    environment = json.loads(calls["spec"][2])["environment"]
    assert environment == values["targets"]["cpu_1"]["environment"]
    assert values["hardware"] in calls["launch"] and values["hardware"] in calls["choose"]
    assert calls["report"] == calls["plot"] == ["--config", place.config.name]
    assert not list(tmp_path.rglob("pwned"))

    # The page that shows results and params: paths of rules, no other text.
    place.snakemake("--report", "report.html")
    page = (tmp_path / "report.html").read_text()
    assert set(re.findall(r"(?:名|\\u540d) (\w+)", page)) <= {"results", "hardware", "history"}
    assert SECRET not in page


def rows(document: str) -> Iterator[list[str]]:
    """Cells of every line of every table, as GitHub's Markdown splits it."""
    for line in document.splitlines():
        if line.startswith("|"):
            yield re.findall(r"((?:\\.|[^\\|])*)\|", line[1:])


def test_no_text_is_html_or_breaks_a_table(tmp_path: Path, monkeypatch: Any) -> None:
    place = Place(tmp_path)
    monkeypatch.chdir(tmp_path)
    bench = load(place.config.name)
    hardware = load_hardware(bench.hardware)
    plain = bench.model_copy(update={"vae": bench.vae.model_copy(update={"weights": "random"})})
    records.write_run(plain, "cpu_1-bs1-r1", outcome="nan", reason=HOSTILE)
    video = {"path": HOSTILE, "status": "short", "reason": HOSTILE}
    records.write_manifest(bench)
    manifest = Path(bench.results) / "data/manifest.json"
    write_json(manifest, {**read_json(manifest), "videos": [video]})
    summary = render(bench, hardware, place.config.name)
    for document in (summary.en, summary.zh):
        widths = [len(cells) for cells in rows(document)]
        tables = re.findall(r"(?:^\|.*\n)+", document, re.MULTILINE)
        of_each = [{len(cells) for cells in rows(table)} for table in tables]
        assert all(len(found) == 1 for found in of_each) and len(tables) == 8, of_each
        assert sum(widths) and not re.search(r"<[a-z/!]|&lt;(?=\s)", document, re.IGNORECASE)
        assert document.startswith("# ") and document.splitlines()[0].endswith("名 title")
    assert not (tmp_path / "pwned").exists()


OTHER = "a name of its own; rename it, not "
REFUSED = [
    ("results", "a{b}", "results: Snakemake takes { in a path for " + OTHER),
    ("hardware", "{b}.yaml", "hardware: Snakemake takes { in a path for " + OTHER),
    ("history", "b}.csv", "history: Snakemake takes } in a path for " + OTHER),
    ("results", "a<b>", "results: Snakemake takes <b> in a path for " + OTHER),
    ("results", "a</script/b", "results: report.html would take this path for its own end"),
    *((key, "", f"{key}: an empty path") for key in ("results", "history", "dataset.videos")),
    ("vae.weights", "", "vae.weights: an empty path; expected a file or folder"),
    ("results", "-f", "results: commands take this for an option; write ./-f"),
    ("campaign", "c" * 129, "campaign: String should have at most 128 characters"),
    ("targets", {"t" * 129: SMALL["targets"]["cpu_1"]}, "String should have at most 128 char"),
    ("results", "名" * 86, "results: too long: at most 255 bytes a folder or file, 2048 in all"),
    ("history", "a/" * 2048, "history: too long: at most 255 bytes a folder or file, 2048 in all"),
    ("title", "a\0b", r"title: 'a\x00b' holds a NUL or half a character; remove it"),
    ("title", "\ud800", r"title: '\ud800' holds a NUL or half a character; remove it"),
    ("targets.cpu_1.queue", "q; reboot", "targets.cpu_1.queue: String should match pattern"),
    ("targets.cpu_1.hosts", ["a b"], "targets.cpu_1.hosts.0: String should match pattern"),
    ("targets.cpu_1.environment", {"A B": "1"}, "targets.cpu_1.environment.A B: String should"),
    *(
        (
            "targets.cpu_2.environment",
            {name: "1"},
            f"targets.cpu_2.environment.{name}: a secret would stand in spec.json, the log and "
            "git; export it in a file that you alone can read, and source that file in a line of "
            "targets.cpu_2.setup",
        )
        for name in (
            "HF_TOKEN",
            "TOKEN",
            "AWS_SECRET_ACCESS_ID",
            "KEY",
            "db_password",
            "WANDB_API_KEY",
            "OPENAI_APIKEY",
            "HF_TOKENS",
            "PGPASSWD",
            "Passwd2",
        )
    ),
    (
        "targets.cpu_2.environment",
        {"HTTPS_PROXY": "http://me:pw@proxy:3128"},
        "targets.cpu_2.environment.HTTPS_PROXY: a secret would stand in spec.json",
    ),
    ("results", "/", "results: /: the root of all files; choose a folder of its own"),
    ("results", "/tmp/..", "results: /tmp/..: the root of all files"),
    ("results", "/dev/null", "results: /dev/null: /dev/null is no folder; choose another"),
    ("results", f"{__file__}/a", f"results: {__file__}/a: {__file__} is no folder; choose"),
]


@pytest.mark.parametrize(("key", "value", "says"), REFUSED)
def test_a_text_that_cannot_be_is_refused_in_one_line(key: str, value: Any, says: str) -> None:
    over: Any = value
    for part in reversed(key.split(".")):
        over = {part: over}
    with pytest.raises(UserError) as refusal:
        load([], _laid(SMALL, over))
    assert says in str(refusal.value) and "\n" not in str(refusal.value)


def _laid(below: Any, above: Any) -> Any:
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {**below, **{key: _laid(below.get(key), value) for key, value in above.items()}}


def test_a_name_that_only_sounds_like_a_secret_is_taken() -> None:
    names = {"TOKENIZERS_PARALLELISM": "false", "KEYBOARD": "1", "NCCL_DEBUG": "INFO"}
    names["HTTPS_PROXY"] = "http://proxy:3128/a@b"
    bench = load([], _laid(SMALL, {"targets": {"cpu_1": {"environment": names}}}))
    assert bench.targets["cpu_1"].environment == names
