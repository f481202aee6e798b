"""Move single cache entries into shards, while other processes read them and may be doing the same."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from weft.data.claims import Claims
from weft.data.shards import LEAST, Shards, is_full, portions, write_shard
from weft.durable import HALF_WRITTEN
from weft.events import Listener, Notice


def pack(shards: Shards, groups: Mapping[str, Sequence[Path]], claims: Claims, tell: Listener) -> None:
    """Each group of at least LEAST entries into shards of its own; a single entry is deleted when its shard is on the
    disk. What another process packs is left to it. A full disk leaves the rest single, and says so."""
    moved, made, waiting = 0, 0, []
    for group, paths in groups.items():
        claim = shards.folder / group
        if not paths or not claims.take(claim):
            continue
        try:
            waiting = tidied(shards, group, paths)
            if len(waiting) < LEAST:
                continue
            for portion in portions(waiting):
                moved += _packed(shards, group, portion)
                made += 1
        except OSError as error:
            if not is_full(error):
                raise
            left = sum(path.exists() for path in waiting)
            tell(Notice(text=f"cache: the disk is full, so {left} entries of {group} stay single files; none is lost"))
        finally:
            claims.release(claim)
    if moved:
        tell(Notice(text=f"cache: {moved} entries were put into {made} shard{'s' if made > 1 else ''}"))


def tidied(shards: Shards, group: str, paths: Sequence[Path]) -> list[Path]:
    """The single entries that no shard has, once what a crash left is cleared away: half a shard, and single files
    beside their shard."""
    for draft in shards.folder.glob(f"{HALF_WRITTEN}*-{group}-*"):
        draft.unlink(missing_ok=True)
    shards.look(surely=True)
    for path in paths:
        if shards.find(path.stem):
            path.unlink(missing_ok=True)
    return [path for path in paths if path.exists()]


def _packed(shards: Shards, group: str, portion: Sequence[Path]) -> int:
    written = write_shard(shards.folder, group, portion)
    shards.look(surely=True)
    for path in written:
        if shards.find(path.stem):  # else the shard went at once, and the entry is all that there is
            path.unlink(missing_ok=True)
    return len(written)
