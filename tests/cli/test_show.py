"""`weft show` reads headers and small files, and says what lies at a path."""

import json
import math
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import weft
from tests.families import networks, official
from tests.small import make_qwen3
from weft import plugins
from weft.cli.show import facts_of, run, run_facts
from weft.errors import ModelError, RunError
from weft.events import RunEnded, StepEnded
from weft.few_steps import StepList
from weft.formats.adapter_file import SavedAdapter
from weft.formats.peft import PeftFolder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA of rank 4 and alpha 8 on two layers of three blocks."""
    tensors = {}
    for block in range(3):
        for name in ("to_q", "to_k"):
            path = f"blocks.{block}.attn1.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(4, 8)
            tensors[f"{path}.lora_B.weight"] = torch.randn(8, 4)
    metadata = {"weft.version": "0.1.0", "weft.config": json.dumps({"seed": 3})}
    PeftFolder().write(tmp_path / "adapter", SavedAdapter(tensors, rank=4, alpha=8.0, metadata=metadata))
    return tmp_path / "adapter"


def test_an_adapter_says_its_strength_its_layers_and_where_it_comes_from(adapter: Path):
    facts = facts_of(adapter)
    assert (facts["rank"], facts["alpha"], facts["scale"]) == (4, 8.0, 2.0)
    assert facts["parameters"] == 6 * 2 * 4 * 8 and facts["dtype"] == {"fp32": 12}
    assert facts["targets"] == {"blocks.*.attn1.to_q": 3, "blocks.*.attn1.to_k": 3}
    assert facts["trained with"] == {"version": "0.1.0"} and facts["config"] == {"seed": 3}


def test_a_few_step_adapter_says_at_which_times_it_is_asked(adapter: Path, tmp_path: Path):
    assert "sampled in" not in facts_of(adapter)
    tensors = {f"a.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"}
    said = {
        StepList.of(4, 5.0).to_json(): "4 steps at 1, 0.9375, 0.8333, 0.625 (shift 5), guidance 1",
        "4": "(damaged: ",
    }
    for text, words in said.items():
        metadata = {"weft.step_list": text, "weft.seed": "1"}
        PeftFolder().write(tmp_path / "few", SavedAdapter(tensors, rank=2, alpha=2.0, metadata=metadata))
        facts = facts_of(tmp_path / "few")
        assert facts["sampled in"].startswith(words) and facts["trained with"] == {"seed": "1"}


def test_a_file_within_the_folder_says_the_same(adapter: Path):
    assert facts_of(adapter / "adapter_model.safetensors") == facts_of(adapter)


def test_a_config_is_told_as_one_with_the_verbs_that_read_it(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("name: a\n")
    with pytest.raises(ModelError, match=r"run.yaml is a config. .* weft plan .*run.yaml"):
        facts_of(tmp_path / "run.yaml")


def test_json_holds_all_of_it(adapter: Path, capsys: pytest.CaptureFixture[str]):
    assert run([str(adapter), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == facts_of(adapter)
    assert run([str(adapter)]) == 0
    assert "scale            2\n" in capsys.readouterr().out


def test_a_base_model_says_its_parts():
    facts = facts_of(Path(weft.__file__).parent / "demo" / "tiny_wan")
    assert facts["transformer"].startswith("WanTransformer3DModel, ")
    assert facts["vae"].startswith("AutoencoderKLWan, ")


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file({"a": torch.zeros(2)}, folder / "state.safetensors")
    (folder / "state.json").write_text("{}")
    (folder / "config.json").write_text('{"seed": 1}')
    files = {path.name: {"bytes": path.stat().st_size} for path in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "step": 20, "files": files}))
    return folder


def test_a_checkpoint_says_its_step_and_whether_it_is_whole(tmp_path: Path):
    folder = checkpoint(tmp_path / "global_step_20")
    assert facts_of(folder)["step"] == 20 and facts_of(folder)["whole"].startswith("yes")
    (folder / "state.safetensors").write_bytes(b"cut")
    assert facts_of(folder)["whole"] == "no: state.safetensors missing or of another size"
    (folder / "manifest.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        facts_of(folder)


def test_a_run_says_how_far_it_came(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("name: first\nschedule: {steps: 40}\n")
    for step in (5, 20, 100):
        checkpoint(tmp_path / "checkpoints" / f"global_step_{step}")
    events = [StepEnded(step=20, experience="clips", metrics={"train/loss": 0.5})]
    log = tmp_path / "events.rank0.jsonl"
    log.write_text("".join(json.dumps(event.record()) + "\n" for event in events) + '{"event": "st')
    facts = facts_of(tmp_path)
    assert facts["step"] == "20 of 40" and facts["last metrics"] == {"train/loss": 0.5}
    assert facts["checkpoints"] == ["global_step_5", "global_step_20", "global_step_100"]
    assert facts["state"].startswith("no end in the log")
    log.write_text("".join(json.dumps(e.record()) + "\n" for e in [*events, RunEnded(step=20, outcome="stopped")]))
    assert facts_of(tmp_path)["state"] == "stopped"


def test_what_is_nothing_of_ours_is_said_with_what_is_there(tmp_path: Path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelError, match=r"no adapter, checkpoint, run or model folder. It holds notes.txt"):
        facts_of(tmp_path)
    with pytest.raises(ModelError, match=r"there is no '.*note.txt' .*Did you mean 'notes.txt'\?"):
        facts_of(tmp_path / "note.txt")


def test_a_transformers_file_says_its_family_task_precision_and_whose_names_it_has(tmp_path: Path):
    shapes = {
        "blocks.0.self_attn.q.weight": (5120, 5120),
        "blocks.39.self_attn.q.weight": (5120, 5120),
        "head.head.weight": (64, 5120),
        "patch_embedding.weight": (5120, 16, 1, 2, 2),
    }
    path = tmp_path / "wan.safetensors"
    write_header(path, {f"model.diffusion_model.{name}": ("F8_E4M3", shape) for name, shape in shapes.items()})
    facts = facts_of(path)
    assert facts["what"] == "a Wan transformer, t2v (fp8, 0.1B)"
    assert facts["model"] == "Wan 2.1 T2V 14B, or an expert of Wan 2.2 T2V A14B"
    assert (facts["names"], facts["width"], facts["blocks"]) == (
        "of the makers, under model.diffusion_model. as in ComfyUI", 5120, 40,
    )  # fmt: skip


def write_header(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """A sparse safetensors file: the header alone takes room."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * {"F8_E4M3": 1, "BF16": 2, "F32": 4}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def test_an_autoencoder_and_a_quantized_file_are_told_by_name(tmp_path: Path):
    vae = {"encoder.middle.0.residual.0.gamma": torch.ones(4, 1, 1, 1), "conv1.weight": torch.ones(2, 2)}
    torch.save(vae, tmp_path / "Wan2.1_VAE.pth")
    assert facts_of(tmp_path / "Wan2.1_VAE.pth")["what"] == "a Wan autoencoder (fp32, 8 parameters)"
    save_file({"a.qweight": torch.ones(2), "a.wscales": torch.ones(2)}, tmp_path / "svdq.safetensors")
    assert facts_of(tmp_path / "svdq.safetensors")["what"] == "weights quantized by nunchaku (SVDQuant)"
    (tmp_path / "wan.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(ModelError, match="GGUF"):
        facts_of(tmp_path / "wan.gguf")


def test_a_makers_directory_says_its_parts(tmp_path: Path):
    for expert in ("high", "low"):
        (tmp_path / f"{expert}_noise_model").mkdir()
        state = official.wan_transformer(networks.wan().state_dict())
        save_file(state, tmp_path / f"{expert}_noise_model" / "diffusion_pytorch_model.safetensors")
    facts = facts_of(tmp_path)
    assert facts["what"] == "a base model in its makers' own layout"
    assert facts["high"] == facts["low"] and facts["low"].startswith("a Wan transformer, t2v (fp32, ")
    assert facts["model"] == "none that Weft knows by its sizes"


def test_the_adapters_of_both_experts_stand_in_a_runs_summary_in_their_order(tmp_path: Path):
    folder = tmp_path / "run"
    for name in ("global_step_10_low", "global_step_10_high", "global_step_9_high", "adapter_high", "adapter_low"):
        (folder / name).mkdir(parents=True)
    (folder / "config.yaml").write_text("name: run\n")
    assert run_facts(folder)["adapters"] == [
        "global_step_9_high", "global_step_10_high", "global_step_10_low", "adapter_high", "adapter_low",
    ]  # fmt: skip


def test_a_language_model_says_its_sizes_and_whether_it_has_a_chat_template(tmp_path: Path):
    folder = make_qwen3(tmp_path / "model", layers=3)
    facts = facts_of(folder)
    assert facts["what"] == "a language model" and facts["network"].startswith("Qwen3ForCausalLM, ")
    assert [facts[name] for name in ("blocks", "width", "vocabulary", "context")] == [3, 32, 320, 512]
    assert facts["chat template"] == "there"
    (folder / "chat_template.jinja").unlink()
    assert facts_of(folder)["chat template"] == "none"
    assert facts_of(folder / "model.safetensors")["what"] == "weights of a language model, Qwen3ForCausalLM"


@pytest.mark.parametrize(("kind", "items"), [("causal-lm", "conversations"), ("wan", "clips")])
def test_an_adapter_says_how_many_of_what_it_was_trained_on(tmp_path: Path, kind: str, items: str):
    tensors = {f"a.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"}
    metadata = {"weft.data.items": "54", "weft.config": json.dumps({"family": {"kind": kind}})}
    PeftFolder().write(tmp_path, SavedAdapter(tensors, rank=2, alpha=2.0, metadata=metadata))
    assert facts_of(tmp_path)["trained with"]["data.items"] == f"54 {items}"


# ---- Other trainers' files ----------------------------------------------------------------------------------------


def test_a_foreign_header_is_told_in_words(tmp_path: Path):
    metadata = {
        "ss_base_model_version": "wan", "ss_network_dim": "2", "ss_learning_rate": "0.0001", "ss_steps": "800",
        "ss_training_finished_at": "1767225600.5", "ss_vae_name": "None", "modelspec.trigger_phrase": "ohwx",
        "ss_datasets": json.dumps([{"video_directory": "dog", "resolution": [480, 832], "target_frames": [1, 49],
                                    "num_repeats": 3}]),
        "ss_tag_frequency": json.dumps({"3_dog": {"dog": 12, "grass ": 4}, "1_cat": {"dog": 1}}),
    }  # fmt: skip
    tensors = {f"blocks.0.attn1.to_q.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"}
    PeftFolder().write(tmp_path, SavedAdapter(tensors, rank=2, alpha=2.0, metadata=metadata))
    facts = facts_of(tmp_path)
    assert facts["family"] == "wan" and facts["trained with"] == "(see below)"
    said = facts["other trainers' words"]
    assert {key: said[key] for key in ("base model", "rank", "learning rate", "steps", "trigger words")} == {
        "base model": "wan", "rank": "2", "learning rate": "0.0001", "steps": "800", "trigger words": "ohwx",
    }  # fmt: skip
    assert said["datasets"] == ["dog (480x832, frames [1, 49], repeats 3)"]
    assert said["most frequent tags"] == ["dog (13)", "grass (4)"]
    assert said["finished"].startswith(("2025-12-31", "2026-01-01"))


def test_an_adapter_says_which_programs_load_it_and_where_its_alpha_is(adapter: Path, tmp_path: Path):
    facts = facts_of(adapter)
    assert facts["loaded as it is"] == ["PEFT", "Weft"] and facts["alpha is told"] == "in adapter_config.json"
    tensors = {f"transformer.a.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"}
    save_file(tensors, tmp_path / "dog_high_noise.safetensors")
    facts = facts_of(tmp_path / "dog_high_noise.safetensors")
    assert facts["alpha is told"].startswith("nowhere") and facts["scale"] == 1
    assert "diffusers" in facts["loaded as it is"] and facts["expert"] == "high noise, by its name"


# ---- Packed weights, shards, pickles ------------------------------------------------------------------------------


def gguf(path: Path, facts: Mapping[str, str], tensors: Mapping[str, tuple[int, tuple[int, ...]]]) -> Path:
    """The header of a GGUF file: texts, and tensors by the number of their type and their shape."""

    def text(words: str) -> bytes:
        return struct.pack("<Q", len(words)) + words.encode()

    raw = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(facts))
    raw += b"".join(text(key) + struct.pack("<I", 8) + text(value) for key, value in facts.items())
    for name, (kind, shape) in tensors.items():
        raw += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, 0)
    path.write_bytes(raw)
    return path


