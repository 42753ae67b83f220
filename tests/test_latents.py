"""The VAE and the cached latents: right values, whole files, no work twice, no wrong data read."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from tests.videos import write_video
from xdimo.data import latents as module
from xdimo.data import vae as vaes
from xdimo.data.latents import build, open_latents, read_index
from xdimo.data.manifest import build as build_manifest
from xdimo.data.video_reader import open_video
from xdimo.errors import DataError, UserError
from xdimo.files import file_hash
from xdimo.spec import VaeSpec, latents_name

SIZE = 16
SHAPE = {
    "block_out_channels": [4, 4],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 2,
    "scaling_factor": 0.18215,
}
RANDOM = VaeSpec(id="random:0", **SHAPE)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, Path]:
    """Folder of three videos (wide, high, of the clip's size) and its manifest."""
    folder = tmp_path_factory.mktemp("data")
    write_video(folder / "videos/a.mp4", 21, width=48, height=32)
    write_video(folder / "videos/b.avi", 22, width=32, height=48, first=50)
    write_video(folder / "videos/c.avi", 23, "mjpeg", width=16, height=16)
    build_manifest(
        folder / "videos", folder / "manifest.json",
        window=8, expected=3, decoder="auto", timeout_s=60, workers=2,
    )  # fmt: skip
    return folder / "videos", folder / "manifest.json"


def encode_all(data, output: Path, spec: VaeSpec = RANDOM, weights: Path | None = None, **changes):
    arguments = {"size": SIZE, "flip": True, "batch_frames": 8, "device": "cpu", **changes}
    return build(data[1], data[0], spec, weights, output, **arguments)


@pytest.fixture(scope="module")
def encoded(data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("encoded") / "index.json"
    encode_all(data, output)
    return output


def stored(folder: Path, **config) -> Path:
    """A VAE as diffusers saves one; its weights differ from every seeded one."""
    torch.manual_seed(99)
    levels = len(SHAPE["block_out_channels"])
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        **{**SHAPE, **config},
    )
    vae.save_pretrained(folder)
    return folder


def spec_of(weights: Path) -> VaeSpec:
    return VaeSpec(id=file_hash(weights), **SHAPE)


def test_latents_are_the_posterior_of_every_frame_in_both_flips(data, encoded):
    index = read_index(encoded)
    assert index.name == latents_name(index.dataset, RANDOM.model_dump(), SIZE, True)
    # By hash, not by path: the files' bytes, and so their order, differ from run to run.
    hashes = [shard.video for shard in index.shards]
    assert hashes == sorted(hashes)
    assert sorted(shard.frames for shard in index.shards) == [21, 22, 23]
    manifest = json.loads(data[1].read_text())
    vae = vaes.load(RANDOM, None, "cpu")
    reader = open_latents(encoded, index.name, rank=0, world=1)
    for number, shard in enumerate(index.shards):
        row = next(v for v in manifest["videos"] if v["sha256"] == shard.video)
        video = open_video(
            data[0] / row["path"], decoder="pyav", index=row["index"], frames=row["frames"]
        )
        assert reader.frames[number] == len(video) == row["frames"]
        frames = torch.from_numpy(video.frames(range(len(video)))).permute(0, 3, 1, 2)
        # Short side to 16, then the centre: written out here without torchvision.
        short = min(frames.shape[-2:])
        sides = [side * SIZE // short for side in frames.shape[-2:]]
        small = torch.nn.functional.interpolate(
            frames.float(), sides, mode="bilinear", antialias=True
        )
        top, left = ((side - SIZE) // 2 for side in sides)
        square = small[..., top : top + SIZE, left : left + SIZE].round().to(torch.uint8)
        for flip in (False, True):
            pixels = square.flip(-1) if flip else square
            posterior = vae.encode(pixels.float() / 127.5 - 1).latent_dist
            mean, std = reader.read(number, 5, 20, flip)
            assert mean.dtype == std.dtype == torch.float16
            # One grey level of rounding in the resize moves a latent of this VAE by less.
            torch.testing.assert_close(mean.float(), posterior.mean[5:20], atol=0.02, rtol=0.02)
            torch.testing.assert_close(std.float(), posterior.std[5:20], atol=0.02, rtol=0.02)


def test_without_a_gpu_one_sentence_says_so(data, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="latents are encoded on a GPU"):
        encode_all(data, tmp_path / "index.json", device="cuda")


def test_an_interrupted_run_goes_on_and_a_damaged_shard_is_made_again(
    data, encoded, tmp_path, monkeypatch
):
    output = tmp_path / "index.json"
    asked: list[str] = []

    def interrupted(vae, videos, video, *rest):
        asked.append(video.path)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return posterior(vae, videos, video, *rest)

    posterior = module._posterior
    monkeypatch.setattr(module, "_posterior", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode_all(data, output)
    assert not output.exists()
    encode_all(data, output)
    assert len(asked) == 4 and asked[1] == asked[2] and len(set(asked)) == 3
    assert json.loads(output.read_text()) == json.loads(encoded.read_text())
    index = read_index(output)
    damaged = output.parent / index.folder / index.shards[1].file
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(DataError, match=rf"{damaged.name}: .*index says.* snakemake -f latents"):
        open_latents(output, index.name, rank=1, world=3)
    open_latents(output, index.name, rank=0, world=3)  # its share holds no damage
    encode_all(data, output)
    assert len(asked) == 5
    open_latents(output, index.name, rank=1, world=3)


def test_latents_of_another_name_or_shape_are_refused(encoded, tmp_path):
    index = read_index(encoded)
    with pytest.raises(DataError, match=r"index\.json: latents sha256:\w+, but the spec's are x"):
        open_latents(encoded, "x", rank=0, world=1)
    output = tmp_path / "index.json"
    (tmp_path / index.folder).mkdir()
    content = json.loads(encoded.read_text())
    for shard in content["shards"]:
        tensors = load_file(encoded.parent / index.folder / shard["file"])
        path = tmp_path / index.folder / shard["file"]
        save_file({key: value[:, 1:].contiguous() for key, value in tensors.items()}, path)
        shard["sha256"] = file_hash(path)
    output.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"mean: \[2, \d+, 4, 8, 8\], expected \[2, \d+, 4, 8, 8\]"):
        open_latents(output, index.name, rank=0, world=1)
    output.write_text(json.dumps({**content, "size": 32}))
    with pytest.raises(DataError, match="but the spec's are"):
        open_latents(output, index.name, rank=0, world=1)


def test_one_flip_and_another_size_are_other_latents(data, encoded, tmp_path):
    index = encode_all(data, tmp_path / "index.json", size=8, flip=False)
    assert index.name != read_index(encoded).name
    mean, _ = open_latents(tmp_path / "index.json", index.name, rank=0, world=1).read(
        0, 0, 8, False
    )
    assert mean.shape == (8, 4, 4, 4)


def test_a_changed_video_and_latents_that_overflow_are_refused(data, tmp_path, monkeypatch):
    folder = tmp_path / "videos"
    folder.mkdir()
    for path in data[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DataError, match="changed since the manifest was made"):
        encode_all((folder, data[1]), tmp_path / "index.json")
    encode = vaes.encode
    monkeypatch.setattr(vaes, "encode", lambda *a: tuple(1e9 * x for x in encode(*a)))
    with pytest.raises(DataError, match="do not fit float16"):
        encode_all(data, tmp_path / "index.json")
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_a_full_disk_is_one_error_and_a_rerun_goes_on(data, encoded, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    shard_bytes = max(path.stat().st_size for path in encoded.parent.rglob("*.safetensors"))
    kib = (shard_bytes // 4096 + 6) * 4  # room for one shard and its small record
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(disk)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        with pytest.raises(UserError) as error:
            encode_all(data, disk / "index.json")
        message = str(error.value)
        assert str(disk) in message and "No space left on device" in message
        assert "latents of 1 of 3 videos are there" in message
        assert [path.suffix for path in sorted(disk.rglob("*.*"))] == [".json", ".safetensors"]
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        assert encode_all(data, disk / "index.json") == read_index(encoded)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_random_weights_are_those_of_their_seed_and_leave_the_runs_draws_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = vaes.load(RANDOM, None, "cpu")
    assert torch.equal(torch.rand(3), expected)
    again = vaes.load(RANDOM, None, "cpu").state_dict()
    other = vaes.load(RANDOM.model_copy(update={"id": "random:1"}), None, "cpu").state_dict()
    name = "encoder.conv_in.weight"
    assert torch.equal(first.state_dict()[name], again[name])
    assert not torch.equal(again[name], other[name])
    assert not first.training and not any(p.requires_grad for p in first.parameters())


@pytest.mark.parametrize("shape", [(2, 64, 9, 7), (3, 32, 50)])
def test_the_compilers_group_norm_is_torchs(shape):
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(32, shape[1], eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(shape) + torch.randn(1, shape[1], *[1] * (len(shape) - 2))
    with torch.no_grad():
        found = vaes._group_norm(norm, x).double()
        constant = vaes._group_norm(norm, torch.full(shape, 3.3))  # black frames
        # Far from zero bfloat16 rounds away more than is cancelled.
        far = (100 + x).bfloat16().float()
        lost = vaes._group_norm(norm, far).double()
        norm.double()
        assert (found - norm(x.double())).norm() < 1e-5 * found.norm()
        assert (lost - norm(far.double())).norm() < 1e-3 * lost.norm()
    bias = norm.bias.detach().view(-1, *[1] * (len(shape) - 2))
    assert (constant - bias).abs().max() < 0.05 * norm.weight.abs().max()


def test_stored_weights_are_found_in_the_folder_or_its_parent_in_either_format(tmp_path):
    folder = stored(tmp_path / "vae")
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16), np.uint8))
    expected = AutoencoderKL.from_pretrained(folder).encode(frames / 127.5 - 1).latent_dist
    safetensors = folder / "diffusion_pytorch_model.safetensors"
    for given in (folder, tmp_path):
        assert vaes.locate(given) == (folder / "config.json", safetensors)
    tensors = load_file(safetensors)
    old = {}
    for name, tensor in tensors.items():  # as diffusers named attention layers before 0.12
        if ".attentions." in name:
            for new, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
                name = name.replace(new, before)
            name = name.replace("to_out.0", "proj_attn")
        old[name] = tensor
    assert old.keys() != tensors.keys()
    binary = folder / "diffusion_pytorch_model.bin"
    torch.save(old, binary)
    for weights in (safetensors, binary):
        vae = vaes.load(spec_of(weights), weights, "cpu")
        mean, std = vaes.encode(vae, frames)
        torch.testing.assert_close(mean, expected.mean)
        torch.testing.assert_close(std, expected.std)
    safetensors.unlink()
    assert vaes.locate(tmp_path)[1] == binary


def test_a_pickle_that_runs_code_is_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = stored(tmp_path / "vae")
    binary = folder / "diffusion_pytorch_model.bin"
    torch.save({"weight": Attack()}, binary)
    with pytest.raises(UserError, match=r"model\.bin: cannot be read"):
        vaes.load(spec_of(binary), binary, "cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "stored_instead",
    [b"", b"\x80\x04]", [1.0], 5, {"state_dict": {}}, {"a": torch.nn.Linear(1, 1)}],
)
def test_weights_that_are_no_tensors_are_one_line_without_unsafe_advice(tmp_path, stored_instead):
    folder = stored(tmp_path / "vae")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    binary = folder / "diffusion_pytorch_model.bin"
    if isinstance(stored_instead, bytes):
        binary.write_bytes(stored_instead)
    else:
        torch.save(stored_instead, binary)
    with pytest.raises(
        UserError, match=r"model\.bin: (cannot be read as|expected the) tensors"
    ) as said:
        vaes.load(spec_of(binary), binary, "cpu")
    assert "weights_only" not in str(said.value) and "trust" not in str(said.value)


@pytest.mark.parametrize("config", ["[]", "5", "null", '"AutoencoderKL"'])
def test_a_config_of_a_vae_that_holds_no_settings(tmp_path, config):
    folder = stored(tmp_path / "vae")
    (folder / "config.json").write_text(config)
    with pytest.raises(UserError, match=r"config\.json: expected the settings of an AutoencoderKL"):
        vaes.locate(tmp_path)


def test_an_index_whose_shards_are_not_its_dataset_is_refused(encoded, tmp_path):
    content = json.loads(encoded.read_text())
    first, second, third = content["shards"]
    for shards in ([first, second], [first, first, first], [second, first, third], []):
        path = tmp_path / "index.json"
        path.write_text(json.dumps({**content, "shards": shards}))
        with pytest.raises(DataError, match=rf"index\.json: its {len(shards)} shards are not the"):
            open_latents(path, content["name"], rank=0, world=1)


def test_a_vae_that_is_missing_or_of_another_shape(tmp_path):
    with pytest.raises(
        UserError, match=r"vae\.weights: .*absent: no such folder; expected an Auto"
    ):
        vaes.locate(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"vae\.weights: .*empty: no config\.json of an Auto"):
        vaes.locate(tmp_path / "empty")
    folder = stored(tmp_path / "two-layers", layers_per_block=2)
    _, weights = vaes.locate(folder)
    spec = spec_of(weights)
    with pytest.raises(UserError, match=r"layers_per_block: 2, but vae\.layers_per_block is 1"):
        vaes.load(spec, weights, "cpu")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"layers_per_block": 2', '"layers_per_block": 1'))
    with pytest.raises(
        UserError, match=r"block.*: \[.*\], but the config's VAE has no such tensor"
    ):
        vaes.load(spec, weights, "cpu")
    with pytest.raises(DataError, match=r"model\.safetensors: sha256:\w+, but the spec's VAE is"):
        vaes.load(spec.model_copy(update={"id": "sha256:0"}), weights, "cpu")
    weights.unlink()
    with pytest.raises(UserError, match=r"two-layers: expected diffusion_pytorch_model"):
        vaes.locate(folder)
