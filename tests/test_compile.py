"""The fused step's kernels compile for cards that cannot be tried here, and fit their memory."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import ROOT

KERNELS = {"count_choices", "begin_chunks", "place_choices", "matmul_rows", "weight_gradient"}
KERNELS |= {"sum_parts", "sum_tiles", "sum_choices", "sum_columns"}
KERNELS |= {"route_choices", "gather_choices"}
KERNELS |= {"residual_norm_forward", "residual_norm_backward", "residual_norm_sums"}
KERNELS |= {"temporal_forward", "temporal_backward", "spatial_forward", "spatial_backward"}
KERNELS |= {"adamw_squares", "adamw_norm", "adamw_rates", "adamw_update"}


# A100; RTX 6000 Ada, H100 and H200, RTX PRO 6000: the targets of the matrix.
@pytest.mark.parametrize(
    ("capability", "types"),
    [
        (80, ["bfloat16"]),
        (89, ["bfloat16", "float32"]),
        (90, ["bfloat16", "float32"]),
        (120, ["bfloat16", "float32"]),
    ],
)
@pytest.mark.skipif(find_spec("triton") is None, reason="torch comes without Triton on this system")
def test_kernels_compile_and_fit(capability: int, types: list[str], tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, ROOT / "tests/compile_kernels.py", str(capability), *types],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["kernel"] for line in compiled} == KERNELS
    assert not [line for line in compiled if line["shared"] > line["limit"]]
