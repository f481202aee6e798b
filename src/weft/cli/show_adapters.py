"""What `weft show` says of an adapter: its strength, which programs take it as it is, and how it was trained."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from weft.cli.show_words import DTYPES, Facts, json_in, json_of, size_words
from weft.errors import ModelError
from weft.few_steps import StepList
from weft.formats.describe import Description, describe
from weft.formats.sniff import DIFFUSERS_WEIGHTS, OTHER_WEIGHTS

KINDS = {"lora": "a LoRA", "loha": "a LoHa", "lokr": "a LoKr", "oft": "an OFT"}
TOLD = ("expert", "git", "source")  # left out of "trained with" where they say nothing
ORDER = ("step", "steps", "expert", "times", "loss", "started", "saved", "seed", "family", "base_model", "base", "data",
         "data.items", "items_per_step", "processes", "hardware", "precision", "version", "versions")  # fmt: skip

# Format -> programs that take such a file as it is: ComfyUI's comfy/lora.py, diffusers' loaders/, musubi's networks/.
LOADERS = {
    "peft": ["PEFT", "transformers", "vLLM"],
    "diffusers": ["diffusers"],
    "comfyui": ["ComfyUI", "diffusers"],
    "musubi": ["musubi", "ComfyUI", "diffusers (when all layers of each block are adapted)"],
    "videox-fun": ["VideoX-Fun"],
    "original": ["VideoX-Fun (--use_peft_lora)", "loaders for the makers' own code"],
}
# Keys of other trainers' headers -> what they are called here, in the order in which they are told.
SAID = {
    "modelspec.title": "title",
    "modelspec.author": "author",
    "modelspec.description": "description",
    "modelspec.usage_hint": "hint",
    "modelspec.trigger_phrase": "trigger words",
    "modelspec.architecture": "architecture",
    "ss_base_model_version": "base model",
    "ss_sd_model_name": "base file",
    "ss_network_module": "network module",
    "ss_network_dim": "rank",
    "ss_network_alpha": "alpha",
    "ss_network_args": "network arguments",
    "ss_optimizer": "optimizer",
    "ss_learning_rate": "learning rate",
    "ss_lr_scheduler": "curve",
    "ss_steps": "steps",
    "ss_max_train_steps": "steps planned",
    "ss_epoch": "epoch",
    "ss_num_epochs": "epochs planned",
    "ss_seed": "seed",
    "ss_mixed_precision": "precision",
    "ss_timestep_sampling": "times",
    "ss_discrete_flow_shift": "shift",
    "ss_num_train_items": "clips",
    "ss_num_train_images": "images",
    "ss_training_comment": "comment",
    "ss_training_started_at": "started",
    "ss_training_finished_at": "finished",
    "modelspec.date": "date",
    "modelspec.license": "license",
    "modelspec.merged_from": "merged from",
}
NOTHING = ("", "None", "null")
OTHER_FORMATS = ("ComfyUI", "musubi", "VideoX-Fun", "the makers' own code")  # of OTHER_WEIGHTS, one by one
TAGS = 8  # most frequent captions' tags that are told


def adapter_facts(path: Path) -> Facts:
    """Of an adapter folder or file in any format; of a file for both experts of Wan 2.2 those of each."""
    try:
        return _facts(describe(path), path)
    except ModelError:
        try:
            both = {f"{expert} noise": _facts(describe(path, expert), path) for expert in ("high", "low")}
        except ModelError:
            both = {}
        if not both:
            raise
    shared = dict.fromkeys(key for key in both["high noise"] if both["high noise"][key] == both["low noise"].get(key))
    facts = {key: both["high noise"][key] for key in shared}
    own = {name: {key: value for key, value in each.items() if key not in shared} for name, each in both.items()}
    # Of the programs none takes both from one file.
    alone = {"loaded as it is": ["Weft"]} if "loaded as it is" in facts else {}
    return {**facts, "what": f"{facts.get('what', 'an adapter')}, for both experts", **alone, **own}


def _facts(found: Description, path: Path) -> Facts:
    about = dict(found.metadata)
    told = {name.removeprefix("weft."): about.pop(name) for name in list(about) if not _foreign(name)}
    config = json_in(told.pop("config", ""))
    steps = _few_steps(told.pop("step_list", ""))
    variant = [name for name, used in (("rslora", found.rslora), ("dora", found.dora)) if used]
    theirs = foreign_facts(about)
    family = told.get("family") or found.family or config.get("family", {}).get("kind")
    return {
        "what": f"{KINDS[found.kind]} in {found.format} format" + (f" ({', '.join(variant)})" if variant else ""),
        "file": str(found.weights),
        **_beside(path, found.weights),
        "size": size_words(found.size),
        **({"family": family} if family else {}),
        **expert_facts(found),
        "rank": found.rank,
        "alpha": found.alpha,
        "scale": found.scale,
        **({"scales": list(found.scales)} if len(found.scales) > 1 else {}),
        **({"ranks": {str(rank): layers for rank, layers in found.ranks.items()}} if len(found.ranks) > 1 else {}),
        "alpha is told": where_alpha_is(found),
        "loaded as it is": loaders(found, family),
        "parameters": found.parameters,
        "dtype": {DTYPES.get(dtype, dtype): count for dtype, count in found.dtypes.items()},
        "targets": patterns(found.targets),
        **_trainers_checkpoint(path),
        **({"sampled in": steps} if steps else {}),
        "trained with": _told(told, config) or ("(see below)" if theirs else "(the file does not say)"),
        **({"other trainers' words": theirs} if theirs and not told else {}),
        **({"config": config} if config else {}),
    }


def _beside(path: Path, weights: Path) -> Facts:
    """Of a folder, the files for other programs that lie beside the one that is told of."""
    others = {DIFFUSERS_WEIGHTS: "diffusers", **dict(zip(OTHER_WEIGHTS, OTHER_FORMATS, strict=True))}
    there = {name: to for name, to in others.items() if path.is_dir() and (path / name).is_file()}
    words = [f"{name}, for {to}" for name, to in there.items() if path / name != weights]
    return {"beside it": words} if words else {}


def _foreign(name: str) -> bool:
    return name.startswith(("ss_", "sshs_", "modelspec."))


def expert_facts(found: Description) -> Facts:
    """Which of two networks it is for: as its header says, or else as its name does."""
    from weft.families.sniff import names_expert

    if found.expert:
        return {"expert": f"{found.expert} noise"}
    path = found.weights
    names = f"{path.parent.name}/{path.name}" if "model" in path.name else path.name
    word = next((word for word in ("high", "low") if names_expert(names, word)), None)
    return {"expert": f"{word} noise, by its name"} if word and "weft.expert" not in found.metadata else {}


def where_alpha_is(found: Description) -> str:
    """Where a program reads the alpha; a file without one is taken at scale 1."""
    if found.kind == "oft":
        return "nowhere: an OFT has none"
    if not found.tells_alpha:
        return "nowhere, so it counts as the rank, and the scale is 1"
    if any(key.endswith(".alpha") for key in found.keys):
        return "in the file, beside each layer"
    return "in adapter_config.json" if found.format == "peft" else "in the file's header, for diffusers from 0.34 on"


def loaders(found: Description, family: str | None) -> list[str]:
    """Programs that take the file as it is; for others there is `weft export`."""
    names = LOADERS.get(found.format, [])
    if found.format == "peft" and (family != "causal-lm" or found.kind != "lora"):
        names = names[:1]
    if found.format in ("comfyui", "musubi") and (found.kind != "lora" or found.dora or family != "wan"):
        # diffusers takes LoRA alone from such files, and of HunyuanVideo's it reads no alpha.
        names = [name for name in names if not name.startswith("diffusers")]
    return [*names, "Weft"]


def patterns(paths: Sequence[str]) -> dict[str, int]:
    """Layer paths with their numbers left out, and how many layers each stands for."""
    return dict(Counter(re.sub(r"\.\d+(?=\.)", ".*", path) for path in paths))


def _told(told: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, str]:
    """Provenance for people: times as dates, and nothing that is said above or says nothing."""
    names = sorted(told, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    shown = {name: told[name] for name in names if told[name] or name not in TOLD}
    if shown.get("expert") == "default":
        del shown["expert"]
    if (items := shown.get("data.items", "")).isdecimal():
        shown["data.items"] = f"{items} {_items(config)}"
    if versions := json_in(shown.get("versions", "")):
        shown["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    for name in ("started", "saved"):
        if shown.get(name, "").isdecimal():
            shown[name] = moment(shown[name])
    return shown


def _items(config: Mapping[str, Any]) -> str:
    """What the items of a run's data are."""
    from weft import plugins

    if config.get("data", {}).get("kind") == "prompts":
        return "captions"
    family = plugins.section_types("family").get(config.get("family", {}).get("kind"))
    names = {"video": "clips", "text": "conversations", "documents": "documents"}
    return names[family.medium] if family else "items"


