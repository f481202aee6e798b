"""Shell scripts and command lines taken apart into words, with the plain variables of the same file; nothing is run."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from weft.errors import ConfigError

NAME = r"[A-Za-z_]\w*"
ASSIGNMENT = re.compile(rf"({NAME})(\+?=)(.*)", re.DOTALL)
SEPARATORS = ("&&", "||", ";;", ";", "|", "&")
WINDOWS = (".bat", ".cmd")
POWERSHELL = ".ps1"


@dataclass(frozen=True)
class Word:
    """One word. unknown: what in it only a running shell could say, such as `$(date)` or a variable set elsewhere."""

    text: str
    line: int
    unknown: str = ""


@dataclass(frozen=True)
class Command:
    """A simple command: its words, and the variables that stand before it or were exported above."""

    words: tuple[Word, ...]
    environment: Mapping[str, Word] = field(default_factory=dict)

    @property
    def line(self) -> int:
        return self.words[0].line

    def find(self, pattern: str) -> int | None:
        """Which of the words matches a regex whole."""
        return next((n for n, word in enumerate(self.words) if re.fullmatch(pattern, word.text)), None)


@dataclass(frozen=True)
class Script:
    """The commands of a script in order, and its plain variables as they stand at its end."""

    path: Path
    commands: tuple[Command, ...]
    variables: Mapping[str, Word] = field(default_factory=dict)

    def running(self, pattern: str) -> Command | None:
        """The last command with a word that matches the regex whole, such as r".*train\\.py"."""
        return next((command for command in reversed(self.commands) if command.find(pattern) is not None), None)


def read_script(text: str, path: Path) -> Script:
    """Take a script apart. Raises ConfigError with `file:line` for quotes that do not close."""
    if path.suffix.lower() in WINDOWS:
        text = _from_windows(text)
    elif path.suffix.lower() == POWERSHELL:
        text = _from_powershell(text)
    reader = _Reader(path, text)
    commands = tuple(reader.commands())
    return Script(path, commands, reader.variables)


def _from_windows(text: str) -> str:
    """A batch file in the words of a POSIX shell: its continuations, comments and variables."""
    lines = []
    for line in text.splitlines():
        bare = line.strip()
        if re.match(r"(?i)(@?rem\b|::)", bare):
            line = "#" + bare
        elif assigned := re.fullmatch(rf'(?i)@?set\s+"?({NAME})=(.*?)"?', bare):
            line = f"{assigned[1]}={shlex.quote(assigned[2]) if '%' not in assigned[2] else _dquoted(assigned[2])}"
        else:
            # A backslash is a part of paths there, and no escape.
            line = re.sub(r"\^\s*$", "\x00", line).replace("\\", "\\\\").replace("\x00", "\\")
        lines.append(re.sub(rf"%({NAME})%", r"${\1}", line))
    return "\n".join(lines) + "\n"


def _from_powershell(text: str) -> str:
    text = re.sub(r"`[ \t]*\n", "\\\n", text.replace("\\", "\\\\"))
    return re.sub(rf"(?m)^\s*\$(?:env:)?({NAME})\s*=\s*", r"\1=", text)


def _dquoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


class _Reader:
    """One walk along a script. Variables are resolved on the way, as far as they were plainly assigned above."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text = path, text.replace("\r\n", "\n")
        self.at, self.line = 0, 1
        self.variables: dict[str, Word] = {}
        self.arrays: dict[str, tuple[Word, ...]] = {}
        self.exported: dict[str, None] = {}  # names in their order

    def commands(self) -> Iterator[Command]:
        words: list[Word] = []
        while self.at < len(self.text):
            if self.text.startswith("\\\n", self.at):
                self._skip(2)
            elif self.text[self.at] == "\n" or self.text.startswith(SEPARATORS, self.at):
                yield from self._ended(words)
                words = []
                self._skip(2 if self.text.startswith(("&&", "||", ";;"), self.at) else 1)
            elif self.text[self.at].isspace():
                self._skip(1)
            elif self.text[self.at] == "#":
                self._to_line_end()
            elif self.text[self.at] in "<>" or re.match(r"\d?[<>]|&>", self.text[self.at : self.at + 2]):
                self._redirection()
            elif not words and (array := re.compile(rf"({NAME})(\+?)=\(").match(self.text, self.at)):
                self._skip(array.end() - self.at)
                more = self._until_closed()
                self.arrays[array[1]] = (self.arrays.get(array[1], ()) if array[2] else ()) + more
            elif self.text[self.at] in "()":
                self._skip(1)
            else:
                words += self._words()
        yield from self._ended(words)

    # ---- Commands -------------------------------------------------------------------------------------------------

    def _ended(self, words: Sequence[Word]) -> Iterator[Command]:
        """A command that is complete: assignments are kept, all else is handed out."""
        if words and words[0].text in ("export", "declare", "local", "readonly"):
            for word in words[1:]:
                name = word.text.partition("=")[0]
                self.exported[name] = None
                self._assign(word)
            return
        before: dict[str, Word] = {}
        rest = list(words)
        while rest and (found := ASSIGNMENT.fullmatch(rest[0].text)):
            before[found[1]] = replace(rest.pop(0), text=found[3])
        if not rest:
            for word in words:
                self._assign(word)
            return
        inherited = {name: self.variables[name] for name in self.exported if name in self.variables}
        yield Command(tuple(rest), {**inherited, **before})

    def _assign(self, word: Word) -> None:
        found = ASSIGNMENT.fullmatch(word.text)
        if found:
            old = self.variables.get(found[1]) if found[2] == "+=" else None
            unknown = word.unknown or (old.unknown if old else "")
            self.variables[found[1]] = Word((old.text if old else "") + found[3], word.line, unknown)

    def _until_closed(self) -> tuple[Word, ...]:
        """The words of an array up to its bracket."""
        began, words = self.line, list[Word]()
        while self.at < len(self.text) and self.text[self.at] != ")":
            if self.text[self.at].isspace() or self.text[self.at] in ";|&<>(":
                self._skip(1)
            elif self.text.startswith("\\\n", self.at):
                self._skip(2)
            elif self.text[self.at] == "#":
                self._to_line_end()
            else:
                words += self._words()
        if self.at >= len(self.text):
            raise ConfigError(f"{self.path}:{began}: a '(' is opened here and never closed.")
        self._skip(1)
        return tuple(words)

    def _redirection(self) -> None:
        """Where output goes is nothing to us; the word behind goes with it."""
        found = re.compile(r"\d?(?:<<<|<<-?|<|>>|>\||>)&?|&>>?").match(self.text, self.at)
        assert found
        self._skip(found.end() - self.at)
        while self.at < len(self.text) and self.text[self.at] in " \t":
            self._skip(1)
        end = self._words()
        if found[0].lstrip("0123456789") in ("<<", "<<-") and end:
            closing = re.compile(rf"^\s*{re.escape(end[0].text)}[ \t]*$", re.MULTILINE).search(self.text, self.at)
            self._skip((closing.end() if closing else len(self.text)) - self.at)

    # ---- Words ----------------------------------------------------------------------------------------------------

    def _words(self) -> list[Word]:
        """One word of the text, which a bare variable may turn into none or several."""
        line, built, unknown, quoted = self.line, "", "", False
        parts: list[str] = []  # words that a bare variable has completed
        while self.at < len(self.text):
            here = self.text[self.at]
            if here.isspace() or here in ";|&<>()":
                break
            if array := re.compile(rf'"?\$\{{({NAME})\[[@*]\]\}}"?').match(self.text, self.at):
                self._skip(array.end() - self.at)
                if array[1] in self.arrays:
                    return [*self.arrays[array[1]]]
                return [Word(array[0], line, array[0].strip('"'))]
            if here == "'":
                built, quoted = built + self._single(), True
            elif here == '"':
                text, more = self._double()
                built, unknown, quoted = built + text, unknown or more, True
            elif here == "\\":
                built += "" if self.text[self.at + 1 : self.at + 2] == "\n" else self.text[self.at + 1 : self.at + 2]
                self._skip(2)
            elif here in "$`":
                text, more = self._expansion()
                unknown = unknown or more
                assigning = ASSIGNMENT.fullmatch(built) is not None
                first, *rest = [text] if more or assigning else (text.split() or [""])
                if rest:
                    parts += [built + first, *rest[:-1]]
                    built = rest[-1]
                else:
                    built += first
            else:
                built += here
                self._skip(1)
        whole = [*parts, built] if built or quoted or unknown else parts
        return [Word(text, line, unknown) for text in whole]

    def _single(self) -> str:
        end = self.text.find("'", self.at + 1)
        if end < 0:
            raise self._open("'")
        text = self.text[self.at + 1 : end]
        self._skip(end + 1 - self.at)
        return text

    def _double(self) -> tuple[str, str]:
        """(text, what is unknown) of a text in double quotes, in which variables count."""
        opened, built, unknown = self._open('"'), "", ""
        self._skip(1)
        while self.at < len(self.text) and self.text[self.at] != '"':
            here, behind = self.text[self.at], self.text[self.at + 1 : self.at + 2]
            if here == "\\" and behind in ('"', "\\", "$", "`", "\n"):
                built += "" if behind == "\n" else behind
                self._skip(2)
            elif here in "$`":
                text, more = self._expansion()
                built, unknown = built + text, unknown or more
            else:
                built += here
                self._skip(1)
        if self.at >= len(self.text):
            raise opened
        self._skip(1)
        return built, unknown

    def _expansion(self) -> tuple[str, str]:
        """(text, what is unknown) of what begins with $ or a backtick here."""
        if self.text[self.at] == "`":
            end = self.text.find("`", self.at + 1)
            return self._unknown(len(self.text) if end < 0 else end + 1)
        if self.text.startswith("$(", self.at):
            return self._unknown(self._closing(self.at + 1))
        if found := re.compile(rf"\$\{{({NAME}|\d+)(?::?[-=]([^{{}}$`]*))?\}}").match(self.text, self.at):
            known = self.variables.get(found[1])
            default = None if found[2] is None else found[2].strip("\"'")
            text = known.text if known and (known.text or default is None) else default
            self._skip(found.end() - self.at)
            return (found[0], found[0]) if text is None else (text, known.unknown if known else "")
        if found := re.compile(rf"\$({NAME})").match(self.text, self.at):
            known = self.variables.get(found[1])
            self._skip(found.end() - self.at)
            return (known.text, known.unknown) if known else (found[0], found[0])
        if self.text.startswith("${", self.at):
            end = self.text.find("}", self.at)
            return self._unknown(len(self.text) if end < 0 else end + 1)
        if re.compile(r"\$[@*#?\d!$]").match(self.text, self.at):
            return self._unknown(self.at + 2)
        self._skip(1)
        return "$", ""

    def _unknown(self, end: int) -> tuple[str, str]:
        text = self.text[self.at : end]
        self._skip(end - self.at)
        return text, text

    def _closing(self, at: int) -> int:
        """Behind the bracket that closes the one here."""
        depth = 0
        for end in range(at, len(self.text)):
            depth += {"(": 1, ")": -1}.get(self.text[end], 0)
            if depth == 0:
                return end + 1
        return len(self.text)

    def _open(self, quote: str) -> ConfigError:
        return ConfigError(f"{self.path}:{self.line}: the quote {quote} is opened here and never closed.")

    def _skip(self, count: int) -> None:
        self.line += self.text.count("\n", self.at, self.at + count)
        self.at += count

    def _to_line_end(self) -> None:
        end = self.text.find("\n", self.at)
        self.at = len(self.text) if end < 0 else end
