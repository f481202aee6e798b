"""From the tensors and config fields of a file to one adapter in canonical form, or a refusal by name."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional

from weft.errors import ModelError
from weft.formats.adapter_file import MAGNITUDE, A, B, SavedAdapter, paths_in, scale_of

# Fields of LoraConfig under which a file's weights mean something else than scale B A on an untouched base.
OTHER_MEANINGS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "lora_bias", "modules_to_save", "monteclora_config",
    "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def saved_adapter(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], metadata: Mapping[str, str], source: Path
) -> SavedAdapter:
    """Canonical tensors and a LoraConfig's fields as one adapter. Raises ModelError for what is not plain LoRA.

    Files may give single layers their own rank and alpha: then ranks are filled up with zeros and alphas taken into B,
    which changes no output.
    """
    _refuse_other_methods(config, source)
    # PEFT's live modules call the magnitude a weight, its files do not.
    named = {key.replace(f"{MAGNITUDE}.weight", MAGNITUDE): tensor for key, tensor in tensors.items()}
    _refuse_strangers(named, source)
    paths = paths_in(named)
    suffixes = (A, B, MAGNITUDE)
    canonical = {path + s: named[path + s] for path in paths for s in suffixes if path + s in named}
    rank = max(canonical[path + A].shape[0] for path in paths)
    rslora = bool(config.get("use_rslora", False))
    alpha = float(config.get("lora_alpha", config.get("r", rank)))
    scale = scale_of(alpha, rank, rslora)
    for path in paths:
        own_alpha = float(_pattern_value(config.get("alpha_pattern") or {}, path, alpha))
        own_rank = canonical[path + A].shape[0]
        ratio = scale_of(own_alpha, own_rank, rslora) / scale
        if ratio != 1:
            canonical[path + B] = canonical[path + B] * ratio
        if own_rank != rank:
            canonical[path + A] = functional.pad(canonical[path + A], (0, 0, 0, rank - own_rank))
            canonical[path + B] = functional.pad(canonical[path + B], (0, rank - own_rank))
    dora = bool(config.get("use_dora", False)) or any(key.endswith(MAGNITUDE) for key in canonical)
    return SavedAdapter(canonical, rank, alpha, rslora, dora, paths, dict(metadata))


def tensors_at_scale(adapter: SavedAdapter, scale: float) -> dict[str, Tensor]:
    """The adapter's tensors for a run with another alpha: B is multiplied so that scale B A stays what it was."""
    ratio = adapter.scale / scale
    return {key: tensor * ratio if key.endswith(B) else tensor for key, tensor in adapter.tensors.items()}


def _refuse_other_methods(config: Mapping[str, Any], source: Path) -> None:
    kind = str(config.get("peft_type", "LORA")).rpartition(".")[2]
    if kind != "LORA":
        raise ModelError(f"{source} holds a {kind} adapter; Weft reads LoRA, with or without rsLoRA and DoRA.")
    others = [name for name in OTHER_MEANINGS if config.get(name)]
    if str(config.get("init_lora_weights", "")).lower().startswith(CHANGES_THE_BASE):
        others.append(f"init_lora_weights={config['init_lora_weights']}")
    if others:
        raise ModelError(f"{source} was made with {', '.join(others)}, which Weft cannot continue from or apply.")


def _refuse_strangers(tensors: Mapping[str, Tensor], source: Path) -> None:
    strangers = [key for key in tensors if not key.endswith((A, B, MAGNITUDE))]
    if strangers:
        raise ModelError(f"{source} holds {len(strangers)} tensors that are no LoRA weights, first '{strangers[0]}'.")
    if not tensors:
        raise ModelError(f"{source} holds no tensors.")
    paths = {key.removesuffix(suffix) for key in tensors for suffix in (A, B) if key.endswith(suffix)}
    missing = [path + suffix for path in sorted(paths) for suffix in (A, B) if path + suffix not in tensors]
    if missing:
        raise ModelError(f"{source} is incomplete: {len(missing)} tensors are missing, first '{missing[0]}'.")


def _pattern_value(patterns: Mapping[str, float], path: str, otherwise: float) -> float:
    """PEFT's rule: the first key that the path ends with, on a dot boundary; keys may be regexes."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), otherwise)
