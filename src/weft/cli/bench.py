"""weft bench: the speed of a training step, as a table and as JSON."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


def run(argv: Sequence[str]) -> int:
    """Time the largest shape of a run's config, or the shipped model; prints a table, and JSON where told."""
    parser = argparse.ArgumentParser(prog="weft bench", description="Time training steps on random latents or tokens.")
    parser.add_argument("config", nargs="?", type=Path, help="a run's YAML; left out: the small model that Weft ships")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=20, help="steps that count, after 3 of warm-up")
    parser.add_argument("--json", type=Path, help="write the figures here; '-' for standard output")
    arguments = parser.parse_intermixed_args(argv)

    from weft.cli.train import quiet_libraries

    quiet_libraries()
    config = config_of(arguments.config, arguments.overrides)

    from weft.run.bench import bench

    figures = bench(config, largest_shape(config), arguments.steps)
    text = json.dumps(figures, indent=1)
    if arguments.json == Path("-"):
        print(text)
        return 0
    print_figures(figures)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return 0


def config_of(path: Path | None, overrides: Sequence[str]) -> "RunConfig":
    from weft.config.source import read_text
    from weft.run.config import load_config, parse_config

    if path is None or "=" in str(path):
        return parse_config(read_text(SMOKE, "weft bench", [*([str(path)] if path else []), *overrides]))
    return load_config(path, overrides)


def largest_shape(config: "RunConfig") -> "Shape":
    """The shape of the most tokens that the config allows, whatever its data are. Raises ConfigError when no bucket
    fits the budget."""
    from weft.errors import ConfigError
    from weft.run.questions import Row

    if config.family.medium == "text":
        return Row(config.data.length)
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


def print_figures(figures: dict[str, Any]) -> None:
    case, step, memory = figures["case"], figures["step_seconds"], figures["memory_bytes"]
    share = "  ".join(f"{name} {100 * value:.1f} %" for name, value in figures["share"].items())
    kinds = "".join(
        f"  {name:<18} {1000 * kind['median']:.1f} ms ({kind['steps']} steps, {kind['model_flops'] / 1e12:.3f} TFLOP)\n"
        for name, kind in figures.get("kinds", {}).items()
    )
    shape = f"{case['frames']}x{case['height']}x{case['width']}" if "frames" in case else f"{case['tokens']:,} tokens"
    print(
        f"{case['source']} {shape} batch {case['batch']}, "
        f"{case['adapter']}, {case['precision']} on {figures['hardware']['processor']}\n"
        f"step     {1000 * step['median']:.1f} ms (p10 {1000 * step['p10']:.1f}, p90 {1000 * step['p90']:.1f}, "
        f"{step['steps']} steps)\n"
        f"{kinds}"
        f"share    {share}\n"
        f"speed    {figures['tokens_per_second']:,.0f} tokens/s, MFU {100 * figures['mfu']:.1f} % of a measured "
        f"{figures['ceiling_matmul_flops'] / 1e12:.3f} TFLOP/s\n"
        f"memory   {memory['peak'] / 2**20:,.0f} MiB at the peak, planned {memory['planned'] / 2**20:,.0f} MiB",
        file=sys.stdout,
    )
