"""VideoX-Fun's model and LoRA options: which Wan, which expert, which layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

from weft.errors import ConfigError
from weft.importers.draft import Draft
from weft.importers.musubi_model import WAN_LAYERS
from weft.importers.reading import read
from weft.importers.values import Theirs

USUAL_BOUNDARY = 0.9  # what their code takes where the config names none


@dataclass(frozen=True)
class ConfiguredWan:
    """What a config of theirs says of the model. boundary: of two experts; None where there is one network."""

    shift: float
    boundary: float | None = None
    side: int = 16  # pixels of a token's side
    clean_frame: bool = False  # TI2V-5B: the first frame may be given as it is


# Their config/wan2.1 and config/wan2.2, by file name.
CONFIGS: Mapping[str, ConfiguredWan] = {
    "wan_civitai": ConfiguredWan(5.0),
    "wan_civitai_t2v": ConfiguredWan(12.0, 0.875),
    "wan_civitai_i2v": ConfiguredWan(5.0, 0.9),
    "wan_civitai_5b": ConfiguredWan(5.0, None, 32, True),
}
NOT_HERE = {"wan_civitai_animate": "Wan 2.2 Animate", "wan_civitai_s2v": "Wan 2.2 S2V"}


def model_of(theirs: Theirs, draft: Draft, beside: Path) -> ConfiguredWan:
    """The model by their config file, or by its name, or by the model's folder. Raises ConfigError."""
    named = theirs.text("config_path")
    folder = theirs.text("pretrained_model_name_or_path") or ""
    stem = PureWindowsPath(named).stem if named else _by_folder(folder)
    if stem in NOT_HERE:
        key = "config_path" if named else "pretrained_model_name_or_path"
        raise ConfigError(
            f"{theirs.place(key)}: {named or folder} is {NOT_HERE[stem]}. Weft has Wan 2.1, and 2.2 of text and images."
        )
    known = CONFIGS.get(stem or "", ConfiguredWan(5.0))
    there = (
        next((path for path in (Path(named), beside.parent / Path(named).name) if path.is_file()), None)
        if named
        else None
    )
    if there is not None:
        known = _read_config(there, known)
    if named:
        draft.drop("config_path", named, "The model's own files say all of this.")
        if there is None and stem not in CONFIGS:
            draft.warn(
                f"config_path {named}: it is not here and not one of theirs, so shift {known.shift:g} is a guess."
            )
    return known


def _by_folder(folder: str) -> str | None:
    name = folder.rstrip("/\\").replace("\\", "/").rpartition("/")[2].lower()
    pieces = {
        "wan2.2-ti2v": "wan_civitai_5b",
        "wan2.2-t2v": "wan_civitai_t2v",
        "wan2.2-i2v": "wan_civitai_i2v",
        "wan2.2-s2v": "wan_civitai_s2v",
        "wan2.2-animate": "wan_civitai_animate",
        "wan2.1": "wan_civitai",
    }
    return next((config for piece, config in pieces.items() if piece in name), None)  # fmt: skip


def _read_config(path: Path, usual: ConfiguredWan) -> ConfiguredWan:
    content = read(path).content
    network: Mapping[str, Any] = content.get("transformer_additional_kwargs") or {}
    scheduler: Mapping[str, Any] = content.get("scheduler_kwargs") or {}
    vae: Mapping[str, Any] = content.get("vae_kwargs") or {}
    two = network.get("transformer_combination_type") == "moe"
    stride = vae.get("spatial_compression_ratio", 8)
    return replace(
        usual,
        shift=float(scheduler.get("shift", usual.shift)),
        boundary=float(network.get("boundary", USUAL_BOUNDARY)) if two else None,
        side=2 * int(stride),
        clean_frame=stride == 16,
    )


def put_model(theirs: Theirs, draft: Draft, model: ConfiguredWan) -> None:
    """The section `family`."""
    draft.assume("family.kind", "wan", "their scripts for Wan")
    source = theirs.text("pretrained_model_name_or_path")
    if draft.model:
        draft.assume("family.source", draft.model, "--model")
    elif source:
        draft.set("family.source", source, "pretrained_model_name_or_path", "the official folder is read as it is")
    else:
        draft.ask("family.source", "FILL-IN/Wan2.2", "the model's folder, official or of diffusers")
    network = _put_expert(theirs, draft, model)
    for of, part in (("transformer_path", network), ("vae_path", "vae")):
        if (path := theirs.text(of)) is not None:
            draft.set(f"family.files.{part}", path, of)


