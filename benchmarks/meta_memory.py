"""What a meta-learning step costs: bytes kept for backward passes and processor time, by order, steps and adapter.

    python benchmarks/meta_memory.py --rounds 3 --json benchmarks/results/meta-memory-cpu.json

Bytes are the most that autograd keeps alive at a time, each memory once, without the network's own parameters; what is
held beside them is 3 copies of what is trained in first order. Times are processor time of this process on one thread,
cases in turns, each figure the median over rounds.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from weft.adapters.attach import Standing, attach
from weft.adapters.lora import Lora
from weft.adapters.no_adapter import NoAdapter
from weft.contracts import DEFAULT, Batch, Berth, Model, Rng
from weft.families.encoder import Encoder
from weft.objectives.experience_replay import ExperienceReplay
from weft.objectives.meta_learning import CMaml
from weft.run.bench_machine import processor

STEPS = (1, 2, 4)
REPLAY, TOKENS, CHUNK = 4, 32, 2  # documents replayed, tokens of each, documents of an inner step
WIDTH, HEADS, WORDS = 768, 12, 2000  # bert-base's, but for the words
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """adapter: none or lora. order: of the meta-learner; None: an ordinary step on the same documents."""

    adapter: str
    order: str | None
    steps: int

    @property
    def name(self) -> str:
        return f"{self.adapter}, " + ("ordinary" if self.order is None else f"{self.order} order")


class Kept:
    """Bytes that autograd keeps, each memory counted once; `most` is their largest sum."""

    def __init__(self, own: set[int]) -> None:
        self.own, self.alive = own, Counter[int]()
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> "Held":
        return Held(self, tensor)

    def add(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in self.own:
            return 0
        self.alive[address] += 1
        if self.alive[address] == 1:
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
        return address


class Held:
    """A tensor that a backward pass will ask for."""

    def __init__(self, kept: Kept, tensor: Tensor) -> None:
        self.kept, self.tensor, self.address = kept, tensor, kept.add(tensor)

    def __del__(self) -> None:
        if self.address:
            self.kept.alive[self.address] -= 1
            if not self.kept.alive[self.address]:
                self.kept.now -= self.tensor.untyped_storage().nbytes()


def model_of(folder: Path, adapter: str) -> Model:
    """The encoder with an adapter, or all of it trained."""
    family = Encoder(source=str(folder), labels=("yes", "no"), multi_label=False, head="new", seed=0)
    network = family.load("fp32", DEFAULT.name, Berth())
    recipe = NoAdapter() if adapter == "none" else Lora(rank=8, targets=("auto",))
    report = recipe.match(recipe.layers(network), family.targets, family.aliases)
    whole = family.heads(network) if adapter == "lora" else ()
    adapters = attach(network, {DEFAULT.name: Standing(recipe, report.paths, whole)}, 0)
    adapters.initialize()
    return Model(network.train(), family, adapters)


def batch_of(documents: int) -> Batch:
    chance = torch.Generator().manual_seed(0)

    def some(rows: int) -> dict[str, Tensor]:
        ids = torch.randint(WORDS, (rows, TOKENS), generator=chance)
        labels = torch.randint(2, (rows,), generator=chance)
        return {"ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool), "labels": labels}

    replayed = {f"replay/{name}": tensor for name, tensor in some(REPLAY).items()}
    return Batch({**some(documents), **replayed}, tuple(map(str, range(documents))))


def step_of(case: Case, model: Model) -> Callable[[], None]:
    """Forward and backward of one step, without an optimizer's."""
    objective = ExperienceReplay() if case.order is None else CMaml(order=case.order, inner_steps=case.steps, warm_up=0)
    state, batch = objective.init(model), batch_of(CHUNK * case.steps)

    def run() -> None:
        own, shared = torch.Generator().manual_seed(0), torch.Generator()
        with model.adapters.use(DEFAULT.name):
            objective.loss("train", model, batch, state, Rng(own, shared, 0, 0)).total.backward()
        for parameter in model.adapters.parameters(DEFAULT.name).values():
            parameter.grad = None

    return run


def kept_by(run: Callable[[], None], model: Model) -> int:
    """The most bytes that a step's backward passes have waiting for them."""
    own = {t.untyped_storage().data_ptr() for t in [*model.network.parameters(), *model.network.buffers()]}
    kept = Kept(own)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda held: held.tensor):
        run()
    return kept.most


def measured(models: dict[str, Model], cases: list[Case], rounds: int) -> list[dict[str, Any]]:
    runs = {case: step_of(case, models[case.adapter]) for case in cases}
    bytes_kept = {case: kept_by(run, models[case.adapter]) for case, run in runs.items()}  # and a first round
    seconds: dict[Case, list[float]] = {case: [] for case in cases}
    for number in range(rounds):
        for case in cases[number % len(cases) :] + cases[: number % len(cases)]:
            began = process_time()
            runs[case]()
            seconds[case].append(process_time() - began)
    rows = []
    for case in cases:
        ordinary = Case(case.adapter, None, case.steps)
        ratios = [a / b for a, b in zip(seconds[case], seconds[ordinary], strict=True)]
        rows.append(
            {"adapter": case.adapter, "order": case.order, "inner_steps": case.steps,
             "kept_mib": round(bytes_kept[case] / MIB, 1), "step_seconds": round(median(seconds[case]), 3),
             "times_ordinary": round(median(ratios), 2)}
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = [Case(a, order, k) for a in ("none", "lora") for k in STEPS for order in (None, "first", "second")]
    with tempfile.TemporaryDirectory() as folder:
        config = BertConfig(
            hidden_size=WIDTH, num_attention_heads=HEADS, intermediate_size=4 * WIDTH, vocab_size=WORDS,
            num_hidden_layers=arguments.layers,
        )  # fmt: skip
        BertForSequenceClassification(config).save_pretrained(folder)
        models = {adapter: model_of(Path(folder), adapter) for adapter in ("none", "lora")}
        rows = measured(models, cases, arguments.rounds)
    trained = {
        adapter: sum(p.numel() for p in model.adapters.parameters(DEFAULT.name).values())
        for adapter, model in models.items()
    }
    result = {
        "date": date.today().isoformat(),
        "processor": processor(),
        "threads": 1,
        "versions": {name: version(name) for name in ("weft", "torch", "transformers", "peft")},
        "case": f"BERT {WIDTH} wide, {arguments.layers} layers, {TOKENS} tokens, {CHUNK} documents an inner step, "
        f"{REPLAY} replayed, C-MAML without dropout, fp32; an ordinary step is experience replay on the same documents",
        "trained": trained,
        "rounds": arguments.rounds,
        "rows": rows,
    }
    print(f"{result['case']}; trained: {trained}")
    for row in rows:
        print(
            f"  {row['adapter']:<5} {row['order'] or 'ordinary':<9} k={row['inner_steps']}  {row['kept_mib']:8.1f} MiB"
            f"  {1000 * row['step_seconds']:8.0f} ms  x{row['times_ordinary']:.2f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
