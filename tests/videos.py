"""Videos made for tests: every frame shows its own number, so that a wrong frame is detected."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

BITS = 9  # a frame's number, as 3 x 3 black or white fields


def write_video(
    path: Path,
    frames: int,
    codec: str = "libx264",
    *,
    width: int = 64,
    height: int = 64,
    keyframe_every: int = 12,
    first: int = 0,
    skip: tuple[int, ...] = (),
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Frames ``first``, ``first`` + 1, ... at 25 a second; after those in ``skip`` one is left out.

    x264 puts B-frames between the others by itself; mpeg4 does with ``bf``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream: Any = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.gop_size = width, height, keyframe_every
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        time = 0
        for number in range(first, first + frames):
            frame = av.VideoFrame.from_ndarray(picture(number, height, width), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 25)
            container.mux(stream.encode(frame))
            time += 2 if number in skip else 1
        container.mux(stream.encode())
    return path


def picture(number: int, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]"""
    image = np.zeros((height, width, 3), np.uint8)
    for bit in range(BITS):
        image[_field(bit, height, width)] = 255 * (number >> bit & 1)
    return image


def number_of(image: np.ndarray) -> int:
    """The number that a decoded [height, width, 3] frame shows, whatever compression left of it."""
    fields = (image[_field(bit, *image.shape[:2])].mean() > 127 for bit in range(BITS))
    return sum(1 << bit for bit, white in enumerate(fields) if white)


def _field(bit: int, height: int, width: int) -> tuple[slice, slice]:
    row, column = divmod(bit, 3)
    return (
        slice(row * height // 3, (row + 1) * height // 3),
        slice(column * width // 3, (column + 1) * width // 3),
    )


def cut(path: Path, part: float) -> Path:
    """A copy that ends early, beside the file."""
    copy = path.with_name(f"cut-{path.name}")
    content = path.read_bytes()
    copy.write_bytes(content[: int(len(content) * part)])
    return copy
