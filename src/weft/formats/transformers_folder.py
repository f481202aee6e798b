"""A whole model as transformers keeps it: config.json, model.safetensors, and the tokenizer of its source."""

import json
import shutil
from pathlib import Path

from weft.durable import write_whole
from weft.errors import ModelError
from weft.formats.adapter_file import SavedAdapter
from weft.formats.sniff import STALE
from weft.formats.tensor_file import write_tensors

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# What the names of a tokenizer's files begin with, and end with: those of all of transformers' tokenizers.
TOKENIZER = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "spiece", "sentencepiece", "spm", "bpe")
TEXT = (".json", ".txt", ".model", ".jinja")


class TransformersFolder:
    """What `AutoModelForSequenceClassification.from_pretrained` takes, and `family.source` too."""

    file: str | None = None

    def write(self, target: Path, adapter: SavedAdapter) -> Path:
        """Write the folder; returns it. Raises ModelError for an adapter, which is no whole model."""
        if adapter.kind != "none":
            raise ModelError(
                f"the transformers format holds whole models, and this is an adapter of kind {adapter.kind}."
            )
        source = Path(adapter.metadata.get("base_model", "")).expanduser()
        files = tokenizer_files(source)
        kept = {key: value for key, value in adapter.metadata.items() if key not in STALE}
        write_tensors(target / WEIGHTS, adapter.tensors, {**kept, "format": "pt"})
        for file in files:
            shutil.copyfile(file, target / file.name)
        write_whole(target / CONFIG, json.dumps(adapter.options["config"], indent=2, sort_keys=True) + "\n")
        return target

    def read(self, path: Path) -> SavedAdapter:
        """Raises ModelError: it is a model, not an adapter."""
        raise ModelError(f"{path} is a whole model, not an adapter. Write it as family.source.")


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer in a model's folder. Raises ModelError where there is none."""
    found = sorted(
        path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.is_file() and path.name.startswith(TOKENIZER) and path.suffix in TEXT
    )
    if not found:
        raise ModelError(f"{folder} has no tokenizer any more, which belongs into the model that is written.")
    return found
