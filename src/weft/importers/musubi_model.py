"""musubi-tuner's model and network options: task, weight files, kind and layers of the adapter."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from weft.errors import ConfigError
from weft.importers.draft import Draft
from weft.importers.values import Theirs

NO_SUCH_TASK = {
    "flf2v-14B": "first-and-last-frame models",
    "t2v-1.3B-FC": "Wan-Fun's control models",
    "t2v-14B-FC": "Wan-Fun's control models",
    "i2v-14B-FC": "Wan-Fun's control models",
}


@dataclass(frozen=True)
class Base:
    """What a task trains. repository: where its diffusers folder is published. boundary: of two experts."""

    kind: Literal["wan", "hunyuan-video"]
    repository: str
    blocks: int
    boundary: float | None = None
    image: bool = False


BASES: Mapping[str, Base] = {
    "t2v-14B": Base("wan", "Wan-AI/Wan2.1-T2V-14B-Diffusers", 40),
    "t2v-1.3B": Base("wan", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 30),
    "i2v-14B": Base("wan", "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", 40, image=True),
    "t2i-14B": Base("wan", "Wan-AI/Wan2.1-T2V-14B-Diffusers", 40),
    "t2v-A14B": Base("wan", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", 40, 0.875),
    "i2v-A14B": Base("wan", "Wan-AI/Wan2.2-I2V-A14B-Diffusers", 40, 0.9, image=True),
    "hunyuan-video": Base("hunyuan-video", "hunyuanvideo-community/HunyuanVideo", 20),
}
SINGLE_BLOCKS = 40  # of HunyuanVideo
KINDS = {"networks.lora": "lora", "networks.lora_wan": "lora", "networks.loha": "loha", "networks.lokr": "lokr"}
OURS = "weft.integrations.musubi"


def put_model(theirs: Theirs, draft: Draft, base: Base) -> None:
    """The section `family`, but for what the timesteps decide: the expert."""
    if "task" in theirs:
        draft.set("family.kind", base.kind, "task", theirs=theirs.take("task"))
    else:
        why = "musubi's default task, t2v-14B" if base.kind == "wan" else "the model of hv_train_network.py"
        draft.assume("family.kind", base.kind, why)
    _put_source(theirs, draft, base)
    parts = {"vae": "vae", "t5": "text_encoder", "clip": "image_encoder"}
    if base.kind == "hunyuan-video":
        parts = {"vae": "vae", "text_encoder1": "text_encoder", "text_encoder2": "text_encoder_2"}
        channels = theirs.whole("dit_in_channels", 16)
        if channels != 16:
            raise ConfigError(
                f"{theirs.place('dit_in_channels')}: dit_in_channels {channels} is its image-to-video model. "
                "Weft trains the text-to-video one."
            )
        if theirs.flag("vae_tiling"):
            draft.set("family.vae_tiling", True, "vae_tiling")
        guidance = theirs.number("guidance_scale")
        if guidance is not None:
            draft.set("family.guidance", guidance, "guidance_scale", "what the network is told while it trains")
    elif "guidance_scale" in theirs:
        draft.drop("guidance_scale", theirs.take("guidance_scale"), "Wan's network is told no guidance.")
    for of, part in parts.items():
        if (path := theirs.text(of)) is not None:
            draft.set(f"family.files.{part}", path, of)
    _put_storage(theirs, draft)


def _put_source(theirs: Theirs, draft: Draft, base: Base) -> None:
    network = theirs.text("dit")
    if base.boundary is None and network:
        draft.set("family.files.transformer", network, "dit")
    if draft.model:
        draft.assume("family.source", draft.model, "--model")
        return
    folder = base.repository.rpartition("/")[2]
    needs = "its tokenizer and scheduler" if {"vae"} <= set(theirs.given) else "its tokenizer, scheduler, VAE, ..."
    draft.ask("family.source", f"FILL-IN/{folder}", f"folder with {needs}: hf download {base.repository}")


def _put_storage(theirs: Theirs, draft: Draft) -> None:
    scaled, plain = theirs.flag("fp8_scaled"), theirs.flag("fp8_base")
    if scaled or plain:
        note = "" if scaled else "here with a scale for each row, which musubi's fp8_base has not"
        draft.set("family.dtype", "fp8", "fp8_scaled" if scaled else "fp8_base", note, True)
    for flag, kernel in (("flash_attn", "flash"), ("flash3", "flash")):
        if theirs.flag(flag):
            draft.set("family.attention", kernel, flag, "needs the extra 'flash'", True)


# ---- The adapter ----------------------------------------------------------------------------------------------------


def put_adapter(theirs: Theirs, draft: Draft, base: Base) -> None:
    """The section `adapter`."""
    arguments = named_arguments(theirs, "network_args")
    kind = _kind(theirs, arguments)
    if "network_module" in theirs:
        draft.set("adapter.kind", kind, "network_module", theirs=theirs.take("network_module"))
    else:
        draft.assume("adapter.kind", kind, "network_module is not given")
    rank = theirs.whole("network_dim")
    if rank is None:
        draft.assume("adapter.rank", 4, "musubi's default without network_dim")
        rank = 4
    else:
        draft.set("adapter.rank", rank, "network_dim")
    _put_alpha(theirs, draft, rank)
    _put_start(theirs, draft)
    _put_dropouts(theirs, draft, arguments, kind)
    _put_targets(theirs, draft, base, arguments)
    factor = arguments.pop("factor", None)
    if factor is not None and kind == "lokr":
        draft.set("adapter.factor", int(_float(factor, "factor", theirs)), "network_args factor")
    if "conv_dim" in arguments or "conv_alpha" in arguments:
        value = arguments.pop("conv_dim", None) or arguments.pop("conv_alpha")
        arguments.pop("conv_alpha", None)
        draft.drop("network_args conv_dim", value, "No block of these models has a convolution; it changes nothing.")
    for name, value in arguments.items():
        why = "It only prints more." if name == "verbose" else "Weft has no such setting of an adapter."
        draft.drop(f"network_args {name}", value, why)


def _kind(theirs: Theirs, arguments: dict[str, str]) -> str:
    module = theirs.text("network_module") or "networks.lora_wan"
    if module.startswith("lycoris"):
        module = f"networks.{arguments.pop('algo', 'lora').lower().replace('locon', 'lora')}"
    if module not in KINDS and module != OURS:
        raise ConfigError(
            f"{theirs.place('network_module')}: network_module '{module}' is not known. Weft has {', '.join(KINDS)}."
        )
    return KINDS.get(module, "lora")


def _put_alpha(theirs: Theirs, draft: Draft, rank: int) -> None:
    alpha = theirs.number("network_alpha")
    if alpha is None:
        draft.assume("adapter.alpha", 1.0, f"musubi's default: strength alpha / rank = 1/{rank}")
        draft.warn(
            f"adapter.alpha: network_alpha is not given, and musubi then takes 1, which makes the adapter 1/{rank} as "
            f"strong. That may be a mistake: alpha {rank} needs a learning rate about {rank} times lower."
        )
    elif alpha == 0:
        draft.set("adapter.alpha", float(rank), "network_alpha", "musubi takes 0 for the rank", alpha)
    else:
        draft.set("adapter.alpha", alpha, "network_alpha")


def _put_start(theirs: Theirs, draft: Draft) -> None:
    if (path := theirs.text("network_weights")) is not None:
        draft.set("adapter.start_from", path, "network_weights", "its rank must be adapter.rank")
    if merged := theirs.texts("base_weights"):
        factors = theirs.texts("base_weights_multiplier")
        weights = f" with weights {' '.join(factors)}" if factors else ""
        draft.drop("base_weights", merged, f"Merge them first{weights}: weft merge ADAPTER --into BASE --out NEW.")
        draft.warn(f"base_weights: musubi trains on a base with {', '.join(merged)} in it; this run has the bare base.")


def _put_dropouts(theirs: Theirs, draft: Draft, arguments: dict[str, str], kind: str) -> None:
    named: list[tuple[str, str, float | None]] = [
        ("network_dropout", "adapter.activation_dropout", theirs.number("network_dropout")),
        ("scale_weight_norms", "adapter.max_norm", theirs.number("scale_weight_norms")),
    ]
    for name, key in (
        ("rank_dropout", "adapter.rank_dropout"),
        ("module_dropout", "adapter.module_dropout"),
        ("loraplus_lr_ratio", "adapter.lora_plus"),
    ):
        text = arguments.pop(name, None)
        named.append((f"network_args {name}", key, None if text is None else _float(text, name, theirs)))
    for of, key, value in named:
        if value is None:
            continue
        if kind == "lora":
            note = "held after each optimizer step" if key.endswith("max_norm") else ""
            draft.set(key, value, of, note)
        else:
            draft.drop(of, value, f"Weft has it for LoRA alone, not for {kind}.")


def _float(text: str, name: str, theirs: Theirs) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(
            f"{theirs.place('network_args')}: network_args {name} is '{text}'. Expected was a number."
        ) from None


def named_arguments(theirs: Theirs, key: str) -> dict[str, str]:
    """What stands as name=value in a list. Raises ConfigError for what does not."""
    found: dict[str, str] = {}
    for text in theirs.texts(key):
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{theirs.place(key)}: '{text}' in {key} is no name=value.")
        found[name.strip()] = value.strip()
    return found


# ---- Which layers ---------------------------------------------------------------------------------------------------

WAN_LAYERS = (*(f"{a}_attn.{n}" for a in ("self", "cross") for n in "qkvo"), "ffn.0", "ffn.2")
IMAGE_LAYERS = ("cross_attn.k_img", "cross_attn.v_img")  # of Wan 2.1's image-to-video models
DOUBLE_LAYERS = tuple(f"{a}_{n}" for a in ("img", "txt") for n in ("attn_qkv", "attn_proj", "mlp.fc1", "mlp.fc2"))
SINGLE_LAYERS = ("linear1", "linear2")
MODULATIONS = {"double": ("img_mod.linear", "txt_mod.linear"), "single": ("modulation.linear",)}
DEFAULT_EXCLUDE = {
    "wan": r".*(patch_embedding|text_embedding|time_embedding|time_projection|norm|head).*",
    "hunyuan-video": r".*(img_mod|txt_mod|modulation).*",
}


def layers_of(base: Base) -> dict[str, list[str]]:
    """Suffix of a layer -> its official paths in all blocks: what musubi's patterns are matched with."""
    if base.kind == "wan":
        extra = IMAGE_LAYERS if base.image and base.boundary is None else ()
        return {end: [f"blocks.{n}.{end}" for n in range(base.blocks)] for end in (*WAN_LAYERS, *extra)}
    double = {
        end: [f"double_blocks.{n}.{end}" for n in range(base.blocks)]
        for end in (*DOUBLE_LAYERS, *MODULATIONS["double"])
    }
    single = {
        end: [f"single_blocks.{n}.{end}" for n in range(SINGLE_BLOCKS)]
        for end in (*SINGLE_LAYERS, *MODULATIONS["single"])
    }
    return double | single


