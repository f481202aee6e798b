"""A draft grows key by key into a run.yaml whose every line says where it comes from."""

import pytest

from weft.errors import ConfigError
from weft.importers.draft import HIDDEN, Draft
from weft.importers.flags import settings
from weft.importers.shell_words import Word
from weft.importers.values import Given, Same, Theirs, carry, drop_left
from weft.importers.writing import checked, story, written


def small_run() -> Draft:
    draft = Draft("somebody's trainer")
    draft.set("name", "first", of="run_name")
    draft.ask("family.source", "FILL-IN/model", "the model's folder")
    for key, value in {"family.kind": "wan", "adapter.kind": "lora", "objective.kind": "flow-matching",
                       "optimizer.kind": "adamw", "data.kind": "video"}.items():  # fmt: skip
        draft.assume(key, value, "as there")
    draft.set("data.sources", [{"path": "clips"}], of="folder", theirs="clips")
    draft.set("data.sources.0.repeats", 2, of="num_repeats")
    draft.set("data.buckets.sides", [512], of="size", note="an area", theirs=512)
    draft.set("data.buckets.frames", [33], of="frames", theirs=33)
    return draft


def theirs(**values: object) -> Theirs:
    given = {key: Given(value, f"theirs.toml:{line}") for line, (key, value) in enumerate(values.items(), start=1)}
    return Theirs(given, "somebody's trainer")


def test_dotted_keys_become_sections_and_lists():
    config = small_run().config()
    assert config["data"]["sources"] == [{"path": "clips", "repeats": 2}]
    assert config["data"]["buckets"] == {"sides": [512], "frames": [33]}


def test_a_config_that_was_taken_does_not_change_with_the_draft():
    draft = small_run()
    draft.config()["data"]["sources"].append("more")
    assert len(draft.config()["data"]["sources"]) == 1


def test_what_is_written_parses_and_says_behind_each_key_where_it_comes_from():
    text = written(small_run())
    assert checked(text).data.sources[0].repeats == 2
    lines = {line.partition(":")[0].strip(" -"): line for line in text.splitlines() if not line.startswith("#")}
    assert lines["repeats"].endswith("# num_repeats") and lines["sides"].endswith("# size 512: an area")
    assert lines["source"].endswith("# <-- FILL IN: the model's folder")
    assert all("#" in line for line in text.splitlines() if line and not line.rstrip().endswith(":"))


def test_sections_stand_in_the_order_of_a_run_with_the_kind_first():
    text = written(small_run())
    heads = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith((" ", "#"))]
    assert heads == ["family", "adapter", "objective", "optimizer", "data"]
    assert text.index("kind: wan") < text.index("source: FILL-IN")


def test_the_list_tells_each_setting_once_under_its_heading():
    draft = small_run()
    draft.drop("speed", 9, "There is no such thing.")
    draft.warn("size 512 is small.")
    lines = story(draft)
    assert lines.index("Fill in:") < lines.index("Look at:") < lines.index("Their key -> ours:")
    assert "  - speed 9: There is no such thing." in lines and "  - size 512 is small." in lines
    assert "  - size 512 -> data.buckets.sides [512]: an area" in lines
    assert [line for line in written(draft).splitlines() if "no such thing" in line] == [
        "#   - speed 9: There is no such thing."
    ]


@pytest.mark.parametrize("key", ["wandb_api_key", "hub_token", "huggingface_token", "launcher: password"])
def test_secrets_are_not_shown(key: str):
    draft = small_run()
    draft.drop(key, "hf_abcdef", "Weft keeps no keys.")
    assert "hf_abcdef" not in written(draft) and HIDDEN in written(draft)


def test_a_size_in_tokens_is_no_secret():
    draft = small_run()
    draft.drop("token_sample_size", 512, "It is not used.")
    assert "token_sample_size 512" in written(draft)


def test_a_value_that_ours_refuses_is_told_with_the_line_that_would_have_been_written():
    draft = small_run()
    draft.set("adapter.rank", 0, of="dim")
    with pytest.raises(ConfigError, match="no valid run") as refused:
        written(draft)
    assert "run.yaml:" in refused.value.problems[1] and "adapter.rank" in refused.value.problems[1]


