"""The documents say what is there: files, commands, links, keys, and examples that run."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.small import make_clips
from weft import plugins
from weft.cli.main import SUMMARIES, main
from weft.config.explain import explain
from weft.run.config import RunConfig, load_config

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "src" / "weft"
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("examples/**/*.md"))]
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)


def anchor(heading: str) -> str:
    """A heading as the page's own links name it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_readmes_tree_is_that_of_the_files_with_a_sentence_for_each():
    written = runpy.run_path(str(ROOT / "docs" / "readme_tree.py"))
    printed = written["printed"]((ROOT / "README.md").read_text("utf-8"))
    paths = [path.relative_to(HOUSE) for path in HOUSE.rglob("*.py")]
    there = {path.as_posix() for path in paths if path.name != "__init__.py" or path.parent == Path()}
    assert sorted(printed) == sorted(there) and all(printed.values())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_in_a_document_exists(document: Path):
    code = " ".join(CODE.findall(document.read_text("utf-8")))
    verbs = set(re.findall(r"\bweft ([a-z]+)\b", code))
    planned = set(SUMMARIES) - set(plugins.BUILT_IN["verb"])
    assert verbs <= {*plugins.BUILT_IN["verb"], *planned}
    asked = re.findall(r"weft config explain ([a-z][\w.]+)", code)
    assert all(explain(RunConfig, path) for path in asked)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_and_a_heading(document: Path):
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", document.read_text("utf-8"))):
        path, _, heading = link.partition("#")
        if path.startswith("https://"):
            continue
        target = (document.parent / path).resolve() if path else document
        headings = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.MULTILINE) if heading else []
        if not target.exists() or (heading and heading not in map(anchor, headings)):
            lost.append(link)
    assert lost == []


def test_the_config_reference_is_current():
    # To renew it: python docs/config_reference.py
    written = runpy.run_path(str(ROOT / "docs" / "config_reference.py"))
    text = (ROOT / "docs" / "config.md").read_text("utf-8")
    assert written["renewed"](text) == text


def test_the_readme_starts_with_two_lines_and_continuous_integration_runs_the_second():
    start = (ROOT / "README.md").read_text("utf-8").partition("## Start")[2].partition("\n## ")[0]
    first, second = re.findall(r"```bash\n(.+)\n```", start)
    assert first == "pip install '.[video]' && weft demo"
    assert second == "pip install '.[video,test]' && pytest -n 2 --dist loadfile"
    ci = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
    assert ci[-1] == second


def test_the_readmes_three_mistakes_are_answered_as_it_says(tmp_path, monkeypatch, capsys):
    text = (ROOT / "README.md").read_text("utf-8")
    config = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0]
    answer = re.findall(r"\$ weft plan typo.yaml\n(.*?)```", text, re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    Path("typo.yaml").write_text(config)
    assert main(["plan", "typo.yaml"]) == 2
    assert capsys.readouterr().err == answer


def test_the_example_without_the_loop_learns(tmp_path, monkeypatch, capsys):
    script = str(ROOT / "examples" / "by_hand" / "train.py")
    monkeypatch.setattr(sys, "argv", [script, "--steps", "6", "--out", str(tmp_path)])
    runpy.run_path(script, run_name="__main__")
    before, after = re.findall(r"validation loss ([\d.]+) -> ([\d.]+)", capsys.readouterr().out)[0]
    assert float(after) < float(before)
    assert main(["show", str(tmp_path)]) == 0


def test_the_example_with_a_config_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clips = make_clips(tmp_path / "clips")
    folder = ROOT / "examples" / "video-lora"
    assert load_config(folder / "run.yaml").adapter.rank == 32
    short = ["schedule.steps=2", "schedule.warmup=1", "samples.steps=2", f"data.sources.0.path={clips}"]
    assert main(["train", str(folder / "tiny.yaml"), *short]) == 0
    assert (tmp_path / "runs" / "video-lora-tiny" / "adapter" / "adapter_config.json").is_file()
