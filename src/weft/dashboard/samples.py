"""A run's samples as its page shows them: the newest of each step, prompt and side, found where the run lies now."""

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

from weft.dashboard.small_files import text_of

KINDS = {".mp4": "video", ".webm": "video", ".png": "image", ".jpg": "image", ".jpeg": "image", ".webp": "image",
         ".gif": "image", ".txt": "text"}  # fmt: skip
LONGEST = 20_000  # bytes of a reply
RULE = "\n\n---\n\n"  # between a prompt and its reply


def media_path(run: str, file: str) -> str:
    """Where the server has a file of a run; file: path below the run's folder."""
    return f"/media/{quote(run, safe='')}/{quote(file)}"


def place(recorded: str) -> str | None:
    """Path of a sample below its run's folder, whatever folder the trainer wrote it from; None for none of ours."""
    parts = PurePath(recorded.replace("\\", "/")).parts
    if "samples" not in parts:
        return None
    last = len(parts) - 1 - parts[::-1].index("samples")
    below = parts[last:]
    return "/".join(below) if ".." not in below and len(below) > 1 else None


def told(run: str, folder: Path, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """A sample as the page has it, from its event."""
    file = place(str(record.get("file")))
    if file is None:
        return None
    kind = KINDS.get(PurePath(file).suffix.lower(), "video")
    there = (folder / file).is_file()
    prompt = str(record.get("prompt"))
    return {
        "step": record.get("step"), "prompt": prompt, "seed": record.get("seed"),
        "adapter": bool(record.get("adapter")), "kind": kind,
        "media": media_path(run, file) if there and kind != "text" else None,
        "text": reply(folder / file, prompt) if there and kind == "text" else None,
    }  # fmt: skip


def reply(file: Path, prompt: str) -> str:
    """What a model answered, without the prompt that stands before it in the file."""
    text = text_of(file, LONGEST)
    return text.removeprefix(prompt + RULE).removesuffix("\n") if text.startswith(prompt + RULE) else text


def key_of(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Step, side and place among the prompts: of a run that was resumed the later sample of one key counts."""
    return record.get("step"), bool(record.get("adapter")), PurePath(str(record.get("file"))).name


def newest_media(run: str, folder: Path) -> list[str]:
    """Media paths of the newest step of which samples lie in a folder: by their files alone, in the prompts' order."""
    steps = sorted(_names(folder / "samples"), key=_step_of, reverse=True)
    for step in steps:
        names = sorted(_names(folder / "samples" / step))
        media = [name for name in names if KINDS.get(PurePath(name).suffix.lower()) in ("video", "image")]
        shown = [name for name in media if PurePath(name).stem != "sheet"]
        if shown:
            return [media_path(run, f"samples/{step}/{name}") for name in shown]
    return []


def _step_of(name: str) -> int:
    digits = name.removeprefix("step_")
    return int(digits) if digits.isdecimal() else -1


def _names(folder: Path) -> Iterable[str]:
    try:
        return [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError:
        return []
