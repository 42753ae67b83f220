"""Small configs and specs that several test files build on."""

import os
import tempfile
from pathlib import Path

# Before torch is imported anywhere: two cores, and timings are nobody's business here.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# And before Triton is: without a GPU its kernels run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/dev/nvidiactl").exists() else "1")
# Runs of tests side by side do not wait for each other.
os.environ.setdefault("XDIMO_LOCKS", tempfile.mkdtemp())

from typing import Any

import pytest
import yaml

from xdimo.config.load import load
from xdimo.config.schema import Bench
from xdimo.data.fetch import fetch
from xdimo.errors import DataError, UserError
from xdimo.spec import RunSpec, plan, resolve


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where CI is set nothing may be skipped: a skip there fails the run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


ROOT = Path(__file__).parent.parent
DATASET = "sha256:" + "0" * 64

SMALL: dict[str, Any] = {
    "campaign": "test",
    "results": "results",
    "hardware": str(ROOT / "config/hardware.yaml"),
    "history": str(ROOT / "config/history.csv"),
    "baseline": "cpu_1-bs1",
    "dataset": {"name": "test", "videos": "videos"},
    "clips": {"frames": 4, "interval": 2, "size": 16},
    "vae": {"block_out_channels": [4, 4], "layers_per_block": 1, "norm_num_groups": 2},
    "latents": {"target": "cpu_1", "batch_frames": 8},
    "model": {"size": None, "depth": 2, "width": 16, "heads": 2, "experts": 4, "top_k": 2},
    "train": {
        "precision": "fp32",
        "warmup_steps": 2,
        "timed_steps": 4,
        "repeats": 2,
        "workers": 0,
    },
    "targets": {
        name: {
            "card": "cpu",
            "device": "cpu",
            "gpus": processes,
            "gpus_total": 2,
            "gpus_free": 2,
            "queue": "local",
            "walltime_min": 2,
            "variants": [1, 2],
            "baseline_variant": 1,
        }
        for name, processes in (("cpu_1", 1), ("cpu_2", 2))
    },
}


@pytest.fixture
def small_config(tmp_path: Path) -> Path:
    """A config of two CPU targets whose runs take seconds."""
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL, sort_keys=False))
    return path


@pytest.fixture
def small_bench(small_config: Path) -> Bench:
    return load(small_config)


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's videos, fetched once into the checkout's own cache."""
    folder = tmp_path_factory.mktemp("real")
    packages = load(ROOT / "config/demo.yaml").dataset.fetch
    try:
        fetch(packages, folder, ROOT / ".cache/packages")
    except UserError as error:
        if isinstance(error, DataError) or os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    return folder


def spec_of(bench: Bench, run: str) -> RunSpec:
    return resolve(plan(bench, run), DATASET, None)
