"""What HunyuanVideo is asked: diffusers' own network at 1000 t and 1000 times the guidance, under the text's mask."""

import json
import shutil
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoTransformer3DModel
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import retrieve_timesteps
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.testing import assert_close

from weft.adapters.lora import Lora
from weft.adapters.modules import linears_of
from weft.contracts import DEFAULT, Denoise, Model
from weft.engines.torch_engine import Torch
from weft.errors import ConfigError, ModelError
from weft.families.hunyuan_video import HunyuanVideo
from weft.families.weights import HERE

RANK = 4
T = torch.tensor([0.8333, 0.02])
LENGTHS = (3, 7)


@pytest.fixture
def family(hunyuan_folder) -> HunyuanVideo:
    return HunyuanVideo(source=str(hunyuan_folder))


@pytest.fixture
def plain(hunyuan_folder) -> HunyuanVideoTransformer3DModel:
    return HunyuanVideoTransformer3DModel.from_pretrained(hunyuan_folder / "transformer").requires_grad_(False)


@pytest.fixture
def question() -> Denoise:
    """Two items with texts of 3 and 7 tokens."""
    chance = torch.Generator().manual_seed(0)
    text, mask = torch.randn(2, 7, 32, generator=chance), torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    told = {"text": text * mask[..., None], "text_mask": mask, "pooled": torch.randn(2, 20, generator=chance)}
    return Denoise(torch.randn(2, 16, 3, 4, 6, generator=chance), T, told)


def asked_plainly(network: Any, question: Denoise, item: int, guidance: float = 1.0) -> Tensor:
    """One item in diffusers' own words, its text without padding."""
    part, length = slice(item, item + 1), LENGTHS[item]
    return network(
        question.x[part], 1000 * question.t[part], question.cond["text"][part, :length],
        torch.ones(1, length, dtype=torch.bool), question.cond["pooled"][part], torch.tensor([1000 * guidance]),
        return_dict=False,
    )[0]  # fmt: skip


@torch.no_grad()
def test_a_batch_with_ragged_texts_is_answered_as_diffusers_answers_each_item_alone(family, plain, question):
    ours = family.forward(family.load("fp32", "default", HERE), question)
    for i in range(2):
        assert_close(ours[i : i + 1], asked_plainly(plain, question, i), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_lies_behind_the_text_does_not_matter(family, question):
    network = family.load("fp32", "default", HERE)
    noise = torch.randn(2, 7, 32) * ~question.cond["text_mask"][..., None]
    padded = replace(question, cond={**question.cond, "text": question.cond["text"] + noise})
    assert_close(family.forward(network, question), family.forward(network, padded), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_guidance_is_the_sections_unless_the_question_tells_its_own_for_each_item(family, plain, question):
    network = family.load("fp32", "default", HERE)
    six = HunyuanVideo(source=family.source, guidance=6.0).forward(network, question)
    own = replace(question, cond={**question.cond, "guidance": torch.tensor([6.0, 1.0])})
    mixed = family.forward(network, own)
    for i, guidance in enumerate((6.0, 1.0)):
        assert_close(six[i : i + 1], asked_plainly(plain, question, i, 6.0), rtol=1e-4, atol=1e-5)
        assert_close(mixed[i : i + 1], asked_plainly(plain, question, i, guidance), rtol=1e-4, atol=1e-5)
    assert family.embeds_guidance and (six[1] - mixed[1]).abs().max() > 1e-4


@pytest.mark.parametrize("backend", ["native", "peft"])
def test_velocity_and_gradients_are_those_of_diffusers_and_peft(family, plain, question, backend):
    theirs: Any = inject_adapter_in_model(
        LoraConfig(r=RANK, lora_alpha=RANK, target_modules=family.targets["attention+ffn"]), plain
    )
    chance = torch.Generator().manual_seed(0)
    taught = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for parameter in taught.values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=chance))
    expected = torch.cat([asked_plainly(theirs, question, i) for i in range(2)])
    expected.square().sum().backward()

    recipe = Lora(rank=RANK, alpha=RANK, backend=backend, targets="attention+ffn")
    network = family.load("fp32", DEFAULT.name, HERE)
    paths = recipe.match(linears_of(network), family.targets, family.aliases).paths
    adapters = recipe.attach(network, paths, (DEFAULT.name,), 0)
    adapters.load_state_dict(DEFAULT.name, {name: parameter.detach() for name, parameter in taught.items()})
    with adapters.use(DEFAULT.name):
        ours = Model(network, family, adapters).velocity(question)
        ours.square().sum().backward()
    assert_close(ours.detach(), expected.detach(), rtol=1e-4, atol=1e-5)
    found = adapters.parameters(DEFAULT.name)
    assert found.keys() == taught.keys()
    for name, parameter in found.items():
        gradient = taught[name].grad
        assert gradient is not None
        assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-7, msg=name)


