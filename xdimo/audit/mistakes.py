"""What a claimed TFLOP/s or MFU should be, and the chain of named mistakes that explains the ratio.

A claim is explained where some set of mistakes gives its figures within their rounding; the fewest
mistakes win, then the nearest figure. What nothing explains stays unexplained.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from xdimo.audit.claims import Row, Sample, sample_of
from xdimo.audit.figure import Figure
from xdimo.audit.formulas import CLOSED_FORMS, MISTAKES, miscounts, training_flops
from xdimo.config.schema import Hardware
from xdimo.model.flops import TERA

# Peaks that programs put in for any card. TFLOP/s, dense, FP16 with FP32 accumulation, data sheets.
HABITUAL_PEAKS = {"A100": 312.0, "V100": 125.0}


@dataclass(frozen=True)
class Peak:
    tflops: float
    name: str
    mistake: str | None  # None: the dense tensor peak of the card


@dataclass(frozen=True)
class Claim:
    """One row that says how fast something trained. ``mfu`` is a share, not per cent."""

    name: str
    where: str  # file and line
    source: str  # history, record or text log
    card: str | None  # its key in hardware.yaml
    device: str | None  # as the driver calls it
    gpus: int | None
    global_batch: float | None
    steps_per_s: Figure
    sample: Sample | None
    tensor_peak_tflops: float | None = None
    tflops: Figure | None = None
    mfu: Figure | None = None
    speedup: Figure | None = None
    over: str | None = None
    steady_steps_per_s: float | None = None  # where the series behind the claim is at hand
    all_steps_per_s: float | None = None  # with the first window in
    of_first_window: bool = False  # its own line is the first of a text log
    remarks: tuple[str, ...] = ()  # of whoever read it
    contradictions: tuple[str, ...] = ()  # lines of its log that claim something else
    asked: tuple[str, str] | None = None  # the config's model and the one that ran, where another


@dataclass(frozen=True)
class Link:
    """One row of the chain: T (10^12 FLOPs) a sample, and what leads to it."""

    flops: float
    mistake: str | None  # that the step to this row mends; None: as claimed
    what: str


@dataclass(frozen=True)
class Explanation:
    claim: Claim
    tflops: float | None  # what it should be
    mfu: dict[str, float]  # by peak's name
    peaks: dict[str, float] = field(default_factory=dict)  # TFLOP/s a card, by name
    mistakes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    chain: list[Link] = field(default_factory=list)
    peak: Peak | None = None  # that the claimed MFU was divided by
    unexplained: list[str] = field(default_factory=list)
    grid: list[tuple[str, float, dict[str, float]]] = field(default_factory=list)


def of_row(row: Row, hardware: Hardware) -> Claim:
    text = row.text

    def figure(name: str, scale: float = 1.0) -> Figure | None:
        if not text.get(name):
            return None
        found = Figure.written(text[name])
        return Figure(found.value * scale, found.slack)

    steps = figure("steps_per_s")
    models = text["declared_model"], text["effective_model"]
    assert steps is not None and row.value["gpus"] is not None
    return Claim(
        name=text["hardware"],
        where=row.where,
        source="history",
        card=text["card"] if text["card"] in hardware.cards else None,
        device=None,
        gpus=int(row.value["gpus"]),
        global_batch=row.value["global_batch"],
        steps_per_s=steps,
        sample=sample_of(text["effective_model"]),
        tensor_peak_tflops=row.value["tensor_peak_tflops"],
        tflops=figure("claimed_tflops"),
        mfu=figure("claimed_mfu_percent", 0.01),
        speedup=figure("claimed_speedup"),
        over=text.get("claimed_over") or None,
        asked=None if models[0] == models[1] else models,
    )


def peaks(claim: Claim, hardware: Hardware) -> list[Peak]:
    """Every peak that the claim may have been divided by, the right one first."""
    card = hardware.cards.get(claim.card) if claim.card else None
    tensor = claim.tensor_peak_tflops
    if tensor is None and card is not None:
        # A text log names no device: its card's peak is known where all devices of it have one.
        of = {card.devices.get(claim.device)} if claim.device else set(card.devices.values())
        tensor = of.pop() if len(of) == 1 else None
    found = [Peak(tensor, "tensor", None)] if tensor else []
    if card and card.declared_peak_tflops and card.declared_peak_tflops != tensor:
        what = card.sources.get("declared_peak_tflops", "")
        found.append(
            Peak(card.declared_peak_tflops, "declared", f"wrong peak kind: declared, {what}")
        )
    if tensor:
        found.append(Peak(2 * tensor, "sparse", "wrong peak kind: with sparsity"))
    others = {name: peak for c in hardware.cards.values() for name, peak in c.devices.items()}
    mine = set(card.devices) if card else set()
    for name, peak in {**others, **HABITUAL_PEAKS}.items():
        if peak and name not in mine and peak not in {p.tflops for p in found}:
            kind = "wrong peak kind" if card else "unknown card"
            found.append(Peak(peak, f"of {name}", f"{kind}: the peak of {name}"))
    return found


def explain(claim: Claim, hardware: Hardware) -> Explanation:
    """Re-derives the claim's figures and finds the mistakes in it."""
    mistakes: list[str] = []
    notes: list[str] = list(claim.remarks)
    unexplained: list[str] = list(claim.contradictions)
    known = peaks(claim, hardware)
    steps = _steps(claim, mistakes, notes)
    rate = steps * claim.global_batch if claim.global_batch else None
    sample, gpus = claim.sample, claim.gpus
    right = training_flops(sample.model, (), **sample.shape) if sample else None
    tflops = rate * right / TERA if rate and right else None
    if sample is None:
        notes.append("model not known: no FLOPs")
    formula, peak = _identify(claim, known)
    if formula is None and claim.tflops and rate and right:
        ratio = claim.tflops.value / (rate * right / TERA)
        unexplained.append(f"claimed TFLOP/s are {ratio:.3g} times what they should be")
    if claim.mfu and claim.card is None and peak is None:
        mistakes.append("unknown card")
    if claim.mfu and gpus and peak is None and not _clamped(claim, known):
        unexplained.append(f"claimed MFU {100 * claim.mfu.value:.3g} % follows from no known peak")
    if clamp := _clamped(claim, known):
        mistakes.append("clamped value")
        notes.append(clamp)
        peak = None
    chain = _chain(sample, formula, claim.tflops) if sample and formula is not None else []
    mistakes += [link.mistake for link in chain if link.mistake]
    if peak and peak.mistake:
        mistakes.append(peak.mistake.partition(":")[0])
        notes.append(f"{peak.tflops:g} is {peak.mistake.partition(': ')[2]}")
    if claim.asked:
        notes.append("the config asked for {}; what ran was {}".format(*claim.asked))
    stated = [one for one in known if one.name in ("tensor", "declared")]
    divisible = tflops is not None and gpus is not None
    mfu = {p.name: tflops / (gpus * p.tflops) for p in stated} if divisible else {}  # type: ignore[operator]
    grid = [
        (
            link.mistake or "as claimed",
            rate * link.flops / TERA,
            {p.name: rate * link.flops / TERA / (gpus * p.tflops) for p in stated},
        )
        for link in chain
        if rate and gpus
    ]
    return Explanation(
        claim=claim,
        tflops=tflops,
        mfu=mfu,
        peaks={one.name: one.tflops for one in stated},
        mistakes=mistakes,
        notes=notes,
        chain=chain,
        peak=peak,
        unexplained=unexplained,
        grid=grid,
    )


