"""From a video's frames to the square ones a clip is made of.

What changes a pixel here needs another ``TRANSFORM`` (xdimo.spec): cached latents are named by it.
Where pixels differ from the public pipeline's: docs/data.md.
"""

from torch import Tensor
from torchvision.transforms.v2 import functional


def resized(frames: Tensor, size: int) -> Tensor:
    """uint8 [n, 3, H, W] -> uint8 [n, 3, size, size]: short side to ``size``, then centre crop."""
    if min(frames.shape[-2:]) != size:
        frames = functional.resize(frames, [size], antialias=True)  # bilinear
    square: Tensor = functional.center_crop(frames, [size, size])
    return square


def mirrored(frames: Tensor) -> Tensor:
    """Left to right."""
    return frames.flip(-1)
