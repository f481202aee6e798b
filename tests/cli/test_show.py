"""`weft show` reads headers and small files, and says what lies at a path."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import weft
from tests.families import networks, official
from tests.small import make_qwen3
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
    assert (facts["names"], facts["width"], facts["blocks"]) == ("of the makers", 5120, 40)


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
