"""Which files of an encoder's folder hold its weights, and what a folder is that is no encoder's."""

import json
from pathlib import Path

from weft.errors import ModelError, did_you_mean
from weft.families.loading import safetensors_header, weight_files

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ADAPTER = "adapter_config.json"  # of PEFT, in the folder of an adapter


def encoder_files(folder: Path) -> tuple[Path, ...]:
    """Safetensors, or torch's own where there are none. Raises ModelError when there are neither, or not all."""
    if (folder / WHOLE).is_file() and not (folder / INDEX).is_file():
        safetensors_header(folder / WHOLE)
        return (folder / WHOLE,)
    if (folder / INDEX).is_file():  # beside them may stand the same weights under the names of another program
        named = _named(folder / INDEX)
        return tuple(path for path in weight_files(folder, "") if path.name in named)
    if any(folder.glob("*.safetensors")):
        return tuple(weight_files(folder, ""))
    if (folder / PICKLE_INDEX).is_file():
        files = tuple(folder / name for name in sorted(_named(folder / PICKLE_INDEX)))
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise ModelError(
                f"{folder / PICKLE_INDEX}: {len(missing)} of its {len(files)} files are not there, first {missing[0]}."
            )
        return files
    if (folder / PICKLE).is_file():
        return (folder / PICKLE,)
    raise ModelError(f"family.source: {folder} has neither .safetensors files nor {PICKLE}. Fetch its weights.")


def _named(index: Path) -> set[str]:
    return set(json.loads(index.read_text("utf-8"))["weight_map"].values())


def what_it_is(source: str, folder: Path) -> str:
    """What a folder without config.json is, and what to do."""
    if (folder / ADAPTER).is_file():
        return (
            f"{source} is an adapter, not a model. Name the model that it was trained on, and write "
            f"adapter.start_from={source}."
        )
    if (folder / "model_index.json").is_file():
        return f"{source} is a video model in diffusers layout. Name the folder of a text encoder, such as BERT's."
    if folder.is_dir():
        if any(folder.glob(f"*/{ADAPTER}")):
            return (
                f"{source} holds an adapter, not a model. Name the model that it was trained on, and write "
                f"adapter.start_from={source}."
            )
        deeper = next(filter(None, (list(folder.glob(f"{depth}/config.json")) for depth in ("*", "*/*"))), None)
        if deeper:  # of a run's models the last
            last = max(deeper, key=lambda path: path.stat().st_mtime_ns).parent
            return f"{source} has no config.json itself. Write family.source={last}, which has one."
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
        return (
            f"{source} has no config.json. It holds: {held}. A folder with config.json, weights and a tokenizer was "
            "expected."
        )
    beside = folder.parent.iterdir() if folder.parent.is_dir() else []
    siblings = [path.name for path in beside if (path / "config.json").is_file()]
    fetch = f"To fetch it: hf download {source} --local-dir {folder.name}." if source.count("/") == 1 else ""
    advice = did_you_mean(folder.name, siblings) if siblings else fetch
    return f"there is no folder '{source}' (looked from {Path.cwd()}). {advice}".rstrip()
