"""weft sample: videos from an adapter, beside the base on the same noise when asked."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weft.run.apply import Applied

DEFAULTS = {"frames": 81, "width": 832, "height": 480, "steps": 30, "guidance": 5.0, "negative": "", "seed": 0}


def arguments_of(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="weft sample", description="Generate videos with an adapter.")
    parser.add_argument("adapter", type=Path, help="adapter folder or file, or the folder of a finished run")
    parser.add_argument("--prompt", action="append", help="what to generate; may be given several times")
    parser.add_argument("--out", type=Path, default=Path("samples"), help="folder for the videos (default: samples)")
    parser.add_argument("--base", help="base model folder, when it is not where it was in training")
    parser.add_argument("--compare", action="store_true", help="also without the adapter, on the same noise")
    parser.add_argument("--strength", type=float, default=1.0, help="of the adapter; 1 is as trained")
    parser.add_argument("--fps", type=float, help="frames per second of the files (default: as in training)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    for name, kind in (("frames", int), ("width", int), ("height", int), ("steps", int), ("guidance", float),
                       ("negative", str), ("seed", int)):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, help="default: as the training run's samples")
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> int:
    arguments = arguments_of(argv)

    from weft.cli.train import quiet_libraries

    quiet_libraries()

    from weft.run.apply import apply_adapter

    applied = apply_adapter(
        arguments.adapter, arguments.base, arguments.device, arguments.precision, arguments.strength
    )
    if not applied.trained_here:
        print("note: the adapter was trained on other base weights than these.", file=sys.stderr)
    for path in make_samples(applied, arguments):
        print(path)
    return 0


def settings(arguments: argparse.Namespace, trained: Mapping[str, Any]) -> dict[str, Any]:
    """Each setting from the command line, else from the training run, else the default."""
    known = {**DEFAULTS, **trained.get("samples", {})}
    given = {name: getattr(arguments, name) for name in DEFAULTS}
    return {name: known[name] if value is None else value for name, value in given.items()}


def make_samples(applied: "Applied", arguments: argparse.Namespace) -> list[Path]:
    """The files: one video for each prompt (and one of the base), and a sheet of frames. Raises ConfigError."""
    from weft.data.media import contact_sheet, write_video
    from weft.errors import ConfigError
    from weft.run.sampling import Shot, check_shape, decoded, encode_prompts, generate

    chosen = settings(arguments, applied.config)
    prompts = arguments.prompt or applied.config.get("samples", {}).get("prompts")
    if not prompts:
        raise ConfigError("nothing to generate: the training run had no prompts either. Add --prompt 'TEXT'.")
    geometry = applied.model.family.geometry()
    seed = chosen.pop("seed")
    shots: list[Shot] = [Shot(prompt=p, seed=seed + i, **chosen) for i, p in enumerate(prompts)]
    check_shape(geometry, shots[0].frames, shots[0].width, shots[0].height, "--")
    fps = arguments.fps or applied.config.get("data", {}).get("fps") or geometry.fps
    text = encode_prompts(shots, applied.encoders)
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows, files = [], []
    for role in ("default", None) if arguments.compare else ("default",):
        with applied.model.adapters.use(role):
            latents = generate(applied.model, applied.engine, applied.model.family, shots, text)
        for i, (shot, latent) in enumerate(zip(shots, latents, strict=True)):
            frames = decoded(latent, applied.encoders)
            files.append(arguments.out / f"{i:02d}{'' if role else '_base'}.mp4")
            write_video(files[-1], frames, fps)
            rows.append((shot.prompt if role else f"base: {shot.prompt}", frames))
    contact_sheet(rows, arguments.out / "sheet.png")
    return [*files, arguments.out / "sheet.png"]
