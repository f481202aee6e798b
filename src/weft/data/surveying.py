"""Look into every clip of the sources, before any weight is read."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from weft.data import musubi
from weft.data.buckets import Buckets
from weft.data.manifest import Entry, read_source
from weft.data.share import of_others, shuffled
from weft.data.survey import Clip, Survey, named
from weft.data.verdicts import Asked, is_too_short, items_of
from weft.errors import ConfigError, DataError
from weft.geometry import VideoGeometry

if TYPE_CHECKING:
    from weft.data.video import Source, VideoData

PROBING_THREADS = 4


@dataclass(frozen=True)
class Place:
    """One source of the config, or of a dataset file that it names. where: as errors call it."""

    source: "Source"
    where: str
    held_out: bool

    def buckets(self, data: "VideoData") -> Buckets:
        """The shapes of its clips."""
        found = self.source.buckets or data.buckets
        assert found is not None, f"{self.where} has no buckets"
        return found

    def shapes_place(self) -> str:
        return f"{self.where}." if self.source.buckets else "data."


def survey(data: "VideoData", geometry: VideoGeometry) -> Survey:
    """Probe every clip of the sources. Raises ConfigError for impossible shapes, DataError for manifests, captions."""
    places, notices = _places(data)
    shapes = _shapes(data, places)
    problems = [f"{where}{problem}" for where, buckets in shapes.items() for problem in buckets.problems(geometry)]
    problems += _random_frames_problems(data, geometry, shapes.values())
    if problems:
        raise ConfigError(*problems)
    asked: list[Asked] = []
    taken: set[str] = set()
    for index, place in enumerate(places):
        source = place.source
        listed = read_source(source.path, source.caption_extension, source.root, source.only)
        notices += listed.notices
        asked += [_asked(entry, index, taken, place, data, geometry) for entry in listed.entries]
    if data.missing_captions == "error":
        _refuse_missing_captions([row.entry for row in asked], data.sources[0].caption_extension)

    def judged(row: Asked) -> list[Clip]:
        if not row.entry.captions and data.missing_captions == "drop":
            reason = "It has no caption, and data.missing_captions is 'drop'."
            return [replace(row.clip, verdict="dropped", reason=reason)]
        return items_of(row)

    with ThreadPoolExecutor(PROBING_THREADS) as pool:
        rows = list(pool.map(judged, asked))
    clips = _held_out(_told_of_leaks([clip for items in rows for clip in items]), data.validation_items)
    short = [items[0] for row, items in zip(asked, rows, strict=True) if is_too_short(items[0], row.buckets)]
    lengths = {geometry.latent_shape(count, 1, 1)[1] for buckets in shapes.values() for count in buckets.frames}
    return Survey(
        tuple(_shared(clips, data.share)),
        geometry,
        data.fps or geometry.fps,
        tuple(sorted(lengths)),
        tuple(notices),
        tuple(_refusals(data, clips, short)),
    )


def shapes_of(data: "VideoData") -> dict[str, Buckets]:
    """Every set of buckets in use, by the place that it is written at."""
    return _shapes(data, _places(data)[0])


def _shapes(data: "VideoData", places: Sequence[Place]) -> dict[str, Buckets]:
    return {place.shapes_place(): place.buckets(data) for place in places}


def _places(data: "VideoData") -> tuple[list[Place], list[str]]:
    """The sources one by one, those of dataset files in the place of the file; and what is to be said of them."""
    places: list[Place] = []
    notices: list[str] = []
    for name, sources in (("sources", data.sources), ("validation_sources", data.validation_sources)):
        for index, source in enumerate(sources):
            where, held_out = f"data.{name}.{index}", name != "sources"
            if source.path.suffix.lower() != ".toml":
                places.append(Place(source, where, held_out))
                continue
            found, said = musubi.expanded(source, where, data.batch_size)
            notices += said
            places += [Place(one, f"{source.path}, datasets {number}", held_out) for number, one in enumerate(found)]
    return places, notices


def _random_frames_problems(data: "VideoData", geometry: VideoGeometry, shapes: Iterable[Buckets]) -> list[str]:
    """Why batches cannot be cut to fewer frames."""
    if data.random_frames == 0:
        return []
    if not geometry.causal:
        return [
            "data.random_frames: this model's autoencoder looks at later frames too, so that latents cannot be cut. "
            "Set it to 0, and give buckets.choice 'each_frames'."
        ]
    if all(len(set(buckets.frames)) == 1 for buckets in shapes):
        return ["data.random_frames: buckets.frames has one count, so nothing is shorter. Add shorter counts to it."]
    return []


def _asked(
    entry: Entry, index: int, taken: set[str], place: Place, data: "VideoData", geometry: VideoGeometry
) -> Asked:
    """A clip before its probe, under a name that no earlier clip has taken."""
    name = entry.key if entry.key not in taken else f"{entry.key}#{index}"
    taken.add(name)
    captions = tuple(f"{data.caption_prefix} {caption}".strip() for caption in entry.captions or ("",))
    clip = Clip(
        key=name, name=name, path=entry.path, captions=captions, media=entry.media, verdict="unreadable",
        reason=entry.problem, repeats=place.source.repeats, split="validation" if place.held_out else "train",
    )  # fmt: skip
    extraction = place.source.extraction or data.extraction
    return Asked(clip, entry, place.source, place.buckets(data), extraction, geometry, data.fps or geometry.fps)


def _refuse_missing_captions(entries: Sequence[Entry], extension: str) -> None:
    missing = [entry.place for entry in entries if not entry.captions]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(entries)} clips have no caption, or an empty one. Write it into a file of the "
            f"same name ending in {extension}, or under 'text' in the manifest; or set data.missing_captions to "
            f"'empty' or 'drop':\n{named(missing)}"
        )


def _refusals(data: "VideoData", clips: Sequence[Clip], short: Sequence[Clip]) -> list[str]:
    """What the section does not tolerate in the clips."""
    refusals, of = [], f"of {len({clip.name for clip in clips})} clips are"
    if short and data.too_short == "error":
        lost = named([f"{clip.key}: {clip.reason}" for clip in short])
        refusals.append(
            f"{len(short)} {of} too short, and data.too_short is 'error'. Take them out, or add shorter counts to "
            f"buckets.frames:\n{lost}"
        )
    dropped = [f"{clip.key}: {clip.reason}" for clip in clips if clip.verdict == "dropped"]
    if data.dropped is not None and len(dropped) > data.dropped:
        refusals.append(
            f"{len(dropped)} {of} dropped, more than data.dropped ({data.dropped}). Mend them, or raise the limit:\n"
            f"{named(dropped)}"
        )
    return refusals


def _told_of_leaks(clips: list[Clip]) -> list[Clip]:
    """The clips, where a validation clip that is also trained on says so."""
    trained = {clip.path.resolve() for clip in clips if clip.split == "train" and clip.usable}
    warning = "It is trained on as well, so its loss says nothing about new clips."
    return [
        replace(clip, reason=f"{clip.reason} {warning}")
        if clip.split == "validation" and clip.usable and clip.path.resolve() in trained
        else clip
        for clip in clips
    ]


def _held_out(clips: list[Clip], count: int) -> list[Clip]:
    """The items, with those of `count` files moved to validation: of those whose names have the smallest hashes.

    All items of one file go together, of whatever source, for they show the same.
    """
    files = {path: path.resolve() for path in {clip.path for clip in clips}}
    names: dict[Path, str] = {}
    for clip in clips:
        if clip.usable and clip.split == "train":
            names.setdefault(files[clip.path], clip.name)
    chosen = set(shuffled(names.values())[:count])
    held = {file for file, name in names.items() if name in chosen}
    return [replace(clip, split="validation") if files[clip.path] in held else clip for clip in clips]


def _shared(clips: list[Clip], share: tuple[int, int] | None) -> list[Clip]:
    """The items, where those that other processes train on are marked."""
    others = of_others([clip.key for clip in clips if clip.usable and clip.split == "train"], share)
    told = "Another share trains on it."
    return [
        replace(clip, split="other share", reason=f"{clip.reason} {told}") if clip.key in others else clip
        for clip in clips
    ]
