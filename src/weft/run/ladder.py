"""The ways to need less device memory, the cheapest first, each with what it leaves and what it costs."""

import os
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from weft.data.buckets import Bucket
from weft.engines.residency import RING, memory_of, together
from weft.errors import ConfigError, WeftError
from weft.run.assemble import target_report
from weft.run.config import RunConfig
from weft.run.estimate import Card, Estimate, activations, card_of, composed, device_of, precision_of
from weft.run.shares import divided

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
         "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}  # fmt: skip
CGROUP = Path("/sys/fs/cgroup/memory.max")  # a container's own limit, on Linux


@dataclass(frozen=True)
class Rung:
    """One step down, on top of those before it. changes: `key=value` as on a command line. bytes: then needed."""

    name: str
    changes: tuple[str, ...]
    bytes: int
    cost: str

    def line(self) -> str:
        """The change as one would type it, what is then needed, and its price."""
        return f"{' '.join(self.changes)}  ({self.bytes / 2**30:.1f} GiB; {self.cost})"


@dataclass(frozen=True)
class Step:
    """A change of a config and its price. bucket: the largest that is then left, where that changes."""

    name: str
    changes: Mapping[str, Any]
    cost: str
    bucket: Bucket | None = None


@dataclass(frozen=True)
class Need:
    """What a run needs for its hungriest bucket. rehearsed: activations that are known already, by what they depend on;
    a rehearsal takes seconds."""

    config: RunConfig
    bucket: Bucket
    card: Card
    trainable: int
    estimate: Estimate
    rehearsed: dict[Hashable, int]

    def of(self, config: RunConfig, bucket: Bucket) -> "Need":
        """The need of another config, with the same adapters, or of another bucket."""
        engine, precision = config.engine, precision_of(config)
        key = (bucket, config.data.batch_size, engine.recompute, engine.offload_inputs, precision,
               config.family.weight_dtype(precision))  # fmt: skip
        if key not in self.rehearsed:
            self.rehearsed[key] = activations(config, bucket)
        total = composed(config, self.rehearsed[key], self.trainable, self.card)
        return replace(self, config=config, bucket=bucket, estimate=total)


# A step from what is needed now toward a limit in bytes; None where it does not apply.
Maker = Callable[[Need, int], "Step | None"]


def size_of(text: str) -> int:
    """Bytes of a size such as 16GiB, 16 GB, 900M or 17179869184. Raises ConfigError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise ConfigError(f"--memory: '{text}' is no size. Write it like 16GiB, 24GB or 900M.")
    return int(float(found[1]) * UNITS[(found[2] or "").lower()])


def device_memory(config: RunConfig) -> int | None:
    """Bytes of the memory that the run's device computes in: a GPU's own, else the machine's or the container's.

    None where neither is known.
    """
    own = memory_of(device_of(config))
    if own is not None or os.name != "posix":
        return own
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP.read_text().strip() if CGROUP.is_file() else "max"
    return min(machine, int(limit)) if limit.isdigit() else machine


def trainable_of(config: RunConfig) -> int:
    """Parameters of all adapters that a run trains."""
    roles = config.objective.roles(config.family.experts)
    return len(roles) * config.adapter.trainable(target_report(config, config.family.skeleton()))


def ladder(config: RunConfig, buckets: Sequence[Bucket], limit: int, card: Card | None = None) -> list[Rung]:
    """The rungs that lead a run below a limit in bytes, each on top of those before; empty when it fits as it is.

    The last may still not fit: then nothing more is known. card: that the run is planned for, if not this machine's.
    """
    need = needed(config, largest(buckets), card or card_of(config))
    if need.estimate.total <= limit:
        return []
    rungs = []
    for rung in climb(need, limit):
        rungs.append(rung)
        if rung.bytes <= limit:
            break
    return rungs


def remedies(config: RunConfig, bucket: Bucket, limit: int, count: int = 3) -> list[Rung]:
    """The next rungs, whether or not the estimate says that they are needed: for a run that did not fit."""
    return list(islice(climb(needed(config, bucket, card_of(config)), limit), count))


def needed(config: RunConfig, bucket: Bucket, card: Card) -> Need:
    """The need for a bucket on a card."""
    trainable, nothing = trainable_of(config), Estimate(0, 0, 0, 0)
    return Need(config, bucket, card, trainable, nothing, {}).of(config, bucket)


def largest(buckets: Sequence[Bucket]) -> Bucket:
    return max(buckets, key=lambda bucket: bucket.tokens)


def climb(need: Need, limit: int) -> Iterator[Rung]:
    """All rungs from here on that leave less than before, in their order; bucket sizes are cut as far as they must."""
    for make in MAKERS:
        step = make(need, limit)
        changed = None if step is None else changed_config(need.config, step.changes)
        if step is None or changed is None:
            continue
        try:
            after = need.of(changed, step.bucket or need.bucket)
        except WeftError:  # such as a dtype that does not go with the precision: no way for this run
            continue
        if after.estimate.total < need.estimate.total or step.name == "cache":
            need = after
            lines = tuple(f"{key}={spelled(value)}" for key, value in step.changes.items())
            yield Rung(step.name, lines, after.estimate.total, step.cost)


def changed_config(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig | None:
    """The config with other values at dotted keys; None where it does not take them."""
    plain = config.resolved()
    for key, value in changes.items():
        *path, last = key.split(".")
        section = plain
        for name in path:
            section = section[name]
        if section is None or last not in section:
            return None
        section[last] = value
    try:
        changed = RunConfig.model_validate(plain)
    except ValidationError:
        return None
    return changed


def spelled(value: object) -> str:
    """A value as YAML reads it on a command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(spelled, value))}]"
    return str(value)


