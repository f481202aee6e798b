"""Files of ours under the real loaders of PEFT and diffusers, and theirs under ours: the same answer to rounding."""

import json
from typing import Any

import pytest
import torch
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close

from tests.adapters import recipes
from weft.adapters.lora import Lora
from weft.formats.adapter_file import SavedAdapter
from weft.formats.diffusers import DiffusersFile
from weft.formats.peft import PeftFolder
from weft.formats.reading import read_adapter

RECIPES = {
    "alpha half of rank": Lora(rank=4, alpha=2),
    "alpha a fraction": Lora(rank=4, alpha=1.5),
    "rslora": Lora(rank=4, alpha=6, rslora=True),
    "dora": Lora(rank=4, alpha=2, dora=True),
    "20 layers": Lora(rank=4, alpha=2, targets="attention+ffn"),  # where PEFT begins to shorten names
}


@pytest.fixture(params=RECIPES.values(), ids=list(RECIPES))
def trained(request, tiny_wan, ask, attach, shaken):
    """An adapter with weights, as it would be saved, and the answer of the network under it."""
    recipe, network = request.param.model_copy(update={"backend": "native"}), tiny_wan()
    adapters = attach(recipe, network)
    shaken(adapters)
    with adapters.use("student"), torch.no_grad():
        expected = ask(network)
    return saved(recipe, adapters), expected


def saved(recipe, adapters) -> SavedAdapter:
    return SavedAdapter(
        adapters.state_dict("student"), recipe.rank, recipe.strength, recipe.rslora, recipe.dora, adapters.paths,
        {"weft.version": "0.1.0", "weft.config": '{"a": 1}'},
    )  # fmt: skip


def alike(answer, expected):
    assert_close(answer, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_peft_loads_our_folder_and_answers_as_we_do(trained, tiny_wan, ask, tmp_path, recwarn):
    adapter, expected = trained
    model = PeftModel.from_pretrained(tiny_wan(), PeftFolder().write(tmp_path / "adapter", adapter))
    alike(ask(model), expected)
    assert not any("keyword" in str(w.message) or "missing" in str(w.message) for w in recwarn)


@torch.no_grad()
def test_a_diffusers_pipeline_loads_our_file_and_answers_as_we_do(trained, tiny_wan, ask, tmp_path):
    adapter, expected = trained
    DiffusersFile().write(tmp_path, adapter)
    nothing: Any = None  # the loader needs the transformer alone
    schedule = FlowMatchEulerDiscreteScheduler()
    pipeline = WanPipeline(nothing, nothing, nothing, schedule, transformer=tiny_wan())
    pipeline.load_lora_weights(tmp_path)
    alike(ask(pipeline.transformer), expected)


@pytest.mark.parametrize("kind", ["pissa", "conv", "conv pissa"])
@torch.no_grad()
def test_a_diffusers_pipeline_answers_as_we_do_with_convolutions_and_pissa(
    kind, tiny_wan, ask, attach, shaken, tmp_path
):
    recipe, network = recipes.KINDS[kind], tiny_wan()
    adapters = attach(recipe, network)
    shaken(adapters)
    adapter = recipes.saved(recipe, adapters)
    file = DiffusersFile().write(tmp_path, adapter)
    read = read_adapter(file)
    assert (read.rank, read.alpha, read.conv_rank, read.conv_alpha) == (
        adapter.rank, adapter.alpha, adapter.conv_rank, adapter.conv_alpha,
    )  # fmt: skip
    nothing: Any = None
    schedule = FlowMatchEulerDiscreteScheduler()
    pipeline = WanPipeline(nothing, nothing, nothing, schedule, transformer=tiny_wan())
    pipeline.load_lora_weights(tmp_path)
    with adapters.use("student"):
        assert_close(ask(pipeline.transformer), ask(network), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("style", [PeftFolder(), DiffusersFile()], ids=["peft", "diffusers"])
def test_what_is_written_is_what_is_read(style, trained, tmp_path):
    adapter, _ = trained
    read = read_adapter(style.write(tmp_path / "adapter", adapter))
    assert read.tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(read.tensors[key], value) for key, value in adapter.tensors.items())
    assert (read.rank, read.alpha, read.rslora, read.dora) == (
        adapter.rank,
        adapter.alpha,
        adapter.rslora,
        adapter.dora,
    )
    assert set(read.targets) == set(adapter.targets) and adapter.metadata.items() <= read.metadata.items()


@pytest.mark.parametrize("writer", ["native", "peft"])
def test_each_backend_loads_the_others_file(writer, trained, tiny_wan, ask, attach, tmp_path):
    adapter, expected = trained
    recipe = Lora(
        rank=adapter.rank, alpha=adapter.alpha, rslora=adapter.rslora, dora=adapter.dora, targets=adapter.targets
    )
    first, second = (
        recipe.model_copy(update={"backend": b}) for b in (writer, {"native": "peft"}.get(writer, "native"))
    )
    wrote = attach(first, tiny_wan())
    wrote.load_state_dict("student", adapter.tensors)
    folder = PeftFolder().write(tmp_path / "adapter", saved(first, wrote))
    network = tiny_wan()
    reads = attach(second, network, seed=99)
    reads.load_state_dict("student", read_adapter(folder).tensors)
    with reads.use("student"), torch.no_grad():
        alike(ask(network), expected)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("own_rank", [{}, {"rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"attn2.to_k": 1}}])
def test_we_load_pefts_own_folder_and_answer_as_it_does(own_rank, safe, tiny_wan, ask, attach, tmp_path):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k"], init_lora_weights=False, **own_rank)
    torch.manual_seed(0)
    model = get_peft_model(tiny_wan(), config)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    adapter = read_adapter(tmp_path)
    network = tiny_wan()
    adapters = attach(Lora(rank=adapter.rank, alpha=adapter.alpha, targets=adapter.targets), network)
    adapters.load_state_dict("student", adapter.tensors)
    with adapters.use("student"), torch.no_grad():
        alike(ask(network), ask(model))


def test_we_load_what_diffusers_saves_and_answer_as_it_does(tiny_wan, ask, attach, tmp_path):
    theirs = tiny_wan()
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k"], init_lora_weights=False)
    theirs.add_adapter(config)
    layers = {key: p for key, p in theirs.state_dict().items() if "lora_" in key}
    layers = {key.replace(".default", ""): p for key, p in layers.items()}
    WanPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=layers,
        transformer_lora_adapter_metadata={"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_k"]},
    )  # fmt: skip
    adapter = read_adapter(tmp_path)
    assert (adapter.rank, adapter.alpha) == (4, 8.0)
    network = tiny_wan()
    adapters = attach(Lora(rank=4, alpha=8, targets=adapter.targets), network)
    adapters.load_state_dict("student", adapter.tensors)
    with adapters.use("student"), torch.no_grad():
        alike(ask(network), ask(theirs))


def test_the_alpha_of_a_saved_adapter_is_in_both_files(trained, tmp_path):
    adapter, _ = trained
    folder = PeftFolder().write(tmp_path / "adapter", adapter)
    assert json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] == adapter.alpha
    assert DiffusersFile().read(DiffusersFile().write(tmp_path, adapter)).scale == adapter.scale
