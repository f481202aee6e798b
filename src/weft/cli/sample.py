"""weft sample: videos or replies from an adapter, beside the base's when asked."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import ConfigError

if TYPE_CHECKING:
    from weft.run.apply import Applied, Chosen
    from weft.run.config import Prompt
    from weft.run.shots import Shot
    from weft.run.writing import Chat, Manner

DEFAULTS = {"frames": 81, "width": 832, "height": 480, "steps": 30, "guidance": 5.0, "guidance_low": None,
            "negative": "", "seed": 0}  # fmt: skip
OF_VIDEO = ("image", "fps", "frames", "width", "height", "steps", "guidance", "guidance_low", "negative")
OF_TEXT = ("tokens", "temperature", "top_p", "system", "template")
OPTIONS = {
    "steps": "default: as the training run's samples; of a few-step adapter as many as it was distilled for",
    "guidance": "default: as the training run's samples; of a few-step adapter 1",
    "guidance_low": "of the low expert",
}
TOKENS = 128  # of the longest reply
FILES = (".txt", ".jsonl")  # an --out of replies that is one file


def arguments_of(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="weft sample", description="Generate with an adapter: videos, or the replies of a language model."
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="ADAPTER [PROMPT ...]",
        help="adapter folder or file, or the folder of a finished run; several for one network add up. What is no path "
        "after it is a prompt",
    )
    parser.add_argument("--prompt", action="append", default=[], help="what to generate; may be given several times")
    parser.add_argument("--out", type=Path, help="folder for the results (videos: default samples; replies: none, they "
                        "are printed), or for replies a .txt or .jsonl file")  # fmt: skip
    parser.add_argument("--base", help="base model folder, when it is not where it was in training")
    parser.add_argument("--compare", action="store_true", help="also without the adapter, on the same noise or seed")
    parser.add_argument("--strength", default="1", help="of the adapters, one number, or one for each such as 1,0.8; "
                        "1 is as trained")  # fmt: skip
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--seed", type=int, help="of the first prompt; it counts up (default: as in the training run)")
    video, text = parser.add_argument_group("videos"), parser.add_argument_group("replies")
    video.add_argument("--image", type=Path, action="append", help="first frame, one for each prompt or one for all")
    video.add_argument("--fps", type=float, help="frames per second of the files (default: as in training)")
    for name, kind in (("frames", int), ("width", int), ("height", int), ("steps", int), ("guidance", float),
                       ("guidance_low", float), ("negative", str)):  # fmt: skip
        help = OPTIONS.get(name, "default: as the training run's samples")
        video.add_argument(f"--{name.replace('_', '-')}", type=kind, help=help)
    text.add_argument("--tokens", type=int, help="of the longest reply (default: as the training run's samples)")
    text.add_argument("--temperature", type=float, help="of chance; default 0: the likeliest token each time")
    text.add_argument("--top-p", type=float, help="choose among the likeliest tokens with this chance together")
    text.add_argument("--system", help="system prompt (default: data.system of the training run)")
    text.add_argument("--template", type=Path, help="jinja file of a chat template (default: as in training)")
    return parser.parse_intermixed_args(argv)


def run(argv: Sequence[str]) -> int:
    arguments = arguments_of(argv)

    from weft.cli.train import quiet_libraries

    quiet_libraries()

    from weft.run.apply import apply_chosen, choose

    adapters, prompts = sorted_words(arguments.words)
    arguments.prompt = [*prompts, *arguments.prompt]
    chosen = choose(adapters, arguments.base, strengths(arguments.strength, len(adapters)))
    refuse_foreign(arguments, chosen.family.medium)
    asked = questions(chosen, arguments) if chosen.family.medium == "text" else shots_of(chosen, arguments)
    applied = apply_chosen(chosen, arguments.device, arguments.precision)
    if not applied.trained_here:
        note("the adapter was trained on other base weights than these.")
    if isinstance(asked, tuple):
        tell_replies(applied, asked, arguments)
        return 0
    for path in make_samples(applied, asked, arguments):
        print(path)
    return 0


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def strengths(text: str, adapters: int) -> list[float]:
    """One for each adapter. Raises ConfigError."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if len(found) not in (1, adapters):
        each = f", or {adapters} between commas, one for each adapter" if adapters > 1 else ""
        raise ConfigError(f"--strength: expected one number{each}, got '{text}'.")
    return found * adapters if len(found) == 1 else found


