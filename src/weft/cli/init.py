"""weft init: commented configs for a model and its data (clips, captions, conversations or dated documents)."""

import argparse
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from weft.cli.init_distill import adapter_lines, captions_in, learning_lines, prompt_lines, watching_lines
from weft.cli.init_documents import ANY, ENCODERS, wants_documents, write_configs
from weft.cli.init_text import LANGUAGE_MODELS, Lines, context_of, look_at, text_lines
from weft.cli.models import MODELS, WAN_I2V, KnownModel, recognised
from weft.config.show import inline
from weft.data.manifest import IMAGE_ENDINGS, MANIFEST_ENDINGS, VIDEO_ENDINGS
from weft.data.musubi import data_section
from weft.errors import ConfigError, DataError, did_you_mean
from weft.families.causal_lm import is_language_model

COMMENT_COLUMN = 52
COLUMNS = ("text", "label", "year", "date", "group")
# -> repository on the Hugging Face hub; None for what ships with Weft.
NAMES: Mapping[str, str | None] = {**{name: known.repository for name, known in MODELS.items()}, **LANGUAGE_MODELS}


@dataclass(frozen=True)
class Base:
    """The model that was asked for. source: as the config writes it. known: None for a language model. fetch: the
    command that brings it, if any. context: tokens of the longest row of a language model that is there."""

    name: str
    source: str
    known: KnownModel | None
    fetch: str | None = None
    context: int | None = None


def run(argv: Sequence[str]) -> int:
    """Write the config and say what comes next."""
    parser = argparse.ArgumentParser(prog="weft init", description="Write a commented run.yaml.")
    names = ", ".join((*NAMES, *ENCODERS, ANY))
    parser.add_argument("model", help=f"a model's folder or file, or one of: {names}")
    what = (
        "clips: a folder with captions, a manifest, or musubi's dataset TOML; conversations, or dated documents with "
        "labels: a file or folder of them"
    )
    parser.add_argument("--data", required=True, type=Path, help=what)
    parser.add_argument(
        "--distill", action="store_true", help="for a student that needs four steps; --data may be a file of captions"
    )
    parser.add_argument(
        "--out", type=Path, help="default: run.yaml; of documents a folder of configs, default: configs"
    )
    documents = parser.add_argument_group("columns of documents, where they are not found by their usual names")
    for key in COLUMNS:
        documents.add_argument(f"--{key}", metavar="COLUMN")
    arguments = parser.parse_args(argv)
    named = {key: name for key in COLUMNS if (name := getattr(arguments, key)) is not None}
    if wants_documents(arguments.model):
        if arguments.distill:
            raise ConfigError(
                f"--distill: '{arguments.model}' is an encoder, and only video models are asked in steps."
            )
        return write_configs(arguments.model, arguments.data, arguments.out, named)
    if named:
        raise ConfigError(
            f"--{next(iter(named))} is of documents, and '{arguments.model}' is no encoder. Leave it out."
        )
    out: Path = arguments.out or Path("run.yaml")
    if out.exists():
        raise ConfigError(f"{out} is already there. Choose another with --out, or delete it.")
    base = find_base(arguments.model)
    lines, count = (distilled if arguments.distill else described)(base, arguments.data)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(written(base, lines), encoding="utf-8")
    file = shlex.quote(str(out))
    print(f"wrote {out}: {base.name} on {arguments.data}{f' ({count})' if count else ''}. Next:")
    fetch = (base.fetch,) if base.fetch else ()
    for command in (*fetch, f"weft plan {file}", f"weft train {file}"):
        print(f"  {command}")
    return 0


def find_base(model: str) -> Base:
    """A known name, a repository of one, or a folder. Raises ConfigError with the nearest name, ModelError."""
    by_repository = {repository.lower(): name for name, repository in NAMES.items() if repository}
    name = by_repository.get(model.lower(), model.lower())
    folder = Path(model).expanduser()
    if is_language_model(folder):
        return Base(folder.resolve().name, folder.as_posix(), None, context=context_of(folder))
    if folder.exists():
        return Base(folder.resolve().stem, folder.as_posix(), known_at(folder.as_posix()))
    if name not in NAMES:
        what = "no such folder and no known model" if "/" in model else "no known model and no folder here"
        known_names = (*NAMES, *ENCODERS, ANY)
        raise ConfigError(f"'{model}': {what}. {did_you_mean(name.rpartition('/')[2], known_names)}")
    known, repository = MODELS.get(name), NAMES[name]
    if repository is None:
        return Base(name, name, known)
    local = Path("models") / repository.rpartition("/")[2]
    fetch = None if local.is_dir() else f"hf download {repository} --local-dir {local.as_posix()}"
    context = context_of(local) if known is None and local.is_dir() else None
    return Base(name, local.as_posix(), known, fetch, context)


