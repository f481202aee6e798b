"""Two experts in one run: turns, adapters of their own, samples by both, resume to the bit, and one on the device."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from torch.testing import assert_close

from tests.run.test_resume import silent
from tests.run.test_sampling import ROUNDING, shot
from tests.small import config_of, make_clips, make_wan, plain_config
from weft.contracts import Expert
from weft.errors import ConfigError, ModelError
from weft.formats.reading import read_adapter
from weft.run.apply import apply_adapters
from weft.run.config import RunConfig
from weft.run.listeners import read_steps
from weft.run.sampling import denoise, expert_at
from weft.run.shots import encoded
from weft.run.start import train_run

SAMPLES = {"prompts": ["a square"], "frames": 9, "width": 64, "height": 64, "steps": 4, "guidance": 1.0}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pair")
    make_wan(root / "model", kind="experts")
    make_clips(root / "clips")
    return root


@pytest.fixture
def plain(pair: Path, tmp_path: Path) -> dict[str, Any]:
    config = plain_config(tmp_path, pair / "model", pair / "clips")
    config["data"]["cache_folder"] = str(pair / "cache")
    config["family"]["expert"] = "both"
    config["objective"] |= {"turn": 2}
    config["validation"] = {"every": 4}
    return config


def run(plain: dict[str, Any], **change: Any) -> RunConfig:
    config = config_of(plain, **change)
    train_run(config, silent)
    return config


def losses(config: RunConfig) -> dict[int, dict[str, float]]:
    steps = read_steps(config.folder / "events.rank0.jsonl")
    return {step: {k: v for k, v in row["metrics"].items() if k.endswith("loss")} for step, row in steps.items()}


@pytest.fixture(scope="module")
def finished(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of 8 steps, turns of 2, whose weights move far enough to be seen in samples."""
    config = plain_config(tmp_path_factory.mktemp("finished"), pair / "model", pair / "clips")
    config["data"]["cache_folder"] = str(pair / "cache")
    config["family"]["expert"] = "both"
    return run(
        config, objective={"turn": 2}, schedule={"steps": 8, "warmup": 0}, optimizer={"lr": 3e-2}, samples=SAMPLES,
        validation={"every": 4},
    )  # fmt: skip


def test_metrics_and_optimizers_are_each_experts_own(finished):
    steps = read_steps(finished.folder / "events.rank0.jsonl")
    for step, row in steps.items():
        name, other = ("high", "low") if (step - 1) // 2 % 2 == 0 else ("low", "high")
        assert {f"{name}/loss", f"{name}/lr", f"{name}/grad_norm"} <= row["metrics"].keys()
        assert not any(key.startswith(other) for key in row["metrics"])


def test_the_second_experts_learning_rate_has_its_own_curve(plain):
    config = run(plain, schedule={"steps": 8, "warmup": 2, "curve": "linear", "floor": 0.0}, objective={"turn": 4})
    steps = read_steps(config.folder / "events.rank0.jsonl")
    rates = {
        name: [row["metrics"][f"{name}/lr"] for row in steps.values() if f"{name}/lr" in row["metrics"]]
        for name in ("high", "low")
    }
    assert rates["high"] == rates["low"] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 0.5e-3])


def test_each_expert_has_its_own_adapter_which_says_whose_it_is(finished):
    for name, times in (("high", [0.875, 1.0]), ("low", [0.0, 0.875])):
        adapter = read_adapter(finished.folder / f"adapter_{name}")
        assert adapter.metadata["weft.expert"] == name
        assert json.loads(adapter.metadata["weft.times"]) == times
        assert any(tensor.any() for key, tensor in adapter.tensors.items() if key.endswith("lora_B.weight"))
        assert (finished.folder / f"global_step_8_{name}").is_dir()
    high, low = (read_adapter(finished.folder / f"adapter_{name}").tensors for name in ("high", "low"))
    assert high.keys() == low.keys() and not torch.equal(*(t["blocks.0.attn1.to_q.lora_B.weight"] for t in (high, low)))


