"""The `data` section for captioned videos and images: where they lie, which shapes they take, how they are cached."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from weft.data.buckets import Buckets
from weft.geometry import VideoGeometry
from weft.section import Section

if TYPE_CHECKING:
    from weft.contracts import Encoders
    from weft.data.cache import Store
    from weft.data.loader import VideoDataset
    from weft.data.survey import Survey
    from weft.events import Listener


class Source(Section):
    """One place that captioned clips come from."""

    path: Path = Field(
        description="A folder whose clips have captions beside them, or a .jsonl, .csv or .json manifest; "
        "relative to the working directory."
    )
    caption_extension: str = Field(
        default=".txt", pattern=r"^\..+", description="Ending of the caption file beside each clip of a folder."
    )
    repeats: PositiveInt = Field(default=1, description="How often each clip is shown per epoch, to weigh sources.")


class VideoData(Section):
    """Captioned videos and images for a video model."""

    kind: Literal["video"] = "video"
    sources: tuple[Source, ...] = Field(min_length=1, description="Where the training clips come from; at least one.")
    validation_sources: tuple[Source, ...] = Field(
        default=(), description="Clips that are only measured on, never trained on; their repeats count for nothing."
    )
    validation_items: NonNegativeInt = Field(
        default=0,
        description="So many usable clips are held out of the sources; a stable hash of the key chooses them, "
        "so that added clips change the choice as little as possible.",
    )
    fps: PositiveFloat | None = Field(
        default=None,
        description="Frames per second to resample clips to; null takes the rate the model was trained at.",
    )
    buckets: Buckets = Field(description="The shapes that clips may take, under a token budget.")
    caption_prefix: str = Field(
        default="", description="Put before each caption with one space between, e.g. a trigger word."
    )
    caption_dropout: float = Field(
        default=0.1, ge=0, le=1, description="Share of items that train on the empty caption, for guidance to work."
    )
    missing_captions: Literal["error", "empty", "drop"] = Field(
        default="error", description="What becomes of a clip without a caption: refuse, train on an empty one, drop it."
    )
    batch_size: PositiveInt = Field(default=1, description="Clips in one micro-batch on each rank, all of one bucket.")
    cache: Literal["disk", "memory", "off"] = Field(
        default="disk",
        description="Where encoded clips and captions are kept; 'off' encodes them anew for every batch.",
    )
    cache_folder: Path = Field(
        default=Path("weft-cache"), description="Folder of the disk cache; runs may share it, also at the same time."
    )
    unreadable: NonNegativeInt = Field(
        default=0, description="So many unreadable items are tolerated before training refuses to start."
    )

    def survey(self, geometry: VideoGeometry) -> "Survey":
        """Probe every clip and give it a bucket and a verdict. Raises DataError for manifests and lost captions."""
        from weft.data.survey import survey

        return survey(self, geometry)

    def store(self, survey: "Survey", identity: Mapping[str, str]) -> "Store":
        """The place of the survey's latents and texts. identity: fingerprints of the weights, a family's own."""
        from weft.data.cache import open_store

        return open_store(self.cache, self.cache_folder, survey, identity)

    def open(
        self,
        survey: "Survey",
        identity: Mapping[str, str],
        encoders: "Callable[[], Encoders]",
        tell: "Listener",
        *,
        seed: int,
        last_step: int,
        name: str = "clips",
    ) -> "VideoDataset":
        """Encode what the cache lacks and return what training draws from. Raises DataError beyond the error budget."""
        from weft.data.loader import Draws, VideoDataset, VideoExperience, filled_survey

        store = self.store(survey, identity)
        usable = filled_survey(survey, store, encoders, tell, self.unreadable)
        draws = Draws(batch_size=self.batch_size, seed=seed, caption_dropout=self.caption_dropout)
        return VideoDataset(usable, VideoExperience(name, last_step, usable.train, store, draws), store)
