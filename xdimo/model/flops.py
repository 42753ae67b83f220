"""Arithmetic and parameters of a model in closed form, without torch. docs/mfu.md explains them.

Model FLOPs: the products of matmuls, convolutions and attention that the model needs, 2 FLOPs a
multiply-add, for one sample (one clip). A token counts its top_k experts only; adaLN and the
timestep's MLP count once a sample. The backward pass is twice the forward; recompute does not
count, nor do element-wise operations, norms, softmax, loss, optimizer, EMA and VAE.
"""

from dataclasses import astuple, dataclass

from xdimo.implementations import Name
from xdimo.spec import ModelSpec

# Changes with what is counted: figures made by different formulas are not compared.
TERA = 1e12
FORMULA = "2 a multiply-add; products only; top-k experts; training = 3 x forward"

MLP_RATIO = 4  # hidden width of an MLP or expert, in widths
TIMESTEP_FREQUENCIES = 256  # channels of the timestep's sines and cosines, whatever the width


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of one sample by part; their sum; and what a training step takes."""

    qkv_and_proj: int
    attention: int
    experts: int  # the MLPs; of a dense model too
    router: int
    conditioning: int  # timestep MLP and adaLN
    patch_embedding: int
    final: int

    @property
    def forward(self) -> int:
        return sum(astuple(self))

    @property
    def training(self) -> int:
        """Forward, and twice as much backward."""
        return 3 * self.forward


@dataclass(frozen=True)
class Executed:
    """Hardware FLOPs of one sample."""

    forward: int
    training: int


@dataclass(frozen=True)
class Parameters:
    total: int
    trainable: int  # without the fixed position tables
    active: int  # of the total, what one token goes through: top_k of the experts


def tokens_per_frame(model: ModelSpec, latent_size: int) -> int:
    return (latent_size // model.patch) ** 2


def model_flops(model: ModelSpec, *, frames: int, latent_size: int, latent_channels: int) -> Flops:
    """Model FLOPs of one sample: ``frames`` latents of ``latent_channels`` x ``latent_size``^2."""
    d, depth = model.width, model.depth
    spatial = tokens_per_frame(model, latent_size)
    tokens = frames * spatial
    patch_values = model.patch**2 * latent_channels
    keys = depth // 2 * (spatial + frames)  # that a token's query meets on its way through
    return Flops(
        qkv_and_proj=depth * tokens * 2 * (3 + 1) * d * d,
        attention=tokens * keys * 2 * 2 * d,  # q k^T, and weights times v
        experts=depth * tokens * model.top_k * 2 * 2 * MLP_RATIO * d * d,
        router=depth * tokens * 2 * d * model.experts if model.experts > 1 else 0,
        conditioning=2 * (TIMESTEP_FREQUENCIES * d + d * d + (6 * depth + 2) * d * d),
        patch_embedding=tokens * 2 * patch_values * d,
        final=tokens * 2 * d * 2 * patch_values,
    )


def hardware_flops(
    name: Name, model: ModelSpec, *, frames: int, latent_size: int, latent_channels: int
) -> Executed:
    """What an implementation executes for one sample, experts' rows that fill up tiles apart.

    Attention kernels make q k^T again in the backward pass: five products there for two forward.
    The fused one of a frame makes q k^T, and the weights' gradient, for queries and again for keys.
    """
    shape = {"frames": frames, "latent_size": latent_size, "latent_channels": latent_channels}
    needed = model_flops(model, **shape)
    if name == "reference":
        return Executed(needed.forward, needed.training)
    d, layers, spatial = model.width, model.depth // 2, tokens_per_frame(model, latent_size)
    tokens = frames * spatial
    across = layers * tokens * 2 * spatial * d  # one of the two products of spatial attention
    along = layers * tokens * 2 * frames * d  # of temporal attention
    others = needed.forward - needed.attention
    if name == "dense":
        if model.experts > 1:
            others += needed.experts * (model.experts - model.top_k) // model.top_k
        return Executed(others + 2 * (across + along), 3 * others + 7 * across + 6 * along)
    # Its kernels pad frames and a head's channels to powers of two, from 16 on; positions to 64.
    side, channels = (max(16, 1 << (n - 1).bit_length()) for n in (frames, d // model.heads))
    along = layers * spatial * model.heads * 2 * side * side * channels
    positions = -(-spatial // 64) * 64
    across = layers * frames * model.heads * 2 * positions * positions * channels
    return Executed(others + 2 * (across + along), 3 * others + 9 * across + 7 * along)


def parameters(
    model: ModelSpec, *, frames: int, latent_size: int, latent_channels: int
) -> Parameters:
    """Parameter counts of ``xdimo.model.latte.Latte`` with the same arguments."""
    d, depth, patch_values = model.width, model.depth, model.patch**2 * latent_channels
    tables = (tokens_per_frame(model, latent_size) + frames) * d
    expert = linear(d, MLP_RATIO * d) + linear(MLP_RATIO * d, d)
    router = d * model.experts if model.experts > 1 else 0
    block = linear(d, 3 * d) + linear(d, d) + linear(d, 6 * d) + router + model.experts * expert
    ends = (
        linear(patch_values, d)  # patch embedding
        + linear(TIMESTEP_FREQUENCIES, d) + linear(d, d)  # timestep
        + linear(d, 2 * d) + linear(d, 2 * patch_values)  # final layer
    )  # fmt: skip
    trainable = depth * block + ends
    total = trainable + tables
    idle = depth * (model.experts - model.top_k) * expert
    return Parameters(total=total, trainable=trainable, active=total - idle)


def linear(inputs: int, outputs: int) -> int:
    """Parameters of a linear layer with bias."""
    return (inputs + 1) * outputs