def _put_targets(theirs: Theirs, draft: Draft, base: Base, arguments: dict[str, str]) -> None:
    """musubi trains a layer unless an exclude matches and no include does; an include alone narrows nothing."""
    excludes, includes = (arguments.pop(f"{word}_patterns", None) for word in ("exclude", "include"))
    if excludes is None and includes is None:
        draft.assume("adapter.targets", "attention+ffn", "what musubi's network module adapts in each block")
        return
    try:
        without = [re.compile(text) for text in (*_listed(excludes), DEFAULT_EXCLUDE[base.kind])]
        kept = [re.compile(text) for text in _listed(includes)]
    except re.error as error:
        raise ConfigError(f"{theirs.place('network_args')}: a pattern is no regular expression: {error}.") from None
    chosen: list[str] = []
    whole = layers_of(base)
    for end, paths in whole.items():
        fitting = [path for path in paths if _trained(path, without, kept)]
        chosen += [end] if len(fitting) == len(paths) else fitting
    if not chosen:
        raise ConfigError(
            f"{theirs.place('network_args')}: these patterns leave no layer to train. An include_patterns entry keeps "
            "what an exclude_patterns entry takes away."
        )
    if includes is not None and excludes is None:
        draft.warn("include_patterns: alone it narrows nothing in musubi, which trains all layers. So does this run.")
    targets = _as_set(base, whole, chosen)
    draft.set(
        "adapter.targets", targets, "network_args patterns", "the layers that they leave", _both(excludes, includes)
    )


