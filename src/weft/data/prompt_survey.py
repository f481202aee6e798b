"""What training on captions alone would see: each caption once, and the shapes that batches are made in."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from math import ceil
from typing import TYPE_CHECKING, Self

from weft.data.buckets import Bucket
from weft.data.prompt_files import Prompt, read_prompts
from weft.data.prompts import ASPECTS
from weft.data.share import of_others
from weft.data.survey import Clip
from weft.errors import ConfigError, DataError
from weft.geometry import VideoGeometry

if TYPE_CHECKING:
    from weft.data.prompts import PromptData


@dataclass(frozen=True)
class PromptSurvey:
    """The captions in the order of the files, without those of other shares, and the shapes, largest first.

    fps: of samples. notices: what the user should know. beside: texts that every batch tells beside its captions.
    """

    train: tuple[Prompt, ...]
    shapes: tuple[Bucket, ...]
    geometry: VideoGeometry
    fps: float
    notices: tuple[str, ...] = ()
    of_others: int = 0  # captions that other shares train on
    beside: tuple[str, ...] = ()

    @property
    def texts(self) -> Iterable[str]:
        return (*(prompt.text for prompt in self.train), *self.beside)

    @property
    def usable(self) -> tuple[Clip, ...]:
        """Clips that are encoded: there are none."""
        return ()

    @property
    def validation(self) -> tuple[Prompt, ...]:
        """Nothing can be measured on captions alone."""
        return ()

    def telling(self, beside: Mapping[str, str]) -> Self:
        """The same survey, whose batches tell these texts too."""
        return replace(self, beside=tuple(beside.values()))

    def buckets(self) -> dict[Bucket, int]:
        """The shapes, largest first, with the captions that may be drawn in them: all."""
        return dict.fromkeys(self.shapes, len(self.train))

    def digest(self) -> str:
        """Hash over captions and shapes: the data as it is trained on."""
        facts = ([prompt.text for prompt in self.train], self.shapes)
        return sha256(repr(facts).encode()).hexdigest()

    def epoch_draws(self, batch_size: int) -> int:
        """Micro-batches until every caption was drawn."""
        return ceil(len(self.train) / batch_size)

    def steps_per_epoch(self, batch_size: int, accumulate: int = 1) -> int:
        """Optimizer steps until every caption was drawn. accumulate: micro-batches per step, over all ranks."""
        return ceil(self.epoch_draws(batch_size) / accumulate)

    def without(self, failures: Mapping[str, str]) -> Self:
        """The same survey: no clip of it can fail."""
        assert not failures, f"there are no clips, but these failed: {sorted(failures)}"
        return self

    def refuse_when_unusable(self, budget: int = 0) -> None:
        """Raise DataError when no caption is left to train on. budget: of clips that cannot be read, and of no meaning
        for captions."""
        if not self.train:
            raise DataError(
                f"None of {self.of_others} captions is left to train on. They go to other shares; make data.share's "
                "second number smaller."
            )


def survey(data: "PromptData", geometry: VideoGeometry) -> PromptSurvey:
    """Read every caption and count the shapes out. Raises DataError for files, ConfigError for shapes."""
    shapes = _shapes(data, geometry)
    prompts: list[Prompt] = []
    notices: list[str] = []
    for path in data.files:
        listed = read_prompts(path)
        prompts += listed.prompts
        notices += listed.notices
    prompts += [Prompt(text.strip(), f"data.texts.{number}") for number, text in enumerate(data.texts)]
    kept = {prompt.text: prompt for prompt in reversed(prompts)}  # the first of equal ones
    again = [prompt for prompt in prompts if kept[prompt.text] is not prompt]
    if again:
        some = "caption stands" if len(again) == 1 else "captions stand"
        notices.append(
            f"{len(again)} {some} there already and {'is' if len(again) == 1 else 'are'} left out, first "
            f"'{again[0].text[:60]}' ({again[0].place})."
        )
    unique = [prompt for prompt in prompts if kept[prompt.text] is prompt]
    others = of_others([prompt.key for prompt in unique], data.share)
    return PromptSurvey(
        tuple(prompt for prompt in unique if prompt.key not in others),
        shapes,
        geometry,
        data.fps or geometry.fps,
        tuple(notices),
        len(others),
    )


def _shapes(data: "PromptData", geometry: VideoGeometry) -> tuple[Bucket, ...]:
    """The shapes within the budget, largest first. Raises ConfigError."""
    if problems := [f"data.{problem}" for problem in data.buckets.problems(geometry)]:
        raise ConfigError(*problems)
    every, budget = data.buckets.every(data.aspects or ASPECTS, geometry), data.buckets.token_budget
    admitted = [shape for shape in every if budget is None or shape.tokens <= budget]
    if not admitted:
        least = min(every, key=lambda shape: shape.tokens)
        raise ConfigError(
            f"data.buckets: the cheapest shape {least} has {least.tokens:,} tokens, above token_budget {budget:,}. "
            "Raise the budget, or write fewer frames or smaller sides."
        )
    return tuple(sorted(admitted, key=lambda shape: (-shape.tokens, shape)))
