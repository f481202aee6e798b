"""The `data` section for captioned videos and images: where they lie, which shapes they take, how they are cached."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from weft.data.buckets import Buckets
from weft.data.share import Share
from weft.data.windows import Extraction, Head
from weft.events import Notice
from weft.geometry import VideoGeometry
from weft.section import Section

if TYPE_CHECKING:
    from weft.contracts import Encoders
    from weft.data.cache import Store
    from weft.data.loader import VideoDataset
    from weft.data.slots import HostMemory
    from weft.data.survey import Survey
    from weft.events import Listener


class Source(Section):
    """One place that captioned clips come from."""

    path: Path = Field(
        description="A folder whose clips have captions beside them, a .jsonl, .csv or .json manifest, or a musubi "
        "dataset .toml; relative to the working directory."
    )
    root: Path | None = Field(
        default=None, description="Where a manifest's relative paths count from; null is the manifest's folder."
    )
    only: Literal["video", "image"] | None = Field(
        default=None, description="Take only clips of this kind; null takes both."
    )
    caption_extension: str = Field(
        default=".txt", pattern=r"^\..+", description="Ending of the caption file beside each clip of a folder."
    )
    repeats: PositiveInt = Field(default=1, description="How often each clip is shown per epoch, to weigh sources.")
    extraction: Extraction | None = Field(
        default=None, description="Which stretches of a clip are used; null is data.extraction."
    )
    stride: PositiveInt = Field(
        default=1, description="Take every so-manieth frame at the training rate: motion is so many times as fast."
    )
    source_fps: PositiveFloat | None = Field(
        default=None, description="Frames per second of the files, where their own timestamps are wrong."
    )
    buckets: Buckets | None = Field(default=None, description="The shapes of these clips; null is data.buckets.")


class VideoData(Section):
    """Captioned videos and images for a video model."""

    medium: ClassVar[Literal["video"]] = "video"
    has_latents: ClassVar[bool] = True  # its batches hold what is learned from, not captions alone
    kind: Literal["video"] = "video"
    sources: tuple[Source, ...] = Field(min_length=1, description="Where the training clips come from; at least one.")
    validation_sources: tuple[Source, ...] = Field(
        default=(), description="Clips that are only measured on, never trained on; their repeats count for nothing."
    )
    validation_items: NonNegativeInt = Field(
        default=0,
        description="So many usable clips are held out of the sources, with all their windows; a stable hash of the "
        "key chooses them, so that added clips change the choice as little as possible.",
    )
    share: Share | None = Field(
        default=None,
        description="[i, n]: train on the i-th of n equal shares of the items, counted from 0, as independent "
        "processes do; validation is the same for all. null trains on all.",
    )
    fps: PositiveFloat | None = Field(
        default=None,
        description="Frames per second to resample clips to; null takes the rate the model was trained at.",
    )
    buckets: Buckets | None = Field(
        default=None,
        description="The shapes that clips may take, under a token budget; null when every source has its own.",
    )
    extraction: Extraction = Field(
        default=Head(), description="Which stretches of a clip are used; each window is an item of its own."
    )
    random_frames: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of training batches that are cut to a shorter frame count, drawn from those of the buckets.",
    )
    caption_prefix: str = Field(
        default="", description="Put before each caption with one space between, e.g. a trigger word."
    )
    caption_dropout: float = Field(
        default=0.1, ge=0, le=1, description="Share of items that train on the empty caption, for guidance to work."
    )
    missing_captions: Literal["error", "empty", "drop"] = Field(
        default="error", description="What becomes of a clip without a caption: refuse, train on an empty one, drop it."
    )
    too_short: Literal["drop", "error"] = Field(
        default="drop", description="What becomes of a clip that is shorter than the shortest bucket."
    )
    dropped: NonNegativeInt | None = Field(
        default=None, description="So many dropped clips are tolerated before training refuses to start; null: any."
    )
    unreadable: NonNegativeInt = Field(
        default=0, description="So many unreadable items are tolerated before training refuses to start."
    )
    batch_size: PositiveInt = Field(default=1, description="Clips in one micro-batch on each rank, all of one bucket.")
    cache: Literal["disk", "memory", "off"] = Field(
        default="disk",
        description="Where encoded clips and captions are kept; 'off' encodes them anew for every batch.",
    )
    cache_folder: Path = Field(
        default=Path("weft-cache"), description="Folder of the disk cache; runs may share it, also at the same time."
    )
    cache_shards: bool = Field(
        default=True,
        description="Move cached entries of one shape into large files once there are 16 of them, which a network disk "
        "reads far faster than many small ones; false keeps a file for each clip and caption.",
    )
    cache_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="What cached latents are kept in: fp32 is exact; bf16 takes half the room and reading, and rounds "
        "what is trained on to 8 bits of precision. Each has entries of its own.",
    )
    workers: PositiveInt | Literal["auto"] = Field(
        default="auto",
        description="Clips that are decoded at once, ahead of the encoder, each by a thread; auto: the number of "
        "cores, from 2 to 8.",
    )
    encoder_batch: PositiveInt = Field(
        default=1, description="Clips of one bucket that are encoded together when a cache is filled."
    )

    @model_validator(mode="after")
    def _what_is_kept_has_a_dtype(self) -> "VideoData":
        if self.cache == "off" and self.cache_dtype != "fp32":
            raise ValueError(
                "cache_dtype: bf16 is what latents are kept in, and with cache: off none are. Leave it out"
            )
        return self

    @model_validator(mode="after")
    def _every_source_has_buckets(self) -> "VideoData":
        for name, sources in (("sources", self.sources), ("validation_sources", self.validation_sources)):
            for number, source in enumerate(sources):
                if not (self.buckets or source.buckets or source.path.suffix.lower() == ".toml"):
                    raise ValueError(
                        f"buckets: this key is missing, and data.{name}.{number} has none of its own. Write, for "
                        "example, 'buckets: {sides: [512], frames: [81]}'"
                    )
        return self

    def shapes(self) -> tuple[Buckets, ...]:
        """Every set of buckets in use, those of dataset files included."""
        from weft.data.surveying import shapes_of

        return tuple(shapes_of(self).values())

    def survey(self, geometry: VideoGeometry) -> "Survey":
        """Probe every clip and give it buckets, windows and a verdict. Raises DataError for manifests and captions,
        ConfigError for shapes."""
        from weft.data.surveying import survey

        return survey(self, geometry)

    def store(self, survey: "Survey", identity: Mapping[str, str], beside: Mapping[str, str] = {}) -> "Store":
        """The place of the survey's latents and texts. identity: fingerprints of the weights, a family's own. beside:
        name -> text that every batch tells beside its captions."""
        from weft.data.cache import Keeping
        from weft.data.filling import Hands
        from weft.data.stores import open_store

        hands, keeping = Hands.of(self.workers, self.encoder_batch), Keeping(self.cache_dtype, self.cache_shards)
        return open_store(self.cache, self.cache_folder, survey.telling(beside), identity, hands, keeping)

    def open(
        self,
        survey: "Survey",
        identity: Mapping[str, str],
        encoders: "Callable[[], Encoders]",
        tell: "Listener",
        *,
        seed: int,
        last_step: int,
        beside: Mapping[str, str] = {},
        name: str = "clips",
        memory: "HostMemory | None" = None,
    ) -> "VideoDataset":
        """Encode what the cache lacks and return what training draws from. memory: where the device likes batches to
        lie. Raises DataError beyond the error budget."""
        from weft.data.loader import Draws, VideoDataset, VideoExperience, filled_survey
        from weft.data.slots import pageable

        for notice in survey.notices:
            tell(Notice(text=notice))
        store = self.store(survey, identity, beside)
        usable = filled_survey(survey, store, encoders, tell, self.unreadable)
        draws = Draws(
            batch_size=self.batch_size,
            seed=seed,
            caption_dropout=self.caption_dropout,
            random_frames=self.random_frames,
            latent_frames=usable.latent_frames,
        )
        train = VideoExperience(name, last_step, usable.train, store, draws, beside, memory or pageable)
        return VideoDataset(usable, train, store)