def test_a_gguf_file_says_its_architecture_its_types_and_which_transformer_it_is(tmp_path: Path):
    tensors = {
        "blocks.0.self_attn.q.weight": (12, (5120, 5120)),
        "blocks.39.self_attn.q.weight": (14, (5120, 5120)),
        "head.head.weight": (0, (64, 5120)),
        "patch_embedding.weight": (0, (5120, 36, 1, 2, 2)),
    }
    facts = facts_of(gguf(tmp_path / "wan2.2_i2v_HighNoise_Q4_K.gguf", {"general.architecture": "wan"}, tensors))
    assert facts["what"].startswith("a Wan transformer, i2v (q") and facts["format"] == "GGUF 3, architecture wan"
    assert facts["dtype"] == {"F32": 2, "Q4_K": 1, "Q6_K": 1} and facts["channels"] == 36
    assert facts["model"] == "an expert of Wan 2.2 I2V A14B" and facts["expert"] == "high noise, by its name"
    assert "Weft reads no GGUF" in facts["use"]
    other = facts_of(gguf(tmp_path / "chat.gguf", {"general.architecture": "llama"}, {"output.weight": (8, (64, 8))}))
    assert other["what"] == "a model of architecture llama in GGUF"


def test_how_weights_are_packed_is_told(tmp_path: Path):
    wan = {
        "blocks.0.self_attn.q.weight": ("F8_E4M3", (640, 64)), "blocks.0.self_attn.q.scale_weight": ("F32", ()),
        "head.head.weight": ("BF16", (4, 64)), "patch_embedding.weight": ("BF16", (64, 16, 1, 2, 2)),
    }  # fmt: skip
    write_header(tmp_path / "scaled.safetensors", wan)
    facts = facts_of(tmp_path / "scaled.safetensors")
    assert facts["quantized"] == "F8_E4M3 with a scale for each weight" and facts["dtype"] == "fp8 scaled"
    nf4 = {"a.weight": ("F32", (4, 1)), "a.weight.quant_state.bitsandbytes__nf4": ("F32", (8,))}
    write_header(tmp_path / "nf4.safetensors", nf4)
    assert facts_of(tmp_path / "nf4.safetensors")["quantized"].startswith("bitsandbytes (NF4), which Weft cannot read")


