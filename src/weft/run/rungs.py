"""The ways to need less device memory, the cheapest first, each with what it changes and what it costs."""

import os
from bisect import bisect_left
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weft.data.buckets import Bucket
from weft.engines.parallel import Layout
from weft.engines.residency import RING, together
from weft.families.causal_lm import CausalLM
from weft.run.blocks import BUDGETS, ROOM
from weft.run.config import RunConfig
from weft.run.estimate import (
    Card,
    Estimate,
    Rehearsals,
    again_of,
    budget_of,
    composed,
    more_at,
    most_at,
    precision_of,
    rehearsals,
)
from weft.run.questions import Row, Shape
from weft.run.shares import ALONE, divided

CGROUP = Path("/sys/fs/cgroup/memory.max")  # a container's own limit, on Linux
SHORTEST = 128  # tokens of the shortest rows that are offered
HIDDEN = 16_000  # tokens from which on a bf16 block computes longer than it is copied: 790 TFLOP/s, 50 GB/s
BUSY = 4096  # tokens of an item that by itself keeps a large GPU busy
CACHE = "cache"  # the rung whose gain is not counted


@dataclass(frozen=True)
class Step:
    """A change of a config and its price. shape and layout: the largest that is then left, and that of the processes,
    where they change. opens: further steps need it, even where it saves nothing by itself."""

    name: str
    changes: Mapping[str, Any]
    cost: str
    shape: Shape | None = None
    layout: Layout | None = None
    opens: bool = False


@dataclass(frozen=True)
class Need:
    """What a process of a run needs for its hungriest shape.

    trained: parameters of each role. rehearsed: activations that are known already, by what they depend on; a rehearsal
    takes seconds. spare: GPUs of this machine, over which weights could be spread.
    """

    config: RunConfig
    shape: Shape
    card: Card
    trained: Mapping[str, int]
    estimate: Estimate
    rehearsed: dict[Hashable, dict[str, Rehearsals]]
    layout: Layout = ALONE
    spare: int = 1

    def of(self, config: RunConfig, shape: Shape, layout: Layout | None = None) -> "Need":
        """The need of another config, with the same adapters, of another shape, or another layout."""
        layout = layout or self.layout
        most = most_at(self.found(config, shape, layout), budget_of(config))
        total = composed(config, most, self.trained, self.card, layout)
        return replace(self, config=config, shape=shape, estimate=total, layout=layout)

    def found(
        self, config: RunConfig, shape: Shape | None = None, layout: Layout | None = None
    ) -> Mapping[str, Rehearsals]:
        """The rehearsals of a config, each made once."""
        engine, precision, family = config.engine, precision_of(config), config.family
        shape, sequence = shape or self.shape, (layout or self.layout).sequence
        # Whatever the memory budget, one rehearsal of compiled blocks tells what they keep under it.
        key = (shape, config.data.batch_size, engine.recompute, engine.offload_inputs, engine.offload_activations,
               engine.compile is True, precision, sequence, family.model_dump_json())  # fmt: skip
        if key not in self.rehearsed:
            self.rehearsed[key] = rehearsals(config, shape, sequence)
        return self.rehearsed[key]


# A step from what is needed now toward a limit in bytes; None where it does not apply.
Maker = Callable[[Need, int], "Step | None"]


def cached(need: Need, limit: int) -> Step | None:
    if need.config.family.medium == "text" or need.config.data.cache != "off":
        return None
    cost = "the encoders leave the device while training, which is not counted here; disk for the latents"
    return Step(CACHE, {"data.cache": "disk"}, cost)


def budgeted(need: Need, limit: int) -> Step | None:
    """The largest memory budget of compiled blocks that suffices; none where less than that is needed, or where it
    computes more again than selective recomputation, which suffices too. A smaller budget never keeps more."""
    engine = need.config.engine
    if engine.kind != "torch" or engine.recompute or need.layout.sequence > 1 or not need.card.gpu:
        return None
    if too_much_without_activations(need, limit) or "functional" in need.config.objective.needs:
        return None

    def under(budget: float) -> RunConfig:
        return changed_engine(need.config, compile=True, activation_budget=budget)

    def fits(budget: float) -> bool:
        return need.of(under(budget), need.shape).estimate.total <= limit

    # Under the first, all is kept: the rehearsal knows it. For each other that is asked about, torch parts anew.
    place = 0 if fits(BUDGETS[0]) else bisect_left(BUDGETS, True, lo=1, key=fits)
    if place == len(BUDGETS):
        return None
    budget = BUDGETS[place]
    found = need.found(under(budget))
    more = more_at(found, budget)
    if more > again_of(found) and selected(need, limit) is not None:
        return None
    cost = f"a minute or more to compile; {more:.0%} more multiplications; gradients equal to rounding"
    return Step("budget", {"engine.compile": True, "engine.activation_budget": budget}, cost)


