"""The verbs on a run that has captions and no clips."""

from pathlib import Path

import pytest
import yaml

from weft.cli.main import main

CAPTIONS = ["a red circle rests in the middle", "a blue square rests at the top"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("\n".join([*CAPTIONS, CAPTIONS[0]]))
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "run",
                "output": str(tmp_path / "runs"),
                "family": {"kind": "wan", "source": "tiny-wan"},
                "adapter": {"kind": "lora", "rank": 2, "targets": "attention"},
                "objective": {"kind": "dmd", "steps": 1, "guidance": 1},
                "optimizer": {"kind": "adamw", "lr": 1e-4},
                "data": {
                    "kind": "prompts",
                    "files": [str(tmp_path / "prompts.txt")],
                    "buckets": {"sizes": [[32, 64]], "frames": [9]},
                    "cache_folder": str(tmp_path / "cache"),
                },
                "engine": {"device": "cpu"},
                "schedule": {"steps": 10},
            }
        )
    )
    return path


def test_a_plan_shows_captions_and_shapes_and_the_cache_is_filled_with_texts(config, capsys):
    assert main(["plan", str(config)]) == 0
    planned = capsys.readouterr().out
    assert all(caption in planned for caption in CAPTIONS)
    assert "  2 captions\n" in planned and "1 caption stands there already" in planned
    assert "9x64x32" in planned and "captions   memory" in planned
    assert "cache: 0 of 3 entries present (0.0 MiB); the missing are texts." in planned  # the empty one too
    assert main(["cache", str(config)]) == 0
    assert "cache: 3 of 3 entries present" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.buckets.upscale=true", "It goes with another kind of data. Here there are: sides, sizes, frames"),
        ("objective={kind: flow-matching}", "'prompts' has captions and no clips"),
        ("data.files=[prompt.txt]", "there is no 'prompt.txt'"),
    ],
)
def test_what_captions_alone_cannot_do_is_refused(config, capsys, override, said):
    assert main(["plan", str(config), override]) == 2
    assert said in capsys.readouterr().err
