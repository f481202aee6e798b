"""What `weft show` says of a base model or of a file with its weights: from headers alone, without torch."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.cli.show_words import DTYPES, Facts, json_of, size_words, some
from weft.formats.header import read_header

if TYPE_CHECKING:
    from weft.families.sniff import Content, Tensors

SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.[^.]+)")
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
PARTS = ("transformer", "high", "low", "vae", "text_encoder", "text_encoder_2", "image_encoder")
NAMES = {"official": "of the makers", "diffusers": "of diffusers and transformers"}
FEW = 12  # kinds of tensors in a list


# ---- Files --------------------------------------------------------------------------------------------------------


def weight_file_facts(path: Path) -> Facts:
    """Of a file with the weights of a base model or one of its parts, with its other shards; nothing for other files
    and for adapters."""
    if path.suffix not in (".safetensors", ".gguf", *PICKLES) or path.name == "adapter_model.bin":
        return {}
    if path.suffix == ".gguf":
        return gguf_facts(path)
    from weft.families.sniff import content_of

    files = shards_of(path)
    header = header_of(files)
    if _is_adapter(header):
        return {}
    content = content_of(header)
    decoder = _decoder(path.parent) if content.kind in ("text encoder", "unknown") else ""
    facts: Facts = {"what": f"weights of a language model, {decoder}" if decoder else str(content)}
    facts |= {"file": str(path), **shard_facts(path, files)}
    facts |= {"size": size_words(sum(file.stat().st_size for file in files)), "parameters": content.numbers}
    facts |= {"dtype": content.precision, **quantization_facts(content, header)}
    if path.suffix in PICKLES:
        facts["pickle"] = "yes: not loaded, only its list of tensors was read; .safetensors cannot run code"
    return {**facts, **_network_facts(path, content, header)}


def _network_facts(path: Path, content: "Content", header: "Tensors") -> Facts:
    """Whose names the tensors have and, of a transformer, its sizes and which released model has them."""
    from weft.families.sniff import PREFIXES

    facts: Facts = {}
    prefix = next((head for head in PREFIXES if any(name.startswith(head) for name in header.entries)), "")
    if content.naming:
        facts["names"] = NAMES[content.naming] + (f", under {prefix} as in ComfyUI" if prefix else "")
    elif content.kind == "unknown":
        facts["tensors"] = f"{len(header.entries)}: {some(sorted(header.entries))}"
    if content.kind == "network":
        facts |= {"family": content.family, "task": content.task, **_expert_named(path)}
        facts |= {"width": content.sizes.inner, "blocks": content.sizes.layers, "channels": content.sizes.channels}
        facts["model"] = released(content) or "none that Weft knows by its sizes"
    return facts


def gguf_facts(path: Path) -> Facts:
    """Of llama.cpp's format, which Weft does not read weights from."""
    from weft.families.gguf import read_gguf
    from weft.families.sniff import Tensors, content_of

    found = read_gguf(path)
    header = Tensors(found.tensors)
    content = content_of(header)
    kinds = Counter(kind for kind, _ in found.tensors.values())
    name = found.facts.get("general.name")
    known = content.kind != "unknown"
    return {
        "what": str(content) if known else f"a model of architecture {found.architecture or 'unknown'} in GGUF",
        "file": str(path),
        "format": f"GGUF {found.version}, architecture {found.architecture or '(not told)'}",
        **({"name": name} if name else {}),
        "size": size_words(path.stat().st_size),
        "parameters": content.numbers,
        "dtype": dict(kinds.most_common()),
        **_network_facts(path, content, header),
        "use": "Weft reads no GGUF weights: take the model's .safetensors; family.dtype=nf4 makes it as small",
    }


def header_of(files: Sequence[Path]) -> "Tensors":
    """The tensors of weight files by their headers; of pickles by their instructions. Raises ModelError."""
    from weft.families import sniff
    from weft.families.torch_file import tensors_in

    entries: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files:
        entries |= tensors_in(file) if file.suffix in PICKLES else sniff.header_of([file]).entries
    return sniff.Tensors(entries)


def _is_adapter(header: "Tensors") -> bool:
    from weft.formats.adapter_file import kind_in

    marks = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".hada_w1", ".lokr_w1", ".oft_", ".diff_b")
    return header.any(*marks) or kind_in(header.entries) is not None or _kohya(header)


