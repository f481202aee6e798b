"""Read an adapter of whatever format from a folder or file."""

from pathlib import Path

from weft.formats.adapter_file import AdapterFormat, SavedAdapter
from weft.formats.diffusers import DiffusersFile
from weft.formats.peft import PeftFolder
from weft.formats.sniff import sniff

FORMATS: dict[str, AdapterFormat] = {"peft": PeftFolder(), "diffusers": DiffusersFile()}


def read_adapter(path: Path) -> SavedAdapter:
    """Find the format and read it. Raises ModelError that names what is at the path in place of an adapter."""
    return FORMATS[sniff(path).format].read(path)
