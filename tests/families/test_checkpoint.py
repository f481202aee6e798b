"""One model in every layout: diffusers' folder, the makers' directory, single files; what is refused by its header."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan, HunyuanVideoTransformer3DModel, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionModel, LlamaConfig, LlamaModel, UMT5EncoderModel

from tests.families import networks, official
from weft.errors import ModelError
from weft.families.checkpoint import open_checkpoint
from weft.families.files import Files
from weft.families.sniff import names_expert
from weft.families.weights import Form, bare

SHARD = "diffusion_pytorch_model-0000{}-of-00002.safetensors"


def save(state: dict[str, Tensor], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def official_network(network: WanTransformer3DModel, folder: Path, shards: bool = True) -> None:
    """Weights in two shards, and the makers' config."""
    state = official.wan_transformer(network.state_dict())
    names = list(state)
    for number in (0, 1):
        save({n: state[n] for n in names[number::2]}, folder / SHARD.format(number + 1))
    config = {"_class_name": "WanModel", "dim": 128, "num_heads": 1, "num_layers": 2, "eps": 1e-6, "text_len": 512}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def high() -> WanTransformer3DModel:
    return networks.wan()


@pytest.fixture(scope="module")
def low() -> WanTransformer3DModel:
    network = networks.wan()
    return networks.randomized(network, seed=5)


@pytest.fixture(scope="module")
def directory(tmp_path_factory, high, low) -> Path:
    """An official Wan 2.2 directory with both experts."""
    folder = tmp_path_factory.mktemp("official") / "Wan2.2-T2V-A14B"
    official_network(high, folder / "high_noise_model")
    official_network(low, folder / "low_noise_model")
    torch.save(official.wan_vae(networks.vae_2_1().state_dict()), folder / "Wan2.1_VAE.pth")
    text = {n: t.bfloat16() for n, t in official.umt5(networks.umt5().state_dict()).items()}
    torch.save(text, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(official.clip(networks.clip_vision().state_dict()), folder / "models_clip_xlm-roberta-large.pth")
    tokenizer = folder / "google" / "umt5-xxl"
    tokenizer.mkdir(parents=True)
    (tokenizer / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory, high, low) -> Path:
    """The same model in diffusers layout: transformer is the expert for noise."""
    folder = tmp_path_factory.mktemp("diffusers") / "Wan2.2-T2V-A14B-Diffusers"
    high.save_pretrained(folder / "transformer")
    low.save_pretrained(folder / "transformer_2")
    networks.vae_2_1().save_pretrained(folder / "vae")
    networks.umt5().bfloat16().save_pretrained(folder / "text_encoder")
    networks.clip_vision().save_pretrained(folder / "image_encoder")
    (folder / "tokenizer").mkdir()
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0})
    )
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", "boundary_ratio": 0.875}))
    return folder


@pytest.fixture
def single(tmp_path: Path, high) -> Path:
    """As repackaged for ComfyUI."""
    state = {f"model.diffusion_model.{n}": t.half() for n, t in official.wan_transformer(high.state_dict()).items()}
    return save(state, tmp_path / "wan2.1_t2v_fp16.safetensors")


def load(checkpoint, part: str, form: Form | None = None) -> WanTransformer3DModel:
    network = bare(lambda: WanTransformer3DModel.from_config(checkpoint.config(part)))
    return checkpoint.network(part, network, list(network.blocks), form or Form("fp32"))


def same(one, other) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name].to(a[name].dtype)) for name in a)


# ---- Layouts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["directory", "diffusers_folder"])
def test_both_experts_come_from_their_own_files(layout, request, high, low):
    checkpoint = open_checkpoint(str(request.getfixturevalue(layout)), None, "wan")
    assert same(load(checkpoint, "high"), high) and same(load(checkpoint, "low"), low)
    assert checkpoint.facts.experts == 2 and checkpoint.facts.boundary_ratio == 0.875
    assert checkpoint.has("low") and not checkpoint.has("text_encoder_2")