def _both(excludes: str | None, includes: str | None) -> str:
    return " ".join(f"{word} {text}" for word, text in (("exclude", excludes), ("include", includes)) if text)


def _listed(text: str | None) -> list[str]:
    """The texts of a Python list of strings, read as text: nothing is evaluated."""
    found = re.findall(r"(r?)(?:'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\")", text or "")
    return [(one or two) if raw else (one or two).replace("\\\\", "\\") for raw, one, two in found]


def _trained(path: str, without: Sequence[re.Pattern[str]], kept: Sequence[re.Pattern[str]]) -> bool:
    taken = any(pattern.fullmatch(path) for pattern in without)
    return not taken or any(pattern.fullmatch(path) for pattern in kept)


def _as_set(base: Base, whole: Mapping[str, Sequence[str]], chosen: Sequence[str]) -> str | list[str]:
    """The name of a set of ours, where it is one; else suffixes, and whole paths where blocks differ."""
    names = {
        "wan": {"attention": "_attn.", "ffn": "ffn.", "self-attention": "self_attn.", "cross-attention": "cross_attn."},
        "hunyuan-video": {},
    }[base.kind]
    for name, piece in names.items():
        if set(chosen) == {end for end in whole if piece in end}:
            return name
    plain = {end for end in whole if end not in (*MODULATIONS["double"], *MODULATIONS["single"])}
    return "attention+ffn" if set(chosen) == plain else list(chosen)
