"""Read an adapter of whatever format from a folder or file."""

from pathlib import Path

from weft.formats.adapter_file import AdapterFormat, SavedAdapter
from weft.formats.comfyui import ComfyUiFile
from weft.formats.diffusers import DiffusersFile
from weft.formats.foreign import read_foreign
from weft.formats.header import read_header
from weft.formats.kohya import MusubiFile, VideoXFunFile
from weft.formats.original import OriginalFile
from weft.formats.peft import PeftFolder
from weft.formats.sniff import is_plain, sniff

FORMATS: dict[str, AdapterFormat] = {
    "peft": PeftFolder(),
    "diffusers": DiffusersFile(),
    "comfyui": ComfyUiFile(),
    "musubi": MusubiFile(),
    "videox-fun": VideoXFunFile(),
    "original": OriginalFile(),
}


def read_adapter(path: Path, expert: str | None = None) -> SavedAdapter:
    """Find the format and read it. expert: of a file that holds both experts' layers (ai-toolkit), high or low.

    Raises ModelError that names what is at the path in place of an adapter.
    """
    found = sniff(path)
    if expert is not None and found.format != "peft" and not is_plain(read_header(found.weights).tensors):
        return read_foreign(found.weights, expert)
    return FORMATS[found.format].read(path)
