"""Settings that stand in sections, read by dotted names, and what the importers of such files share."""

import re
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from math import isfinite, nan
from pathlib import Path
from typing import Any

from weft.errors import ConfigError
from weft.importers.draft import Draft, ReadFile
from weft.importers.values import Given, Theirs, drop_left

OFF = (None, False, "", [], {})  # values of a switch that asks for nothing
HIDDEN = "(not shown)"
PRECISIONS: Mapping[str, str] = {
    "bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16", "half": "fp16", "fp32": "fp32",
    "float32": "fp32", "float": "fp32",
}  # fmt: skip
ALIKE = 0.75  # likeness from which on a name is what was meant
UPWARDS = 4  # folders around a config in which relative paths are looked up: examples/train_lora/x.yaml
OUTSIDE = re.compile(r"\$\{[^}]+\}")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def dotted(
    file: ReadFile,
    program: str,
    *table: str | int,
    sections: Collection[str] = (),
    whole: Collection[str] = (),
    named: str = "",
) -> Theirs:
    """All settings below a table, by their dotted names.

    sections: names that must be sections where they stand. whole: sections that are one value, such as keyword
    arguments. named: what every name begins with. Raises ConfigError with `file:line`.
    """
    content = file.content
    for step in table:
        content = content[step]
    for name in sections:
        if content.get(name) is not None and not isinstance(content[name], dict):
            raise ConfigError(
                f"{file.place(*table, name)}: '{name}' is {content[name]!r}. Expected was a section of {program}'s, "
                "that is, keys with values."
            )
    leaves = _leaves(content, (), whole)
    given = {named + ".".join(path): _given(value, file.place(*table, *path)) for path, value in leaves}
    return Theirs(given, program)


def _given(value: Any, place: str) -> Given:
    """A value; what stands in `${...}` comes from the environment or another key there, and is never looked up."""
    outside = OUTSIDE.search(value) if isinstance(value, str) else None
    return Given(value, place, outside[0] if outside else "")


def _leaves(value: Mapping[str, Any], at: tuple[str, ...], whole: Collection[str]) -> Iterator[tuple[Any, Any]]:
    for key, inner in value.items():
        path = (*at, str(key))
        if isinstance(inner, dict) and inner and ".".join(path) not in whole:
            yield from _leaves(inner, path, whole)
        elif inner != {} and (inner is not None or at):
            yield path, inner


def leave(
    theirs: Theirs, draft: Draft, reasons: Mapping[str, str], known: Collection[str], secrets: Collection[str] = ()
) -> None:
    """Report all that nobody asked for: what is off in one line, secrets without their values, the rest one by one."""
    known = {*known, *reasons, *theirs.asked}
    off = [key for key in theirs.left if key in known and _is_off(theirs.given[key].value)]
    for key in off:
        theirs.take(key)
    if off:
        draft.drop(", ".join(off), "off", "Off or empty there, so there is nothing to bring along.")
    for key in theirs.left:
        if key in secrets:
            theirs.take(key)
            draft.drop(key, HIDDEN, reasons.get(key, "Secrets do not belong into a config, and it was not copied."))
        elif key not in known:
            theirs.take(key)
            near = _nearest(key, known)
            said = f"'{key}' is no key of {theirs.program}, which may leave it out.{near}"
            draft.drop(key, theirs.given[key].value, f"{theirs.program} has no such key.{near}")
            draft.warn(f"{theirs.place(key)}: {said}")
    drop_left(theirs, draft, reasons, known)


def _nearest(key: str, known: Collection[str]) -> str:
    """The key that was meant, by its last word: in the same section if there is one like it, else in another."""
    section, _, word = key.rpartition(".")
    inside = [name for name in known if name.rpartition(".")[0] == section]
    for names in (inside, known):
        words = {name.rpartition(".")[2]: name for name in sorted(names, reverse=True)}
        found = get_close_matches(word, list(words), n=1, cutoff=ALIKE)
        if found:
            return f" Did you mean '{words[found[0]]}'?"
    return ""


def _is_off(value: Any) -> bool:
    return any(value is off or (value == off and type(value) is type(off)) for off in OFF)