def described(base: Base, data: Path) -> tuple[Lines, str]:
    """The lines of the config, and how many items the data has, in words. Raises DataError."""
    if base.known is None:
        chats = look_at(data)
        lines = text_lines(named(base, data), base.source, data, chats, base.context)
        return lines, f"{chats.rows:,} rows of {chats.form}"
    clips = count_clips(data)
    told = _translated(data) if data.suffix == ".toml" else _data(base.known, data, clips)
    model = [*_model(base, base.known, named(base, data)), *_adapter(base.known)]
    return [*model, *_learning(base.known), *told, *_watching(base.known)], f"{clips} clips" if clips else ""


def distilled(base: Base, data: Path) -> tuple[Lines, str]:
    """As `described`, of a config that makes the model need a few steps. Raises ConfigError, DataError."""
    if base.known is None:
        raise ConfigError(f"--distill: '{base.name}' is a language model, and only video models are asked in steps.")
    captions = captions_in(base.known, data)
    if captions:
        told, count = prompt_lines(base.known, data), f"{len(captions):,} caption{'s' if len(captions) > 1 else ''}"
    else:
        clips = count_clips(data)
        told = _translated(data) if data.suffix == ".toml" else _data(base.known, data, clips, most=0)
        count = f"{clips} clips" if clips else ""
    model = [*_model(base, base.known, named(base, data, "-few-steps")), *adapter_lines()]
    return [*model, *learning_lines(base.known), *told, *watching_lines(base.known, captions)], count


def named(base: Base, data: Path, ending: str = "") -> str:
    """The run's name."""
    return re.sub(r"[^\w.-]+", "-", f"{base.name}-{data.stem}{ending}").strip("-.") or "run"


def known_at(source: str) -> KnownModel:
    """What a folder or a file of weights holds, by its names and headers. Raises ModelError."""
    from weft.families.checkpoint import open_checkpoint

    kind = open_checkpoint(source, None, "wan").kind_of_network
    checkpoint = open_checkpoint(source, None, kind)
    config, facts = checkpoint.config(checkpoint.first_network), checkpoint.facts
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return MODELS[recognised(facts.model, kind, facts.task, facts.experts, width)]


def count_clips(data: Path) -> int:
    """Videos and images in a folder; 0 for a manifest. Raises DataError when there is nothing to train on."""
    if data.is_file() and data.suffix.lower() in (*MANIFEST_ENDINGS, ".toml"):
        return 0
    if not data.exists():
        siblings = [path.name for path in data.parent.iterdir()] if data.parent.is_dir() else []
        near = f" {did_you_mean(data.name, siblings)}" if siblings else ""
        raise DataError(f"--data: there is no '{data}' (in {Path.cwd()}).{near}")
    if data.is_file():
        raise DataError(f"--data: '{data}' is no manifest ({', '.join(MANIFEST_ENDINGS)}) and no folder of clips.")
    clips = sum(1 for path in data.rglob("*") if path.suffix.lower() in (*VIDEO_ENDINGS, *IMAGE_ENDINGS))
    if not clips:
        endings = ", ".join((*VIDEO_ENDINGS, *IMAGE_ENDINGS))
        raise DataError(f"--data: '{data}' holds no clip ({endings}). Put clips and their captions there first.")
    return clips


# ---- The text -----------------------------------------------------------------------------------------------------


def written(base: Base, lines: Lines) -> str:
    """The config's text: one key a line, with its reason or unit behind it."""
    schema = Path(str(files("weft"))) / "weft.schema.json"
    head = [
        f"# yaml-language-server: $schema={schema.as_uri()}",
        f"# A LoRA on {base.name}. Every key and its meaning: weft config explain",
    ]
    return "\n".join([*head, *(_line(text, comment) for text, comment in lines)]) + "\n"


def _line(text: str, comment: str) -> str:
    # The space is YAML's: without it, a text as long as the column would swallow the comment.
    return f"{text:<{COMMENT_COLUMN - 1}} # {comment}" if comment else text


def _model(base: Base, known: KnownModel, name: str) -> Lines:
    experts = [("  expert: both", "high, low, or both: an adapter for each of the two networks")]
    return [
        (f"name: {inline(name)}", "the run's folder is runs/NAME"),
        ("seed: 0", "decides adapter weights, data order and noise"),
        ("", ""),
        ("family:", ""),
        (f"  kind: {known.kind}", known.does),
        (f"  source: {inline(base.source)}", "folder of the model" if known.repository else "ships with Weft"),
        *(experts if known.experts else []),
        ("", ""),
    ]


