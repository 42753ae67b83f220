"""What stands behind the figures: videos, VAE, code and versions."""

from collections.abc import Iterable

from xdimo.records.events import Code, Header
from xdimo.report import number_format
from xdimo.report.campaign_state import Manifest, Run, Survey, Video
from xdimo.report.markdown import code, inline
from xdimo.report.tables import Table
from xdimo.report.words import Words


def dataset(view: Survey, words: Words) -> Iterable[str]:
    bench, manifest = view.bench, view.manifest
    name = inline(code(bench.dataset.name))
    if view.bad_manifest:
        yield words("bad_manifest", name=name, why=inline(view.bad_manifest))
    elif manifest is None:
        yield words("no_manifest", name=name)
    else:
        known = {**manifest.counts.model_dump(), "window": manifest.window}
        yield words("manifest", name=name, dataset=manifest.dataset[:15], **known)
        excluded = excluded_videos(manifest)
        if excluded:
            yield words("excluded")
            rows = [
                [video.path, words(f"video_{video.status}"), video.reason or ""]
                for video in excluded
            ]
            yield Table(["video", "status", "reason"], rows).markdown(words)
    ids = {run.record.spec.vae.id for run in used(view) if run.record}
    if bench.vae.random:
        yield words("random_vae", seed=bench.vae.seed)
    elif ids:
        yield words("trained_vae", ids=", ".join(f"`{name[:15]}`" for name in sorted(ids)))
    else:
        yield words("no_vae_yet", weights=inline(code(bench.vae.weights)))


def excluded_videos(manifest: Manifest) -> list[Video]:
    return [video for video in manifest.videos if video.status != "usable"]


def used(view: Survey) -> list[Run]:
    """The runs whose figures stand in this summary."""
    return [run for run in view.runs if run.state == "ok"]


def codes(view: Survey) -> dict[Code, list[str]]:
    found: dict[Code, list[str]] = {}
    for run in used(view):
        assert run.record is not None
        found.setdefault(run.record.run.code, []).append(run.name)
    return found


def _headers(view: Survey) -> Iterable[tuple[str, Header]]:
    for run in used(view):
        assert run.record is not None and run.record.log is not None
        assert run.record.log.header is not None
        yield run.record.spec.target, run.record.log.header


def cards(view: Survey, words: Words) -> str:
    """The figures of hardware.yaml that the tables use, each with its source."""
    table = Table(["hardware", "device", "tensor_peak", "declared_peak", "card_memory", "sources"])
    names = dict.fromkeys(target.card for target in view.bench.targets.values())
    for card in (view.hardware.cards[name] for name in names):
        kind = f"{card.tensor_dtype}, {card.tensor_accumulate}" if card.devices else ""
        for device, peak in (card.devices or {words("unknown"): None}).items():
            table.rows.append(
                [
                    card.label,
                    device,
                    f"{number_format.plain(peak)} ({kind})" if peak else words("unknown"),
                    _stated(card.declared_peak_tflops, words),
                    f"{_stated(card.memory_gb, words)}, {_stated(card.bandwidth_gb_s, words)}",
                    "; ".join(f"{key}: {source}" for key, source in card.sources.items()),
                ]
            )
    return table.markdown(words)


def _stated(value: float | None, words: Words) -> str:
    return words("unknown") if value is None else number_format.plain(value)


def versions(view: Survey, words: Words) -> Iterable[str]:
    found = codes(view)
    if not found:
        yield words("no_code")
        return
    if len(found) > 1:
        yield words("mixed_code", count=len(found))
    dirty = [f"`{name}`" for identity, names in found.items() if identity.dirty for name in names]
    if dirty:
        yield words("dirty_code", runs=", ".join(dirty))
    table = Table(["commit", "dirty", "package", "run_count"])
    for identity, names in found.items():
        state = "unknown" if identity.dirty is None else "yes" if identity.dirty else "no"
        commit = f"`{identity.commit[:12]}`" if identity.commit else words("unknown")
        table.rows.append([commit, words(state), f"`{identity.package[:15]}`", f"{len(names)}"])
    yield table.markdown(words)
    yield _versions(view, words)


def _versions(view: Survey, words: Words) -> str:
    """A row for each target, device and set of versions its runs had."""
    rows: dict[tuple[str, str, str], None] = {}
    for target, header in _headers(view):
        versions = [
            f"{name} {version or words('unknown')}" for name, version in header.versions.items()
        ]
        rows[(target, ", ".join(sorted(set(header.devices))), ", ".join(versions))] = None
    return Table(["target", "device", "versions"], [list(row) for row in rows]).markdown(words)
