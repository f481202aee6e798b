"""Which program a file belongs to, told from what it says; the table of importers by name."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path

from weft.errors import ConfigError, did_you_mean
from weft.importers.draft import Importer, ReadFile
from weft.importers.reading import KINDS, read

IMPORTERS: Mapping[str, str] = {
    "musubi": "weft.importers.musubi:Musubi",
    "ai-toolkit": "weft.importers.ai_toolkit:AiToolkit",
    "diffusion-pipe": "weft.importers.diffusion_pipe:DiffusionPipe",
    "videox-fun": "weft.importers.videox_fun:VideoXFun",
    "veomni": "weft.importers.veomni:VeOmni",
    "llama-factory": "weft.importers.llama_factory:LlamaFactory",
}
SURE = 0.3  # a file that no importer knows better than this is nobody's
READ_CONFIGS = ("train", "plan", "cache", "bench", "launch", "config")  # verbs that are handed a run.yaml


def importer(name: str) -> Importer:
    """The importer of a name. Raises ConfigError with the nearest."""
    if name not in IMPORTERS:
        raise ConfigError(f"--from: no importer is called '{name}'. {did_you_mean(name, list(IMPORTERS))}")
    module, _, attribute = IMPORTERS[name].partition(":")
    return getattr(import_module(module), attribute)()


def likely(files: Sequence[ReadFile]) -> str | None:
    """The name of the importer that knows the files best, or None when none knows them."""
    scores = {name: max(float(importer(name).recognises(file)) for file in files) for name in IMPORTERS}
    best = max(scores, key=lambda name: scores[name])
    return best if scores[best] > SURE else None


def recognised(files: Sequence[ReadFile]) -> str:
    """As `likely`. Raises ConfigError when none knows the files."""
    found = likely(files)
    if found is None:
        names = ", ".join(str(file.path) for file in files)
        raise ConfigError(
            f"{names}: no trainer is recognised by what stands there. Say whose it is with --from, which takes: "
            f"{', '.join(IMPORTERS)}."
        )
    return found


def hints(arguments: Sequence[str]) -> Iterator[str]:
    """What to say when a verb that wants a run.yaml was handed another trainer's file. arguments: verb first."""
    if not arguments or arguments[0] not in READ_CONFIGS:
        return
    for word in arguments[1:]:
        path = Path(word)
        if path.suffix.lower() not in KINDS or not path.is_file():
            continue
        try:
            found = likely([read(path)])
        except ConfigError:  # what is wrong with the file has been told by the verb itself
            continue
        if found:
            command = f"weft import {shlex.quote(word)} --out run.yaml"
            yield f"{word} is a file of {importer(found).name}. Turn it into ours with: {command}"
