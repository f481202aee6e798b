"""Adapters of models that Weft does not train, told by their names so that a refusal can say what they are."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from weft.errors import ModelError

# Names that only these have, in the order in which they are tried.
MARKS: tuple[tuple[str, str], ...] = (
    (r"^(lora_te\d?_|lora_prior_te|text_encoder|te\d?[._])", "an adapter with layers of a text encoder"),
    (
        r"^(lora_unet_(down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)|unet\.)",
        "an adapter of Stable Diffusion 1, 2 or XL",
    ),
    (r"joint_blocks[._]\d", "an adapter of Stable Diffusion 3"),
    (r"transformer_blocks[._]\d+[._](img_mlp[._]net|txt_mlp[._]net|(img|txt)_mod[._]1)", "an adapter of Qwen-Image"),
    (r"(^|[._])layers[._]\d+[._](attention[._]|feed_forward|adaLN_modulation)", "an adapter of Z-Image or Lumina"),
    (
        r"(^|\.)transformer_blocks\.\d+\.attn[12]\.|_(transformer|unet)_transformer_blocks_\d+_attn[12]_",
        "an adapter of LTX-Video or CogVideoX",
    ),
    (r"(visual|text)_transformer_blocks[._]\d", "an adapter of Kandinsky 5"),
    (r"double_blocks[._]\d+[._](img|txt)_attn_[qkv][._]", "an adapter of HunyuanVideo 1.5"),
    (r"distilled_guidance_layer", "an adapter of Chroma"),
)

# Flux has the blocks of ComfyUI's HunyuanVideo in fewer numbers: 19 with two streams and 38 with one, for 20 and 40.
_DOUBLE, _SINGLE = 19, 38
_OF_HUNYUAN_VIDEO = re.compile(r"fc[12]$|(mod|modulation)[._]linear$|_attn_(qkv|proj)$|token_refiner")


def stranger(names: Iterable[str], metadata: Mapping[str, str]) -> str | None:
    """A phrase for an adapter of another model, with the first name that tells; None when none does."""
    names = list(names)
    for pattern, phrase in MARKS:
        told = next((name for name in names if re.search(pattern, name)), None)
        if told is not None:
            return f"{phrase} ('{told}'{_said(metadata)})"
    return None


def refuse_ambiguous(family: str, modules: Sequence[str], metadata: Mapping[str, str], source: Path) -> None:
    """Raise ModelError for names that Flux and ComfyUI's HunyuanVideo share, unless something says the latter."""
    shared = [name for name in modules if re.match(r"(double|single)_blocks[._]\d", name)]
    if family != "hunyuan-video" or not shared:
        return
    said = f"{metadata.get('weft.family', '')} {metadata.get('ss_base_model_version', '')} " + metadata.get(
        "modelspec.architecture", ""
    )
    said = said.lower()
    if "hunyuan" in said and "flux" not in said:
        return
    dotted = any("." in name for name in shared)
    if "flux" not in said and (_beyond_flux(shared) or any(_tells(name, dotted) for name in modules)):
        return
    raise ModelError(
        f"{source} seems to be an adapter of Flux ('{shared[0]}'{_said(metadata)}): HunyuanVideo in ComfyUI has its "
        f"names, but {_DOUBLE + 1} and {_SINGLE + 2} blocks, and here are none beyond Flux's {_DOUBLE} and {_SINGLE}."
    )


def _beyond_flux(names: Iterable[str]) -> bool:
    limits = {"double": _DOUBLE, "single": _SINGLE}
    found = [re.match(r"(double|single)_blocks[._](\d+)", name) for name in names]
    return any(match is not None and int(match[2]) >= limits[match[1]] for match in found)


def _tells(name: str, dotted: bool) -> bool:
    """With underscores alone, img_attn_qkv is Flux's name too."""
    match = _OF_HUNYUAN_VIDEO.search(name)
    return match is not None and (dotted or not match[0].startswith("_attn"))


def _said(metadata: Mapping[str, str]) -> str:
    said = metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version")
    return f"; its header says '{said}'" if said else ""
