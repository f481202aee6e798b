"""The directory of the house: where a name in YAML, or a verb on the command line, becomes a class."""

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Annotated, Any, Union

from weft.errors import ConfigError, did_you_mean

BUILT_IN: Mapping[str, Mapping[str, str]] = {
    "family": {
        "wan": "weft.families.wan:Wan",
        "hunyuan-video": "weft.families.hunyuan_video:HunyuanVideo",
        "causal-lm": "weft.families.causal_lm:CausalLM",
        "encoder": "weft.families.encoder:Encoder",
    },
    "adapter": {
        "lora": "weft.adapters.lora:Lora",
        "loha": "weft.adapters.loha:LoHa",
        "lokr": "weft.adapters.lokr:LoKr",
        "oft": "weft.adapters.oft:Oft",
        "full": "weft.adapters.full:FullChange",
        "none": "weft.adapters.no_adapter:NoAdapter",
        "ia3": "weft.adapters.ia3:Ia3",
        "prompt": "weft.adapters.prompts:Prompt",
        "p-tuning": "weft.adapters.prompts:PTuning",
        "prefix": "weft.adapters.prompts:Prefix",
    },
    "objective": {
        "flow-matching": "weft.objectives.flow_matching:FlowMatching",
        "legacy-epsilon": "weft.objectives.legacy_epsilon:LegacyEpsilon",
        "dmd": "weft.objectives.dmd:Dmd",
        "next-token": "weft.objectives.next_token:NextToken",
        "traditional": "weft.objectives.traditional:Traditional",
        "replay": "weft.objectives.experience_replay:ExperienceReplay",
        "agem": "weft.objectives.agem:Agem",
        "cmaml": "weft.objectives.meta_learning:CMaml",
        "sync": "weft.objectives.meta_learning:SyncMaml",
        "lamaml": "weft.objectives.meta_learning:LaMaml",
    },
    "engine": {"torch": "weft.engines.torch_engine:Torch", "deepspeed": "weft.engines.deepspeed:DeepSpeed"},
    "data": {
        "video": "weft.data.video:VideoData",
        "prompts": "weft.data.prompts:PromptData",
        "chat": "weft.data.chat:ChatData",
        "documents": "weft.data.documents:DocumentsData",
    },
    "optimizer": {
        "adamw": "weft.run.optimizers:AdamW",
        "adamw8bit": "weft.run.optimizers:AdamW8bit",
        "custom": "weft.run.optimizers:CustomOptimizer",
    },
    "format": {
        "peft": "weft.formats.peft:PeftFolder",
        "diffusers": "weft.formats.diffusers:DiffusersFile",
        "comfyui": "weft.formats.comfyui:ComfyUiFile",
        "musubi": "weft.formats.kohya:MusubiFile",
        "videox-fun": "weft.formats.kohya:VideoXFunFile",
        "original": "weft.formats.original:OriginalFile",
        "transformers": "weft.formats.transformers_folder:TransformersFolder",
    },
    "verb": {
        **{
            name: f"weft.cli.{name}:run"
            for name in (
                "demo", "init", "plan", "cache", "train", "launch", "stop", "ctl", "sample", "show", "diff", "verify",
                "export", "convert", "merge", "resize", "extract", "reproduce", "bench", "doctor", "config",
                "dashboard", "report", "compare",
            )
        },
        "import": "weft.cli.importing:run",  # a word that no module can have for a name
    },
}  # fmt: skip


@cache
def table(slot: str) -> dict[str, str]:
    """Name -> "module:attribute" for one slot: the built-in names, then those of installed packages."""
    names = dict(BUILT_IN[slot])
    for point in entry_points(group=f"weft.{slot}"):
        if point.name in names:
            raise ConfigError(f"the package behind '{point.value}' may not replace Weft's own {slot} '{point.name}'.")
        names[point.name] = point.value
    return names


def find(slot: str, name: str) -> Any:
    """Import what a name stands for. Raises ConfigError with the nearest name."""
    names = table(slot)
    if name not in names:
        raise ConfigError(f"no {slot} is called '{name}'. {did_you_mean(name, sorted(names))}")
    module, _, attribute = names[name].partition(":")
    return getattr(import_module(module), attribute)


@cache
def section_types(slot: str) -> dict[str, type]:
    """Every section class of a slot by its kind. Costs their imports, which hold no torch."""
    return {name: find(slot, name) for name in table(slot)}


def union(slot: str) -> Any:
    """The type of a config field that is chosen by `kind` among a slot's sections."""
    from pydantic import Field

    types = tuple(section_types(slot).values())
    if len(types) == 1:
        return types[0]
    return Annotated[Union[types], Field(discriminator="kind")]  # noqa: UP007