@pytest.mark.parametrize("layout", ["directory", "diffusers_folder"])
@pytest.mark.parametrize("part", ["vae", "text_encoder", "image_encoder"])
def test_encoders_are_the_same_from_every_layout(layout, part, request):
    cls, made = {
        "vae": (AutoencoderKLWan, networks.vae_2_1),
        "text_encoder": (UMT5EncoderModel, lambda: networks.umt5().bfloat16()),
        "image_encoder": (CLIPVisionModel, networks.clip_vision),
    }[part]
    checkpoint = open_checkpoint(str(request.getfixturevalue(layout)), None, "wan")
    module, wanted = checkpoint.module(part, cls, "stored"), made()
    assert same(module, wanted) and not any(p.requires_grad for p in module.parameters())
    assert not module.training and not any(t.is_meta for t in [*module.parameters(), *module.buffers()])
    if part == "image_encoder":
        pixels = torch.randn(1, 3, 28, 28)
        assert torch.equal(module(pixels).last_hidden_state, wanted(pixels).last_hidden_state)


def test_configs_that_no_official_file_says_are_told_from_shapes(directory, high):
    checkpoint = open_checkpoint(str(directory), None, "wan")
    config = checkpoint.config("high")
    real = dict(high.config)
    assert {key: config[key] for key in config if key in real and key != "patch_size"} == {
        key: real[key] for key in config if key in real and key != "patch_size"
    }
    assert tuple(config["patch_size"]) == (1, 2, 2)
    assert checkpoint.config("vae")["base_dim"] == 4 and checkpoint.config("vae")["latents_std"][0] == 2.8184
    text = checkpoint.config("text_encoder")
    assert (text["d_model"], text["num_heads"], text["d_kv"], text["num_layers"]) == (32, 4, 8, 2)
    assert checkpoint.config("scheduler")["flow_shift"] == 12.0  # Wan 2.2 T2V's own
    assert checkpoint.inferred("high") and checkpoint.layout == "official"