def sorted_words(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Adapters and prompts. The first word is an adapter; of the others what is a path, or looks like one."""
    first, *others = words
    paths = [word for word in others if is_path(word)]
    return [Path(word) for word in (first, *paths)], [word for word in others if word not in paths]


def is_path(word: str) -> bool:
    # A mistyped folder shall not become a prompt.
    return not any(map(str.isspace, word)) and ("/" in word or word.endswith(".safetensors") or Path(word).exists())


def refuse_foreign(arguments: argparse.Namespace, medium: str) -> None:
    """Raises ConfigError for options that this kind of model has no use for, and for a model that makes nothing."""
    if medium == "documents":
        raise ConfigError(
            "the adapter is of an encoder, which sorts documents and makes no samples. What a run answered is in its "
            "predictions/, and in words: weft report RUN."
        )
    foreign, what = (OF_VIDEO, "a language model") if medium == "text" else (OF_TEXT, "a video model")
    given = [f"--{name.replace('_', '-')}" for name in foreign if getattr(arguments, name) is not None]
    if given:
        raise ConfigError(f"{', '.join(given)}: the adapter is of {what}, which has no such option. Leave it out.")


# ---- Replies ------------------------------------------------------------------------------------------------------


def questions(chosen: "Chosen", arguments: argparse.Namespace) -> "tuple[Chat, list[Prompt], Manner]":
    """What is asked, and how. Raises ConfigError."""
    from weft.run.writing import chat_of, check_prompts

    data = chosen.config.get("data", {})
    trained = data.get("template")
    place = "data.template of the training run" if arguments.template is None else "--template"
    template = arguments.template or (Path(trained) if trained else None)
    system = data.get("system", "") if arguments.system is None else arguments.system
    chat = chat_of(chosen.family, template, system, place)
    if arguments.system and not chat.templated:
        raise ConfigError("--system: this tokenizer has no chat template to put it in. Add --template FILE.")
    manner, prompts = manner_of(arguments, chosen.config), prompts_of(arguments, chosen.config)
    check_prompts(chosen.family, chat, prompts, manner.tokens, "--")
    return chat, prompts, manner


def manner_of(arguments: argparse.Namespace, trained: Mapping[str, Any]) -> "Manner":
    """Raises ConfigError for numbers that are none of their kind, and for those that would change nothing."""
    from weft.run.writing import Manner

    samples = trained.get("samples", {})
    tokens = samples.get("tokens", TOKENS) if arguments.tokens is None else arguments.tokens
    temperature = arguments.temperature or 0.0
    top_p = 1.0 if arguments.top_p is None else arguments.top_p
    problems = []
    if tokens < 1:
        problems.append(f"--tokens: expected a whole number of at least 1, got {tokens}.")
    if not 0 <= temperature < float("inf"):
        problems.append(f"--temperature: expected a number of at least 0, got {temperature:g}.")
    if not 0 < top_p <= 1:
        problems.append(f"--top-p: expected a number above 0 and up to 1, got {top_p:g}.")
    idle = [name for name, value in (("--top-p", arguments.top_p), ("--seed", arguments.seed)) if value is not None]
    if not temperature and idle:
        problems.append(
            f"{', '.join(idle)}: the likeliest token each time leaves nothing to chance. Add --temperature, such as 1."
        )
    if problems:
        raise ConfigError(*problems)
    seed = samples.get("seed", 0) if arguments.seed is None else arguments.seed
    return Manner(tokens=tokens, temperature=temperature, top_p=top_p, seed=seed)


def tell_replies(applied: "Applied", asked: "tuple[Chat, list[Prompt], Manner]", arguments: argparse.Namespace) -> None:
    """Print the replies, and write them where --out says."""
    from weft.run.writing import replies

    chat, prompts, manner = asked
    texts = [prompt.text for prompt in prompts]
    made: dict[bool, list[str]] = {}
    for adapter in (True, False) if arguments.compare else (True,):
        with applied.use(adapter), applied.engine.computing():
            made[adapter] = replies(applied.model, chat, texts, manner, applied.engine.device)
    told = [(i, text, adapter, made[adapter][i]) for i, text in enumerate(texts) for adapter in made]
    for _, text, adapter, said in told:
        print(said if len(told) == 1 else f"{heading(text, adapter)}\n{said}\n")
    for file in written(told, arguments.out):
        print(file, file=sys.stderr)


def heading(prompt: str, adapter: bool) -> str:
    return f"=== {prompt}" if adapter else f"=== {prompt} (the base alone)"


def written(told: "Sequence[tuple[int, str, bool, str]]", out: Path | None) -> list[Path]:
    """Files of replies, each its prompt's number, its prompt, whether the adapter made it, and what it says."""
    from weft.durable import write_whole
    from weft.run.writing import page

    if out is None:
        return []
    if out.suffix in FILES and not out.is_dir():
        out.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"prompt": p, "adapter": a, "reply": said}, ensure_ascii=False) for _, p, a, said in told]
        pages = [page(p if a else f"{p} (the base alone)", said) for _, p, a, said in told]
        write_whole(out, "\n".join(pages) if out.suffix == ".txt" else "\n".join([*lines, ""]))
        return [out]
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for i, prompt, adapter, said in told:
        files.append(out / f"{i:02d}{'' if adapter else '_base'}.txt")
        write_whole(files[-1], page(prompt, said))
    return files


# ---- Prompts ------------------------------------------------------------------------------------------------------


