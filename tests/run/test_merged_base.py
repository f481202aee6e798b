"""What a merge leaves as it was, which of two networks an adapter goes into, and what is refused before a byte is
written."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.families import networks
from tests.run.test_merging import KINDS, merged, qwen3, trained, wan_diffusers, wan_official
from tests.run.test_stack import lora
from tests.small_text import make_qwen3
from weft.errors import ConfigError, ModelError, RunError
from weft.formats.adapter_file import SavedAdapter
from weft.formats.peft import PeftFolder
from weft.run import merged_files
from weft.run.base_weights import open_weights
from weft.run.block_strengths import BlockStrengths
from weft.run.merged_base import write
from weft.run.merging import Asked, planned


@pytest.fixture
def wan(tmp_path) -> Path:
    return wan_official(tmp_path / "base")


@pytest.fixture
def network() -> Any:
    return networks.wan()


# ---- The rest of the base -------------------------------------------------------------------------------------------


def header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))


def test_what_no_adapter_touches_keeps_names_order_shards_index_and_bytes(tmp_path, network):
    base, out = wan_diffusers(tmp_path / "base"), tmp_path / "out"
    (base / "vae").mkdir()
    (base / "vae" / "large.safetensors").write_bytes(os.urandom(1 << 21))
    (base / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"the same weights, pickled")
    adapter = lora(network, ("blocks.0.attn1.to_q",), 3, 2.0, seed=1, metadata={"weft.step": "7"})
    written = merged([PeftFolder().write(tmp_path / "a", adapter)], base, out)
    shards = sorted((base / "transformer").glob("*.safetensors"))
    assert len(shards) > 2 and written.files == len(shards)
    for shard in shards:
        after = out / "transformer" / shard.name
        ours, theirs = header(shard), header(after)
        told = json.loads(theirs.pop("__metadata__")["weft.merged"])
        assert {name: entry for name, entry in ours.items() if name != "__metadata__"} == theirs
        assert list(theirs) == [name for name in ours if name != "__metadata__"]
        before, made = load_file(shard), load_file(after)
        for name, tensor in before.items():
            assert torch.equal(tensor, made[name]) == (name != "blocks.0.attn1.to_q.weight")
    assert told["adapters"][0]["weft.step"] == "7" and told["base_identity"] == open_weights(base).identity
    index = "transformer/diffusion_pytorch_model.safetensors.index.json"
    assert json.loads((out / index).read_text()) == json.loads((base / index).read_text())
    assert (out / "vae" / "large.safetensors").samefile(base / "vae" / "large.safetensors")
    assert not (out / "model_index.json").samefile(base / "model_index.json")  # small, and edited now and then
    assert written.left_out == ["transformer/diffusion_pytorch_model.bin"] and written.linked == 1
    assert merged([tmp_path / "a"], base, tmp_path / "copied", copy=True).linked == 0
    assert not (tmp_path / "copied" / "vae" / "large.safetensors").samefile(base / "vae" / "large.safetensors")


def test_a_language_models_config_says_the_new_precision_and_transformers_loads_it(tmp_path):
    base, out = qwen3(tmp_path / "base"), tmp_path / "out"
    network = AutoModelForCausalLM.from_pretrained(base)
    adapter = lora(network, ("model.layers.0.self_attn.q_proj",), 3, 2.0, seed=1)
    merged([PeftFolder().write(tmp_path / "a", adapter)], base, out, dtype="bf16")
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and json.loads((base / "config.json").read_text())["dtype"] == "float32"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    held = sum(t.numel() * t.element_size() for p in out.glob("*.safetensors") for t in load_file(p).values())
    assert index["metadata"]["total_size"] == held
    made = AutoModelForCausalLM.from_pretrained(out)
    assert made.dtype == torch.bfloat16 and (out / "tokenizer.json").exists()


# ---- Two experts ----------------------------------------------------------------------------------------------------


@pytest.fixture
def experts(tmp_path) -> Path:
    for seed, name in enumerate(("high", "low")):
        wan_official(tmp_path / "base" / f"{name}_noise_model", seed)
    return tmp_path / "base"


@pytest.fixture
def both(network, tmp_path) -> Path:
    """A run's folder with an adapter of each expert."""
    for seed, name in enumerate(("high", "low")):
        adapter = lora(network, ("blocks.0.attn1.to_q",), 3, 2.0, seed, metadata={"weft.expert": name})
        PeftFolder().write(tmp_path / "run" / f"adapter_{name}", adapter)
    return tmp_path / "run"


def changed_parts(base: Path, out: Path) -> list[str]:
    names = [f"{name}_noise_model/diffusion_pytorch_model.safetensors" for name in ("high", "low")]
    return [name[:4].rstrip("_") for name in names if (base / name).read_bytes() != (out / name).read_bytes()]


