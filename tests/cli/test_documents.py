"""Documents from the command line: init, plan and train as a user gives them, and no word of a document anywhere."""

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.run.test_command import wait_for_checkpoint
from tests.small_encoders import save_tiny_encoder
from weft.cli.main import main
from weft.errors import WeftError
from weft.run.config import load_config
from weft.run.start import train_run

CANARY = "zqcanary"  # begins every word of a text, every id and every patient here
YEARS = (2019, 2020)
LONG = {"lamaml": ("objective.order=first", "objective.inner_steps=2")}


def documents(path: Path, rows: int = 80, spoiled: str = "") -> Path:
    """A CSV whose texts, ids and patients are canaries. spoiled: what stands in one cell of the year, if anything."""
    lines = ["note_id,patient_id,year,label,text"]
    for number in range(rows):
        year, label = YEARS[number * len(YEARS) // rows], "ab"[number % 2]
        words = " ".join(f"{CANARY}{number}x{k}" for k in range(6))
        shown = spoiled if spoiled and number == 3 else year
        lines.append(f'{CANARY}id{number},{CANARY}p{number // 2},{shown},{label},"{words}, ""{CANARY}quoted"""')
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    documents(tmp_path / "notes.csv")
    return tmp_path


@pytest.fixture
def configured(here: Path, bert: Path) -> Path:
    """A folder with the configs that init writes, small and quick."""
    assert main(["init", str(bert), "--data", "notes.csv"]) == 0
    model = here / "configs" / "model.yaml"
    model.write_text(model.read_text() + "engine: {device: cpu}\nsave: {every: 0}\nvalidation: {every: 0}\n")
    return here


# ---- init ---------------------------------------------------------------------------------------------------------


def test_init_guesses_columns_by_their_names_and_experiments_by_the_years(configured, capsys):
    config = load_config(Path("lamaml_seq_2019_2020_peft"))
    data = config.data
    assert (data.text, data.label, data.year, data.group, data.id) == ("text", "label", "year", "patient_id", "note_id")
    assert (config.name, data.tasks) == ("lamaml_seq_2019_2020_peft", "2019..2020")
    assert not Path("configs/lamaml_seq_2019_2024_peft.yaml").exists()


@pytest.mark.parametrize(("header", "said", "time"), [
    ("Note Text,Diagnosis,ChartTime,subject_id", [], "ChartTime"),
    ("a,b,c,d", ["--text", "a", "--label", "b", "--date", "c", "--group", "d"], "c"),
])  # fmt: skip
def test_columns_are_known_whatever_their_capitals_or_said(here, bert, header, said, time):
    Path("other.csv").write_text(f"{header}\nwords,x,2017-03-01 10:00,p1\nwords,y,2018-01-01,p2\n")
    assert main(["init", str(bert), "--data", "other.csv", "--out", "own", *said]) == 0
    config = load_config(Path("own/replay_seq_2017_2018.yaml"))
    assert (config.data.date, config.data.year) == (time, None)
    assert config.data.group == header.split(",")[3]


def test_columns_that_are_not_known_are_asked_for_and_none_is_named(here, bert, capsys):
    Path("other.csv").write_text(f"{CANARY} one,{CANARY} two\n1,2\n")
    assert main(["init", str(bert), "--data", "other.csv"]) == 2
    said = capsys.readouterr().err
    assert "--text COLUMN" in said and CANARY not in said


@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".tsv"])
def test_init_reads_the_header_of_every_kind_of_file(here, bert, ending):
    rows = [{"text": "words", "label": "x", "year": 2017 + n, "patient": "p"} for n in range(2)]
    file = Path(f"other{ending}")
    if ending == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif ending == ".tsv":
        file.write_text("\n".join(["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]) + "\n")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), file)
    assert main(["init", str(bert), "--data", str(file)]) == 0
    assert load_config(Path("sync_seq_2017_2018")).data.group == "patient"


def test_init_overwrites_nothing(configured, bert, capsys):
    assert main(["init", str(bert), "--data", "notes.csv"]) == 2
    assert "model.yaml is already there" in capsys.readouterr().err


def test_options_of_documents_are_refused_elsewhere(here, capsys):
    assert main(["init", "wan2.1-t2v-1.3b", "--data", ".", "--label", "x"]) == 2
    assert "--label is of documents" in capsys.readouterr().err


# ---- plan and train -----------------------------------------------------------------------------------------------


def test_a_plan_counts_years_labels_splits_steps_and_parameters(configured, capsys):
    assert main(["plan", "lamaml_seq_2019_2020_peft", "--max-epochs", "2", "data.batch_size=4"]) == 0
    told = capsys.readouterr().out
    config = load_config(Path("lamaml_seq_2019_2020_peft"))
    assert "80 documents of 40 groups in 2 tasks" in told
    assert re.search(r"2019: train \d+ \(b \d+%\), validation \d+ .*, test \d+", told)
    assert f"memory of {config.data.replay.size}" in told
    assert re.search(r"2020 +\d+ +\d+ +\d+ +\d+", told)  # documents, micro-batches, steps, last step
    assert "objective lamaml costs about 9 forward and backward passes" in told
    assert re.search(r"Trainable params: [\d,]+ \|\| All params: [\d,]+ \|\| Trainable: [\d.]+%", told)
    assert "no file holds a document" in told


@pytest.mark.slow
def test_seeds_are_runs_of_their_own_and_finished_ones_are_not_trained_again(configured, capsys):
    command = ["train", "replay_seq_2019_2020_peft", "--seeds", "3,5", "--max-epochs", "1"]
    assert main(command) == 0
    runs = [Path(f"runs/replay_seq_2019_2020_peft-seed{seed}") for seed in (3, 5)]
    assert [load_config(run / "config.yaml").seed for run in runs] == [3, 5]
    steps = [(run / "events.rank0.jsonl").read_text().count('"event": "step"') for run in runs]
    assert main(command) == 0
    assert steps == [(run / "events.rank0.jsonl").read_text().count('"event": "step"') for run in runs]
    assert steps[0] > 0


@pytest.mark.slow
def test_la_maml_begins_where_traditional_training_ended(configured, capsys):
    """Row E5: with kind none by family.source, with PEFT by adapter.start_from."""
    from safetensors.torch import load_file

    own = ["--max-epochs", "1", *LONG["lamaml"], "objective.warm_up=0"]
    assert main(["train", "traditional_seq_2019_2020", "--max-epochs", "1"]) == 0
    whole = Path("runs/traditional_seq_2019_2020/adapter")
    assert main(["train", "lamaml_seq_2019_2020", f"family.source={whole}", *own]) == 0
    assert main(["train", "traditional_seq_2019_2020_peft", "--max-epochs", "1"]) == 0
    adapter = Path("runs/traditional_seq_2019_2020_peft/adapter")
    assert main(["train", "lamaml_seq_2019_2020_peft", f"adapter.start_from={adapter}", *own]) == 0
    for kind in ("", "_peft"):
        before = json.loads(Path(f"runs/traditional_seq_2019_2020{kind}/summary.json").read_text())
        after = json.loads(Path(f"runs/lamaml_seq_2019_2020{kind}/summary.json").read_text())
        # What the second run scores before its first step is what the first run scored after its last.
        ended, began = before["metrics"]["brier"]["matrix"][-1], after["metrics"]["brier"]["untrained"]
        assert began == pytest.approx(ended, abs=1e-6)
    names = load_file(adapter / "adapter_model.safetensors")
    assert any("classifier" in name for name in names)


# ---- Nobody reads a document but the model ------------------------------------------------------------------------


def artifacts(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def holders(folder: Path) -> list[Path]:
    """Files that hold a canary, or the tokens of which a text can be made again; of one that is cut off what there
    is."""
    found = []
    for path in artifacts(folder):
        if path.name in ("notes.csv", "spoiled.csv") or path.name.startswith(("tokenizer", "vocab")):
            continue
        content = path.read_bytes()
        header = content[8 : 8 + int.from_bytes(content[:8], "little")] if path.suffix == ".safetensors" else b""
        if CANARY.encode() in content or re.search(rb'["./]ids"', header):
            found.append(path)
    return found


def test_tokens_are_found_where_they_are(tmp_path):
    save_file({"0.replay/ids": torch.zeros(2, 3, dtype=torch.long)}, tmp_path / "batches.safetensors")
    save_file({"0.labels": torch.zeros(2), "bids": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\0\0")
    assert [path.name for path in holders(tmp_path)] == ["batches.safetensors"]


@pytest.mark.slow
def test_no_word_is_left_behind_by_a_run_that_is_killed_or_that_fails(configured, start, capfd):
    """A batch whose gradient is not finite would be kept, were it of clips."""
    name, saving = "replay_seq_2019_2020", ("save.every=1", "save.keep=100", "data.batch_size=8")
    process = start("train", name, "--max-epochs", "500", *saving)
    wait_for_checkpoint(Path("runs", name), process)
    process.kill()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL and CANARY not in said
    with pytest.raises(WeftError, match="not finite"):
        train_run(load_config(Path(name), ["name=wild", "optimizer.lr=1e37", *saving]), lambda event: None)
    assert len(list(Path("runs/wild/incidents").rglob("*.json"))) > 1
    assert len(list(Path("runs").rglob("*.safetensors"))) > 2 and holders(configured) == []
    assert CANARY not in "".join(capfd.readouterr())
    shutil.rmtree("runs")


@pytest.mark.slow
def test_no_word_id_or_patient_is_written_or_printed_by_any_verb(configured, bert, capfd, monkeypatch):
    """Trap 33. What is asked of the verbs is right in some runs and wrong in others."""
    monkeypatch.setenv("HF_HOME", str(configured / "hub"))
    peft, name = "replay_seq_2019_2020_peft", "runs/replay_seq_2019_2020_peft"
    documents(Path("spoiled.csv"), spoiled=f"{CANARY}year")
    other = Path("runs/lamaml_seq_2019_2020_peft")
    commands = [
        (0, ["plan", peft, "--all"]),
        (0, ["train", peft, "--max-epochs", "1", "save.every=1", "data.batch_size=8"]),
        (0, ["train", other.name, "--max-epochs", "1", "data.batch_size=8", *LONG["lamaml"]]),
        (0, ["show", f"{name}/adapter"]),
        (0, ["config", "show", f"{name}/config.yaml"]),
        (0, ["compare", name, str(other)]),
        (0, ["compare", name, str(other), "--html", "both.html"]),
        (0, ["report", name, "--out", "report.html"]),
        (2, ["plan", peft, "data.path=spoiled.csv"]),
        (2, ["train", peft, "data.path=spoiled.csv", "name=spoiled"]),
        (2, ["train", peft, "data.text=body", "name=bad-column"]),
        (2, ["train", peft, "data.labels=[a, c]", "name=bad-label"]),
        (2, ["plan", peft, "data.year=patient_id"]),
        (2, ["plan", peft, "data.label=text", "data.separator=null", "name=text-as-label"]),
        (2, ["cache", peft]),
        (2, ["sample", f"{name}/adapter", "--base", str(bert)]),
    ]
    for code, command in commands:
        found = main(command)
        said = capfd.readouterr()
        assert CANARY not in said.out + said.err, command
        assert found == code, (command, said.err)
    assert holders(configured) == []
    predictions = list(Path(name, "predictions").glob("*.safetensors"))
    assert len(predictions) == 3
    assert os.name != "posix" or all(path.stat().st_mode & 0o077 == 0 for path in predictions)
    shutil.rmtree("runs")
