"""A language model from chat data to an adapter that PEFT loads and generates with."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.small import config_of, make_qwen3, merged
from weft.errors import ConfigError
from weft.events import Evaluated, Event, StepEnded
from weft.run.start import train_run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    make_qwen3(root / "model", layers=2)
    chats = [
        [{"role": "user", "content": f"say {word} {n}"},
         {"role": "assistant", "content": " ".join([word] * (n % 7 + 2))}]
        for n, word in enumerate(["red", "blue", "green", "ring", "square"] * 12)
    ]  # fmt: skip
    (root / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return root


@pytest.fixture
def plain(world: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "name": "chat", "output": str(tmp_path / "runs"), "seed": 3,
        "family": {"kind": "causal-lm", "source": str(world / "model")},
        "adapter": {"kind": "lora", "rank": 8, "targets": "all"},
        "objective": {"kind": "next-token"},
        "optimizer": {"kind": "adamw", "lr": 2e-2},
        "data": {"kind": "chat", "sources": [{"path": str(world / "chats.jsonl")}], "length": 256,
                 "validation_items": 6, "cache_folder": str(world / "cache")},
        "engine": {"device": "cpu"},
        "schedule": {"steps": 8, "accumulate": 2, "warmup": 1},
        "save": {"every": 4}, "validation": {"every": 4},
        "samples": {"prompts": ["say red 3"], "tokens": 6},
    }  # fmt: skip


def run(plain: dict[str, Any], **change: Any) -> tuple[Any, list[Event]]:
    heard: list[Event] = []
    return train_run(config_of(merged(plain, change)), heard.append), heard


def test_a_language_model_learns_and_its_adapter_generates_the_same_in_peft(world, plain, tmp_path) -> None:
    result, heard = run(plain)
    first, *_, last = [event for event in heard if isinstance(event, Evaluated)]
    assert (first.loss, first.items, first.by_time) == (pytest.approx(first.baseline), 6, {})
    assert last.loss is not None and first.loss is not None and last.loss < 0.8 * first.loss
    assert sorted(p.name for p in result.adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    written = (result.folder / "samples" / "step_000008" / "00.txt").read_text()
    base = AutoModelForCausalLM.from_pretrained(world / "model")
    theirs = PeftModel.from_pretrained(base, result.adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "say red 3"}], add_generation_prompt=True,
                                          return_tensors="pt", return_dict=True)  # fmt: skip
    with torch.no_grad():
        made = theirs.generate(**asked, max_new_tokens=6, do_sample=False, pad_token_id=0)
    reply = tokenizer.decode(made[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    assert written == f"say red 3\n\n---\n\n{reply}\n"


def test_a_resumed_run_repeats_the_unbroken_one_to_the_bit(plain) -> None:
    whole, heard = run(plain, name="whole")
    done = iter([False] * 5 + [True])
    train_run(config_of({**plain, "name": "parts"}), lambda event: None, lambda: next(done))
    parts, rest = run(plain, name="parts")
    losses = [e.metrics["train/loss"] for e in heard if isinstance(e, StepEnded)]
    assert [e.metrics["train/loss"] for e in rest if isinstance(e, StepEnded)] == losses[5:]
    one, other = (load_file(each.adapter / "adapter_model.safetensors") for each in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_streamed_run_goes_on_where_it_was(world, plain) -> None:
    source = {"path": str(world / "chats.jsonl"), "streaming": True}
    streamed = merged(plain, {"data": {"sources": [source], "validation_items": 0}, "samples": {"prompts": []}})
    _, heard = run(streamed, name="stream")
    done = iter([False] * 3 + [True])
    train_run(config_of({**streamed, "name": "stream-parts"}), lambda event: None, lambda: next(done))
    _, rest = run(streamed, name="stream-parts")
    steps = [(e.keys, e.metrics["train/loss"]) for e in heard if isinstance(e, StepEnded)]
    assert [(e.keys, e.metrics["train/loss"]) for e in rest if isinstance(e, StepEnded)] == steps[3:]


def test_checkpoints_come_with_epochs_and_the_best_is_kept(plain) -> None:
    result, heard = run(
        {**plain, "schedule": {"epochs": 3}}, name="epochs", optimizer={"lr": 0.5},
        save={"every": 0, "every_epochs": 1, "keep": 1, "keep_best": 1}, samples={"prompts": []},
    )  # fmt: skip
    losses = {e.step: e.loss for e in heard if isinstance(e, Evaluated)}
    saved = sorted(int(p.name.rpartition("_")[2]) for p in (result.folder / "checkpoints").iterdir())
    epoch = result.step // 3
    best = min((step for step in losses if step and step % epoch == 0), key=lambda step: losses[step])
    assert saved == sorted({best, result.step})


def test_a_text_model_refuses_what_is_for_video_and_names_what_fits(plain) -> None:
    with pytest.raises(ConfigError, match=r"objective.kind: 'flow-matching' is for video models.*next-token"):
        config_of(merged(plain, {"objective": {"kind": "flow-matching"}}))
    with pytest.raises(ConfigError, match=r"save.formats: .* on a text model is written as peft, not as diffusers"):
        config_of(merged(plain, {"save": {"formats": ["diffusers"]}}))
