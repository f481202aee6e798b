"""weft sample: videos from an adapter, beside the base on the same noise when asked."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weft.run.apply import Applied
    from weft.run.config import Prompt

DEFAULTS = {"frames": 81, "width": 832, "height": 480, "steps": 30, "guidance": 5.0, "guidance_low": None,
            "negative": "", "seed": 0}  # fmt: skip


def arguments_of(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="weft sample", description="Generate videos with an adapter.")
    parser.add_argument(
        "adapter",
        type=Path,
        nargs="+",
        help="adapter folder or file, or the folder of a finished run; for a model with two experts up to two of them",
    )
    parser.add_argument("--prompt", action="append", help="what to generate; may be given several times")
    parser.add_argument("--image", type=Path, action="append", help="first frame, one for each prompt or one for all")
    parser.add_argument("--out", type=Path, default=Path("samples"), help="folder for the videos (default: samples)")
    parser.add_argument("--base", help="base model folder, when it is not where it was in training")
    parser.add_argument("--compare", action="store_true", help="also without the adapter, on the same noise")
    parser.add_argument("--strength", type=float, default=1.0, help="of the adapter; 1 is as trained")
    parser.add_argument("--fps", type=float, help="frames per second of the files (default: as in training)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    for name, kind in (("frames", int), ("width", int), ("height", int), ("steps", int), ("guidance", float),
                       ("guidance_low", float), ("negative", str), ("seed", int)):  # fmt: skip
        help = "of the low expert" if name == "guidance_low" else "default: as the training run's samples"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=help)
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> int:
    arguments = arguments_of(argv)

    from weft.cli.train import quiet_libraries

    quiet_libraries()

    from weft.run.apply import apply_adapters

    applied = apply_adapters(
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


def prompts_of(arguments: argparse.Namespace, trained: Mapping[str, Any]) -> "list[Prompt]":
    """The prompts with their images: from the command line, else from the training run. Raises ConfigError."""
    from weft.errors import ConfigError
    from weft.run.config import Prompt

    images = arguments.image or [None]
    if not arguments.prompt:
        prompts = [Prompt.model_validate(prompt) for prompt in trained.get("samples", {}).get("prompts", ())]
        if not prompts:
            raise ConfigError("nothing to generate: the training run had no prompts either. Add --prompt 'TEXT'.")
        if not arguments.image:
            return prompts
        texts = [prompt.text for prompt in prompts]
    else:
        texts = arguments.prompt
    if len(images) not in (1, len(texts)):
        raise ConfigError(f"--image: {len(images)} images for {len(texts)} prompts. Give one for each, or one for all.")
    images = images * len(texts) if len(images) == 1 else images
    return [Prompt(text=text, image=image) for text, image in zip(texts, images, strict=True)]


def make_samples(applied: "Applied", arguments: argparse.Namespace) -> list[Path]:
    """The files: one video for each prompt (and one of the base), and a sheet of frames. Raises ConfigError."""
    from weft.data.media import contact_sheet, write_video
    from weft.run.sampling import decoded, generate
    from weft.run.shots import Shot, check_shots, encoded

    chosen = settings(arguments, applied.config)
    family = applied.model.family
    seed = chosen.pop("seed")
    prompts = prompts_of(arguments, applied.config)
    shots = [Shot(prompt=p.text, image=p.image, seed=seed + i, **chosen) for i, p in enumerate(prompts)]
    check_shots(family, shots, "--")
    fps = arguments.fps or applied.config.get("data", {}).get("fps") or family.geometry().fps
    told = encoded(shots, family, applied.encoders)
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows, files = [], []
    for adapter in (True, False) if arguments.compare else (True,):
        with applied.use(adapter):
            latents = generate(applied.model, applied.engine, shots, told)
        for i, (shot, latent) in enumerate(zip(shots, latents, strict=True)):
            frames = decoded(latent, applied.encoders)
            files.append(arguments.out / f"{i:02d}{'' if adapter else '_base'}.mp4")
            write_video(files[-1], frames, fps)
            rows.append((shot.prompt if adapter else f"base: {shot.prompt}", frames))
    contact_sheet(rows, arguments.out / "sheet.png")
    return [*files, arguments.out / "sheet.png"]
