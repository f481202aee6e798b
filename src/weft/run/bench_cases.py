"""What is timed: a model of a released size, a clip or rows of text, and changes of the config; and named suites."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from weft.config.source import read_text
from weft.data.buckets import Bucket
from weft.errors import ConfigError, did_you_mean
from weft.run.bench_models import model_named, write_model
from weft.run.config import RunConfig, parse_config
from weft.run.questions import Row, Shape

RANK = 32  # on all linear layers of the blocks
VIDEO = """\
name: bench
family: {{kind: {family}, source: '{source}'}}
adapter: {{kind: lora, rank: {rank}, targets: attention+ffn}}
objective: {{kind: flow-matching}}
optimizer: {{kind: adamw}}
data: {{kind: video, sources: [{{path: .}}], buckets: {{sizes: [[{width}, {height}]], frames: [{frames}]}},
       batch_size: {batch}}}
"""
TEXT = """\
name: bench
family: {{kind: causal-lm, source: '{source}'}}
adapter: {{kind: lora, rank: {rank}, targets: all}}
objective: {{kind: next-token}}
optimizer: {{kind: adamw}}
data: {{kind: chat, sources: [{{path: .}}], length: {tokens}, batch_size: {batch}}}
"""


@dataclass(frozen=True)
class Case:
    """One thing to time. clip: frames, height, width in pixels. tokens, document: of a row of text, and of each of the
    conversations in it. blocks: units of depth that are timed, and twice as many, in place of the whole model."""

    model: str
    clip: tuple[int, int, int] | None = None
    tokens: int = 0
    document: int = 0
    batch: int = 1
    blocks: int | None = None
    changes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What it is called in tables; two cases of one name are the same."""
        shape = "x".join(map(str, self.clip)) if self.clip else f"{self.tokens}/{self.document}"
        depth = f" blocks {self.blocks}" if self.blocks else ""
        return " ".join([f"{self.model} {shape} batch {self.batch}{depth}", *self.changes])


@dataclass(frozen=True)
class Prepared:
    """A case as a run's config, whose weights are drawn. depth and units: of its network, and of the whole model."""

    case: Case
    config: RunConfig
    shape: Shape
    depth: int
    units: int


def prepared(case: Case, folder: Path, units: int | None = None) -> Prepared:
    """The config of a case with a network of so many units of depth; None: the whole. Raises WeftError."""
    sized = model_named(case.model)
    source = write_model(folder / case.model, case.model, units)
    text = sized.family == "causal-lm"
    if text == bool(case.clip):
        raise ConfigError(
            f"--model: {case.model} is a {'language' if text else 'video'} model. Write "
            + ("--tokens 4096 --documents 1024." if text else "--clip 81x480x832.")
        )
    told = {"family": sized.family, "source": source, "rank": RANK, "batch": case.batch, "tokens": case.tokens}
    frames, height, width = case.clip or (0, 0, 0)
    plain = (TEXT if text else VIDEO).format(**told, frames=frames, height=height, width=width)
    config = parse_config(read_text(plain, "weft bench", [*sized.changes, *case.changes]))
    shape = Row(case.tokens) if text else clip_of(config, frames, height, width)
    if text and case.tokens % (case.document or case.tokens):
        raise ConfigError(f"--documents: {case.document} tokens do not divide a row of {case.tokens}.")
    return Prepared(case, config, shape, units or sized.units, sized.units)


def clip_of(config: RunConfig, frames: int, height: int, width: int) -> Bucket:
    """The shape of exactly this clip. Raises ConfigError where the model cannot take it."""
    geometry = config.family.geometry()
    if found := config.data.buckets.problems(geometry):
        raise ConfigError(*(f"--clip: {problem}" for problem in found))
    return Bucket(frames, height, width, geometry.tokens(frames, height, width))


def clip_named(text: str) -> tuple[int, int, int]:
    """(frames, height, width) of a text such as 81x480x832. Raises ConfigError."""
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(f"--clip: '{text}' is no clip. Write frames x height x width, such as 81x480x832.")
    frames, height, width = map(int, parts)
    return frames, height, width


# ---- Suites -------------------------------------------------------------------------------------------------------


def _videos(
    models: Sequence[str], clips: Sequence[tuple[int, int, int]], blocks: int | None = None
) -> tuple[Case, ...]:
    return tuple(Case(model, clip, blocks=blocks) for model in models for clip in clips)


def _rows(model: str, tokens: int, batch: int, document: int = 1024) -> Case:
    return Case(model, tokens=tokens, document=document, batch=batch)


WANS = ("wan2.1-1.3b", "wan2.2-5b", "wan2.2-a14b")
VIDEOS = (*WANS, "hunyuan-video")
BOTH = ("family.expert=both",)  # networks of A14B, taking turns
P480, P720, P704 = (81, 480, 832), (81, 720, 1280), (121, 704, 1280)
TINY_CLIP = (5, 64, 64)

SUITES: Mapping[str, tuple[Case, ...]] = {
    "smoke": (Case("tiny-wan", (9, 64, 64), batch=8), Case("wan2.1-1.3b", (5, 128, 128), blocks=1)),
    "img": (
        *_videos(("wan2.1-1.3b", "wan2.2-a14b"), [(1, 480, 832), (1, 1024, 1024)]),
        *_videos(("wan2.2-5b", "hunyuan-video"), [(1, 1024, 1024)]),
    ),
    "vid480": (
        *_videos(("wan2.1-1.3b",), [P480]),
        *_videos(("wan2.2-5b",), [P704]),
        *_videos(("wan2.2-a14b", "hunyuan-video"), [P480], blocks=2),
    ),
    "vid720": _videos(("wan2.1-1.3b", "wan2.2-a14b", "hunyuan-video"), [P720], blocks=2),
    "both": (Case("wan2.2-a14b", P480, changes=BOTH),),
    "llm": (_rows("qwen3-0.6b", 4096, 4), _rows("qwen3-8b", 4096, 4), _rows("qwen3-8b", 4096, 1, 4096)),
    "peers": (Case("wan2.1-1.3b", (1, 480, 832)), Case("wan2.1-1.3b", (17, 480, 832)), _rows("qwen3-0.6b", 4096, 1)),
    "cpu": (
        *_videos(("wan2.1-1.3b", "wan2.1-14b", "wan2.2-5b", "wan2.2-a14b", "hunyuan-video"), [TINY_CLIP], blocks=1),
        replace(_rows("qwen3-0.6b", 256, 1, 64), blocks=1),
        replace(_rows("qwen3-8b", 256, 1, 64), blocks=1),
    ),
}
SUITES_AGAINST = {"peers"}  # suites that are timed against the plain step


def suite_named(name: str) -> tuple[Case, ...]:
    """Raises ConfigError with the nearest name."""
    if name not in SUITES:
        raise ConfigError(f"--suite: there is no '{name}'. {did_you_mean(name, [*SUITES, 'io'])}")
    return SUITES[name]
