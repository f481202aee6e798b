"""The ss_* and modelspec.* keys by which other trainers' tools tell what an adapter is, as far as its header knows.

Keys and meanings: kohya-ss/musubi-tuner, training/trainer_base.py and utils/sai_model_spec.py; Stability-AI/ModelSpec.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import PureWindowsPath
from typing import TYPE_CHECKING, Any

from safetensors.torch import save

from weft.formats.adapter_file import STEP_LIST, SavedAdapter
from weft.names.modules import family_of

if TYPE_CHECKING:
    from torch import Tensor

LEGACY = slice(1 << 20, (1 << 20) + (1 << 16))  # the bytes of a file that sshs_legacy_hash is of

# Family -> ss_base_model_version (musubi's dataset/architectures.py), modelspec.architecture, modelspec.implementation.
MODELS = {
    "wan": ("wan", "wan2.1/lora", "https://github.com/Wan-Video/Wan2.1"),
    "hunyuan-video": ("hunyuan_video", "hunyuan-video/lora", "https://github.com/Tencent/HunyuanVideo"),
}
OPTIMIZERS = {"adamw": "torch.optim.adamw.AdamW", "adamw8bit": "bitsandbytes.optim.adamw.AdamW8bit"}
WEIGHTINGS = {"none": "none", "sigma-sqrt": "sigma_sqrt", "cosmap": "cosmap"}
PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
# Of musubi's network_args, and of ours in the same spirit: argument -> key of adapter, and the value that is not told.
ARGUMENTS = {
    "rank_dropout": ("rank_dropout", 0.0),
    "module_dropout": ("module_dropout", 0.0),
    "loraplus_lr_ratio": ("lora_plus", 1.0),
    "conv_dim": ("conv_rank", None),
    "conv_alpha": ("conv_alpha", None),
    "use_rslora": ("rslora", False),
    "use_dora": ("dora", False),
    "init": ("init", "kaiming"),
}


def kohya_header(adapter: SavedAdapter, network_module: str, implementation: str | None = None) -> dict[str, str]:
    """What an adapter's own header says, in the words of kohya's tools; what it does not say is left out. No value has
    a folder of the user's machine in it: of paths the last name stays.

    network_module: of the program that such files are made by, such as networks.lora_wan; empty: not told.
    implementation: whose tensor names the file has; None: the makers' of the model.
    """
    config = _object(adapter.metadata.get("weft.config", ""))
    family = adapter.metadata.get("weft.family") or family_of(adapter.paths) or ""
    told: dict[str, Any] = {
        "ss_network_module": network_module or None,
        "ss_base_model_version": MODELS[family][0] if family in MODELS else None,
        **_network(adapter, config),
        **_training(config, adapter.metadata),
        **_times(config),
        **_data(config.get("data", {}), adapter.metadata),
        **_base(config.get("family", {}), adapter.metadata),
    }
    if family in MODELS:
        told |= _modelspec(adapter, config, family, implementation)
    return {key: _text(value) for key, value in told.items() if value is not None}


def tensor_hashes(tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str] = {}) -> dict[str, str]:
    """Hashes of a file's contents as kohya's save_weights and ModelSpec define them. tensors: by their names in the
    file, contiguous. metadata: of the file; its ss_* keys move the place where the legacy hash begins."""
    raw = save(dict(tensors), {key: value for key, value in metadata.items() if key.startswith("ss_")})
    start = 8 + int.from_bytes(raw[:8], "little")
    of_tensors = sha256(memoryview(raw)[start:]).hexdigest()
    return {
        "sshs_model_hash": of_tensors,
        "sshs_legacy_hash": sha256(raw[LEGACY]).hexdigest()[:8],
        "modelspec.hash_sha256": f"0x{of_tensors}",
    }


# ---- ss_* ---------------------------------------------------------------------------------------------------------


def _network(adapter: SavedAdapter, config: Mapping[str, Any]) -> dict[str, Any]:
    """Alpha as the file's own alphas have it: the scale times the rank, also where rsLoRA reckons otherwise."""
    recipe = config.get("adapter", {})
    found = {name: recipe.get(key) for name, (key, usual) in ARGUMENTS.items() if recipe.get(key, usual) != usual}
    return {
        "ss_network_dim": adapter.rank or None,
        "ss_network_alpha": adapter.scale * adapter.rank if adapter.rank else None,
        "ss_network_dropout": recipe.get("activation_dropout") or None,
        "ss_network_args": json.dumps({name: _text(value) for name, value in found.items()}) if found else None,
    }