def selected(need: Need, limit: int) -> Step | None:
    """Where it suffices."""
    engine = need.config.engine
    if engine.kind != "torch" or engine.recompute or engine.compile is True:
        return None
    if too_much_without_activations(need, limit):
        return None
    changed = changed_engine(need.config, recompute="selective")
    if need.of(changed, need.shape).estimate.total > limit:
        return None
    cost = "each block runs forward twice but for its attention; the same gradients"
    return Step("selective", {"engine.recompute": "selective"}, cost)


def sent_away(need: Need, limit: int) -> Step | None:
    """Where it suffices, and the host has the memory that it takes."""
    engine = need.config.engine
    if engine.kind != "torch" or engine.recompute or engine.offload_activations or not need.card.gpu:
        return None
    if need.layout.shard > 1 or too_much_without_activations(need, limit):
        return None
    after = need.of(changed_engine(need.config, offload_activations=True), need.shape).estimate
    room = host_memory()
    if after.total > limit or (room is not None and after.host > ROOM * room):
        return None
    cost = (
        f"{after.host / 2**30:.1f} GiB of host memory, copied beside the computation: free where a block computes "
        "longer than its share is copied, as of long videos; nothing is computed twice"
    )
    return Step("offload_activations", {"engine.offload_activations": True}, cost)


def host_memory() -> int | None:
    """Bytes of the machine's own memory or of the container's share; None where the system does not tell."""
    if os.name != "posix":
        return None
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP.read_text().strip() if CGROUP.is_file() else "max"
    return min(machine, int(limit)) if limit.isdigit() else machine


def recomputed(need: Need, limit: int) -> Step | None:
    engine = need.config.engine
    if engine.recompute is True:
        return None
    changes: dict[str, Any] = {"engine.recompute": True}
    if isinstance(engine.activation_budget, float):
        changes["engine.activation_budget"] = None  # a number is for blocks that are not recomputed
    if engine.kind == "torch" and engine.offload_activations:
        changes |= {"engine.offload_activations": False, "engine.offload_inputs": True}
    cost = "each block runs forward twice; the same gradients"
    return Step("recompute", changes, cost, opens=engine.compile is True)


def too_much_without_activations(need: Need, limit: int) -> bool:
    """Whether what is there all the time is more than there is room for."""
    return need.estimate.total - need.estimate.activations > limit


def changed_engine(config: RunConfig, **values: Any) -> RunConfig:
    """The config with other values of the engine's, which go together."""
    return config.model_copy(update={"engine": config.engine.model_copy(update=values)})


def offloaded(need: Need, limit: int) -> Step | None:
    if need.config.engine.offload_inputs or not need.card.gpu:
        return None
    cost = "host memory for the blocks' inputs, copied beside the computation; the same gradients"
    return Step("offload_inputs", {"engine.offload_inputs": True}, cost)


def smaller_moments(need: Need, limit: int) -> Step | None:
    own = {f"roles.{name}.optimizer": role.optimizer for name, role in need.config.roles.items() if role.optimizer}
    changes = {
        f"{key}.kind": "adamw8bit"
        for key, optimizer in {"optimizer": need.config.optimizer, **own}.items()
        if optimizer.kind == "adamw"
    }
    cost = "needs bitsandbytes; moments are rounded to 8 bits"
    return Step("8-bit optimizer", changes, cost) if changes else None


def chunked_losses(need: Need, limit: int) -> Step | None:
    """Where all logits of a row would exist at once."""
    family = need.config.family
    if not isinstance(family, CausalLM) or family.kernels.cross_entropy != "eager":
        return None
    return Step("chunked losses", {"family.kernels.cross_entropy": "chunked"}, "nothing; the same losses")


def smaller_weights(need: Need, limit: int) -> Step | None:
    cost = "frozen weights are rounded to 8 bits and decoded for each multiplication: an approximation of the model"
    return Step("fp8 weights", {"family.dtype": "fp8"}, cost)


def smallest_weights(need: Need, limit: int) -> Step | None:
    if need.config.family.medium != "text":
        return None
    cost = "needs bitsandbytes; frozen weights are rounded to 4 bits, as in QLoRA: a coarser approximation"
    return Step("nf4 weights", {"family.dtype": "nf4"}, cost)


