"""FLOPs of a training sample as people have counted them: the right count, and its known mistakes.

Each mistake is named for what was done; ``training_flops`` with none of them is docs/mfu.md's sum.
"""

from collections.abc import Collection, Iterator
from itertools import product

from xdimo.model.flops import Flops, model_flops, tokens_per_frame
from xdimo.spec import ModelSpec

# In the order in which a chain mends them. name: (what was counted, what is so)
MISTAKES = {
    "multiply-adds for FLOPs": ("1 a multiply-add", "a multiply-add is 2 FLOPs"),
    "forgotten patchify": (
        "each latent position a token",
        "a token is a patch of latent positions",
    ),
    "joint attention": (
        "every token attends to every other",
        "attention is factorised: to the tokens of its frame, or of its position",
    ),
    "top-k ignored": ("one expert a token", "a token goes through its top-k experts"),
    "all experts counted": ("every expert for every token", "a token goes through top-k of them"),
    "layers alone": (
        "qkv, proj, attention and MLP of the layers",
        "router, patch embedding, final linear, timestep MLP and adaLN count too",
    ),
}
# Nobody makes these but by a closed form.
CLOSED_FORMS = frozenset({"forgotten patchify", "joint attention"})


def training_flops(
    model: ModelSpec,
    mistakes: Collection[str],
    *,
    frames: int = 16,
    latent_size: int = 32,
    latent_channels: int = 4,
) -> float:
    """Of one sample, forward and backward, as someone counts who makes these mistakes."""
    experts = model.top_k
    if "top-k ignored" in mistakes:
        experts = 1
    if "all experts counted" in mistakes:
        experts = model.experts
    patch = 1 if "forgotten patchify" in mistakes else model.patch
    counted = model.model_copy(update={"top_k": experts, "patch": patch})
    shape = {"frames": frames, "latent_size": latent_size, "latent_channels": latent_channels}
    parts = model_flops(counted, **shape)
    total = _layers(parts) if "layers alone" in mistakes else parts.forward
    if "joint attention" in mistakes:
        spatial = tokens_per_frame(counted, latent_size)
        tokens = frames * spatial
        joint = model.depth * tokens * tokens * 2 * 2 * model.width
        total += joint - parts.attention
    return 3 * total / (2 if "multiply-adds for FLOPs" in mistakes else 1)


def _layers(parts: Flops) -> int:
    return parts.qkv_and_proj + parts.attention + parts.experts


def miscounts(model: ModelSpec) -> Iterator[tuple[str, ...]]:
    """Every set of mistakes that is one for this model; the right count before all."""
    experts: list[tuple[str, ...]] = [()]
    if model.top_k > 1:
        experts.append(("top-k ignored",))
    if model.experts > model.top_k:
        experts.append(("all experts counted",))
    switches = ["multiply-adds for FLOPs", "forgotten patchify", "joint attention"]
    if model.patch == 1:
        switches.remove("forgotten patchify")
    sets = [
        (*(name for name, made in zip(switches, choice, strict=True) if made), *of_experts)
        for choice in product((False, True), repeat=len(switches))
        for of_experts in experts
    ]
    for mistakes in sorted(sets, key=len):
        yield mistakes
        yield (*mistakes, "layers alone")