@pytest.mark.parametrize(
    ("targets", "in_double", "in_single"), [("attention", 8, 3), ("attention+ffn", 12, 5), ("all-linear", 14, 6)]
)
def test_sets_hold_the_layers_of_blocks_and_neither_the_text_refiner_nor_the_last_projection(
    family, targets, in_double, in_single
):
    paths = Lora(rank=RANK, targets=targets).match(linears_of(family.skeleton()), family.targets, family.aliases).paths
    assert len(paths) == 2 * in_double + 2 * in_single
    assert all(path.startswith(("transformer_blocks.", "single_transformer_blocks.")) for path in paths)


def test_official_names_find_the_same_layers_fused_ones_several(family):
    layers = linears_of(family.skeleton())

    def found(*names: str) -> tuple[str, ...]:
        return Lora(rank=RANK, targets=names).match(layers, family.targets, family.aliases).paths

    double = ["img_attn_qkv", "img_attn_proj", "txt_attn_qkv", "txt_attn_proj"]
    ffn = ["img_mlp.fc1", "img_mlp.fc2", "txt_mlp.fc1", "txt_mlp.fc2"]
    assert found(*double, *ffn, "linear1", "linear2") == found("attention+ffn")
    assert found(*double, *ffn, "linear1", "linear2", "img_mod.linear", "txt_mod.linear", "modulation.linear") == found(
        "all-linear"
    )
    assert found("img_attn.qkv", "img_mlp.0") == found("img_attn_qkv", "img_mlp.fc1")  # ComfyUI's
    assert found("double_blocks.1.img_attn_qkv") == tuple(f"transformer_blocks.1.attn.to_{n}" for n in "qkv")
    assert found("single_blocks.0.linear2") == ("single_transformer_blocks.0.proj_out",)
    with pytest.raises(ConfigError):
        found("double_blocks.7.img_attn_qkv")


def test_the_model_runs_at_24_frames_a_second_and_129_frames_of_720p_are_118800_tokens(family):
    geometry = family.geometry()
    assert (geometry.fps, geometry.side_multiple) == (24, 16)
    assert geometry.tokens(129, 720, 1280) == 33 * 45 * 80 == 118_800
    assert family.image == "none" and family.experts == (DEFAULT,)


def test_image_to_video_is_refused(hunyuan_folder, tmp_path):
    shutil.copytree(hunyuan_folder / "transformer", tmp_path / "transformer")
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"image_condition_type": "token_replace"}))
    with pytest.raises(ModelError, match="an image-to-video HunyuanVideo"):
        HunyuanVideo(source=str(tmp_path)).skeleton()


def test_blocks_are_the_double_ones_then_the_single_ones(family):
    network = family.skeleton()
    assert list(family.blocks(network)) == [*network.transformer_blocks, *network.single_transformer_blocks]
    assert sorted(n for n in family.weight_bytes("fp32") if n is not None) == [0, 1, 2, 3]


def test_the_sampler_is_the_sources_at_its_shift_or_at_the_one_that_is_asked_for(family):
    assert family.scheduler().config.shift == 7.0
    assert HunyuanVideo(source=family.source, shift=5.0).scheduler().config.shift == 5.0


