"""Files and folders that are whole or absent, whenever a process is killed: written beside their place, forced to the
disk, then renamed."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

HALF_WRITTEN = ".tmp-"  # every draft's name begins so
REPLACED = "-old-"  # before the name of a folder that is being replaced


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; what was written there takes path's place when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{HALF_WRITTEN}{uuid4().hex[:8]}-{path.name}")
    try:
        yield draft
        force_to_disk(draft)
        draft.replace(path)
        force_to_disk(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file's content at one stroke."""
    with whole_file(path) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


def draft_of(target: Path) -> Path:
    """A new folder beside a target, in which it is made ready."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f"{HALF_WRITTEN}{uuid4().hex[:8]}-{target.name}")
    draft.mkdir()
    return draft


def take_place(draft: Path, target: Path) -> None:
    """Give a folder that is ready the target's name, once all of it is on the disk; an older folder is replaced."""
    for path in draft.rglob("*"):
        force_to_disk(path)
    force_to_disk(draft)
    if target.exists():
        old = target.with_name(f"{HALF_WRITTEN}{uuid4().hex[:8]}{REPLACED}{target.name}")
        target.rename(old)
        draft.rename(target)
        shutil.rmtree(old)
    else:
        draft.rename(target)
    force_to_disk(target.parent)


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder beside the target and give it the target's name; an older folder of that name is replaced."""
    draft = draft_of(target)
    try:
        fill(draft)
        take_place(draft, target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def remove_folder(folder: Path) -> None:
    """Delete a folder so that a kill meanwhile leaves none that looks whole: it loses its name first."""
    doomed = folder.with_name(f"{HALF_WRITTEN}{uuid4().hex[:8]}-{folder.name}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def remove_drafts(folder: Path) -> None:
    """Delete what killed processes left half-written in a folder; a folder that was about to be replaced, and was
    not, gets its name back."""
    for path in folder.glob(f"{HALF_WRITTEN}*"):
        _, replaced, name = path.name.partition(REPLACED)
        if replaced and not (folder / name).exists():
            path.rename(folder / name)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def force_to_disk(path: Path) -> None:
    """Put a file, or a folder's entries, on the disk. Windows opens no folders, and needs no such call for them."""
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems cannot sync folders; there the rename alone must do
            raise
    finally:
        os.close(handle)


def is_running(process: int) -> bool | None:
    """Whether a process of this machine is there, so that what it left half-done may be cleared away. None where asking
    would end it, as on Windows."""
    if os.name != "posix":
        return None
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
