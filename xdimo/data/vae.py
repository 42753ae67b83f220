"""The frozen VAE: where its weights lie, loading them as the spec says, encoding frames."""

import inspect
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from xdimo.errors import DataError, UserError
from xdimo.files import file_hash, read_json, read_torch
from xdimo.spec import VaeSpec

if TYPE_CHECKING:  # torch takes 2 s to import, diffusers 5 s; `locate` needs neither
    import torch

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# Names of the attention layers in weights saved by diffusers before 0.12.
OLD_NAMES = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}


def locate(weights: Path) -> tuple[Path, Path]:
    """config.json and weights file of an AutoencoderKL in ``weights`` or in ``weights/vae``.

    ``.safetensors`` is taken before ``.bin``. Raises UserError.
    """
    if not weights.is_dir():
        what = "not a folder" if weights.exists() else "no such folder"
        raise UserError(f"vae.weights: {weights}: {what}; expected an AutoencoderKL, or `random`")
    for folder in (weights, weights / "vae"):
        config = folder / "config.json"
        if config.is_file() and _settings(config).get("_class_name") == "AutoencoderKL":
            for name in WEIGHTS:
                if (folder / name).is_file():
                    return config, folder / name
            raise UserError(f"vae.weights: {folder}: expected {' or '.join(WEIGHTS)} in it")
    raise UserError(
        f"vae.weights: {weights}: no config.json of an AutoencoderKL in it or in its folder vae"
    )


def _settings(config: Path) -> dict[str, Any]:
    settings = read_json(config)
    if not isinstance(settings, dict):
        raise UserError(f"{config}: expected the settings of an AutoencoderKL, as keys and values")
    return settings


def load(
    spec: VaeSpec,
    weights: Path | None,
    device: "torch.device | str",
    dtype: "torch.dtype | None" = None,
    *,
    compiled: bool = False,
) -> Any:
    """The frozen VAE of the spec, in evaluation mode: a diffusers AutoencoderKL.

    ``weights``: the weights file, config.json beside it; None for random weights. ``dtype``: where
    the spec names none, else bfloat16 on a GPU and float32 on a CPU. Raises UserError where its
    shape is not the spec's, DataError where its bytes are not.
    """
    import torch

    device = torch.device(device)
    if spec.random:
        if weights is not None:
            raise UserError(f"{weights}: the spec asks for a random VAE ({spec.id})")
        vae = _random(spec, int(spec.id.removeprefix("random:")))
    else:
        if weights is None:
            raise UserError(f"the spec's VAE has weights ({spec.id}); give their folder")
        vae = _stored(spec, weights)
    vae = vae.eval().requires_grad_(False)
    on_gpu = device.type == "cuda"
    if spec.precision is not None:
        dtype = torch.bfloat16 if spec.precision == "bf16" else torch.float32
    # Module's own method: that of diffusers warns of modules to keep in float32, of which the VAE
    # has none.
    torch.nn.Module.to(
        vae,
        device=device,
        dtype=dtype or (torch.bfloat16 if on_gpu else torch.float32),
        memory_format=torch.channels_last if on_gpu else torch.preserve_format,
    )
    if compiled:
        for module in vae.encoder.modules():
            if type(module) is torch.nn.GroupNorm and vae.dtype == torch.bfloat16:
                module.forward = MethodType(_group_norm, module)
        vae.encoder.compile()
    return vae


def _group_norm(module: "torch.nn.GroupNorm", x: "torch.Tensor") -> "torch.Tensor":
    """GroupNorm of bfloat16 x [n, c, ...] for the compiler: 48 -> 40 ms for 64 frames on an H100.

    Statistics are of each channel first, which reads a channels-last x as it lies, and then of the
    channels of a group. What cancels in float32 is less than x has lost to rounding.
    """
    import torch

    y, groups = x.float().flatten(2), (module.num_groups, -1)
    mean, square = (each.mean(-1).unflatten(1, groups).mean(-1) for each in (y, y.square()))
    variance = (square - mean.square()).clamp(min=0)  # [n, groups]; rounding may leave less
    scale = torch.rsqrt(variance + module.eps)[..., None] * module.weight.unflatten(0, groups)
    shift = module.bias.unflatten(0, groups) - mean[..., None] * scale
    y = y * scale.flatten(1)[..., None] + shift.flatten(1)[..., None]
    return y.view(x.shape).to(x.dtype)


def encode(vae: Any, frames: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    """Posterior mean and standard deviation, float32 [n, c, h, w] each, unscaled.

    ``frames``: uint8 [n, 3, H, W] on the VAE's device; they become values in [-1, 1].
    """
    import torch

    layout = torch.channels_last if frames.is_cuda else torch.contiguous_format
    pixels = (frames.float() / 127.5 - 1).to(vae.dtype, memory_format=layout)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    return posterior.mean.float(), posterior.std.float()


def _structure(spec: VaeSpec) -> dict[str, Any]:
    """Arguments of diffusers' AutoencoderKL; what the spec does not say has its usual value."""
    levels = len(spec.block_out_channels)
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": spec.block_out_channels,
        "layers_per_block": spec.layers_per_block,
        "latent_channels": spec.latent_channels,
        "norm_num_groups": spec.norm_num_groups,
        "scaling_factor": spec.scaling_factor,
    }


def _random(spec: VaeSpec, seed: int) -> Any:
    import torch
    from diffusers import AutoencoderKL

    # The CPU generator alone is seeded, and given back as it was: a run's own draws do not move.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return AutoencoderKL(**_structure(spec))  # type: ignore[no-untyped-call]


def _stored(spec: VaeSpec, weights: Path) -> Any:
    found = file_hash(weights)
    if found != spec.id:
        raise DataError(f"{weights}: {found}, but the spec's VAE is {spec.id}")
    _check_config(spec, weights.with_name("config.json"))
    vae = _random(spec, 0)
    tensors = _read_tensors(weights)
    expected = vae.state_dict()
    for name in sorted({*tensors, *expected}):
        there = list(tensors[name].shape) if name in tensors else "missing"
        wanted = list(expected[name].shape) if name in expected else "no such tensor"
        if there != wanted:
            raise UserError(f"{weights}: {name}: {there}, but the config's VAE has {wanted}")
    vae.load_state_dict(tensors)
    return vae


def _check_config(spec: VaeSpec, config: Path) -> None:
    from diffusers import AutoencoderKL

    given = _settings(config)
    defaults = inspect.signature(AutoencoderKL.__init__).parameters
    structure = _structure(spec)
    for key, parameter in defaults.items():
        if key in ("self", "sample_size", "force_upcast"):  # they change no number here
            continue
        usual = _plain(parameter.default)
        wanted = structure.get(key, usual)
        there = given.get(key, usual)
        if there != wanted:
            of = f"vae.{key}" if key in VaeSpec.model_fields else "the VAE of XDiMo"
            raise UserError(f"{config}: {key}: {there}, but {of} is {wanted}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _read_tensors(weights: Path) -> "dict[str, torch.Tensor]":
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        safe = weights.suffix == ".safetensors"
        stored = load_file(weights) if safe else read_torch(weights, "cannot be read as tensors")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights}: cannot be read as tensors: {error}") from None
    if not isinstance(stored, dict) or not all(
        isinstance(x, torch.Tensor) for x in stored.values()
    ):
        raise UserError(f"{weights}: expected the tensors of an AutoencoderKL, each under its name")
    return {_renamed(str(name)): tensor for name, tensor in stored.items()}


def _renamed(name: str) -> str:
    if ".attentions." in name:
        for old, new in OLD_NAMES.items():
            name = name.replace(old, new)
    return name
