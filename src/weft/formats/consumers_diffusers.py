"""How diffusers' pipelines for Wan and HunyuanVideo load a LoRA file: their own names, and those that they convert.

Source: diffusers 0.42, loaders/{lora_pipeline,peft,lora_conversion_utils}.py, utils/peft_utils.py.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from weft.formats.consumers_peft import by_config
from weft.formats.use import Delta, Stored, Use, product
from weft.names.modules import modules

HEAD = "transformer."
IN_HEADER = "lora_adapter_metadata"

# ---- Wan's makers' names
ATTENTION = tuple(f"{kind}_attn.{each}" for kind in ("self", "cross") for each in "qkvo")
OF_BLOCK = (*ATTENTION, "ffn.0", "ffn.2")
WITH_EYES = ("cross_attn.k_img", "cross_attn.v_img")
AROUND = ("time_projection.1", "head.head", "text_embedding.0", "text_embedding.2", "time_embedding.0",
          "time_embedding.2", "img_emb.proj.1", "img_emb.proj.3")  # fmt: skip

# ---- HunyuanVideo's
HUNYUAN_WIDTH = 3072  # written into the converter
# Its down matrices are cut as if they were up matrices.
HUNYUAN_BROKEN = re.compile(r"txt_in\.individual_token_refiner\.blocks\.\d+\.self_attn_qkv|final_layer\.adaLN.*")


def diffusers(stored: Stored, family: str) -> Use:
    """What `load_lora_weights` does."""
    keys = stored.tensors.keys()
    if family == "wan" and any(key.startswith("diffusion_model.") for key in keys):
        return _wan_of_comfyui(stored.tensors)
    if family == "wan" and any(key.startswith("lora_unet_") for key in keys):
        return _wan_of_musubi(stored.tensors)
    if family == "hunyuan-video" and any("img_attn_qkv" in key for key in keys):
        return _hunyuan_of_makers(stored.tensors)
    return _own(stored)


def _own(stored: Stored) -> Use:
    mine = {key.removeprefix(HEAD): t for key, t in stored.tensors.items() if key.startswith(HEAD)}
    strange = tuple(key for key in stored.tensors if not key.startswith(HEAD))
    faults = tuple(f"'{key}' is no LoRA key, and diffusers stops at it." for key in strange if "lora" not in key)
    if IN_HEADER in stored.metadata:
        fields = json.loads(stored.metadata[IN_HEADER])
        config = {key.removeprefix(HEAD): v for key, v in fields.items() if key.startswith(HEAD)}
    else:
        config = _config_of_ranks(mine)
    use = by_config(mine, {"peft_type": "LORA", **config}, strange, HEAD)
    return Use(use.layers, canonical=True, ignored=use.ignored, faults=(*faults, *use.faults))


def _config_of_ranks(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Where the header says nothing, every layer's alpha is its rank."""
    ranks = {key.split(".lora_B.")[0]: t.shape[1] for key, t in tensors.items() if ".lora_B." in key}
    first = next(iter(ranks.values()), 0)
    patterns = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != first}
    dora = any("lora_magnitude_vector" in key for key in tensors)
    return {"r": first, "lora_alpha": first, "rank_pattern": patterns, "alpha_pattern": patterns, "use_dora": dora,
            "target_modules": list(ranks)}  # fmt: skip


