"""What a Wan folder says of itself before its weights are read: sizes, identity, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from tests.families import networks, official
from weft.adapters.lora import Lora
from weft.adapters.modules import linears_of
from weft.contracts import Denoise
from weft.errors import ModelError
from weft.families.files import Files
from weft.families.loading import model_folder
from weft.families.storage import PackedLinear
from weft.families.wan import Wan
from weft.families.weights import HERE

CPU = torch.device("cpu")
SMALL = {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}  # Wan 2.1 T2V 1.3B
LARGE = {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824}  # T2V 14B
TI2V = {"num_layers": 30, "num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48}
VAE_22 = {"z_dim": 48, "patch_size": 2, "scale_factor_spatial": 16, "scale_factor_temporal": 4}


def configured(folder: Path, transformer: dict[str, Any], vae: dict[str, Any]) -> Wan:
    """A family of which there are only configs."""
    with torch.device("meta"):
        WanTransformer3DModel(**transformer).save_config(folder / "transformer")
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan", **vae}))
    return Wan(source=str(folder))


def edit(path: Path, **change: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def test_wan_2_1_sees_32760_tokens_at_480p_and_75600_at_720p(tmp_path):
    geometry = configured(tmp_path, SMALL, {}).geometry()
    assert geometry.latent_shape(81, 480, 832) == (16, 21, 60, 104)
    assert geometry.tokens(81, 480, 832) == 21 * 30 * 52 == 32_760
    assert geometry.tokens(81, 720, 1280) == 21 * 45 * 80 == 75_600
    assert (geometry.fps, geometry.side_multiple, geometry.time_stride) == (16, 16, 4)


def test_ti2v_5b_sees_27280_tokens_at_704_by_1280_and_runs_at_24_frames_a_second(tmp_path):
    geometry = configured(tmp_path, TI2V, VAE_22).geometry()
    assert geometry.latent_shape(121, 704, 1280) == (48, 31, 44, 80)
    assert geometry.tokens(121, 704, 1280) == 31 * 22 * 40 == 27_280
    assert (geometry.fps, geometry.side_multiple, geometry.time_stride) == (24, 32, 4)


@pytest.mark.parametrize(
    ("sizes", "vae", "targets", "layers", "parameters"),
    [
        (SMALL, {}, "attention+ffn", 300, 43_745_280),
        (TI2V, VAE_22, "attention+ffn", 300, 80_609_280),
        (TI2V, VAE_22, "attention", 240, 47_185_920),
        (LARGE, {}, "attention+ffn", 400, 153_354_240),
        (LARGE, {}, "attention", 320, 104_857_600),
        (LARGE, {}, "ffn", 80, 153_354_240 - 104_857_600),
        (LARGE, {}, "self-attention", 160, 52_428_800),
        (LARGE, {}, "cross-attention", 160, 52_428_800),
    ],
)
def test_the_familys_target_sets_have_the_layers_of_arithmetic(tmp_path, sizes, vae, targets, layers, parameters):
    """Parameters at rank 32: 32 (in + out) for each layer."""
    family = configured(tmp_path, sizes, vae)
    report = Lora(rank=32, targets=targets).match(linears_of(family.skeleton()), family.targets, family.aliases)
    assert (len(report.paths), report.parameters(rank=32)) == (layers, parameters)


def test_a_folder_that_is_not_there_is_answered_with_the_nearest(folder):
    with pytest.raises(ModelError, match=r"no folder .*wan-smal'.*Did you mean 'wan-small'"):
        Wan(source=str(folder)[:-1]).geometry()


def test_a_file_in_place_of_a_folder_is_refused(folder):
    with pytest.raises(ModelError, match="is a file"):
        Wan(source=str(folder / "model_index.json")).geometry()


def test_a_missing_part_is_named_with_the_parts_that_are_there(own):
    shutil.rmtree(own / "vae")
    with pytest.raises(ModelError, match=r"'vae/config\.json'.*scheduler, text_encoder, tokenizer, transformer"):
        Wan(source=str(own)).geometry()


def test_another_familys_network_is_refused_by_name(own):
    edit(own / "transformer" / "config.json", _class_name="HunyuanVideoTransformer3DModel")
    with pytest.raises(ModelError, match=r"describes a HunyuanVideoTransformer3DModel.*WanTransformer3DModel"):
        Wan(source=str(own)).skeleton()


def test_an_autoencoder_of_another_model_is_refused(own):
    edit(own / "vae" / "config.json", z_dim=48)
    with pytest.raises(ModelError, match="the VAE gives 48 channels, the transformer takes 16"):
        Wan(source=str(own)).geometry()


def test_a_config_that_is_no_json_is_refused(own):
    (own / "transformer" / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        Wan(source=str(own)).geometry()


def test_a_network_without_safetensors_is_refused_and_pickles_are_not_read(own):
    weights = own / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelError, match=r"has no \.safetensors file"):
        Wan(source=str(own)).load("fp32", "default", HERE)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_weights_that_were_cut_off_are_refused_by_their_size(own, part):
    (weights,) = (own / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=rf"{weights.name}: cut off or padded"):
        family = Wan(source=str(own))
        family.load("fp32", "default", HERE)
        family.encoders(CPU, lambda module: module)


def test_weights_that_were_cut_off_are_refused_before_anything_is_cached(own):
    (weights,) = (own / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="cut off"):
        Wan(source=str(own)).identity()


def test_a_shard_that_was_not_fetched_is_named(own):
    index = {"weight_map": {"a": "diffusion_pytorch_model.safetensors", "b": "shard-2.safetensors"}}
    (own / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"1 of its 2 files are not there, first shard-2\.safetensors"):
        Wan(source=str(own)).load("fp32", "default", HERE)


def test_a_source_without_a_scheduler_says_that_samples_need_it(own):
    shutil.rmtree(own / "scheduler")
    with pytest.raises(ModelError, match=r"scheduler_config\.json"):
        Wan(source=str(own)).scheduler()


def test_the_identity_is_the_content_not_the_place_and_repeats(folder, own):
    assert Wan(source=str(folder)).identity() == Wan(source=str(own)).identity() == Wan(source=str(own)).identity()


@pytest.mark.parametrize(
    ("part", "changed"), [("transformer", "network"), ("vae", "latents"), ("text_encoder", "text")]
)
def test_one_changed_weight_changes_the_identity_of_its_part_alone(own, part, changed):
    before = Wan(source=str(own)).identity()
    (path,) = (own / part).glob("*.safetensors")
    tensors = load_file(path)
    name = sorted(tensors)[len(tensors) // 2]
    tensors[name].view(-1)[0] += 0.5
    save_file(tensors, path, {"format": "pt"})
    after = Wan(source=str(own)).identity()
    assert {key for key in before if before[key] != after[key]} == {changed}


# ---- The same model in other layouts ------------------------------------------------------------------------------


def makers_directory(folder: Path) -> Path:
    """Wan as its makers publish it, beside whose files are the tokenizer and what is in no layout but diffusers'."""
    folder.mkdir()
    save_file(official.wan_transformer(networks.wan().state_dict()), folder / "diffusion_pytorch_model.safetensors")
    torch.save(official.wan_vae(networks.vae_2_1().state_dict()), folder / "Wan2.1_VAE.pth")
    torch.save(official.umt5(networks.umt5().state_dict()), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(model_folder("tiny-wan") / "tokenizer", folder / "google" / "umt5-xxl")
    return folder


def diffusers_folder(folder: Path) -> Path:
    networks.wan().save_pretrained(folder / "transformer")
    networks.vae_2_1().save_pretrained(folder / "vae")
    networks.umt5().save_pretrained(folder / "text_encoder")
    shutil.copytree(model_folder("tiny-wan") / "tokenizer", folder / "tokenizer")
    shutil.copytree(model_folder("tiny-wan") / "scheduler", folder / "scheduler")
    return folder


def question() -> Denoise:
    torch.manual_seed(0)
    return Denoise(torch.randn(2, 16, 3, 4, 6), torch.tensor([0.2, 0.9]), {"text": torch.randn(2, 7, 32)})


def velocity(family: Wan) -> torch.Tensor:
    network = family.load("fp32", "default", HERE)
    with torch.no_grad():
        return family.forward(network, question())


def test_the_makers_directory_and_diffusers_folder_are_one_model(tmp_path):
    makers = Wan(source=str(makers_directory(tmp_path / "makers")))
    diffusers = Wan(source=str(diffusers_folder(tmp_path / "diffusers")))
    assert makers.geometry() == diffusers.geometry()
    assert torch.equal(velocity(makers), velocity(diffusers))
    pixels = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    one, other = (family.encoders(CPU, lambda module: module) for family in (makers, diffusers))
    assert torch.equal(one.latents(pixels), other.latents(pixels))
    assert makers.scheduler().config["flow_shift"] == 5.0  # Wan 2.1's


@pytest.mark.parametrize(("dtype", "packed"), [("auto", 20), ("bf16", 0), ("int8", 20)])
def test_an_fp8_file_in_place_of_the_transformer(tmp_path, dtype, packed):
    state = official.wan_transformer(networks.wan().state_dict())
    for name in [n for n, t in state.items() if n.startswith("blocks.") and n.endswith(".weight") and t.ndim == 2]:
        scale = state[name].abs().max() / 448
        state[name] = (state[name] / scale).to(torch.float8_e4m3fn)
        state[name.replace(".weight", ".scale_weight")] = scale
    save_file(state, tmp_path / "wan_fp8_scaled.safetensors")
    folder = diffusers_folder(tmp_path / "diffusers")
    family = Wan(source=str(folder), dtype=dtype, files=Files(transformer=tmp_path / "wan_fp8_scaled.safetensors"))
    network = family.load("bf16", "default", HERE)
    assert sum(isinstance(module, PackedLinear) for module in network.modules()) == packed
    held = sum(t.numel() * t.element_size() for t in [*network.parameters(), *network.buffers()])
    assert sum(family.weight_bytes("bf16").values()) == held
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        answer = family.forward(network, question()).float()
    wanted = velocity(Wan(source=str(folder)))
    assert (answer - wanted).norm() < 0.05 * wanted.norm()  # 2^-4 of each weight, on average a third of it
