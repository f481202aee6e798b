"""weft show: what an adapter, a checkpoint, a run or a base model holds, from headers and small files alone."""

import argparse
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from weft.config.show import show as as_yaml
from weft.errors import ModelError, RunError, did_you_mean
from weft.few_steps import StepList
from weft.formats.describe import describe
from weft.formats.header import read_header

if TYPE_CHECKING:
    from weft.families.sniff import Content

Facts = dict[str, Any]

KINDS = {"lora": "a LoRA", "loha": "a LoHa", "lokr": "a LoKr", "oft": "an OFT"}
LONGEST = 100  # columns of a value; --json cuts nothing
DTYPES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
ADAPTER_FILES = ("adapter_config.json", "pytorch_lora_weights.safetensors")


def run(argv: Sequence[str]) -> int:
    """Print what lies at a path."""
    parser = argparse.ArgumentParser(prog="weft show", description="Say what a file or folder holds.")
    parser.add_argument("path", type=Path, help="an adapter, a checkpoint, a run, a model folder or weights")
    parser.add_argument("--json", action="store_true", help="all of it as one JSON object")
    arguments = parser.parse_args(argv)
    facts = facts_of(arguments.path)
    if arguments.json:
        print(json.dumps(facts, indent=1, default=str))
        return 0
    for name, value in facts.items():
        print(f"{name:<16} {_words(value)}")
    return 0


def facts_of(path: Path) -> Facts:
    """What lies at a path, by name. Raises ModelError when it is nothing of ours."""
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = f" {did_you_mean(path.name, siblings)}" if siblings else ""
        raise ModelError(f"there is no '{path}' (in {Path.cwd()}).{near}")
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
    if found := language_model_facts(path) or official_facts(path):
        return found
    names = sorted(entry.name for entry in path.iterdir())
    inside = ", ".join(names[:5]) + (" and more" if len(names) > 5 else "") if names else "nothing"
    raise ModelError(f"{path} is no adapter, checkpoint, run or model folder. It holds {inside}.")


# ---- What it may be -----------------------------------------------------------------------------------------------


def adapter_facts(path: Path) -> Facts:
    found = describe(path)
    provenance = {name.removeprefix("weft."): value for name, value in found.metadata.items()}
    config = _json(provenance.pop("config", ""))
    steps = _few_steps(provenance.pop("step_list", ""))
    if (items := provenance.get("data.items", "")).isdecimal():
        provenance["data.items"] = f"{items} {_items(config)}"
    variant = [name for name, used in (("rslora", found.rslora), ("dora", found.dora)) if used]
    return {
        "what": f"{KINDS[found.kind]} in {found.format} format" + (f" ({', '.join(variant)})" if variant else ""),
        "file": str(found.weights),
        "size": _size(found.size),
        "rank": found.rank,
        "alpha": found.alpha,
        "scale": found.scale,
        "parameters": found.parameters,
        "dtype": {DTYPES.get(dtype, dtype): count for dtype, count in found.dtypes.items()},
        "targets": _patterns(found.targets),
        **({"sampled in": steps} if steps else {}),
        "trained with": provenance or "(the file does not say)",
        **({"config": config} if config else {}),
    }


def _few_steps(text: str) -> str:
    """At which times a few-step student is asked, from its file's own words; nothing for other adapters."""
    if not text:
        return ""
    try:
        return f"{StepList.from_json(text)}, guidance 1"
    except ValueError as damaged:
        return f"(damaged: {damaged})"


def checkpoint_facts(folder: Path) -> Facts:
    """Sizes are compared, hashes are not: resuming does that."""
    manifest = _json((folder / "manifest.json").read_text())
    if not manifest or "files" not in manifest:
        raise RunError(f"{folder}: its manifest.json is damaged. Resume from another checkpoint.")
    files: Mapping[str, Any] = manifest["files"]
    wrong = [n for n, f in files.items() if not (folder / n).is_file() or (folder / n).stat().st_size != f["bytes"]]
    config = folder / "config.json"
    return {
        "what": "a checkpoint, to resume from",
        "step": manifest["step"],
        "size": _size(sum(file["bytes"] for file in files.values())),
        "whole": f"no: {', '.join(wrong)} missing or of another size" if wrong else "yes, by the sizes of its files",
        "tensors": (folder / "state.json").read_text().count('"$tensor"') if not wrong else "(not read)",
        "config": _json(config.read_text()) if config.is_file() else {},
    }


