"""What the documents promise of the code, held by a test."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from xdimo.cli import parser
from xdimo.config import schema

# Who may import whom: a room, and the rooms below it.
BASE = {"config", "echo", "errors", "files", "implementations", "outcome", "spec"}
BELOW = {
    "echo": set(),
    "errors": set(),
    "files": {"echo", "errors"},
    "implementations": set(),
    "outcome": set(),
    "config": {"errors", "files", "implementations"},
    "spec": {"config", "errors", "files", "implementations"},
    "data": BASE,
    "current": BASE | {"data"},
    "model": BASE,
    "records": BASE | {"model"},
    "analysis": BASE | {"model", "records"},
    "audit": BASE | {"analysis", "model", "records"},
    "report": BASE | {"analysis", "audit", "model", "records"},
    "train": BASE | {"data", "model", "records"},
    "scheduler": BASE | {"data", "train"},
    "doctor": BASE | {"data", "scheduler", "train"},
}
ALSO = {schema.Target: "PREPARER", schema.Hardware: "self", schema.Queue: "queue"}
TORCH_FREE = BASE | {"analysis", "audit", "current", "doctor", "records", "report", "scheduler"}


def modules() -> list[tuple[str, Path]]:
    """Room and file of every module but the entry points."""
    found = []
    for path in sorted((ROOT / "xdimo").rglob("*.py")):
        room = path.relative_to(ROOT / "xdimo").parts[0].removesuffix(".py")
        if room not in ("__init__", "__main__", "cli", "verbs"):
            found.append((room, path))
    return found


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_point_down() -> None:
    for room, path in modules():
        ours = {name.split(".")[1] for name in imported(path) if name.startswith("xdimo.")}
        above = ours - BELOW[room] - {room, "__version__"}
        assert not above, f"{path.relative_to(ROOT)} imports {above}"


def test_no_two_modules_share_a_file_name() -> None:
    names = Counter(path.name for _, path in modules() if path.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_only_the_workflow_imports_snakemake() -> None:
    for _, path in modules():
        assert not any(name.startswith("snakemake") for name in imported(path)), path


def _loads(statement: str, forbidden: tuple[str, ...]) -> list[str]:
    program = f"{statement}\nimport sys; print([n for n in {forbidden!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(ast.literal_eval(done.stdout.splitlines()[-1]))


def test_workflow_and_report_need_no_torch() -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for room, path in modules()
        if room in TORCH_FREE
    ]
    rules = "\n".join(path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk"))
    names += re.findall(r"^from (xdimo\S*) import", rules, re.MULTILINE)
    assert _loads(f"import {', '.join(names)}", ("torch", "timm", "diffusers", "decord")) == []


def test_help_imports_nothing_heavy() -> None:
    statement = "from xdimo.cli import parser; parser().format_help()"
    assert _loads(statement, ("torch", "pandas", "timm", "numpy", "pydantic", "yaml")) == []


def verbs() -> list[str]:
    return list(parser()._subparsers._group_actions[0].choices)  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize("verb", verbs())
def test_every_verb_has_an_example_that_parses(verb: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args([verb, "--help"])
    example = capsys.readouterr().out.split("example:\n")[1].split()
    assert example[:2] == ["xdimo", verb]
    parser().parse_args(example[1:])


def test_every_config_key_is_read() -> None:
    """A key that nothing reads would let a person believe it does something."""
    files = [path for _, path in modules()] + [ROOT / "xdimo/verbs.py", ROOT / "Snakefile"]
    files += sorted((ROOT / "workflow").rglob("*.smk"))
    code = "\n".join(path.read_text() for path in files)
    kinds = [kind for kind in vars(schema).values() if isinstance(kind, type)]
    for kind in kinds:
        if issubclass(kind, schema.Strict) and kind is not schema.Strict:
            # What code calls such an object: `target.queue`, `bench.targets[name].gpus`.
            owner = rf"(?i:{kind.__name__}s?|{ALSO.get(kind, kind.__name__)})(\[[^\]]*\]+)?"
            for name in kind.model_fields:
                read = re.search(rf"\b{owner}\.{name}\b", code)
                # Written out as a whole where every field of the section goes into the spec.
                whole = kind is schema.Vae and "vae.model_dump(" in code
                assert read or whole, f"{kind.__name__}.{name} is read nowhere"


def test_conda_environment_is_the_same_set() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((ROOT / "workflow/envs/xdimo.yaml").read_text())
    assert environment["dependencies"][-1]["pip"] == project["dependencies"]


def test_every_dependency_is_pinned_and_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = (ROOT / "constraints.txt").read_text().lower().replace("_", "-")
    explained = (ROOT / "docs/dependencies.md").read_text()
    for requirement in project["dependencies"] + project["optional-dependencies"]["dev"]:
        name = re.split(r"[>=<]", requirement)[0]
        assert re.search(rf"^{name.lower()}==", pinned, re.MULTILINE), f"{name} is not pinned"
        if not name.startswith("types-") and not name.endswith("-stubs"):
            assert name in explained, f"{name} is not explained"


def test_readme_fits_a_sitting_and_its_verbs_exist() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    used = set(re.findall(r"^xdimo (\w+)|`xdimo (\w+)", text, re.MULTILINE))
    assert used
    assert {first or second for first, second in used} <= set(verbs())


def test_documents_link_to_files_that_exist() -> None:
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "config/README.md"]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text()):
            assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_documented_commands_need_no_quotes_and_no_dashes() -> None:
    """A forgotten quote or -- ends in a traceback before the Snakefile is read."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "config").iterdir()]
    commands = [
        command
        for page in pages
        for command in re.findall(r"\bsnakemake -?\w[^`\n#]*", page.read_text(encoding="utf-8"))
    ]
    assert len(commands) > 20
    risky = re.compile(r"--config |-R \S+ \S| -- |[\"'{]")
    assert [command for command in commands if risky.search(command)] == []