def test_validation_measures_both_and_tells_them_apart(finished):
    lines = (finished.folder / "events.rank0.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in lines if '"evaluated"' in line][-1]
    assert set(last["by_expert"]) == {"high", "low"}
    assert last["loss"] == pytest.approx(sum(last["by_expert"].values()) / 2)
    assert len(last["by_time"]) == 10 and "high 0.9375" in last["by_time"]


def test_an_expert_alone_learns_in_its_first_turn_what_it_learns_beside_the_other(plain):
    both = losses(run(plain, name="both", schedule={"steps": 4, "warmup": 0, "curve": "constant"}))
    alone = run(plain, name="alone", family={"expert": "high"}, schedule={"steps": 4, "warmup": 0, "curve": "constant"})
    assert {step: both[step] for step in (1, 2)} == {step: losses(alone)[step] for step in (1, 2)}
    assert (alone.folder / "adapter_high").is_dir() and not (alone.folder / "adapter_low").exists()


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_run_of_two_experts_that_stops_anywhere_goes_on_to_the_bit(plain, stop):
    change = {"schedule": {"steps": 6}, "save": {"every": 1}, "adapter": {"input_dropout": 0.2}, "ema": {"decay": 0.5}}
    whole = run(plain, name="whole", **change)
    config = config_of(plain, name="parts", **change)
    heard: list[Any] = []
    train_run(config, heard.append, stop=lambda: sum(type(e).__name__ == "StepEnded" for e in heard) >= stop)
    assert max(losses(config)) == stop
    train_run(config, silent)
    assert losses(config) == losses(whole)
    for name in ("high", "low"):
        ours, theirs = (read_adapter(c.folder / f"adapter_{name}").tensors for c in (config, whole))
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


def test_one_expert_at_a_time_on_the_device_changes_no_number(plain):
    together = run(plain, name="together", engine={"experts": "together"}, samples=SAMPLES)
    one = run(plain, name="one", engine={"experts": "one"}, samples=SAMPLES)
    assert losses(together) == losses(one)
    files = [(c.folder / "samples" / "step_000006" / "00.mp4").read_bytes() for c in (together, one)]
    assert files[0] == files[1]


def test_each_step_asks_the_noisiest_expert_whose_times_have_begun():
    experts = (Expert("high", (0.875, 1.0)), Expert("low", (0.0, 0.875)))
    assert [expert_at(t, experts) for t in (1.0, 0.875, 0.8749, 0.0)] == ["high", "high", "low", "low"]


def test_samples_of_both_experts_and_their_adapters_are_those_of_diffusers(pair, finished):
    """One guidance for each expert; diffusers calls the high one `transformer` and the low one `transformer_2`."""
    one = shot(guidance=3.0, guidance_low=2.0, steps=6)
    pipeline = WanPipeline.from_pretrained(pair / "model")
    pipeline.set_progress_bar_config(disable=True)
    applied = apply_adapters([finished.folder], None, "cpu", "fp32", 1.0)
    told = encoded([one], applied.model.family, applied.encoders)

    def theirs() -> torch.Tensor:
        def padded(states: torch.Tensor) -> torch.Tensor:
            return torch.cat([states.float(), torch.zeros(64 - len(states), states.shape[1])])[None]

        geometry = applied.model.family.geometry()
        return pipeline(
            prompt_embeds=padded(told.texts[one.prompt]["text"]),
            negative_prompt_embeds=padded(told.texts[one.negative]["text"]),
            height=one.height, width=one.width, num_frames=one.frames, num_inference_steps=one.steps,
            guidance_scale=3.0, guidance_scale_2=2.0, latents=one.noise(geometry), output_type="latent",
            return_dict=False, max_sequence_length=64,
        )[0]  # fmt: skip

    with applied.use(False):
        assert_close(denoise(applied.model, applied.engine, [one], told), theirs(), **ROUNDING)
    pipeline.load_lora_weights(finished.folder / "adapter_high", adapter_name="high")
    pipeline.load_lora_weights(finished.folder / "adapter_low", adapter_name="low", load_into_transformer_2=True)
    with applied.use():
        ours = denoise(applied.model, applied.engine, [one], told)
    assert_close(ours, theirs(), rtol=0, atol=2e-3)  # changes of size 1 through six guided steps
    with applied.use(False):
        assert (ours - denoise(applied.model, applied.engine, [one], told)).abs().max() > 0.05


def test_a_run_on_one_expert_samples_with_the_other_too_and_says_so_when_told_not_to(plain):
    change = {"schedule": {"steps": 2, "warmup": 0}, "validation": {"every": 0}}
    both = run(plain, name="both", family={"expert": "high"}, samples=SAMPLES, **change)
    alone = run(plain, name="alone", family={"expert": "high"}, samples=SAMPLES | {"experts": "trained"}, **change)
    files = [(c.folder / "samples" / "step_000002" / "00.mp4").read_bytes() for c in (both, alone)]
    assert files[0] != files[1]


def test_the_adapters_of_two_runs_are_put_on_one_base_and_two_of_one_expert_are_refused(plain):
    change = {"schedule": {"steps": 2, "warmup": 0}, "validation": {"every": 0}}
    high = run(plain, name="h", family={"expert": "high"}, **change)
    low = run(plain, name="l", family={"expert": "low"}, **change)
    applied = apply_adapters([high.folder, low.folder], None, "cpu", "fp32", 1.0)
    assert applied.model.adapters.names == ("high", "low")
    with pytest.raises(ModelError, match="are both for expert high"):
        apply_adapters([high.folder, high.folder / "global_step_2_high"], None, "cpu", "fp32", 1.0)


def test_a_new_run_goes_on_from_both_adapters_of_an_earlier_one(plain, finished):
    change = {"adapter": {"start_from": str(finished.folder)}, "schedule": {"steps": 2, "warmup": 0}}
    config = run(plain, **change, objective={"turn": 1}, optimizer={"lr": 1e-9})
    for name in ("high", "low"):
        ours, theirs = (read_adapter(c.folder / f"adapter_{name}").tensors for c in (config, finished))
        for key, tensor in theirs.items():
            assert_close(ours[key], tensor, rtol=0, atol=1e-8)


def test_a_model_of_two_experts_asks_which_is_meant(plain):
    with pytest.raises(ConfigError, match=r"family\.expert"):
        run(plain, family={"expert": None})