def moment(seconds: str) -> str:
    """Seconds since 1970 as the local date and time; any other text as it is."""
    try:
        return datetime.fromtimestamp(float(seconds)).astimezone().isoformat(" ", "minutes")
    except (ValueError, OverflowError, OSError):
        return seconds


def _few_steps(text: str) -> str:
    """At which times a few-step student is asked, from its file's own words; nothing for other adapters."""
    if not text:
        return ""
    try:
        return f"{StepList.from_json(text)}, guidance 1"
    except ValueError as damaged:
        return f"(damaged: {damaged})"


def _trainers_checkpoint(path: Path) -> Facts:
    """Beside the adapter, what transformers' Trainer goes on from."""
    state = json_of((path if path.is_dir() else path.parent) / "trainer_state.json")
    return {"within": f"a checkpoint of transformers' Trainer at step {state.get('global_step', '?')}"} if state else {}


# ---- What other trainers wrote ------------------------------------------------------------------------------------


def foreign_facts(metadata: Mapping[str, str]) -> Facts:
    """The ss_* and modelspec.* keys of a header that people ask for, in words."""
    facts: Facts = {}
    for key, name in SAID.items():
        value = metadata.get(key, "")
        if value not in NOTHING:
            facts.setdefault(name, moment(value) if name in ("started", "finished") else value)
    if sets := dataset_words(metadata.get("ss_datasets", "") or metadata.get("ss_dataset_dirs", "")):
        facts["datasets"] = sets
    if tags := tag_words(metadata.get("ss_tag_frequency", "")):
        facts["most frequent tags"] = tags
    return facts