# ---- The rungs ------------------------------------------------------------------------------------------------------


def cached(need: Need, limit: int) -> Step | None:
    if need.config.data.cache != "off":
        return None
    cost = "the encoders leave the device while training, which is not counted here; disk for the latents"
    return Step("cache", {"data.cache": "disk"}, cost)


def recomputed(need: Need, limit: int) -> Step | None:
    if need.config.engine.recompute:
        return None
    return Step("recompute", {"engine.recompute": True}, "each block runs forward twice; the same gradients")


def offloaded(need: Need, limit: int) -> Step | None:
    if need.config.engine.offload_inputs or not need.card.gpu:
        return None
    cost = "host memory for the blocks' inputs, copied beside the computation; the same gradients"
    return Step("offload_inputs", {"engine.offload_inputs": True}, cost)


def smaller_moments(need: Need, limit: int) -> Step | None:
    if need.config.optimizer.kind != "adamw":
        return None
    cost = "needs bitsandbytes; moments are rounded to 8 bits"
    return Step("8-bit optimizer", {"optimizer.kind": "adamw8bit"}, cost)


def smaller_weights(need: Need, limit: int) -> Step | None:
    cost = "frozen weights are rounded to 8 bits and decoded for each multiplication: an approximation of the model"
    return Step("fp8 weights", {"family.dtype": "fp8"}, cost)


def one_expert(need: Need, limit: int) -> Step | None:
    """Where the engine does not keep one on the device already."""
    config = need.config
    experts, choice = len(config.family.experts), config.engine.experts
    if experts < 2 or not need.card.gpu:
        return None
    weights = experts * sum(config.family.weight_bytes(precision_of(config)).values())
    if not together(choice, weights, need.card.memory):
        return None
    cost = "host memory for both; a copy of the whole network whenever the other expert's turn comes"
    return Step("one expert", {"engine.experts": "one"}, cost)


def streaming(need: Need, limit: int) -> Step | None:
    """As few blocks as bring the need below the limit, or else all but one."""
    config = need.config
    if not need.card.gpu:
        return None
    by_block, residence = config.family.weight_bytes(precision_of(config)), config.engine.residence()
    blocks, already = sum(block is not None for block in by_block), residence.stream_blocks
    experts, memory = len(config.family.experts), need.card.memory
    spared = need.estimate.total - limit
    for count in range(max(already, RING) + 1, blocks):
        device, _ = divided(by_block, replace(residence, stream_blocks=count), experts, memory)
        if need.estimate.weights - device >= spared:
            break
    else:
        count = blocks - 1
    if count <= already:
        return None
    cost = "host memory for them, copied ahead of each use: free while a block computes longer than it is copied"
    return Step("stream_blocks", {"engine.stream_blocks": count}, cost)


def smaller_batch(need: Need, limit: int) -> Step | None:
    """One clip at a time, with the same number of clips in a step."""
    data, schedule = need.config.data, need.config.schedule
    if data.batch_size == 1:
        return None
    changes = {"data.batch_size": 1, "schedule.accumulate": schedule.accumulate * data.batch_size}
    return Step("batch", changes, "the same clips in a step, one after the other")


def smaller_bucket(need: Need, limit: int) -> Step | None:
    """A token budget that the largest bucket would meet with fewer frames, halved until it fits."""
    config, bucket, geometry = need.config, need.bucket, need.config.family.geometry()
    frames = bucket.frames
    while frames > 1:
        frames = geometry.longest_clip(max(1, frames // 2))
        shorter = Bucket(frames, bucket.height, bucket.width, geometry.tokens(frames, bucket.height, bucket.width))
        if need.of(config, shorter).estimate.total <= limit or frames == 1:
            cost = f"clips as {shorter} or smaller: data.buckets must offer such shapes"
            return Step("bucket", {"data.buckets.token_budget": shorter.tokens}, cost, shorter)
    return None


MAKERS: tuple[Maker, ...] = (
    cached, recomputed, offloaded, smaller_moments, smaller_weights, one_expert, streaming, smaller_batch,
    smaller_bucket,
)  # fmt: skip
