"""What the tensors of an adapter file are called, in every program's words: which module, and which part of its change.

Variants as they are met in files of musubi-tuner, VideoX-Fun, ComfyUI, diffusion-pipe, ai-toolkit, DiffSynth-Studio,
OneTrainer, SimpleTuner and diffusers.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from weft.errors import ModelError
from weft.formats.adapter_file import ENDS, MAGNITUDE, A, B, kind_in
from weft.formats.strangers import refuse_ambiguous, stranger
from weft.names.modules import FAMILIES, Modules, family_of, modules

NAMES = "weft.names"  # in the metadata of files with underscores: their names of modules -> those with dots, as JSON
ALPHA = ".alpha"
DORA_BY_INPUT = ".dora_scale"

# Beginnings of names, in the order in which they are tried, and the format whose mark each is.
BEGINNINGS: Mapping[str, str] = {
    "lora_unet__": "videox-fun",
    "lora_unet_": "musubi",
    "lora_transformer_": "musubi",  # OneTrainer
    "lycoris_": "musubi",  # SimpleTuner
    "base_model.model.": "peft",
    "model.diffusion_model.": "comfyui",
    "diffusion_model.": "comfyui",
    "transformer.": "diffusers",
    "model.": "original",
    "": "original",
}
UNDERSCORED = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")
# Whose layers a file of both experts says that they are: ai-toolkit's words, and diffusers' where the high-noise
# expert is `transformer` alone.
EXPERTS = {"transformer_1": "high", "transformer_2": "low"}

_LORA = re.compile(r"[._]lora(?:_|\.|_linear_layer\.)(A|B|down|up)(?:\.(?!weight$)(\w+))?(?:\.weight)?$")
_MAGNITUDE = re.compile(r"\.(?:dora_scale|lora_magnitude_vector(?:\.\w+)*)$")
_OTHER = re.compile(r"\.(hada_w[12]_[ab]|lokr_w[12](?:_[ab])?|alpha)$")


@dataclass(frozen=True)
class Key:
    """The name of one tensor, taken apart. part: which of several layers side by side, in musubi's split_dims."""

    module: str  # as the file has it, without the beginning
    end: str  # canonical end, or ALPHA
    beginning: str
    part: int | None = None
    adapter: str = ""  # name of one of several adapters in a file, such as "default"
    expert: str | None = None


@dataclass(frozen=True)
class Names:
    """The tensors of a file by module. modules: an official or canonical name -> (canonical end, part) -> key."""

    format: str
    family: str
    kind: str
    modules: Mapping[str, Mapping[tuple[str, int | None], str]]
    expert: str | None = None


def key_of(name: str) -> Key | None:
    """Take a name apart; None for a tensor that is no part of an adapter's layer."""
    if match := _LORA.search(name):
        end = A if match[1] in ("A", "down") else B
        word = match[2] or ""
        if word == "bias":
            return None
        part = int(word) if word.isdecimal() else None
        return _key(name[: match.start()], end, part, "" if part is not None else word)
    if match := _MAGNITUDE.search(name):
        return _key(name[: match.start()], MAGNITUDE)
    if match := _OTHER.search(name):
        return _key(name[: match.start()], match[0])
    return None


def format_of(names: Iterable[str]) -> str | None:
    """The format by whose names most tensors go; None for a file that is no adapter."""
    keys = [key for name in names if (key := key_of(name))]
    if not any(key.end in (A, ".hada_w1_a", ".lokr_w1", ".lokr_w1_a") for key in keys):
        return None
    beginning = Counter(key.beginning for key in keys).most_common(1)[0][0]
    if beginning == "transformer." and any(_is_official(key.module) for key in keys):
        return "comfyui"  # its map for HunyuanVideo has this beginning too
    if beginning == "" and not any(_is_official(key.module) for key in keys):
        return "diffusers" if family_of(key.module for key in keys) else "original"
    return BEGINNINGS[beginning]


def names_in(names: Iterable[str], metadata: Mapping[str, str], source: Path, expert: str | None = None) -> Names:
    """Take the names of a whole file apart. expert: of a file that holds both, the one to take, high or low.

    Raises ModelError for tensors that are no adapter's, for modules that no known network has, and for files of other
    models, each by its name.
    """
    names = list(names)
    keys = {name: key for name in names if (key := key_of(name))}
    kind = kind_in(key.module + key.end for key in keys.values() if key.end != ALPHA)
    if kind is None:
        raise ModelError(f"{source} holds no weights of an adapter.")
    if found := stranger(names, metadata):
        raise ModelError(f"{source} is {found}. Weft reads those of Wan and HunyuanVideo, and PEFT folders.")
    _refuse_others(names, keys, kind, source)
    keys, chosen = _of_expert(keys, expert, source)
    family, resolved = _resolved(keys, metadata, source)
    layers: dict[str, dict[tuple[str, int | None], str]] = {}
    for name, key in keys.items():
        place = layers.setdefault(resolved[key.beginning, key.module], {})
        if (key.end, key.part) in place:
            raise ModelError(f"{source} holds two layers on one module: '{place[key.end, key.part]}' and '{name}'.")
        place[key.end, key.part] = name
    return Names(format_of(names) or "original", family, kind, layers, chosen)


def are_for_both(names: Iterable[str]) -> bool:
    """Whether these are names of layers of both experts of Wan 2.2: where some are of the second, others are not."""
    experts = {key.expert for name in names if (key := key_of(name))}
    return "low" in experts and len(experts) > 1


