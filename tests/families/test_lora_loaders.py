"""Exported files in the real libraries: their networks then answer as ours do under the adapter.

And where a library's own loader refuses a file of another program, our rule for it says so.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoPipeline, WanPipeline
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from tests.families.networks import hunyuan, hunyuan_inputs, wan, wan_inputs
from tests.small_adapters import BLOCKS, loha_on, lokr_on, lora_on
from tests.small_text import make_qwen3
from weft import plugins
from weft.adapters.recipe import recipe_of
from weft.formats.adapter_file import SavedAdapter
from weft.formats.consumers import use_of

SMALL: dict[str, Any] = {"layers": 2, "num_attention_heads": 1, "attention_head_dim": 16, "ffn_dim": 24}
EYES: dict[str, Any] = {"channels": 36, "clip": True, "added_kv_proj_dim": 16}
DOUBLE = r"transformer_blocks\.\d+\.(attn|ff|ff_context)\..*"  # of HunyuanVideo: what its makers' files fuse
ANY = ".*"


def small_wan(**change: Any) -> Any:
    return wan(**{**SMALL, **change})


def small_hunyuan() -> Any:
    return hunyuan(num_layers=1, num_single_layers=1, attention_head_dim=16, rope_axes_dim=(4, 6, 6))


@torch.no_grad()
def ours(network: nn.Module, adapter: SavedAdapter, question: Mapping[str, Any]) -> Tensor:
    """The answer of a network under the adapter as Weft applies it."""
    adapters = recipe_of(adapter, adapter.paths).attach(network, adapter.paths, ("one",), seed=0)
    adapters.load_state_dict("one", adapter.tensors)
    with adapters.use("one"):
        return network(**question)[0]


@torch.no_grad()
def theirs(network: Any, question: Mapping[str, Any]) -> Tensor:
    return network(**question)[0]


def written(adapter: SavedAdapter, to: str, folder: Path) -> Path:
    return plugins.find("format", to)().write(folder / to if to == "peft" else folder / f"{to}.safetensors", adapter)


def wan_pipeline(network: Any, second: Any = None) -> Any:
    made: Any = WanPipeline
    return made(
        tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=network,
        transformer_2=second, boundary_ratio=0.875 if second else None,
    )  # fmt: skip


def hunyuan_pipeline(network: Any) -> Any:
    made: Any = HunyuanVideoPipeline
    return made(
        text_encoder=None, tokenizer=None, transformer=network, vae=None, scheduler=None, text_encoder_2=None,
        tokenizer_2=None,
    )  # fmt: skip


def assert_alike(found: Tensor, expected: Tensor, plain: Tensor) -> None:
    """Up to fp32 in another order of sums, which is far less than what the adapter does."""
    assert float((found - expected).norm()) < 2e-4 * float((expected - plain).norm())
    assert_close(found, expected, atol=1e-5, rtol=1e-4)


# ---- Wan


@pytest.mark.parametrize("to", ["diffusers", "comfyui", "musubi"])
@pytest.mark.parametrize("change", [{}, EYES], ids=["t2v", "i2v"])
def test_wan_pipeline_answers_as_we_do(to, change, tmp_path):
    adapter = lora_on(small_wan(**change), rslora=to == "diffusers")
    question = wan_inputs(small_wan(**change))
    expected, plain = ours(small_wan(**change), adapter, question), theirs(small_wan(**change), question)
    network = small_wan(**change)
    wan_pipeline(network).load_lora_weights(written(adapter, to, tmp_path))
    assert_alike(theirs(network, question), expected, plain)


@pytest.mark.parametrize("to", ["diffusers", "comfyui"])
def test_wan_pipeline_takes_each_expert_to_its_own_network(to, tmp_path):
    high, low = lora_on(small_wan(), seed=1), lora_on(small_wan(), seed=2)
    networks, question = (small_wan(), small_wan()), wan_inputs(small_wan())
    pipeline = wan_pipeline(*networks)
    for name, adapter in (("high", high), ("low", low)):
        (tmp_path / name).mkdir()
        path = written(adapter, to, tmp_path / name)
        pipeline.load_lora_weights(path, adapter_name=name, load_into_transformer_2=name == "low")
    for network, adapter in zip(networks, (high, low), strict=True):
        expected = ours(small_wan(), adapter, question)
        assert_alike(theirs(network, question), expected, theirs(small_wan(), question))


def test_wan_pipeline_reads_a_dora_and_layers_around_the_blocks_from_our_own_diffusers_file(tmp_path):
    adapter = lora_on(small_wan(), ANY, dora=True)
    question = wan_inputs(small_wan())
    network = small_wan()
    wan_pipeline(network).load_lora_weights(written(adapter, "diffusers", tmp_path))
    assert_alike(theirs(network, question), ours(small_wan(), adapter, question), theirs(small_wan(), question))


# ---- HunyuanVideo


@pytest.mark.parametrize("pattern", [BLOCKS, ANY])
def test_hunyuan_video_pipeline_answers_as_we_do(pattern, tmp_path):
    adapter = lora_on(small_hunyuan(), pattern)
    question = hunyuan_inputs(small_hunyuan())
    network = small_hunyuan()
    hunyuan_pipeline(network).load_lora_weights(written(adapter, "diffusers", tmp_path))
    expected = ours(small_hunyuan(), adapter, question)
    assert_alike(theirs(network, question), expected, theirs(small_hunyuan(), question))


@pytest.mark.parametrize("beginning", ["", "diffusion_model.", "transformer."])
def test_hunyuan_video_pipeline_converts_fused_layers_without_alpha(beginning, tmp_path):
    adapter = lora_on(small_hunyuan(), DOUBLE)
    question = hunyuan_inputs(small_hunyuan())
    path = written(adapter, "original", tmp_path)
    save_file({f"{beginning}{key}": tensor for key, tensor in load_file(path).items()}, path, {"format": "pt"})
    assert not use_of("diffusers", path, "hunyuan-video").faults
    network = small_hunyuan()
    hunyuan_pipeline(network).load_lora_weights(path)
    expected = ours(small_hunyuan(), adapter, question)
    assert_alike(theirs(network, question), expected, theirs(small_hunyuan(), question))


# ---- What the real loaders refuse


@pytest.mark.parametrize(
    ("to", "pattern", "loads"),
    [("musubi", BLOCKS, True), ("musubi", r"blocks\.\d+\.attn1\..*", False), ("musubi", r"blocks\.1\..*", False),
     ("comfyui", r"blocks\.1\.attn1\..*", True), ("comfyui", ANY, False),
     ("comfyui", r"condition_embedder\.text.*", False), ("videox-fun", BLOCKS, False)],
)  # fmt: skip
def test_our_rule_for_diffusers_and_wan_is_what_the_library_does(to, pattern, loads, tmp_path):
    path = written(lora_on(small_wan(), pattern), to, tmp_path)
    use = use_of("diffusers", path, "wan")
    assert (not use.faults and not use.ignored) == loads
    network = small_wan()
    assert loaded(lambda: wan_pipeline(network).load_lora_weights(path), network) == loads


@pytest.mark.parametrize("to", ["comfyui", "musubi", "videox-fun", "original"])
def test_our_rule_for_diffusers_and_hunyuan_video_is_what_the_library_does(to, tmp_path):
    """Alphas stop it, names with underscores say nothing to it, and linear1 is cut as if the network were 3072 wide."""
    path = written(lora_on(small_hunyuan()), to, tmp_path)
    use = use_of("diffusers", path, "hunyuan-video")
    network = small_hunyuan()
    assert (use.faults or use.ignored) and not loaded(
        lambda: hunyuan_pipeline(network).load_lora_weights(path), network
    )


def loaded(load: Callable[[], None], network: nn.Module) -> bool:
    """Whether loading ends well and leaves an adapter. The library raises many kinds."""
    try:
        load()
    except Exception:
        return False
    return any("lora_A" in name for name, _ in network.named_modules())


# ---- PEFT and transformers

KINDS: dict[str, Callable[[nn.Module, str], SavedAdapter]] = {
    "lora": lora_on,
    "rslora": lambda network, pattern: lora_on(network, pattern, rslora=True),
    "dora": lambda network, pattern: lora_on(network, pattern, dora=True),
    "loha": loha_on,
    "lokr": lokr_on,
}


@pytest.mark.parametrize("kind", KINDS)
def test_peft_model_of_a_video_network_answers_as_we_do(kind, tmp_path):
    adapter = KINDS[kind](small_wan(), r"blocks\.\d+\.attn1\..*")
    question = wan_inputs(small_wan())
    model = PeftModel.from_pretrained(small_wan(), str(written(adapter, "peft", tmp_path)))
    expected = ours(small_wan(), adapter, question)
    assert_alike(theirs(model, question), expected, theirs(small_wan(), question))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3(tmp_path_factory.mktemp("text") / "qwen")


@pytest.mark.parametrize(
    ("loader", "kind"),
    # transformers 5.23 looks for DoRA's lengths under another key than PEFT writes them, and leaves them out.
    [("PeftModel", "lora"), ("PeftModel", "dora"), ("PeftModel", "loha"), ("load_adapter", "lora"),
     ("load_adapter", "rslora"), ("load_adapter", "loha")],
)  # fmt: skip
def test_a_language_model_answers_as_we_do_in_peft_and_in_transformers(kind, loader, qwen, tmp_path):
    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.float32).eval()

    adapter = KINDS[kind](model(), r"model\.layers\.\d+\..*_proj")
    question = {"input_ids": torch.arange(3, 19).view(2, 8), "return_dict": False}
    folder = str(written(adapter, "peft", tmp_path))
    found = model()
    if loader == "PeftModel":
        found = PeftModel.from_pretrained(found, folder)
    else:
        found.load_adapter(folder)
    assert_alike(theirs(found, question), ours(model(), adapter, question), theirs(model(), question))
