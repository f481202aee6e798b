"""Runs with every kind of adapter: trained, stopped and resumed, averaged, exported, continued and sampled."""

import pytest
import torch

from tests.small import config_of
from weft.cli.sample import run as sample
from weft.errors import ConfigError
from weft.formats.reading import read_adapter
from weft.run.checks import check
from weft.run.plan import plan
from weft.run.start import train_run

SIZE = ["--frames", "5", "--width", "32", "--height", "32", "--steps", "1", "--prompt", "x"]
KINDS = {
    "loha": {"kind": "loha", "rank": 2, "alpha": 4},
    "lokr": {"kind": "lokr", "rank": 2, "factor": 4},
    "oft": {"kind": "oft", "block_size": 4},
    "pissa": {"kind": "lora", "rank": 2, "init": "pissa", "pissa_iterations": None},
    "conv": {"kind": "lora", "rank": 2, "conv_rank": 2, "targets": ["attention", "patch_embedding"]},
}


def silent(event: object) -> None:
    """Nobody listens."""


def settings(plain, kind, **change):
    adapter = {"targets": "attention+ffn", **KINDS[kind]}
    config = {**plain, "adapter": adapter, "ema": {"decay": 0.5}, "validation": {"every": 0}, "save": {"every": 0}}
    return config_of(config, schedule={"steps": 4, "warmup": 0}, **change)


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_stopped_and_resumed_run_exports_what_an_unbroken_one_does(kind, plain, tmp_path):
    whole = settings(plain, kind, name="whole")
    planned = plan(whole)
    assert not planned.problems
    train_run(whole, silent)
    parts = settings(plain, kind, name="parts")
    steps = iter((False, False, True, True))
    assert not train_run(parts, silent, stop=lambda: next(steps)).finished
    assert train_run(parts, silent).finished
    first, second = (read_adapter(run.folder / "adapter") for run in (whole, parts))
    assert first.tensors.keys() == second.tensors.keys() and first.kind == whole.adapter.kind
    assert all(torch.equal(tensor, second.tensors[key]) for key, tensor in first.tensors.items())
    # A PiSSA's file holds the first factors beside the trained ones.
    numbers = sum(tensor.numel() for tensor in first.tensors.values())
    assert numbers == planned.parameters.trainable * (2 if kind == "pissa" else 1)
    assert sample([str(whole.folder), *SIZE, "--out", str(tmp_path / "videos")]) == 0
    if kind != "pissa":  # begins from the base's own weights, and so from no other adapter
        again = settings(plain, kind, name="again")
        adapter = again.adapter.model_copy(update={"start_from": whole.folder})
        train_run(again.model_copy(update={"adapter": adapter}), silent)


def test_an_adapter_of_another_kind_is_no_start(plain, tmp_path):
    from weft.formats.adapter_file import SavedAdapter
    from weft.formats.peft import PeftFolder

    tensors = {"blocks.0.attn1.to_q.oft_R.weight": torch.zeros(6, 6)}
    options = {"oft_block_size": 4, "block_share": False, "use_cayley_neumann": True, "num_cayley_neumann_terms": 5}
    other = PeftFolder().write(tmp_path / "oft", SavedAdapter(tensors, 0, 0.0, kind="oft", options=options))
    with pytest.raises(ConfigError, match=r"is of kind oft .* Write adapter\.kind=oft"):
        check(config_of(plain, adapter={"start_from": str(other)}))


def test_a_format_that_a_kind_has_not_is_refused_in_the_config(plain):
    with pytest.raises(
        ConfigError,
        match=r"save\.formats: an adapter of kind oft on a video model is written as peft, not as diffusers",
    ):
        settings(plain, "oft", save={"formats": ["peft", "diffusers"]})
    with pytest.raises(ConfigError, match="written as peft, comfyui, musubi, not as original"):
        settings(plain, "loha", save={"formats": ["original"]})
    assert settings(plain, "oft").formats == settings(plain, "loha").formats == ("peft",)
    assert settings(plain, "conv").formats == ("peft", "diffusers")


@pytest.mark.parametrize(
    ("adapter", "style", "words"),
    [
        ({"dora": True}, "comfyui", r"written as peft, diffusers, not as comfyui \(adapter\.dora is true\)"),
        (
            {"targets": ["to_q", "patch_embedding"], "conv_rank": 2},
            "musubi",
            r"not as musubi \(adapter\.conv_rank is 2\)",
        ),
    ],
)
def test_a_format_that_cannot_hold_an_adapter_as_it_is_set_is_refused_before_the_run(plain, adapter, style, words):
    with pytest.raises(ConfigError, match=words):
        config_of(plain, adapter=adapter, save={"formats": [style]})