# ---- Their settings -------------------------------------------------------------------------------------------------


def test_numbers_and_booleans_are_read_also_where_they_stand_as_text():
    given = theirs(a="1e-4", b="32", c="yes", d=0.5, e="None", f="off", g=True)
    assert (given.number("a"), given.whole("b"), given.flag("c"), given.number("d")) == (1e-4, 32, True, 0.5)
    assert given.number("e", 7) == 7 and given.flag("f") is False and given.flag("g") is True
    assert given.left == []


@pytest.mark.parametrize(("reader", "value"), [("whole", 1.5), ("number", "many"), ("number", True), ("flag", "maybe")])
def test_a_value_of_another_type_is_refused_with_its_place(reader: str, value: object):
    with pytest.raises(ConfigError, match=r"theirs.toml:1: somebody's trainer's 'a' is .* Expected was"):
        getattr(theirs(a=value), reader)("a")


def test_what_nobody_asked_for_is_reported_with_the_nearest_key_of_their_program():
    draft = small_run()
    given = theirs(rank=4, learning_rte=1, odd=2)
    carry(given, draft, [Same("rank", "adapter.rank", "whole")])
    drop_left(given, draft, {"odd": "It is odd."}, ["learning_rate"])
    told = {note.of: note.text for note in draft.notes if note.kind == "drop"}
    assert told["odd"] == "It is odd." and told["learning_rte"].endswith("Did you mean 'learning_rate'?")
    assert draft.get("adapter.rank") == 4


def test_what_was_read_without_a_word_is_told_too():
    draft = small_run()
    given = theirs(stages=1, used=2, api_key="hf_abc")
    draft.drop("used", given.whole("used"), "It is told of.")
    assert given.whole("stages") == 1 and given.text("api_key")
    drop_left(given, draft, {}, [])
    assert [(note.of, note.theirs) for note in draft.notes if note.kind == "same"] == [
        ("stages", 1), ("api_key", HIDDEN),
    ]  # fmt: skip
    assert story(draft)[-1] == f"  - stages 1, api_key {HIDDEN}"


def test_settings_of_which_the_same_is_told_share_a_sentence():
    draft = small_run()
    for key in ("min_ar", "max_ar"):
        draft.drop(key, 2, "Clips keep their ratio.")
    assert "  - min_ar 2, max_ar 2: Clips keep their ratio." in story(draft)


# ---- Command lines --------------------------------------------------------------------------------------------------


def flags(line: str) -> dict[str, object]:
    arity = {"dim": "one", "args": "many", "fast": "flag", "mean": "one", "sample_steps": "one"}
    found = settings([Word(text, 1) for text in line.split()], arity, "a trainer", "train.sh")  # type: ignore[arg-type]
    return {key: given.value for key, given in found.given.items()}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--dim 4 --fast", {"dim": "4", "fast": True}),
        ("--dim=4 --args a=1 b=2 --fast", {"dim": "4", "args": ["a=1", "b=2"], "fast": True}),
        ("--mean -6.0", {"mean": "-6.0"}),
        ("--dim 4 --dim 8", {"dim": "8"}),
        ("--sample-steps 3", {"sample_steps": "3"}),
        ("--samp 3", {"sample_steps": "3"}),  # argparse takes the beginning of a name
        ("--new 1 2 --fast", {"new": ["1", "2"], "fast": True}),
    ],
)
def test_flags_are_read_as_argparse_reads_them(line: str, expected: dict[str, object]):
    assert flags(line) == expected


@pytest.mark.parametrize(
    ("line", "said"), [("--dim --fast", "--dim takes a value"), ("--fast 3", "'3' stands behind no flag that takes it")]
)
def test_a_flag_without_its_value_and_a_value_without_its_flag_are_refused(line: str, said: str):
    with pytest.raises(ConfigError, match=f"train.sh:1: .*{said}"):
        flags(line)
