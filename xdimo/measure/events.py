"""The lines of log.jsonl and the facts of run.json, typed. xdimo.train.record says what each is."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from xdimo.config import Mode
from xdimo.implementations import Precision
from xdimo.outcome import Outcome


class Fact(BaseModel):
    """Frozen and typed; a key that a later writer adds is passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class Code(Fact):
    commit: str | None  # None: not under git
    dirty: bool | None
    package: str  # sha256 over the package's files


class Ending(Fact):
    """run.json."""

    schema_version: Literal[1] = Field(alias="schema")
    run: str
    spec: str
    outcome: Outcome
    reason: str | None
    attempt: int
    job: str | None
    host: str | None  # None: it never began
    started: str
    ended: str
    log: str | None  # relative to the folder of this file; None: died before the first line
    log_sha256: str | None
    code: Code
    cause: list[str]


class Effective(Fact):
    """What the run found itself doing, to be held against its spec."""

    parameters: int
    trainable_parameters: int
    precision: Precision
    experts: int
    top_k: int
    world_size: int
    clips_per_gpu: int
    data_mode: Mode
    dataset: str
    implementation: str
    vae: str
    deterministic: bool | None = None  # older logs do not say


class Header(Fact):
    event: Literal["header"]
    schema_version: Literal[1, 2] = Field(alias="schema")
    spec: str
    run: str
    attempt: int | None  # None: a folder whose name is no number
    started: str
    host: str
    code: Code
    versions: dict[str, str | None]
    devices: list[str]  # one a rank, as the driver reports it
    declared: dict[str, Any]
    effective: Effective
    seed: int


class Step(Fact):
    event: Literal["step"]
    step: int
    phase: Literal["warmup", "timed"]
    step_s: float
    data_wait_s: float
    loss: float | None
    grad_norm: float | None
    lr: float
    epoch: int
    kind: Literal["eager", "capture", "replay"] = "eager"  # how it ran; older logs do not say


class Window(Fact):
    event: Literal["window"]
    phase: Literal["timed"]
    first_step: int
    last_step: int
    wall_s: float = Field(gt=0)

    @property
    def steps(self) -> int:
        return self.last_step - self.first_step + 1


class Memory(Fact):
    """GiB of one rank; device figures are None on a CPU."""

    event: Literal["memory"]
    rank: int
    allocated_gib: float | None
    reserved_gib: float | None
    peak_allocated_gib: float | None
    peak_reserved_gib: float | None
    device_gib: float | None
    host_peak_gib: float | None


class Checkpoint(Fact):
    event: Literal["checkpoint"]
    step: int
    seconds: float


class Calibration(Fact):
    """What plain work gave on one rank, before or after the steps. Rates: TFLOP/s and 10^9 B/s."""

    event: Literal["calibration"]
    when: Literal["before", "after"]
    rank: int
    gemm_tflops: float = Field(gt=0)
    gemm_shape: tuple[int, int, int]
    gemm_s: float | None = None  # how long it ran; None: 0.2 on a GPU, in older records
    model_gemm_tflops: dict[str, float]  # by shape, "rows x inner x outer" without spaces
    copy_gb_s: float
    all_reduce_gb_s: float | None  # None: one rank


class Telemetry(Fact):
    """One card at one moment of the timed window. None: the driver keeps it to itself."""

    event: Literal["telemetry"]
    t_s: float  # since the window began
    gpu: int  # as ranks count
    sm_mhz: float | None
    memory_mhz: float | None
    power_w: float | None
    temperature_c: float | None
    throttle: list[str] | None
    ecc_errors: int | None
    other_processes: int | None  # on this card, not of this run
    host_gpus_busy: int | None  # cards of the host that are not this run's and at work
    host_load: float | None
    pcie_gen: int | None
    pcie_width: int | None
    nvlink_active: int | None
    memory_before_gib: float | None = None  # in use on this card before the run; older logs: none


class Ledger(Fact):
    """Where the time of a step goes; shares of it."""

    event: Literal["ledger"]
    shares: dict[str, float]
    step_s: float = Field(gt=0)
    source: str


class Seen(Fact):
    """What the steps themselves showed of the settings; None: they could not show it."""

    event: Literal["effective"]
    parameters: int | None = None
    trainable_parameters: int | None = None
    precision: Precision | None = None
    matmul_dtype: str | None = None
    experts: int | None = None
    top_k: int | None = None
    world_size: int | None = None
    clips_per_gpu: int | None = None
    data_mode: Mode | None = None
    dataset: str | None = None
    implementation: str | None = None
    vae: str | None = None
    deterministic: bool | None = None
    compiled: bool | None = None
    captured: bool | None = None
    checkpointing: bool | None = None


class Footer(Fact):
    event: Literal["footer"]
    steps: int
    wall_s: float


Event = (
    Header | Step | Window | Memory | Checkpoint | Calibration | Telemetry | Ledger | Seen | Footer
)
EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="event")])
