"""The continual demo: drifting documents, a small BERT that knows the first year, and runs through all the years."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.config.show import inline
from weft.demo.drift import Drift, vocabulary
from weft.demo.drift_files import DriftFiles, write_drift

BASE, LEARNERS = "base", ("replay", "lamaml")
MAIN = "accuracy"
OF_THE_BASE = """\
# The small BERT, made on the spot, learns documents of the first year's kind with all of its weights. What it is then
# stands in runs/base/adapter as a whole model: the source of the other runs.
name: base
output: {runs}
seed: 0
family: {{kind: encoder, source: {bert}, dropout: 0.0}}
adapter: {{kind: none}}
objective: {{kind: traditional}}
optimizer: {{kind: adamw, lr: 1e-3}}
data: {{kind: documents, path: {before}, year: year, group: patient, validation: 0.0, test: 0.1}}
schedule: {{epochs: 2}}
validation: {{every: 0}}
save: {{every: 0}}
engine: {{device: cpu}}
"""
MODEL = """\
# Trained by base.yaml: all weights, the classifier too. head and dropout stay as they are there.
family: {{kind: encoder, source: {trained}, dropout: 0.0}}
adapter: {{targets: all, rank: 4, alpha: 8, input_dropout: 0.0}}
optimizer: {{lr: 3e-3}}  # ten times BERT's: the network is that much narrower
engine: {{device: cpu}}
validation: {{every: 0}}
save: {{every: 0}}
"""
PATHS = """\
output: {runs}
data:
  kind: documents
  path: {documents}
  year: year
  group: patient
  validation: 0.1
  test: 0.4
"""
EXPERIMENT = """\
# {learner} through the years with a LoRA. Train it again with: weft train {file}
extends: [parts/peft.yaml, parts/sequential.yaml, parts/{learner}.yaml, paths.yaml, model.yaml]
name: {learner}
schedule: {{epochs: {epochs}}}
"""


@dataclass(frozen=True)
class World:
    """All that the demo begins with. configs: of the learners, by name, in the order in which they are trained."""

    drift: DriftFiles
    base: Path
    configs: Mapping[str, Path]
    runs: Path


def write_world(out: Path, drift: Drift, learners: Sequence[str] = LEARNERS, epochs: int = 1) -> World:
    """Write documents, model and configs. The shipped parts of an experiment are extended, and not copied."""
    from weft.demo.tiny_bert import save_tiny_bert

    files = write_drift(out, drift)
    bert = save_tiny_bert(out / "tiny-bert", vocabulary(drift), drift.seed)
    runs, folder = out / "runs", out / "configs"
    folder.mkdir(parents=True, exist_ok=True)
    names = {name: inline(path.as_posix()) for name, path in (
        ("runs", runs), ("bert", bert), ("before", files.before), ("documents", files.documents),
        ("trained", runs / BASE / "adapter"),
    )}  # fmt: skip
    for name, text in ((BASE, OF_THE_BASE), ("model", MODEL), ("paths", PATHS)):
        (folder / f"{name}.yaml").write_text(text.format(**names))
    configs = {learner: folder / f"{learner}.yaml" for learner in learners}
    for learner, file in configs.items():
        file.write_text(EXPERIMENT.format(learner=learner, file=file, epochs=epochs))
    return World(files, folder / f"{BASE}.yaml", configs, runs)


def bayes_accuracy(world: World) -> dict[str, float]:
    """Of each year the accuracy that no learner's expected one exceeds."""
    return json.loads(world.drift.truth.read_text())["bayes_accuracy"]


def summary_of(run: Path) -> dict[str, Any]:
    """What a finished run says about its matrix."""
    return json.loads((run / "summary.json").read_text())


def rows_of(world: World) -> list[tuple[str, ...]]:
    """(learner, ACC, BWT, forgetting, next year, gradients of a batch) for a table, the best possible first."""
    best = bayes_accuracy(world)
    rows: list[tuple[str, ...]] = [("(best possible)", f"{sum(best.values()) / len(best):.3f}", "", "", "", "")]
    for learner in world.configs:
        summary = summary_of(world.runs / learner)
        told = summary["metrics"][MAIN]
        numbers = (told["average"], told["bwt"], told["forgetting"], told["next"])
        rows.append((learner, *(f"{number:.3f}" for number in numbers), f"{summary['gradient_evaluations']:,.0f}"))
    return rows