def _training(config: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, Any]:
    schedule, engine = config.get("schedule", {}), config.get("engine", {})
    version = metadata.get("weft.version")
    return {
        "ss_output_name": config.get("name"),
        "ss_training_started_at": metadata.get("weft.started"),
        "ss_training_finished_at": metadata.get("weft.saved"),
        "ss_training_comment": f"trained with Weft {version}" if version else None,
        "ss_learning_rate": config.get("optimizer", {}).get("lr"),
        "ss_optimizer": _optimizer(config.get("optimizer", {})),
        "ss_lr_scheduler": _curve(schedule),
        "ss_lr_warmup_steps": schedule.get("warmup"),
        "ss_max_grad_norm": schedule.get("max_norm"),
        "ss_max_train_steps": metadata.get("weft.steps", schedule.get("steps")),
        "ss_num_epochs": schedule.get("epochs"),
        "ss_gradient_accumulation_steps": schedule.get("accumulate"),
        "ss_gradient_checkpointing": engine.get("recompute"),
        "ss_gradient_checkpointing_cpu_offload": engine.get("offload_inputs"),
        "ss_mixed_precision": PRECISIONS.get(metadata.get("weft.precision") or engine.get("precision", "")),
        "ss_seed": metadata.get("weft.seed"),
        "ss_steps": metadata.get("weft.step"),
        "ss_epoch": metadata.get("weft.epoch"),
    }


def _optimizer(optimizer: Mapping[str, Any]) -> str | None:
    if optimizer.get("kind") == "custom":
        name, values = optimizer["path"], {"weight_decay": optimizer.get("weight_decay"), **optimizer.get("args", {})}
    elif optimizer.get("kind") in OPTIMIZERS:
        name = OPTIMIZERS[optimizer["kind"]]
        values = {"betas": tuple(optimizer.get("betas", ())), **{k: optimizer.get(k) for k in ("eps", "weight_decay")}}
    else:
        return None
    return f"{name}({','.join(f'{key}={value}' for key, value in values.items())})"


def _curve(schedule: Mapping[str, Any]) -> str | None:
    curve = schedule.get("curve")
    return "constant_with_warmup" if curve == "constant" and schedule.get("warmup") else curve


