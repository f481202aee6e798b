"""A run.yaml to begin from, made of the ss_* keys that musubi and trainers like it write, as far as they go."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weft import plugins
from weft.config.show import show as as_yaml
from weft.formats.describe import Description
from weft.names.modules import family_of, modules

FAMILIES = {"wan": "wan", "hunyuan_video": "hunyuan-video"}
CURVES = {"constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine"}
WEIGHTINGS = {"sigma_sqrt": "sigma-sqrt", "cosmap": "cosmap"}
NONE = ("", "None", "null")
MODEL, CLIPS = "MODEL", "CLIPS"  # placeholders, which weft plan asks for


@dataclass
class Begun:
    """A config that grows from a header, and what is not known or not the same."""

    said: Mapping[str, str]
    config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def take(self, key: str, path: str, read: Callable[[str], Any] = str) -> None:
        """The value of a key at a dotted path; what cannot be read is noted."""
        text = self.said.get(key, "")
        if text in NONE:
            return
        try:
            value = read(text)
        except ValueError:
            self.notes.append(f"{key}: '{text}' is not understood")
            return
        self.put(path, value)

    def put(self, path: str, value: Any) -> None:
        *outer, last = path.split(".")
        inner = self.config
        for name in outer:
            inner = inner.setdefault(name, {})
        inner[last] = value


def begun(found: Description) -> str:
    """YAML that parses, with comments above it. found: an adapter with ss_* keys in its header."""
    said = found.metadata
    made = Begun(said)
    family = FAMILIES.get(said.get("ss_base_model_version", "")) or family_of(found.targets) or "wan"
    made.config = {
        "name": re.sub(r"[^\w.-]", "-", said.get("ss_output_name", "")).lstrip("-.") or "again",
        "family": {"kind": family, "source": MODEL},
        "adapter": {"kind": found.kind, "targets": targets(family, found.targets)},
        "objective": {"kind": "flow-matching"},
        "optimizer": {"kind": "adamw"},
    }
    made.notes.append(f"family.source: the header has no path; its file was {said.get('ss_sd_model_name', 'not told')}")
    _adapter(made, found)
    _training(made)
    _times(made)
    _data(made)
    whose = f"{found.weights}, whose header has no config of Weft's"
    notes = [f"Begun from {whose}: what is not below is as Weft does by default."]
    lines = [*notes, *(f"  {note}" for note in made.notes), "weft plan run.yaml says what is left to be filled in."]
    return "".join(f"# {line}\n" for line in lines) + as_yaml(made.config)


def targets(family: str, paths: Sequence[str]) -> str | list[str]:
    """The target set that stands for exactly these layers, or else their names without the numbers of blocks."""
    names = sorted({re.sub(r"^.*?\.\d+\.", "", path) for path in paths})
    sections = plugins.section_types("family")
    if family in ("wan", "hunyuan-video") and family in sections:
        every = [path for path in modules(family).official if re.search(r"\.0\.", path)]
        there = {re.sub(r"\.\d+\.", ".0.", path, count=1) for path in paths}
        for name, pattern in sections[family].targets.items():  # type: ignore[attr-defined]  # every family has them
            if there == {path for path in every if re.fullmatch(pattern, path)}:
                return name
    return names


def _adapter(made: Begun, found: Description) -> None:
    if found.rank:
        made.put("adapter.rank", found.rank)
        made.put("adapter.alpha", found.alpha)
    if found.kind == "lora":
        made.take("ss_network_dropout", "adapter.activation_dropout", float)
        arguments = _mapping(made.said.get("ss_network_args", ""))
        for theirs, ours in (("rank_dropout", "rank_dropout"), ("module_dropout", "module_dropout"),
                             ("loraplus_lr_ratio", "lora_plus")):  # fmt: skip
            if theirs in arguments:
                made.put(f"adapter.{ours}", float(arguments.pop(theirs)))
        if arguments:
            made.notes.append(f"network arguments that are not taken over: {json.dumps(arguments)}")


def _training(made: Begun) -> None:
    for key, path, read in (
        ("ss_learning_rate", "optimizer.lr", float),
        ("ss_seed", "seed", int),
        ("ss_max_grad_norm", "schedule.max_norm", float),
        ("ss_gradient_accumulation_steps", "schedule.accumulate", int),
        ("ss_lr_warmup_steps", "schedule.warmup", int),
        ("ss_gradient_checkpointing", "engine.recompute", _truth),
        ("ss_lr_scheduler", "schedule.curve", lambda text: _among(CURVES, text)),
    ):
        made.take(key, path, read)
    steps = next((made.said[k] for k in ("ss_steps", "ss_max_train_steps") if made.said.get(k, "").isdecimal()), None)
    if steps:
        made.put("schedule.steps", int(steps))
        schedule = made.config["schedule"]
        if schedule.get("warmup", 0) >= int(steps):
            made.notes.append(f"schedule.warmup: {schedule.pop('warmup')} steps are not fewer than all steps")
    optimizer = made.said.get("ss_optimizer", "")
    if "8bit" in optimizer.lower() and "adamw" in optimizer.lower():
        made.put("optimizer.kind", "adamw8bit")
    elif optimizer and "adamw" not in optimizer.lower():
        made.notes.append(f"optimizer: it was {optimizer}; AdamW stands here, kind: custom takes other classes")
    precision = made.said.get("ss_mixed_precision", "")
    if precision in ("bf16", "fp16", "no"):
        made.put("engine.precision", "fp32" if precision == "no" else precision)


def _times(made: Begun) -> None:
    said = made.said
    sampling, scheme = said.get("ss_timestep_sampling", ""), said.get("ss_weighting_scheme", "")
    scale, shift = _number(said.get("ss_sigmoid_scale", ""), 1.0), _number(said.get("ss_discrete_flow_shift", ""), 1.0)
    at = "objective.timesteps"
    if sampling == "uniform" or (sampling == "sigma" and scheme in ("none", *WEIGHTINGS)):
        made.put(at, {"kind": "uniform"})  # musubi's sigma knows no shift: networks learn at even times
    elif sampling == "sigmoid":
        made.put(at, {"kind": "sigmoid", "scale": scale})
    elif sampling == "shift":
        made.put(at, {"kind": "shift", "shift": shift, "scale": scale})
    elif sampling == "sigma" and scheme == "logit_normal":
        made.put(at, {"kind": "logit-normal", "mean": _number(said.get("ss_logit_mean", ""), 0.0),
                      "std": _number(said.get("ss_logit_std", ""), 1.0)})  # fmt: skip
    elif sampling:
        made.notes.append(f"objective.timesteps: '{sampling}' ({scheme or 'none'}) has no equal here")
    if scheme in WEIGHTINGS:
        made.put("objective.weighting", WEIGHTINGS[scheme])
    if times := re.fullmatch(r"(\d+),(\d+)", said.get("modelspec.timestep_range", "")):
        made.put("objective.times", [int(times[1]) / 1000, int(times[2]) / 1000])


def _data(made: Begun) -> None:
    """Sources with placeholders for their paths: headers have last names alone."""
    try:
        listed = json.loads(made.said.get("ss_datasets", "[]"))
    except ValueError:
        listed = []
    sets = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    made.put("data", {"kind": "video", "sources": [_source(each, made) for each in sets] or [{"path": CLIPS}]})
    if not any("buckets" in source for source in made.config["data"]["sources"]):
        made.put("data.buckets", {"sides": [512], "frames": [81]})
        made.notes.append("data.buckets: not told")
    made.notes.append("data.sources: paths are not told, only last names of folders")
    if sizes := [int(each["batch_size_per_device"]) for each in sets if each.get("batch_size_per_device")]:
        made.put("data.batch_size", max(sizes))


def _source(each: Mapping[str, Any], made: Begun) -> dict[str, Any]:
    keys = ("video_directory", "image_directory", "video_jsonl_file", "image_jsonl_file")
    source: dict[str, Any] = {"path": next((str(each[key]) for key in keys if each.get(key)), CLIPS)}
    if isinstance(each.get("num_repeats"), int) and each["num_repeats"] > 1:
        source["repeats"] = each["num_repeats"]
    if str(each.get("caption_extension") or "").startswith(".") and each["caption_extension"] != ".txt":
        source["caption_extension"] = each["caption_extension"]
    size, frames = each.get("resolution"), each.get("target_frames") or [1]
    if isinstance(size, list) and len(size) == 2:
        area = {"sides": [round((size[0] * size[1]) ** 0.5)]} if each.get("enable_bucket") else {"sizes": [size]}
        source["buckets"] = {**area, "frames": sorted({1 + (int(n) - 1) // 4 * 4 for n in frames})}
    if each.get("has_control"):
        made.notes.append(f"{source['path']}: it had control videos, which Weft does not train with")
    return source


# ---- Texts --------------------------------------------------------------------------------------------------------


def _truth(text: str) -> bool:
    return text == "True"


def _among(choices: Mapping[str, str], text: str) -> str:
    if text not in choices:
        raise ValueError(text)
    return choices[text]


def _number(text: str, otherwise: float) -> float:
    try:
        return float(text)
    except ValueError:
        return otherwise


def _mapping(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
