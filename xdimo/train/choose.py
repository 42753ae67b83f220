"""`xdimo choose`: every implementation timed on one card, at each batch of a target. No torch here.

One process and random latents: what several cards add (the all-reduce) is much the same for all.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from xdimo.config.schema import Hardware
from xdimo.errors import UserError
from xdimo.files import write_json
from xdimo.implementations import IMPLEMENTATIONS, refusal
from xdimo.spec import ChoicePlan, RunSpec
from xdimo.train import identity
from xdimo.train.launch import environment
from xdimo.train.machine import require_devices

SCHEMA = 1
LIMIT_S = 600  # of one candidate at one batch, its compilation included


def choose(plan: ChoicePlan, hardware: Hardware, output: Path) -> dict[str, Any]:
    """Writes and returns clips/s of each candidate, or why it has none, and the fastest.

    Where none runs at a batch (out of memory, say) the reference is named: its run will tell.
    Raises UserError where this machine has not the target's card, or where none runs at all.
    """
    probe = plan.spec("reference", plan.clips_per_gpu[0])
    require_devices(probe, hardware)
    variants, seen = dict[str, Any](), dict[str, str]()
    for clips in plan.clips_per_gpu:
        candidates = {}
        for name in IMPLEMENTATIONS:
            why = refusal(name, probe.device, probe.precision, probe.deterministic)
            found = {"error": why} if why else timed(plan.spec(name, clips))
            seen |= {key: found.pop(key) for key in ("device", "torch") if key in found}
            candidates[name] = found
        ran = [name for name in candidates if "error" not in candidates[name]]
        chosen = max(ran, key=lambda name: candidates[name]["clips_per_s"], default="reference")
        variants[str(clips)] = {"chosen": chosen, "candidates": candidates}
    if not seen:
        why = candidates["reference"]["error"]
        raise UserError(f"{probe.target}: no implementation runs; reference: {why}")
    choice = {
        "schema": SCHEMA,
        "plan": plan.hash,
        "campaign": probe.campaign,
        "target": probe.target,
        "precision": probe.precision,
        "deterministic": probe.deterministic,
        "gpus": probe.gpus,
        **seen,
        "host": identity.host(),
        "job": identity.job(),
        "code": identity.code_identity(),
        "variants": variants,
    }
    write_json(output, choice)
    return choice


def timed(spec: RunSpec) -> dict[str, Any]:
    """What xdimo.train.timing prints: clips_per_s, device and torch, or an error."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "xdimo.train.timing"],
            input=json.dumps(spec.to_json()),
            env=environment(spec),
            stdout=subprocess.PIPE,
            text=True,
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {LIMIT_S} s"}
    if done.returncode != 0:
        return {"error": f"ended with exit code {done.returncode}"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def text(choice: dict[str, Any]) -> str:
    """A line a batch and candidate, for a person."""
    lines = [f"{choice['target']}: one {choice['device']}, torch {choice['torch']}"]
    for clips, variant in choice["variants"].items():
        for name, found in variant["candidates"].items():
            rate = f"{found['clips_per_s']:.1f} clips/s" if "clips_per_s" in found else "-"
            mark = " <- chosen" if name == variant["chosen"] else ""
            lines.append(f"{clips} clips a GPU, {name}: {rate} {found.get('error', '')}{mark}")
    return "\n".join(lines)