def sharded(need: Need, limit: int) -> Step | None:
    """The fewest processes, of as many as there are GPUs, that bring the need below the limit, or else all. What an
    earlier rung has sent to host memory comes back: it does not go with weights that are spread."""
    layout, engine = need.layout, need.config.engine
    if engine.kind != "torch" or need.spare <= max(1, layout.world):
        return None
    cost = "needs {} processes (weft train --gpus {}); weights are sent for at each block"
    back = {name: False for name in ("offload_inputs", "offload_activations") if getattr(engine, name)}
    config = need.config.model_copy(update={"engine": engine.model_copy(update=back)})
    for shard in range(layout.shard + 1, need.spare // layout.sequence + 1):
        wider = Layout(1, shard, layout.sequence)
        if need.of(config, need.shape, wider).estimate.total <= limit or wider.world + layout.sequence > need.spare:
            returned = {f"engine.{name}": value for name, value in back.items()}
            changes = {"parallel.data": 1, "parallel.shard": shard, **returned}
            return Step("shard", changes, cost.format(wider.world, wider.world), layout=wider)
    return None


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
    """As few blocks as bring the need below the limit, or else all."""
    config = need.config
    if not need.card.gpu or need.layout.shard > 1 or config.engine.kind != "torch":
        return None
    by_block, residence = config.family.weight_bytes(precision_of(config)), config.engine.residence()
    blocks, already = sum(block is not None for block in by_block), residence.stream_blocks
    experts, memory = len(config.family.experts), need.card.memory
    spared = need.estimate.total - limit
    for count in range(max(already, RING) + 1, blocks + 1):
        device, _ = divided(by_block, replace(residence, stream_blocks=count), experts, memory)
        if need.estimate.weights - device >= spared:
            break
    else:
        count = blocks
    if count <= already:
        return None
    tokens = need.shape.tokens * config.data.batch_size
    cost = (
        "host memory for them, copied ahead of each use: free while a block computes longer than it is copied, as from "
        f"about {HIDDEN:,} tokens on in bf16 (predicted for an H200); here {tokens:,}"
    )
    return Step("stream_blocks", {"engine.stream_blocks": count}, cost)


def items_apart(need: Need, limit: int) -> Step | None:
    """Where an item is large enough that several at once compute no faster."""
    return smaller_batch(need, limit) if need.shape.tokens >= BUSY else None


def smaller_batch(need: Need, limit: int) -> Step | None:
    """One item at a time, with the same number of items in a step."""
    data, schedule = need.config.data, need.config.schedule
    if data.batch_size == 1:
        return None
    changes: dict[str, Any] = {"data.batch_size": 1}
    if schedule.global_batch is None:
        changes["schedule.accumulate"] = schedule.accumulate * data.batch_size
    items = "rows" if isinstance(need.shape, Row) else "clips"
    return Step("batch", changes, f"the same {items} in a step, one after the other")


def smaller_shape(need: Need, limit: int) -> Step | None:
    """Shorter rows of text, or clips of fewer frames, halved until they fit."""
    if isinstance(need.shape, Row):
        return shorter_rows(need, need.shape, limit)
    return smaller_bucket(need, need.shape, limit)


def smaller_bucket(need: Need, bucket: Bucket, limit: int) -> Step | None:
    """A token budget that the largest bucket would meet with fewer frames."""
    geometry, frames = need.config.family.geometry(), bucket.frames
    while frames > 1:
        frames = geometry.longest_clip(max(1, frames // 2))
        shorter = Bucket(frames, bucket.height, bucket.width, geometry.tokens(frames, bucket.height, bucket.width))
        if need.of(need.config, shorter).estimate.total <= limit or frames == 1:
            cost = f"clips as {shorter} or smaller: data.buckets must offer such shapes"
            return Step("bucket", {"data.buckets.token_budget": shorter.tokens}, cost, shorter)
    return None


def shorter_rows(need: Need, row: Row, limit: int) -> Step | None:
    """A length of data that is halved, but not below what an exchange of some sentences takes."""
    tokens = row.tokens
    while tokens >= 2 * SHORTEST:
        tokens //= 2
        shorter = Row(tokens)
        if need.of(need.config, shorter).estimate.total <= limit or tokens < 2 * SHORTEST:
            cost = f"longer texts become what data.truncate says: {need.config.data.truncate}"
            return Step("length", {"data.length": tokens}, cost, shorter)
    return None


# First what leaves the numbers as they are, then what approximates them, and at last what trains on less.
MAKERS: tuple[Maker, ...] = (
    cached, chunked_losses, items_apart, budgeted, selected, sent_away, recomputed, offloaded, sharded, one_expert,
    streaming, smaller_batch, smaller_moments, smaller_weights, smallest_weights, smaller_shape,
)  # fmt: skip
