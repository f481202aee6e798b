"""From a conversation to tokens, and which of them a model would have said itself, whatever the chat template does."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import jinja2
import numpy
from transformers.utils.chat_template_utils import render_jinja_template

from weft.data.conversations import Conversation, Message, Unfit
from weft.errors import ConfigError

Learn = Literal["assistant", "all", "last"]
Span = tuple[int, int]  # [first, behind the last) character

GENERATION = re.compile(r"\{%-?\s*generation\s*[-+]?%\}")
MARK = "\ue000"  # of the private use area: it begins nothing that a template writes


@dataclass(frozen=True)
class Rendered:
    """A text as the model sees it. spans: what it is to say. plain: the tokenizer adds its own tokens around it."""

    text: str
    spans: tuple[Span, ...]
    plain: bool = False


@dataclass(frozen=True)
class Encoded:
    """ids (n,) int32 and learned (n,) bool: the tokens that are targets. stops: whether each stretch that is learned
    ends in a special token, so that the model learns to stop."""

    ids: numpy.ndarray
    learned: numpy.ndarray
    stops: bool


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template, or another one. A conversation whose earlier turns look different once later ones
    have followed (thoughts that are taken away) gives several texts: each turn is learned as it looks when it is said.
    """

    tokenizer: Any  # a transformers PreTrainedTokenizerFast
    source: str | None  # jinja; None: the tokenizer's own
    learn: Learn

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise ConfigError(
                f"data: {type(self.tokenizer).__name__} does not tell which characters a token stands for, so that no "
                "mask can be made. Give the model a folder with tokenizer.json."
            )

    def rendered(self, conversation: Conversation) -> list[Rendered]:
        """The texts of a conversation, with every turn that is learned in exactly one of them. Raises Unfit."""
        refused: Unfit | None = None
        for variant in conversation.variants():
            try:
                return self._rendered(variant)
            except Unfit as unfit:
                refused = refused or unfit
        assert refused is not None
        raise refused

    def _rendered(self, conversation: Conversation) -> list[Rendered]:
        if conversation.text is not None:
            return [Rendered(conversation.text, ((0, len(conversation.text)),), plain=True)]
        messages = conversation.messages
        turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        if self.learn == "all":
            text = self._text(conversation, messages)
            return [Rendered(text, ((0, len(text)),))]
        if not turns:
            raise Unfit("it has no turn of the assistant to learn.")
        if GENERATION.search(self._source(conversation.tools)):
            return [self._as_marked(conversation)]
        return self._by_prefixes(conversation, turns if self.learn == "assistant" else turns[-1:])

    def encoded(self, texts: Sequence[Rendered]) -> list[Encoded]:
        """The tokens of texts; those that reach over the edge of a span are not learned."""
        found: dict[int, Encoded] = {}
        for plain in (False, True):
            places = [i for i, each in enumerate(texts) if each.plain == plain]
            if places:
                many = self.tokenizer(
                    [texts[i].text for i in places], add_special_tokens=plain, return_offsets_mapping=True,
                    return_attention_mask=False, return_token_type_ids=False, verbose=False,
                )  # fmt: skip
                for i, ids, offsets in zip(places, many["input_ids"], many["offset_mapping"], strict=True):
                    found[i] = self._plain(ids) if plain else self._masked(texts[i], ids, offsets)
        return [found[i] for i in range(len(texts))]

    @property
    def padding(self) -> int:
        """The token behind the end of a row's texts. It is learned nowhere and seen by no text."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in known if token is not None)

    def identity(self) -> list[str]:
        """All that the tokens depend on, as text: vocabulary, template, and what is learned."""
        return [
            self.tokenizer.backend_tokenizer.to_str(), str(self.tokenizer.special_tokens_map),
            str(self.source or self.tokenizer.chat_template), self.learn,
        ]  # fmt: skip

    def _masked(self, text: Rendered, ids: Sequence[int], offsets: Sequence[Span]) -> Encoded:
        first, last = numpy.array(offsets, numpy.int64).reshape(-1, 2).T
        learned = numpy.zeros(len(ids), bool)
        for a, b in text.spans:
            learned |= (first >= a) & (last <= b) & (first < b)
        stops = all(text.text[a:b].endswith(self._specials) for a, b in text.spans)
        return Encoded(numpy.array(ids, numpy.int32), learned, stops or self.learn == "all")

    def _plain(self, ids: Sequence[int]) -> Encoded:
        """A whole text is learned, and its end."""
        end = self.tokenizer.eos_token_id
        whole = [*ids, end] if end is not None and (not ids or ids[-1] != end) else [*ids]
        return Encoded(numpy.array(whole, numpy.int32), numpy.ones(len(whole), bool), end is not None)

    def _source(self, tools: Sequence[Any] | None) -> str:
        """The template in jinja; some tokenizers have another one for conversations with tools."""
        if self.source is None and not self.tokenizer.chat_template:
            raise ConfigError("data.template: this tokenizer has no chat template of its own. Name a jinja file.")
        return self.tokenizer.get_chat_template(self.source, tools)

    def _text(self, conversation: Conversation, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """Messages as the model sees them; prompt: with what stands before the assistant's next turn."""
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tools=conversation.tools, chat_template=self._source(conversation.tools),
                add_generation_prompt=prompt, tokenize=False,
            )  # fmt: skip
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise Unfit(f"the chat template refuses it: {error}") from error

    def _as_marked(self, conversation: Conversation) -> Rendered:
        """The spans that the template itself marks by its generation blocks, and the token behind each that ends the
        turn, where the block stops short of it."""
        messages = [dict(message) for message in conversation.messages]
        try:
            (text,), (marked,) = render_jinja_template(
                [messages], tools=list(conversation.tools) if conversation.tools else None,
                chat_template=self._source(conversation.tools), return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )  # fmt: skip
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise Unfit(f"the chat template refuses it: {error}") from error
        spans = [self._ended(text, (int(a), int(b))) for a, b in marked if b > a]
        if not spans:
            raise Unfit("the chat template marks no turn of it as the assistant's.")
        return Rendered(text, tuple(spans if self.learn == "assistant" else spans[-1:]))

    def _by_prefixes(self, conversation: Conversation, turns: Sequence[int]) -> list[Rendered]:
        """Spans of a template that marks none: what a turn adds to the text before it. A turn is learned in a longer
        text as long as that begins with the shorter one, and else in a text that ends with it."""
        texts: list[Rendered] = []
        left = list(reversed(turns))
        while left:
            text = self._text(conversation, conversation.messages[: left[0] + 1])
            spans = {k: span for k in left if (span := self._span(conversation, text, k))}
            if left[0] not in spans:
                raise Unfit(
                    f"the chat template does not write message {left[0] + 1} behind the prompt before it, so it cannot "
                    "be told what the assistant says. Mark it in the template with {% generation %}."
                )
            texts.append(Rendered(text, tuple(self._trimmed(text, spans[k]) for k in sorted(spans))))
            left = [k for k in left if k not in spans]
        return texts[::-1]

    def _span(self, conversation: Conversation, text: str, k: int) -> Span | None:
        """Where a text that goes on holds message k just as it was said; None when it does not."""
        messages = conversation.messages
        after, before = self._text(conversation, messages[: k + 1]), self._text(conversation, messages[:k], prompt=True)
        if not text.startswith(after):
            return None
        if after.startswith(before):
            return len(before), len(after)
        # A prompt that opens thoughts which a finished turn does not show: the turn begins where the two part.
        marked = self._text(conversation, [*messages[:k], {"role": "assistant", "content": MARK}])
        head = common_head(before, marked)
        if head.startswith(self._text(conversation, messages[:k])) and after.startswith(head):
            return len(head), len(after)
        return None

    def _trimmed(self, text: str, span: Span) -> Span:
        """A span without the white space that a template writes behind the token which ends a turn: there the model
        has stopped already."""
        a, b = span
        said = text[a:b].rstrip()
        return (a, a + len(said)) if said.endswith(self._specials) else span

    def _ended(self, text: str, span: Span) -> Span:
        """A span with the special token behind it, unless it ends in one."""
        a, b = self._trimmed(text, span)
        if text[a:b].endswith(self._specials):
            return a, b
        longest = max((token for token in self._specials if text.startswith(token, b)), key=len, default="")
        return a, b + len(longest)

    @cached_property
    def _specials(self) -> tuple[str, ...]:
        return special_tokens(self.tokenizer.all_special_tokens, self.tokenizer.added_tokens_decoder)


def special_tokens(named: Iterable[str], added: Mapping[int, Any]) -> tuple[str, ...]:
    """The tokens that no text can spell."""
    return tuple({*filter(None, named), *(token.content for token in added.values() if token.special)})


def common_head(one: str, other: str) -> str:
    """What two texts begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))]
