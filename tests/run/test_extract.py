"""weft extract: what a tuned model changes of its base, found again as an adapter."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from tests.families import networks, official
from tests.small import make_wan
from tests.small_text import make_qwen3
from weft.cli.main import main
from weft.errors import ConfigError, ModelError
from weft.families.loading import sampled_digest
from weft.formats.adapter_file import A, B, SavedAdapter
from weft.formats.reading import read_adapter
from weft.math.low_rank_of import energy_of
from weft.run.apply import Found, attached
from weft.run.base_weights import open_weights
from weft.run.changes import change_of, difference
from weft.run.extract import Rule
from weft.run.extracting import Pair, extracted, open_pair

HERE = torch.device("cpu")
State = Mapping[str, Tensor]
WAN_PATHS = ("blocks.0.attn1.to_q", "blocks.1.attn2.to_out.0", "blocks.1.ffn.net.0.proj")
HUNYUAN_PATHS = (
    "transformer_blocks.0.attn.to_k", "transformer_blocks.1.attn.add_v_proj", "transformer_blocks.0.ff_context.net.2",
    "single_transformer_blocks.0.attn.to_v", "single_transformer_blocks.1.proj_mlp",
    "single_transformer_blocks.1.proj_out",
)  # fmt: skip
TEXT_PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj")


def adapter(state: State, paths: tuple[str, ...], rank: int = 3, size: float = 0.02) -> SavedAdapter:
    """A random LoRA of scale 1 on layers of a network."""
    chance = torch.Generator().manual_seed(7)
    tensors = {}
    for path in paths:
        out, inner = state[f"{path}.weight"].shape
        tensors[path + A] = torch.randn(rank, inner, generator=chance) * size
        tensors[path + B] = torch.randn(out, rank, generator=chance)
    return SavedAdapter(tensors, rank, float(rank))


def merged(state: State, lora: SavedAdapter) -> dict[str, Tensor]:
    """The weights with the change added, in fp32."""
    out = {name: tensor.clone() for name, tensor in state.items()}
    for path in lora.paths:
        out[f"{path}.weight"] += change_of(lora, path).delta()
    return out


def saved(file: Path, state: State, prefix: str = "", dtype: torch.dtype | None = None) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({prefix + name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in state.items()}, file)
    return str(file)


def pair_of(tmp_path: Path, base: State, tuned: State, **options: Any) -> Pair:
    return open_pair(
        saved(tmp_path / "base.safetensors", base), saved(tmp_path / "tuned.safetensors", tuned), **options
    )


def state_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in network.state_dict().items()}


@pytest.fixture(scope="module")
def wan() -> dict[str, Tensor]:
    return state_of(networks.wan())


# ---- The change comes back --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_merged_lora_of_wan_comes_back_from_files_that_name_layers_otherwise(wan, prefix, tmp_path):
    """The base in diffusers' folder, the tuned one in a single file with the makers' names."""
    lora = adapter(wan, WAN_PATHS)
    networks.wan().save_pretrained(tmp_path / "base" / "transformer")
    tuned = saved(tmp_path / "tuned.safetensors", official.wan_transformer(merged(wan, lora)), prefix)
    made = extracted(open_pair(str(tmp_path / "base"), tuned), Rule(3), HERE)
    assert set(made.adapter.paths) == set(WAN_PATHS)
    assert made.captured == pytest.approx(1, abs=1e-9)
    for path in WAN_PATHS:
        assert difference(change_of(lora, path), change_of(made.adapter, path)) < 1e-5


def test_a_merged_lora_of_hunyuan_video_comes_back_from_fused_layers(tmp_path):
    state = state_of(networks.hunyuan())
    lora = adapter(state, HUNYUAN_PATHS)
    base = saved(tmp_path / "base.safetensors", official.hunyuan_transformer(state))
    networks.randomized(network := networks.hunyuan()).load_state_dict(merged(state, lora))
    network.save_pretrained(tmp_path / "tuned" / "transformer")
    made = extracted(open_pair(base, str(tmp_path / "tuned")), Rule(3), HERE)
    assert set(made.adapter.paths) == set(HUNYUAN_PATHS)
    for path in HUNYUAN_PATHS:
        assert difference(change_of(lora, path), change_of(made.adapter, path)) < 1e-5


@pytest.mark.parametrize("whole", [True, False], ids=["folder", "file"])
def test_a_merged_lora_of_a_language_model_comes_back(whole, tmp_path):
    base = make_qwen3(tmp_path / "base")
    network = AutoModelForCausalLM.from_pretrained(base)
    lora = adapter(state_of(network), TEXT_PATHS)
    network.load_state_dict(merged(state_of(network), lora))
    network.save_pretrained(tmp_path / "tuned")
    places = [folder if whole else folder / "model.safetensors" for folder in (base, tmp_path / "tuned")]
    made = extracted(open_pair(str(places[0]), str(places[1])), Rule(3), HERE)
    assert set(made.adapter.paths) == set(TEXT_PATHS)
    assert not made.left_out
    for path in TEXT_PATHS:
        assert difference(change_of(lora, path), change_of(made.adapter, path)) < 1e-5


def test_of_a_tuned_model_in_bf16_no_more_is_lost_than_twice_what_rounding_took(wan, tmp_path):
    """The nearest of a rank is no farther from lora + noise than the lora is: so by the triangle no farther than
    2 ||noise|| from the lora."""
    lora = adapter(wan, WAN_PATHS)
    tuned = merged(wan, lora)
    rounded = saved(tmp_path / "tuned.safetensors", tuned, dtype=torch.bfloat16)
    made = extracted(open_pair(saved(tmp_path / "base.safetensors", wan), rounded), Rule(3), HERE)
    for path in WAN_PATHS:
        weight = tuned[f"{path}.weight"]
        noise = float((weight.bfloat16().float() - weight).norm())
        off = change_of(made.adapter, path).delta() - change_of(lora, path).delta()
        assert 0 < float(off.norm()) <= 2 * noise
        assert not made.layers[path].rounded
        assert made.layers[path].rounding == pytest.approx(noise**2, rel=0.05)


def test_the_adapter_on_the_base_answers_as_the_tuned_network(wan, tmp_path):
    lora = adapter(wan, WAN_PATHS)
    tuned = networks.wan()
    tuned.load_state_dict(merged(wan, lora))
    made = extracted(pair_of(tmp_path, wan, official.wan_transformer(state_of(tuned))), Rule(4), HERE)
    base = networks.wan()
    question = networks.wan_inputs(base)
    before = base(**question)[0]
    adapters = attached([Found(tmp_path, made.adapter, "default")], base)
    assert not torch.allclose(before, tuned(**question)[0], atol=1e-3)
    with adapters.use("default"):
        assert_close(base(**question)[0], tuned(**question)[0], rtol=1e-4, atol=1e-5)


def test_the_experts_of_wan_are_told_apart(tmp_path):
    base = make_wan(tmp_path / "base", kind="experts")
    tuned = make_wan(tmp_path / "tuned", kind="experts")
    paths = {"high": ("transformer", "blocks.0.attn1.to_q"), "low": ("transformer_2", "blocks.1.attn2.to_k")}
    for part, path in paths.values():
        file = tuned / part / "diffusion_pytorch_model.safetensors"
        state = load_file(file)
        save_file(merged(state, adapter(state, (path,))), file, {"format": "pt"})
    for expert, (_, path) in paths.items():
        made = extracted(open_pair(str(base), str(tuned), expert), Rule(3), HERE)
        assert made.adapter.paths == (path,)
        assert made.adapter.metadata["weft.expert"] == expert
    with pytest.raises(ConfigError, match=r"has two networks\. Say which is meant: high or low"):
        open_pair(str(base), str(tuned))


# ---- What is held, and what is not ------------------------------------------------------------------------------


def test_energy_gives_each_layer_the_rank_that_it_needs(wan, tmp_path):
    """Layers changed by ranks 1 and 5 of equal directions: 0.7 of the second takes 4 of them."""
    tuned = {name: tensor.clone() for name, tensor in wan.items()}
    basis = torch.linalg.qr(torch.randn(128, 10, generator=torch.Generator().manual_seed(1)))[0]
    tuned["blocks.0.attn1.to_q.weight"] += basis[:, :1] @ basis[:, 1:2].mT
    tuned["blocks.1.attn1.to_k.weight"] += basis[:, :5] @ basis[:, 5:].mT
    made = extracted(pair_of(tmp_path, wan, tuned), Rule(16, share=0.7), HERE)
    assert {path: layer.rank for path, layer in made.layers.items()} == {
        "blocks.0.attn1.to_q": 1, "blocks.1.attn1.to_k": 4,
    }  # fmt: skip
    assert made.captured == pytest.approx((1 + 4) / (1 + 5), abs=1e-5)
    assert made.adapter.rank == made.adapter.alpha == 4
    first = made.adapter.tensors["blocks.0.attn1.to_q" + A]
    assert first.shape == (4, 128) and not first[1:].any() and first[0].any()


def test_what_no_layer_holds_is_said_by_kind_with_its_size(wan, tmp_path):
    tuned = merged(wan, adapter(wan, WAN_PATHS[:1]))
    changes = {
        "biases": "blocks.0.attn1.to_q.bias", "norms": "blocks.1.attn1.norm_q.weight",
        "modulation tables": "blocks.0.scale_shift_table", "convolutions": "patch_embedding.weight",
        "linear layers outside --targets": "proj_out.weight",
    }  # fmt: skip
    for number, name in enumerate(changes.values(), 1):
        tuned[name] = tuned[name] + number
    made = extracted(pair_of(tmp_path, wan, tuned), Rule(3), HERE)
    assert {kind: of.names for kind, of in made.left_out.items()} == {kind: [name] for kind, name in changes.items()}
    for number, (kind, name) in enumerate(changes.items(), 1):
        assert made.left_out[kind].energy == pytest.approx(number**2 * wan[name].numel(), rel=1e-5)
        assert made.left_out[kind].before == pytest.approx(energy_of(wan[name]))
    assert len(made.unchanged) == 2 * 10 - 1
    held = energy_of(tuned[WAN_PATHS[0] + ".weight"] - wan[WAN_PATHS[0] + ".weight"])
    whole = held + sum(of.energy for of in made.left_out.values())
    assert made.captured_of_all == pytest.approx(held / whole, rel=1e-5)


def test_a_difference_by_rounding_alone_is_called_that(wan, tmp_path):
    """Rounded up or down by chance, which the nearest number of 16 bits does not undo."""
    chance, tuned = torch.Generator().manual_seed(2), {}
    for name, tensor in wan.items():
        low = torch.randint(1 << 16, tensor.shape, generator=chance, dtype=torch.int32)
        tuned[name] = (((tensor.view(torch.int32) + low) >> 16) << 16).view(torch.float32).bfloat16()
    made = extracted(pair_of(tmp_path, wan, tuned, targets=["ffn"]), Rule(2), HERE)
    assert len(made.layers) == 4 and all(layer.rounded for layer in made.layers.values())


def test_a_cast_of_the_base_differs_by_nothing(wan, tmp_path):
    cast = {name: tensor.bfloat16() for name, tensor in wan.items()}
    with pytest.raises(ModelError, match="hold the same weights, but for rounding: there is nothing to extract"):
        extracted(pair_of(tmp_path, wan, cast), Rule(2), HERE)


# ---- What is refused --------------------------------------------------------------------------------------------


def test_a_difference_elsewhere_alone_is_refused_with_its_place(wan, tmp_path):
    tuned = {**wan, "blocks.0.attn1.to_q.bias": wan["blocks.0.attn1.to_q.bias"] + 1}
    with pytest.raises(ModelError, match=r"no target layer differs .*: biases \(1\), such as 'blocks.0"):
        extracted(pair_of(tmp_path, wan, tuned), Rule(2), HERE)


def test_a_model_of_another_size_is_refused_with_the_first_shape(wan, tmp_path):
    other = state_of(networks.wan(ffn_dim=256))
    with pytest.raises(ModelError, match=r"other sizes: 'blocks.0.ffn.net.0.proj.bias' is \(192,\) .* and \(256,\) in"):
        extracted(pair_of(tmp_path, wan, other), Rule(2), HERE)


def test_a_model_of_fewer_layers_is_refused(wan, tmp_path):
    with pytest.raises(ModelError, match=r"lacks 10 of the 20 target layers, first 'blocks.1.attn1.to_"):
        extracted(pair_of(tmp_path, wan, state_of(networks.wan(layers=1))), Rule(2), HERE)


def test_models_of_two_families_are_refused(wan, tmp_path):
    with pytest.raises(ModelError, match=r"is a wan network and .* a hunyuan-video one"):
        extracted(pair_of(tmp_path, wan, state_of(networks.hunyuan())), Rule(2), HERE)


def test_weights_that_are_no_numbers_are_refused_by_name(wan, tmp_path):
    tuned = {**wan, "blocks.0.attn1.to_k.weight": wan["blocks.0.attn1.to_k.weight"] / 0}
    with pytest.raises(ModelError, match=r"'blocks.0.attn1.to_k.weight' holds inf or nan"):
        extracted(pair_of(tmp_path, wan, tuned), Rule(2), HERE)


def test_an_adapter_is_no_tuned_model(wan, tmp_path):
    lora = saved(tmp_path / "lora.safetensors", {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 4)})
    with pytest.raises(ModelError, match="holds an adapter"):
        open_pair(saved(tmp_path / "base.safetensors", wan), lora)


def in_8_bits(state: State, scale: float | None) -> dict[str, Tensor]:
    """The linear layers of blocks in fp8, with one scale for each, or none."""
    out = dict(state)
    for name, tensor in state.items():
        if name.startswith("blocks") and name.endswith(".weight") and tensor.dim() == 2:
            out[name] = (tensor / (scale or 1)).to(torch.float8_e4m3fn)
            if scale:
                out[name.replace(".weight", ".scale_weight")] = torch.tensor(scale)
    return out


def test_fp8_is_refused_of_a_tuned_model_without_scales_and_warned_of_elsewhere(wan, tmp_path):
    bare, with_scales = in_8_bits(wan, None), in_8_bits(wan, 2**-9)
    with pytest.raises(ModelError, match=r"tuned\.safetensors is in fp8 without scales"):
        pair_of(tmp_path, wan, bare)
    assert "base.safetensors is in fp8" in pair_of(tmp_path, bare, wan).warnings[0]
    assert "tuned.safetensors is in fp8 scaled" in pair_of(tmp_path, wan, with_scales).warnings[0]


def test_weights_in_8_bits_are_decoded_by_their_scales(wan, tmp_path):
    """What is extracted is the difference to the decoded numbers."""
    lora = adapter(wan, WAN_PATHS[:1], size=1.0)
    coded = in_8_bits(wan, 2**-9)
    decoded = {n: t.float() * 2**-9 if t.dtype == torch.float8_e4m3fn else t for n, t in coded.items()}
    tuned = merged({name: decoded[name] for name in wan}, lora)
    made = extracted(pair_of(tmp_path, coded, tuned), Rule(3), HERE)
    assert made.adapter.paths == WAN_PATHS[:1]
    assert difference(change_of(lora, WAN_PATHS[0]), change_of(made.adapter, WAN_PATHS[0])) < 1e-5


def test_a_file_that_names_the_other_expert_is_refused(wan, tmp_path):
    low = saved(tmp_path / "wan2.2_t2v_low_noise.safetensors", wan)
    assert open_weights(low, "low").expert == "low"
    with pytest.raises(ConfigError, match="calls itself the expert for low noise"):
        open_weights(low, "high")


# ---- The verb ---------------------------------------------------------------------------------------------------


@pytest.fixture
def files(wan, tmp_path) -> list[str]:
    tuned = merged(wan, adapter(wan, WAN_PATHS))
    return [saved(tmp_path / "base.safetensors", wan), saved(tmp_path / "tuned.safetensors", tuned)]


def test_the_verb_writes_adapters_that_say_what_they_were_made_of(files, tmp_path, capsys):
    out = tmp_path / "adapter"
    asked = ["extract", *files, "--out", str(out), "--energy", "0.99", "--format", "peft", "diffusers"]
    assert main(asked) == 0
    told = capsys.readouterr().out
    assert "ranks" in told or "rank 3 on 3 layers" in told
    assert "left out: 17 target layers that are the same" in told
    for file in (out, out / "pytorch_lora_weights.safetensors"):
        about = read_adapter(file).metadata
        facts = json.loads(about["weft.extracted"])
        assert facts["rank"] == {"energy": 0.99, "most": 128} and facts["layers"] == 3
        assert about["weft.base"] == facts["base"]["identity"] == digest_of(Path(files[0]))
        assert (about["base_model"], facts["tuned"]["path"], about["weft.family"]) == (files[0], files[1], "wan")
        assert facts["captured"] > 0.99


def digest_of(path: Path) -> str:
    """A single file's identity as a run on it writes it."""
    from hashlib import sha256

    digest = sha256()
    sampled_digest(digest, f"transformer/{path.name}", path)
    return digest.hexdigest()[:32]