def _steps(claim: Claim, mistakes: list[str], notes: list[str]) -> float:
    """Steps/s that count: the claim's, or the series' behind it where they differ."""
    steady, everything = claim.steady_steps_per_s, claim.all_steps_per_s
    own = claim.steps_per_s
    if steady is not None and own.matches(steady):
        return own.value
    if claim.of_first_window:
        notes.append(f"{own.value:g} steps/s are of the first window, which holds the start")
    if steady is None:
        return own.value
    if claim.of_first_window:
        mistakes.append("first window counted")
    elif everything is not None and own.matches(everything):
        mistakes.append("first window counted")
        notes.append(f"{everything:.4g} steps/s with the first window, {steady:.4g} without")
    else:
        notes.append(f"steps/s: claimed {own.value:g}, the record says {steady:.6g}")
    return steady


def _identify(claim: Claim, known: Sequence[Peak]) -> tuple[tuple[str, ...] | None, Peak | None]:
    """The set of mistakes and the peak that give the claimed figures; None: not found."""
    formulas: list[tuple[tuple[str, ...], float]] = []
    if claim.sample and claim.global_batch:
        rate = claim.steps_per_s.value * claim.global_batch
        shape = claim.sample.shape
        formulas = [
            (made, rate * training_flops(claim.sample.model, made, **shape) / TERA)
            for made in miscounts(claim.sample.model)
        ]
    slack = claim.steps_per_s.slack
    if claim.tflops:
        fits = [(made, t) for made, t in formulas if claim.tflops.matches(t, slack)]
        formula = min(fits, key=lambda one: _cost(one[0], claim.tflops, one[1]), default=(None,))[0]
        return formula, _peak(claim, known, claim.tflops.value, claim.tflops.slack)
    if claim.mfu:
        pairs = [
            (made, t, peak)
            for made, t in formulas
            if (peak := _peak(claim, known, t, slack)) is not None
        ]
        best = min(
            pairs,
            key=lambda one: (
                _count(one[0]) + (one[2].mistake is not None),
                abs(one[1] / ((claim.gpus or 1) * one[2].tflops) - claim.mfu.value),  # type: ignore[union-attr]
            ),
            default=None,
        )
        if best:
            return best[0], best[2]
    return None, None


