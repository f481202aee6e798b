"""Where the pipeline's folder is, and how a part of it is replaced while others may be reading it."""

import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "src" / "weft" / "demo" / "tiny_wan"
WORK = Path(os.environ.get("TINY_WORLD_WORK", ROOT / "build" / "tiny_world"))  # states of unfinished trainings
WORK.mkdir(parents=True, exist_ok=True)


class Savable(Protocol):
    def save_pretrained(self, folder: str) -> object: ...


def tidy(config: Path) -> None:
    """Drop the path of this machine, and have transformers load as float32 what is stored in halves."""
    if not config.exists():
        return
    fields = json.loads(config.read_text())
    fields.pop("_name_or_path", None)
    if "dtype" in fields:
        fields["dtype"] = "float32"
    config.write_text(json.dumps(fields, indent=2) + "\n")


def install(part: Savable, name: str) -> None:
    """Save a model, tokenizer or scheduler as one component, each file moved in whole."""
    with tempfile.TemporaryDirectory(dir=WORK) as temporary:
        part.save_pretrained(temporary)
        tidy(Path(temporary) / "config.json")
        target = FOLDER / name
        target.mkdir(parents=True, exist_ok=True)
        for file in Path(temporary).iterdir():
            arriving = target / f".{file.name}.arriving"
            shutil.move(file, arriving)
            arriving.chmod(0o644)  # safetensors writes for the owner alone
            arriving.replace(target / file.name)


def write_model_index() -> None:
    """Name the parts as `WanPipeline.save_pretrained` does."""
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": version("diffusers"),
        "boundary_ratio": None,
        "expand_timesteps": False,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    arriving = FOLDER / ".model_index.arriving"
    arriving.write_text(json.dumps(index, indent=2) + "\n")
    arriving.replace(FOLDER / "model_index.json")
