"""Files as other programs leave them: each spelling is read, and what is not Wan's or HunyuanVideo's is named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from weft.errors import ConfigError, ModelError
from weft.formats.adapter_file import SavedAdapter
from weft.formats.casting import cast
from weft.formats.describe import describe
from weft.formats.foreign import read_foreign
from weft.formats.header import read_header
from weft.formats.reading import FORMATS, read_adapter
from weft.formats.sniff import sniff
from weft.run.changes import change_of

Q, Q_OFFICIAL = "blocks.0.attn1.to_q", "blocks.0.self_attn.q"
DOWN, UP = torch.randn(2, 6, generator=torch.Generator().manual_seed(1)), torch.randn(4, 2)


def file_of(folder: Path, tensors: dict[str, Tensor], name: str = "lora.safetensors", **metadata: str) -> Path:
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / name, metadata or None)
    return folder / name


# What one layer is called, by whom, and in which of our formats that is.
VARIANTS = {
    "musubi": ("lora_unet_blocks_0_self_attn_q.lora_{down,up}.weight", "musubi"),
    "VideoX-Fun": ("lora_unet__blocks_0_self_attn_q.lora_{down,up}.weight", "videox-fun"),
    "VideoX-Fun with PEFT": ("blocks.0.self_attn.q.lora_{A,B}.weight", "original"),
    "DiffSynth": ("blocks.0.self_attn.q.lora_{A,B}.default.weight", "original"),
    "its pipelines": ("model.blocks.0.self_attn.q.lora_{A,B}.default.weight", "original"),
    "diffusion-pipe, ai-toolkit": ("diffusion_model.blocks.0.self_attn.q.lora_{A,B}.weight", "comfyui"),
    "lightx2v": ("diffusion_model.blocks.0.self_attn.q.lora_{down,up}.weight", "comfyui"),
    "a whole checkpoint's": ("model.diffusion_model.blocks.0.self_attn.q.lora_{A,B}.weight", "comfyui"),
    "diffusers' names in ComfyUI's": ("diffusion_model.blocks.0.attn1.to_q.lora_{A,B}.weight", "comfyui"),
    "OneTrainer": ("lora_transformer_blocks_0_attn1_to_q.lora_{down,up}.weight", "musubi"),
    "SimpleTuner": ("lycoris_blocks_0_attn1_to_q.lora_{down,up}.weight", "musubi"),
    "old diffusers": ("transformer.blocks.0.attn1.to_q.lora.{down,up}.weight", "diffusers"),
    "older diffusers": ("transformer.blocks.0.attn1.to_q_lora.{down,up}.weight", "diffusers"),
    "bare diffusers": ("blocks.0.attn1.to_q.lora_{A,B}.weight", "diffusers"),
    "genmo": ("diffusion_model.blocks.0.self_attn.q.lora_{A,B}", "comfyui"),
}


def halves(pattern: str, down: Tensor = DOWN, up: Tensor = UP) -> dict[str, Tensor]:
    head, words = pattern.split("{")
    (first, second), end = words.split("}")[0].split(","), words.split("}")[1]
    return {f"{head}{first}{end}": down, f"{head}{second}{end}": up}


@pytest.mark.parametrize("alpha", [None, 1.0, 0.0])
@pytest.mark.parametrize(("pattern", "style"), VARIANTS.values(), ids=VARIANTS.keys())
def test_every_spelling_of_one_layer_is_read_with_its_alpha(pattern, style, alpha, tmp_path):
    """A missing alpha, and kohya's alpha of 0, mean scale 1."""
    tensors = halves(pattern)
    if alpha is not None:
        module = pattern.split(".lora")[0].split("_lora.")[0]
        tensors[f"{module}.alpha"] = torch.tensor(alpha)
    path = file_of(tmp_path, tensors)
    assert sniff(path).format == style
    read = read_adapter(path)
    assert read.paths == (Q,) and read.rank == 2
    torch.testing.assert_close(change_of(read, Q).delta(), (0.5 if alpha else 1.0) * UP @ DOWN)
    told = describe(path)
    assert (told.format, told.family, told.targets, told.rank) == (style, "wan", (Q,), 2)
    assert told.tells_alpha == (alpha is not None) and told.scale == (0.5 if alpha else 1.0)


