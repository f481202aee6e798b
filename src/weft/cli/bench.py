"""weft bench: the speed of a training step, as a table and as JSON."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weft.run.bench_cases import Case
    from weft.run.bench_measure import Asked
    from weft.run.config import RunConfig
    from weft.run.questions import Shape

SMOKE = """\
name: bench
family: {kind: wan, source: tiny-wan}
adapter: {kind: lora, rank: 16, targets: attention+ffn}
objective: {kind: flow-matching}
optimizer: {kind: adamw}
data: {kind: video, sources: [{path: .}], buckets: {sizes: [[64, 64]], frames: [9]}, batch_size: 8}
"""
DOCUMENT = 1024  # tokens of each conversation in a row of text, where nothing else is said
PEERS = ("diffusers-peft",)


def run(argv: Sequence[str]) -> int:
    """Time a suite, a model of a released size, the largest shape of a run's config, or the shipped model."""
    if argv and argv[0] == "compare":
        from weft.cli.bench_compare import compare

        return compare(argv[1:])
    arguments = parser().parse_intermixed_args(argv)

    from weft.cli.train import quiet_libraries

    quiet_libraries()
    found: list[dict[str, Any]] = []
    to_stdout = arguments.json == Path("-")
    try:
        for figures in figures_of(arguments):
            found.append(figures)
            if not to_stdout:
                print_figures(figures)
            if arguments.json and not to_stdout:
                arguments.json.write_text(json.dumps(found, indent=1) + "\n")  # what is measured stays, come what may
    except KeyboardInterrupt:
        kept = f", and they are in {arguments.json}" if arguments.json and not to_stdout and found else ""
        print(f"stopped by Ctrl-C: {len(found)} cases were measured{kept}.", file=sys.stderr)
        return 130
    if to_stdout:
        print(json.dumps(found, indent=1))
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="weft bench", description="Time training steps on random latents or tokens. weft bench compare A B "
        "compares two files of figures.",
    )  # fmt: skip
    made.add_argument("config", nargs="?", type=Path, help="a run's YAML; left out: the small model that Weft ships")
    made.add_argument("overrides", nargs="*", metavar="key=value")
    made.add_argument("--suite", metavar="NAME", help="smoke, img, vid480, vid720, both, llm, peers, cpu or io")
    made.add_argument("--model", metavar="NAME", help="a model of a released size, its weights random: wan2.1-1.3b")
    made.add_argument("--clip", metavar="FxHxW", help="of --model: frames, height and width, such as 81x480x832")
    made.add_argument("--tokens", type=int, default=4096, help="of a language model: tokens of a row")
    made.add_argument("--documents", type=int, help=f"tokens of each conversation in a row; {DOCUMENT}, or a whole row")
    made.add_argument("--batch", type=int, default=1, help="clips or rows of a micro-batch")
    made.add_argument("--blocks", type=int, metavar="K", help="time K and 2K blocks, and carry on to the whole network")
    made.add_argument("--variants", default="", metavar="'A=1; B=2'", help="changes that take turns, step by step")
    made.add_argument("--against", choices=PEERS, help="take turns with the plain step of diffusers or transformers")
    made.add_argument("--steps", type=int, default=20, help="steps that count, after 3 of warm-up")
    made.add_argument("--json", type=Path, help="write the figures here; '-' for standard output")
    return made