def _kohya(header: "Tensors") -> bool:
    return any(name.startswith(("lora_unet", "lora_te")) for name in header.entries)


def quantization_facts(content: "Content", header: "Tensors") -> Facts:
    """How weights are packed, and what Weft does with them."""
    if content.foreign:
        return {"quantized": f"{content.foreign}, which Weft cannot read; take bf16, fp16 or fp8"}
    if content.precision.startswith("fp8"):
        scales = "with a scale for each weight" if content.precision == "fp8 scaled" else "without scales"
        kinds = Counter(dtype for dtype, _ in header.entries.values() if dtype.startswith("F8"))
        return {"quantized": f"{kinds.most_common(1)[0][0]} {scales}"}
    return {}


def released(content: "Content") -> str:
    """The models that a transformer can be of: an expert of Wan 2.2 has the shape of a Wan 2.1."""
    from weft.families.sniff import released_name

    alone, of_two = released_name(content, experts=1), released_name(content, experts=2)
    if content.family == "hunyuan-video":
        return alone or ""
    return ", or ".join(filter(None, (alone, of_two and f"an expert of {of_two}")))


def _expert_named(path: Path) -> Facts:
    from weft.families.sniff import names_expert

    word = next((word for word in ("high", "low") if names_expert(path.name, word)), None)
    return {"expert": f"{word} noise, by its name"} if word else {}


# ---- Shards -------------------------------------------------------------------------------------------------------


def shards_of(path: Path) -> list[Path]:
    """The files that a shard belongs to, as far as they are there; a file that is whole alone."""
    found = SHARD.fullmatch(path.name)
    if not found:
        return [path]
    stem, _, count, end = found.groups()
    named = [path.with_name(f"{stem}-{number:05d}-of-{count}{end}") for number in range(1, int(count) + 1)]
    return [file for file in named if file.is_file()]


def shard_facts(path: Path, files: Sequence[Path]) -> Facts:
    """Of how many files a shard is one, and which of them are missing."""
    found = SHARD.fullmatch(path.name)
    if not found:
        return {}
    stem, number, count, end = found.groups()
    named = [f"{stem}-{n:05d}-of-{count}{end}" for n in range(1, int(count) + 1)]
    return {"shard": f"{int(number)} of {int(count)}", **missing_facts(named, {file.name for file in files})}


def missing_facts(named: Sequence[str], there: set[str]) -> Facts:
    lost = [name for name in named if name not in there]
    return {"missing": f"{len(lost)} of {len(named)} files: {some(lost)}"} if lost else {}


def index_facts(folder: Path) -> Facts:
    """Files that an index names and that are not there."""
    for index in sorted(folder.glob("*.index.json")):
        named = sorted(set(json_of(index).get("weight_map", {}).values()))
        if facts := missing_facts(named, {path.name for path in folder.iterdir()}):
            return facts
    return {}


# ---- Folders ------------------------------------------------------------------------------------------------------


def model_facts(folder: Path) -> Facts:
    """Of a folder in diffusers layout."""
    index = folder / "model_index.json"
    facts: Facts = {"what": "a base model in diffusers layout"}
    if index.is_file():
        facts["pipeline"] = json_of(index).get("_class_name", "?")
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        config = json_of(part / "config.json")
        name = config.get("_class_name") or (config.get("architectures") or [""])[0]
        if weights := sorted(part.glob("*.safetensors")):
            lost = index_facts(part).get("missing")
            facts[part.name] = f"{name}, {_weights(weights)}" + (f"; missing: {lost}" if lost else "")
        elif name:
            facts[part.name] = f"{name}, no .safetensors file"
    return facts


def language_model_facts(folder: Path) -> Facts:
    """Of a decoder's folder as transformers saves it; nothing for other folders. Sizes as its config says them."""
    network = _decoder(folder)
    if not network:
        return {}
    config = json_of(folder / "config.json")
    weights = sorted(folder.glob("*.safetensors"))
    sizes = {"blocks": "num_hidden_layers", "width": "hidden_size", "vocabulary": "vocab_size",
             "context": "max_position_embeddings"}  # fmt: skip
    tokenizer = json_of(folder / "tokenizer_config.json")
    template = (folder / "chat_template.jinja").is_file() or bool(tokenizer.get("chat_template"))
    return {
        "what": "a language model",
        "network": f"{network}, {_weights(weights)}" if weights else f"{network}, no .safetensors file",
        **{name: config[key] for name, key in sizes.items() if key in config},
        **_packed(config),
        **index_facts(folder),
        "tokenizer": tokenizer.get("tokenizer_class", "there") if tokenizer else "none",
        "chat template": "there" if template else "none",
    }


