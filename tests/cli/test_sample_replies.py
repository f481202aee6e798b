"""`weft sample` with the adapter of a language model, against transformers and PEFT."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.run.test_resume import silent
from tests.small import config_of, make_qwen3
from weft.cli.merge import run as merge
from weft.cli.sample import run
from weft.errors import ConfigError, ModelError
from weft.families.kernels import Kernels
from weft.run.apply import trained_family
from weft.run.start import train_run

GREEDY: dict[str, Any] = {"do_sample": False}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a run of one step on it whose adapter is far from nothing, and an adapter that PEFT alone wrote."""
    root = tmp_path_factory.mktemp("replies")
    make_qwen3(root / "model")
    said = [{"role": "user", "content": "say red"}, {"role": "assistant", "content": "red red red"}]
    (root / "chats.jsonl").write_text(json.dumps({"messages": said}) + "\n")
    plain = {
        "name": "chat", "output": str(root / "runs"), "family": {"kind": "causal-lm", "source": str(root / "model")},
        "adapter": {"kind": "lora", "rank": 4, "alpha": 8, "targets": "all"}, "objective": {"kind": "next-token"},
        "optimizer": {"kind": "adamw", "lr": 0.1},
        "data": {"kind": "chat", "sources": [{"path": str(root / "chats.jsonl")}], "length": 64, "cache": "memory",
                 "system": "Be brief."},
        "engine": {"device": "cpu", "precision": "fp32"}, "schedule": {"steps": 1}, "validation": {"every": 0},
        "samples": {"tokens": 7},
    }  # fmt: skip
    train_run(config_of(plain), silent)
    torch.manual_seed(0)
    bare = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(root / "model"), bare)
    model.save_pretrained(str(root / "bare"))
    return root


@pytest.fixture
def adapter(world: Path) -> str:
    return str(world / "runs" / "chat")


def by_peft(world: Path, folder: Path | None, prompt: str, system: str, tokens: int, **options: Any) -> str:
    model: Any = AutoModelForCausalLM.from_pretrained(world / "model")
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    said = [{"role": "system", "content": system}] if system else []
    asked = tokenizer.apply_chat_template(
        [*said, {"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    torch.manual_seed(5)
    made = model.eval().generate(**asked, max_new_tokens=tokens, pad_token_id=0, **options)
    return tokenizer.decode(made[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_reply_is_that_of_transformers_with_peft(world, adapter, capsys):
    assert run([adapter, "say blue"]) == 0
    theirs = by_peft(world, world / "runs/chat/adapter", "say blue", "Be brief.", 7, **GREEDY)
    assert capsys.readouterr().out == theirs + "\n"
    assert theirs != by_peft(world, None, "say blue", "Be brief.", 7, **GREEDY)


def test_replies_by_chance_are_those_of_transformers_with_peft_on_the_same_seed(world, adapter, capsys):
    chance = ["--temperature", "0.9", "--top-p", "0.8", "--seed", "5"]
    assert run([adapter, "say blue", "--system", "", "--tokens", "9", *chance]) == 0
    how = {"do_sample": True, "temperature": 0.9, "top_p": 0.8, "top_k": 0}
    theirs = by_peft(world, world / "runs/chat/adapter", "say blue", "", 9, **how)
    assert capsys.readouterr().out == theirs + "\n"


def test_strength_zero_is_the_base_that_compare_shows(world, adapter, tmp_path, capsys):
    assert run([adapter, "--strength", "0", "--prompt", "a b", "--compare", "--out", str(tmp_path / "r.jsonl")]) == 0
    base = by_peft(world, None, "a b", "Be brief.", 7, **GREEDY)
    assert capsys.readouterr().out == f"=== a b\n{base}\n\n=== a b (the base alone)\n{base}\n\n"
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert lines == [{"prompt": "a b", "adapter": used, "reply": base} for used in (True, False)]


def test_each_prompt_has_a_file_and_the_base_another(adapter, tmp_path, capsys):
    assert run([adapter, "one", "two", "--compare", "--out", str(tmp_path / "out"), "--tokens", "2"]) == 0
    names = ["00.txt", "00_base.txt", "01.txt", "01_base.txt"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    heads = [line for line in capsys.readouterr().out.splitlines() if line.startswith("=== ")]
    assert heads == ["=== one", "=== one (the base alone)", "=== two", "=== two (the base alone)"]


def test_an_adapter_of_another_program_goes_on_the_base_that_is_named(world, capsys):
    with pytest.raises(ConfigError, match=r"does not say which base .* Add --base FOLDER"):
        run([str(world / "bare"), "hello"])
    assert run([str(world / "bare"), "hello", "--base", str(world / "model"), "--tokens", "6"]) == 0
    assert capsys.readouterr().out == by_peft(world, world / "bare", "hello", "", 6, **GREEDY) + "\n"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--steps", "3", "--guidance-low", "2"], "--steps, --guidance-low: the adapter is of a language model"),
        (["--image", "x.png"], "--image: the adapter is of a language model"),
        (["--seed", "3", "--top-p", "0.5"], "--top-p, --seed: .* leaves nothing to chance. Add --temperature"),
        (["--temperature", "-1"], "--temperature: expected a number of at least 0, got -1"),
        (["--temperature", "1", "--top-p", "0"], "--top-p: expected a number above 0 and up to 1, got 0"),
        (["--tokens", "0"], "--tokens: expected a whole number of at least 1, got 0"),
        (["--tokens", "600"], "--tokens: behind 'hi' there is no room for 600 tokens in the 512"),
        (["--template", "gone.jinja"], "--template: gone.jinja cannot be read"),
    ],
)
def test_options_without_use_or_sense_are_refused_by_name(adapter, options, told):
    with pytest.raises(ConfigError, match=told):
        run([adapter, "hi", *options])


def test_a_mistyped_second_adapter_is_no_prompt_and_two_for_one_network_are_refused(world, adapter):
    with pytest.raises(ModelError, match="there is no adapter at runs/other"):
        run([adapter, "runs/other", "hi"])
    with pytest.raises(ModelError, match=r"both for the same network and of one run, .* Give one of them"):
        run([adapter, str(world / "runs/chat/global_step_1"), "hi"])
    with pytest.raises(ConfigError, match="nothing to generate"):
        run([adapter])


def test_the_average_of_two_adapters_is_written_for_peft_and_answers(world, adapter, tmp_path, capsys):
    again = str(world / "runs/chat/global_step_1")
    assert merge(["--average", adapter, again, "--out", str(tmp_path / "mean")]) == 0
    assert {p.name for p in (tmp_path / "mean").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    capsys.readouterr()
    for folder in (adapter, str(tmp_path / "mean")):  # the mean of an adapter and itself is that adapter
        assert run([folder, "say blue"]) == 0
    one, mean = capsys.readouterr().out.splitlines()
    assert one == mean
    with pytest.raises(ModelError, match="stand on other layers"):
        merge(["--average", adapter, str(world / "bare"), "--out", str(tmp_path / "other")])


def test_the_kernels_of_the_machine_that_trained_are_not_asked_of_the_one_that_samples():
    trained = {"kind": "causal-lm", "source": "model", "dtype": "bf16", "kernels": {"attention": "flash"}}
    family = trained_family({"family": trained}, None)
    assert family.kernels == Kernels() and family.dtype == "bf16"
