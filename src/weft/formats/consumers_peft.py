"""How PEFT loads an adapter: the config beside the weights says what is made, then tensors are put into it by name.

Source: peft 0.21, tuners/{lora,loha,lokr,oft}, utils/save_and_load.py.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from math import isqrt, sqrt
from typing import Any

from torch import Tensor

from weft.formats.use import Delta, Stored, Use, hadamard, kronecker, product
from weft.math.spectrum import rotation_less_one

HEAD = "base_model.model."
# Ends of the keys of each kind of PEFT's, with the part's name.
PEFT_ENDS: Mapping[str, tuple[str, ...]] = {
    "LORA": ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
    "LOHA": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "LOKR": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    "OFT": ("oft_R.weight",),
}


def peft(stored: Stored, family: str) -> Use:
    """What `PeftModel.from_pretrained` does, and transformers' load_adapter."""
    tensors = {key.removeprefix(HEAD): t for key, t in stored.tensors.items() if key.startswith(HEAD)}
    strange = tuple(key for key in stored.tensors if not key.startswith(HEAD))
    return by_config(tensors, stored.config, strange, HEAD)


def by_config(tensors: Mapping[str, Tensor], config: Mapping[str, Any], strange: tuple[str, ...], head: str) -> Use:
    """A model is made by the config, then the tensors are put into it by name."""
    kind = str(config.get("peft_type", ""))
    if kind not in PEFT_ENDS:
        return Use({}, canonical=True, ignored=(*strange, *tensors), faults=(f"the config says of no kind '{kind}'.",))
    parts: dict[str, dict[str, Tensor]] = {}
    ignored, faults = list(strange), []
    for key, tensor in tensors.items():
        end = next((end for end in PEFT_ENDS[kind] if key.endswith("." + end)), None)
        path = key.removesuffix(f".{end}")
        if end is None or not _is_target(path, config.get("target_modules") or ()):
            ignored.append(head + key)
        else:
            parts.setdefault(path, {})[end] = tensor
    layers: dict[str, Callable[[], Delta]] = {}
    for path, found in parts.items():
        problem, delta = MADE[kind](path, found, config)
        if delta is not None:
            layers[path] = delta
        faults += [problem] if problem else []
    return Use(layers, canonical=True, ignored=tuple(ignored), faults=tuple(faults))


def _is_target(path: str, targets: object) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    assert isinstance(targets, (list, tuple, set))
    return path in targets or any(path.endswith(f".{target}") for target in targets)


def _pattern(config: Mapping[str, Any], field: str, path: str, otherwise: float) -> float:
    patterns: Mapping[str, float] = config.get(field) or {}
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), otherwise)


Made = tuple[str | None, Callable[[], Delta] | None]


def _lora(path: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> Made:
    if problem := _missing(path, parts, PEFT_ENDS["LORA"][:2]):
        return problem, None
    rank = int(_pattern(config, "rank_pattern", path, config.get("r", 8)))
    alpha = _pattern(config, "alpha_pattern", path, config.get("lora_alpha", 8))
    scale = alpha / (sqrt(rank) if config.get("use_rslora") else rank)
    a, b, magnitude = (parts.get(end) for end in PEFT_ENDS["LORA"])
    assert a is not None and b is not None
    if len(a) != rank or b.shape[1] != rank:
        problem = f"{path}: PEFT makes it of rank {rank}, and the file has {len(a)}: it stops at another size."
    elif bool(config.get("use_dora")) != (magnitude is not None):
        problem = f"{path}: the config says DoRA={bool(config.get('use_dora'))}, and its tensors say otherwise."
    return problem, partial(product, b, a, scale, magnitude)


def _loha(path: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> Made:
    return _missing(path, parts, PEFT_ENDS["LOHA"]), partial(hadamard, parts, _lycoris_scale(config))


def _lokr(path: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> Made:
    halves = [end for half in ("lokr_w1", "lokr_w2")
              for end in ((half,) if half in parts else (f"{half}_a", f"{half}_b"))]  # fmt: skip
    if problem := _missing(path, parts, tuple(halves)):
        return problem, None
    first, second = (_size(half, parts) for half in ("lokr_w1", "lokr_w2"))
    sides = [_sides(a * b, int(config.get("decompose_factor", -1))) for a, b in zip(first, second, strict=True)]
    rank = int(config.get("r", 8))
    whole = (
        not (config.get("decompose_both") and rank < max(small for small, _ in sides) / 2),
        rank >= max(large for _, large in sides) / 2,
    )
    problem = None
    if (first, second) != tuple(zip(*sides, strict=True)):
        problem = f"{path}: its halves are {first} and {second}, and PEFT makes them otherwise of this config."
    elif ("lokr_w1" in parts, "lokr_w2" in parts) != whole:
        problem = f"{path}: of rank {rank} PEFT makes other halves whole than the file has, and draws them at random."
    return problem, partial(kronecker, parts, _lycoris_scale(config))


def _size(half: str, parts: Mapping[str, Tensor]) -> tuple[int, int]:
    """Rows and columns of one half of a LoKr."""
    if half in parts:
        return parts[half].shape[0], parts[half].shape[1]
    return parts[f"{half}_a"].shape[0], parts[f"{half}_b"].shape[1]


def _sides(length: int, factor: int) -> tuple[int, int]:
    """How PEFT divides a side of a layer: by the factor, else by the largest divisor up to it and to the root."""
    if factor > 0 and length % factor == 0:
        return factor, length // factor
    limit = isqrt(length) if factor < 0 else min(isqrt(length), factor)
    small = next(divisor for divisor in range(limit, 0, -1) if length % divisor == 0)
    return small, length // small


def _oft(path: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> Made:
    terms = int(config.get("num_cayley_neumann_terms", 5)) if config.get("use_cayley_neumann", True) else None
    angles, size = parts["oft_R.weight"], int(config.get("oft_block_size", 32))

    def made() -> Delta:
        return Delta(rotation=rotation_less_one(angles, size, terms))

    fits = angles.shape[-1] == size * (size - 1) // 2
    return None if fits else f"{path}: blocks of {size} inputs have another number of angles.", made


MADE: Mapping[str, Callable[[str, Mapping[str, Tensor], Mapping[str, Any]], Made]] = {
    "LORA": _lora, "LOHA": _loha, "LOKR": _lokr, "OFT": _oft,
}  # fmt: skip


def _lycoris_scale(config: Mapping[str, Any]) -> float:
    """In LoHa and LoKr alpha is called alpha, and always divided by r."""
    return float(config.get("alpha", 8)) / int(config.get("r", 8))


def _missing(path: str, parts: Mapping[str, Tensor], ends: tuple[str, ...]) -> str | None:
    missing = [end for end in ends if end not in parts]
    return (
        f"{path}: {', '.join(missing)} is missing, and PEFT leaves that as it was drawn at random." if missing else None
    )
