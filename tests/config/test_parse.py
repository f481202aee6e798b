"""Every error of a config is one sentence with its place, what was wrong, what was expected, what to do."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.config.small import BASE, Small, parsed, problems
from weft.config.parse import parse
from weft.config.source import read_text
from weft.errors import ConfigError


def test_three_typos_are_answered_in_one_go_sorted_by_place():
    text = "nmae: x\nadapter:\n  kind: lora\n  rnak: 3\noptimizer: {lr: fast}\n"
    assert problems(text) == [
        "run.yaml:1:1: nmae: unknown key. Did you mean 'name'?",
        "run.yaml:4:3: adapter.rnak: unknown key. Did you mean 'rank'?",
        "run.yaml:5:13: optimizer.lr: expected a number above 0, got 'fast'.",
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lr: 3", "lr: unknown key. Write it as optimizer.lr."),
        ("repeats: 3", "repeats: unknown key. Write it as sources.0.repeats."),
        ("optimizer: {learning_rate: 1}", "unknown key. This is most trainers' name of optimizer.lr."),
        ("network_dim: 3", "unknown key. This is musubi-tuner's and kohya's name of adapter.rank."),
        ("optimizer: {lr: 0}", "expected a number above 0, got 0."),
        ("optimizer: {betas: [0.9]}", "expected a list of 2: a number, a number, got [0.9]."),
        ("optimizer: 3", "expected a section with keys (lr, betas, args, ...), got 3."),
        ("optimizer:", "this section is empty. Indent its keys below it, or take the line out."),
        ("warmup: 1.5", "expected a whole number of at least 0, got 1.5."),
        ("warmup: -1", "expected a whole number of at least 0, got -1."),
        ("warmup: true", "expected a whole number of at least 0, got true."),
        ("warmup:", "got null. Give it a value, or take the line out for the default."),
        ("warmup: 13", "run.yaml:3:1: warmup is 13, and that is no number for a warm-up. Choose another."),
        ("cache: of", "cache: 'of' is no choice. Did you mean 'off'? There are: disk, memory, off."),
        ("times: 0.5", "expected a list, each item a number, got 0.5. Write [0.5]."),
        ("times: [0.1, x]", "times.1: expected a number, got 'x'."),
        ("steps: 0.5", "expected a whole number or 'auto', got 0.5."),
        ("steps: autp", "'autp' is no choice. Did you mean 'auto'?"),
        ("compile: atuo", "is no choice. Did you mean 'auto'?"),
        ("compile: yes", "Write true."),
        ("sources: {path: x}", "Begin its first line with '- '."),
        ("sources: [{pth: x}]", "sources.0.pth: unknown key."),
        (
            "sources: [{repeats: 1}]",
            "sources.0.path: this key is missing. Write it under 'sources.0', such as 'path: ...'",
        ),
    ],
)
def test_a_mistake_is_answered_with_what_to_do(line: str, said: str):
    found = problems(BASE + line + "\n")
    assert len(found) == 1 and said in found[0] and found[0].startswith("run.yaml:3:"), found


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ("{rank: 3}", "adapter.kind: this key is missing. Write, for example, 'kind: lora'. There are: lora, full."),
        ("{kind: loar}", "adapter.kind: there is no 'loar'. Did you mean 'lora'? There are: lora, full."),
        ("lora", "got 'lora'. Write {kind: lora}."),
        ("{kind: full, rank: 3}", "adapter.rank: unknown key. It belongs to kind 'lora', and this is kind 'full'."),
        ("{kind: lora, dora: yes}", "adapter.dora: expected true or false, got 'yes'. Write true."),
        ("{kind: lora, dora: 0}", "adapter.dora: expected true or false, got 0. Write false."),
        ("{kind: lora, targets: 3}", 'expected text or a list, each item text, got 3. Put it in quotes: "3".'),
        ("{kind: lora, targets: [a, 1]}", 'adapter.targets.1: expected text, got 1. Put it in quotes: "1".'),
    ],
)
def test_a_mistake_within_a_choice_is_answered_too(adapter: str, said: str):
    found = problems(f"name: first\nadapter: {adapter}\n")
    assert len(found) == 1 and said in found[0] and found[0].startswith("run.yaml:2:"), found


def test_missing_keys_say_where_they_should_stand():
    assert problems("") == [
        "run.yaml:1:1: name: this key is missing. Write it at the left margin, such as 'name: ...'.",
        "run.yaml:1:1: adapter: this key is missing. Write it at the left margin, such as 'adapter: {kind: lora}'.",
    ]


def test_problems_of_the_command_line_stand_last_and_say_so():
    found = problems(BASE + "cache: x\n", "adapter.rank=0", "adaptr.rank=3")
    assert [problem.split(":")[0] for problem in found] == ["run.yaml", "(command line)", "(command line)"]
    assert "adaptr: unknown key. Did you mean 'adapter'?" in "\n".join(found)


def test_long_values_are_cut_and_secrets_are_hidden():
    (long,) = problems(BASE + f"warmup: {'x' * 500}\n")
    assert "xxx…" in long and len(long) < 200
    (hidden,) = problems(BASE + "token: [hunter2]\n")
    assert hidden == "run.yaml:3:1: token: expected text, got (hidden)."


def test_off_is_text_where_text_is_meant():
    assert parsed(BASE + "cache: off\n").cache == "off"


def test_numbers_may_be_written_as_one_writes_them():
    config = parsed(BASE + "optimizer: {lr: 1e-4}\nwarmup: 1_0\n", "steps=1e3")
    assert (config.optimizer.lr, config.warmup, config.steps) == (1e-4, 10, 1000)


scalars = st.sampled_from([None, True, 0, 1, -1, 0.5, 1e400, "", "lora", "auto", "x y"])
flat = scalars | st.lists(scalars, max_size=2)
plain = flat | st.dictionaries(st.sampled_from(["kind", "lr", "path", "rank", "betas", "x"]), flat, max_size=3)
plain = plain | st.lists(plain, max_size=2)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from([*Small.model_fields, "nmae"]), plain, max_size=4))
def test_no_data_at_all_leads_to_anything_but_a_config_or_sentences(data: dict):
    source = read_text("", "run.yaml")
    try:
        parse(Small, type(source)(data, source.places, "run.yaml"))
    except ConfigError as error:
        assert all(problem.startswith("run.yaml") and "\n" not in problem for problem in error.problems)


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("true", True), ("false", False)])
def test_a_switch_that_may_be_left_to_weft_takes_its_word_and_both_truths(text: str, value: object):
    assert parsed(f"{BASE}compile: {text}\n").compile == value
