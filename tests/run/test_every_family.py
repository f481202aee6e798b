"""Every family in small size through everything: plan, cache, ten steps with integrity checks, validation, samples,
resume. Row A7: no zero loss, no tensor of zeros, gradients finite."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from tests.run.test_resume import silent
from tests.small import config_of, make_clips, make_hunyuan, make_wan, plain_config
from weft.data.media import probe_video
from weft.errors import ConfigError
from weft.events import Event, Incident, StepEnded
from weft.formats.reading import FORMATS, read_adapter
from weft.run.changes import change_of, difference
from weft.run.checks import check
from weft.run.config import RunConfig
from weft.run.listeners import read_steps
from weft.run.plan import plan
from weft.run.start import fill_cache, train_run

STEPS = 10
REAL = Path(__file__).parents[3] / "shared" / "data" / "videos"
# kind of model -> (family, keys of the section, side of a clip in pixels, adapters)
MODELS: dict[str, tuple[str, dict[str, Any], int, tuple[str, ...]]] = {
    "t2v": ("wan", {}, 64, ("adapter",)),
    "i2v21": ("wan", {}, 64, ("adapter",)),
    "i2v22": ("wan", {}, 64, ("adapter",)),
    "ti2v": ("wan", {}, 64, ("adapter",)),
    "experts": ("wan", {"expert": "both"}, 64, ("adapter_high", "adapter_low")),
    "i2v-experts": ("wan", {"expert": "both"}, 64, ("adapter_high", "adapter_low")),
    "hunyuan": ("hunyuan-video", {}, 64, ("adapter",)),
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("families")
    make_clips(root / "clips")
    Image.fromarray(numpy.full((90, 70, 3), (200, 60, 20), numpy.uint8)).save(root / "first.png")
    return root


def config_for(kind: str, root: Path, clips: Path, sources: Path, **change: Any) -> RunConfig:
    family, options, side, _ = MODELS[kind]
    folder = clips / f"model-{kind}"  # made once for all tests
    if not folder.is_dir():
        make_hunyuan(folder) if kind == "hunyuan" else make_wan(folder, kind=kind)  # type: ignore[arg-type]
    plain = plain_config(root, folder, sources, family, **options)
    plain["objective"] |= {"turn": 5} if "expert" in options else {}
    prompt: Any = {"text": "a square", "image": str(clips / "first.png")} if "i2v" in kind else "a square"
    plain["samples"] = {
        "prompts": [prompt], "frames": 5, "width": side, "height": side, "steps": 3, "guidance": 2.0, "every": 5,
    }  # fmt: skip
    plain["schedule"] = {"steps": STEPS, "warmup": 0}
    plain["optimizer"]["lr"] = 1e-2
    plain["validation"], plain["save"] = {"every": 5}, {"every": 5, "formats": list(FORMATS)}
    return config_of(plain, **change)


@dataclass
class Integrity:
    """Hears a run and checks each of its steps."""

    steps: list[int] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        assert not isinstance(event, Incident), f"a step went wrong: {event}"
        if not isinstance(event, StepEnded):
            return
        self.steps.append(event.step)
        losses = {name: value for name, value in event.metrics.items() if name.endswith("loss")}
        norms = {name: value for name, value in event.metrics.items() if name.endswith("grad_norm")}
        assert losses and norms
        assert all(math.isfinite(value) and value > 0 for value in {**losses, **norms}.values()), event.metrics


def check_run(config: RunConfig, kind: str) -> None:
    """Plan, cache, train, and look at what is there afterwards."""
    made = plan(config)
    assert not made.problems and made.parameters.trainable > 0
    status = fill_cache(config, check(config), silent)
    assert status.missing == 0
    heard = Integrity()
    result = train_run(config, heard)
    assert heard.steps == list(range(1, STEPS + 1)) and result.finished
    assert result.loss is not None and math.isfinite(result.loss)
    names = MODELS[kind][3]
    assert tuple(folder.name for folder in result.adapters) == names
    for folder in result.adapters:
        tensors = read_adapter(folder).tensors
        assert all(tensor.isfinite().all() and tensor.any() for tensor in tensors.values())
        check_formats(folder)
    for step in ("base", "step_000005", "step_000010"):
        probe = probe_video(config.folder / "samples" / step / "00.mp4")
        assert probe.frames == 5
        assert (config.folder / "samples" / step / "sheet.png").is_file()


def check_formats(folder: Path) -> None:
    """A run leaves its adapter in every format, and each changes the layers alike."""
    adapter = read_adapter(folder)
    for style in FORMATS.values():
        read = style.read(folder / style.file if style.file else folder)
        assert set(read.paths) == set(adapter.paths)
        assert all(difference(change_of(adapter, path), change_of(read, path)) < 1e-6 for path in adapter.paths)


@pytest.mark.parametrize("kind", MODELS)
def test_a_small_model_of_the_family_goes_through_everything(kind, clips, tmp_path):
    check_run(config_for(kind, tmp_path, clips, clips / "clips"), kind)


@pytest.mark.parametrize("kind", ["i2v21", "ti2v", "hunyuan", "i2v-experts"])
def test_a_run_that_was_stopped_goes_on_to_the_bit(kind, clips, tmp_path):
    save = {"every": 1, "formats": ["peft"]}
    change: dict[str, Any] = {"samples": {"prompts": []}, "save": save, "adapter": {"input_dropout": 0.1}}
    whole = config_for(kind, tmp_path, clips, clips / "clips", name="whole", **change)
    train_run(whole, silent)
    parts = config_for(kind, tmp_path, clips, clips / "clips", name="parts", **change)
    for upto in (3, 6):
        heard: list[Any] = []
        train_run(parts, heard.append, stop=lambda upto=upto, heard=heard: last_step(heard) >= upto)
    train_run(parts, silent)
    rows = [
        {step: row["metrics"] for step, row in read_steps(c.folder / "events.rank0.jsonl").items()}
        for c in (whole, parts)
    ]
    assert rows[0] == rows[1]
    for name in MODELS[kind][3]:
        ours, theirs = (read_adapter(c.folder / name).tensors for c in (parts, whole))
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


def last_step(heard: list[Any]) -> int:
    return max((event.step for event in heard if isinstance(event, StepEnded)), default=0)


def test_an_image_to_video_model_asks_for_the_first_frame_of_each_prompt(clips, tmp_path):
    config = config_for("i2v22", tmp_path, clips, clips / "clips", samples={"prompts": ["a square"]})
    with pytest.raises(ConfigError, match=r"'a square' has no first frame.*Write \{text: ..., image: FILE\}"):
        check(config)


def test_a_text_to_video_model_refuses_a_first_frame_and_one_that_is_not_there_is_named(clips, tmp_path):
    image = str(clips / "first.png")
    config = config_for("t2v", tmp_path, clips, clips / "clips", samples={"prompts": [{"text": "a", "image": image}]})
    with pytest.raises(ConfigError, match="this is a text-to-video model"):
        check(config)
    prompt = {"text": "a", "image": "nowhere.png"}
    config = config_for("ti2v", tmp_path, clips, clips / "clips", samples={"prompts": [prompt]})
    with pytest.raises(ConfigError, match=r"there is no image 'nowhere.png'"):
        check(config)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("hunyuan", {"negative": "blurred"}, "takes guidance as a number and no negative prompt"),
        ("t2v", {"guidance_low": 3.0}, "this model has one network"),
    ],
)
def test_what_a_sample_would_not_heed_is_refused(kind, change, words, clips, tmp_path):
    with pytest.raises(ConfigError, match=words):
        check(config_for(kind, tmp_path, clips, clips / "clips", samples=change))


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.skipif(not REAL.is_dir(), reason="no folder of real clips beside the checkout")
@pytest.mark.parametrize("kind", MODELS)
def test_real_clips_go_through_every_family(kind, clips, tmp_path):
    data = {
        "fps": None,
        "sources": [{"path": str(REAL / "metadata.json")}],
        "buckets": {"sizes": [], "sides": [96], "frames": [17, 9, 1]},
        "batch_size": 1,
    }
    config = config_for(kind, tmp_path, clips, clips / "clips", data=data)
    check_run(config, kind)
    assert len(json.loads((REAL / "metadata.json").read_text())) == len(check(config).clips)