def test_heads_of_another_width_are_taken_from_the_official_config(tmp_path: Path):
    network = networks.wan(num_attention_heads=2, attention_head_dim=12, ffn_dim=32)
    official_network(network, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"num_heads": 1', '"num_heads": 2'))
    checkpoint = open_checkpoint(str(tmp_path / "model"), None, "wan")
    assert checkpoint.config("transformer")["num_attention_heads"] == 2
    assert same(load(checkpoint, "transformer"), network)
    config.unlink()
    with pytest.raises(ModelError, match="24 wide, which is no whole number of heads of 128"):
        open_checkpoint(str(tmp_path / "model"), None, "wan").config("transformer")


def test_a_wan_2_2_i2v_has_no_image_tokens_and_a_2_1_has(tmp_path: Path):
    """Both official configs say model_type i2v: only the tensors tell."""
    for name, clip in (("2.1", True), ("2.2", False)):
        official_network(networks.wan(channels=36, clip=clip), tmp_path / name)
        config = open_checkpoint(str(tmp_path / name), None, "wan").config("transformer")
        assert (config["image_dim"], config["added_kv_proj_dim"]) == ((24, 128) if clip else (None, None))


def test_one_file_is_a_transformer_and_its_other_parts_are_named_beside_it(single: Path, high, diffusers_folder):
    files = Files(vae=diffusers_folder / "vae", text_encoder=diffusers_folder / "text_encoder")
    checkpoint = open_checkpoint(str(single), files, "wan")
    assert same(load(checkpoint, "transformer", Form("fp16")), high.half().float())
    assert checkpoint.layout == "files" and checkpoint.facts.experts == 1 and checkpoint.stored("transformer") == "fp16"
    assert checkpoint.module("vae", AutoencoderKLWan, "fp32").config.base_dim == 4
    with pytest.raises(ModelError, match=r"has no tokenizer. Name it in family\.files\.tokenizer"):
        checkpoint.tokenizer_folder()


def test_single_files_stand_in_for_parts_of_a_folder(tmp_path: Path, diffusers_folder, low):
    """ComfyUI's repackaged encoders: the VAE under official names, UMT5 under transformers' with fp8 scales."""
    vae = save(official.wan_vae(networks.vae_2_1().state_dict()), tmp_path / "wan_2.1_vae.safetensors")
    umt5 = networks.umt5()
    text = {n: t for n, t in umt5.state_dict().items() if n != "encoder.embed_tokens.weight"}
    query = "encoder.block.0.layer.0.SelfAttention.q"
    scale = text[f"{query}.weight"].abs().max() / 448
    text[f"{query}.weight"] = (text[f"{query}.weight"] / scale).to(torch.float8_e4m3fn)
    text |= {f"{query}.scale_weight": scale, "scaled_fp8": torch.zeros(2), "spiece_model": torch.zeros(9)}
    encoder = save(text, tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    one = save(official.wan_transformer(low.state_dict()), tmp_path / "wan2.2_t2v_high_noise.safetensors")
    files = Files(vae=vae, text_encoder=encoder, high=one)
    checkpoint = open_checkpoint(str(diffusers_folder), files, "wan")
    assert same(checkpoint.module("vae", AutoencoderKLWan, "fp32"), networks.vae_2_1())
    loaded = checkpoint.module("text_encoder", UMT5EncoderModel, "fp32")
    for name, tensor in umt5.state_dict().items():
        error = (loaded.state_dict()[name] - tensor).abs().max()
        assert error <= (2**-4 * tensor.abs().max() if name == f"{query}.weight" else 0), name
    assert loaded.shared.weight is loaded.encoder.embed_tokens.weight
    assert same(load(checkpoint, "high"), low)


def test_a_llama_is_taken_out_of_the_model_around_it(tmp_path: Path):
    """The names that HunyuanVideo's text encoder has as one file for ComfyUI."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=40
    )
    llama = networks.randomized(LlamaModel(config))
    state = {f"model.{n}": t for n, t in llama.state_dict().items()} | {"lm_head.weight": torch.zeros(40, 32)}
    files = Files(text_encoder=save(state, tmp_path / "llava_llama3.safetensors"))
    (tmp_path / "llava_llama3.json").write_text(json.dumps(config.to_dict()))
    network = save(official.hunyuan_transformer(networks.hunyuan().state_dict()), tmp_path / "hv.safetensors")
    loaded = open_checkpoint(str(network), files, "hunyuan-video").module("text_encoder", LlamaModel, "fp32")
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(loaded(ids).last_hidden_state, llama(ids).last_hidden_state)


def test_the_official_hunyuanvideo_directory(tmp_path: Path):
    wanted = networks.hunyuan()
    inner = tmp_path / "ckpts" / "hunyuan-video-t2v-720p"
    (inner / "transformers").mkdir(parents=True)
    state = {"module": official.hunyuan_transformer(wanted.state_dict())}
    torch.save(state, inner / "transformers" / "mp_rank_00_model_states.pt")
    (tmp_path / "ckpts" / "text_encoder").mkdir()
    checkpoint = open_checkpoint(str(tmp_path / "ckpts"), None, "hunyuan-video")
    config = checkpoint.config("transformer")
    real = dict(wanted.config)
    assert {k: v for k, v in config.items() if k in real and k != "rope_axes_dim"} == {
        k: real[k] for k in config if k in real and k != "rope_axes_dim"
    }
    assert tuple(config["rope_axes_dim"]) == (4, 14, 14)
    network = bare(lambda: HunyuanVideoTransformer3DModel.from_config(config))
    loaded = checkpoint.network("transformer", network, [], Form("fp32"))
    inputs = networks.hunyuan_inputs(wanted)
    assert torch.equal(loaded(**inputs)[0], wanted(**inputs)[0])
    assert checkpoint.config("scheduler") == {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 7.0
    }  # fmt: skip
    assert checkpoint.facts.task == "t2v" and checkpoint.has("text_encoder")


def test_hunyuanvideo_in_one_file_for_comfyui(tmp_path: Path):
    wanted = networks.hunyuan()
    state = {f"model.model.{n}": t for n, t in official.hunyuan_transformer(wanted.state_dict()).items()}
    checkpoint = open_checkpoint(str(save(state, tmp_path / "hunyuan_video_t2v.safetensors")), None, "hunyuan-video")
    network = bare(lambda: HunyuanVideoTransformer3DModel.from_config(checkpoint.config("transformer")))
    blocks = [*network.transformer_blocks, *network.single_transformer_blocks]
    loaded = checkpoint.network("transformer", network, blocks, Form("fp32"))
    assert same(loaded, wanted) and checkpoint.facts.shift == 7.0


def test_hunyuanvideos_autoencoder_is_read_from_the_makers_pickle(tmp_path: Path):
    vae = networks.randomized(
        AutoencoderKLHunyuanVideo(block_out_channels=(4, 4, 8, 8), norm_num_groups=2, layers_per_block=1)
    )
    prefixed = {f"vae.{name}": tensor for name, tensor in vae.state_dict().items()}
    torch.save({"state_dict": prefixed}, tmp_path / "pytorch_model.pt")
    vae.save_config(tmp_path / "config")
    (tmp_path / "config" / "config.json").rename(tmp_path / "pytorch_model.json")
    network = save(official.hunyuan_transformer(networks.hunyuan().state_dict()), tmp_path / "hv.safetensors")
    files = Files(vae=tmp_path / "pytorch_model.pt")
    checkpoint = open_checkpoint(str(network), files, "hunyuan-video")
    assert same(checkpoint.module("vae", AutoencoderKLHunyuanVideo, "fp32"), vae)


def test_facts_of_the_shipped_model_and_of_a_ti2v(tmp_path: Path):
    assert open_checkpoint("tiny-wan", None, "wan").facts.expand_timesteps is False
    official_network(networks.wan(channels=48, out=48), tmp_path / "5B")
    facts = open_checkpoint(str(tmp_path / "5B"), None, "wan").facts
    assert (facts.task, facts.expand_timesteps, facts.shift, facts.boundary_ratio) == ("ti2v", True, 5.0, None)


def test_the_identity_changes_with_one_weight_of_its_part_alone(directory, tmp_path: Path):
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    one, other = (open_checkpoint(str(folder), None, "wan") for folder in (directory, copy))
    assert one.fingerprint("high") == other.fingerprint("high") != one.fingerprint("low")
    path = copy / "high_noise_model" / SHARD.format(1)
    state = load_file(path)
    next(iter(state.values())).view(-1)[0] += 1
    save(state, path)
    assert one.fingerprint("high") != other.fingerprint("high") and one.fingerprint("low") == other.fingerprint("low")


def test_the_bytes_foretold_of_a_part_are_those_in_memory(directory):
    checkpoint = open_checkpoint(str(directory), None, "wan")
    network = bare(lambda: WanTransformer3DModel.from_config(checkpoint.config("low")))
    form = Form("bf16", "int8")
    foretold = checkpoint.weight_bytes("low", network, list(network.blocks), form)
    loaded = load(checkpoint, "low", form)
    held = sum(t.numel() * t.element_size() for t in [*loaded.parameters(), *loaded.buffers()])
    assert sum(foretold.values()) == held


# ---- What is refused ----------------------------------------------------------------------------------------------


def refusal(source: Path, family="wan", part: str = "transformer", files: Files | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        open_checkpoint(str(source), files, family).config(part)
    return str(caught.value)


def test_another_familys_transformer_is_named_and_the_family_to_write(tmp_path: Path):
    state = official.hunyuan_transformer(networks.hunyuan().state_dict())
    path = save({n: t.to(torch.float8_e4m3fn) for n, t in state.items()}, tmp_path / "hv.safetensors")
    message = refusal(path)
    assert "hv.safetensors holds a HunyuanVideo transformer, t2v (fp8, " in message
    assert "the config's family is wan. Write family.kind=hunyuan-video" in message
    wan = save(official.wan_transformer(networks.wan().state_dict()), tmp_path / "wan.safetensors")
    assert "holds a Wan transformer, t2v (fp32" in refusal(wan, "hunyuan-video")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"diffusion_model.blocks.0.attn1.to_q.lora_A.weight": torch.ones(2)}, "holds an adapter (LoRA or like it)"),
        ({"lora_unet_blocks_0_self_attn_q.lora_down.weight": torch.ones(2, 2)}, "holds an adapter (LoRA or like it)"),
        (official.wan_vae(networks.vae_2_1().state_dict()), "holds a Wan autoencoder (fp32, "),
        (official.umt5(networks.umt5().state_dict()), "holds a UMT5 text encoder (fp32, "),
        ({"blocks.0.self_attn.q.weight.absmax": torch.ones(2),
          "blocks.0.self_attn.q.weight.quant_state.bitsandbytes__nf4": torch.ones(2)},
         "quantized by bitsandbytes (NF4), which Weft cannot read"),
        ({"blocks.0.qweight": torch.ones(2), "blocks.0.wscales": torch.ones(2)}, "nunchaku"),
        ({"something": torch.ones(2)}, "holds an unknown model (fp32, 2 parameters). Expected was a Wan transformer"),
    ],
)  # fmt: skip
def test_what_is_no_transformer_is_said_by_name(tmp_path: Path, state, words):
    assert words in refusal(save(state, tmp_path / "a.safetensors"))


def test_a_gguf_file_is_refused_with_what_to_take(tmp_path: Path):
    path = tmp_path / "wan-Q4_K_M.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    assert "GGUF file, whose quantization Weft cannot read" in refusal(path)


def test_a_transformer_in_place_of_the_vae_is_refused(single, diffusers_folder):
    message = refusal(diffusers_folder, part="vae", files=Files(vae=single))
    assert "family.files.vae" in message and "holds a Wan transformer, t2v (fp16" in message


def test_experts_whose_files_call_themselves_the_other_are_refused(tmp_path: Path, diffusers_folder, high):
    path = save(official.wan_transformer(high.state_dict()), tmp_path / "wan2.2_t2v_low_noise_14B.safetensors")
    files = Files(high=path)
    checkpoint = open_checkpoint(str(diffusers_folder), files, "wan")
    with pytest.raises(ModelError, match=r"family\.files\.high: .*low_noise.* calls itself the expert for low noise"):
        checkpoint.config("high")


@pytest.mark.parametrize(
    ("name", "low"), [("wan-LOW.safetensors", True), ("LowNoise", True), ("x_low_noise_14B", True), ("flow_low", True),
                      ("flow", False), ("yellow-lowres", False), ("high_noise", False)]
)  # fmt: skip
def test_low_is_a_word_of_a_name_and_not_a_part_of_one(name: str, low: bool):
    assert names_expert(name, "low") is low


def test_a_folder_of_the_makers_shards_stands_in_for_an_expert(directory, diffusers_folder, low):
    files = Files(low=directory / "low_noise_model")
    assert same(load(open_checkpoint(str(diffusers_folder), files, "wan"), "low"), low)
    swapped = Files(high=directory / "low_noise_model")
    with pytest.raises(ModelError, match=r"low_noise_model/diffusion_.* calls itself the expert for low noise"):
        open_checkpoint(str(diffusers_folder), swapped, "wan").config("high")


def test_nf4_without_its_package_is_refused_before_weights_are_read(directory, monkeypatch):
    monkeypatch.setattr("weft.families.storage.find_spec", lambda name: None)
    checkpoint = open_checkpoint(str(directory), None, "wan")
    with pytest.raises(ModelError, match="nf4 needs the package bitsandbytes"):
        checkpoint.weight_bytes("low", networks.wan(), [], Form("bf16", "nf4"))


def test_a_file_that_is_not_there_and_a_folder_of_nothing_are_said(tmp_path: Path, diffusers_folder):
    with pytest.raises(ModelError, match=r"family\.files\.vae: there is no file or folder"):
        open_checkpoint(str(diffusers_folder), Files(vae=tmp_path / "none.safetensors"), "wan").place("vae")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelError, match=r"no model that Weft knows: it holds notes\.txt"):
        open_checkpoint(str(tmp_path), None, "wan")
