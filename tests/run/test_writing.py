"""How a language model is asked for replies, and what ends them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small import config_of, make_qwen3
from tests.small_text import byte_tokenizer
from weft.adapters.lora import Lora
from weft.contracts import Berth, Model
from weft.errors import ConfigError
from weft.families.causal_lm import CausalLM
from weft.run.checks import check_samples
from weft.run.config import Prompt
from weft.run.start import train_run
from weft.run.writing import Chat, Manner, chat_of, check_prompts, replies

CPU = torch.device("cpu")
ASKED = "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return CausalLM(source=str(make_qwen3(tmp_path_factory.mktemp("writing") / "model")))


@pytest.fixture(scope="module")
def model(family: Any) -> Model:
    network = family.load("fp32", "default", Berth())
    with torch.no_grad():
        network.get_input_embeddings().weight[[0, 2]] = 0  # the head's too: this model never ends by itself
    return Model(network, family, Lora(rank=2).attach(network, ["model.layers.0.self_attn.q_proj"], ("default",), 0))


def test_a_prompt_stands_in_the_template_behind_the_system_prompt():
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(Chat(tokenizer).ids("Who are you?")[0]) == ASKED
    led = tokenizer.decode(Chat(tokenizer, system="Be brief.").ids("Who are you?")[0])
    assert led == "<|im_start|>system\nBe brief.<|im_end|>\n" + ASKED


def test_without_a_template_the_model_goes_on_from_the_bare_prompt():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    assert tokenizer.decode(Chat(tokenizer).ids("Who are you?")[0]) == "Who are you?"
    assert Chat(tokenizer).ends == {2}


def test_a_reply_ends_at_the_tokenizers_own_mark_and_at_that_of_the_template():
    tokenizer = byte_tokenizer()
    assert tokenizer.convert_ids_to_tokens([0, 2]) == ["<|endoftext|>", "<|im_end|>"]
    assert Chat(tokenizer).ends == {2}
    tokenizer.eos_token = "<|endoftext|>"  # as tokenizers of base models have it
    assert Chat(tokenizer).ends == {0, 2}
    template = "{% for m in messages %}{{ m.content + '<|im_start|>' }}{% endfor %}"
    assert Chat(tokenizer, template).ends == {0, 1}


def test_a_template_that_refuses_the_system_prompt_is_told():
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    with pytest.raises(ConfigError, match="refuses the prompt, with the system prompt before it: no system role"):
        Chat(byte_tokenizer(), template, "Be brief.").ids("hi")


def test_a_token_that_ends_replies_ends_them(model: Model):
    tokenizer = byte_tokenizer()
    chat, manner = Chat(tokenizer), Manner(tokens=6)
    with torch.no_grad():
        ids = chat.ids("Who are you?")
        made = [int(model.network(input_ids=ids).logits[0, -1].argmax())]
        for _ in range(5):
            longer = torch.cat([ids, torch.tensor([made])], 1)
            made.append(int(model.network(input_ids=longer).logits[0, -1].argmax()))
    assert not set(made) & {0, 2} and made[2] not in made[:2]
    assert replies(model, chat, ["Who are you?"], manner, CPU) == [tokenizer.decode(made)]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(made[2])
    assert replies(model, Chat(tokenizer), ["Who are you?"], manner, CPU) == [tokenizer.decode(made[:2])]


def test_chance_follows_the_seed_which_counts_up_and_is_the_runs_own_no_more(model: Model):
    chat = Chat(byte_tokenizer())
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first, second = replies(model, chat, ["hi", "hi"], Manner(tokens=8, temperature=1.0, seed=3), CPU)
    assert torch.equal(torch.rand(3), expected)
    assert first != second
    assert replies(model, chat, ["hi"], Manner(tokens=8, temperature=1.0, seed=4), CPU) == [second]


def test_the_narrowest_choice_is_the_likeliest_token(model: Model):
    chat = Chat(byte_tokenizer())
    narrow = Manner(tokens=8, temperature=1.0, top_p=1e-9)
    assert replies(model, chat, ["hi"], narrow, CPU) == replies(model, chat, ["hi"], Manner(tokens=8), CPU)


def test_what_a_language_model_cannot_be_asked_is_refused(family: Any, tmp_path: Path):
    chat = chat_of(family, None, "", "data.template")
    length = chat.ids("hi").shape[1]
    check_prompts(family, chat, [Prompt(text="hi")], 512 - length, "--")
    with pytest.raises(
        ConfigError, match=rf"--tokens: .* no room for 512 tokens in the 512 .* at most {512 - length}\."
    ):
        check_prompts(family, chat, [Prompt(text="hi")], 512, "--")
    with pytest.raises(ConfigError, match=r"x\.png is a first frame, but this is a language model"):
        check_prompts(family, chat, [Prompt(text="hi", image=Path("x.png"))], 8, "--")
    with pytest.raises(ConfigError, match=r"data\.template: .*gone\.jinja cannot be read"):
        chat_of(family, tmp_path / "gone.jinja", "", "data.template")


@pytest.fixture
def plain(family: Any, tmp_path: Path) -> dict[str, Any]:
    said = [{"role": "user", "content": "say red"}, {"role": "assistant", "content": "red red red"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": said}) + "\n")
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}{{ m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}"
    )
    return {
        "name": "chat", "output": str(tmp_path / "runs"), "family": {"kind": "causal-lm", "source": family.source},
        "adapter": {"kind": "lora", "rank": 2}, "objective": {"kind": "next-token"},
        "optimizer": {"kind": "adamw", "lr": 1e-2},
        "data": {"kind": "chat", "sources": [{"path": str(tmp_path / "chats.jsonl")}], "length": 64, "cache": "memory",
                 "system": "Be brief.", "template": str(tmp_path / "own.jinja")},
        "engine": {"device": "cpu", "precision": "fp32"}, "schedule": {"steps": 1}, "validation": {"every": 0},
        "samples": {"prompts": ["say red"], "tokens": 5},
    }  # fmt: skip


def test_a_runs_samples_are_asked_as_its_conversations_ask(plain: dict[str, Any], family: Any):
    result = train_run(config_of(plain), lambda event: None)
    tokenizer = family.tokenizer()
    ids = torch.tensor([tokenizer.encode("system:Be brief.<|im_end|>user:say red<|im_end|>")])
    network: Any = family.load("fp32", "default", Berth())
    made = network.generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    reply = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    assert (result.folder / "samples" / "base" / "00.txt").read_text() == f"say red\n\n---\n\n{reply}\n"


def test_samples_for_which_there_is_no_room_are_refused_before_training(plain: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"samples\.tokens: behind 'say red' there is no room for 600 tokens"):
        check_samples(config_of(plain, samples={"tokens": 600}))