def test_musubis_split_layers_are_cut_from_one_module(tmp_path):
    """split_dims: three pairs of factors on the three thirds of one module's rows, and one alpha for all."""
    name = "lora_unet_double_blocks_19_img_attn_qkv"
    tensors = {f"{name}.alpha": torch.tensor(4.0)}
    for place in range(3):
        tensors[f"{name}.lora_down.{place}.weight"] = torch.randn(2, 6)
        tensors[f"{name}.lora_up.{place}.weight"] = torch.randn(6, 2)
    read = read_adapter(file_of(tmp_path, tensors))
    assert read.rank == 2 and read.scale == 2
    for place, each in enumerate("qkv"):
        expected = 2 * tensors[f"{name}.lora_up.{place}.weight"] @ tensors[f"{name}.lora_down.{place}.weight"]
        torch.testing.assert_close(change_of(read, f"transformer_blocks.19.attn.to_{each}").delta(), expected)


@pytest.mark.parametrize("name", ["double_blocks.19.img_attn.qkv", "double_blocks.19.img_attn_qkv"])
def test_comfyuis_words_for_hunyuanvideo_are_read_beside_the_official_ones(name, tmp_path):
    tensors = halves(f"diffusion_model.{name}.lora_{{A,B}}.weight", DOWN, torch.randn(18, 2))
    tensors |= halves("diffusion_model.time_in.in_layer.lora_{A,B}.weight")
    tensors |= halves("diffusion_model.double_blocks.19.img_mlp.0.lora_{A,B}.weight")
    read = read_adapter(file_of(tmp_path, tensors))
    assert set(read.paths) == {
        *(f"transformer_blocks.19.attn.to_{each}" for each in "qkv"),
        "time_text_embed.timestep_embedder.linear_1",
        "transformer_blocks.19.ff.net.0.proj",
    }


def test_ranks_and_alphas_that_differ_among_layers_come_to_one_rank_and_scale(tmp_path):
    tensors = {}
    for name, rank, alpha in (("q", 4, 8.0), ("k", 2, 1.0), ("v", 3, 3.0)):
        base = f"lora_unet_blocks_0_self_attn_{name}"
        tensors |= {f"{base}.lora_down.weight": torch.randn(rank, 6), f"{base}.lora_up.weight": torch.randn(4, rank)}
        tensors[f"{base}.alpha"] = torch.tensor(alpha)
    path = file_of(tmp_path, tensors)
    read, told = read_adapter(path), describe(path)
    assert (read.rank, read.alpha) == (told.rank, told.alpha) == (4, 8.0)
    assert told.ranks == {2: 1, 3: 1, 4: 1} and told.scales == (0.5, 1.0, 2.0)
    for name, scale in (("q", 2.0), ("k", 0.5), ("v", 1.0)):
        base = f"lora_unet_blocks_0_self_attn_{name}"
        expected = scale * tensors[f"{base}.lora_up.weight"] @ tensors[f"{base}.lora_down.weight"]
        torch.testing.assert_close(change_of(read, f"blocks.0.attn1.to_{name}").delta(), expected)


def test_an_alpha_that_16_bits_would_round_widens_its_layer_alone(tmp_path):
    """Scale 1/3 among layers of scale 1: in bf16 the product would be off by 0.4 percent."""
    tensors = {}
    for name, alpha in (("k", 3.0), ("q", 1.0)):
        base = f"diffusion_model.blocks.0.self_attn.{name}"
        tensors |= {f"{base}.lora_A.weight": torch.randn(3, 6).bfloat16(), f"{base}.alpha": torch.tensor(alpha)}
        tensors[f"{base}.lora_B.weight"] = torch.randn(4, 3).bfloat16()
    read = read_adapter(file_of(tmp_path, tensors))
    assert {key: tensor.dtype for key, tensor in read.tensors.items()} == {
        **dict.fromkeys(read.tensors, torch.bfloat16),
        "blocks.0.attn1.to_q.lora_B.weight": torch.float32,
    }
    q = "diffusion_model.blocks.0.self_attn.q"
    exact = tensors[f"{q}.lora_B.weight"].double() @ tensors[f"{q}.lora_A.weight"].double() / 3
    torch.testing.assert_close(change_of(read, Q).delta().double(), exact, rtol=1e-6, atol=1e-6)


