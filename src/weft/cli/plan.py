"""weft plan: what a run would do, told before any weight is read."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weft.cli.plan_documents import print_documents, print_experiences
from weft.cli.seeds import add_shorthands, shorthands

if TYPE_CHECKING:
    from rich.console import Console

    from weft.run.config import RunConfig
    from weft.run.plan import Plan

SHOWN = 40  # clips, unless --all
LETTERS = 100  # of a caption, unless --all
NAMED = 5  # texts that are too long or unreadable, unless --all


def run(argv: Sequence[str]) -> int:
    """Print the plan. Exit code 2 when the run would not start."""
    parser = argparse.ArgumentParser(prog="weft plan", description="Show what a run would do; reads no weights.")
    parser.add_argument("config", type=Path, help="the run's YAML, or the name of a ready config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    add_shorthands(parser)
    parser.add_argument("--all", action="store_true", help=f"every clip, not only {SHOWN}")
    parser.add_argument("--memory", metavar="SIZE", help="plan for a device of this memory, such as 16GiB")
    parser.add_argument("--processes", type=int, metavar="N", help="plan for so many processes; none is started")
    arguments = parser.parse_intermixed_args(argv)
    processes = processes_of(arguments.processes)

    from weft.cli.train import quiet_libraries
    from weft.run.config import load_config

    config = load_config(arguments.config, [*arguments.overrides, *shorthands(arguments)])
    quiet_libraries()

    from rich.console import Console

    from weft.run.ladder import size_of
    from weft.run.plan import plan, refuse

    made = plan(config, size_of(arguments.memory) if arguments.memory else None, processes)
    print_plan(config, made, Console(highlight=False), everything=arguments.all)
    refuse(made.problems)
    return 0


def processes_of(asked: int | None) -> int | None:
    """As many as were asked for, or as a launcher has started. Raises ConfigError."""
    from weft.errors import ConfigError

    if asked is not None and asked < 1:
        raise ConfigError(f"--processes: {asked} is no number of processes; write 1 or more.")
    started = os.environ.get("WORLD_SIZE", "")
    return asked or (int(started) if started.isdecimal() and int(started) > 1 else None)


def print_plan(config: "RunConfig", plan: "Plan", console: "Console", everything: bool) -> None:
    """Data, shapes with their memory, processes, targets, and the run in numbers."""
    if config.family.medium == "text":
        print_texts(config, plan, console, everything)
    elif config.family.medium == "documents":
        print_documents(plan, console, everything)
        print_experiences(config, plan, console)
    elif config.data.has_latents:
        print_clips(plan, console, everything)
    else:
        print_prompts(plan, console, everything)
    print_shapes(config, plan, console)
    print_processes(plan, console)
    print_memory(plan, console)
    print_targets(plan, console)
    items = items_of(config)
    held_out = len(plan.survey.validation)
    epochs = "streamed data, whose epochs have no known length"
    if plan.epochs is not None:
        epochs = f"{plan.epochs:.1f} epochs of {plan.steps_per_epoch} steps"
    print_experts(config, plan, console)
    print_roles(config, plan, console)
    recipe, each = f"{config.adapter.summary()}, ", ""
    cached = plan.cache.line() if plan.cache else "tokens stay in memory, and no file holds a document"
    if config.objective.parts:
        recipe, each = "", " for each part that moves"
    console.print(
        f"{plan.parameters.line()}\n"
        f"{recipe}precision {plan.precision}\n"
        f"{plan.steps} steps of {plan.items} {items}{each} = {epochs}; "
        f"{held_out or 'no'} {'texts' if items == 'rows' else items} held out for validation\n"
        f"disk: {gib(plan.disk)} of checkpoints and adapters in {config.folder}; {cached}",
        markup=False,
        soft_wrap=True,
    )


def print_experts(config: "RunConfig", plan: "Plan", console: "Console") -> None:
    """Which of two networks is trained when, and at which times."""
    experts = config.family.experts
    if experts == config.family.all_experts and len(experts) == 1:
        return
    for expert in experts:
        roles = config.objective.roles((expert,))
        steps = max(part.steps for part in plan.parts if part.role in roles)
        own = "an adapter of its own" if len(roles) == 1 else f"adapters of its own: {', '.join(roles)}"
        low, high = config.objective.range_of(expert)
        console.print(f"Expert {expert.name}: times {low:g} to {high:g}, {steps} steps, {own}", markup=False)


def print_roles(config: "RunConfig", plan: "Plan", console: "Console") -> None:
    """Of an objective that trains several parts: each with its rate and its steps, what they share, and the way of a
    distilled student."""
    from weft.run.parts import base_bytes, distilled

    if not config.objective.parts:
        return
    base, adapters = base_bytes(config, plan.precision), 4 * plan.parameters.trainable
    copies = 1 + len(config.objective.parts)
    which = "the base" if len(config.family.experts) == 1 else "each base"
    held, three = gib(base + adapters), gib(copies * base + adapters)
    lines = [
        "Roles on one base, which without an adapter is the teacher:",
        *(f"  {part.line()}" for part in plan.parts),
        f"Weights held: {which} once and adapters, {held}; with {copies} copies of {which} they would be {three}",
        *distilled(config),
    ]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def print_clips(plan: "Plan", console: "Console", everything: bool) -> None:
    """One line of facts for each clip and one with the reason; what is lost comes first when not all are shown."""
    clips = plan.survey.clips
    odd = [clip for clip in clips if clip.verdict in ("dropped", "unreadable")]
    shown = clips if everything or len(clips) <= SHOWN else [*odd, *[c for c in clips if c not in odd]][:SHOWN]
    longest = max((len(clip.key) for clip in shown), default=0)
    console.print(f"Clips at {plan.survey.fps:g} frames a second")
    for clip in shown:
        frames = f"{clip.source_frames} frames" if clip.source_frames else ""
        fps = f"{clip.source_fps:g} fps" if clip.source_fps else ""
        size = f"{clip.width}x{clip.height}" if clip.width else ""
        bucket = f"-> {clip.bucket}" if clip.bucket else ""
        split = ", held out" if clip.split == "validation" else ""
        line = f"  {clip.key:<{longest}}  {frames:>10} {fps:>9} {size:>10} {bucket:<16} {clip.verdict}{split}"
        console.print(line.rstrip(), markup=False, soft_wrap=True)
        if clip.verdict != "kept" or clip.reason:
            console.print(f"      {clip.reason}", markup=False, soft_wrap=True, style="dim")
    if len(shown) < len(clips):
        console.print(f"{len(clips) - len(shown)} more clips; weft plan --all shows them.", markup=False)
    verdicts = [clip.verdict for clip in clips]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("kept", "trimmed", "dropped", "unreadable"))
    files = len({clip.name for clip in clips})
    what = f"{len(clips)} clips" if files == len(clips) else f"{len(clips)} items of {files} clips"
    console.print(f"  {what}: {counts}", markup=False)
    for notice in plan.survey.notices:
        console.print(f"  note: {notice}", markup=False, soft_wrap=True)
    console.print()


def print_prompts(plan: "Plan", console: "Console", everything: bool) -> None:
    """Each caption under its key, as events name it."""
    prompts = plan.survey.train
    shown = prompts if everything else prompts[:SHOWN]
    console.print("Captions without clips")
    for prompt in shown:
        text = prompt.text if everything or len(prompt.text) <= LETTERS else f"{prompt.text[:LETTERS]}..."
        console.print(f"  {prompt.key}  {text}", markup=False, soft_wrap=True)
    if len(shown) < len(prompts):
        console.print(f"{len(prompts) - len(shown)} more captions; weft plan --all shows them.", markup=False)
    others = f", {plan.survey.of_others} go to other shares" if plan.survey.of_others else ""
    console.print(f"  {len(prompts)} captions{others}", markup=False)
    for notice in plan.survey.notices:
        console.print(f"  note: {notice}", markup=False, soft_wrap=True)
    console.print()


def items_of(config: "RunConfig") -> str:
    """What a step is counted in."""
    if config.family.medium == "documents":
        return "documents"
    if config.family.medium == "text":
        return "rows"
    return "clips" if config.data.has_latents else "captions"


def print_texts(config: "RunConfig", plan: "Plan", console: "Console", everything: bool) -> None:
    """The survey in numbers, and by their keys the texts that are too long or cannot be read; never what they say."""
    console.print("Conversations")
    for line in plan.survey.lines():
        console.print(f"  {line}", markup=False, soft_wrap=True)
    length, what = config.data.length, "cut" if config.data.truncate == "cut_end" else "left out"
    long = {
        key: int(tokens)
        for corpus in (*plan.survey.train.corpora, *plan.survey.validation.corpora)
        for key, tokens in zip(corpus.keys, corpus.lengths, strict=True)
        if tokens > length
    }
    lines = [
        f"{key}  {long[key]:,} tokens, longer than data.length ({length:,}): {what}"
        for key in sorted(long, key=lambda key: -long[key])
    ]
    for named in (lines, [each.reason for each in plan.survey.unreadable]):
        for line in named if everything else named[:NAMED]:
            console.print(f"  {line}", markup=False, soft_wrap=True, style="dim")
        if len(named) > NAMED and not everything:
            console.print(f"  {len(named) - NAMED} more such; weft plan --all shows them.", markup=False)
    console.print()


def print_shapes(config: "RunConfig", plan: "Plan", console: "Console") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from weft.data.buckets import Bucket, lengths_line

    text = config.family.medium != "video"
    title = f"{items_of(config).capitalize() if text else 'Buckets'} at batch {config.data.batch_size}"
    title += "" if config.data.has_latents else ", each drawn as often as any other"
    columns = ("tokens", items_of(config)) if text else ("frames x height x width", "tokens", items_of(config))
    table = Table(*columns, "memory", "of it activations", title=title, title_justify="left", box=SIMPLE_HEAD)
    for shape, memory in plan.memory.items():
        name = () if text else (str(shape),)
        table.add_row(
            *name, f"{shape.tokens:,}", f"{plan.shapes[shape]:,}", gib(memory.total), gib(memory.activations)
        )  # fmt: skip
    console.print(table)
    if line := lengths_line([shape for shape in plan.memory if isinstance(shape, Bucket)]):
        console.print(line, markup=False, soft_wrap=True)


def print_processes(plan: "Plan", console: "Console") -> None:
    """What each process holds, of several and of how many."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    if not plan.memory:
        return
    most, layout = max(plan.memory.values(), key=lambda each: each.total), plan.layout
    one = layout.world == 1
    title = "One process" if one else f"Each of {layout.world:,} processes ({layout.words()})"
    columns = ("weights", "adapter", "activations", "in all", "host memory", "items a step")
    table = Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD)
    sizes = (most.weights, most.adapter, most.activations, most.total, most.host)
    table.add_row(*map(gib, sizes), f"{plan.items:,}" if one else f"{plan.items:,} of all")
    console.print(table)


