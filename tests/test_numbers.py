"""Numbers are checked at the door: of configs, tables, specs and records."""

import json
from collections.abc import Iterator
from importlib import import_module
from math import inf, nan
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import records
import yaml
from pydantic import BaseModel, ValidationError

from tests.conftest import ROOT, SMALL
from tests.test_laws import modules
from tests.test_metrics import log_of, relog
from xdimo.analysis.metrics import derive
from xdimo.audit.claims import COLUMNS, read
from xdimo.cli import parser
from xdimo.config.load import load, parse, read_yaml, typed
from xdimo.config.schema import Bench, Hardware
from xdimo.errors import UserError
from xdimo.records.reader import read_run
from xdimo.report.summary import render

HARDWARE = records.hardware()


def models() -> list[type[BaseModel]]:
    """Every pydantic model of the package."""
    for _, path in modules():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if "BaseModel" in (text := path.read_text()) or "(Strict)" in text:
            import_module(name)
    found, left = set(), [BaseModel]
    while left:
        kinds = left.pop().__subclasses__()
        found |= {kind for kind in kinds if kind.__module__.startswith("xdimo.")}
        left += kinds
    return sorted(found, key=lambda kind: (kind.__module__, kind.__name__))


def holding(annotation: Any, value: float) -> Any:
    """A value of the annotated kind with ``value`` where it has a float; None where it has none."""
    if annotation is float:
        return value
    inside = [holding(part, value) for part in get_args(annotation)]
    kind = get_origin(annotation)
    if all(part is None for part in inside):
        return None
    if kind is dict:
        return {"name": inside[-1]}
    if kind in (list, tuple):
        return [part for part in inside if part is not None]
    return next(part for part in inside if part is not None)


@pytest.mark.parametrize("value", [inf, -inf, nan])
def test_every_float_of_every_model_is_finite(value: float) -> None:
    fields = [
        (kind, name, field.alias or name, held)
        for kind in models()
        for name, field in kind.model_fields.items()
        if (held := holding(field.annotation, value)) is not None
    ]
    assert len(fields) > 40
    for kind, name, key, held in fields:
        with pytest.raises(ValidationError) as refusal:
            kind.model_validate({key: held})
        found = {(error["loc"][0], error["type"]) for error in refusal.value.errors()}
        assert (key, "finite_number") in found, f"{kind.__name__}.{name}"


def config(tmp_path: Path, key: str, text: str) -> Path:
    """The small config with ``key``'s value written as ``text``."""
    section, name = key.rsplit(".", 1) if "." in key else ("", key)
    path = tmp_path / "over.yaml"
    indent = ""
    lines = []
    for part in section.split(".") if section else []:
        lines.append(f"{indent}{part}:")
        indent += "  "
    path.write_text("\n".join([*lines, f"{indent}{name}: {text}"]) + "\n")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    return path