def encoder_facts(folder: Path) -> Facts:
    """Of an encoder's folder as transformers saves it; nothing for other folders."""
    from weft.families.encoder_kinds import is_encoder

    if not is_encoder(folder):
        return {}
    config = json_of(folder / "config.json")
    weights = sorted(folder.glob("*.safetensors"))
    sizes = {"blocks": "num_hidden_layers", "width": "hidden_size", "vocabulary": "vocab_size",
             "context": "max_position_embeddings"}  # fmt: skip
    named = (config.get("architectures") or [config["model_type"]])[0]
    classes = list((config.get("id2label") or {}).values()) if named.endswith("Classification") else []
    return {
        "what": "an encoder of text",
        "network": f"{named}, {_weights(weights)}" if weights else f"{named}, no .safetensors file",
        **{name: config[key] for name, key in sizes.items() if key in config},
        "classes": classes or "none: its classifier would begin by chance",
        "tokenizer": json_of(folder / "tokenizer_config.json").get("tokenizer_class", "none"),
    }


def _packed(config: Mapping[str, Any]) -> Facts:
    """How a config says that the weights are packed."""
    packed = config.get("quantization_config") or {}
    bits = [f"{key.removeprefix('load_in_')}" for key in ("load_in_4bit", "load_in_8bit") if packed.get(key)]
    method = packed.get("quant_method")
    return {"quantized": ", ".join([str(method or "yes"), *bits])} if packed else {}


def _decoder(folder: Path) -> str:
    """The class of the decoder that a folder holds; empty where it holds none."""
    from weft.families.causal_lm import DECODERS, is_language_model

    if not is_language_model(folder):
        return ""
    named = json_of(folder / "config.json").get("architectures") or [""]
    return named[0] if named[0].endswith(DECODERS) else ""


def official_facts(folder: Path) -> Facts:
    """Of a directory as the makers of a model publish it, or of loose weight files; nothing for other folders."""
    from weft.errors import ModelError
    from weft.families.layouts import layout_of

    try:
        layout = layout_of(str(folder), {}, "wan")
    except ModelError:
        return loose_facts(folder)
    facts: Facts = {"what": "a base model in its makers' own layout"}
    for part in PARTS:
        place = layout.place(part)
        if place is None or not place.weights:
            continue
        content, name = _content(place.weights)
        if "model" not in facts and content.kind == "network":
            facts["model"] = released(content) or "none that Weft knows by its sizes"
        facts[part] = name
    return {**facts, **index_facts(folder)}


def loose_facts(folder: Path) -> Facts:
    """Of a folder of weight files that belong to no layout, as ComfyUI keeps them; nothing where there is none."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".gguf", ".pth")]
    firsts = {shards_of(path)[0]: path for path in files if path.is_file()}
    if not firsts:
        return {}
    return {
        "what": "a folder of weight files",
        **{path.name: _content(shards_of(path))[1] for path in list(firsts)[:FEW]},
        **({"more": f"{len(firsts) - FEW} files"} if len(firsts) > FEW else {}),
        **index_facts(folder),
    }


def _content(files: Sequence[Path]) -> "tuple[Content, str]":
    """What files hold, and it in words."""
    from weft.families.gguf import read_gguf
    from weft.families.sniff import Tensors, content_of

    header = Tensors(read_gguf(files[0]).tensors) if files[0].suffix == ".gguf" else header_of(files)
    content = content_of(header)
    return content, str(content)


def _weights(files: Sequence[Path]) -> str:
    headers = [read_header(path) for path in files]
    numbers = Counter[str]()
    for header in headers:
        for entry in header.tensors.values():
            numbers[DTYPES.get(entry.dtype, entry.dtype)] += entry.numbers
    size = size_words(sum(header.size for header in headers))
    return f"{sum(numbers.values()):,} parameters, mostly {numbers.most_common(1)[0][0]}, {size}" if numbers else size
