"""One YAML file -> Bench, checked once, before any job. Every refusal is one line."""

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from xdimo.config.schema import Bench, Hardware, Model, Target, dimensions
from xdimo.errors import FileError, UserError
from xdimo.files import read_text
from xdimo.implementations import IMPLEMENTATIONS, refusal

Kind = TypeVar("Kind", bound=BaseModel)

# Words in the name of a variable that is nobody else's business.
SECRET = re.compile(
    r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL)S?[0-9]*(_|$)", re.IGNORECASE
)
PASSWORD = re.compile(r"://[^/?#\s@]*:[^/\s]*@")  # in a URL

# Targets are asked for by name, beside the workflow's own names.
STEPS = frozenset({"all", "fetch", "manifest", "latents", "spec", "metrics", "plot", "report"})
RULES = STEPS | {"unknown"}


_TAG = "tag:yaml.org,2002:"
_REPLACED = {_TAG + kind for kind in ("int", "float", "timestamp")}


class _Yaml(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error, and numbers are what they look like.

    PyYAML reads YAML 1.1: 1:30:00 is 5400 there, 010 is 8, and 1e-4 is text. Here the first two are
    text and the third is a number, as in YAML 1.2; a date is text too.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [known for known in found if known[0] not in _REPLACED]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Yaml.add_implicit_resolver(
    _TAG + "int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789")
)
_Yaml.add_implicit_resolver(
    _TAG + "float",
    re.compile(
        r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?"
        r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def _mapping(loader: _Yaml, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key, _ in node.value:
        where = f"line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{where}: a key must be a word, not a list or a mapping")
        if key.value in seen:
            raise UserError(f"{where}: key {key.value!r} stands twice")
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_Yaml.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _tagged(loader: _Yaml, node: yaml.ScalarNode) -> Any:
    """A number or truth value is written as one, also behind its tag: `!!int "2:0"` is none."""
    text, kind = loader.construct_scalar(node), node.tag.removeprefix(_TAG)
    found = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    if found != node.tag and (found, kind) != (_TAG + "int", "float"):
        raise UserError(f"line {node.start_mark.line + 1}: {text!r} is no {kind}")
    return getattr(yaml.SafeLoader, f"construct_yaml_{kind}")(loader, node)


for _kind in ("int", "float", "bool", "timestamp"):
    _Yaml.add_constructor(_TAG + _kind, _tagged)
_NOT_YAML = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML (or JSON) file whose top is a mapping. Raises FileError that names the file."""
    text = read_text(path)
    try:
        value = yaml.load(text, _Yaml)
    except UserError as error:
        raise FileError(f"{path}: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise FileError(f"{path}{line}: not YAML: {error.problem}") from None
    except _NOT_YAML as error:
        raise FileError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise FileError(f"{path}: expected keys and values, found {type(value).__name__}")
    return value


def load(files: str | Path | Sequence[str | Path], over: Mapping[str, Any] | None = None) -> Bench:
    """The benchmark that one file describes, or several, later ones replacing single values.

    ``title`` and ``demo`` are of the last file alone.
    ``over`` replaces values in the same way (Snakemake's ``--config``).
    Raises UserError: one line, with the file, the path of the key and what is allowed.
    """
    paths = [files] if isinstance(files, str | Path) else list(files)
    value: dict[str, Any] = {}
    for path in paths:
        above = read_yaml(path)
        with naming(path):
            # They say what the file below is, and this makes something else of it.
            below = {key: value[key] for key in value if key not in ("title", "demo")}
            value = _laid_over(below, above)
    with naming(" + ".join(map(str, paths))):
        value = _laid_over(value, over or {})
        _check_text(value)
        bench = parse(Bench, value, typed_in=over or {})
        check(bench, load_hardware(bench.hardware))
    return bench


def typed(value: Any) -> Any:
    """Values that Snakemake's ``--config`` left as text, as the numbers a YAML file would give."""
    if isinstance(value, Mapping):
        return {key: typed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [typed(inner) for inner in value]
    if isinstance(value, str):
        try:
            plain = yaml.load(value, _Yaml)
        except (UserError, *_NOT_YAML):
            return value
        return plain if plain is None or isinstance(plain, bool | int | float) else value
    return value


def load_hardware(path: str | Path) -> Hardware:
    with naming(path):
        return parse(Hardware, read_yaml(path))


@contextmanager
def naming(files: str | Path) -> Iterator[None]:
    """Errors inside begin with the name of a file: their own, or this."""
    try:
        yield
    except FileError:
        raise
    except UserError as error:
        raise FileError(f"{files}: {error}") from None


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both, values of ``above`` going first; a target that it sets to null is left out.

    Raises UserError where ``below`` has no target of that name.
    """
    merged = _merged(below, above)
    targets = merged.get("targets")
    if isinstance(targets, Mapping):
        known = below.get("targets")
        names = [str(name) for name in known] if isinstance(known, Mapping) else []
        for name, target in targets.items():
            if target is None and name not in names:
                raise UserError(
                    f"targets.{name}: null leaves out a target of the file below; "
                    f"allowed: {', '.join(names) or 'none, there is no such file'}"
                )
        merged["targets"] = {n: target for n, target in targets.items() if target is not None}
    return merged


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        nested = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(old, value) if nested else value  # type: ignore[arg-type]
    return merged


def parse(kind: type[Kind], value: Any, typed_in: Mapping[str, Any] | None = None) -> Kind:
    """``value`` as ``kind``; raises UserError with the path of the first wrong key.

    ``typed_in``: the part of ``value`` that comes from the command line.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise UserError(_explain(kind, error, typed_in or {})) from None


def _explain(kind: type[BaseModel], error: ValidationError, typed_in: Mapping[str, Any]) -> str:
    # What a wrong key is the default of is no mistake of its own.
    told = (one for one in error.errors() if one["type"] != "default_factory_not_called")
    # A misspelt key says more than the missing one it leaves behind.
    first, *others = sorted(told, key=lambda one: one["type"] != "extra_forbidden")
    where = [part for part in first["loc"] if part != "[key]"]
    path = ".".join(str(part) for part in where)
    if first["type"] == "extra_forbidden":
        known = ", ".join(sorted(_fields(kind, where[:-1])))
        what = f"unknown key; allowed: {known}"
    elif first["type"] == "missing":
        what = "missing; it has no default"
    elif first["type"] == "string_type" and _holds(typed_in, where):
        plain = isinstance(first["input"], bool | int | float)
        line = f'{where[-1]}: "{first["input"] if plain else "..."}"'
        what = (
            f"{first['input']!r} is no text, and no quotes make it text after --config; write it "
            f"into a file of --configfile, as you mean it: {line}"
        )
    else:
        said = first["msg"].removeprefix("Value error, ")
        what = f"{said}, not {first['input']!r}{_advice(where, first)}"
    named = ", ".join(dict.fromkeys(".".join(str(p) for p in other["loc"]) for other in others))
    more = f" (and {len(others)} more: {named})" if others else ""
    return f"{path}: {what}{more}"


def _holds(typed_in: Any, path: Iterable[str | int]) -> bool:
    """Whether the command line gave the value at ``path``."""
    for part in path:
        if not isinstance(typed_in, Mapping) or part not in typed_in:
            return not isinstance(typed_in, Mapping)  # inside a list that was given as a whole
        typed_in = typed_in[part]
    return True


def _advice(where: list[str | int], error: Mapping[str, Any]) -> str:
    """How to write what was meant, where that can be told."""
    if error["type"] == "string_type":
        return " (quote it)"
    clock = isinstance(error["input"], str) and re.fullmatch(r"\d+(:[0-5]?\d)+", error["input"])
    if clock and error["type"] in ("int_type", "float_type"):
        unit = "seconds" if str(where[-1]).endswith("_s") else "minutes"
        return f" (a time is one number here; write it in {unit}, such as 90)"
    return ""


def _check_text(value: Any, path: str = "") -> None:
    """Raises UserError where a text holds what no file and no command can take."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_text(key, path)
            _check_text(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            _check_text(inner, f"{path}.{place}")
    elif isinstance(value, str) and re.search(r"[\0\ud800-\udfff]", value):
        raise UserError(f"{path or 'a key'}: {value!r} holds a NUL or half a character; remove it")


def _fields(kind: type[BaseModel], path: Iterable[str | int]) -> list[str]:
    """Keys allowed at ``path`` inside ``kind``; names and indices of containers are passed over."""
    fields = kind.model_fields
    for part in path:
        if part in fields:
            inner = _model_in(fields[str(part)].annotation)
            fields = inner.model_fields if inner else {}
    return [field.alias or name for name, field in fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    arguments = getattr(annotation, "__args__", ())
    return next((found for inner in arguments if (found := _model_in(inner))), None)


def check(bench: Bench, hardware: Hardware) -> None:
    """What types alone cannot say. Raises UserError with the path of the key."""
    model, clips, vae = bench.model, bench.clips, bench.vae
    _check_results(bench.results)
    check_model(model)
    unit = vae.factor * model.patch
    if clips.size % unit:
        raise UserError(
            f"clips.size: {clips.size} pixels; must be a multiple of {unit} "
            f"(VAE factor {vae.factor} x patch {model.patch})"
        )
    for channels in vae.block_out_channels:
        if channels % vae.norm_num_groups:
            raise UserError(
                f"vae.norm_num_groups: {vae.norm_num_groups} does not divide {channels} "
                "of vae.block_out_channels"
            )
    if bench.train.implementation != "auto":
        _check_implementation(bench)
    for name, target in bench.targets.items():
        if name in RULES or name.startswith(("train_", "choose_")):
            raise UserError(f"targets.{name}: the name of a step; choose another")
        _check_target(f"targets.{name}", target, hardware)
    known = ", ".join(bench.targets)
    if bench.latents.target not in bench.targets:
        raise UserError(f"latents.target: {bench.latents.target!r} is no target; allowed: {known}")
    if bench.baseline not in bench.cells:
        cells = ", ".join(bench.cells)
        raise UserError(f"baseline: {bench.baseline!r} is no cell; allowed: {cells}")


def _check_results(results: str) -> None:
    for place in (Path(results), *Path(results).parents):
        if os.path.lexists(place) and not os.path.isdir(place):
            raise UserError(f"results: {results}: {place} is no folder; choose another")
    if os.path.realpath(results) == "/":
        raise UserError(f"results: {results}: the root of all files; choose a folder of its own")


def check_model(model: Model) -> None:
    """Raises UserError where the numbers of a model do not fit each other."""
    custom = (model.depth, model.width, model.heads)
    if model.size is None and None in custom:
        raise UserError("model.size: null needs model.depth, model.width and model.heads")
    if model.size is not None and custom != (None, None, None):
        raise UserError(
            f"model.size: {model.size} fixes depth, width and heads; set size: null to give them"
        )
    depth, width, heads = dimensions(model)
    if depth % 2:
        raise UserError(f"model.depth: {depth} is odd; blocks are spatial and temporal in turn")
    if width % heads:
        divisors = ", ".join(str(n) for n in range(1, min(width, 64) + 1) if width % n == 0)
        raise UserError(
            f"model.heads: {heads} does not divide model.width {width}; allowed: {divisors}"
        )
    if width % 4:
        raise UserError(f"model.width: {width}; sin-cos tables of two axes need a multiple of 4")
    if model.top_k > model.experts:
        raise UserError(
            f"model.top_k: {model.top_k} is more than model.experts; allowed: 1 to {model.experts}"
        )


def _check_implementation(bench: Bench) -> None:
    train = bench.train
    assert train.implementation != "auto"
    for name, target in bench.targets.items():
        wanted = target.device, train.precision, train.deterministic
        why = refusal(train.implementation, *wanted)
        if why is not None:
            others = ", ".join(other for other in IMPLEMENTATIONS if not refusal(other, *wanted))
            raise UserError(
                f"train.implementation: {why} (targets.{name}); allowed: {others}, auto"
            )


def _is_option(text: str) -> bool:
    """Whether it is words of a command line, the first an option, with {n} in them."""
    try:
        return text.startswith("-") and len(shlex.split(text)) > 1 and "{n}" in text
    except ValueError:
        return False


def _check_target(path: str, target: Target, hardware: Hardware) -> None:
    for name, value in target.environment.items():
        if SECRET.search(name) or PASSWORD.search(value):
            raise UserError(
                f"{path}.environment.{name}: a secret would stand in spec.json, the log and git; "
                "export it in a file that you alone can read, and source that file in a line of "
                f"{path}.setup"
            )
    if target.card not in hardware.cards:
        cards = ", ".join(hardware.cards)
        raise UserError(f"{path}.card: {target.card!r} is not in hardware.yaml; allowed: {cards}")
    if len(set(target.variants)) < len(target.variants):
        raise UserError(f"{path}.variants: {target.variants} names one cell twice")
    if target.baseline_variant not in target.variants:
        raise UserError(
            f"{path}.baseline_variant: {target.baseline_variant} is none of its variants; "
            f"allowed: {', '.join(map(str, target.variants))}"
        )
    if target.gpus_free > target.gpus_total:
        raise UserError(
            f"{path}.gpus_free: {target.gpus_free} is more than gpus_total {target.gpus_total}"
        )
    if target.enabled and target.gpus_free < target.gpus:
        raise UserError(
            f"{path}.gpus_free: {target.gpus_free}, but a run takes {target.gpus}; "
            "free cards, lower gpus, or set enabled: false with a reason"
        )
    if target.gpu_request is not None and not _is_option(target.gpu_request):
        raise UserError(
            f"{path}.gpu_request: {target.gpu_request!r}; expected an option with {{n}} for the "
            "number of GPUs, such as -R rusage[ngpus={n}], or null"
        )
    if not target.enabled and not target.reason:
        raise UserError(f"{path}.reason: missing; a target with enabled: false says why")
