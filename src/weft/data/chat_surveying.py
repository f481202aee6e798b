"""Tokenise every source, or look into a stream, and decide what is trained on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from weft.contracts import TextFamily
from weft.data.chat_survey import ChatSurvey, Texts, texts_of
from weft.data.conversations import Reader
from weft.data.entries import ContentHashes
from weft.data.survey import named
from weft.data.templates import Template
from weft.data.token_cache import TokenCache
from weft.data.tokens import Corpus, Making, collected
from weft.errors import ConfigError, DataError
from weft.events import Listener

if TYPE_CHECKING:
    from weft.data.chat import ChatData, TextSource

PROBED = 64  # rows of a stream that a survey looks into
TOO_LONG, NOTHING, OTHERS = "too long", "with nothing to learn", "of other shares"


@dataclass(frozen=True)
class Look:
    """How a survey looks into sources. hashes: of files, where corpora are kept on the disk."""

    data: "ChatData"
    template: Template
    identity: tuple[str, ...]
    cache: TokenCache
    hashes: ContentHashes | None
    tell: Listener

    def probed(self, source: "TextSource") -> Corpus:
        """The first rows of a stream."""
        tapes, _ = source.tapes()
        return collected(making_of(self.data, source, self.template).of(tapes, min(PROBED, source.take or PROBED)))

    def whole(self, source: "TextSource") -> Corpus:
        """All of a source."""
        tapes, version = source.tapes()
        counts = [tape.count() for tape in tapes]
        rows = None if None in counts else sum(count for count in counts if count is not None)
        rows = min(rows, source.take) if source.take is not None and rows is not None else rows
        files = [self.hashes.of(path) for path in source.files()] if self.hashes else []
        asked = json.dumps([source.label, source.format, dict(source.columns), source.take, self.data.system])
        made_of = [*files, *map(str, source.files()), version, asked, *self.identity]
        # Nothing says whether a stream still holds what it held, so that none is kept on the disk.
        cache = TokenCache(None, self.tell) if source.streaming else self.cache
        making = making_of(self.data, source, self.template)
        workers = self.data.processes()
        return cache.corpus(source.label, made_of, lambda: making.of(tapes, source.take, workers), rows)


def making_of(data: "ChatData", source: "TextSource", template: Template) -> Making:
    """How rows of a source become texts."""
    return Making(Reader(source.format, source.columns), template, data.system)


def template_of(data: "ChatData", family: TextFamily) -> Template:
    """The chat template that is used. Raises ConfigError for a file that cannot be read."""
    source = None
    if data.template is not None:
        try:
            source = data.template.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"data.template: {data.template} cannot be read: {error}.") from error
    return Template(family.tokenizer(), source, data.learn)


def survey(data: "ChatData", family: TextFamily, tell: Listener) -> ChatSurvey:
    """Look into the sources. Raises ConfigError for a length that the model cannot take, DataError for sources that are
    not there."""
    if data.length > family.context:
        raise ConfigError(
            f"data.length: {data.length} tokens are more than the {family.context} that the model was made for. "
            "Lower it."
        )
    template = template_of(data, family)
    folder = data.cache_folder if data.cache == "disk" else None
    hashes = ContentHashes(folder / "hashes.json") if folder else None
    look = Look(data, template, tuple(template.identity()), TokenCache(folder, tell), hashes, tell)
    trained = [look.probed(source) if source.streaming else look.whole(source) for source in data.sources]
    held = [look.whole(source) for source in data.validation_sources]
    if hashes is not None:
        hashes.save()
    return judged(data, template, trained, held)


def judged(data: "ChatData", template: Template, trained: Sequence[Corpus], held: Sequence[Corpus]) -> ChatSurvey:
    """The survey of what was found."""
    train = texts_of(trained, [source.repeats for source in data.sources], data.length)
    apart = texts_of(held, [1] * len(held), data.length)
    long, too_long = over_length(train, data.length), over_length(apart, data.length)
    problems = []
    if data.truncate == "error" and (long.any() or too_long.any()):
        keys = [
            texts.text(int(i)).key
            for texts, over in ((train, long), (apart, too_long))
            for i in numpy.flatnonzero(over)
        ]
        problems.append(
            f"{len(keys)} texts are longer than data.length ({data.length}), and data.truncate is 'error'. Take them "
            f"out, raise data.length, or write 'drop' or 'cut_end':\n{named(keys)}"
        )
    kept, apart_kept = (texts.learned > 0 for texts in (train, apart))
    dropped = {TOO_LONG: 0, NOTHING: int((~kept & ~long).sum() + (~apart_kept & ~too_long).sum())}
    if data.truncate == "cut_end":
        dropped[NOTHING] = int((~kept).sum() + (~apart_kept).sum())
    else:
        dropped[TOO_LONG] = int(long.sum() + too_long.sum())
        kept, apart_kept = kept & ~long, apart_kept & ~too_long
    usable = train.chosen(kept)
    chosen = held_out(usable, data.validation_items)
    own = in_share(usable, chosen, data.share)
    dropped[OTHERS] = int((~own & ~chosen).sum())
    unreadable = tuple(each for corpus in (*trained, *held) for each in corpus.unreadable)
    return ChatSurvey(
        template=template,
        train=usable.chosen(own & ~chosen),
        validation=both(usable.chosen(chosen), apart.chosen(apart_kept)),
        capacity=data.length if data.pack else None,
        streamed=data.streams,
        unreadable=unreadable,
        cut=int((long & kept).sum() + (too_long & apart_kept).sum()),
        dropped=tuple((why, count) for why, count in dropped.items() if count),
        notices=tuple(notices(usable.chosen(~chosen), apart.chosen(apart_kept), trained)),
        problems=tuple(problems),
        streams=json.dumps([parts(source) for source in data.sources]) if data.streams else "",
    )


def parts(source: "TextSource") -> list[str]:
    """What a stream is made of, in order: a place in it means nothing once these are others."""
    tapes, version = source.tapes()
    return [source.label, version, str(len(tapes)), *(file.name for file in source.files())]


def over_length(texts: Texts, length: int) -> numpy.ndarray:
    """Which texts are longer, (n,) bool."""
    whole = [corpus.lengths for corpus in texts.corpora]
    return numpy.concatenate([numpy.zeros(0, bool), *(lengths > length for lengths in whole)])


def held_out(texts: Texts, count: int) -> numpy.ndarray:
    """The texts of the `count` conversations with the smallest hashes, (n,) bool: of what they say, not of where they
    stand, so that one that stands twice goes whole."""
    digests = texts.digests()
    chosen = set(sorted(set(digests))[:count])
    return numpy.array([digest in chosen for digest in digests], bool)


def in_share(texts: Texts, held: numpy.ndarray, share: tuple[int, int] | None) -> numpy.ndarray:
    """The texts that this process trains on, (n,) bool."""
    if share is None:
        return numpy.ones(len(texts), bool)
    own, of = share
    digests = texts.digests()
    trained = sorted({digest for digest, out in zip(digests, held, strict=True) if not out})
    mine = set(trained[own::of])
    return numpy.array([digest in mine for digest in digests], bool)


def both(one: Texts, other: Texts) -> Texts:
    """Two sets of texts as one."""
    arrays = [
        numpy.concatenate(pair)
        for pair in (
            (one.corpus, other.corpus + len(one.corpora)), (one.place, other.place), (one.lengths, other.lengths),
            (one.learned, other.learned), (one.repeats, other.repeats),
        )
    ]  # fmt: skip
    return Texts((*one.corpora, *other.corpora), *arrays)


def notices(train: Texts, apart: Texts, trained: Sequence[Corpus]) -> list[str]:
    """What the user should know of the texts."""
    said = []
    leaked = set(train.digests()) & set(apart.digests())
    if leaked:
        said.append(
            f"{len(leaked)} conversations of data.validation_sources are trained on as well, so their loss says "
            "nothing about new ones."
        )
    texts, endless = sum(map(len, trained)), sum(corpus.endless for corpus in trained)
    if 2 * endless > texts:
        said.append(
            f"In {endless} of {texts} texts the assistant's turns end in no special token, so that the model does not "
            "learn to stop. Is it the right chat template?"
        )
    if further := sum(corpus.further for corpus in trained):
        said.append(
            "The chat template rewrites earlier turns once later ones have followed (it takes thoughts away, say): so "
            f"that each turn is learned as it looks when it is said, there are {further} more texts than conversations."
        )
    return said


def files_of(path: Path, endings: Sequence[str]) -> list[Path]:
    """A file, or all of a folder that have one of the endings, sorted; hidden files are left out. Raises DataError."""
    if not path.exists():
        raise DataError(f"data.sources: there is no '{path}'. Paths count from the working directory, {Path.cwd()}.")
    listed = f"{', '.join(endings[:-1])} or {endings[-1]}"
    if path.is_file():
        if path.suffix.lower() not in endings:
            raise DataError(f"data.sources: '{path}' ends in none of {listed}.")
        return [path]
    found = [each for each in path.rglob("*") if each.is_file() and each.suffix.lower() in endings]
    shown = [each for each in found if not any(part.startswith(".") for part in each.relative_to(path).parts)]
    if not shown:
        raise DataError(f"data.sources: the folder '{path}' has no file that ends in {listed}.")
    return sorted(shown, key=lambda each: each.relative_to(path).as_posix())