def mapping(theirs: Theirs, key: str) -> dict[str, Any]:
    """A section that is one value, such as keyword arguments; empty when it is not there."""
    value: Any = theirs.take(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise theirs.refused(key, "a section of names with values")
    return dict(value)


def listed(theirs: Theirs, key: str) -> list[Any]:
    """A list; empty when it is not there."""
    value: Any = theirs.take(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise theirs.refused(key, "a list")
    return value


def popped(theirs: Theirs, key: str, options: dict[str, Any], name: str) -> float | None:
    """A number out of a section that is one value; None when it is not there."""
    value = options.pop(name, None)
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = nan
    if not isfinite(number) or isinstance(value, bool):
        raise theirs.refused(key, f"a number as its '{name}'")
    return number


def only_known(theirs: Theirs, draft: Draft, key: str, words: Mapping[str, str], default: str) -> str:
    """A word of theirs in ours; of one without an equivalent the default, which is reported."""
    word = theirs.text(key) or ""
    if word and word.lower() not in words:
        draft.drop(key, word, f"Weft knows no such thing. It takes: {default}.")
    return words.get(word.lower(), default)


def put_source(draft: Draft, model: str, of: str, note: str = "") -> str:
    """`family.source` from the model that theirs names, and what was put. A name on the hub becomes a local folder."""
    if draft.model:
        draft.set("family.source", draft.model, of, note="You named it with --model.", theirs=model)
        return draft.model
    if HUB_NAME.fullmatch(model) and not model.endswith((".safetensors", ".pt", ".pth")):
        folder = f"models/{model.rpartition('/')[2]}"
        fetch = f"A folder on this machine; if '{model}' is a name on the hub: hf download {model} --local-dir {folder}"
        draft.set("family.source", folder, of, note=" ".join(filter(None, (note, fetch))), theirs=model)
        return folder
    draft.set("family.source", model, of, note=note)
    return model


def settle(theirs: Theirs, draft: Draft, of: str, key: str, value: Any, note: str = "", shown: Any = None) -> None:
    """Ours from a key of theirs, or from the value that their program takes where the key does not stand."""
    if of in theirs:
        draft.set(key, value, of, note=note, theirs=shown)
    else:
        draft.assume(key, value, f"{theirs.program}'s own value of {of}, which does not stand there.")


def beside(config: Path, named: str) -> Path | None:
    """A file that a config names, from the working folder or from a folder around the config; None: it is not there."""
    around = [Path(), *list(config.resolve().parents)[:UPWARDS]]
    return next((folder / named for folder in around if (folder / named).is_file()), None)


def run_name(text: str) -> str:
    """A text as a name that a run's folder can have."""
    return re.sub(r"[^\w.-]+", "-", text.replace("\\", "/")).strip("-.") or "run"


def put_folder(draft: Draft, folder: str, of: str) -> None:
    """`output` and `name` from the one folder that other trainers write to."""
    parent, _, last = folder.replace("\\", "/").rstrip("/").rpartition("/")
    if not run_name(last).strip("-."):
        last = "run"
    draft.set("output", parent or ".", of, note="A run has a folder of its own in it: output/name.", theirs=folder)
    draft.set("name", run_name(last), of, theirs=folder)


def lora_in_place_of_full(draft: Draft, of: str, theirs: Any) -> None:
    """An adapter for a run that trained the whole network."""
    why = "There the whole network is trained, and Weft trains adapters on a base that stays. Choose the rank."
    draft.drop(of, theirs, why)
    draft.warn(f"{of}: {why}")
    draft.assume("adapter.kind", "lora", "In place of the whole network.")
    draft.assume("adapter.rank", 64, "A wide one, for it stands in for the whole network.")


def whole_frames(count: int) -> int:
    """The longest clip of the form 4k+1 within so many frames."""
    return max(1, (count - 1) // 4 * 4 + 1)


def put_frames(draft: Draft, key: str, counts: Collection[int], of: str) -> list[int]:
    """Frame counts, each rounded down to whole latent frames, longest first."""
    frames = sorted({whole_frames(count) for count in counts}, reverse=True)
    odd = sorted(count for count in counts if whole_frames(count) != count)
    note = f"Counts have the form 4k+1, so {', '.join(map(str, odd))} became less." if odd else ""
    draft.set(key, frames, of, note=note, theirs=list(counts))
    return frames


def warmup_steps(draft: Draft, ratio: float | None, of: str, steps: int | None) -> None:
    """`schedule.warmup` from a share of the run's steps, as far as their number is known."""
    if not ratio:
        return
    if steps is None:
        draft.drop(of, ratio, "A share of the steps, and their number is not known before the data is.")
        draft.warn(
            f"{of} {ratio:g}: this run has no warm-up yet. 'weft plan' shows how many steps it has; write "
            f"schedule.warmup: {ratio:g} of that number."
        )
    else:
        draft.set("schedule.warmup", round(ratio * steps), of, note=f"In steps, of {steps}.", theirs=ratio)
