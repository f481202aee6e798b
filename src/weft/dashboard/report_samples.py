"""Samples of runs within a page: which of them fit, the bytes of videos and images, replies as text."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from weft.dashboard.report_parts import Html, counted, paragraph, safe, size
from weft.dashboard.store import Store

MIME = {
    ".mp4": "video/mp4", ".webm": "video/webm", ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg",
    ".webp": "image/webp", ".gif": "image/gif",
}  # fmt: skip
BASE = "without the adapter"
AROUND = 1000  # bytes of the page around a sample, such as its prompt and title
Sample = Mapping[str, Any]


@dataclass
class Room:
    """Bytes of base64 that may still enter the page, and what was left out for want of it or otherwise."""

    left: int
    taken: int = 0
    too_much: int = 0
    missing: int = 0
    other_steps: set[int] = field(default_factory=set)

    def take(self, path: Path) -> str | None:
        """The file as a data: URI, or None when it is gone or there is no room."""
        try:
            bytes_ = path.stat().st_size
            if 4 * ((bytes_ + 2) // 3) + AROUND > self.left:
                self.too_much += 1
                return None
            text = base64.b64encode(path.read_bytes()).decode()
        except OSError:  # a sample that was deleted since, or lies on another machine
            self.missing += 1
            return None
        self.left -= len(text) + AROUND
        self.taken += 1
        return f"data:{MIME[path.suffix.lower()]};base64,{text}"

    def words(self) -> str:
        told = [f"{counted(self.taken, 'file')} of samples in this page."] if self.taken else []
        if self.other_steps:
            steps = ", ".join(map(str, sorted(self.other_steps)[:8])) + (" …" if len(self.other_steps) > 8 else "")
            told.append(f"Left out: {'step' if len(self.other_steps) == 1 else 'steps'} {steps}.")
        if self.too_much:
            told.append(f"{counted(self.too_much, 'file')} did not fit: more room with --max-mb.")
        if self.missing:
            told.append(f"{counted(self.missing, 'file')} could not be found.")
        return " ".join(told)


@dataclass(frozen=True)
class Shelf:
    """The samples of one run, and where their files lie."""

    id: str
    folder: Path
    samples: Sequence[Sample]

    @classmethod
    def of(cls, store: Store, id: str) -> "Shelf":
        return cls(id, store.folder(id), store.samples(id))

    @property
    def steps(self) -> list[int]:
        return sorted({sample["step"] for sample in self.samples if sample["adapter"]})

    def at(self, prompt: str, seed: int, step: int | None) -> Sample | None:
        """The newest sample of a prompt at a step; step None: of the base."""
        found = [s for s in self.samples if s["prompt"] == prompt and s["seed"] == seed]
        found = [s for s in found if (not s["adapter"] if step is None else s["adapter"] and s["step"] == step)]
        return found[-1] if found else None

    def file(self, sample: Sample) -> Path | None:
        """Where a sample's file lies, which is below the run's samples and nowhere else."""
        prefix = f"/media/{quote(self.id, safe='')}/"
        if not sample["media"] or not sample["media"].startswith(prefix):
            return None
        path = (self.folder / unquote(sample["media"].removeprefix(prefix))).resolve()
        inside = path.is_relative_to((self.folder / "samples").resolve()) and path.suffix.lower() in MIME
        return path if inside else None


def run_samples(store: Store, id: str, most: int) -> list[str]:
    """The samples of one run by prompt: the base, then the first, the middle and the last step. most: bytes."""
    shelf = Shelf.of(store, id)
    steps = shelf.steps
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []
    room = Room(left=most, other_steps=set(steps) - set(chosen))
    has_base = any(not sample["adapter"] for sample in shelf.samples)
    columns = [(BASE, shelf, None)] if has_base else []
    columns += [(f"step {step}", shelf, step) for step in chosen]
    # The newest and the base are what one looks at first, so they find room first.
    order = sorted(range(len(columns)), key=lambda i: (columns[i][2] is not None and columns[i][2] != chosen[-1], i))
    return _rows(columns, order, room)


def samples_side_by_side(runs: Sequence[tuple[Store, Mapping[str, Any]]], most: int) -> list[str]:
    """The newest samples of several runs by prompt, a run beside the other."""
    columns = []
    room = Room(left=most)
    for store, run in runs:
        shelf = Shelf.of(store, run["id"])
        if shelf.steps:
            columns.append((f"{run['name']}, step {shelf.steps[-1]}", shelf, shelf.steps[-1]))
            room.other_steps |= set(shelf.steps[:-1])
    room.other_steps -= {step for _, _, step in columns}
    return _rows(columns, range(len(columns)), room)


def _rows(columns: Sequence[tuple[str, Shelf, int | None]], order: Sequence[int], room: Room) -> list[str]:
    prompts = dict.fromkeys((s["prompt"], s["seed"]) for _, shelf, _ in columns for s in shelf.samples)
    cells: dict[tuple[int, tuple[str, int]], str] = {}
    for i in order:
        title, shelf, step = columns[i]
        for prompt, seed in prompts:
            sample = shelf.at(prompt, seed, step)
            if sample is not None:
                cells[i, (prompt, seed)] = _cell(sample, shelf.file(sample), title, room)
    parts: list[str] = []
    for key in prompts:
        row = [cells[i, key] for i in range(len(columns)) if (i, key) in cells]
        if row:
            head = f"<h3>{safe(key[0])} <small>seed {key[1]}</small></h3>"
            parts.append(f'<div class="prompt">{head}\n<div class="shots">{"".join(row)}</div></div>')
    if not parts:
        return []
    button = Html('<p><button type="button" id="play" hidden>Play all</button></p>') if room.taken else ""
    rows = f'<div class="prompts{" narrow" if len(columns) <= 2 else ""}">{"".join(parts)}</div>'
    return [paragraph(room.words(), "quiet") if room.words() else "", button, rows]


def _cell(sample: Sample, path: Path | None, title: str, room: Room) -> str:
    """One sample under its title, or why it is not here."""
    label = safe(f"{sample['prompt']}, {title}")
    if sample["kind"] == "text":
        said = sample["text"]
        body = f"<blockquote>{safe(said)}</blockquote>" if said is not None else paragraph("The file is gone.", "none")
        room.missing += said is None
    elif path is None:
        room.missing += 1
        body = paragraph("The file is gone.", "none")
    elif (source := room.take(path)) is None:
        body = paragraph(f"Left out ({size(path.stat().st_size)})." if path.is_file() else "The file is gone.", "none")
    elif sample["kind"] == "video":
        body = f'<video controls loop muted playsinline preload="metadata" aria-label="{label}" src="{source}"></video>'
    else:
        body = f'<img alt="{label}" src="{source}">'
    return f"<figure><figcaption>{safe(title)}</figcaption>{body}</figure>"