def test_a_dora_of_lycoris_is_read_by_rows_and_refused_by_columns(tmp_path):
    tensors = halves("diffusion_model.blocks.0.self_attn.q.lora_{A,B}.weight")
    scale = "diffusion_model.blocks.0.self_attn.q.dora_scale"
    lengths = torch.rand(4, 1)
    read = read_adapter(file_of(tmp_path, {**tensors, scale: lengths}))
    assert read.dora and torch.equal(read.tensors[f"{Q}.lora_magnitude_vector"], lengths.flatten())
    with pytest.raises(ModelError, match=r"dora_scale of 'blocks.0.self_attn.q' is \(1, 6\), lengths of columns"):
        read_adapter(file_of(tmp_path, {**tensors, scale: torch.rand(1, 6)}))


def test_a_lokr_of_whole_matrices_has_no_scale_whatever_its_alpha(tmp_path):
    """ai-toolkit leaves an alpha of 1e10 there, which no program applies."""
    base = "diffusion_model.blocks.0.self_attn.q"
    w1, w2 = torch.randn(2, 4), torch.randn(3, 5)
    tensors = {f"{base}.lokr_w1": w1, f"{base}.lokr_w2": w2, f"{base}.alpha": torch.tensor(1e10)}
    read = read_adapter(file_of(tmp_path, tensors))
    torch.testing.assert_close(change_of(read, Q).delta(), torch.kron(w1, w2))


def test_the_config_beside_diffusion_pipes_file_gives_its_scale(tmp_path):
    tensors = halves("diffusion_model.blocks.0.self_attn.q.lora_{A,B}.weight")
    file_of(tmp_path, tensors, "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    assert read_adapter(tmp_path).scale == 1 and sniff(tmp_path).format == "comfyui"
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 1}))
    assert read_adapter(tmp_path).scale == describe(tmp_path).scale == 0.5


def test_a_peft_folder_of_a_network_with_official_names_is_read(tmp_path):
    adapter = SavedAdapter({f"{Q_OFFICIAL}.lora_A.weight": DOWN, f"{Q_OFFICIAL}.lora_B.weight": UP}, 2, 1.0)
    FORMATS["peft"].write(tmp_path, adapter)
    assert read_adapter(tmp_path).paths == describe(tmp_path).targets == (Q,)


def test_of_a_file_for_both_experts_one_is_taken(tmp_path):
    """ai-toolkit can save the two in one file."""
    both = halves("diffusion_model.transformer_1.blocks.0.self_attn.q.lora_{A,B}.weight")
    both |= halves("diffusion_model.transformer_2.blocks.0.self_attn.q.lora_{A,B}.weight", DOWN, 2 * UP)
    path = file_of(tmp_path, both)
    with pytest.raises(ModelError, match=r"both experts of Wan 2.2"):
        read_adapter(path)
    low = read_adapter(path, "low")
    torch.testing.assert_close(change_of(low, Q).delta(), 2 * UP @ DOWN)
    assert low.metadata["weft.expert"] == describe(path, "low").expert == "low"
    only = file_of(
        tmp_path, halves("diffusion_model.transformer_1.blocks.0.self_attn.q.lora_{A,B}.weight"), "one.safetensors"
    )
    assert read_adapter(only).metadata["weft.expert"] == "high"
    with pytest.raises(ModelError, match="layers of the high-noise expert, and none of 'low'"):
        read_adapter(only, "low")


def test_a_folder_with_one_lora_of_any_name_will_do(tmp_path):
    file_of(tmp_path, halves("lora_unet_blocks_0_self_attn_q.lora_{down,up}.weight"), "my style v2.safetensors")
    assert read_adapter(tmp_path).paths == (Q,)
    file_of(tmp_path, {"x": torch.zeros(1)}, "other.safetensors")
    with pytest.raises(ModelError, match=r"or one LoRA file, found my style v2.safetensors, other.safetensors"):
        read_adapter(tmp_path)


