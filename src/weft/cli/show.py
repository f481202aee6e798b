"""weft show: what an adapter, a checkpoint, a run or a base model holds, from headers and small files alone."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from weft.cli.show_adapters import adapter_facts
from weft.cli.show_checkpoints import checkpoint_facts, foreign_checkpoint_facts, run_facts
from weft.cli.show_models import encoder_facts, language_model_facts, model_facts, official_facts, weight_file_facts
from weft.cli.show_words import Facts, printed, some
from weft.errors import ModelError, did_you_mean
from weft.formats.sniff import DIFFUSERS_WEIGHTS, OTHER_WEIGHTS, PEFT_CONFIG, is_adapter

ADAPTER_FILES = (PEFT_CONFIG, DIFFUSERS_WEIGHTS, *OTHER_WEIGHTS)


def run(argv: Sequence[str]) -> int:
    """Print what lies at a path."""
    parser = argparse.ArgumentParser(prog="weft show", description="Say what a file or folder holds.")
    parser.add_argument("path", type=Path, help="an adapter, a checkpoint, a run, a model folder or weights")
    parser.add_argument("--json", action="store_true", help="all of it as one JSON object")
    arguments = parser.parse_args(argv)
    facts = facts_of(arguments.path)
    print(json.dumps(facts, indent=1, default=str) if arguments.json else printed(facts))
    return 0


def facts_of(path: Path) -> Facts:
    """What lies at a path, by name. Raises ModelError when it is nothing of ours."""
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = f" {did_you_mean(path.name, siblings)}" if siblings else ""
        raise ModelError(f"there is no '{path}' (in {Path.cwd()}).{near}")
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        raise ModelError(
            f"{path} is a config. What it resolves to: weft config show {path}; what it needs: weft plan {path}."
        )
    if path.is_file() and (found := weight_file_facts(path)):
        return found
    if path.is_file() or any((path / name).is_file() for name in ADAPTER_FILES):
        return adapter_facts(path)
    if (path / "manifest.json").is_file() and (path / "state.json").is_file():
        return checkpoint_facts(path)
    if (path / "config.yaml").is_file():
        return run_facts(path)
    if (path / "model_index.json").is_file() or (path / "transformer" / "config.json").is_file():
        return model_facts(path)
    if (
        found := encoder_facts(path)
        or foreign_checkpoint_facts(path)
        or language_model_facts(path)
        or _lone_adapter(path)
    ):
        return found
    if found := official_facts(path):
        return found
    names = sorted(entry.name for entry in path.iterdir())
    inside = some(names, 5) if names else "nothing"
    raise ModelError(f"{path} is no adapter, checkpoint, run or model folder. It holds {inside}.")


def _lone_adapter(folder: Path) -> Facts:
    """Of an adapter under a name of its own, where it is a folder's only file of weights; nothing for other folders."""
    weights = list(folder.glob("*.safetensors"))
    lone = len(weights) == 1 and not (folder / "config.json").exists() and is_adapter(weights[0])
    return adapter_facts(weights[0]) if lone else {}
