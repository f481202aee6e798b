"""`weft sample` from an image, with both experts, and what it refuses."""

from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from tests.run.test_resume import silent
from tests.small import config_of, make_clips, make_wan, plain_config
from weft.cli.sample import run
from weft.data.media import probe_video
from weft.errors import ConfigError
from weft.run.start import train_run

SIZE = ["--frames", "5", "--width", "64", "--height", "64", "--steps", "2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one step on an image-to-video model of two experts, and a picture."""
    root = tmp_path_factory.mktemp("sample")
    make_clips(root / "clips", 3)
    plain: dict[str, Any] = plain_config(root, make_wan(root / "model", kind="i2v-experts"), root / "clips")
    plain["schedule"], plain["validation"] = {"steps": 2, "warmup": 0}, {"every": 0}
    for expert in ("high", "low"):
        train_run(config_of(plain, name=expert, family={"expert": expert}), silent)
    Image.fromarray(numpy.full((64, 64, 3), (250, 30, 30), numpy.uint8)).save(root / "first.png")
    return root


def test_two_runs_and_an_image_give_a_video_that_begins_with_it(finished, tmp_path, capsys):
    image = str(finished / "first.png")
    runs = [str(finished / "runs" / name) for name in ("high", "low")]
    code = run([*runs, "--prompt", "a square", "--image", image, "--out", str(tmp_path), "--compare", *SIZE])
    assert code == 0
    files = capsys.readouterr().out.split()
    assert [Path(file).name for file in files] == ["00.mp4", "00_base.mp4", "sheet.png"]
    assert all(probe_video(Path(file)).frames == 5 for file in files[:2])


def test_an_image_for_each_prompt_or_one_for_all(finished, tmp_path):
    image = str(finished / "first.png")
    prompts = [word for text in "abc" for word in ("--prompt", text)]
    with pytest.raises(ConfigError, match="2 images for 3 prompts"):
        run([str(finished / "runs" / "high"), *prompts, "--image", image, "--image", image, *SIZE])
    assert run([str(finished / "runs" / "high"), *prompts, "--image", image, "--out", str(tmp_path), *SIZE]) == 0
    assert len(list(tmp_path.glob("*.mp4"))) == 3


def test_a_model_that_goes_on_from_an_image_asks_for_it(finished):
    with pytest.raises(ConfigError, match="has no first frame"):
        run([str(finished / "runs" / "high"), "--prompt", "a", *SIZE])


def test_options_of_language_models_are_refused_by_name(finished):
    with pytest.raises(ConfigError, match="--tokens, --top-p: the adapter is of a video model"):
        run([str(finished / "runs" / "high"), "a square", "--tokens", "3", "--top-p", "1"])
