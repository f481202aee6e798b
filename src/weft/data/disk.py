"""The cache on disk: a folder that runs share, also at the same time, with a file for each clip and text, or shards."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from weft.contracts import Encoders
from weft.data.cache import EXACT, CacheStatus, Keeping, latent_bytes
from weft.data.claims import Claims
from weft.data.encoding import CODE_VERSION, captions_of, latent_shape
from weft.data.entries import ContentHashes, entry_path, is_sound, parts_in, read_entry, write_entry
from weft.data.filed import Filed, Held, Shown, Sound
from weft.data.filling import ALONE, Filled, Filling, Hands, Taken
from weft.data.packing_shards import pack
from weft.data.shards import Shards
from weft.data.slots import Slots
from weft.data.survey import Clip, Wanted, bucket_of
from weft.errors import DataError
from weft.events import Listener, Notice


class LatentStore:
    """Entries found by content, cut and the encoder's fingerprint. Processes that fill it at once divide the work.

    An entry is written as a file of its own; those of one shape are then moved into shards, many in each.
    """

    def __init__(
        self,
        folder: Path,
        wanted: Wanted,
        identity: Mapping[str, str],
        hands: Hands = ALONE,
        keeping: Keeping = EXACT,
    ) -> None:
        self._folder = folder
        self._wanted = wanted
        self._identity = dict(identity)
        self._hands = hands
        self._keeping = keeping
        self._hashes = ContentHashes(folder / "hashes.json")
        self._claims = Claims()
        self._shards = Shards(folder / "shards")
        self._shards.look()
        self._scratch = Slots()
        self._checked: set[Sound] = set()  # tensors that were found sound, until the next filling
        self._paths: dict[Clip | str, Path] = {}  # of what has been read, until the next filling

    def path_of(self, what: Clip | str) -> Path:
        """Where the entry of a clip or a caption lies: the name is made of everything that it depends on."""
        if isinstance(what, str):
            return entry_path(self._folder, "text", what, self._identity["text"])
        bucket = bucket_of(what)
        transform = {
            "fps": self._wanted.fps if what.media == "video" else None,
            "frames": bucket.frames,
            "height": bucket.height,
            "width": bucket.width,
            "start": what.start,
            "media": what.media,
            "code": CODE_VERSION,
            # Only where they are used, so that entries of times before these options are found.
            **({"stride": what.stride} if what.stride != 1 else {}),
            **({"declared_fps": what.declared_fps} if what.declared_fps else {}),
            **({"dtype": self._keeping.dtype} if self._keeping.dtype != "fp32" else {}),
        }
        made_of = (self._hashes.of(what.path), json.dumps(transform, sort_keys=True), self._identity["latents"])
        return entry_path(self._folder, "latents", *made_of)

    def status(self) -> CacheStatus:
        self._shards.look(surely=True)
        clips, texts = self._missing()
        lost = {*map(self.path_of, clips), *map(self.path_of, texts)}
        there = set(map(self.path_of, self._all())) - lost
        places = {path: self._shards.find(path.stem) for path in there}
        size = sum(
            sum(part.end - part.begin for part in place.parts.values()) if place else path.stat().st_size
            for path, place in places.items()
        )
        shards = {place.path for place in places.values() if place}
        missing = latent_bytes(clips, self._wanted, self._keeping)
        return CacheStatus(len(there), len(lost), size, missing, len(shards), sum(map(bool, places.values())))

    def fill(self, encoders: Callable[[], Encoders], tell: Listener) -> Filled:
        self._paths.clear()
        self._checked.clear()
        self._shards.look(surely=True)
        while self._shards.problems:
            tell(Notice(text=f"cache: {self._shards.problems.pop()}"))
        clips, texts = self._missing()
        if not clips and not texts:
            return Filled()
        unfit = {*map(self.path_of, clips), *map(self.path_of, texts)}
        filled = Filled(damaged=sum(path.exists() or path.stem in self._shards.torn for path in unfit))
        with self._claims:
            Filling(self, self._wanted, encoders, tell, self._hands, filled).run(clips, texts)
            self._refuse_gaps(filled.failed)
            self._pack([*clips, *texts], tell)
        return filled

    def pack(self, tell: Listener) -> None:
        """Move all single entries of the survey into shards, also those that were made before there were shards."""
        with self._claims:
            self._pack(self._all(), tell)

    def expect(self, clips: Sequence[Clip]) -> None: ...

    def clip(self, clip: Clip) -> Mapping[str, Tensor]:
        return self._tensors(clip)

    def text(self, caption: str) -> Mapping[str, Tensor]:
        return self._tensors(caption)

    def shown(self, what: Clip | str) -> Shown:
        path = self._paths.get(what)
        if path is None:
            path = self._paths[what] = self.path_of(what)
        return self._found(what, path)

    def take(self, what: Clip | str) -> Taken:
        path = self.path_of(what)
        if self._has(what):
            return "there"
        if not self._claims.take(path):
            return "theirs"
        self._shards.look()
        if self._has(what):  # written between the look and the claim
            self._claims.release(path)
            return "there"
        return "ours"

    def keep(self, what: Clip | str, tensors: Mapping[str, Tensor]) -> None:
        tensors = tensors if isinstance(what, str) else self._keeping.kept(tensors)
        write_entry(self.path_of(what), tensors, what if isinstance(what, str) else what.key)
        self.leave(what)

    def leave(self, what: Clip | str) -> None:
        self._claims.release(self.path_of(what))

    def _all(self) -> list[Clip | str]:
        return [*self._wanted.usable, *captions_of(self._wanted)]

    def _wants(self, what: Clip | str) -> tuple[str, tuple[int, ...] | None]:
        """The tensor that an entry must have, and its shape where that is known."""
        return ("text", None) if isinstance(what, str) else ("latents", latent_shape(what, self._wanted))

    def _has(self, what: Clip | str) -> bool:
        (name, shape), path = self._wants(what), self.path_of(what)
        place = self._shards.find(path.stem)
        if place and name in place.parts and shape in (None, place.parts[name].shape):
            return True
        return is_sound(path, name, shape)

    def _missing(self) -> tuple[list[Clip], list[str]]:
        """Clips and captions that have no sound entry."""
        self._hashes.learn({clip.path for clip in self._wanted.usable}, self._hands.workers)
        clips = [clip for clip in self._wanted.usable if not self._has(clip)]
        self._hashes.save()
        return clips, [caption for caption in captions_of(self._wanted) if not self._has(caption)]

    def _refuse_gaps(self, failed: Mapping[str, str]) -> None:
        """Raise DataError when something is not there that was to be written."""
        self._shards.look(surely=True)
        clips, texts = self._missing()
        lost = [clip.key for clip in clips if clip.key not in failed] + texts
        if lost:
            raise DataError(
                f"{len(lost)} cache entries went while others were written, first that of {lost[0]!r}. "
                "Start again to encode them."
            )

    def _pack(self, entries: Iterable[Clip | str], tell: Listener) -> None:
        """Those that are single files, by shape: so the clips of one bucket lie together, and the texts."""
        if not self._keeping.shards:
            return
        groups: dict[str, dict[Path, None]] = {}
        for what in entries:
            path = self.path_of(what)
            if path.exists():
                groups.setdefault(self._group(what), {})[path] = None
        self._shards.look(surely=True)
        pack(self._shards, {name: list(paths) for name, paths in groups.items()}, self._claims, tell)

    def _group(self, what: Clip | str) -> str:
        return "text" if isinstance(what, str) else f"latents-{'x'.join(map(str, latent_shape(what, self._wanted)))}"

    def _tensors(self, what: Clip | str) -> Mapping[str, Tensor]:
        found = self.shown(what)
        tensors = {name: torch.empty(shape, dtype=found.dtypes[name]) for name, shape in found.shapes.items()}
        for name, tensor in tensors.items():
            found.write(name, tensor)
        return tensors

    def _found(self, what: Clip | str, path: Path) -> Filed | Held:
        """A sound entry. A damaged one is removed, so that the next fill encodes it anew. Raises DataError."""
        name, shape = self._wants(what)
        damaged, moved = partial(self._damaged, what, path), partial(self._moved, what, path)
        place = self._shards.find(path.stem)
        if place is not None:
            file, parts = place.path, place.parts
        else:
            file, parts = path, parts_in(path)
            if parts is None and (old := read_entry(path)) is not None:
                if name not in old or shape not in (None, tuple(old[name].shape)):
                    raise damaged()
                return Held(old)
        if parts is None:
            return self._moved(what, path)
        if name not in parts or shape not in (None, parts[name].shape):
            raise damaged()
        return Filed(file, parts, damaged, moved, self._scratch, self._checked)

    def _moved(self, what: Clip | str, path: Path) -> Filed | Held:
        """The entry where another process has put it meanwhile: in a shard, or as a file where its shard has gone."""
        self._shards.look(surely=True)
        if self._shards.find(path.stem) is None and parts_in(path) is None:
            raise self._damaged(what, path)
        return self._found(what, path)

    def _damaged(self, what: Clip | str, path: Path) -> DataError:
        place = self._shards.find(path.stem)
        was = "damaged and is now removed" if place or path.exists() else "not in the cache"
        if place:
            self._shards.remove(path.stem)
        path.unlink(missing_ok=True)
        of = f"The text of '{what[:60]}'" if isinstance(what, str) else f"{what.key}: its latents"
        return DataError(
            f"{of} ({place.path if place else path}): the entry is {was}. Start again, or run `weft cache`, to encode "
            "it anew."
        )
