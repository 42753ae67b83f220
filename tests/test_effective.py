"""What a run really did is seen on its operators, and held against its spec."""

from typing import Any

import pytest
import torch

from tests.conftest import spec_of
from xdimo.config.schema import Bench
from xdimo.errors import UserError
from xdimo.spec import RunSpec
from xdimo.train.instruments import observed_settings
from xdimo.train.instruments.step_breakdown import PREFIX
from xdimo.train.step import EAGER_STEPS, CapturedStep


def product(name: str, dims: list[list[int]], kind: str, at: float) -> dict[str, Any]:
    args = {"Input Dims": dims, "Input type": [kind] * len(dims)}
    return {"cat": "cpu_op", "name": name, "ts": at, "dur": 1, "args": args}


def step(backward: int, kind: str = "c10::BFloat16") -> list[dict[str, Any]]:
    """A product going forward, and ``backward`` of the same size going back."""
    parts = [("forward", 0), ("backward", 10)]
    events = [
        {"cat": "user_annotation", "name": PREFIX + part, "ts": at, "dur": 9} for part, at in parts
    ]
    events.append(product("aten::addmm", [[7], [5, 3], [3, 7]], kind, 1))
    events += [product("aten::mm", [[5, 3], [3, 7]], kind, 11 + i) for i in range(backward)]
    return events


def after(operators: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    class Made:
        content, vae = "sha256:1", None

    given: dict[str, Any] = {
        "device": torch.device("cpu"),
        "gpus": ["A CPU"],
        "made_from": Made,
        "batch": {"epoch": 0, "mean": torch.zeros(2, 1), "std": torch.zeros(2, 1)},
        "take_step": None,
        "compiled_graphs": 0,
        "operators": operators,
    }
    return observed_settings.after_steps({"vae": "random:0"}, **{**given, **options})


def test_products_tell_their_type_and_size() -> None:
    found = observed_settings._products(
        [
            *step(1),
            product("aten::bmm", [[2, 5, 3], [2, 3, 7]], "float", 30),
            product("aten::add", [[5, 3], [5, 3]], "float", 31),
        ]
    )
    assert found == [
        ("bf16", "forward", 2 * 5 * 3 * 7),
        ("bf16", "backward", 2 * 5 * 3 * 7),
        ("fp32", "other", 2 * 2 * 5 * 3 * 7),
    ]


def test_the_type_of_most_products_counts() -> None:
    seen = after([*step(2), product("aten::mm", [[5, 3], [3, 7]], "float", 5)])
    assert seen["matmul_dtype"] == "bf16"
    assert seen["matmul_flops"] == {"bf16": 0.75, "fp32": 0.25}
    assert after([])["matmul_dtype"] is None  # not known


@pytest.mark.parametrize(("backward", "recomputes"), [(2, False), (3, True)])
def test_recomputation_shows_in_the_backward_pass(backward: int, recomputes: bool) -> None:
    assert after(step(backward))["checkpointing"] is recomputes
    assert after([])["checkpointing"] is None


def test_batches_tell_what_they_are() -> None:
    assert (after([])["clips_per_gpu"], after([])["data_mode"]) == (2, "cached")
    online = after([], batch={"epoch": 0, "frames": torch.zeros(3, 1)})
    assert (online["clips_per_gpu"], online["data_mode"]) == (3, "online")
    assert after([])["dataset"] == "sha256:1"


@pytest.mark.parametrize(
    ("taken", "replays", "captured"),
    [(60, 47, True), (60, 0, False), (EAGER_STEPS, 0, None)],  # the last: too few to tell
)
def test_a_capture_is_seen_by_its_replays(taken: int, replays: int, captured: Any) -> None:
    step = CapturedStep.__new__(CapturedStep)  # without a GPU no stream can be made
    step.taken, step.replays = taken, replays
    assert after([], take_step=step)["captured"] is captured
    assert after([])["captured"] is False


def test_compilation_is_seen_by_its_graphs() -> None:
    assert after([], compiled_graphs=2)["compiled"] is True
    assert after([])["compiled"] is False


@pytest.fixture
def spec(small_bench: Bench) -> RunSpec:
    return spec_of(small_bench, "cpu_1-bs2-r1")


def test_a_run_as_declared_passes_and_what_is_not_known_is_no_difference(spec: RunSpec) -> None:
    observed_settings.check(spec, observed_settings.declared(spec))
    observed_settings.check(spec, {**observed_settings.declared(spec), "matmul_dtype": None})


@pytest.mark.parametrize(
    ("key", "did"),
    [
        ("parameters", 1),
        ("trainable_parameters", 1),
        ("precision", "bf16"),
        ("matmul_dtype", "bf16"),
        ("experts", 2),
        ("top_k", 1),
        ("world_size", 4),
        ("clips_per_gpu", 1),
        ("data_mode", "online"),
        ("dataset", "sha256:2"),
        ("implementation", "fused"),
        ("vae", "random:1"),
        ("deterministic", True),
        ("compiled", True),
        ("captured", True),
        ("checkpointing", True),
    ],
)
def test_each_difference_is_named(spec: RunSpec, key: str, did: Any) -> None:
    seen = observed_settings.declared(spec)
    assert seen.keys() >= {key}
    with pytest.raises(UserError, match=rf"^{key}: the spec says .*, the run does {did}$"):
        observed_settings.check(spec, {**seen, key: did})
