"""What the cache holds of a text survey, in the words in which a plan tells of any cache."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from weft.data.cache import CacheStatus
from weft.data.chat_survey import ChatSurvey
from weft.data.filling import Filled
from weft.events import Listener


@dataclass(frozen=True)
class ChatStore:
    """The corpora of a survey: one entry for each source."""

    survey: ChatSurvey

    def status(self) -> CacheStatus:
        corpora = {id(corpus): corpus for corpus in (*self.survey.train.corpora, *self.survey.validation.corpora)}
        return CacheStatus(len(corpora), 0, sum(corpus.nbytes for corpus in corpora.values()), 0)

    def fill(self, encoders: Callable[[], Any], tell: Listener) -> Filled:
        """Nothing is left to do: counting tokens has made them."""
        return Filled()

    def pack(self, tell: Listener) -> None:
        """Nor to be put in order: a corpus is one file of tokens."""