def prompts_of(arguments: argparse.Namespace, trained: Mapping[str, Any]) -> "list[Prompt]":
    """The prompts with their images: from the command line, else from the training run. Raises ConfigError."""
    from weft.run.config import Prompt

    images = arguments.image or [None]
    if not arguments.prompt:
        prompts = [Prompt.model_validate(prompt) for prompt in trained.get("samples", {}).get("prompts", ())]
        if not prompts:
            raise ConfigError("nothing to generate: the training run had no prompts either. Add --prompt 'TEXT'.")
        if not arguments.image:
            return prompts
        texts = [prompt.text for prompt in prompts]
    else:
        texts = arguments.prompt
    if len(images) not in (1, len(texts)):
        raise ConfigError(f"--image: {len(images)} images for {len(texts)} prompts. Give one for each, or one for all.")
    images = images * len(texts) if len(images) == 1 else images
    return [Prompt(text=text, image=image) for text, image in zip(texts, images, strict=True)]


# ---- Videos -------------------------------------------------------------------------------------------------------


def settings(arguments: argparse.Namespace, trained: Mapping[str, Any], leaving: Sequence[str] = ()) -> dict[str, Any]:
    """Each setting from the command line, else from the training run, else the default. leaving: options of the command
    line that are not asked."""
    known = {**DEFAULTS, **trained.get("samples", {})}
    given = {name: getattr(arguments, name) for name in DEFAULTS if name not in leaving}
    return {name: known[name] if given.get(name) is None else given[name] for name in DEFAULTS}


def shots_of(chosen: "Chosen", arguments: argparse.Namespace) -> "dict[bool, list[Shot]]":
    """What is generated with the adapters (True) and, to compare, by the base alone (False). A few-step student is
    asked at its own times, beside a base as the training run sampled it. Raises ConfigError."""
    from weft.contracts import as_video
    from weft.run.shots import Shot, check_shots

    def shots(facts: dict[str, Any]) -> list[Shot]:
        seed = facts.pop("seed")
        return [Shot(prompt=p.text, image=p.image, seed=seed + i, **facts) for i, p in enumerate(prompts)]

    if arguments.steps is not None and arguments.steps < 1:
        raise ConfigError(f"--steps: expected a whole number of at least 1, got {arguments.steps}.")
    prompts = prompts_of(arguments, chosen.config)
    asked = {True: shots(settings(arguments, chosen.config))}
    check_shots(as_video(chosen.family), asked[True], "--")
    if chosen.step_list is not None:
        asked[True] = few_step_shots(chosen, arguments, asked[True])
    if arguments.compare and chosen.step_list is not None:
        asked[False] = shots(settings(arguments, chosen.config, leaving=("steps", "guidance", "guidance_low")))
        base = asked[False][0]
        note(f"the base is sampled in {base.steps} steps with guidance {base.guidance:g}, as in the training run.")
    elif arguments.compare:
        asked[False] = asked[True]
    return asked


def few_step_shots(chosen: "Chosen", arguments: argparse.Namespace, shots: "Sequence[Shot]") -> "list[Shot]":
    """The shots as a few-step student makes them, with a note of what departs from what it was distilled for."""
    from weft.contracts import as_video
    from weft.run.shots import in_few_steps

    own = chosen.step_list
    assert own is not None
    steps = own if arguments.steps is None else own.resized(arguments.steps)
    names = [expert.name for expert in as_video(chosen.family).all_experts]
    guidance: dict[str, float] = {}
    for name in names:
        wished = arguments.guidance_low if name == "low" and arguments.guidance_low is not None else arguments.guidance
        if name not in chosen.students:
            guidance[name] = shots[0].guidance_of(name)
            note(f"expert {name} has no few-step adapter: it takes its share of the {len(steps.times)} steps, few for "
                 f"it, with guidance {guidance[name]:g}.")  # fmt: skip
        elif wished is not None and wished != 1:
            guidance[name] = wished
            note(f"the adapter was distilled for guidance 1; guidance {wished:g} asks it twice a step.")
        else:
            guidance[name] = 1.0
    if steps != own:
        note(f"the adapter was distilled for {own}; it is asked in {steps}.")
    return [in_few_steps(shot, steps, guidance) for shot in shots]


def make_samples(
    applied: "Applied", asked: "Mapping[bool, Sequence[Shot]]", arguments: argparse.Namespace
) -> list[Path]:
    """The files: one video for each prompt (and one of the base), and a sheet of frames. Raises DataError."""
    from weft.contracts import as_video
    from weft.data.media import contact_sheet, write_video
    from weft.run.sampling import decoded, generate
    from weft.run.shots import encoded

    family, out = as_video(applied.model.family), arguments.out or Path("samples")
    fps = arguments.fps or applied.config.get("data", {}).get("fps") or family.geometry().fps
    told = encoded(asked[True], family, applied.encoders)
    out.mkdir(parents=True, exist_ok=True)
    rows, files = [], []
    for adapter, shots in asked.items():
        with applied.use(adapter):
            latents = generate(applied.model, applied.engine, shots, told)
        for i, (shot, latent) in enumerate(zip(shots, latents, strict=True)):
            frames = decoded(latent, applied.encoders)
            files.append(out / f"{i:02d}{'' if adapter else '_base'}.mp4")
            write_video(files[-1], frames, fps)
            rows.append((shot.prompt if adapter else f"base: {shot.prompt}", frames))
    contact_sheet(rows, out / "sheet.png")
    return [*files, out / "sheet.png"]
