"""The line that loads an exported adapter in the program that it was written for."""

from collections.abc import Callable, Mapping
from pathlib import Path

from weft.formats.adapter_file import SavedAdapter
from weft.names.modules import family_of


def load_line(to: str, path: Path, adapter: SavedAdapter, expert: str) -> str:
    """What a user types or clicks. expert: high or low, of a model that has two; else default."""
    family = family_of(adapter.paths) or "causal-lm"
    return LINES[to](path, family, expert, adapter)


def _peft(path: Path, family: str, expert: str, adapter: SavedAdapter) -> str:
    base = adapter.metadata.get("base_model", "BASE")
    if family == "causal-lm":
        lines = f"PeftModel.from_pretrained(model, '{path}')"
        if adapter.kind == "lora" and not adapter.dora:
            lines += f"; vllm serve {base} --enable-lora --max-lora-rank {_vllm_rank(adapter.rank)} "
            lines += f"--lora-modules {path.name}={path}"
        return lines
    return f"PeftModel.from_pretrained(pipe.{_transformer(expert)}, '{path}')"


def _vllm_rank(rank: int) -> int:
    """The smallest rank that vLLM's --max-lora-rank can be and that holds this one."""
    return next((size for size in (1, 8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)


def _diffusers(path: Path, family: str, expert: str, adapter: SavedAdapter) -> str:
    second = ", load_into_transformer_2=True" if expert == "low" else ""
    return f"pipe.load_lora_weights('{path}'{second})"


def _comfyui(path: Path, family: str, expert: str, adapter: SavedAdapter) -> str:
    model = f" on the model for {expert} noise" if expert in ("high", "low") else ""
    return f"put it into ComfyUI/models/loras; node 'Load LoRA (Model)' (LoraLoaderModelOnly){model}, strength 1"


def _musubi(path: Path, family: str, expert: str, adapter: SavedAdapter) -> str:
    if family == "hunyuan-video":
        return f"hv_generate_video.py --lora_weight {path} --lora_multiplier 1"
    option = "_high_noise" if expert == "high" else ""
    return f"wan_generate_video.py --lora_weight{option} {path} --lora_multiplier{option} 1"


def _videox_fun(path: Path, family: str, expert: str, adapter: SavedAdapter) -> str:
    option = "lora_high" if expert == "high" else "lora"
    return f"in examples/*/predict_*.py: {option}_path = '{path}', {option}_weight = 1.0 (theirs is 0.55)"


def _original(path: Path, family: str, expert: str, adapter: SavedAdapter) -> str:
    return "for loaders that add B A to the makers' modules and know no alpha: weight or strength 1"


def _transformer(expert: str) -> str:
    """diffusers has the expert for low noise second."""
    return "transformer_2" if expert == "low" else "transformer"


LINES: Mapping[str, Callable[[Path, str, str, SavedAdapter], str]] = {
    "peft": _peft,
    "diffusers": _diffusers,
    "comfyui": _comfyui,
    "musubi": _musubi,
    "videox-fun": _videox_fun,
    "original": _original,
}
