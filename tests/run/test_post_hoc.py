"""Moving averages after the fact: against closed forms, and against the average that a run itself would have kept."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.small import config_of
from weft.cli.merge import run as merge
from weft.errors import ConfigError, ModelError
from weft.formats.adapter_file import SavedAdapter
from weft.formats.peft import PeftFolder
from weft.formats.reading import read_adapter
from weft.run.moving_average import MovingAverage
from weft.run.post_hoc import Profile, averaged, found_snapshots, gamma_of
from weft.run.start import train_run

PATHS = ("blocks.0.attn1.to_q", "blocks.1.ffn.net.2")


@pytest.mark.parametrize(("sigma", "gamma"), [(0.05, 16.97), (0.10, 6.94), (0.15, 3.558), (0.20, 1.826), (0.25, 0.720)])
def test_gamma_is_that_of_the_paper(sigma, gamma):
    """arXiv:2312.02696, section 3.1, and the cubic of its appendix C."""
    found = gamma_of(sigma)
    assert found == pytest.approx(gamma, abs=5e-3)
    assert found**3 + 7 * found**2 + (16 - sigma**-2) * found + 12 - sigma**-2 == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("sigma", [0.08, 0.2])
def test_sigma_is_the_standard_deviation_of_the_profile(sigma):
    gamma = gamma_of(sigma)
    t = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    whole, mean, square = (float(torch.trapezoid(t ** (gamma + n), t)) for n in (0, 1, 2))
    assert (square / whole - (mean / whole) ** 2) ** 0.5 == pytest.approx(sigma, rel=1e-6)


def test_shares_are_the_profiles_integral_over_the_steps_that_each_adapter_stands_for():
    shares = Profile(gamma=2.0).shares([10, 20, 40])
    assert shares == pytest.approx([(1 / 4) ** 3, (1 / 2) ** 3 - (1 / 4) ** 3, 1 - (1 / 2) ** 3])
    assert Profile(decay=0.5).shares([1, 2, 4]) == pytest.approx([1 / 8, 1 / 8, 3 / 4])
    assert sum(Profile(gamma=3.558).shares(range(1, 1000))) == pytest.approx(1)


def test_the_shares_are_those_of_the_power_averages_own_recursion():
    """arXiv:2312.02696, eq. 4: each step keeps (1 - 1/t)^(gamma + 1) of the average."""
    gamma, kept = 3.558, [0.0]
    for t in range(1, 8):
        beta = (1 - 1 / t) ** (gamma + 1)
        kept = [beta * share for share in kept] + [1 - beta]
    assert Profile(gamma=gamma).shares(range(1, 8)) == pytest.approx(kept[1:])
    assert kept[1] > 0  # the oldest counts; musubi-tuner's tool begins its recursion one later, and drops it


# ---- From files ----------------------------------------------------------------------------------------------------


def adapter(step: int, **facts: Any) -> SavedAdapter:
    chance = torch.Generator().manual_seed(step)
    tensors = {}
    for path in PATHS:
        tensors[f"{path}.lora_A.weight"] = torch.randn(3, 12, generator=chance)
        tensors[f"{path}.lora_B.weight"] = torch.randn(9, 3, generator=chance)
    metadata = {"weft.step": str(step), "weft.base": "abc", "weft.family": "wan"}
    return SavedAdapter(tensors, 3, 6.0, **{"metadata": metadata, **facts})


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's folder with adapters of three steps, written in another order."""
    for step in (100, 20, 40):
        PeftFolder().write(tmp_path / "run" / f"global_step_{step}", adapter(step))
    return tmp_path / "run"


def test_parameters_are_averaged_in_the_order_of_steps_and_not_of_files(run, tmp_path, capsys):
    assert merge(["--ema", str(run), "--sigma-rel", "0.2", "--out", str(tmp_path / "out")]) == 0
    shares = Profile(gamma=gamma_of(0.2)).shares([20, 40, 100])
    made = read_adapter(tmp_path / "out")
    assert (made.rank, made.alpha) == (3, 6.0)
    for name, tensor in made.tensors.items():
        expected = sum(share * adapter(step).tensors[name] for share, step in zip(shares, (20, 40, 100), strict=True))
        assert_close(tensor, expected, rtol=1e-6, atol=1e-6)
    said = capsys.readouterr().out
    assert f"{shares[0]:7.2%}  step 20" in said and f"{shares[2]:7.2%}  step 100" in said and "gamma 1.826" in said
    told = json.loads(made.metadata["weft.merged"])
    assert [each["step"] for each in told["parents"]] == [20, 40, 100] and told["sigma_rel"] == 0.2
    assert made.metadata["weft.step"] == "100"
    named = [str(run / f"global_step_{step}") for step in (100, 40, 20)]
    merge(["--ema", *named, "--sigma-rel", "0.2", "--out", str(tmp_path / "named")])
    for name, tensor in read_adapter(tmp_path / "named").tensors.items():
        assert torch.equal(tensor, made.tensors[name])