def _integers(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(schema, list):
        for inner in schema:
            yield from _integers(inner, path)
    elif isinstance(schema, dict):
        if schema.get("type") == "integer":
            yield path, schema
        for name, inner in schema.items():
            yield from _integers(inner, f"{path}.{name}")


def test_every_integer_of_the_config_has_both_ends() -> None:
    found = dict(_integers(Bench.model_json_schema()))
    assert len(found) > 30
    assert [path for path, kind in found.items() if not {"minimum", "maximum"} <= set(kind)] == []


REFUSED = [
    ("title", "!!bool maybe", "line 1: 'maybe' is no bool"),
    ("train.workers", '!!int "2:0"', "line 2: '2:0' is no int"),
    ("queue.poll_s", "!!float 1:30", "line 2: '1:30' is no float"),
    ("title", "!!timestamp soon", "line 1: 'soon' is no timestamp"),
    ("title", "!!timestamp 2026-11-24", "line 1: '2026-11-24' is no timestamp"),
    ("train.repeats", "1001", "train.repeats: Input should be less than or equal to 1000"),
    ("train.workers", "1025", "train.workers: Input should be less than or equal to 1024"),
    ("train.profile_steps", "1001", "train.profile_steps: Input should be less than or equal to"),
    ("train.clip_from_step", "2147483648", "train.clip_from_step: Input should be less than or"),
    ("train.clip_norm", ".inf", "train.clip_norm: Input should be a finite number, not inf"),
    ("train.learning_rate", ".nan", "train.learning_rate: Input should be a finite number"),
    ("train.learning_rate", "1e999", "train.learning_rate: Input should be a finite number"),
    ("queue.poll_s", ".inf", "queue.poll_s: Input should be a finite number, not inf"),
    ("train.seed", "9007199254740993", "train.seed: Input should be less than or equal to 9007"),
    ("train.seed", "18446744073709551616", "train.seed: Input should be less than or equal to"),
    ("train.seed", "-1", "train.seed: Input should be greater than or equal to 0"),
    ("vae.seed", "18446744073709551616", "vae.seed: Input should be less than or equal to 184"),
    ("train.timed_steps", "9999999999", "train.timed_steps: Input should be less than or equal"),
    (
        "targets.cpu_1.walltime_min",
        "1:30:00",
        "targets.cpu_1.walltime_min: Input should be a valid integer, not '1:30:00' "
        "(a time is one number here; write it in minutes, such as 90)",
    ),
    (
        "queue.grace_s",
        "10:00",
        "queue.grace_s: Input should be a valid number, not '10:00' (a time",
    ),
    ("targets.cpu_1.gpus", "010", "targets.cpu_1.gpus: Input should be a valid integer, not '010'"),
    ("train.warmup_steps", "1e1", "train.warmup_steps: Input should be a valid integer, not 10.0"),
]


@pytest.mark.parametrize(("key", "text", "says"), REFUSED, ids=lambda row: str(row)[:30])
def test_a_number_that_cannot_be_is_refused(key: str, text: str, says: str, tmp_path: Path) -> None:
    over = config(tmp_path, key, text)
    with pytest.raises(UserError) as refusal:
        load([tmp_path / "small.yaml", over])
    assert f": {says}" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.learning_rate", "1e-4", 1e-4),
        ("train.learning_rate", "2E-05", 2e-5),
        ("train.learning_rate", "3.e-4", 3e-4),
        ("train.clip_norm", "1", 1.0),
        ("queue.poll_s", ".5", 0.5),
        ("queue.poll_s", "!!float 3", 3.0),
        ("train.workers", '!!int "3"', 3),
        ("demo", "!!bool yes", True),
        ("train.clip_from_step", "20_000", 20_000),
        ("title", "2026-11-24", "2026-11-24"),
        ("title", "1:30:00", "1:30:00"),
        ("title", "007", "007"),
        ("vae.seed", "18446744073709551615", 2**64 - 1),
    ],
)
def test_a_number_is_what_it_looks_like(key: str, text: str, value: Any, tmp_path: Path) -> None:
    over = config(tmp_path, key, text)
    found: Any = load([tmp_path / "small.yaml", over])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(202612, "202612"), (1e5, "100000.0"), (True, "True"), ({"x": None}, "...")],
)
def test_a_number_for_a_text_on_the_command_line_says_what_to_write(
    value: Any, shown: str, small_config: Path
) -> None:
    with pytest.raises(UserError) as refusal:
        load(small_config, {"campaign": value})
    assert str(refusal.value).endswith(
        f"campaign: {value} is no text, and no quotes make it text after --config; write it into "
        f'a file of --configfile, as you mean it: campaign: "{shown}"'
    )


def test_the_command_line_takes_numbers_as_files_do(small_config: Path) -> None:
    assert typed({"a": "1e-4", "b": ["3", "x: [", "1:30"]}) == {"a": 1e-4, "b": [3, "x: [", "1:30"]}
    assert typed(["!!bool maybe", "!!int 2:0"]) == ["!!bool maybe", "!!int 2:0"]
    assert (
        load(small_config, typed({"train": {"learning_rate": "1e-3"}})).train.learning_rate == 1e-3
    )


