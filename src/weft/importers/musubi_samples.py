"""musubi-tuner's files of sample prompts: .txt with flags behind each prompt, .toml, .json."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.errors import ConfigError
from weft.importers.draft import Draft
from weft.importers.reading import read

# Flag -> musubi's name of the setting, source: musubi_tuner/training/sampling_prompts.py.
FLAGS: Mapping[str, str] = {
    "w": "width", "h": "height", "f": "frame_count", "d": "seed", "s": "sample_steps", "g": "guidance_scale",
    "fs": "discrete_flow_shift", "l": "cfg_scale", "n": "negative_prompt", "i": "image_path", "ei": "end_image_path",
    "cn": "control_video_path", "ci": "control_image_path", "of": "one_frame",
}  # fmt: skip
OURS: Mapping[str, str] = {
    "width": "samples.width", "height": "samples.height", "frame_count": "samples.frames", "seed": "samples.seed",
    "sample_steps": "samples.steps", "negative_prompt": "samples.negative",
}  # fmt: skip
NUMBERS = (
    "width",
    "height",
    "frame_count",
    "seed",
    "sample_steps",
    "guidance_scale",
    "cfg_scale",
    "discrete_flow_shift",
)
UNUSED: Mapping[str, str] = {
    "discrete_flow_shift": "Samples take the model's own shift, or family.shift.",
    "end_image_path": "Weft samples from a first image alone.",
    "control_video_path": "Weft trains without control signals.",
    "control_image_path": "Weft trains without control signals.",
    "one_frame": "Weft has no one-frame mode.",
}
# What musubi samples with where a prompt does not say it.
DEFAULTS: Mapping[str, Any] = {"width": 256, "height": 256, "frame_count": 1, "sample_steps": 20}


@dataclass(frozen=True)
class SamplePrompt:
    """One prompt with what it says of its video, by musubi's names."""

    text: str
    settings: Mapping[str, Any]


def put_prompts(path: Path, draft: Draft, guided: str, from_image: bool) -> None:
    """The section `samples`, from a file that is there. guided: musubi's name of what guides the model."""
    prompts = prompts_of(path)
    if not prompts:
        draft.drop("sample_prompts", str(path), "No prompt stands in it.")
        return
    items = [_item(prompt, from_image) for prompt in prompts]
    draft.set("samples.prompts", items, "sample_prompts", theirs=str(path))
    for name, key in {**OURS, guided: "samples.guidance"}.items():
        _put_shared(draft, name, key, [prompt.settings.get(name, DEFAULTS.get(name)) for prompt in prompts])
    seen = {name: value for prompt in prompts for name, value in prompt.settings.items()}
    other = "guidance_scale" if guided == "cfg_scale" else "cfg_scale"
    for name, value in seen.items():
        if name == "image_path" and not from_image:
            draft.drop("sample_prompts image_path", value, "The model goes on from no image.")
        elif name in UNUSED:
            draft.drop(f"sample_prompts {name}", value, UNUSED[name])
        elif name == other:
            draft.drop(f"sample_prompts {name}", value, f"What guides this model is {guided}.")
        elif name not in (*OURS, guided, "image_path"):
            draft.drop(f"sample_prompts {name}", value, "musubi has no such setting of a prompt.")


def _item(prompt: SamplePrompt, from_image: bool) -> Any:
    image = prompt.settings.get("image_path")
    return {"text": prompt.text, "image": image} if image and from_image else prompt.text


def _put_shared(draft: Draft, name: str, key: str, values: Sequence[Any]) -> None:
    """All our samples have one size, so the commonest value counts."""
    given = [value for value in values if value is not None]
    if not given:
        return
    value = Counter(given).most_common(1)[0][0]
    note = "" if len(set(given)) == 1 else "the commonest: all samples have one"
    ours = _fitting(key, value)
    draft.set(key, ours, f"sample_prompts {name}", note, value)
    if note:
        draft.warn(f"sample_prompts: {name} differs between prompts; {key} is {value} for all.")


def _fitting(key: str, value: Any) -> Any:
    if key in ("samples.width", "samples.height"):
        return max(16, value // 16 * 16)
    return (value - 1) // 4 * 4 + 1 if key == "samples.frames" else value


def prompts_of(path: Path) -> list[SamplePrompt]:
    """All prompts of a file. Raises ConfigError with `file:line`."""
    if path.suffix.lower() == ".txt":
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        return [_of_line(line.strip()) for line in lines if line.strip() and not line.startswith("#")]
    file = read(path)
    content = file.content
    if file.kind == "toml":
        table = content.get("prompt")
        if not isinstance(table, dict) or not isinstance(table.get("subset"), list):
            raise ConfigError(f"{path}: expected were [prompt] and one [[prompt.subset]] for each prompt.")
        shared = {key: value for key, value in table.items() if key != "subset"}
        content = [{**shared, **subset} for subset in table["subset"]]
    if not isinstance(content, list):
        raise ConfigError(f"{path}: expected was a list of prompts.")
    return [_of_line(item) if isinstance(item, str) else _of_table(item, path) for item in content]


def _of_table(item: Any, path: Path) -> SamplePrompt:
    if not isinstance(item, dict) or not isinstance(item.get("prompt"), str):
        raise ConfigError(f"{path}: a prompt has no 'prompt' that is text: {item!r}.")
    return SamplePrompt(item["prompt"], {key: value for key, value in item.items() if key not in ("prompt", "enum")})


def _of_line(line: str) -> SamplePrompt:
    text, *flags = re.split(r"\s--(?=[A-Za-z]+\s)", line)
    settings: dict[str, Any] = {}
    for flag in flags:
        short, _, value = flag.partition(" ")
        name = FLAGS.get(short.lower(), short)
        if name in NUMBERS:
            number = float(value) if re.fullmatch(r"[\d.]+", value.strip()) else None
            if number is None:
                raise ConfigError(f"sample_prompts: '--{flag}' in '{line[:60]}' is no number.")
            settings[name] = int(number) if number == int(number) and "scale" not in name else number
        else:
            settings[name] = value.strip()
    return SamplePrompt(text.strip(), settings)
