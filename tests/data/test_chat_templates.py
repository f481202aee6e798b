"""Which tokens are learned: what the assistant says and the end of its turn, behind the prompt that it answers."""

import pytest

from tests.data.chats import CHATML, CHATML_MARKED, GEMMA, LLAMA3, MISTRAL, QWEN3, R1, says, talk, tokenizer
from weft.data.conversations import Conversation, Unfit
from weft.data.templates import Encoded, Learn, Template
from weft.errors import ConfigError

THREE_TURNS = talk(3, seed=2)
THOUGHTFUL = [
    says("user", "one?"), says("assistant", "1", reasoning_content="first thought"),
    says("user", "two?"), says("assistant", "2", reasoning_content="second thought"),
]  # fmt: skip
SYSTEM = says("system", "Be short.")


def encoded(source: str, messages: list, learn: Learn = "assistant", tools: list | None = None) -> list[Encoded]:
    template = Template(tokenizer(source), None, learn)
    return template.encoded(template.rendered(Conversation(tuple(messages), tools)))


def stretches(text: Encoded) -> list[tuple[int, int]]:
    """[first, behind the last) of every stretch of tokens that is learned."""
    edges = [i for i in range(len(text.ids) + 1)
             if (i > 0 and bool(text.learned[i - 1])) != (i < len(text.ids) and bool(text.learned[i]))]  # fmt: skip
    return list(zip(edges[::2], edges[1::2], strict=True))


def learned(source: str, texts: list[Encoded]) -> list[list[str]]:
    """What is learned of each text, in words."""
    words = tokenizer(source)
    return [[words.decode(text.ids[a:b]) for a, b in stretches(text)] for text in texts]


ANSWERS = ["answer 2.0: éé!", "answer 2.1: éé!", "answer 2.2: éé!"]


@pytest.mark.parametrize(
    ("source", "end"), [(CHATML, "<|im_end|>"), (CHATML_MARKED, "<|im_end|>"), (LLAMA3, "<|eot_id|>"),
                        (GEMMA, "<end_of_turn>"), (R1, "</s>")],
    ids=["chatml", "chatml-marked", "llama3", "gemma", "r1"],
)  # fmt: skip
def test_every_answer_is_learned_with_the_token_that_ends_it_and_nothing_else(source, end):
    assert learned(source, encoded(source, THREE_TURNS)) == [[answer + end for answer in ANSWERS]]


def test_mistrals_answers_are_learned_from_their_leading_space_to_the_end_of_the_sequence():
    assert learned(MISTRAL, encoded(MISTRAL, THREE_TURNS)) == [[f" {answer}</s>" for answer in ANSWERS]]


def test_a_system_prompt_that_moves_to_the_last_question_makes_a_text_of_each_turn():
    texts = encoded(MISTRAL, [SYSTEM, *THREE_TURNS])
    assert learned(MISTRAL, texts) == [[f" {answer}</s>"] for answer in ANSWERS]
    words = tokenizer(MISTRAL)
    assert words.decode(texts[1].ids).endswith(
        "[INST] question 2.0?[/INST] answer 2.0: éé!</s>[INST] Be short.\n\nquestion 2.1?[/INST] answer 2.1: éé!</s>"
    )


def test_thoughts_that_later_turns_take_away_are_learned_in_a_text_of_their_own():
    assert learned(QWEN3, encoded(QWEN3, THOUGHTFUL)) == [
        ["<think>\nfirst thought\n</think>\n\n1<|im_end|>"],
        ["<think>\nsecond thought\n</think>\n\n2<|im_end|>"],
    ]


def test_turns_between_tool_calls_keep_their_thoughts_and_share_a_text():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        says("user", "1+1?"), says("assistant", "", reasoning_content="call", tool_calls=[call]), says("tool", "2"),
        says("assistant", "It is 2.", reasoning_content="done"),
    ]  # fmt: skip
    assert learned(QWEN3, encoded(QWEN3, messages, tools=[{"name": "add"}])) == [
        [
            '<think>\ncall\n</think>\n\n<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>',
            "<think>\ndone\n</think>\n\nIt is 2.<|im_end|>",
        ]
    ]


