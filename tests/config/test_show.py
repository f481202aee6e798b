"""A resolved config reads back as itself, says where values come from, and is compared key by key."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.config.small import BASE, Clips, Full, Lora, Optimizer, Small, parsed
from weft.config.parse import parse
from weft.config.show import ABSENT, Change, diff, show
from weft.config.source import read_source, read_text

# Texts that YAML 1.1, YAML 1.2 or our own rules would take for something else, and all sorts of others.
odd = """off yes true null ~ 1e-4 1_000 0x1 .inf 1:30 2024-01-01 << = - ? a:b #x 'q' "q" {x [y *z &w !t %d @e `f ,"""
spaced = ["", " ", "a\nb", "a\n\n\tb ", "\x85", "\u2028", "a #b", "x: y"]
texts = st.text(max_size=12) | st.sampled_from(odd.split() + spaced)
finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=1e-300, max_value=1e300)
values = st.none() | st.booleans() | st.integers() | finite | texts
nested = (
    values | st.lists(values, max_size=3) | st.dictionaries(texts, values | st.lists(values, max_size=2), max_size=3)
)
paths = st.sampled_from(["a", "a b", "C:/x", "x: y", "../é", "1", "off"])
adapters = st.builds(
    Lora, rank=st.integers(1, 10**30), alpha=st.none() | finite, targets=texts | st.lists(texts, max_size=3)
) | st.builds(Full, blocks=st.integers())
configs = st.builds(
    Small,
    name=texts,
    adapter=adapters,
    optimizer=st.builds(
        Optimizer, lr=positive, betas=st.tuples(finite, finite), args=st.dictionaries(texts, nested, max_size=3)
    ),
    sources=st.lists(st.builds(Clips, path=paths, repeats=st.integers(1, 9)), max_size=3),
    cache=st.sampled_from(["disk", "memory", "off"]),
    times=st.lists(finite, max_size=3),
    steps=st.integers() | st.just("auto"),
)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(configs)
def test_a_shown_config_reads_back_as_itself_with_and_without_origins(config: Small):
    assert parse(Small, read_text(show(config))) == config
    assert parse(Small, read_text(show(config, read_text("name: x")))) == config


def test_each_value_says_where_it_comes_from(tmp_path):
    (tmp_path / "base.yaml").write_text("optimizer: {lr: 1e-3}\n")
    file = tmp_path / "run.yaml"
    file.write_text(BASE + "extends: base.yaml\ntimes: [0.1, 0.2]\nsources:\n  - path: x\n")
    source = read_source(file, ["adapter.rank=4"])
    shown = show(parse(Small, source), source)
    origin = {line.split(":")[0].strip(" -"): line.partition("  # ")[2].strip() for line in shown.splitlines()}
    assert origin["rank"] == "(command line)"
    assert origin["lr"].endswith("base.yaml:1:13")
    assert origin["times"].endswith("run.yaml:4:1")
    assert origin["path"].endswith("run.yaml:6:5")
    assert origin["alpha"] == origin["repeats"] == origin["cache"] == "default"


def test_a_difference_names_the_key_and_both_values():
    old = parsed(BASE + "times: [0.1, 0.2]\n").model_dump(mode="json")
    new = parsed("name: second\nadapter: {kind: full}\ntimes: [0.1, 0.3]\n").model_dump(mode="json")
    changes = diff(old, new)
    assert Change("name", "first", "second") in changes
    assert Change("times.1", 0.2, 0.3) in changes
    assert Change("adapter.rank", 16, ABSENT) in changes
    assert str(changes[0]) == "name: first -> second"
    assert diff(old, old) == []
