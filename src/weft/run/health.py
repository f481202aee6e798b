"""How far each adapted layer has moved, and in how many directions: is it training, and where."""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.adapters.named import by_path
from weft.adapters.sizes import Adapted, Size, sizes, weight_norm
from weft.events import Listener, Notice
from weft.run.config import RunConfig
from weft.run.learner import Learner

FILE = "health.jsonl"
DIGITS = 6  # of a number in the file


@dataclass
class Health:
    """Measures the adapters of a run as they are trained (not their moving averages), and appends a line for each role
    to a file in its folder. It draws no chance and changes nothing."""

    config: RunConfig
    tell: Listener
    measured_at: int | None = None
    _norms: dict[int, float] = field(default_factory=dict)  # ||W|| by the id of a frozen layer
    _said: set[str] = field(default_factory=set)

    def measure(self, learner: Learner) -> None:
        """Write down what the adapters are now; not twice for one step, nor before the first. Every rank must ask."""
        if not self.config.save.health or learner.step in (0, self.measured_at):
            return
        self.measured_at = learner.step
        adapters = learner.model.adapters
        with adapters.use(None):  # a layer that is asked for its own weight answers alone
            # A network that is trained itself, and virtual tokens, change no frozen layer.
            lines = [self._line(learner, role) for role in adapters.names if adapters.paths_of(role)]
        if lines and learner.engine.rank == 0:
            append(self.config.folder / FILE, lines)

    def _line(self, learner: Learner, role: str) -> dict[str, Any]:
        adapters, recipe = learner.model.adapters, self.config.adapter_of(role)
        paths = adapters.paths_of(role)
        tensors = by_path({**adapters.parameters(role), **adapters.fixed(role)}, paths)
        adapted = {path: Adapted(adapters.base_layer(role, path), tensors[path]) for path in paths}
        found = sizes(recipe, adapted)
        if not found:
            self._say(f"adapter.kind: nobody here knows how to measure a change of kind {recipe.kind}.")
        return {
            "time": round(time.time(), 3),
            "step": learner.step,
            "role": role,
            "kind": recipe.kind,
            "rank": recipe.model_dump().get("rank"),
            "paths": list(paths),
            "change": [rounded(self._change(path, adapted[path], found.get(path))) for path in paths],
            "effective_rank": [rounded(found[path].effective_rank) if path in found else None for path in paths],
        }

    def _change(self, path: str, layer: Adapted, size: Size | None) -> float | None:
        """||dW|| / ||W||; None where either is not known."""
        norm = self._norms.get(id(layer.base))
        if norm is None:
            norm = self._norms[id(layer.base)] = weight_norm(layer.base)
        if not 0 < norm < math.inf:
            self._say(f"adapter health: the weight of '{path}' has the norm {norm}, so no share of it can be told.")
            return None
        return None if size is None else size.norm / norm

    def _say(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            self.tell(Notice(text=sentence))


def rounded(value: float | None) -> float | None:
    """So many digits; None for what is no number."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{DIGITS}g}")


def append(path: Path, lines: list[dict[str, Any]]) -> None:
    """Add lines of JSON to a file, beginning a new one where a process was killed within one. Makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)  # which the checkpoint that is written meanwhile may make first
    torn = path.is_file() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    with path.open("a") as file:
        file.write("\n" * torn + text)