def figures_of(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Figures, as they are measured. Raises WeftError."""
    from weft.errors import ConfigError
    from weft.run.bench_measure import Asked, of_config, variants_of

    if arguments.steps < 1 or arguments.batch < 1 or (arguments.blocks or 1) < 1:
        raise ConfigError("weft bench: --steps, --batch and --blocks are 1 at least.")
    asked = Asked(arguments.steps, variants_of(arguments.variants), bool(arguments.against))
    overrides = [*([str(arguments.config)] if "=" in str(arguments.config) else []), *arguments.overrides]
    path = None if arguments.config is None or "=" in str(arguments.config) else arguments.config
    if arguments.suite or arguments.model:
        if path is not None or (arguments.suite and arguments.model):
            raise ConfigError("weft bench: a config, --suite and --model are three ways to say what is timed. Use one.")
        yield from suite(arguments, asked, overrides)
        return
    if arguments.clip or arguments.blocks:
        raise ConfigError("weft bench: --clip and --blocks belong to --model.")
    yield from of_config([with_config(path, [*overrides, *each]) for each in asked.variants], asked)


def suite(arguments: argparse.Namespace, asked: "Asked", overrides: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The cases of a suite, or the one that the options say."""
    from dataclasses import replace

    from weft.run.bench_cases import SUITES_AGAINST, suite_named
    from weft.run.bench_measure import measured

    if arguments.model:
        cases: Sequence[Case] = [case_of(arguments)]
    elif arguments.suite == "io":
        from weft.run.bench_io import read_cache

        yield read_cache()
        return
    else:
        cases = suite_named(arguments.suite)
        asked = replace(asked, against=asked.against or arguments.suite in SUITES_AGAINST)
    cases = [replace(case, changes=(*case.changes, *overrides)) for case in cases]
    yield from measured(cases, asked)


def case_of(arguments: argparse.Namespace) -> "Case":
    """One case of the options."""
    from weft.run.bench_cases import Case, clip_named
    from weft.run.bench_models import model_named

    text = model_named(arguments.model).family == "causal-lm"
    clip = clip_named(arguments.clip) if arguments.clip else None
    tokens = arguments.tokens if text else 0
    document = (arguments.documents or min(DOCUMENT, tokens)) if text else 0
    return Case(arguments.model, clip, tokens, document, arguments.batch, arguments.blocks)


def with_config(path: Path | None, overrides: Sequence[str]) -> "tuple[RunConfig, Shape]":
    """A run's config, and its largest shape."""
    config = config_of(path, overrides)
    return config, largest_shape(config)


def config_of(path: Path | None, overrides: Sequence[str]) -> "RunConfig":
    from weft.config.source import read_text
    from weft.run.config import load_config, parse_config

    if path is None:
        return parse_config(read_text(SMOKE, "weft bench", overrides))
    return load_config(path, overrides)


def largest_shape(config: "RunConfig") -> "Shape":
    """The shape of the most tokens that the config allows, whatever its data are. Raises ConfigError when no bucket
    fits the budget."""
    from weft.errors import ConfigError
    from weft.run.questions import Row

    if config.family.medium == "text":
        return Row(config.data.length)
    if config.family.medium == "documents":
        raise ConfigError(
            "weft bench: it measures video and language models, and this is an encoder of documents, whose steps are "
            "short. A run's own events tell its pace: weft train, then weft report."
        )
    geometry = config.family.geometry()
    ample = 100_000  # pixels: a square clip that every nominal side fits into
    found = [
        buckets.choose(max(buckets.frames), width, height, geometry)
        for buckets in config.data.shapes()
        for width, height in buckets.sizes or [(ample, ample)]
    ]
    allowed = [bucket for bucket in found if bucket]
    if not allowed:
        raise ConfigError("data.buckets: no shape fits the token budget. Raise token_budget or lower the sizes.")
    return max(allowed, key=lambda bucket: bucket.tokens)


# ---- Tables -------------------------------------------------------------------------------------------------------


def print_figures(figures: dict[str, Any]) -> None:
    for line in lines_of(figures):
        print(line, flush=True)


def lines_of(figures: dict[str, Any]) -> Iterator[str]:
    """What a person reads of a case."""
    case, step, hardware = figures["case"], figures["step_seconds"], figures["hardware"]
    if "clips_per_second" in figures:
        yield f"{case['name']} on {hardware['processor']}: {figures['clips_per_second']:,.0f} clips/s"
        return
    shape = f"{case['frames']}x{case['height']}x{case['width']}" if "frames" in case else f"{case['tokens']:,} tokens"
    name = case.get("name") or f"{case['source']} {shape} batch {case['batch']}"
    yield f"{name}, {case['adapter']}, {case['precision']} on {hardware.get('gpu', hardware['processor'])}"
    spread = f"p10 {1000 * step['p10']:.1f}, p90 {1000 * step['p90']:.1f}, " if "p10" in step else ""
    carried = ", carried on from two depths" if figures["extrapolated"] else ""
    yield f"step     {1000 * step['median']:.1f} ms ({spread}{step['steps']} steps{carried})"
    for kind, of in figures.get("kinds", {}).items():
        yield f"  {kind:<18} {1000 * of['median']:.1f} ms ({of['steps']} steps, {of['model_flops'] / 1e12:.3f} TFLOP)"
    if "share" in figures:
        yield f"share    {'  '.join(f'{part} {100 * value:.1f} %' for part, value in figures['share'].items())}"
    peak = figures["ceilings"]["products_flops"] / 1e12
    yield (f"speed    {figures['tokens_per_second']:,.0f} tokens/s, MFU {100 * figures['mfu']:.1f} % of a measured "
           f"{peak:.3f} TFLOP/s")  # fmt: skip
    if figures["over_practical"] is not None:
        yield (f"limit    {figures['over_floor']:.2f} of the least time, {figures['over_practical']:.2f} of the "
               f"practical one, HFU {100 * figures['hfu']:.1f} %")  # fmt: skip
    memory = figures["memory_bytes"]
    held = "unknown" if memory["peak"] is None else f"{memory['peak'] / 2**20:,.0f} MiB ({memory['by']})"
    yield f"memory   {held} at the peak, planned {memory['planned'] / 2**20:,.0f} MiB"
    if other := figures.get("against"):
        theirs, times = 1000 * other["step_seconds"]["median"], f"{other['ratio']:.2f} times as long"
        yield f"against  {other['name']}: {theirs:.1f} ms, {times}, memory {memory_of(other)}"


def memory_of(other: dict[str, Any]) -> str:
    ratio = other["memory_bytes"].get("ratio")
    return "unknown" if ratio is None else f"{ratio:.2f} times as much"
