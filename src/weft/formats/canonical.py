"""From the tensors and config fields of a file to one adapter in canonical form, or a refusal by name."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional

from weft.errors import ModelError
from weft.formats.adapter_file import ENDS, MAGNITUDE, A, B, SavedAdapter, paths_in, scale_of
from weft.formats.peft_heads import parted
from weft.formats.sizes import refuse_misfits

# Fields of LoraConfig under which a file's weights mean something else than scale B A on an untouched base.
OTHER_MEANINGS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "lora_bias", "monteclora_config",
    "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Fields of the other configs that Weft's own recipes do not have; rank_pattern gives single layers another rank.
OTHER_OPTIONS = ("rank_pattern", "alpha_pattern", "coft", "use_effective_conv2d")
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "loha": {},
    "lokr": {"decompose_factor": -1, "decompose_both": False},
    "oft": {
        "oft_block_size": 32,
        "block_share": False,
        "use_cayley_neumann": True,
        "num_cayley_neumann_terms": 5,
        "peft_version": "0.0.0",
    },
    "ia3": {"feedforward_modules": []},
}
WITHOUT_RANK = ("oft", "ia3")  # fmt: skip

# The tensors that a change is proportional to: the first of these that a layer has.
STRENGTH = (B, ".hada_w1_b", ".lokr_w1", ".lokr_w1_b")


def saved_adapter(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], metadata: Mapping[str, str], source: Path
) -> SavedAdapter:
    """Canonical tensors and the fields of PEFT's config as one adapter. Raises ModelError for kinds that Weft has not.

    Files may give single layers their own rank and alpha: then ranks are filled up with zeros and alphas taken into B,
    which changes no output. Linear layers come to one rank so, and convolutions to one of their own.
    """
    kind = str(config.get("peft_type", "LORA")).rpartition(".")[2].lower()
    if kind not in ENDS:
        known = ", ".join(name.upper() for name in ENDS)
        raise ModelError(f"{source} holds a {kind.upper()} adapter; Weft reads {known}.")
    told = parted(tensors, config)
    if (named := config.get("modules_to_save")) and not told.modules:
        raise ModelError(f"{source} names modules_to_save ({', '.join(named)}) and holds no tensors of any of them.")
    made = _of_layers(kind, told.layers, config, metadata, source)
    bias = str(config.get("bias", "none")) if told.biases else "none"
    return replace(made, tensors={**made.tensors, **told.whole, **told.biases}, whole=told.modules, bias=bias)


def _of_layers(
    kind: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], metadata: Mapping[str, str], source: Path
) -> SavedAdapter:
    """Of the tensors that stand on layers."""
    if kind != "lora":
        return _other_kind(kind, tensors, config, metadata, source)
    _refuse_other_methods(config, source)
    # PEFT's live modules call the magnitude a weight, its files do not.
    named = {key.replace(f"{MAGNITUDE}.weight", MAGNITUDE): tensor for key, tensor in tensors.items()}
    _refuse_strangers(named, kind, source)
    _refuse_halves(named, source)
    paths = paths_in(named)
    _refuse_sizes(named, kind, source)
    canonical = {path + end: named[path + end] for path in paths for end in ENDS[kind] if path + end in named}
    linear = [path for path in paths if canonical[path + A].dim() == 2]
    convolutions = [path for path in paths if canonical[path + A].dim() > 2]
    rslora = bool(config.get("use_rslora", False))
    conv_rank = max((len(canonical[path + A]) for path in convolutions), default=None)
    rank = max((len(canonical[path + A]) for path in linear), default=int(config.get("r", conv_rank or 0)))
    alpha = float(config.get("lora_alpha", config.get("r", rank)))
    own_alphas = {path: float(_pattern_value(config.get("alpha_pattern") or {}, path, alpha)) for path in paths}
    _even_out(canonical, linear, own_alphas, (rank, scale_of(alpha, rank, rslora)), rslora)
    conv_alpha = own_alphas[convolutions[0]] if convolutions else None
    if conv_rank and conv_alpha is not None:
        _even_out(canonical, convolutions, own_alphas, (conv_rank, scale_of(conv_alpha, conv_rank, rslora)), rslora)
    dora = bool(config.get("use_dora", False)) or any(key.endswith(MAGNITUDE) for key in canonical)
    return SavedAdapter(
        canonical, rank, alpha, rslora, dora, paths, dict(metadata), conv_rank=conv_rank, conv_alpha=conv_alpha
    )


def tensors_at_scale(adapter: SavedAdapter, scale: float, conv_scale: float | None = None) -> dict[str, Tensor]:
    """The adapter's tensors for a run with another alpha, of linear layers and of convolutions: one tensor of each
    layer is multiplied so that the change stays what it was. Rotations, scales and virtual tokens have no alpha."""
    if not adapter.rank:
        return dict(adapter.tensors)
    linear, conv = adapter.scale / scale, (adapter.conv_scale or 1) / (conv_scale or adapter.conv_scale or 1)
    return _multiplied(adapter, linear, conv)


def at_strength(adapter: SavedAdapter, strength: float) -> SavedAdapter:
    """The adapter with its change multiplied. Raises ModelError for a DoRA or OFT, where no such weights are."""
    if strength == 1:
        return adapter
    if adapter.dora or adapter.kind == "oft":
        name = "DoRA" if adapter.dora else "OFT"
        raise ModelError(f"an adapter of kind {name} is applied as it was trained: leave the strength at 1.")
    return replace(adapter, tensors=_multiplied(adapter, strength, strength))


def _multiplied(adapter: SavedAdapter, linear: float, conv: float) -> dict[str, Tensor]:
    tensors = dict(adapter.tensors)
    for path in adapter.paths:
        key = next(path + end for end in STRENGTH if path + end in tensors)
        tensors[key] = tensors[key] * (conv if tensors[key].dim() > 2 else linear)
    return tensors


def _even_out(
    canonical: dict[str, Tensor],
    paths: Sequence[str],
    alphas: Mapping[str, float],
    width: tuple[int, float],
    rslora: bool,
) -> None:
    """Bring layers to one rank and one scale."""
    rank, scale = width
    for path in paths:
        a, b = canonical[path + A], canonical[path + B]
        own_rank = len(a)
        ratio = scale_of(alphas[path], own_rank, rslora) / scale
        if ratio != 1:
            b = b * ratio
        if own_rank != rank:
            a = functional.pad(a, (0, 0) * (a.dim() - 1) + (0, rank - own_rank))
            b = functional.pad(b, (0, 0) * (b.dim() - 2) + (0, rank - own_rank))
        canonical[path + A], canonical[path + B] = a, b


def _other_kind(
    kind: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], metadata: Mapping[str, str], source: Path
) -> SavedAdapter:
    """An adapter that is no LoRA; what it is stands in its config alone."""
    given = [name for name in OTHER_OPTIONS if config.get(name)]
    if given:
        raise ModelError(f"{source} was made with {', '.join(given)}, which Weft's {kind} has not.")
    _refuse_strangers(tensors, kind, source)
    _refuse_sizes(tensors, kind, source)
    options = {name: config.get(name, default) for name, default in OPTIONS[kind].items()}
    facts = (int(config.get("r", 8)), float(config.get("alpha", 8))) if kind not in WITHOUT_RANK else (0, 0.0)
    if kind == "oft" and not options["oft_block_size"]:
        raise ModelError(f"{source} divides each layer into {config.get('r')} blocks; Weft's oft wants oft_block_size.")
    return SavedAdapter(
        dict(tensors), *facts, targets=paths_in(tensors), metadata=dict(metadata), kind=kind, options=options
    )


def _refuse_other_methods(config: Mapping[str, Any], source: Path) -> None:
    others = [name for name in OTHER_MEANINGS if config.get(name)]
    if str(config.get("init_lora_weights", "")).lower().startswith(CHANGES_THE_BASE):
        others.append(f"init_lora_weights={config['init_lora_weights']}")
    if others:
        raise ModelError(f"{source} was made with {', '.join(others)}, which Weft cannot continue from or apply.")


def _refuse_strangers(tensors: Mapping[str, Tensor], kind: str, source: Path) -> None:
    strangers = [key for key in tensors if not key.endswith(ENDS[kind])]
    if strangers:
        name = {"lora": "LoRA"}.get(kind, kind)
        raise ModelError(f"{source} holds {len(strangers)} tensors that are no {name} weights, first '{strangers[0]}'.")
    if not tensors:
        raise ModelError(f"{source} holds no tensors.")


def _refuse_halves(tensors: Mapping[str, Tensor], source: Path) -> None:
    paths = {key.removesuffix(suffix) for key in tensors for suffix in (A, B) if key.endswith(suffix)}
    missing = [path + suffix for path in sorted(paths) for suffix in (A, B) if path + suffix not in tensors]
    if missing:
        raise ModelError(f"{source} is incomplete: {len(missing)} tensors are missing, first '{missing[0]}'.")


def _pattern_value(patterns: Mapping[str, float], path: str, otherwise: float) -> float:
    """PEFT's rule: the first key that the path ends with, on a dot boundary; keys may be regexes."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), otherwise)


def _refuse_sizes(tensors: Mapping[str, Tensor], kind: str, source: Path) -> None:
    for path in paths_in(tensors):
        refuse_misfits(path, {end: tensors[path + end] for end in ENDS[kind] if path + end in tensors}, source)