REFUSED = {
    "text encoder": ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_{down,up}.weight", "layers of a text encoder"),
    "SDXL": ("lora_unet_down_blocks_1_attentions_0_proj_in.lora_{down,up}.weight", "Stable Diffusion 1, 2 or XL"),
    "SD 1.5 in diffusers": ("unet.down_blocks.1.attentions.0.proj_in.lora_{A,B}.weight", "Stable Diffusion 1, 2 or XL"),
    "Flux": ("lora_unet_double_blocks_0_img_attn_qkv.lora_{down,up}.weight", "seems to be an adapter of Flux"),
    "Flux in ComfyUI": ("diffusion_model.single_blocks.37.linear1.lora_{A,B}.weight", "seems to be an adapter of Flux"),
    "Qwen-Image": ("transformer.transformer_blocks.0.img_mlp.net.2.lora_{A,B}.weight", "Qwen-Image"),
    "LTX": ("transformer.transformer_blocks.0.attn1.to_q.lora_{A,B}.weight", "LTX-Video or CogVideoX"),
    "Z-Image": ("diffusion_model.layers.0.attention.to_q.lora_{A,B}.weight", "Z-Image or Lumina"),
    "HunyuanVideo 1.5": ("lora_unet_double_blocks_0_img_attn_q.lora_{down,up}.weight", "HunyuanVideo 1.5"),
    "a language model": ("model.layers.0.self_attn.q_proj.lora_{A,B}.weight", "without its adapter_config.json"),
    "nobody": ("lora_unet_wings_0_feather.lora_{down,up}.weight", "does not know: 'lora_unet_wings_0"),
    "a bias": ("diffusion_model.blocks.0.self_attn.q.lora_{A,B}.bias", "no adapter but the weights of a model"),
}  # fmt: skip