def _put_expert(theirs: Theirs, draft: Draft, model: ConfiguredWan) -> str:
    """Which of two networks; the name of its file among ours."""
    word = theirs.choice("boundary_type", ("low", "high", "full"), "low")
    said = "boundary_type" in theirs
    if model.boundary is None:
        if said:
            draft.drop("boundary_type", word, "The model has one network.")
        if word != "full" and model.clean_frame:
            draft.warn(
                f"boundary_type {'is' if said else 'is not given, so it is'} {word}, and their code then trains this "
                f"one network {'below' if word == 'low' else 'above'} 0.9 alone, which is a mistake of the script. "
                "This run trains all times."
            )
        return "transformer"
    if word == "full":
        draft.ask("family.expert", "low", "low, high or both: boundary_type full trains the low one on all times")
        draft.warn("boundary_type full: their low network learns all times there. Weft keeps each to its own.")
        return "low"
    if said:
        draft.set("family.expert", word, "boundary_type")
    else:
        draft.assume("family.expert", word, "their default boundary_type")
    return word


def put_adapter(theirs: Theirs, draft: Draft) -> None:
    """The section `adapter`."""
    draft.assume("adapter.kind", "lora", "their LoRA scripts")
    by_peft = theirs.flag("use_peft_lora")
    if by_peft:
        draft.set("adapter.backend", "peft", "use_peft_lora", theirs=True)
    else:
        draft.assume("adapter.backend", "native", "theirs without use_peft_lora; same parameters, same files")
    for of, key, usual in (("rank", "adapter.rank", 128), ("network_alpha", "adapter.alpha", 64)):
        value = theirs.whole(of)
        if value is None:
            draft.assume(key, usual, f"their default {of}")
        else:
            draft.set(key, value, of)
    if by_peft and draft.get("adapter.rank") != draft.get("adapter.alpha"):
        draft.warn(
            "use_peft_lora: their files lose the alpha, so that other programs apply the adapter at "
            f"{draft.get('adapter.rank') / draft.get('adapter.alpha'):g} times its strength. Weft's files carry it: "
            "expect another strength at weight 1 than theirs had."
        )
    _put_targets(theirs, draft, by_peft)


def _put_targets(theirs: Theirs, draft: Draft, by_peft: bool) -> None:
    named, skipped = theirs.text("target_name"), theirs.text("lora_skip_name")
    names = [name.strip() for name in (named or "").split(",") if name.strip()]
    skips = [name.strip() for name in (skipped or "").split(",") if name.strip()]
    if by_peft:
        if skips:
            draft.drop("lora_skip_name", skipped, "With use_peft_lora their code does not read it.")
        if not names:
            draft.assume("adapter.targets", "attention+ffn", "without target_name their PEFT path stops")
            return
        draft.set("adapter.targets", names, "target_name", "the ends of names, as in PEFT", named)
        return
    if names:
        _tell_pieces(draft, names)
    chosen = [end for end in WAN_LAYERS if _has(end, names, True) and not _has(end, skips, False)]
    if not chosen:
        at = theirs.place("target_name" if named else "lora_skip_name")
        raise ConfigError(f"{at}: target_name and lora_skip_name leave no layer of a block.")
    targets: Any = "attention+ffn" if len(chosen) == len(WAN_LAYERS) else chosen
    of = " and ".join(key for key in ("target_name", "lora_skip_name") if key in theirs)
    if of:
        note = "pieces of whole names, as their own network takes them"
        draft.set("adapter.targets", targets, of, note, " ".join(filter(None, (named, skipped))))
    else:
        draft.assume("adapter.targets", targets, "what their own network adapts")


def _has(end: str, pieces: Sequence[str], usual: bool) -> bool:
    """Their test: whether any piece is anywhere in the layer's whole name."""
    return any(piece in f"blocks.0.{end}" for piece in pieces) if pieces else usual


def _tell_pieces(draft: Draft, names: Sequence[str]) -> None:
    wide = [name for name in names if name in "blocks.0."]
    if wide:
        draft.warn(
            f"target_name: without use_peft_lora a name counts wherever it is a part of a path, and '{wide[0]}' is one "
            "of 'blocks', so every layer of every block was trained. So does this run; for the layers that were meant: "
            f"adapter.targets: [{', '.join(names)}]."
        )