def _adapter(known: KnownModel) -> Lines:
    return [
        ("adapter:", ""),
        ("  kind: lora", ""),
        (f"  rank: {known.rank}", "more holds more detail, and learns the clips by heart sooner"),
        (f"  alpha: {known.rank}", "strength is alpha / rank: 1"),
        (f"  targets: {known.targets}", "layers that are adapted; weft plan lists them"),
        ("", ""),
    ]


def _learning(known: KnownModel) -> Lines:
    turns = [("  turn: 50", "steps of one network before the other's turn; half of steps: one after the other")]
    return [
        ("objective:", ""),
        ("  kind: flow-matching", ""),
        (
            f"  timesteps: {{kind: shift, shift: {known.shift}}}",
            "more noise for larger frames, as the model was trained",
        ),
        *(turns if known.experts else []),
        ("", ""),
        ("optimizer:", ""),
        ("  kind: adamw", "adamw8bit needs less memory and bitsandbytes"),
        (f"  lr: {inline(known.lr)}", "halve it when the loss jumps or samples break"),
        ("", ""),
        ("schedule:", ""),
        (f"  steps: {known.steps}", "optimizer steps; weft plan says how many epochs that is"),
        (f"  accumulate: {known.accumulate}", "micro-batches per step: batch_size x this clips are learned at once"),
        ("  curve: cosine", "learning rate falls to floor x lr"),
        (f"  warmup: {known.warmup}", "steps in which the learning rate rises"),
        ("  floor: 0.1", "share of lr that is left at the end"),
        ("", ""),
        ("engine:", ""),
        ("  precision: auto", "bf16 where the device has it"),
        (f"  recompute: {inline(known.recompute)}", "true: less memory, about a third slower"),
        ("", ""),
    ]


def _data(known: KnownModel, data: Path, clips: int, most: int = 8) -> Lines:
    """most: clips that may be held out."""
    held_out = min(most, clips // 10)
    reason = "clips kept out of training, to measure on" if held_out else "0: too few clips to spare; give it 1 or more"
    held = [(f"  validation_items: {held_out}", reason)] if most else []
    fps = [(f"  fps: {inline(known.fps)}", known.reason_fps)] if known.fps else []
    return [
        ("data:", ""),
        ("  kind: video", ""),
        ("  sources:", ""),
        (f"    - path: {inline(data.as_posix())}", "clips with a .txt caption beside each, or a manifest"),
        *held,
        *fps,
        ("  buckets:", ""),
        (f"    sides: [{known.side}]", "pixels: area is side x side, aspect ratio the clip's own"),
        (f"    frames: {inline(list(known.frames))}", "a clip takes the longest that it fills"),
        ('  caption_prefix: ""', "a trigger word before every caption, if you want one"),
        (f"  batch_size: {known.batch}", "clips per micro-batch: the first to lower for memory"),
        ("  cache: disk", "encode each clip once; kept in weft-cache"),
        ("", ""),
    ]


def _translated(data: Path) -> Lines:
    """The data section that musubi's dataset file stands for; what it asks that is done otherwise, as comments."""
    import yaml

    section, notices = data_section(data)
    text = yaml.safe_dump({"data": section}, sort_keys=False, default_flow_style=None, allow_unicode=True)
    return [(f"# {data.name} as Weft's own keys:", ""), *((f"# {notice}", "") for notice in notices),
            *((line, "") for line in text.splitlines()), ("", "")]  # fmt: skip


def prompts_reason(known: KnownModel) -> str:
    if known.does == WAN_I2V:
        return "such as [{text: a red fox runs through snow, image: fox.png}]"
    return "captions as in training, such as [a red fox runs through snow]"


def _watching(known: KnownModel) -> Lines:
    width, height, frames = known.sample
    return [
        ("validation:", ""),
        (f"  every: {known.every}", "steps; always on the same noise, so that numbers compare"),
        ("", ""),
        ("samples:", ""),
        (f"  every: {known.every}", "steps between videos, once there are prompts"),
        ("  prompts: []", prompts_reason(known)),
        (f"  width: {width}", "pixels"),
        (f"  height: {height}", "pixels"),
        (f"  frames: {frames}", "of the form 4k+1"),
        (f"  guidance: {known.guidance}", known.reason_guidance),
        *([(f"  guidance_low: {known.guidance_low}", "of the low network")] if known.guidance_low else []),
        ("", ""),
        ("save:", ""),
        (f"  every: {known.every}", "steps between checkpoints"),
        ("  keep: 3", "newest checkpoints that stay on the disk"),
        ("  formats: [peft, diffusers]", "of the adapter"),
    ]
