"""Manifest: files a second. Decoding: clips a second and core, for decord and PyAV.

    python benchmarks/manifest.py

Videos are made for it: 256x256 h264 with noise, a keyframe every 250 frames and every 16.
A clip is 16 frames over a window of 48 at a random start, read by one process with one thread.
"""

import os
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from tabulate import tabulate

from xdimo.data.clips import draw, offsets
from xdimo.data.video_reader import Decoder, open_video

ROOT = Path(__file__).parent.parent
FRAMES, SIZE, WINDOW = 500, 256, 48
FILES, FILE_FRAMES = 40, 200
SECONDS = 5.0


def make(path: Path, frames: int, keyframe_every: int) -> Path:
    """A moving picture with noise: as hard to decode as a real one of its bit rate."""
    noise = np.random.default_rng(0)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "23"})
        stream.width = stream.height = SIZE
        stream.pix_fmt, stream.gop_size = "yuv420p", keyframe_every
        for i in range(frames):
            waves = np.stack([rows + 3 * i, columns + 5 * i, rows + columns + i], axis=-1)
            picture = 128 + 90 * np.sin(waves / 20) + noise.normal(0, 6, waves.shape)
            frame = av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def clips_per_s(path: Path, decoder: Decoder) -> float:
    reader = open_video(path, decoder=decoder, index="timestamps", frames=FRAMES)
    begun, clips = time.perf_counter(), 0
    while (passed := time.perf_counter() - begun) < SECONDS:
        start, _ = draw(0, clips, 0, FRAMES, WINDOW, False)
        reader.frames([start + offset for offset in offsets(16, 3)])
        clips += 1
    return clips / passed


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = []
        for keyframe_every in (250, 16):
            path = make(folder / f"{keyframe_every}.mp4", FRAMES, keyframe_every)
            rates = [clips_per_s(path, decoder) for decoder in ("decord", "pyav")]
            rows.append([keyframe_every, *rates])
        print(tabulate(rows, ["keyframe every", "decord clips/s", "PyAV clips/s"], floatfmt=".1f"))
        print()

        videos = folder / "videos"
        videos.mkdir()
        content = make(folder / "one.mp4", FILE_FRAMES, 250).read_bytes()
        for i in range(FILES):  # each another file; FFmpeg passes over what follows the last box
            padding = (16).to_bytes(4, "big") + b"free" + i.to_bytes(8, "big")
            (videos / f"{i}.mp4").write_bytes(content + padding)
        rows = []
        workers = len(os.sched_getaffinity(0))
        for decoder in ("auto", "pyav"):
            for what in ("first time", "again"):
                begun = time.perf_counter()
                verb = [sys.executable, "-m", "xdimo", "manifest", str(videos)]
                verb += ["--decoder", decoder, "--workers", str(workers)]
                verb += ["--output", str(folder / f"{decoder}.json")]
                subprocess.run(verb, check=True, cwd=ROOT, capture_output=True)
                rows.append([decoder, what, FILES / (time.perf_counter() - begun)])
        print(f"`xdimo manifest` of {FILES} videos of {FILE_FRAMES} frames, {workers} workers")
        print(tabulate(rows, ["decoder", "", "files/s"], floatfmt=".1f"))


if __name__ == "__main__":
    main()
