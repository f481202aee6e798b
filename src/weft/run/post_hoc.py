"""Moving averages of a run's weights after the fact, from the adapters that it saved on its way.

An average of the parameters, A and B each, as a run's own moving average takes it. Each saved adapter stands for the
steps since the one before it, and the first for all steps up to its own, so that none is left out.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from weft.contracts import DEFAULT
from weft.errors import ConfigError, ModelError
from weft.formats.adapter_file import SavedAdapter
from weft.formats.describe import describe
from weft.formats.reading import read_adapter
from weft.run.checkpoint_folders import PREFIX
from weft.run.summed import kind_of

EXPERTS = ("high", "low")
LARGEST = 12**-0.5  # sigma_rel of gamma 0, the mean of all steps
STEPS = ("weft.step", "ss_steps")  # keys of headers that say the step: of Weft, and of kohya's programs
RUN = ("weft.base", "weft.family", "weft.expert")  # what adapters of one run say alike


@dataclass(frozen=True)
class Profile:
    """How much each step counts: tau^gamma (Karras et al. 2024, arXiv:2312.02696, eq. 3), or by a decay."""

    gamma: float | None = None
    decay: float | None = None

    def shares(self, steps: Sequence[int]) -> list[float]:
        """The shares, which sum to 1, of adapters saved at steps in order: each has that of the steps since the one
        before. Of a decay, what came before the first step is counted to the first, too."""
        last = steps[-1]
        if self.gamma is not None:
            until = [(step / last) ** (self.gamma + 1) for step in steps]
        else:
            assert self.decay is not None
            until = [self.decay ** (last - step) for step in steps]
        return [until[0], *(b - a for a, b in pairwise(until))]

    def __str__(self) -> str:
        return f"gamma {self.gamma:.4g}" if self.gamma is not None else f"decay {self.decay:g}"


@dataclass(frozen=True)
class Snapshot:
    """An adapter of a run, saved at a step."""

    path: Path
    step: int
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Averaged:
    """The average, and the share of each adapter in it. noted: what the user should know."""

    adapter: SavedAdapter
    shares: Sequence[tuple[Snapshot, float]]
    noted: str | None = None


def gamma_of(sigma_rel: float) -> float:
    """The exponent whose profile has a width of sigma_rel of the training time. arXiv:2312.02696, eq. 126: the root of
    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)). Raises ConfigError."""
    if not 0 < sigma_rel < LARGEST:
        raise ConfigError(
            f"--sigma-rel: expected a width above 0 and below {LARGEST:.3f} (the mean of all steps), such as 0.15; got "
            f"{sigma_rel:g}."
        )
    low, high = 0.0, 1.0 / sigma_rel  # a profile's width is below 1 / gamma
    for _ in range(200):
        middle = (low + high) / 2
        wider = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > sigma_rel**2
        low, high = (middle, high) if wider else (low, middle)
    return (low + high) / 2


def found_snapshots(paths: Sequence[Path]) -> dict[str, list[Snapshot]]:
    """The adapters that a run saved, or those that are named, by expert and in the order of the steps in their headers.

    Raises: ConfigError for fewer than two, ModelError for one without a step, or for two of one step.
    """
    groups: dict[str, list[Snapshot]] = {}
    for one in [_snapshot(inside) for path in paths for inside in _saved_in(path)]:
        groups.setdefault(one.metadata.get("weft.expert", DEFAULT.name), []).append(one)
    for expert, group in groups.items():
        groups[expert] = ordered = sorted(group, key=lambda one: one.step)
        for one, other in pairwise(ordered):
            if one.step == other.step:
                raise ModelError(f"{one.path} and {other.path} are both of step {one.step}. Give each step once.")
    few = next((expert for expert, group in groups.items() if len(group) < 2), None)
    if few is not None:
        which = f" of expert {few}" if few in EXPERTS else ""
        raise ConfigError(
            f"--ema: an average needs two saved adapters{which} at least, and there is one, {groups[few][0].path}. "
            "Runs keep them when save.every is set, and save.prune_adapters is not."
        )
    return groups


def averaged(snapshots: Sequence[Snapshot], profile: Profile, told: Mapping[str, float]) -> Averaged:
    """The average of a run's adapters, read one after another and summed in fp64. told: the options, for the header.

    Raises ModelError for adapters that are not of one run.
    """
    shares = profile.shares([one.step for one in snapshots])
    sums: dict[str, Tensor] = {}
    first: SavedAdapter | None = None
    for one, share in zip(snapshots, shares, strict=True):
        adapter = read_adapter(one.path)
        first = adapter if first is None else first
        _refuse_others(first, snapshots[0], adapter, one)
        for name, tensor in adapter.tensors.items():
            sums[name] = sums[name] + share * tensor.double() if name in sums else share * tensor.double()
    assert first is not None
    who = [{"adapter": str(one.path), "step": one.step, "share": share}
           for one, share in zip(snapshots, shares, strict=True)]  # fmt: skip
    record = {"method": "post-hoc moving average of parameters", **told, "parents": who}
    metadata = {**snapshots[-1].metadata, "weft.merged": json.dumps(record)}
    tensors = {name: tensor.float() for name, tensor in sums.items()}
    made = replace(first, tensors=tensors, metadata=metadata)
    return Averaged(made, list(zip(snapshots, shares, strict=True)), _of_averages(snapshots[-1]))


def _saved_in(path: Path) -> list[Path]:
    """The adapters that a run's folder has for its steps, or the path itself."""
    inside = [p for p in path.glob(f"{PREFIX}*") if re.fullmatch(rf"{PREFIX}\d+(_high|_low)?", p.name)]
    return inside if path.is_dir() and inside else [path]


def _snapshot(path: Path) -> Snapshot:
    metadata = describe(path).metadata
    step = next((metadata[key] for key in STEPS if metadata.get(key, "").isdecimal()), None)
    if step is None:
        raise ModelError(
            f"{path} does not say in its header at which step it was saved, so its place among the others is unknown. "
            "Average adapters that Weft or musubi-tuner saved."
        )
    return Snapshot(path, int(step), metadata)


def _refuse_others(first: SavedAdapter, where: Snapshot, other: SavedAdapter, one: Snapshot) -> None:
    facts = [
        (a.kind, a.rank, a.alpha, a.rslora, a.dora, a.conv_rank, a.conv_alpha, dict(a.options)) for a in (first, other)
    ]
    shapes = [{name: tuple(tensor.shape) for name, tensor in a.tensors.items()} for a in (first, other)]
    if facts[0] != facts[1] or shapes[0] != shapes[1]:
        raise ModelError(
            f"{one.path} ({kind_of(other)}, rank {other.rank}, alpha {other.alpha:g}, {len(other.paths)} layers) and "
            f"{where.path} ({kind_of(first)}, rank {first.rank}, alpha {first.alpha:g}, {len(first.paths)} layers) are "
            "not of one run, and the mean of their parameters means nothing. To average changes: weft merge --average."
        )
    odd = next((key for key in RUN if first.metadata.get(key) != other.metadata.get(key)), None)
    if odd is not None:
        raise ModelError(
            f"{one.path} and {where.path} are not of one run: {odd} in their headers is {other.metadata.get(odd)} and "
            f"{first.metadata.get(odd)}."
        )


def _of_averages(one: Snapshot) -> str | None:
    kept = json.loads(one.metadata.get("weft.config", "{}")).get("ema")
    if not kept:
        return None
    return f"the run kept a moving average itself (decay {kept['decay']:g}), and its saved adapters are that average"