def test_a_run_on_both_experts_goes_into_both_networks(experts, both, tmp_path):
    merged([both], experts, tmp_path / "out")
    assert changed_parts(experts, tmp_path / "out") == ["high", "low"]
    merged([both], experts, tmp_path / "one", expert="low")
    assert changed_parts(experts, tmp_path / "one") == ["low"]


def test_of_a_file_for_both_experts_each_goes_into_its_network(experts, network, tmp_path):
    plain = lora(network, ("blocks.0.attn1.to_q",), 3, 2.0, seed=1).tensors
    save_file(
        {f"transformer{n}.{key}": tensor.clone() for n in ("", "_2") for key, tensor in plain.items()},
        tmp_path / "a.safetensors",
    )
    merged([tmp_path / "a.safetensors"], experts, tmp_path / "out")
    assert changed_parts(experts, tmp_path / "out") == ["high", "low"]
    merged([tmp_path / "a.safetensors"], experts, tmp_path / "one", expert="high")
    assert changed_parts(experts, tmp_path / "one") == ["high"]


def test_an_adapters_expert_is_told_by_its_header_by_its_name_or_by_the_user(experts, both, network, tmp_path):
    plan = planned(Asked([both / "adapter_high"], experts))
    assert [each.expert for each in plan.networks] == ["high"] and "expert low stays as it is" in plan.notes[0]
    unsaid = lora(network, ("blocks.0.attn1.to_q",), 3, 2.0, seed=3)
    named = PeftFolder().write(tmp_path / "wan2.2_low_noise", unsaid)
    assert planned(Asked([named], experts)).networks[0].expert == "low"
    silent = PeftFolder().write(tmp_path / "concept", unsaid)
    assert planned(Asked([silent], experts, expert="high")).networks[0].expert == "high"
    with pytest.raises(ConfigError, match=r"--expert: .*concept does not say which it is for. Write --expert high or"):
        planned(Asked([silent], experts))
    with pytest.raises(ModelError, match="is for expert high, as its header says, and not for low"):
        planned(Asked([both / "adapter_high"], experts, expert="low"))


def test_a_file_of_one_expert_takes_the_adapter_of_that_one(experts, both, tmp_path):
    file = (experts / "high_noise_model" / "diffusion_pytorch_model.safetensors").rename(
        tmp_path / "x_low_noise.safetensors"
    )
    with pytest.raises(ModelError, match=r"calls itself the expert for low noise, and .*adapter_high is for high"):
        planned(Asked([both / "adapter_high"], file))
    with pytest.raises(ModelError, match="is one network, and the adapters are for the experts high and low"):
        planned(Asked([both], file))
    assert planned(Asked([both], file, expert="low")).networks[0].layers == 1


# ---- What is refused ------------------------------------------------------------------------------------------------


def refused(adapters: Sequence[SavedAdapter], base: Path, root: Path, **asked: Any) -> str:
    paths = [PeftFolder().write(root / f"a{number}", each) for number, each in enumerate(adapters)]
    with pytest.raises((ModelError, ConfigError)) as caught:
        planned(Asked(paths, base, **asked))
    return str(caught.value)


def test_other_layers_and_other_widths_are_refused_by_name(wan, network, tmp_path):
    paths = ("blocks.0.attn1.to_q", "blocks.1.attn1.to_q")
    deep = lora(networks.wan(layers=3), ("blocks.0.attn1.to_q", "blocks.2.attn1.to_q"), 3, 2.0, seed=1)
    said = refused([deep], wan, tmp_path)
    assert "has no layer 'blocks.2.attn1.to_q', which the adapter changes, nor 0 others of 2" in said
    assert "Did you mean 'blocks." in said
    narrow = lora(networks.wan(attention_head_dim=64), paths, 3, 2.0, seed=1)
    assert "'blocks.0.attn1.to_q' is 64 x 64, and the base's layer is 128 x 128 (out x in)" in refused(
        [narrow], wan, tmp_path
    )


@pytest.mark.parametrize("name", ["loha", "lokr", "oft"])
def test_other_widths_are_refused_for_every_kind(name, wan, tmp_path):
    narrow = trained(KINDS[name], networks.wan(attention_head_dim=64), ("blocks.0.attn1.to_q",))
    assert "The adapter was trained on a model of another size" in refused([narrow], wan, tmp_path)


def test_another_base_in_the_header_is_refused_unless_forced(wan, network, tmp_path):
    adapter = lora(network, ("blocks.0.attn1.to_q",), 3, 2.0, seed=1)
    mine = replace(adapter, metadata={"weft.base": open_weights(wan).identity})
    assert planned(Asked([PeftFolder().write(tmp_path / "mine", mine)], wan)).notes == []
    other = replace(adapter, metadata={"weft.base": "0123"})
    said = refused([other], wan, tmp_path)
    assert (
        "was trained on other base weights" in said and "weft.base in its header is 0123" in said and "--force" in said
    )
    assert "because of --force" in planned(Asked([tmp_path / "a0"], wan, force=True)).notes[0]


