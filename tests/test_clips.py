"""Which clip is trained on when, and that its frames and latents are the right ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import SMALL
from tests.videos import number_of, write_video
from xdimo.config.load import parse
from xdimo.config.schema import Bench
from xdimo.data import clips
from xdimo.data.latents import build as build_latents
from xdimo.data.manifest import build as build_manifest
from xdimo.data.transform import resized
from xdimo.data.vae import encode, load
from xdimo.errors import DataError, UserError
from xdimo.spec import RunSpec, plan, resolve

SIZE = 48  # pixels: large enough for a frame's number to be read


def bench(**train) -> Bench:
    clip = {"frames": 4, "interval": 2, "size": SIZE}
    return parse(Bench, {**SMALL, "clips": clip, "train": {**SMALL["train"], **train}})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five videos whose frames show numbers of their own, the manifest and the latents."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(5):
        name = f"videos/{number}.{'avi' if number % 2 else 'mp4'}"
        write_video(folder / name, 12 + number, width=SIZE, height=SIZE, first=100 * number)
    manifest = build_manifest(
        folder / "videos", folder / "manifest.json",
        window=8, expected=5, decoder="auto", timeout_s=60, workers=2,
    )  # fmt: skip
    vae = spec(manifest.dataset).vae
    build_latents(
        folder / "manifest.json", folder / "videos", vae, None, folder / "index.json",
        size=SIZE, flip=True, batch_frames=8, device="cpu",
    )  # fmt: skip
    return folder, manifest


def spec(dataset: str, run: str = "cpu_2-bs2-r1", **train) -> RunSpec:
    return resolve(plan(bench(**train), run), dataset, None)


def items(data, spec: RunSpec, rank: int, first_step: int = 0, steps: int = 6):
    folder, _ = data
    source = folder / ("index.json" if spec.data.mode == "cached" else "manifest.json")
    return list(
        clips.loader(
            spec, rank=rank, first_step=first_step, steps=steps, data=source,
            videos=folder / "videos",
        )
    )  # fmt: skip


def same(one, other) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys()
        and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
        for a, b in zip(one, other, strict=True)
    )


def test_a_clip_lies_over_its_window_as_the_recipe_says():
    recipe = [0, 3, 6, 9, 12, 15, 18, 21, 25, 28, 31, 34, 37, 40, 43, 47]
    assert clips.offsets(16, 3) == recipe


@given(st.integers(0, 2**40), st.integers(0, 10**6), st.integers(0, 703), st.integers(48, 5000))
def test_a_clip_lies_within_its_video(seed, epoch, index, frames):
    start, flip = clips.draw(seed, epoch, index, frames, 48, True)
    assert 0 <= start <= frames - 48
    assert clips.draw(seed, epoch, index, frames, 48, True) == (start, flip)
    assert clips.draw(seed, epoch, index, frames, 48, False) == (start, False)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 43), (50, 32)])
def test_frames_whose_short_side_fits_keep_their_pixels(height, width):
    frames = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    top, left = round((height - 32) / 2), round((width - 32) / 2)
    assert torch.equal(resized(frames, 32), frames[..., top : top + 32, left : left + 32])


def test_starts_are_uniform_over_all_that_fit_and_half_are_mirrored():
    draws = [clips.draw(3407, epoch, 7, 52, 48, True) for epoch in range(5000)]
    starts = np.bincount([start for start, _ in draws], minlength=5)
    assert len(starts) == 5 and starts.min() > 850  # 1,000 each, 5 standard deviations
    assert 2300 < sum(flip for _, flip in draws) < 2700
    assert clips.draw(3407, 0, 7, 48, 48, True)[0] == 0
    with pytest.raises(ValueError, match="high"):
        clips.draw(3407, 0, 7, 47, 48, True)


@settings(max_examples=50)
@given(
    st.integers(0, 2**32),
    st.integers(1, 30),
    st.sampled_from([(1, 4), (2, 2), (4, 1)]),
    st.integers(0, 50),
)
def test_ranks_share_one_stream_without_overlap(seed, videos, shape, first_step):
    gpus, clips_per_gpu = shape
    stream = [
        place
        for step in range(first_step, first_step + 12)
        for rank in range(gpus)
        for place in clips.batch(seed, videos, step, rank, clips_per_gpu, gpus)
    ]
    whole = [
        p for s in range(first_step, first_step + 12) for p in clips.batch(seed, videos, s, 0, 4, 1)
    ]
    assert stream == whole  # the same clips at a step, however they are split
    assert len(set(stream)) == len(stream)  # no clip twice in an epoch
    start = first_step * 4
    assert [epoch for epoch, _ in stream] == [p // videos for p in range(start, start + 48)]
    epochs = {epoch for epoch, _ in stream[videos:-videos]}
    for epoch in list(epochs)[1:-1]:
        assert sorted(index for e, index in stream if e == epoch) == list(range(videos))


def test_online_frames_are_those_that_were_drawn(data):
    _, manifest = data
    order = manifest.clips_order()
    run = spec(manifest.dataset, "cpu_2-bs1-online-r1")
    assert run.data.mode == "online"
    for rank in (0, 1):
        for step, item in enumerate(items(data, run, rank)):
            ((epoch, index),) = clips.batch(run.seed, 5, step, rank, 1, 2)
            start, flip = clips.draw(run.seed, epoch, index, order[index].frames, 8, True)
            frames = item["frames"][0].permute(0, 2, 3, 1).numpy()
            assert frames.shape == (4, SIZE, SIZE, 3) and item["epoch"] == epoch
            first = 100 * int(order[index].path[0]) + start
            upright = frames[:, :, ::-1] if flip else frames
            assert [number_of(image) for image in upright] == [
                first,
                first + 2,
                first + 4,
                first + 7,
            ]


def test_cached_and_online_are_the_same_clips(data):
    _, manifest = data
    vae = load(spec(manifest.dataset).vae, None, "cpu")
    cached = items(data, spec(manifest.dataset, "cpu_2-bs1-r1"), rank=1)
    online = items(data, spec(manifest.dataset, "cpu_2-bs1-online-r1"), rank=1)
    for one, other in zip(cached, online, strict=True):
        mean, std = encode(vae, other["frames"].flatten(0, 1))
        assert one["mean"].shape == (1, 4, 4, SIZE // 2, SIZE // 2)
        torch.testing.assert_close(one["mean"][0].float(), mean, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(one["std"][0].float(), std, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("run", ["cpu_2-bs2-r1", "cpu_2-bs1-online-r1"])
def test_batches_do_not_depend_on_workers_or_on_where_a_run_was_resumed(data, run):
    dataset = data[1].dataset
    alone = items(data, spec(dataset, run), rank=1)
    assert same(items(data, spec(dataset, run, workers=2), rank=1), alone)
    assert same(items(data, spec(dataset, run), rank=1, first_step=4, steps=2), alone[4:])
    assert not same(items(data, spec(dataset, run), rank=0), alone)


def test_the_loader_leaves_the_runs_own_draws_alone(data):
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    items(data, spec(data[1].dataset), rank=0)
    assert torch.equal(torch.rand(2), expected)


def test_the_posterior_is_sampled_anew_each_time(data):
    run = spec(data[1].dataset)
    item = items(data, run, rank=0, steps=1)[0]
    generator = torch.Generator().manual_seed(3)
    x = clips.to_latents(item, None, 0.5, generator)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    assert x.shape == (2, 4, 4, SIZE // 2, SIZE // 2) and x.dtype == torch.float32
    torch.testing.assert_close(x, (item["mean"].float() + item["std"].float() * noise) * 0.5)
    assert not torch.equal(clips.to_latents(item, None, 0.5, generator), x)
    online = items(data, spec(data[1].dataset, "cpu_2-bs1-online-r1"), rank=0, steps=1)[0]
    vae = load(run.vae, None, "cpu")
    y = clips.to_latents(online, vae, 0.5, torch.Generator().manual_seed(3))
    mean, std = encode(vae, online["frames"][0])
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(y[0], (mean + std * noise[0]) * 0.5)


def test_data_that_the_spec_does_not_name(data, tmp_path):
    folder, manifest = data
    other = "sha256:" + "1" * 64
    for run in ("cpu_2-bs2-r1", "cpu_2-bs1-online-r1"):
        with pytest.raises(DataError, match=r"but the spec's (are|is) sha256:"):
            items(data, spec(other, run), rank=0)
    online = spec(manifest.dataset, "cpu_2-bs1-online-r1")
    arguments = {"rank": 0, "first_step": 0, "steps": 1, "data": folder / "manifest.json"}
    with pytest.raises(UserError, match="need the folder of videos"):
        clips.loader(online, videos=None, **arguments)
    moved = clips.loader(online, videos=tmp_path, **arguments)
    with pytest.raises(DataError, match=r"\.(mp4|avi): cannot be read: No such file"):
        next(iter(moved))
    for path in (folder / "videos").iterdir():
        Path(tmp_path / path.name).write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DataError, match=r"\d+ bytes, but the manifest says \d+"):
        next(iter(moved))


def test_a_worker_keeps_few_readers_open(data, monkeypatch):
    monkeypatch.setattr(clips, "OPEN_READERS", 2)
    folder, manifest = data
    online = spec(manifest.dataset, "cpu_2-bs1-online-r1")
    dataset = clips.OnlineClips(folder / "videos", manifest, online, 0, 0, 20)
    for item in range(20):
        dataset[item]
        assert len(dataset._readers) <= 2