def test_calls_are_learned_whole_where_a_template_joins_their_arguments_and_the_prompt_opens_a_thought():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        says("user", "1+1?"),
        {"role": "assistant", "tool_calls": [call]},
        says("user", "and?"),
        says("assistant", "<b>"),
    ]
    assert learned(R1, encoded(R1, messages)) == [['<tool>{"a": 1}</s>', "<b></s>"]]


@pytest.mark.parametrize(
    ("source", "messages"),
    [(CHATML, [SYSTEM, *THREE_TURNS]), (LLAMA3, THREE_TURNS), (MISTRAL, [SYSTEM, *THREE_TURNS]), (GEMMA, THREE_TURNS),
     (QWEN3, THOUGHTFUL), (QWEN3, THREE_TURNS)],
    ids=["chatml", "llama3", "mistral", "gemma", "qwen3", "qwen3 without thoughts"],
)  # fmt: skip
def test_each_learned_stretch_stands_behind_the_very_prompt_that_the_model_will_be_given(source, messages):
    words, found = tokenizer(source), []
    for text in encoded(source, messages):
        found += [text.ids[:a].tolist() for a, _ in stretches(text)]
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = [words.apply_chat_template(messages[:k], add_generation_prompt=True)["input_ids"] for k in turns]
    assert found == prompts


def test_marks_in_a_template_and_prefixes_of_one_without_give_the_same_mask():
    (marked,), (found,) = encoded(CHATML_MARKED, THREE_TURNS), encoded(CHATML, THREE_TURNS)
    assert marked.ids.tolist() == found.ids.tolist() and marked.learned.tolist() == found.learned.tolist()


def test_only_the_last_answer_is_learned_where_that_is_asked():
    for source in (CHATML, CHATML_MARKED):
        assert learned(source, encoded(source, THREE_TURNS, "last")) == [[f"{ANSWERS[-1]}<|im_end|>"]]


def test_everything_is_learned_where_that_is_asked():
    (text,) = encoded(CHATML, THREE_TURNS, "all")
    assert text.learned.all()


def test_a_trailing_question_without_an_answer_is_left_away():
    (text,) = encoded(CHATML, [*talk(1), says("user", "and?")])
    assert tokenizer().decode(text.ids).endswith("<|im_end|>\n") and "and?" not in tokenizer().decode(text.ids)


def test_a_plain_text_is_learned_whole_and_ended():
    template = Template(tokenizer(None), None, "assistant")
    (text,) = template.encoded(template.rendered(Conversation(text="abc")))
    assert template.tokenizer.decode(text.ids) == "abc</s>" and text.learned.all()


def test_a_template_that_refuses_a_conversation_says_why():
    with pytest.raises(Unfit, match="System role not supported"):
        encoded(GEMMA, [SYSTEM, *talk(1)])
    with pytest.raises(Unfit, match="roles must alternate"):
        encoded(MISTRAL, [*talk(1), says("assistant", "more")])


def test_a_conversation_without_an_answer_is_unfit_unless_everything_is_learned():
    with pytest.raises(Unfit, match="no turn of the assistant"):
        encoded(CHATML, [says("user", "hello?")])
    assert encoded(CHATML, [says("user", "hello?")], "all")[0].learned.all()


def test_a_template_that_writes_answers_before_their_questions_is_refused_and_not_guessed_at():
    backwards = "{% for message in messages | reverse %}{{ message.role + message.content }}{% endfor %}"
    with pytest.raises(Unfit, match="does not write message 2 behind the prompt"):
        encoded(backwards, talk(1))


def test_turns_that_end_in_no_special_token_are_told():
    bare = "{% for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}"
    (text,), (ended,) = encoded(bare, talk(1)), encoded(CHATML, talk(1))
    assert not text.stops and ended.stops


def test_a_tokenizer_without_a_template_needs_one_for_conversations():
    with pytest.raises(ConfigError, match=r"data\.template"):
        template = Template(tokenizer(None), None, "assistant")
        template.rendered(Conversation(tuple(talk(1))))