def run_facts(folder: Path) -> Facts:
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    checkpoints = [path.name for path in _by_step(folder / "checkpoints")]
    finished = sorted(path.name for path in folder.glob("adapter*") if path.is_dir())
    adapters = [*(path.name for path in _by_step(folder)), *finished]
    return {
        "what": "a run",
        "name": config.get("name", folder.name),
        **_progress(folder / "events.rank0.jsonl", config),
        "checkpoints": checkpoints or "none",
        "adapters": adapters or "none",
        "samples": len([path for path in folder.glob("samples/**/*") if path.is_file()]),
        "config": config,
    }


def _progress(log: Path, config: Mapping[str, Any]) -> Facts:
    if not log.is_file():
        return {"state": "not started"}
    events = [event for line in log.read_text(encoding="utf-8").splitlines() if (event := _json(line))]
    steps = [event for event in events if event.get("event") == "step"]
    state = "no end in the log: it runs, or was killed"
    if events and events[-1].get("event") == "run_ended":
        reason = events[-1].get("reason")
        state = events[-1]["outcome"] + (f": {reason}" if reason else "")
    started = [event for event in events if event.get("event") == "run_started"]
    total = started[-1]["total_steps"] if started else config.get("schedule", {}).get("steps", "?")
    last = steps[-1] if steps else {"step": 0, "metrics": {}}
    return {"state": state, "step": f"{last['step']} of {total}", "last metrics": last["metrics"] or "none"}


def model_facts(folder: Path) -> Facts:
    index = folder / "model_index.json"
    facts: Facts = {"what": "a base model in diffusers layout"}
    if index.is_file():
        facts["pipeline"] = (_json(index.read_text()) or {}).get("_class_name", "?")
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        weights = sorted(part.glob("*.safetensors"))
        config = _json((part / "config.json").read_text()) if (part / "config.json").is_file() else {}
        name = config.get("_class_name") or (config.get("architectures") or [""])[0]
        if weights:
            facts[part.name] = f"{name}, {_weights(weights)}"
        elif name:
            facts[part.name] = f"{name}, no .safetensors file"
    return facts


def language_model_facts(folder: Path) -> Facts:
    """Of a decoder's folder as transformers saves it; nothing for other folders. Sizes as its config says them."""
    network = _decoder(folder)
    if not network:
        return {}
    config = _json((folder / "config.json").read_text(encoding="utf-8"))
    weights = sorted(folder.glob("*.safetensors"))
    sizes = {"blocks": "num_hidden_layers", "width": "hidden_size", "vocabulary": "vocab_size",
             "context": "max_position_embeddings"}  # fmt: skip
    tokenizer = _json(found.read_text("utf-8")) if (found := folder / "tokenizer_config.json").is_file() else {}
    template = (folder / "chat_template.jinja").is_file() or bool(tokenizer.get("chat_template"))
    return {
        "what": "a language model",
        "network": f"{network}, {_weights(weights)}" if weights else f"{network}, no .safetensors file",
        **{name: config[key] for name, key in sizes.items() if key in config},
        "tokenizer": tokenizer.get("tokenizer_class", "there") if tokenizer else "none",
        "chat template": "there" if template else "none",
    }


