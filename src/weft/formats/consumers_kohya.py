"""How musubi-tuner and VideoX-Fun load files with kohya's names, and loaders that know the makers' names and no alpha.

Sources: musubi-tuner (30c658c) utils/lora_utils.py, networks/{lora,loha,lokr}.py, hv_generate_video.py; VideoX-Fun
(804a425) videox_fun/utils/lora_utils.py, merge_lora.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial

from torch import Tensor

from weft.formats.use import Delta, Stored, Use, hadamard, kronecker, product
from weft.names.modules import modules

Tree = dict[str, "Tree"]

# ---- musubi-tuner --------------------------------------------------------------------------------------------------

# hv_generate_video.py puts LoRA modules only into these; elsewhere the keys have no module, and are not spoken of.
HUNYUAN_BLOCKS = ("double_blocks.", "single_blocks.")


def musubi(stored: Stored, family: str) -> Use:
    """What `--lora_weight` of wan_generate_video.py and hv_generate_video.py does."""
    tensors = stored.tensors
    left = dict.fromkeys(tensors)
    kind = network_type(tensors)
    layers: dict[str, Callable[[], Delta]] = {}
    faults = []
    for module in modules(family).parts:
        if family == "hunyuan-video" and not module.startswith(HUNYUAN_BLOCKS):
            continue
        name = "lora_unet_" + module.replace(".", "_")
        delta, taken = MUSUBI_KINDS[kind](name, tensors)
        if delta is None:
            continue
        layers[module] = delta
        alpha = f"{name}.alpha"
        for key in (*taken, alpha):
            left.pop(key, None)
        if family == "hunyuan-video" and alpha not in tensors:
            faults.append(f"{name}: without an alpha, musubi's HunyuanVideo stops with a KeyError.")
        if family == "wan" and any(tensors[key].dim() > 4 for key in taken):
            faults.append(f"{name}: musubi stops at a convolution of three dimensions.")
    if kind != "lora" and family == "hunyuan-video":
        faults.append(f"hv_generate_video.py reads LoRA alone, and this is a {kind}.")
    return Use(layers, ignored=tuple(left), faults=tuple(faults))


def network_type(keys: Iterable[str]) -> str:
    """The kind of the whole file, by the first key that tells."""
    marks = {"lora_down": "lora", "hada_w1_a": "loha", "lokr_w1": "lokr"}
    return next((kind for key in keys for mark, kind in marks.items() if mark in key), "lora")


Found = tuple[Callable[[], Delta] | None, tuple[str, ...]]


def _musubi_lora(name: str, tensors: Mapping[str, Tensor]) -> Found:
    down, up = f"{name}.lora_down.weight", f"{name}.lora_up.weight"
    if down not in tensors or up not in tensors:
        return None, ()
    scale = _alpha(name, tensors, len(tensors[down])) / len(tensors[down])
    return partial(product, tensors[up], tensors[down], scale), (down, up)


def _musubi_loha(name: str, tensors: Mapping[str, Tensor]) -> Found:
    ends = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    if f"{name}.hada_w1_a" not in tensors:
        return None, ()
    parts = {end: tensors[f"{name}.{end}"] for end in ends}
    inner = len(parts["hada_w1_b"])
    return partial(hadamard, parts, _alpha(name, tensors, inner) / inner), tuple(f"{name}.{end}" for end in ends)


def _musubi_lokr(name: str, tensors: Mapping[str, Tensor]) -> Found:
    """Its first half is never a product, and where the second is none either, alpha counts nothing."""
    first, whole, a, b = (f"{name}.lokr_{end}" for end in ("w1", "w2", "w2_a", "w2_b"))
    if first not in tensors or (a not in tensors and whole not in tensors):
        return None, ()
    used = (first, a, b) if a in tensors else (first, whole)
    inner = tensors[a].shape[1] if a in tensors else None
    scale = _alpha(name, tensors, inner) / inner if inner else 1.0
    return partial(kronecker, {key.rpartition(".")[2]: tensors[key] for key in used}, scale), used


MUSUBI_KINDS: Mapping[str, Callable[[str, Mapping[str, Tensor]], Found]] = {
    "lora": _musubi_lora, "loha": _musubi_loha, "lokr": _musubi_lokr,
}  # fmt: skip


def _alpha(name: str, tensors: Mapping[str, Tensor], otherwise: int) -> float:
    return float(tensors[f"{name}.alpha"].item()) if f"{name}.alpha" in tensors else float(otherwise)


# ---- VideoX-Fun ----------------------------------------------------------------------------------------------------

VIDEOX_ENDS = {
    "_lora_up_weight": "lora_up.weight", "_lora_down_weight": "lora_down.weight",
    "_lora_A_default_weight": "lora_down.weight", "_lora_B_default_weight": "lora_up.weight",
    "_lora_A_weight": "lora_down.weight", "_lora_B_weight": "lora_up.weight", "_alpha": "alpha",
}  # fmt: skip


def videox_fun(stored: Stored, family: str) -> Use:
    """What merge_lora does, for files of its own network and for those of its `--use_peft_lora`."""
    parts: dict[str, dict[str, Tensor]] = {}
    keys: dict[str, str] = {}
    faults = []
    for key, tensor in stored.tensors.items():
        flat = key.replace("diffusion_model.", "")
        flat = (flat if "lora_unet__" in flat else f"lora_unet__{flat}").replace(".", "_")
        end = next((end for end in VIDEOX_ENDS if flat.endswith(end)), None)
        if end is None:
            faults.append(f"'{key}' stops VideoX-Fun's merge_lora, which finds no layer's name in it.")
            continue
        layer = flat.removesuffix(end)
        parts.setdefault(layer, {})[VIDEOX_ENDS[end]] = tensor
        keys[layer] = key
    layers: dict[str, Callable[[], Delta]] = {}
    ignored = []
    for layer, found in parts.items():
        module = walked(layer.split("lora_unet_")[-1], own_modules(family))
        if module is None:
            ignored.append(keys[layer])
        elif not {"lora_up.weight", "lora_down.weight"} <= found.keys():
            faults.append(f"{layer} has no lora_up and lora_down, and VideoX-Fun's merge_lora stops there.")
        else:
            up, down = found["lora_up.weight"], found["lora_down.weight"]
            if down.dim() > 4:
                faults.append(f"{layer}: VideoX-Fun's merge_lora stops at a convolution of three dimensions.")
            scale = float(found["alpha"].item()) / up.shape[1] if "alpha" in found else 1.0
            layers[module] = partial(product, up, down, scale)
    return Use(layers, canonical=family == "hunyuan-video", ignored=tuple(ignored), faults=tuple(faults))


@cache
def own_modules(family: str) -> tuple[str, ...]:
    """Names in its own networks: its Wan is the makers', its HunyuanVideo that of diffusers."""
    known = modules(family)
    return tuple(known.official if family == "hunyuan-video" else known.parts)


