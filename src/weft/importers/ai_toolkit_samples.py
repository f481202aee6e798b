"""ai-toolkit's sample section as ours."""

import re
from collections.abc import Mapping
from typing import Any

from weft.importers.ai_toolkit_keys import Arch
from weft.importers.draft import Draft
from weft.importers.nested import listed, settle, whole_frames
from weft.importers.values import Same, Theirs, carry

# SampleConfig's own values, where nothing is said.
DEFAULTS: Mapping[str, tuple[str, Any]] = {
    "sample.sample_every": ("samples.every", 100),
    "sample.width": ("samples.width", 512),
    "sample.height": ("samples.height", 512),
    "sample.sample_steps": ("samples.steps", 20),
    "sample.guidance_scale": ("samples.guidance", 7),
    "sample.seed": ("samples.seed", 0),
}


def put_samples(theirs: Theirs, draft: Draft, arch: Arch, trigger: str | None) -> None:
    """`samples`, unless they are switched off."""
    items = _items(theirs)
    off = theirs.flag("train.disable_sampling")
    first = theirs.flag("train.skip_first_sample")
    if off:
        draft.drop("train.disable_sampling", True, "No prompts were brought along, so nothing is sampled.")
    if off or not items:
        for key in [key for key in theirs.given if key.startswith("sample.")]:
            theirs.take(key)
        return
    prompts = [_prompt(item, draft, number, trigger) for number, item in enumerate(items)]
    of = "sample.samples" if "sample.samples" in theirs else "sample.prompts"
    draft.set("samples.prompts", prompts, of, theirs=f"{len(prompts)} in all")
    if arch.image and any(isinstance(prompt, str) for prompt in prompts):
        draft.warn(f"{of}: this model goes on from an image, and a prompt has none. Write {{text: ..., image: FILE}}.")
    for key, (ours, default) in DEFAULTS.items():
        settle(theirs, draft, key, ours, theirs.number(key, default))
    frames = theirs.whole("sample.num_frames", 1) or 1
    note = "" if whole_frames(frames) == frames else "Of the form 4k+1."
    settle(theirs, draft, "sample.num_frames", "samples.frames", whole_frames(frames), note=note, shown=frames)
    negative = theirs.take("sample.neg")
    if isinstance(negative, str) and negative:
        draft.set("samples.negative", negative, "sample.neg")
    if first:
        draft.set("samples.baseline", False, "train.skip_first_sample", theirs=True)
    carry(theirs, draft, [Same("sample.guidance_scale_low", "samples.guidance_low", "number")])


def _items(theirs: Theirs) -> list[Mapping[str, Any]]:
    samples, prompts = listed(theirs, "sample.samples"), listed(theirs, "sample.prompts")
    if samples:
        return [item if isinstance(item, dict) else {"prompt": str(item)} for item in samples]
    return [{"prompt": str(prompt)} for prompt in prompts]


def _prompt(item: Mapping[str, Any], draft: Draft, number: int, trigger: str | None) -> Any:
    """One prompt: a text, with flags of its own behind it, and perhaps a first frame."""
    text, *flags = re.split(r"\s--(?=[a-z])", str(item.get("prompt") or ""))
    image = item.get("ctrl_img") or item.get("ctrl_img_1")
    for flag in flags:
        name, _, value = flag.partition(" ")
        if name in ("ctrl_img", "ctrl_img_1"):
            image = value.strip()
        else:
            draft.drop(
                f"sample.prompts.{number} --{name}", value, "Sizes, seeds and steps are the same for all prompts."
            )
    for key, value in item.items():
        if key not in ("prompt", "ctrl_img", "ctrl_img_1") and value not in (None, ""):
            draft.drop(f"sample.samples.{number}.{key}", value, "Sizes, seeds and steps are the same for all prompts.")
    text = text.replace("[trigger]", trigger or "").strip()
    return {"text": text, "image": str(image)} if image else text