def test_what_is_there_stays_unless_it_may_be_replaced(files, tmp_path, capsys):
    out = ["--out", str(tmp_path / "adapter")]
    assert main(["extract", *files, *out]) == 0
    assert main(["extract", *files, *out]) == 2
    assert "is there already. Name another place, or write --overwrite" in capsys.readouterr().err
    assert main(["extract", *files, *out, "--overwrite", "--rank", "2"]) == 0
    assert read_adapter(tmp_path / "adapter").rank == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert main(["extract", *files, "--out", str(tmp_path / "mine"), "--overwrite"]) == 2
    assert (tmp_path / "mine" / "letter.txt").exists()
    (tmp_path / "mine" / "letter.txt").rename(tmp_path / "adapter" / "letter.txt")
    assert main(["extract", *files, *out, "--overwrite"]) == 2 and "such as letter.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--max-rank", "8"], "--max-rank: goes with --energy alone"),
        (["--energy", "98"], "--energy: expected a share above 0 and at most 1, such as 0.98, got 98"),
        (["--rank", "0"], "--rank: expected a whole number of at least 1, got 0"),
        (["--device", "tpu"], "--device: expected cpu, cuda or cuda:1, got 'tpu'"),
        (["--device", "cuda:97"], "--device: there is no cuda:97 here"),
        (
            ["--targets", "atention"],
            "--targets: 'atention' matches no linear layer of this network. Nearest",
        ),
        (["--format", "pef"], "no format is called 'pef'. Did you mean 'peft'?"),
        (["--expert", "high", "--targets", "attn1", "--rank", "-1"], "--rank"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_a_line(files, options, told, tmp_path, capsys):
    assert main(["extract", *files, "--out", str(tmp_path / "out"), *options]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
