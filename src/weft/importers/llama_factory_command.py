"""LLaMA-Factory's command lines, llamafactory-cli train --flag value, as the flat config that they stand for."""

import re
from dataclasses import replace

from weft.errors import ConfigError
from weft.importers.draft import ReadFile
from weft.importers.flags import settings
from weft.importers.launchers import flags_behind
from weft.importers.shell_words import Command, Script, Word

PROGRAM = "LLaMA-Factory"
STARTS = r"(?:.*[/\\])?(?:llamafactory-cli|lmf)|(?:.*[/\\])?src[/\\]train(?:_bash)?\.py"
CONFIG = re.compile(r".+\.(?:ya?ml|json)")


def starts(file: ReadFile) -> bool:
    """Whether a shell file starts a training of LLaMA-Factory."""
    return isinstance(file.content, Script) and file.content.running(STARTS) is not None


def as_config(file: ReadFile) -> ReadFile:
    """The flags of the last such command as a file of keys with their lines; any other file as it is.

    Raises ConfigError where the command names a config that holds the settings, or has a value that only a shell knows.
    """
    if not isinstance(file.content, Script):
        return file
    command = file.content.running(STARTS)
    if command is None:
        raise ConfigError(f"{file.path}: no command there starts {PROGRAM}, such as: llamafactory-cli train ...")
    words = _behind(file.content, command)
    named = next((word for word in command.words if CONFIG.fullmatch(word.text)), None)
    if named is not None and words and words[0] is named:
        raise ConfigError(
            f"{file.path}:{named.line}: the settings stand in {named.text}, which this command names. Import that file."
        )
    theirs = settings(words, {}, PROGRAM, file.path)
    content = {key: theirs.take(key) for key in theirs.given}
    lines = {(key,): int(given.place.rpartition(":")[2]) for key, given in theirs.given.items()}
    return replace(file, kind="yaml", content=content, lines=lines)


def _behind(script: Script, command: Command) -> list[Word]:
    at = command.find(STARTS)
    assert at is not None
    words = [*command.words[at + 1 :], *flags_behind(script, command)]
    return words[1:] if words and words[0].text == "train" else words
