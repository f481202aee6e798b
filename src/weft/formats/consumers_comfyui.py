"""How ComfyUI loads a LoRA file for Wan and HunyuanVideo, as its own source has it.

Source: comfy/lora.py (model_lora_keys_unet, load_lora), comfy/lora_convert.py, comfy/weight_adapter/{lora,loha,lokr,
base}.py and comfy/supported_models.py of Comfy-Org/ComfyUI, read in 2026.
"""

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from weft.formats.use import Delta, Stored, Use, hadamard, kronecker, product
from weft.names.modules import modules

# HunyuanVideo is loaded under other names than its makers'; LoRA files may have either.
OWN_NAMES = (
    ("txt_in.t_embedder.mlp.0.", "txt_in.t_embedder.in_layer."), ("_mod.linear.", "_mod.lin."),
    ("txt_in.t_embedder.mlp.2.", "txt_in.t_embedder.out_layer."), ("_attn_qkv.", "_attn.qkv."),
    ("txt_in.c_embedder.linear_1.", "txt_in.c_embedder.in_layer."), ("mlp.fc1.", "mlp.0."),
    ("txt_in.c_embedder.linear_2.", "txt_in.c_embedder.out_layer."), ("mlp.fc2.", "mlp.2."),
    ("_attn_proj.", "_attn.proj."), (".modulation.linear.", ".modulation.lin."),
    ("_in.mlp.2.", "_in.out_layer."), ("_in.mlp.0.", "_in.in_layer."),
)  # fmt: skip
OLD_NAMES = (
    ("_mod.lin.", "_mod.linear."), ("_attn.qkv.", "_attn_qkv."), ("_attn.proj.", "_attn_proj."),
    ("mlp.0.", "mlp.fc1."), ("mlp.2.", "mlp.fc2."), (".modulation.lin.", ".modulation.linear."),
)  # fmt: skip

# The first of these that a layer has is taken: its up and its down.
PAIRS = (
    ("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight"), ("lora.up.weight", "lora.down.weight"),
    ("lora_B", "lora_A"), ("lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
    ("lora_B.default.weight", "lora_A.default.weight"),
)  # fmt: skip
HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR = ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b")
# Known to it, and of no kind that Weft has.
OTHERS = ("diff", "diff_b", "w_norm", "b_norm", "set_weight", "lora_mid.weight", "reshape_weight", "hada_t1", "hada_t2",
          "lokr_t2", "oft_blocks", "rescale")  # fmt: skip
ENDS = (*(end for pair in PAIRS for end in pair), *HADA, *LOKR, *OTHERS, "alpha", "dora_scale")
OF_FUN = "lora_unet__blocks_0_cross_attn_k.lora_down.weight"  # by this key it knows VideoX-Fun's files


def names(family: str) -> dict[str, str]:
    """Every name under which it finds a layer in a file -> the layer's official name."""
    found = {}
    for module in modules(family).parts:
        own = replaced(module, OWN_NAMES) if family == "hunyuan-video" else module
        found["lora_unet_" + own.replace(".", "_")] = module
        found["diffusion_model." + own] = module
        if family == "hunyuan-video":
            old = replaced(own, OLD_NAMES)
            found["transformer." + old] = found["diffusion_model." + old] = module
    return found


def replaced(module: str, rules: tuple[tuple[str, str], ...]) -> str:
    """A module's name with the program's replacements, which are meant for names of tensors."""
    key = module + "."
    for old, new in rules:
        key = key.replace(old, new)
    return key.removesuffix(".")


def comfyui(stored: Stored, family: str) -> Use:
    """What the node that loads LoRAs does."""
    tensors = stored.tensors
    if OF_FUN in tensors:
        tensors = {key.replace("lora_unet__", "lora_unet_", 1): tensor for key, tensor in tensors.items()}
    known = names(family)
    parts: dict[str, dict[str, Tensor]] = {}
    ignored = []
    for key, tensor in tensors.items():
        name, end = split(key)
        if name in known:
            parts.setdefault(name, {})[end] = tensor
        else:
            ignored.append(key)
    layers: dict[str, Callable[[], Delta]] = {}
    faults = []
    for name, found in parts.items():
        module = known[name]
        delta, taken = adapter(found)
        left = [end for end in found if end not in taken]
        ignored += [f"{name}.{end}" for end in left if end not in OTHERS]
        faults += [f"{name}.{end}: this changes the layer in a way that Weft cannot compare." for end in left
                   if end in OTHERS]  # fmt: skip
        if "dora_scale" in taken and found["dora_scale"].shape[1:].numel() * (found["dora_scale"].dim() > 1) != 1:
            faults.append(f"{name}.dora_scale has shape {tuple(found['dora_scale'].shape)}, not (outputs, 1).")
        if module in layers:
            faults.append(f"{module} has two changes in the file, and ComfyUI applies only the one that it reads last.")
        if delta is not None:
            layers[module] = delta
    # Its weight_decompose brings rows to dora_scale / |W|, where PEFT, which trains them, divides by |W + dW|.
    return Use(layers, ignored=tuple(ignored), faults=tuple(faults), lengths_of_base=True)


def split(key: str) -> tuple[str, str]:
    """A key as a layer's name and one of the ends that are known; no name for others."""
    return next(((key.removesuffix("." + end), end) for end in ENDS if key.endswith("." + end)), ("", key))


def adapter(parts: Mapping[str, Tensor]) -> tuple[Callable[[], Delta] | None, tuple[str, ...]]:
    """What is done with the parts of one layer, and which of them are used."""
    alpha = float(parts["alpha"].item()) if "alpha" in parts else None
    told = tuple(end for end in ("alpha", "dora_scale") if end in parts)
    for up, down in PAIRS:
        if up in parts and down in parts:
            scale = 1.0 if alpha is None else alpha / len(parts[down])
            made = partial(product, parts[up], parts[down], scale, parts.get("dora_scale"))
            return made, (up, down, *told)
    if all(end in parts for end in HADA):
        scale = 1.0 if alpha is None else alpha / len(parts["hada_w1_b"])
        return partial(hadamard, parts, scale), (*HADA, *told)
    halves = [end for end in LOKR if end in parts]
    if all(any(end.startswith(half) for end in halves) for half in ("lokr_w1", "lokr_w2")):
        # Of two halves that are products it takes the rank of the second; where none is one, alpha counts nothing.
        inner = next((len(parts[end]) for end in ("lokr_w2_b", "lokr_w1_b") if end in parts), None)
        scale = 1.0 if alpha is None or inner is None else alpha / inner
        return partial(kronecker, parts, scale), (*halves, *told)
    return None, ()
