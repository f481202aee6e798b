"""Documents as tokens: encoded many at a time, and cut to a length without losing the marks around them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from weft.data.documents_survey import Padding
from weft.errors import ConfigError

TEXTS_AT_ONCE = 512


@dataclass(frozen=True, repr=False)
class Cutting:
    """A tokenizer, and how many tokens it may give. truncate: head, tail or head_tail, what is kept."""

    tokenizer: Any  # a transformers PreTrainedTokenizer
    length: int
    truncate: str

    def padding(self) -> Padding:
        """Raises ConfigError for a tokenizer that cannot fill up a row."""
        token = self.tokenizer.pad_token_id
        if token is None:
            raise ConfigError(
                "family.source: its tokenizer has no padding token, which rows of a batch are filled with."
            )
        return Padding(token, self.tokenizer.padding_side == "left")

    def marks(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        """The tokens that it puts before and after every document."""
        bare, whole = self._encoded(["a"], False)[0], self._encoded(["a"], True)[0]
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return numpy.array(whole[:start], numpy.int32), numpy.array(whole[start + len(bare) :], numpy.int32)
        raise ConfigError("family.source: its tokenizer changes a document when it marks its ends, so none can be cut.")

    def encoded(self, texts: Sequence[str]) -> Iterator[tuple[numpy.ndarray, int]]:
        """Tokens (n,) int32 of each text, and how many it had before it was cut. Raises ConfigError."""
        before, after = self.marks()
        room = self.length - len(before) - len(after)
        if room < 1:
            raise ConfigError(f"data.length: {self.length} tokens leave no room for a document. Write more.")
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            for ids in self._encoded(list(texts[start : start + TEXTS_AT_ONCE]), False):
                kept = self._cut(numpy.array(ids, numpy.int32), room)
                yield numpy.concatenate([before, kept, after]), len(ids) + len(before) + len(after)

    def _cut(self, ids: numpy.ndarray, room: int) -> numpy.ndarray:
        if len(ids) <= room:
            return ids
        if self.truncate == "head":
            return ids[:room]
        if self.truncate == "tail":
            return ids[len(ids) - room :]
        return numpy.concatenate([ids[: room - room // 2], ids[len(ids) - room // 2 :]])

    def _encoded(self, texts: list[str], marked: bool) -> list[list[int]]:
        found = self.tokenizer(
            texts, add_special_tokens=marked, truncation=False, padding=False, return_attention_mask=False,
            return_token_type_ids=False, verbose=False,
        )  # fmt: skip
        return found["input_ids"]