@cache
def _tree(names: tuple[str, ...]) -> Tree:
    root: Tree = {}
    for name in names:
        node = root
        for word in name.split("."):
            node = node.setdefault(word, {})
    return root


def walked(flat: str, names: tuple[str, ...]) -> str | None:
    """The module that a name with underscores leads to. It is looked for twice: at each step all that is left, else the
    fewest words that are a child; and where that ends nowhere, the most words. None where both do."""
    words = [word for word in flat.split("_") if word]
    found = _steps(words, _tree(names), fewest_first=True) or _steps(words, _tree(names), fewest_first=False)
    return ".".join(found) if found else None


def _steps(words: list[str], node: Tree, fewest_first: bool) -> list[str]:
    """The children that are gone through, of which each takes some of the words; none where they do not come out."""
    path = []
    while words:
        sizes = range(1, len(words)) if fewest_first else range(len(words) - 1, 0, -1)
        size = next((size for size in (len(words), *sizes) if "_".join(words[:size]) in node), None)
        if size is None:
            return []
        path.append("_".join(words[:size]))
        node, words = node[path[-1]], words[size:]
    return path


# ---- Loaders of the makers' names that know no alpha ---------------------------------------------------------------


def original(stored: Stored, family: str) -> Use:
    """What a loader does that adds B A to the module of that name: no prefix, no alpha."""
    tensors = stored.tensors
    down, up = ".lora_A.weight", ".lora_B.weight"
    known = modules(family).parts
    found = [key.removesuffix(down) for key in tensors if key.endswith(down)]
    layers = {
        module: partial(product, tensors[module + up], tensors[module + down], 1.0)
        for module in found
        if module in known and module + up in tensors
    }
    used = {module + end for module in layers for end in (down, up)}
    return Use(layers, ignored=tuple(key for key in tensors if key not in used))
