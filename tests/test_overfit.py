"""A network that learns fits 8 clips, in every implementation."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, SMALL

# The loss begins near 1: noise of variance 1, predicted as 0. A network that only scales its input,
# by the best factor of each step, is left with the mean of alpha bar, 0.2755: below, it knows more.
FALLS_BELOW = 0.2
STEPS = 500


@pytest.fixture(scope="module")
def overfit(real: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """What `benchmarks/exact.py --overfit` prints of an implementation, on the demo's videos."""
    folder = tmp_path_factory.mktemp("overfit")
    config = {
        **SMALL,
        "dataset": {"name": "demo faces", "videos": str(real)},
        "clips": {"frames": 4, "interval": 3, "size": 64},
        "vae": {"block_out_channels": [4, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4},
        "model": {"size": None, "depth": 2, "width": 64, "heads": 4, "experts": 4, "top_k": 2},
        "train": {**SMALL["train"], "learning_rate": 4e-3},
    }

    def run(*command: str) -> str:
        command = (sys.executable, *command)
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def printed(implementation: str) -> str:
        train = {**config["train"], "implementation": implementation}
        (folder / "config.yaml").write_text(yaml.safe_dump({**config, "train": train}))
        exact = str(ROOT / "benchmarks/exact.py")
        return run(exact, "--overfit", "config.yaml", "--steps", str(STEPS))

    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    manifest, index = "results/data/manifest.json", "results/data/latents/index.json"
    run("-m", "xdimo", "manifest", str(real), "--window", "12", "--output", manifest)
    latents = ["latents", manifest, "--videos", str(real), "--config", "config.yaml"]
    run("-m", "xdimo", *latents, "--output", index)
    return printed


@pytest.mark.network
@pytest.mark.parametrize("implementation", ["reference", "dense"])
def test_the_loss_falls_on_eight_real_clips(
    implementation: str, overfit: Callable[[str], str]
) -> None:
    (said,) = overfit(implementation).splitlines()
    assert f"{implementation}, fp32, 8 clips of demo faces" in said
    first, last = map(float, re.findall(r"[\d.]+(?= over the)", said))
    assert first > 0.7
    assert last < FALLS_BELOW