def _decoder(folder: Path) -> str:
    """The class of the decoder that a folder holds; empty where it holds none."""
    from weft.families.causal_lm import DECODERS, is_language_model

    if not is_language_model(folder):
        return ""
    named = _json((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    return named[0] if named[0].endswith(DECODERS) else ""


def weight_file_facts(path: Path) -> Facts:
    """Of a file with the weights of a base model or one of its parts; nothing for other files."""
    from weft.families.sniff import Tensors, content_of, header_of

    if path.suffix in (".pth", ".pt"):
        from weft.families.stored import entries_of

        header = Tensors({name: (entry.dtype, entry.shape) for name, entry in entries_of(path).items()})
    elif path.suffix in (".safetensors", ".gguf"):
        header = header_of([path])
    else:
        return {}
    content = content_of(header)
    decoder = _decoder(path.parent) if content.kind in ("text encoder", "unknown") else ""
    if content.kind == "adapter" or (content.kind == "unknown" and not content.foreign and not decoder):
        return {}
    what = f"weights of a language model, {decoder}" if decoder else str(content)
    facts: Facts = {"what": what, "file": str(path), "size": _size(path.stat().st_size)}
    facts |= {"parameters": content.numbers, "dtype": content.precision}
    if content.naming:
        facts["names"] = "of the makers" if content.naming == "official" else "of diffusers and transformers"
    if content.kind == "network":
        facts |= {"width": content.sizes.inner, "blocks": content.sizes.layers, "channels": content.sizes.channels}
        facts["model"] = _released(content) or "none that Weft knows by its sizes"
    return facts


def _released(content: "Content") -> str:
    """The models that a transformer can be of: an expert of Wan 2.2 has the shape of a Wan 2.1."""
    from weft.families.sniff import released_name

    alone, of_two = released_name(content, experts=1), released_name(content, experts=2)
    if content.family == "hunyuan-video":
        return alone or ""
    return ", or ".join(filter(None, (alone, of_two and f"an expert of {of_two}")))


def official_facts(folder: Path) -> Facts:
    """Of a directory as the makers of a model publish it; nothing for other folders."""
    from weft.families.layouts import HUNYUAN_FOLDER

    wan = any((folder / f"{expert}_noise_model").is_dir() for expert in ("high", "low")) or any(
        folder.glob("diffusion_pytorch_model*.safetensors")
    )
    if not wan and not (folder / HUNYUAN_FOLDER).is_dir():
        return {}
    from weft.families.checkpoint import KIND_OF_PART, open_checkpoint

    checkpoint = open_checkpoint(str(folder), None, "wan" if wan else "hunyuan-video")
    facts: Facts = {"what": "a base model in its makers' own layout"}
    if checkpoint.has(checkpoint.first_network):
        facts["model"] = checkpoint.facts.model or "none that Weft knows by its sizes"
    for part in KIND_OF_PART:
        if checkpoint.has(part):
            facts[part] = str(checkpoint.content(part))
    return facts


def _weights(files: Sequence[Path]) -> str:
    headers = [read_header(path) for path in files]
    entries = [entry for header in headers for entry in header.tensors.values()]
    numbers = Counter[str]()
    for entry in entries:
        numbers[DTYPES.get(entry.dtype, entry.dtype)] += entry.numbers
    size = _size(sum(header.size for header in headers))
    return f"{sum(numbers.values()):,} parameters, mostly {numbers.most_common(1)[0][0]}, {size}" if numbers else size


# ---- Words --------------------------------------------------------------------------------------------------------


def _patterns(paths: Sequence[str]) -> dict[str, int]:
    """Layer paths with their numbers left out, and how many layers each stands for."""
    return dict(Counter(re.sub(r"\.\d+(?=\.)", ".*", path) for path in paths))


def _by_step(folder: Path) -> list[Path]:
    """Folders global_step_N and, of an expert, global_step_N_high, by their step."""
    found = {path: path.name.split("_")[2] for path in folder.glob("global_step_*")}
    return sorted((path for path in found if found[path].isdecimal()), key=lambda path: (int(found[path]), path.name))


def _items(config: Mapping[str, Any]) -> str:
    """What the items of a run's data are."""
    from weft import plugins

    if config.get("data", {}).get("kind") == "prompts":
        return "captions"
    family = plugins.section_types("family").get(config.get("family", {}).get("kind"))
    return {"video": "clips", "text": "conversations"}[family.medium] if family else "items"


def _json(text: str) -> dict[str, Any]:
    """The JSON object in a text; empty when there is none."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _size(count: int) -> str:
    units = (("GiB", 30), ("MiB", 20), ("KiB", 10))
    return next((f"{count / 2**power:.1f} {unit}" for unit, power in units if count >= 2**power), f"{count} bytes")


def _words(value: Any) -> str:
    """A value for people: sections as YAML, one entry a line, below one another."""
    if isinstance(value, Mapping):
        return ("\n" + " " * 17).join(_cut(line) for line in as_yaml(value).splitlines())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cut(line: str) -> str:
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