def _cost(made: tuple[str, ...], claimed: Figure | None, value: float) -> tuple[int, float]:
    assert claimed is not None
    return _count(made), abs(value - claimed.value)


def _count(made: tuple[str, ...]) -> int:
    """Mistakes; who counts by a closed form has the layers alone, which is no mistake more."""
    return len(made) - ("layers alone" in made and not CLOSED_FORMS.isdisjoint(made))


def _peak(claim: Claim, known: Sequence[Peak], tflops: float, slack: float) -> Peak | None:
    """The first peak, in the order of ``peaks``, by which ``tflops`` give the claimed MFU."""
    if claim.mfu is None or not claim.gpus:
        return None
    per_card = tflops / claim.gpus
    return next((p for p in known if claim.mfu.matches(per_card / p.tflops, slack)), None)


def _clamped(claim: Claim, known: Sequence[Peak]) -> str | None:
    """Why a claimed MFU of exactly 100 % is a limit and no measurement."""
    if claim.mfu is None or claim.mfu.value != 1 or claim.tflops is None or not claim.gpus:
        return None
    share = {p.name: claim.tflops.value / (claim.gpus * p.tflops) for p in known}
    over = next((name for name, value in share.items() if value > 1.005), None)
    return f"100 % stands for {100 * share[over]:.1f} % ({over})" if over else None


def _chain(sample: Sample, formula: tuple[str, ...], claimed: Figure | None) -> list[Link]:
    """From the claim to the right count, one mend a row, in the order of MISTAKES."""
    left = [name for name in MISTAKES if name in formula]
    first = training_flops(sample.model, left, **sample.shape)
    rounding = f"{claimed.value:g} within its rounding" if claimed else "the claimed MFU"
    links = [Link(first, None, rounding)]
    while left:
        mended = left.pop(0)
        flops = training_flops(sample.model, left, **sample.shape)
        links.append(Link(flops, mended, MISTAKES[mended][1]))
    return links


def batch_in_speedup(claim: Claim, base: Claim) -> str | None:
    """Why a claimed speedup is not the card's alone; None where both had the same clips a GPU."""
    if claim.speedup is None or None in (claim.global_batch, base.global_batch):
        return None
    if not claim.gpus or not base.gpus:
        return None
    assert claim.global_batch is not None and base.global_batch is not None
    batches = claim.global_batch / claim.gpus, base.global_batch / base.gpus
    steps = claim.steps_per_s.value / base.steps_per_s.value
    samples = steps * claim.global_batch / base.global_batch
    slack = claim.steps_per_s.slack + base.steps_per_s.slack
    if batches[0] == batches[1] or not claim.speedup.matches(samples, slack):
        return None
    return (
        f"{claim.speedup.value:g} times in samples/s is {steps:.3g} times in steps/s at "
        f"{batches[0]:g} against {batches[1]:g} clips a GPU"
    )