def dataset_words(text: str) -> list[str]:
    """A phrase for each dataset of ss_datasets."""
    try:
        sets = json.loads(text)
    except ValueError:
        return []
    sets = list(sets.values()) if isinstance(sets, dict) else sets
    return [_dataset(each) for each in sets if isinstance(each, dict)] if isinstance(sets, list) else []


def _dataset(each: Mapping[str, Any]) -> str:
    places = ("video_directory", "image_directory", "video_jsonl_file", "image_jsonl_file")
    name = next((str(each[key]) for key in places if each.get(key)), "a folder")
    size = each.get("resolution")
    parts = [
        "x".join(map(str, size)) if isinstance(size, list) else str(size or ""),
        f"frames {each['target_frames']}" if each.get("target_frames") else "",
        f"{each['img_count']} images" if each.get("img_count") else "",
        f"repeats {each['num_repeats']}" if each.get("num_repeats", 1) != 1 else "",
    ]
    told = ", ".join(filter(None, parts))
    return f"{name} ({told})" if told else name


def tag_words(text: str) -> list[str]:
    """The tags of ss_tag_frequency, {folder: {tag: count}}, that come most often."""
    counts = Counter[str]()
    for folder in json_in(text).values():
        if isinstance(folder, dict):
            counts.update({str(tag).strip(): n for tag, n in folder.items() if isinstance(n, int)})
    return [f"{tag} ({count})" for tag, count in counts.most_common(TAGS)]