def test_other_kinds_are_averaged_too_and_every_expert_by_itself(tmp_path):
    for step in (1, 2, 3):
        for expert in ("high", "low"):
            blocks = {"blocks.0.attn1.to_q.lokr_w1": torch.full((4, 4), float(step)),
                      "blocks.0.attn1.to_q.lokr_w2": torch.ones(6, 6)}  # fmt: skip
            told = {"weft.step": str(step), "weft.expert": expert}
            options = {"decompose_factor": 4, "decompose_both": False}
            saved = SavedAdapter(blocks, 4, 4.0, kind="lokr", options=options, metadata=told)
            PeftFolder().write(tmp_path / "run" / f"global_step_{step}_{expert}", saved)
    merge(["--ema", str(tmp_path / "run"), "--decay", "0.5", "--out", str(tmp_path / "out")])
    for expert in ("high", "low"):
        made = read_adapter(tmp_path / "out" / f"adapter_{expert}")
        expected = torch.full((4, 4), 1 / 4 + 2 / 4 + 3 / 2)
        assert_close(made.tensors["blocks.0.attn1.to_q.lokr_w1"], expected)


def test_a_decay_is_the_moving_average_that_weft_keeps_while_it_trains(tmp_path):
    """Both begin at the first saved weights: the online one averages from the step after."""
    parameters = {name: nn.Parameter(tensor.clone()) for name, tensor in adapter(1).tensors.items()}
    online, folders = MovingAverage(decay=0.8, start=1), []
    for step in range(1, 13):
        saved = adapter(step)
        for name, parameter in parameters.items():
            parameter.data.copy_(saved.tensors[name])
        online.update(step, parameters)
        folders.append(PeftFolder().write(tmp_path / str(step), saved))
    (group,) = found_snapshots(folders).values()
    made = averaged(group, Profile(decay=0.8), {"decay": 0.8}).adapter
    for name, tensor in made.tensors.items():
        assert_close(tensor, online.tensors[name], rtol=1e-6, atol=1e-6)


def silent(event: object) -> None:
    """Nobody listens."""


@pytest.mark.slow
def test_it_is_what_a_run_with_a_moving_average_would_have_saved(plain, tmp_path):
    """Two runs alike, one with the average: training is not changed by it."""
    quick = {**plain, "schedule": {"steps": 4, "warmup": 0}, "validation": {"every": 0}, "adapter": {
        "kind": "lora", "backend": "native", "rank": 2, "targets": "attention"}}  # fmt: skip
    saving = config_of({**quick, "name": "saving", "save": {"every": 1, "keep": 9}})
    keeping = config_of({**quick, "name": "keeping", "save": {"every": 0}, "ema": {"decay": 0.7, "start": 1}})
    for config in (saving, keeping):
        train_run(config, silent)
    out = tmp_path / "out"
    merge(["--ema", str(saving.folder), "--decay", "0.7", "--out", str(out)])
    made, online = read_adapter(out), read_adapter(keeping.folder / "adapter")
    last = read_adapter(saving.folder / "adapter")
    for name, tensor in made.tensors.items():
        assert_close(tensor, online.tensors[name], rtol=1e-6, atol=1e-8)  # sums in fp64 here, in fp32 there
    assert any((tensor - last.tensors[name]).abs().max() > 1e-5 for name, tensor in made.tensors.items())


# ---- What is refused -----------------------------------------------------------------------------------------------


REFUSED = {
    "no step": ({"metadata": {}}, "does not say in its header at which step it was saved"),
    "twice": ({"metadata": {"weft.step": "20", "weft.base": "abc", "weft.family": "wan"}}, "are both of step 20"),
    "base": (
        {"metadata": {"weft.step": "60", "weft.base": "x", "weft.family": "wan"}},
        "are not of one run: weft.base",
    ),
    "alpha": ({"alpha": 3.0}, "the mean of their parameters means nothing. To average changes: weft merge --average"),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=list(REFUSED))
def test_adapters_that_are_not_of_one_run_are_refused(change, words, run, tmp_path):
    odd = PeftFolder().write(tmp_path / "odd", replace(adapter(60), **change))
    with pytest.raises(ModelError, match=words):
        merge(["--ema", str(run), str(odd), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sigma-rel", "0.3"], "--sigma-rel: expected a width above 0 and below 0.289"),
        (["--decay", "1"], "--decay: expected a number between 0 and 1"),
        (["--decay", "0.9", "--sigma-rel", "0.1"], "are two profiles of an average"),
        (["--rank", "2"], "--rank goes with --average and --stack, and not with --ema"),
        (["--weights", "2"], "--weights goes with --into and --average and --stack, and not with --ema"),
    ],
)
def test_impossible_profiles_and_options_of_other_ways_are_refused(options, words, run, tmp_path):
    with pytest.raises(ConfigError, match=words):
        merge(["--ema", str(run), "--out", str(tmp_path / "out"), *options])


def test_one_saved_adapter_is_no_average_and_averages_of_averages_are_noted(run, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"needs two saved adapters at least, and there is one, .*global_step_20"):
        merge(["--ema", str(run / "global_step_20"), "--out", str(tmp_path / "out")])
    told = {**adapter(200).metadata, "weft.config": json.dumps({"ema": {"decay": 0.99}})}
    PeftFolder().write(run / "global_step_200", replace(adapter(200), metadata=told))
    merge(["--ema", str(run), "--out", str(tmp_path / "out")])
    assert "the run kept a moving average itself (decay 0.99)" in capsys.readouterr().err
