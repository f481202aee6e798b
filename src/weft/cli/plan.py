"""weft plan: what a run would do, told before any weight is read."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from weft.run.config import RunConfig
    from weft.run.plan import Plan

SHOWN = 40  # clips, unless --all


def run(argv: Sequence[str]) -> int:
    """Print the plan. Exit code 2 when the run would not start."""
    parser = argparse.ArgumentParser(prog="weft plan", description="Show what a run would do; reads no weights.")
    parser.add_argument("config", type=Path, help="the run's YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--all", action="store_true", help=f"every clip, not only {SHOWN}")
    parser.add_argument("--memory", metavar="SIZE", help="plan for a device of this memory, such as 16GiB")
    arguments = parser.parse_intermixed_args(argv)

    from weft.cli.train import quiet_libraries
    from weft.run.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    quiet_libraries()

    from rich.console import Console

    from weft.run.ladder import size_of
    from weft.run.plan import plan, refuse

    made = plan(config, size_of(arguments.memory) if arguments.memory else None)
    print_plan(config, made, Console(highlight=False), everything=arguments.all)
    refuse(made.problems)
    return 0


def print_plan(config: "RunConfig", plan: "Plan", console: "Console", everything: bool) -> None:
    """Clips, buckets with their memory, targets, and the run in numbers."""
    print_clips(plan, console, everything)
    print_buckets(config, plan, console)
    print_memory(plan, console)
    print_targets(plan, console)
    schedule = config.schedule
    per_step = config.data.batch_size * schedule.accumulate
    held_out = len(plan.survey.validation)
    print_experts(config, console)
    console.print(
        f"{plan.parameters.line()}\n"
        f"{config.adapter.summary()}, precision {plan.precision}\n"
        f"{schedule.steps} steps of {per_step} clips = {plan.epochs(schedule.steps):.1f} epochs of "
        f"{plan.steps_per_epoch} steps; "
        f"{held_out or 'no'} clips held out for validation\n"
        f"disk: {gib(plan.disk)} of checkpoints and adapters in {config.folder}; {plan.cache.line()}",
        markup=False,
        soft_wrap=True,
    )


def print_experts(config: "RunConfig", console: "Console") -> None:
    """Which of two networks is trained when, and at which times."""
    from weft.run.pace import Pace

    experts = config.family.experts
    if experts == config.family.all_experts and len(experts) == 1:
        return
    pace = Pace(config.objective, experts, config.schedule.steps)
    for expert in experts:
        (phase,) = (name for name in (expert.name, "train") if name in pace.steps)
        low, high = config.objective.range_of(expert)
        console.print(
            f"Expert {expert.name}: times {low:g} to {high:g}, {pace.of(phase)} steps, an adapter of its own",
            markup=False,
        )


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


def print_buckets(config: "RunConfig", plan: "Plan", console: "Console") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = f"Buckets at batch {config.data.batch_size}"
    columns = ("frames x height x width", "tokens", "clips", "memory", "of it activations")
    table = Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD)
    counts = plan.survey.buckets()
    for bucket, memory in plan.memory.items():
        table.add_row(
            f"{bucket.frames}x{bucket.height}x{bucket.width}", f"{bucket.tokens:,}", str(counts[bucket]),
            gib(memory.total), gib(memory.activations),
        )  # fmt: skip
    console.print(table)


def print_memory(plan: "Plan", console: "Console") -> None:
    """Whether the largest bucket fits, and else what would make it fit."""
    if plan.limit is None or not plan.memory:
        return
    most = max(each.total for each in plan.memory.values())
    if most <= plan.limit:
        console.print(f"The largest bucket needs about {gib(most)} of {gib(plan.limit)}.\n", markup=False)
        return
    console.print(f"The largest bucket needs about {gib(most)}, and there are {gib(plan.limit)}.", markup=False)
    if plan.rungs:
        console.print("What would help, each on top of those before:", markup=False)
    for rung in plan.rungs:
        console.print(f"  {rung.line()}", markup=False, soft_wrap=True)
    if not plan.rungs or plan.rungs[-1].bytes > plan.limit:
        console.print("Even so it would not fit: take smaller buckets or a larger device.", markup=False)
    console.print()


def print_targets(plan: "Plan", console: "Console") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table("pattern", "read as", "modules", "such as", title="Targets", title_justify="left", box=SIMPLE_HEAD)
    for row in plan.targets.rows():
        table.add_row(*map(str, row))
    console.print(table)


def gib(size: int) -> str:
    """Bytes in GiB, or MiB when few."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
