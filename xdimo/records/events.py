"""The lines of log.jsonl and the facts of run.json, typed. `writer` says what each is."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from xdimo.config.schema import Mode
from xdimo.implementations import Precision
from xdimo.outcome import Outcome

# Within the range of float32: what lies beyond was not measured, and would overflow sums.
Whole = Annotated[int, Field(ge=0, le=2**53)]
Signed = Annotated[float, Field(ge=-1e39, le=1e39)]
Amount = Annotated[float, Field(ge=0, le=1e39)]
Gib = Annotated[float, Field(ge=0, le=2**20)]
Rate = Annotated[float, Field(ge=1e-38, le=1e39)]


class Fact(BaseModel):
    """Frozen and typed, numbers finite; a key that a later writer adds is passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


class Code(Fact):
    commit: str | None  # None: not under git
    dirty: bool | None
    package: str  # sha256 over the package's files
    unknown: str | None = None  # why git does not tell commit and dirty; older records do not say


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

    parameters: Whole
    trainable_parameters: Whole
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
    step: Whole
    phase: Literal["warmup", "timed"]
    step_s: Signed
    data_wait_s: Signed
    loss: Signed | None
    grad_norm: Amount | None
    lr: Amount
    epoch: Whole
    kind: Literal["eager", "capture", "replay"] = "eager"  # how it ran; older logs do not say


class Window(Fact):
    event: Literal["window"]
    phase: Literal["timed"]
    first_step: Whole
    last_step: Whole
    wall_s: Rate

    @property
    def steps(self) -> int:
        return self.last_step - self.first_step + 1


class Memory(Fact):
    """GiB of one rank; device figures are None on a CPU."""

    event: Literal["memory"]
    rank: Whole
    allocated_gib: Gib | None
    reserved_gib: Gib | None
    peak_allocated_gib: Gib | None
    peak_reserved_gib: Gib | None
    device_gib: Gib | None
    host_peak_gib: Gib | None


class Checkpoint(Fact):
    event: Literal["checkpoint"]
    step: Whole
    seconds: Amount


class Calibration(Fact):
    """What plain work gave on one rank, before or after the steps. Rates: TFLOP/s and 10^9 B/s."""

    event: Literal["calibration"]
    when: Literal["before", "after"]
    rank: int
    gemm_tflops: Rate
    gemm_shape: tuple[Whole, Whole, Whole]
    gemm_s: Rate | None = None  # how long it ran; None: 0.2 on a GPU, in older records
    model_gemm_tflops: dict[str, Rate]  # by shape, "rows x inner x outer" without spaces
    copy_gb_s: Rate
    all_reduce_gb_s: Rate | None  # None: one rank


class Telemetry(Fact):
    """One card at one moment of the timed window. None: the driver keeps it to itself."""

    event: Literal["telemetry"]
    t_s: Signed  # since the window began
    gpu: Whole  # as ranks count
    sm_mhz: Amount | None
    memory_mhz: Amount | None
    power_w: Amount | None
    temperature_c: Signed | None
    throttle: list[str] | None
    ecc_errors: Whole | None
    other_processes: Whole | None  # on this card, not of this run
    host_gpus_busy: Whole | None  # cards of the host that are not this run's and at work
    host_load: Amount | None
    pcie_gen: Whole | None
    pcie_width: Whole | None
    nvlink_active: Whole | None
    memory_before_gib: Gib | None = None  # in use on this card before the run; older logs: none


class Ledger(Fact):
    """Where the time of a step goes; shares of it."""

    event: Literal["ledger"]
    shares: dict[str, Signed]
    step_s: Rate
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
    steps: Whole
    wall_s: Amount


Event = (
    Header | Step | Window | Memory | Checkpoint | Calibration | Telemetry | Ledger | Seen | Footer
)
EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="event")])