def _times(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of flow matching, where musubi has a word for the density; other objectives have other times."""
    objective = config.get("objective", {})
    if objective.get("kind") != "flow-matching":
        return {}
    density = objective.get("timesteps") or {}
    weighting = WEIGHTINGS.get(objective.get("weighting", ""))
    match density.get("kind"):
        case "uniform":
            said = {"ss_timestep_sampling": "uniform"}
        case "sigmoid":
            said = {"ss_timestep_sampling": "sigmoid", "ss_sigmoid_scale": density.get("scale")}
        case "shift" if density.get("scale") is not None:
            said = {"ss_timestep_sampling": "shift", "ss_sigmoid_scale": density["scale"]}
        case "logit-normal" if weighting == "none":  # musubi names that density by its weighting
            said = {"ss_timestep_sampling": "sigma", "ss_logit_mean": density["mean"], "ss_logit_std": density["std"]}
            weighting = "logit_normal"
        case _:
            said = {}
    return {"ss_weighting_scheme": weighting, "ss_discrete_flow_shift": density.get("shift"), **said}


def _data(data: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, Any]:
    items = metadata.get("weft.data.items", "")
    sources: Sequence[Mapping[str, Any]] = data.get("sources", ())
    sets = [_dataset(source, data) for source in sources if "path" in source]
    return {
        "ss_num_train_items": items if items.isdecimal() else None,
        "ss_datasets": json.dumps(sets, ensure_ascii=False) if sets else None,
    }


def _dataset(source: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """One source of clips, with the last name of its path, as musubi tells its datasets."""
    buckets = source.get("buckets") or data.get("buckets") or {}
    name = _last(source["path"])
    told = {
        "resolution": _resolution(buckets),
        "target_frames": buckets.get("frames"),
        "caption_extension": source.get("caption_extension"),
        "batch_size_per_device": data.get("batch_size"),
        "num_repeats": source.get("repeats"),
        "video_jsonl_file" if "." in name else "video_directory": name,
    }
    return {key: value for key, value in told.items() if value is not None}


def _resolution(buckets: Mapping[str, Any]) -> list[int] | None:
    """Width and height of the largest picture."""
    sizes = [*buckets.get("sizes", ()), *([side, side] for side in buckets.get("sides", ()))]
    return list(max(sizes, key=lambda size: size[0] * size[1])) if sizes else None


def _base(family: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Names of the files that the frozen model was read from, without their folders."""
    files = family.get("files") or {}
    expert = metadata.get("weft.expert", "")
    network = files.get(expert) or files.get("transformer") or family.get("source")
    vae = files.get("vae")
    return {
        "ss_sd_model_name": _last(network) if network else None,
        "ss_vae_name": _last(vae) if vae else None,
        "ss_fp8_base": family["dtype"] == "fp8" if "dtype" in family else None,
        "ss_guidance_scale": family.get("guidance"),  # HunyuanVideo's own input
    }


# ---- modelspec.* --------------------------------------------------------------------------------------------------


def _modelspec(
    adapter: SavedAdapter, config: Mapping[str, Any], family: str, implementation: str | None
) -> dict[str, Any]:
    metadata, data = adapter.metadata, config.get("data", {})
    saved = metadata.get("weft.saved")
    sizes = [_resolution(s.get("buckets") or data.get("buckets") or {}) for s in data.get("sources", ())]
    size = max(filter(None, sizes), key=lambda size: size[0] * size[1], default=None)
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": MODELS[family][1],
        "modelspec.implementation": implementation or MODELS[family][2],
        "modelspec.title": _title(adapter, config),
        "modelspec.date": datetime.fromtimestamp(int(float(saved)), UTC).isoformat() if saved else None,
        "modelspec.resolution": f"{size[0]}x{size[1]}" if size else None,
        "modelspec.trigger_phrase": data.get("caption_prefix", "").strip() or None,
        "modelspec.timestep_range": _range(config, metadata),
        "modelspec.usage_hint": _hint(metadata),
        "modelspec.merged_from": _parents(metadata),
    }


def _title(adapter: SavedAdapter, config: Mapping[str, Any]) -> str:
    """The run's name, and the expert's where the model has two; else what the file says already, or its kind."""
    said = adapter.metadata
    if parents := _parents(said):
        return f"{parents} (merged)"
    name = config.get("name") or said.get("modelspec.title") or said.get("ss_output_name")
    expert = said.get("weft.expert", "default")
    of_two = f" ({expert} noise)" if config.get("name") and expert != "default" else ""
    return f"{name}{of_two}" if name else f"{adapter.kind}, rank {adapter.rank}"


def _range(config: Mapping[str, Any], metadata: Mapping[str, str]) -> str | None:
    """Times in thousandths, where not all of them were trained."""
    low, high = 0.0, 1.0
    for times in (json.loads(metadata.get("weft.times", "[0, 1]")), config.get("objective", {}).get("times") or (0, 1)):
        low, high = max(low, times[0]), min(high, times[1])
    return None if (low, high) == (0.0, 1.0) else f"{round(1000 * low)},{round(1000 * high)}"


def _hint(metadata: Mapping[str, str]) -> str | None:
    steps = _object(metadata.get(STEP_LIST, ""))
    return f"{len(steps['times'])} steps at shift {steps['shift']:g}, guidance 1" if steps else None


def _parents(metadata: Mapping[str, str]) -> str | None:
    parents = _object(metadata.get("weft.merged", "")).get("parents", [])
    return ", ".join(str(parent.get("run") or _last(parent["adapter"])) for parent in parents) or None


def _object(text: str) -> dict[str, Any]:
    """The JSON object in a text; empty where there is none."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _last(path: str) -> str:
    """The last name of a path of any system."""
    return PureWindowsPath(path).name


def _text(value: object) -> str:
    """As Python prints it, as musubi writes them; whole numbers without a fraction."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e9 else str(value)
