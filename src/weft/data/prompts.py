"""The `data` section for captions alone: what a video model is distilled on when there are no clips."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from weft.data.buckets import Buckets, Shapes
from weft.data.share import Share
from weft.events import Notice
from weft.geometry import VideoGeometry
from weft.section import Section

if TYPE_CHECKING:
    from weft.contracts import Encoders
    from weft.data.cache import Store
    from weft.data.prompt_loader import PromptDataset
    from weft.data.prompt_survey import PromptSurvey
    from weft.data.slots import HostMemory
    from weft.events import Listener

ASPECTS = ((16, 9), (4, 3), (1, 1), (3, 4), (9, 16))  # those that video models are trained at


class PromptData(Section):
    """Captions without clips for a video model, each batch in a shape that is drawn."""

    medium: ClassVar[Literal["video"]] = "video"
    has_latents: ClassVar[bool] = False  # its batches have a shape, and nothing in it that is learned from
    unreadable: ClassVar[int] = 0  # a caption can be read, or its file is refused

    kind: Literal["prompts"] = "prompts"
    files: tuple[Path, ...] = Field(
        default=(),
        description="Where the captions stand: .txt files with one on a line, blank lines and those that begin with # "
        "left out; .jsonl, .csv and .json files with them under text, caption or prompt. Relative to the working "
        "directory.",
    )
    texts: tuple[str, ...] = Field(default=(), description="Captions that stand here, beside those of the files.")
    share: Share | None = Field(
        default=None,
        description="[i, n]: train on the i-th of n equal shares of the captions, counted from 0, as independent "
        "processes do. null trains on all.",
    )
    buckets: Shapes = Field(
        description="The shapes that samples are made in while training; each batch draws one, all equally likely."
    )
    aspects: tuple[tuple[PositiveInt, PositiveInt], ...] | None = Field(
        default=None,
        min_length=1,
        description="Aspect ratios [width, height] that each of buckets.sides is taken in; null: 16:9, 4:3, 1:1, 3:4 "
        "and 9:16.",
    )
    fps: PositiveFloat | None = Field(
        default=None, description="Frames per second of the run's samples; null takes the model's rate."
    )
    caption_dropout: float = Field(
        default=0.0, ge=0, le=1, description="Share of items that train on the empty caption in place of their own."
    )
    batch_size: PositiveInt = Field(
        default=1, description="Captions in one micro-batch on each rank, all in one shape."
    )
    cache: Literal["disk", "memory", "off"] = Field(
        default="disk", description="Where encoded captions are kept; 'off' encodes them anew for every batch."
    )
    cache_folder: Path = Field(
        default=Path("weft-cache"), description="Folder of the disk cache; runs may share it, also at the same time."
    )

    @field_validator("texts")
    @classmethod
    def _say_something(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        if empty := [str(place) for place, text in enumerate(texts) if not text.strip()]:
            raise ValueError(f"caption {', '.join(empty)}, counted from 0, is empty. Write it, or leave it out")
        return texts

    @model_validator(mode="after")
    def _there_are_captions(self) -> "PromptData":
        if not (self.files or self.texts):
            raise ValueError(
                "files: no captions are named. Write, for example, 'files: [prompts.txt]', or 'texts: [...]'"
            )
        if self.aspects and self.buckets.sizes:
            raise ValueError("aspects: they are of buckets.sides, and buckets.sizes are given. Leave one of both out")
        return self

    def shapes(self) -> tuple[Buckets, ...]:
        """Its shapes, as those of clips are asked for."""
        return (Buckets.model_validate(self.buckets.model_dump()),)

    def survey(self, geometry: VideoGeometry) -> "PromptSurvey":
        """Read every caption and count the shapes out. Raises DataError for files, ConfigError for shapes."""
        from weft.data.prompt_survey import survey

        return survey(self, geometry)

    def store(self, survey: "PromptSurvey", identity: Mapping[str, str], beside: Mapping[str, str] = {}) -> "Store":
        """The place of the survey's texts. identity: fingerprints of the weights, a family's own. beside: name -> text
        that every batch tells beside its captions."""
        from weft.data.stores import open_store

        return open_store(self.cache, self.cache_folder, survey.telling(beside), identity)

    def open(
        self,
        survey: "PromptSurvey",
        identity: Mapping[str, str],
        encoders: "Callable[[], Encoders]",
        tell: "Listener",
        *,
        seed: int,
        last_step: int,
        beside: Mapping[str, str] = {},
        name: str = "prompts",
        memory: "HostMemory | None" = None,
    ) -> "PromptDataset":
        """Encode what the cache lacks and return what training draws from. memory: where the device likes batches to
        lie. Raises DataError."""
        from weft.data.loader import Draws
        from weft.data.prompt_loader import PromptDataset, PromptExperience
        from weft.data.slots import pageable

        for notice in survey.notices:
            tell(Notice(text=notice))
        survey.refuse_when_unusable()
        store = self.store(survey, identity, beside)
        store.fill(encoders, tell)
        draws = Draws(batch_size=self.batch_size, seed=seed, caption_dropout=self.caption_dropout)
        train = PromptExperience(name, last_step, survey, store, draws, beside, memory or pageable)
        return PromptDataset(survey, train, store)