@pytest.mark.parametrize("peak", [-989, 0, inf, nan])
def test_a_peak_is_more_than_nothing_and_finite(peak: float) -> None:
    table = read_yaml(ROOT / "config/hardware.yaml")
    table["cards"]["h200"]["devices"]["NVIDIA H200"] = peak
    with pytest.raises(UserError, match=r"cards\.h200\.devices\.NVIDIA H200: Input should be"):
        parse(Hardware, table)


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    return records.bench(tmp_path / "results")


def changed(folder: Path, event: str, **fields: Any) -> None:
    """The run's log with every event of this kind changed, and a run.json that vouches for it."""
    lines = []
    for line in map(json.loads, log_of(folder)):
        told = {**line, **fields} if line["event"] == event else line
        lines.append(json.dumps(told).replace('"1e999"', "1e999") + "\n")
    relog(folder, lines)


IMPOSSIBLE = [
    ("step", {"loss": nan}, "loss: Input should be a finite number"),
    ("step", {"loss": "1e999"}, "loss: Input should be a finite number"),
    ("step", {"grad_norm": -1.0}, "grad_norm: Input should be greater than or equal to 0"),
    ("memory", {"peak_reserved_gib": -3.0}, "peak_reserved_gib: Input should be greater than or"),
    ("memory", {"peak_reserved_gib": "1e999"}, "peak_reserved_gib: Input should be a finite"),
    ("memory", {"host_peak_gib": -1.0}, "host_peak_gib: Input should be greater than or equal"),
    ("memory", {"peak_reserved_gib": 900.0}, "peak_reserved_gib: 900, more than device_gib 139.8"),
    ("memory", {"peak_allocated_gib": 50.0}, "peak_allocated_gib: 50, more than peak_reserved_gib"),
    ("memory", {"host_peak_gib": 1e9}, "host_peak_gib: Input should be less than or equal to 104"),
    ("step", {"data_wait_s": 50.0}, "data_wait_s: 50 in all so far; the steps took 0.0"),
    ("step", {"lr": 1e-3}, "step 1: lr 0.001; the spec says 0.0001"),
    ("window", {"wall_s": 100.0}, "window.wall_s: 100; its steps take 1.0"),
    ("window", {"wall_s": 1e308}, "wall_s: Input should be less than or equal to"),
    ("footer", {"wall_s": nan}, "wall_s: Input should be a finite number"),
]


@pytest.mark.parametrize(("event", "fields", "says"), IMPOSSIBLE, ids=lambda row: str(row)[:40])
def test_a_record_that_cannot_be_is_refused(
    bench: Any, event: str, fields: dict[str, Any], says: str
) -> None:
    folder = records.write_run(bench, "gpu_h200-bs1-r1")
    changed(folder, event, **fields)
    with pytest.raises(UserError) as refusal:
        read_run(folder)
    assert says in str(refusal.value)
    row = render(bench, HARDWARE, "c").data["cells"][2]
    assert (row["state"], row["metrics"]) == ("refused", None)


def test_a_run_on_the_cpu_has_no_card(tmp_path: Path) -> None:
    bench = records.bench(tmp_path / "results", "demo.yaml")
    records.write_run(bench, "cpu_1-bs1-r1", devices=["NVIDIA H200"])
    folder = records.write_run(bench, "cpu_2-bs1-r1")
    changed(folder, "memory", device_gib=139.8)
    cells = {cell["cell"]: cell for cell in render(bench, HARDWARE, "c").data["cells"]}
    assert cells["cpu_1-bs1"]["reason"] == "not the target's card: NVIDIA H200; the spec says cpu"
    assert cells["cpu_2-bs1"]["reason"].endswith("device_gib: 139.8 of a run on the CPU")


