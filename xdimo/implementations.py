"""Which code can run the training step, and what each can do: one place, and no torch.

A new one is a class with the parameters of xdimo.model.latte.Latte and a line here.
"""

from dataclasses import dataclass
from typing import Literal, get_args

Device = Literal["cuda", "cpu"]
Precision = Literal["fp32", "tf32", "bf16"]
Name = Literal["reference", "dense", "fused"]


@dataclass(frozen=True)
class Implementation:
    """``captured``: never makes the host wait; on a GPU it is compiled, and its step a CUDA graph.

    ``deterministic``: all its sums have an order that can be fixed.
    """

    module: str
    kind: str  # the class in it
    devices: tuple[Device, ...] = get_args(Device)
    precisions: tuple[Precision, ...] = get_args(Precision)
    captured: bool = True
    deterministic: bool = True


IMPLEMENTATIONS: dict[Name, Implementation] = {
    "reference": Implementation("xdimo.model.latte", "Latte", captured=False),
    "dense": Implementation("xdimo.model.dense", "DenseLatte"),
    "fused": Implementation(
        "xdimo.model.fused.network", "FusedLatte", devices=("cuda",), precisions=("fp32", "bf16")
    ),
}


def refusal(name: Name, device: Device, precision: Precision, deterministic: bool) -> str | None:
    """Why an implementation cannot do this; None where it can, whatever the card."""
    can = IMPLEMENTATIONS[name]
    if device not in can.devices:
        return f"{name} runs on {' and '.join(can.devices)} only, not on {device}"
    if precision not in can.precisions:
        return f"{name} has {' and '.join(can.precisions)}, not {precision}"
    if deterministic and not can.deterministic:
        return f"{name} has no fixed order of sums, which train.deterministic asks for"
    return None