@pytest.mark.parametrize(("pattern", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_an_adapter_of_another_model_is_named(pattern, words, tmp_path):
    path = file_of(tmp_path, halves(pattern))
    with pytest.raises(ModelError, match=words):
        read_adapter(path)
    with pytest.raises(ModelError, match=words):
        describe(path)


BASE = "diffusion_model.blocks.0"
ODD = {
    "unknown module": (
        {f"{BASE}.self_attn.qq.lora_A.weight": DOWN},
        r"nearest of its modules is 'blocks\.0\.self_attn\.",
    ),
    "whole biases": ({f"{BASE}.self_attn.q.diff_b": UP}, "1 tensors that are no LoRA weights.*whole changes"),
    "locon": ({f"{BASE}.self_attn.q.lora_mid.weight": UP}, "no LoRA weights, first .*lora_mid"),
    "half": ({f"{BASE}.self_attn.k.lora_A.weight": DOWN}, r"incomplete: .*self_attn.k' has no 'lora_B\.weight'"),
    "two kinds": ({f"{BASE}.self_attn.k.hada_w1_a": UP}, "mixes kinds of adapters"),
    "two names": (halves(f"{BASE}.attn1.to_q.lora_{{A,B}}.weight"), "changed twice, by layers under two of its names"),
    "two spellings": (halves(f"{BASE}.self_attn.q.lora_{{down,up}}.weight"), "two layers on one module"),
    "two adapters": (
        halves(f"{BASE}.ffn.0.lora_{{A,B}}.a.weight") | halves(f"{BASE}.ffn.2.lora_{{A,B}}.b.weight"),
        "several adapters: a, b",
    ),
}


@pytest.mark.parametrize(("more", "words"), ODD.values(), ids=ODD.keys())
def test_what_is_odd_in_a_file_is_named(more, words, tmp_path):
    tensors = halves("diffusion_model.blocks.0.self_attn.q.lora_{A,B}.weight") | more
    with pytest.raises(ModelError, match=words):
        read_adapter(file_of(tmp_path, tensors))


def test_a_language_models_adapter_is_refused_by_the_formats_for_video(tmp_path):
    name = "model.layers.0.self_attn.q_proj"
    adapter = SavedAdapter({f"{name}.lora_A.weight": DOWN, f"{name}.lora_B.weight": UP}, 2, 2.0)
    for style in ("diffusers", "comfyui", "musubi", "videox-fun", "original"):
        with pytest.raises(ModelError, match=f"the {style} format is for video .*; write --to peft"):
            FORMATS[style].write(tmp_path, adapter)


def test_headers_keep_what_they_said_and_lose_what_no_longer_holds(tmp_path):
    stale = {"sshs_model_hash": "old", "sshs_legacy_hash": "old", "lora_adapter_metadata": "{}", "ss_seed": "42"}
    path = file_of(tmp_path, halves("lora_unet_blocks_0_self_attn_q.lora_{down,up}.weight"), **stale, author="me")
    for style in FORMATS:
        written = FORMATS[style].write(tmp_path / style, read_adapter(path))
        weights = written if written.is_file() else written / "adapter_model.safetensors"
        header = read_header(weights)
        assert header.metadata["ss_seed"] == "42" and header.metadata["author"] == "me"
        assert header.metadata.get("sshs_model_hash") != "old" and header.metadata.get("sshs_legacy_hash") != "old"
        assert ("lora_adapter_metadata" in header.metadata) == (style == "diffusers")
    names = json.loads(read_header(tmp_path / "musubi" / "lora_musubi.safetensors").metadata["weft.names"])
    assert names == {"blocks_0_self_attn_q": Q_OFFICIAL}


def test_a_target_is_a_folder_or_a_file_of_any_name(tmp_path):
    adapter = SavedAdapter({f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": UP}, 2, 2.0)
    for style, shape in FORMATS.items():
        assert shape.file is None or shape.write(tmp_path / style, adapter) == tmp_path / style / shape.file
        target = tmp_path / f"{style}.safetensors"
        if shape.file is None:
            with pytest.raises(ModelError, match="a folder of two files"):
                shape.write(target, adapter)
        else:
            assert shape.write(target, adapter) == target and shape.read(target).paths == (Q,)
    with pytest.raises(ModelError, match="a musubi adapter, not one in comfyui format"):
        FORMATS["comfyui"].read(tmp_path / "musubi")


def test_a_cast_keeps_the_facts_and_refuses_what_it_cannot_hold():
    adapter = SavedAdapter({f"{Q}.lora_A.weight": 1e5 * DOWN, f"{Q}.lora_B.weight": UP}, 2, 2.0)
    assert {tensor.dtype for tensor in cast(adapter, "bf16").tensors.values()} == {torch.bfloat16}
    with pytest.raises(ModelError, match="beyond the largest number of fp16"):
        cast(adapter, "fp16")
    with pytest.raises(ConfigError, match=r"'bf61'\. Did you mean 'bf16'"):
        cast(adapter, "bf61")


def test_a_file_is_described_without_torch(tmp_path):
    path = file_of(tmp_path, halves("lora_unet_blocks_0_self_attn_q.lora_{down,up}.weight"))
    told = f"from pathlib import Path; from weft.formats.describe import describe; describe(Path({str(path)!r}))"
    code = f"import sys; {told}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_alphas_of_all_dtypes_are_read_from_their_bytes(tmp_path):
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64):
        tensors = halves("lora_unet_blocks_0_self_attn_q.lora_{down,up}.weight")
        path = file_of(tmp_path, {**tensors, "lora_unet_blocks_0_self_attn_q.alpha": torch.tensor(3, dtype=dtype)})
        assert describe(path).alpha == read_foreign(path).alpha == 3


def test_a_lokr_of_a_fused_layer_is_refused_by_the_layers_that_it_fuses(tmp_path):
    base = "lora_unet_double_blocks_19_img_attn_qkv"
    tensors = {f"{base}.lokr_w1": torch.randn(4, 4), f"{base}.lokr_w2": torch.randn(3, 2)}
    with pytest.raises(
        ModelError, match=r"attn\.to_q, .*attn\.to_k, .*in one, and a LoKr of all of it cannot be divided"
    ):
        read_adapter(file_of(tmp_path, tensors))


def test_diffusers_header_gives_the_scale_of_each_expert_in_a_file_of_both(tmp_path):
    both = halves("transformer.blocks.0.attn1.to_q.lora_{A,B}.weight")
    both |= halves("transformer_2.blocks.0.attn1.to_q.lora_{A,B}.weight", DOWN, 2 * UP)
    said = {"transformer.r": 2, "transformer.lora_alpha": 2, "transformer_2.r": 2, "transformer_2.lora_alpha": 1}
    path = file_of(tmp_path, both, lora_adapter_metadata=json.dumps(said))
    torch.testing.assert_close(change_of(read_adapter(path, "high"), Q).delta(), UP @ DOWN)
    torch.testing.assert_close(change_of(read_adapter(path, "low"), Q).delta(), UP @ DOWN)