def test_samples_are_taken_at_the_times_of_diffusers_pipeline(family, hunyuan_folder):
    theirs = FlowMatchEulerDiscreteScheduler.from_pretrained(hunyuan_folder / "scheduler")
    ours = family.sampler(4, torch.device("cpu"))
    retrieve_timesteps(theirs, 4, "cpu", sigmas=numpy.linspace(1.0, 0.0, 5)[:-1])
    assert_close(ours.timesteps, theirs.timesteps)
    assert_close(ours.sigmas, theirs.sigmas)
    assert_close(ours.sigmas, torch.tensor([1, 21 / 22, 7 / 8, 7 / 10, 0]))  # 7 s / (1 + 6 s) at 1, 3/4, 1/2, 1/4


def test_recomputed_blocks_give_the_same_gradients(family, question):
    def learned(recompute: bool) -> dict[str, Tensor]:
        engine = Torch(device="cpu", precision="fp32", recompute=recompute).open()
        network = family.load("fp32", DEFAULT.name, HERE)
        recipe = Lora(rank=RANK, backend="native", targets="attention")
        paths = recipe.match(linears_of(network), family.targets, family.aliases).paths
        adapters = recipe.attach(network, paths, (DEFAULT.name,), 0)
        adapters.initialize()
        chance = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in adapters.parameters(DEFAULT.name).values():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=chance))
        network = engine.place(network, family.blocks(network)).train()
        with adapters.use(DEFAULT.name), engine.computing():
            Model(network, family, adapters).velocity(question).square().sum().backward()
        return {name: p.grad for name, p in adapters.parameters(DEFAULT.name).items() if p.grad is not None}

    kept, recomputed = learned(False), learned(True)
    assert kept.keys() == recomputed.keys() and len(kept) == 2 * (2 * 8 + 2 * 3)
    for name, gradient in kept.items():
        assert torch.equal(gradient, recomputed[name]), name


@torch.no_grad()
def test_a_residual_beyond_fp16_stays_finite_and_equals_fp32(tmp_path, hunyuan_folder, plain, question):
    """Two summands of 40,000: fp16 ends at 65,504."""
    channels = torch.linspace(-40_000, 40_000, 24)
    plain.x_embedder.proj.bias.copy_(channels)
    plain.x_embedder.proj.weight.mul_(5_000)
    block = plain.transformer_blocks[0]
    block.ff.net[2].bias.copy_(channels)
    block.norm1.linear.weight.zero_()
    block.norm1.linear.bias.copy_(torch.cat([torch.zeros(5 * 24), torch.ones(24)]))  # the gate of the ffn is 1
    made = tmp_path / "hunyuan"
    made.mkdir()
    for part in hunyuan_folder.iterdir():
        (made / part.name).symlink_to(part)
    (made / "transformer").unlink()
    plain.save_pretrained(made / "transformer")

    family = HunyuanVideo(source=str(made))
    exact = family.forward(family.load("fp32", "default", HERE), question)
    with torch.autocast("cpu", torch.float16):
        ours = family.forward(family.load("fp16", "default", HERE), question).float()
        theirs = family.forward(HunyuanVideoTransformer3DModel.from_pretrained(made / "transformer"), question)
    assert ours.isfinite().all() and not theirs.isfinite().all()
    assert_close(ours, exact, rtol=0, atol=0.01 * float(exact.abs().max()))


@torch.no_grad()
def test_times_and_guidance_stay_fp32_under_bf16(family, plain, question):
    network = family.load("bf16", "default", HERE)
    seen = []
    network.time_text_embed.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    with torch.autocast("cpu", torch.bfloat16):
        family.forward(network, question)
    exact, _ = plain.time_text_embed(1000 * T, question.cond["pooled"], torch.tensor([1000.0, 1000.0]))
    assert seen[0].dtype == torch.float32
    assert_close(seen[0], exact, rtol=1e-5, atol=1e-6)