def _wan_of_comfyui(tensors: Mapping[str, Tensor]) -> Use:
    """Keys behind `diffusion_model.`; outside of the blocks it knows no alpha."""
    left = {key.removeprefix("diffusion_model."): tensor for key, tensor in tensors.items()}
    if not any(key.startswith("blocks.") for key in left):
        return Use({}, faults=("no layer of a block is in the file, and diffusers stops at that.",))
    down = "lora_A" if any("lora_A" in key for key in left) else "lora_down"
    up = "lora_B" if any("lora_B" in key for key in left) else "lora_up"
    blocks = sorted({int(key.split(".")[1]) for key in left if key.startswith("blocks.")})
    inside = OF_BLOCK + (WITH_EYES if _has_eyes(left) else ())
    layers: dict[str, Callable[[], Delta]] = {}
    for module in (*(f"blocks.{n}.{name}" for n in blocks for name in inside), *AROUND):
        ends = (f"{module}.{down}.weight", f"{module}.{up}.weight")
        if not all(end in left for end in ends):
            continue
        a, b = (left.pop(end) for end in ends)
        alpha = left.pop(f"{module}.alpha", None) if module.startswith("blocks.") else None
        layers[module] = partial(product, b, a, 1.0 if alpha is None else float(alpha.item()) / len(a))
    return Use(layers, faults=_leftover(left))


def _wan_of_musubi(tensors: Mapping[str, Tensor]) -> Use:
    """Keys behind `lora_unet_`: all layers of blocks 0, 1, ... with their alphas, and nothing else."""
    left = {key.removeprefix("lora_unet_"): tensor for key, tensor in tensors.items()}
    if strange := [key for key in left if "blocks_" not in key]:
        return Use({}, faults=(f"'lora_unet_{strange[0]}' is in no block, and diffusers stops at that.",))
    count = len({key.split("blocks_")[1].split("_")[0] for key in left})
    inside = OF_BLOCK + (WITH_EYES if _has_eyes(left) else ())
    layers: dict[str, Callable[[], Delta]] = {}
    for module in (f"blocks.{n}.{name}" for n in range(count) for name in inside):
        name = module.replace(".", "_")
        ends = [f"{name}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")]
        if missing := [end for end in ends if end not in left]:
            why = f"'lora_unet_{missing[0]}' is missing: of such files diffusers wants all layers of all blocks."
            return Use(layers, faults=(why,))
        a, b, alpha = (left.pop(end) for end in ends)
        layers[module] = partial(product, b, a, float(alpha.item()) / len(a))
    return Use(layers, faults=_leftover(left))


def _hunyuan_of_makers(tensors: Mapping[str, Tensor]) -> Use:
    """The makers' names behind `diffusion_model.` or `transformer.`, without any alpha."""
    known = modules("hunyuan-video").parts
    bare = {key.removeprefix(HEAD).removeprefix("diffusion_model."): tensor for key, tensor in tensors.items()}
    if alphas := [key for key in bare if key.endswith(".alpha")]:
        return Use({}, faults=(f"'{alphas[0]}': diffusers knows no alpha in HunyuanVideo's files, and stops at it.",))
    layers: dict[str, Callable[[], Delta]] = {}
    faults, ignored = [], []
    for key, a in bare.items():
        module, _, end = key.rpartition(".lora_A.")
        if end != "weight" or f"{module}.lora_B.weight" not in bare or module not in known:
            if not key.endswith(".lora_B.weight") or key.replace("lora_B", "lora_A") not in bare:
                ignored.append(key)
            continue
        if HUNYUAN_BROKEN.fullmatch(module):
            faults.append(f"{module}: diffusers takes this layer's factors apart in a wrong way.")
        if ".linear1" in module and a.shape[1] != HUNYUAN_WIDTH:
            faults.append(f"{module}: diffusers cuts it for a network {HUNYUAN_WIDTH} wide, and this is another.")
        layers[module] = partial(product, bare[f"{module}.lora_B.weight"], a, 1.0)
    return Use(layers, ignored=tuple(ignored), faults=tuple(faults))


def _has_eyes(keys: Iterable[str]) -> bool:
    names = list(keys)
    return any("k_img" in key for key in names) and any("v_img" in key for key in names)


def _leftover(left: Mapping[str, Tensor]) -> tuple[str, ...]:
    """It stops where keys are left that are no differences of whole tensors."""
    wrong = [key for key in left if ".diff" not in key]
    return (
        (f"'{wrong[0]}' and {len(wrong) - 1} other keys are left over, and diffusers stops at them.",) if wrong else ()
    )
