"""The cache on disk: a folder that runs share, also at the same time, with one file for each clip and each text."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from weft.contracts import Encoders
from weft.data.cache import CacheStatus, latent_bytes
from weft.data.claims import Claims
from weft.data.encoding import CODE_VERSION, captions_of, latent_shape
from weft.data.entries import ContentHashes, entry_path, is_sound, read_entry, write_entry
from weft.data.filling import ALONE, Filled, Filling, Hands, Taken
from weft.data.survey import Clip, Wanted, bucket_of
from weft.errors import DataError
from weft.events import Listener


class LatentStore:
    """Entries found by content, cut and the encoder's fingerprint. Processes that fill it at once divide the work."""

    def __init__(self, folder: Path, wanted: Wanted, identity: Mapping[str, str], hands: Hands = ALONE) -> None:
        self._folder = folder
        self._wanted = wanted
        self._identity = dict(identity)
        self._hands = hands
        self._hashes = ContentHashes(folder / "hashes.json")
        self._claims = Claims()

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
        }
        made_of = (self._hashes.of(what.path), json.dumps(transform, sort_keys=True), self._identity["latents"])
        return entry_path(self._folder, "latents", *made_of)

    def status(self) -> CacheStatus:
        clips, texts = self._missing()
        gone = {self.path_of(clip): clip for clip in clips}
        lost = {*gone, *map(self.path_of, texts)}
        wanted = {*map(self.path_of, self._wanted.usable), *map(self.path_of, captions_of(self._wanted))}
        size = sum(path.stat().st_size for path in wanted - lost)
        return CacheStatus(len(wanted - lost), len(lost), size, latent_bytes(gone.values(), self._wanted))

    def fill(self, encoders: Callable[[], Encoders], tell: Listener) -> Filled:
        clips, texts = self._missing()
        if not clips and not texts:
            return Filled()
        unfit = {*map(self.path_of, clips), *map(self.path_of, texts)}
        filled = Filled(damaged=sum(path.exists() for path in unfit))
        with self._claims:
            Filling(self, self._wanted, encoders, tell, self._hands, filled).run(clips, texts)
        self._refuse_gaps(filled.failed)
        return filled

    def expect(self, clips: Sequence[Clip]) -> None: ...

    def clip(self, clip: Clip) -> Mapping[str, Tensor]:
        return self._read(self.path_of(clip), "latents", latent_shape(clip, self._wanted), f"{clip.key}: its latents")

    def text(self, caption: str) -> Mapping[str, Tensor]:
        return self._read(self.path_of(caption), "text", None, f"The text of '{caption[:60]}'")

    def take(self, what: Clip | str) -> Taken:
        path = self.path_of(what)
        if self._has(what):
            return "there"
        if not self._claims.take(path):
            return "theirs"
        if self._has(what):  # written between the look and the claim
            self._claims.release(path)
            return "there"
        return "ours"

    def keep(self, what: Clip | str, tensors: Mapping[str, Tensor]) -> None:
        write_entry(self.path_of(what), tensors, what if isinstance(what, str) else what.key)
        self.leave(what)

    def leave(self, what: Clip | str) -> None:
        self._claims.release(self.path_of(what))

    def _has(self, what: Clip | str) -> bool:
        if isinstance(what, str):
            return is_sound(self.path_of(what), "text")
        return is_sound(self.path_of(what), "latents", latent_shape(what, self._wanted))

    def _missing(self) -> tuple[list[Clip], list[str]]:
        """Clips and captions that have no sound entry."""
        self._hashes.learn({clip.path for clip in self._wanted.usable}, self._hands.workers)
        clips = [clip for clip in self._wanted.usable if not self._has(clip)]
        self._hashes.save()
        return clips, [caption for caption in captions_of(self._wanted) if not self._has(caption)]

    def _refuse_gaps(self, failed: Mapping[str, str]) -> None:
        """Raise DataError when something is not there that was to be written."""
        clips, texts = self._missing()
        lost = [clip.key for clip in clips if clip.key not in failed] + texts
        if lost:
            raise DataError(
                f"{len(lost)} cache entries went while others were written, first that of {lost[0]!r}. "
                "Start again to encode them."
            )

    def _read(self, path: Path, name: str, shape: tuple[int, ...] | None, what: str) -> dict[str, Tensor]:
        """A sound entry. A damaged one is removed, so that the next fill encodes it anew."""
        tensors = read_entry(path)
        if tensors is not None and name in tensors and shape in (None, tuple(tensors[name].shape)):
            return tensors
        was = "damaged and is now removed" if path.exists() else "not in the cache"
        path.unlink(missing_ok=True)
        raise DataError(f"{what} ({path}): the entry is {was}. Start again, or run `weft cache`, to encode it anew.")