def test_shards_that_an_index_names_and_that_are_missing_are_told(tmp_path: Path):
    folder = make_qwen3(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00003.safetensors")
    named = {f"layer{n}": f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    lost = "2 of 3 files: model-00002-of-00003.safetensors, model-00003-of-00003.safetensors"
    assert facts_of(folder)["missing"] == lost
    shard = facts_of(folder / "model-00001-of-00003.safetensors")
    assert (shard["shard"], shard["missing"]) == ("1 of 3", lost)


def test_a_pickle_that_would_run_code_is_looked_at_and_runs_none(tmp_path: Path):
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return Path.touch, (ran,)

    state = {"encoder.middle.0.residual.0.gamma": torch.ones(4, 1, 1, 1), "conv1.weight": torch.ones(2, 2).bfloat16()}
    torch.save({"state_dict": state, "trainer": Evil()}, tmp_path / "vae.pth")
    facts = facts_of(tmp_path / "vae.pth")
    assert facts["what"].startswith("a Wan autoencoder (") and facts["pickle"].startswith("yes: not loaded")
    assert not ran.exists()
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ModelError, match="a pickle in PyTorch's old form"):
        facts_of(tmp_path / "old.pth")


def test_28_gigabytes_are_told_without_torch_in_half_a_second(tmp_path: Path):
    path = tmp_path / "wan.safetensors"
    layers = {f"blocks.{n}.{part}.{p}.weight": ("BF16", (5120, 5120)) for n in range(40)
              for part in ("self_attn", "cross_attn") for p in "qkvo"}  # fmt: skip
    ffn = {f"blocks.{n}.ffn.{p}.weight": ("BF16", (13824, 5120)) for n in range(40) for p in (0, 2)}
    rest = {"head.head.weight": ("BF16", (64, 5120)), "patch_embedding.weight": ("BF16", (5120, 16, 1, 2, 2))}
    write_header(path, {**layers, **ffn, **rest})
    assert path.stat().st_size > 28e9
    code = (
        "import sys, time; from weft.cli.show import facts_of; from pathlib import Path; start = time.process_time(); "
        "facts = facts_of(Path(sys.argv[1])); print(time.process_time() - start, 'torch' in sys.modules, facts['task'])"
    )
    said = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    seconds, torch_came, task = said.split()
    assert float(seconds) < 0.5 and torch_came == "False" and task == "t2v"


# ---- Checkpoints of other programs --------------------------------------------------------------------------------


CHECKPOINTS = {
    "deepspeed": (["latest=global_step40", "global_step40/zero_pp_rank_0_mp_rank_00_optim_states.pt",
                   "global_step40/zero_pp_rank_1_mp_rank_00_optim_states.pt"],
                  {"what": "a checkpoint of DeepSpeed, cut by ZERO", "step": "40", "processes": 2}),
    "dcp": ([".metadata", "__0_0.distcp", "__1_0.distcp"], {"what": "a checkpoint of torch's DCP", "files": 2}),
    "accelerate": (["model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"],
                   {"what": "a training state of accelerate (musubi, VideoX-Fun, diffusers' scripts)"}),
    "trainer": (["trainer_state.json={\"global_step\": 30, \"epoch\": 2.0}", "model.safetensors"],
                {"what": "a checkpoint of transformers' Trainer", "step": 30}),
}  # fmt: skip


@pytest.mark.parametrize(("files", "told"), CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_a_checkpoint_of_another_program_is_named_with_what_can_be_done_with_it(
    files: list[str], told: dict[str, Any], tmp_path: Path
):
    for file in files:
        name, _, text = file.partition("=")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    facts = facts_of(tmp_path)
    assert told.items() <= facts.items() and facts["use"]


@pytest.mark.parametrize(
    ("style", "program"),
    [("comfyui", "ComfyUI"), ("musubi", "musubi"), ("videox-fun", "VideoX-Fun"), ("diffusers", "diffusers")],
)
def test_an_adapter_of_each_format_says_its_strength_and_which_program_it_is_for(
    style: str, program: str, tmp_path: Path
):
    tensors = {}
    for path in ("blocks.0.attn1.to_q", "blocks.1.ffn.net.2"):
        tensors |= {f"{path}.lora_A.weight": torch.randn(4, 8), f"{path}.lora_B.weight": torch.randn(6, 4)}
    metadata = {"weft.config": json.dumps({"name": "dog"}), "weft.step": "9", "weft.expert": "low"}
    saved = SavedAdapter(tensors, rank=4, alpha=2.0, metadata=metadata)
    facts = facts_of(plugins.find("format", style)().write(tmp_path, saved))
    assert facts["what"] == f"a LoRA in {style} format" and (facts["rank"], facts["scale"]) == (4, 0.5)
    assert facts["loaded as it is"][0].startswith(program) and facts["alpha is told"].startswith("in the file")
    assert (facts["family"], facts["expert"]) == ("wan", "low noise")
    assert facts["targets"] == {"blocks.*.attn1.to_q": 1, "blocks.*.ffn.net.2": 1}
    assert facts["config"] == {"name": "dog"} and facts["trained with"]["step"] == "9"
    assert facts_of(tmp_path)["file"] == facts["file"]


def test_a_file_for_both_experts_says_what_each_has(tmp_path: Path):
    keys = {}
    for head, rank in (("transformer_1", 2), ("transformer_2", 4)):
        name = f"{head}.blocks.0.attn1.to_q"
        keys |= {f"{name}.lora_A.weight": torch.ones(rank, 8), f"{name}.lora_B.weight": torch.ones(8, rank)}
    save_file(keys, tmp_path / "both.safetensors")
    facts = facts_of(tmp_path / "both.safetensors")
    assert facts["what"] == "a LoRA in diffusers format, for both experts" and facts["family"] == "wan"
    assert (facts["high noise"]["rank"], facts["low noise"]["rank"]) == (2, 4)
