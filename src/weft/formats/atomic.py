"""Files that are whole or absent: written beside their place, forced to disk, then renamed."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; what was written there takes path's place when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        yield draft
        _force_to_disk(draft, os.O_RDWR)
        draft.replace(path)
        if os.name == "posix":  # elsewhere a folder cannot be opened, and needs no such call
            _force_to_disk(path.parent, os.O_RDONLY)
    finally:
        draft.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with metadata in its header, whole or not at all."""
    separate = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as draft:
        draft.touch()
        mode = draft.stat().st_mode
        # diffusers and transformers refuse files whose header does not say "pt".
        save_file(separate, draft, metadata={**metadata, "format": "pt"})
        # The library leaves files that only their owner can read, whatever the umask says.
        draft.chmod(mode)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def _force_to_disk(path: Path, mode: int) -> None:
    handle = os.open(path, mode)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