def _key(module: str, end: str, part: int | None = None, adapter: str = "") -> Key:
    beginning = next(start for start in BEGINNINGS if module.startswith(start))
    rest = module.removeprefix(beginning)
    for mark, expert in EXPERTS.items():
        if rest.startswith((f"{mark}.", f"{mark}_")):
            return Key(rest[len(mark) + 1 :], end, beginning, part, adapter, expert)
    return Key(rest, end, beginning, part, adapter)


def _is_official(module: str) -> bool:
    return any(module in modules(family).parts and module not in modules(family).official for family in FAMILIES) or (
        re.match(r"(double|single)_blocks\.", module) is not None
    )


def _refuse_others(names: Iterable[str], keys: Mapping[str, Key], kind: str, source: Path) -> None:
    others = [name for name in names if name not in keys]
    if others:
        raise ModelError(
            f"{source} holds {len(others)} tensors that are no {_word(kind)} weights, first '{others[0]}'"
            + (": whole changes of biases, norms or weights, which no adapter in Weft has." if _whole(others) else ".")
        )
    odd = [name for name, key in keys.items() if key.end != ALPHA and not _belongs(key.end, kind)]
    if odd:
        raise ModelError(f"{source} mixes kinds of adapters: {_word(kind)} weights, and '{odd[0]}'.")
    adapters = sorted({key.adapter for key in keys.values() if key.adapter})
    if len(adapters) > 1:
        raise ModelError(f"{source} holds several adapters: {', '.join(adapters)}. Weft reads files of one.")


def _belongs(end: str, kind: str) -> bool:
    return end in ENDS[kind] or end == MAGNITUDE


def _whole(names: Iterable[str]) -> bool:
    return any(name.endswith((".diff", ".diff_b", ".bias", ".w_norm", ".b_norm", ".set_weight")) for name in names)


def _word(kind: str) -> str:
    return {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}.get(kind, kind)


def _of_expert(keys: Mapping[str, Key], expert: str | None, source: Path) -> tuple[dict[str, Key], str | None]:
    """The keys of one expert, of files that say whose they are."""
    if any(key.expert == "low" for key in keys.values()):
        keys = {name: key if key.expert else replace(key, expert="high") for name, key in keys.items()}
    there = sorted({key.expert for key in keys.values() if key.expert})
    if len(there) > 1 and expert is None:
        raise ModelError(
            f"{source} holds the layers of both experts of Wan 2.2, high and low noise, and here one is wanted. "
            f"Make two files of it: weft export {source} --to comfyui."
        )
    if expert is not None and there and expert not in there:
        raise ModelError(f"{source} holds the layers of the {there[0]}-noise expert, and none of '{expert}'.")
    chosen = expert if len(there) > 1 else (there[0] if there else None)
    return {name: key for name, key in keys.items() if key.expert in (None, chosen)}, chosen


# ---- Modules ------------------------------------------------------------------------------------------------------


def _resolved(
    keys: Mapping[str, Key], metadata: Mapping[str, str], source: Path
) -> tuple[str, dict[tuple[str, str], str]]:
    """The family, and the official or canonical name of each module by its beginning and its name in the file."""
    places = {(key.beginning, key.module): name for name, key in keys.items()}
    told = _told_names(metadata)
    tries = {family: _by_family(places, told, modules(family)) for family in _likely(metadata)}
    family = max(tries, key=lambda each: len(tries[each]))
    if not tries[family] and family_of(module for _, module in places) == "causal-lm":
        raise ModelError(
            f"{source} is a LoRA of a language model without its adapter_config.json, and without that file its alpha "
            "is unknown."
        )
    missing = [place for place in places if place not in tries[family]]
    if missing:
        raise _unknown(places[missing[0]], missing[0], modules(family) if tries[family] else None, source)
    refuse_ambiguous(family, [module for _, module in places], metadata, source)
    return family, tries[family]


def _likely(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The families, the one that the header names first: the first one wins where both have all modules."""
    said = f"{metadata.get('weft.family', '')} {metadata.get('ss_base_model_version', '')}"
    return tuple(reversed(FAMILIES)) if "hunyuan" in said else FAMILIES


def _by_family(
    places: Iterable[tuple[str, str]], told: Mapping[str, str], known: Modules
) -> dict[tuple[str, str], str]:
    found: dict[tuple[str, str], str] = {}
    for beginning, module in places:
        if beginning in UNDERSCORED:
            name = known.found(told[module]) if module in told else known.found_underscored(module)
        else:
            name = known.found(module)
        if name is not None:
            found[beginning, module] = name
    return found


def _told_names(metadata: Mapping[str, str]) -> dict[str, str]:
    """The dotted names that Weft leaves in a file with underscores."""
    try:
        told = json.loads(metadata.get(NAMES, "{}"))
    except ValueError:
        return {}
    return {str(k): str(v) for k, v in told.items()} if isinstance(told, dict) else {}


def _unknown(key: str, place: tuple[str, str], known: Modules | None, source: Path) -> ModelError:
    beginning, module = place
    if known is None:
        return ModelError(
            f"{source} is an adapter of a model that Weft does not know: '{key}'. It reads those of Wan and "
            "HunyuanVideo, and PEFT folders."
        )
    choices = known.underscored if beginning in UNDERSCORED else {**known.parts, **known.official}
    near = get_close_matches(module, list(choices), n=1, cutoff=0)
    return ModelError(
        f"{source}: '{key}' stands on a module that {known.family} has not. The nearest of its modules is '{near[0]}'."
    )