def test_a_dora_goes_in_alone_and_whole(wan, network, tmp_path):
    dora = trained(KINDS["dora"], network, ("blocks.0.attn1.to_q",))
    plain = lora(networks.wan(), ("blocks.1.attn1.to_q",), 3, 2.0, seed=1)
    assert "is of kind DoRA, whose change depends on the weights that" in refused([plain, dora], wan, tmp_path)
    assert refused([dora], wan, tmp_path, weights=(0.5,)).startswith("--weights: ")
    assert refused([dora], wan, tmp_path, blocks=BlockStrengths.parse("0=0.5")).startswith("--blocks: ")
    assert "nothing would change" in refused([dora], wan, tmp_path, blocks=BlockStrengths.parse("0=0"))


def test_a_tied_head_is_refused(tmp_path):
    base = make_qwen3(tmp_path / "base")
    network = AutoModelForCausalLM.from_pretrained(base)
    said = refused([lora(network, ("lm_head",), 3, 2.0, seed=1)], base, tmp_path)
    assert "'lm_head', which is one tensor for the words that are read and those that are written" in said


def test_no_base_and_no_adapter_are_told_apart(wan, tmp_path, network):
    adapter = PeftFolder().write(tmp_path / "a", lora(network, ("blocks.0.attn1.to_q",), 3, 2.0, seed=1))
    with pytest.raises(ModelError, match=r"no folder or file"):
        planned(Asked([adapter], tmp_path / "bas"))
    with pytest.raises(ModelError, match="no such file or folder"):
        planned(Asked([tmp_path / "b"], wan))


@pytest.mark.parametrize(
    ("out", "words"),
    [("a", "is there already. Name another, or add --overwrite"), ("base", "is the base, or in it"),
     ("base/new", "is the base, or in it"), ("x.safetensors", "expected is a new folder")],
)  # fmt: skip
def test_a_place_that_is_taken_or_of_another_kind_is_refused(out, words, wan, network, tmp_path):
    adapter = PeftFolder().write(tmp_path / "a", lora(network, ("blocks.0.attn1.to_q",), 3, 2.0, seed=1))
    with pytest.raises(ConfigError, match=words):
        merged([adapter], wan, tmp_path / out)


def test_a_folder_is_replaced_only_where_it_holds_nothing_but_such_a_model(wan, network, tmp_path):
    adapter = PeftFolder().write(tmp_path / "a", lora(network, ("blocks.0.attn1.to_q",), 3, 2.0, seed=1))
    plan, out = planned(Asked([adapter], wan)), tmp_path / "out"
    write(plan, out, lambda count: None)
    write(plan, out, lambda count: None, overwrite=True)
    (out / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match=r"what the base has not, such as letter\.txt"):
        write(plan, out, lambda count: None, overwrite=True)
    assert (out / "letter.txt").exists()


def test_an_interrupted_merge_and_a_full_disk_leave_nothing(wan, network, tmp_path, monkeypatch):
    adapter = PeftFolder().write(tmp_path / "a", lora(network, ("blocks.0.attn1.to_q",), 3, 2.0, seed=1))
    plan, written = planned(Asked([adapter], wan)), []

    def stop(count: int) -> None:
        written.append(count)
        if len(written) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(plan, tmp_path / "out", stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    monkeypatch.setattr("weft.run.merged_base.SPARE", free)
    with pytest.raises(RunError, match=r"out takes 0.0 GB, and its disk has .* GB free"):
        write(plan, tmp_path / "out", lambda count: None)


def test_a_file_that_reads_back_otherwise_is_not_kept(wan, network, tmp_path, monkeypatch):
    """A disk that loses what was written is stood for by a writer that writes other numbers."""
    adapter = PeftFolder().write(tmp_path / "a", lora(network, ("blocks.0.attn1.to_q",), 3, 2.0, seed=1))
    plan = planned(Asked([adapter], wan))
    own = merged_files.raw
    monkeypatch.setattr(merged_files, "raw", lambda tensor: own(torch.zeros_like(tensor)))
    with pytest.raises(ModelError, match="does not read back as it was written"):
        write(plan, tmp_path / "out", lambda count: None)
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_two_files_hold_is_refused(tmp_path, network):
    base = tmp_path / "base"
    network.save_pretrained(base / "transformer")
    network.half().save_pretrained(base / "transformer", variant="fp16")
    adapter = PeftFolder().write(tmp_path / "a", lora(network, ("blocks.0.attn1.to_q",), 3, 2.0, seed=1))
    with pytest.raises(ConfigError, match=r"both hold '.*Take the variant"):
        merged([adapter], base, tmp_path / "out")
