"""Chat data as a run uses it: surveyed, kept as tokens, drawn in an order that no number of processes changes."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.chats import GEMMA, QWEN3, Spoken, says, talk, tokenizer
from tests.multi import spawn
from weft.contracts import UNLEARNED, Batch
from weft.data import tokens
from weft.data.chat import ChatData
from weft.data.chat_loader import ChatDataset
from weft.data.chat_survey import ChatSurvey
from weft.errors import ConfigError, DataError
from weft.events import Event, Notice, PhaseStarted

REAL = Path(__file__).parents[2] / ".." / "shared" / "data" / "chat"


def write(path: Path, conversations: list[list[dict[str, Any]]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps({'messages': said})}\n" for said in conversations))
    return path


def forty(folder: Path) -> Path:
    return write(folder / "chats.jsonl", [talk(1 + i % 3, seed=i) for i in range(40)])


def section(path: Path, **fields: Any) -> ChatData:
    plain = {"sources": [{"path": path}], "length": 256, "cache_folder": path.parent / "cache", "batch_size": 2}
    return ChatData.model_validate({**plain, **fields})


def surveyed(data: ChatData, family: Spoken | None = None, heard: list[Event] | None = None) -> ChatSurvey:
    return data.survey(family or Spoken(), (heard if heard is not None else []).append)


def opened(data: ChatData, **more: Any) -> ChatDataset:
    return data.open(surveyed(data), lambda event: None, seed=more.get("seed", 11), last_step=100)


def drawn(dataset: ChatDataset, start: int, count: int, rank: int = 0, world: int = 1) -> list[Batch]:
    return list(islice(dataset.train.batches(start, rank, world), count))


def equal(one: Batch, other: Batch) -> bool:
    return one.keys == other.keys and all(torch.equal(one[name], other[name]) for name in one.tensors)


@pytest.mark.parametrize("fields", [{}, {"pack": False}], ids=["packed", "alone"])
def test_an_epoch_trains_on_every_conversation_once(tmp_path, fields):
    dataset = opened(section(forty(tmp_path), **fields))
    epoch = drawn(dataset, 0, dataset.train.epoch_draws)
    assert Counter(key for batch in epoch for key in batch.keys) == {
        f"{tmp_path.name}/chats.jsonl:{n}": 1 for n in range(1, 41)
    }
    learned = sum(int((batch["labels"] != UNLEARNED).sum()) for batch in epoch)
    assert learned == dataset.survey.learned == sum(
        len(tokenizer()(f"{message['content']}<|im_end|>")["input_ids"])
        for i in range(40) for message in talk(1 + i % 3, seed=i) if message["role"] == "assistant"
    )  # fmt: skip


def test_what_is_learned_are_the_answers_and_their_ends(tmp_path):
    batch = drawn(opened(section(write(tmp_path / "a.jsonl", [talk(2)]))), 0, 1)[0]
    labels = batch["labels"][batch["labels"] != UNLEARNED]
    assert tokenizer().decode(labels) == "answer 0.0: !<|im_end|>answer 0.1: !<|im_end|>"
    assert batch["ids"].shape == batch["positions"].shape == batch["labels"].shape == (1, 256)


@pytest.mark.parametrize("fields", [{}, {"pack": False}, {"shuffle": False}], ids=["packed", "alone", "in order"])
def test_ranks_draw_what_one_process_draws_and_so_does_a_restart(tmp_path, fields):
    data = section(forty(tmp_path), **fields)
    dataset = opened(data)
    whole = drawn(dataset, 0, 24)
    for rank in (0, 1):
        assert all(map(equal, whole[rank::2], drawn(dataset, 0, 12, rank, 2)))
    assert all(map(equal, whole[15:], drawn(opened(data), 15, 9)))
    assert all(map(equal, whole[7::3], drawn(opened(data), 6, 6, 1, 3)))
    assert dataset.train.position(15) == {}


def test_tokens_are_made_once_and_memory_and_disk_give_the_same(tmp_path):
    data, heard, again = section(forty(tmp_path)), [], []
    first, second = surveyed(data, heard=heard), surveyed(data, heard=again)
    assert [event.total for event in heard if isinstance(event, PhaseStarted)] == [40] and again == []
    memory = surveyed(data.model_copy(update={"cache": "memory"}))
    assert first.digest() == second.digest() == memory.digest()
    assert isinstance(second.train.corpora[0].ids, tokens.numpy.memmap)
    other = data.model_copy(update={"cache": "memory"})
    assert all(map(equal, drawn(opened(data), 0, 9), drawn(opened(other), 0, 9)))


def test_what_changes_the_tokens_makes_them_anew(tmp_path):
    data, entries = section(forty(tmp_path)), lambda: len(list((tmp_path / "cache" / "tokens").glob("*/*")))
    surveyed(data)
    template = tmp_path / "other.jinja"
    template.write_text("{% for message in messages %}{{ message.role + message.content + eos_token }}{% endfor %}")
    for number, change in enumerate(({"learn": "last"}, {"system": "Be short."}, {"template": template}), start=2):
        surveyed(data.model_copy(update=change))
        assert entries() == number
    surveyed(data, Spoken(GEMMA))
    write(tmp_path / "chats.jsonl", [talk(1)])
    assert len(surveyed(data).train) == 1 and entries() == 6
    surveyed(data.model_copy(update={"length": 128, "batch_size": 7, "shuffle": False}))
    assert entries() == 6


def test_a_damaged_entry_is_made_anew(tmp_path):
    data = section(forty(tmp_path))
    digest = surveyed(data).digest()
    (ids,) = (tmp_path / "cache").rglob("ids.bin")
    content = bytearray(ids.read_bytes())
    content[100] ^= 1
    ids.write_bytes(content)
    assert surveyed(data).digest() == digest
    (index,) = (tmp_path / "cache").rglob("index.json")
    index.write_text(index.read_text().replace('"keys"', '"keis"'))
    assert surveyed(data).digest() == digest


def survey_and_draw(path: str) -> tuple[int, list[Any]]:
    """On one rank: how often tokens were made, and the first draws."""
    heard: list[Event] = []
    data = section(Path(path))
    survey = data.survey(Spoken(), heard.append)
    batches = drawn(data.open(survey, heard.append, seed=1, last_step=1), 0, 3)
    return sum(isinstance(event, PhaseStarted) for event in heard), [batch["ids"] for batch in batches]


def test_of_two_processes_that_start_at_once_one_makes_the_tokens(tmp_path):
    results = spawn(2, survey_and_draw, str(forty(tmp_path)))
    assert sum(made for made, _ in results) == 1
    assert all(torch.equal(one, other) for one, other in zip(results[0][1], results[1][1], strict=True))
    assert not list(tmp_path.rglob("*.claim"))


@pytest.mark.slow
def test_many_rows_are_tokenised_by_several_processes_in_the_same_order(tmp_path, monkeypatch):
    data = section(write(tmp_path / "a.jsonl", [talk(1, seed=i) for i in range(700)]), cache="memory", workers=2)
    alone = surveyed(data.model_copy(update={"workers": 1}))
    monkeypatch.setattr(tokens, "ROWS_ALONE", 256)
    together = surveyed(data)
    assert together.digest() == alone.digest() and together.train.corpora[0].keys == alone.train.corpora[0].keys


def test_validation_is_held_out_by_what_is_said_and_has_one_text_in_a_row(tmp_path):
    path = forty(tmp_path)
    data = section(path, validation_items=5)
    held = {surveyed(data).validation.text(i).digest for i in range(5)}
    lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({"messages": talk(1, seed=99)}), *reversed(lines)]))
    moved = surveyed(data)
    assert len(held & set(moved.validation.digests())) >= 4 and not held & set(moved.train.digests()) - held
    assert set(moved.validation.digests()).isdisjoint(moved.train.digests())
    batches, failed = opened(data).validation()
    assert failed == [] and sum(len(batch.keys) for batch in batches) == 5
    assert all(len(batch.keys) == len(batch["ids"]) and (batch["positions"][:, 0] == 0).all() for batch in batches)
    again, _ = opened(data).validation()
    assert all(map(equal, batches, again))


def test_validation_sources_that_are_trained_on_are_told(tmp_path):
    path = forty(tmp_path)
    other = write(tmp_path / "held.jsonl", [talk(1, seed=0), talk(2, seed=77)])
    survey = surveyed(section(path, validation_sources=[{"path": other}]))
    assert (
        len(survey.validation) == 2 and "1 conversations of data.validation_sources are trained on" in survey.notices[0]
    )


def test_shares_part_the_conversations_and_leave_validation_alike(tmp_path):
    data = section(forty(tmp_path), validation_items=4)
    parts = [surveyed(data.model_copy(update={"share": (i, 3)})) for i in range(3)]
    digests = [set(part.train.digests()) for part in parts]
    assert set.union(*digests) == set(surveyed(data).train.digests()) and sum(map(len, digests)) == 36
    assert len({tuple(part.validation.digests()) for part in parts}) == 1


def test_too_long_conversations_are_dropped_cut_or_refused_as_told(tmp_path):
    long = [says("user", "tell"), says("assistant", "x" * 300), says("user", "more"), says("assistant", "y")]
    asked = [says("user", "z" * 300), says("assistant", "short")]
    data = section(write(tmp_path / "a.jsonl", [long, asked, talk(1)]), length=200)
    dropped = surveyed(data)
    assert len(dropped.train) == 1 and dropped.dropped == (("too long", 2),)
    cut = surveyed(data.model_copy(update={"truncate": "cut_end"}))
    assert cut.cut == 1 and dict(cut.dropped) == {"with nothing to learn": 1}  # the question alone fills the row
    assert sorted(cut.train.lengths.tolist())[-1] == 200
    with pytest.raises(DataError, match=r"2 texts are longer than data\.length"):
        surveyed(data.model_copy(update={"truncate": "error"})).refuse_when_unusable(0)


def test_rows_beyond_the_budget_refuse_the_run_and_name_file_and_line(tmp_path):
    path = write(tmp_path / "a.jsonl", [talk(1), [says("usr", "secret words")], talk(1)])
    survey = surveyed(section(path))
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: message 1 has the role 'usr'") as refused:
        survey.refuse_when_unusable(0)
    assert "secret" not in str(refused.value)
    survey.refuse_when_unusable(1)
    assert len(survey.train) == 2


def test_a_length_that_the_model_was_not_made_for_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.length: 256 tokens are more than the 128"):
        surveyed(section(forty(tmp_path)), Spoken(context=128))


def test_the_survey_says_what_an_epoch_is_made_of(tmp_path):
    thoughtful = [says("user", "a"), says("assistant", "b", reasoning_content="c")]
    survey = surveyed(section(write(tmp_path / "a.jsonl", [thoughtful * 2, talk(1)])), Spoken(QWEN3))
    text = "\n".join(survey.lines())
    assert "2 conversations in 3 texts; none is held out" in text and "1 more texts than conversations" in text
    assert f"{survey.tokens:,} tokens an epoch, of which {survey.learned / survey.tokens:.1%} are learned" in text
    assert "1 rows of 256 tokens" in text
    assert survey.epoch_draws(2) == 1 and survey.steps_per_epoch(2, 4) == 1


def test_repeats_show_a_source_more_often(tmp_path):
    one, other = (write(tmp_path / name, [talk(1, seed=i)]) for i, name in enumerate(("a.jsonl", "b.jsonl")))
    data = section(one, sources=[{"path": one, "repeats": 3}, {"path": other}], pack=False)
    keys = [key for batch in drawn(opened(data), 0, 2) for key in batch.keys]
    assert Counter(keys) == {f"{tmp_path.name}/a.jsonl:1": 3, f"{tmp_path.name}/b.jsonl:1": 1}


def test_notices_name_no_text_and_a_source_without_conversations_is_refused(tmp_path):
    heard: list[Event] = []
    bare = "{% for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}"
    data = section(forty(tmp_path))
    data.open(surveyed(data, Spoken(bare)), heard.append, seed=0, last_step=1)
    assert [event.text[:21] for event in heard if isinstance(event, Notice)] == ["In 40 of 40 texts the"]
    empty = section(write(tmp_path / "empty.jsonl", []))
    with pytest.raises(DataError, match=r"No conversation of data\.sources is left"):
        surveyed(empty).refuse_when_unusable(0)


@pytest.mark.realdata
@pytest.mark.skipif(not REAL.is_dir(), reason="no folder of real conversations beside the checkout")
def test_rows_of_real_conversations_are_more_than_95_percent_full(tmp_path):
    data = ChatData.model_validate({"sources": [{"path": REAL}], "length": 2048, "cache_folder": tmp_path})
    survey = surveyed(data)
    survey.refuse_when_unusable(0)
    assert len(survey.train) + dict(survey.dropped).get("too long", 0) == 300
    assert survey.efficiency > 0.95