def test_time_outside_the_steps_is_flagged(bench: Any) -> None:
    folder = records.write_run(bench, "gpu_h200-bs1-r1")
    assert derive(read_run(folder), HARDWARE)["flags"] == []
    changed(folder, "window", wall_s=1.6)
    (flag,) = derive(read_run(folder), HARDWARE)["flags"]
    assert flag.startswith("outside the steps: 3") and flag.endswith(" %")
    assert "time of the window that lies in no step: 3" in render(bench, HARDWARE, "c").en


HEADER = ",".join(COLUMNS)


@pytest.mark.parametrize(
    ("column", "text", "says"),
    [
        ("gpus", "0", "gpus: 0 is not a count; expected a whole number from 1 on"),
        ("gpus", "2.5", "gpus: 2.5 is not a count"),
        ("gpus", "-8", "gpus: -8 is not a count"),
        ("global_batch", "0.5", "global_batch: 0.5 is not a count"),
        ("steps_per_s", "nan", "steps_per_s: 'nan' is no number; expected such as 3.5"),
        ("steps_per_s", "1e999", "steps_per_s: 1e999 cannot be"),
        ("steps_per_s", "0", "steps_per_s: 0 cannot be; expected more than 0"),
        ("steps_per_s", "１", "steps_per_s: '１' is no number"),
        ("claimed_tflops", "-3", "claimed_tflops: -3 cannot be"),
        ("tensor_peak_tflops", "inf", "tensor_peak_tflops: 'inf' is no number"),
    ],
)
def test_a_count_of_the_history_is_a_count(
    column: str, text: str, says: str, tmp_path: Path
) -> None:
    row = {**dict.fromkeys(COLUMNS, ""), "gpus": "8", "global_batch": "8", "steps_per_s": "3.5"}
    path = tmp_path / "history.csv"
    path.write_text(f"{HEADER}\n{','.join({**row, column: text}.values())}\n", encoding="utf-8")
    with pytest.raises(UserError) as refusal:
        read(path)
    assert str(refusal.value).startswith(f"{path} line 2: {says}")


@pytest.mark.parametrize(
    ("encoding", "says"),
    [
        ("gb18030", r"history\.csv line 2: not UTF-8 text \(byte 0x\w\w\); it looks like GB18030"),
        (
            "utf-16",
            r"history\.csv line 1: not UTF-8 text \(byte 0xff\); it looks like UTF-16; save",
        ),
        ("utf-16-le", r"history\.csv line 1: not UTF-8 text \(byte 0x00\); it looks like UTF-16"),
    ],
)
def test_a_history_of_another_encoding_is_named(encoding: str, says: str, tmp_path: Path) -> None:
    text = f"{HEADER}\n显卡甲,h200,8,8,3.5{10 * ','}\n"
    (tmp_path / "history.csv").write_bytes(text.encode(encoding))
    with pytest.raises(UserError, match=says):
        read(tmp_path / "history.csv")


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    path.write_text(f"{HEADER}\n显卡甲,h200,8,8,3.5{10 * ','}\n", encoding="utf-8-sig")
    assert read(path)[0].text["hardware"] == "显卡甲"


@pytest.mark.parametrize(
    "words",
    [
        ("manifest", "videos", "--output", "m.json", "--workers", "0"),
        ("manifest", "videos", "--output", "m.json", "--timeout-s", "-1"),
        ("manifest", "videos", "--output", "m.json", "--expected", "0"),
        ("launch", "s.json", "--data", "d", "--output", "r.json", "--walltime-min", "²"),
        ("audit", "--gpus", "0"),
        ("audit", "--global-batch", "-8"),
    ],
)
def test_a_count_on_the_command_line_is_one(words: tuple[str, ...], capsys: Any) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(words)
    assert "expected a whole number from 1 on" in capsys.readouterr().err