def print_memory(plan: "Plan", console: "Console") -> None:
    """Whether the largest shape fits, and else what would make it fit."""
    for line in plan.blocks:
        console.print(line, markup=False, soft_wrap=True)
    if plan.limit is None or plan.room is None or not plan.memory:
        return
    largest, most = max(plan.memory.items(), key=lambda item: item[1].total)
    what = "The largest bucket needs" if plan.shapes_are_buckets else f"A batch of {largest} needs"
    each = "" if plan.layout.world == 1 else " in each process"
    if most.total <= plan.room:
        console.print(f"{what} about {gib(most.total)} of {gib(plan.limit)}{each}.\n", markup=False)
        return
    room = f"of {gib(plan.limit)} a run is planned to fill {gib(plan.room)}: allocators leave gaps"
    console.print(f"{what} about {gib(most.total)}{each}, and {room}.", markup=False, soft_wrap=True)
    if plan.rungs:
        console.print("What would help, each on top of those before:", markup=False)
    for rung in plan.rungs:
        console.print(f"  {rung.line()}", markup=False, soft_wrap=True)
    if not plan.rungs or plan.rungs[-1].bytes > plan.room:
        smaller = "smaller buckets" if plan.shapes_are_buckets else "shorter rows"
        console.print(f"Even so it would not fit: take {smaller} or a larger device.", markup=False)
    console.print()


def print_targets(plan: "Plan", console: "Console") -> None:
    """Which layers are adapted; of several parts for each that differs."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shared: dict[tuple[tuple[object, ...], ...], list[str]] = {}
    for part in plan.parts:
        shared.setdefault(tuple(map(tuple, part.targets.rows())), []).append(part.role)
    for rows, roles in shared.items():
        title = "Targets" if len(shared) == 1 else f"Targets of {' and '.join(roles)}"
        table = Table("pattern", "read as", "modules", "such as", title=title, title_justify="left", box=SIMPLE_HEAD)
        for row in rows:
            table.add_row(*map(str, row))
        console.print(table)


def gib(size: int) -> str:
    """Bytes in GiB, or MiB when few."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
