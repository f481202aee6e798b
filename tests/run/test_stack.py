"""Several adapters on one network: what PEFT and diffusers make of them together, as one adapter."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from peft import PeftModel
from torch import Tensor, nn
from torch.testing import assert_close

from tests.run.test_few_step_sampling import FOUR, SCHEDULERS, few, padded, with_times
from tests.run.test_sampling import ROUNDING, shot
from tests.small import make_wan
from weft.cli.merge import run as merge
from weft.cli.sample import arguments_of, run, shots_of, strengths
from weft.contracts import Denoise
from weft.errors import ConfigError, ModelError
from weft.few_steps import StepList
from weft.formats.adapter_file import STEP_LIST, SavedAdapter
from weft.formats.peft import PeftFolder
from weft.formats.reading import read_adapter
from weft.run.apply import apply_adapters, choose
from weft.run.sampling import denoise
from weft.run.shots import Shot, encoded

ATTENTION = tuple(f"blocks.{i}.attn{j}.to_{name}" for i in (0, 1) for j in (1, 2) for name in "qkv")
FFN = ("blocks.0.ffn.net.0.proj", "blocks.1.ffn.net.2")
CONV = "patch_embedding"
CONFIG = {"samples": {"prompts": ["a red circle"], "frames": 5, "width": 48, "height": 32, "steps": 7, "guidance": 3.0}}
SIZE = ["--frames", "5", "--width", "32", "--height", "32"]
# Sums over another order of the same products; the network's outputs are of size 1.
REORDERED: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def lora(network: nn.Module, paths: tuple[str, ...], rank: int, alpha: float, seed: int, **facts: Any) -> SavedAdapter:
    """Random factors that change the network visibly, with a convolution where conv_rank is given."""
    chance, modules = torch.Generator().manual_seed(seed), dict(network.named_modules())
    tensors: dict[str, Tensor] = {}
    for path in paths:
        weight: Any = modules[path].weight
        own_rank = facts["conv_rank"] if weight.dim() > 2 else rank
        ones = (1,) * (weight.dim() - 2)
        tensors[f"{path}.lora_A.weight"] = 0.3 * torch.randn(own_rank, *weight.shape[1:], generator=chance)
        tensors[f"{path}.lora_B.weight"] = 0.3 * torch.randn(len(weight), own_rank, *ones, generator=chance)
    return SavedAdapter(tensors, rank, alpha, targets=paths, **facts)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_wan(tmp_path_factory.mktemp("stack") / "model")


@pytest.fixture(scope="module")
def network(base) -> nn.Module:
    return WanPipeline.from_pretrained(base).transformer


@pytest.fixture(scope="module")
def adapters(network, base) -> list[SavedAdapter]:
    """A student on attention and a convolution, and a concept on attention and ffn: other ranks, alphas, scalings."""
    config = {"name": "student", "family": {"kind": "wan", "source": str(base)}, **CONFIG}
    headed = {STEP_LIST: FOUR.to_json(), "weft.config": json.dumps(config), "weft.step": "9"}
    student = lora(network, (*ATTENTION, CONV), 4, 6.0, 1, metadata=headed, conv_rank=3, conv_alpha=2.0)
    return [student, lora(network, (*ATTENTION[:6], *FFN), 2, 3.0, 2, rslora=True)]


@pytest.fixture(scope="module")
def folders(adapters, tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [PeftFolder().write(root / name, one) for name, one in zip(("student", "concept"), adapters, strict=True)]


def question() -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 16, 2, 4, 6, generator=chance),
        "timestep": torch.tensor([937.5, 625.0]),
        "encoder_hidden_states": torch.randn(2, 5, 128, generator=chance),
    }


@torch.no_grad()
def ours(paths: list[Path], base: Path, strength: Any = 1.0) -> Tensor:
    model = apply_adapters(paths, str(base), "cpu", "fp32", strength)
    asked = question()
    told = {"text": asked["encoder_hidden_states"], "text_mask": torch.ones(2, 5, dtype=torch.bool)}
    with model.use():
        return model.model.velocity(Denoise(asked["hidden_states"], asked["timestep"] / 1000, told))


@torch.no_grad()
def by_peft(folders: list[Path], base: Path, weights: list[float] | None = None) -> Tensor:
    """Both adapters at work in one PeftModel; with weights PEFT's own sum of them."""
    plain = WanPipeline.from_pretrained(base).transformer
    model = PeftModel.from_pretrained(plain, folders[0], adapter_name="a")
    model.load_adapter(folders[1], adapter_name="b")
    if weights is None:
        model.base_model.set_adapter(["a", "b"])
    else:
        model.base_model.add_weighted_adapter(["a", "b"], weights, "sum", combination_type="cat")
        model.base_model.set_adapter("sum")
    asked = question()
    text = torch.cat([padded(one) for one in asked["encoder_hidden_states"]])
    return model(**{**asked, "encoder_hidden_states": text}, return_dict=False)[0]


def test_two_adapters_on_one_network_change_it_by_the_sum_of_their_changes(folders, base):
    together = ours(folders, base)
    assert_close(together, by_peft(folders, base), **REORDERED)
    assert_close(ours(folders[::-1], base), together, **REORDERED)
    for alone in folders:
        assert (ours([alone], base) - together).abs().max() > 1e-2


def test_each_adapter_has_its_own_strength_or_all_have_one(folders, base):
    """PEFT's "cat" puts factors side by side too, with the weights in them."""
    for strength, weights in (((1.0, 0.8), [1.0, 0.8]), (0.5, [0.5, 0.5])):
        assert_close(ours(folders, base, strength), by_peft(folders, base, weights), **REORDERED)


def test_a_merged_stack_is_one_file_that_diffusers_samples_as_weft_samples_both(folders, base, tmp_path, capsys):
    out = tmp_path / "out"
    assert merge(["--stack", *map(str, folders), "--weights", "1,0.8", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "rank 6 on 15 layers: the exact sum" in said
    assert "4 steps at 1, 0.9375, 0.8333, 0.625 (shift 5), guidance 1" in said
    for file in (out, out / "pytorch_lora_weights.safetensors"):
        made = read_adapter(file)
        assert made.step_list == FOUR and (made.rank, made.conv_rank, made.scale) == (6, 3, 1.0)
        told = json.loads(made.metadata["weft.merged"])
        assert told["method"] == "sum of changes" and [one["share"] for one in told["parents"]] == [1.0, 0.8]
    assert_close(ours([out], base), ours(folders, base, (1.0, 0.8)), **REORDERED)
    one, applied = few(), apply_adapters(folders, str(base), "cpu", "fp32", (1.0, 0.8))
    told = encoded([one], applied.model.family, applied.encoders)
    pipeline = WanPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(out)
    theirs = pipeline(
        prompt_embeds=padded(told.texts[one.prompt]["text"]), latents=one.noise(applied.model.family.geometry()),
        max_sequence_length=64, **with_times(pipeline, SCHEDULERS["lcm"](5.0), one),
    )[0]  # fmt: skip
    with applied.use():
        assert_close(denoise(applied.model, applied.engine, [one], told), theirs, **ROUNDING)


def test_a_layer_that_one_adapter_alone_has_keeps_its_change_at_the_common_rank(adapters, folders, tmp_path):
    merge(["--stack", *map(str, folders), "--out", str(tmp_path / "out")])
    made = read_adapter(tmp_path / "out")
    for path in made.paths:
        expected = sum(
            one.scale_at(path) * one.tensors[f"{path}.lora_B.weight"].flatten(1)
            @ one.tensors[f"{path}.lora_A.weight"].flatten(1)
            for one in adapters if path in one.paths
        )  # fmt: skip
        a, b = (made.tensors[f"{path}.lora_{half}.weight"].flatten(1) for half in "AB")
        assert len(a) == (3 if path == CONV else 6)
        assert_close(b @ a, expected, rtol=1e-5, atol=1e-6)


def test_runs_on_both_experts_are_stacked_expert_by_expert(adapters, tmp_path, capsys):
    for of, one in (("student", adapters[0]), ("concept", adapters[1])):
        for name in ("high", "low"):
            saved = replace(one, metadata={"weft.expert": name})
            PeftFolder().write(tmp_path / of / f"adapter_{name}", saved)
    runs, out = [str(tmp_path / run) for run in ("student", "concept")], tmp_path / "out"
    assert merge(["--stack", *runs, "--out", str(out)]) == 0
    assert "expert high\n" in capsys.readouterr().out
    for name in ("high", "low"):
        made = read_adapter(out / f"adapter_{name}")
        assert (made.rank, made.metadata["weft.expert"]) == (6, name)
        assert (out / f"adapter_{name}" / "pytorch_lora_weights.safetensors").is_file()
    high_alone = str(tmp_path / "concept" / "adapter_high")
    merge(["--stack", runs[0], high_alone, "--out", str(tmp_path / "some")])
    assert [read_adapter(tmp_path / "some" / f"adapter_{name}").rank for name in ("high", "low")] == [6, 4]
    unsaid = str(PeftFolder().write(tmp_path / "unsaid", adapters[1]))
    with pytest.raises(ModelError, match="unsaid does not say which expert it is for"):
        merge(["--stack", runs[0], unsaid, "--out", str(tmp_path / "never")])
    merge(["--average", *runs[:1], runs[0], "--out", str(tmp_path / "mean")])
    assert read_adapter(tmp_path / "mean" / "adapter_low").rank == 8
    with pytest.raises(ModelError, match="for an expert that not every one of the 2 has an adapter for"):
        merge(["--average", runs[0], str(tmp_path / "student" / "adapter_high"), "--out", str(tmp_path / "never")])


def test_a_stack_counts_by_block_where_it_is_told_to(adapters, folders, tmp_path):
    merge(["--stack", *map(str, folders), "--blocks", "0=0.5,1-=0", "--out", str(tmp_path / "out")])
    made = read_adapter(tmp_path / "out")
    assert CONV in made.paths and not any(path.startswith("blocks.1") for path in made.paths)
    assert json.loads(made.metadata["weft.merged"])["blocks"] == "0=0.5,1-=0"
    for path in made.paths:
        share = 1.0 if path == CONV else 0.5
        expected = sum(
            share * one.scale_at(path) * one.tensors[f"{path}.lora_B.weight"].flatten(1)
            @ one.tensors[f"{path}.lora_A.weight"].flatten(1)
            for one in adapters if path in one.paths
        )  # fmt: skip
        a, b = (made.tensors[f"{path}.lora_{half}.weight"].flatten(1) for half in "AB")
        assert_close(made.scale_at(path) * b @ a, expected, rtol=1e-5, atol=1e-6)


def test_an_average_of_a_student_with_another_adapter_is_refused_for_a_stack(folders, adapters, tmp_path):
    concept = PeftFolder().write(tmp_path / "concept", replace(adapters[0], metadata={}))
    with pytest.raises(ModelError, match=r"concept is no few-step student.*weft merge --stack"):
        merge(["--average", str(folders[0]), str(concept), "--out", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="--stack: a sum needs two adapters"):
        merge(["--stack", str(concept), "--out", str(tmp_path / "out")])


def test_students_of_other_steps_are_refused_together(adapters, tmp_path):
    two = [
        PeftFolder().write(tmp_path / str(steps), replace(adapters[0], metadata={STEP_LIST: text}))
        for steps, text in ((4, FOUR.to_json()), (2, StepList.of(2, 3.0).to_json()))
    ]
    for refused in (lambda: choose(two, "tiny-wan"), lambda: merge(["--stack", *map(str, two), "--out", "out"])):
        with pytest.raises(
            ModelError, match=r"distilled for other steps: 4 steps at .*, and 2 steps at 1, 0.75 \(shift"
        ):
            refused()
    damaged = PeftFolder().write(tmp_path / "damaged", replace(adapters[0], metadata={STEP_LIST: "[1]"}))
    with pytest.raises(ModelError, match=r"damaged: 'weft\.step_list' in its header is damaged"):
        choose([damaged], "tiny-wan")


def test_kinds_that_have_no_sum_are_refused_by_name_before_weights_are_read(adapters, folders, tmp_path):
    magnitudes = {f"{path}.lora_magnitude_vector": torch.ones(24) for path in adapters[0].paths}
    dora = replace(adapters[0], tensors={**adapters[0].tensors, **magnitudes}, dora=True, metadata={})
    blocks = {"blocks.0.attn1.to_q.lokr_w1": torch.ones(4, 4), "blocks.0.attn1.to_q.lokr_w2": torch.ones(6, 6)}
    lokr = SavedAdapter(blocks, 4, 4.0, kind="lokr", options={"decompose_factor": 4, "decompose_both": False})
    for name, one in (("DoRA", dora), ("lokr", lokr)):
        other = PeftFolder().write(tmp_path / name, one)
        with pytest.raises(ModelError, match=rf"{name} is of kind {name}.*Only LoRA adapters can be added up"):
            choose([folders[0], other], "no such base")
        with pytest.raises(ModelError, match=f"is of kind {name}"):
            merge(["--stack", str(folders[0]), str(other), "--out", str(tmp_path / "out")])


def test_two_states_of_one_run_are_refused_since_what_it_learned_would_count_twice(adapters, folders, tmp_path):
    later = replace(adapters[0], metadata={**adapters[0].metadata, "weft.step": "10"})
    with pytest.raises(ModelError, match="are both for the same network and of one run"):
        choose([folders[0], PeftFolder().write(tmp_path / "later", later)], "tiny-wan")


def test_the_base_is_that_of_the_adapter_which_says_one(folders, base):
    """A concept from another program names no base and no prompts; the student beside it does."""
    for paths in (folders, folders[::-1]):
        chosen = choose(paths, None)
        assert chosen.family.source == str(base) and chosen.config["name"] == "student"
        assert chosen.step_list == FOUR and chosen.students == ("default",)


def test_an_adapter_trained_on_another_base_is_noted_beside_one_of_this_base(adapters, base, tmp_path):
    other = make_wan(tmp_path / "other", layers=3)  # has the layers, and other weights
    paths = []
    for name, source in (("here", base), ("there", other)):
        config = {"name": name, "family": {"kind": "wan", "source": str(source)}}
        family = choose_family(source)
        headed = {"weft.config": json.dumps(config), "weft.base": family.identity()["network"]}
        paths.append(PeftFolder().write(tmp_path / name, replace(adapters[1], metadata=headed)))
    assert apply_adapters(paths[:1], None, "cpu", "fp32", 1.0).trained_here
    assert not apply_adapters(paths, None, "cpu", "fp32", 1.0).trained_here


def test_the_experts_of_a_model_may_be_changed_on_other_layers(adapters, tmp_path):
    pair = make_wan(tmp_path / "pair", kind="experts")
    paths = [
        PeftFolder().write(tmp_path / name, replace(one, metadata={"weft.expert": name}))
        for name, one in zip(("high", "low"), adapters, strict=True)
    ]
    config = {"name": "both", "family": {"kind": "wan", "source": str(pair), "expert": "both"}}
    more = replace(adapters[1], metadata={"weft.expert": "high", "weft.config": json.dumps(config)})
    paths.append(PeftFolder().write(tmp_path / "more", more))
    made = apply_adapters(paths, None, "cpu", "fp32", 1.0).model.adapters
    names = {key.rpartition(".lora_")[0] for key in made.parameters("high")}
    assert names == {*adapters[0].paths, *adapters[1].paths} and made.names == ("high", "low")
    assert {key.rpartition(".lora_")[0] for key in made.parameters("low")} == set(adapters[1].paths)


def choose_family(source: Path) -> Any:
    from weft import plugins

    return plugins.section_types("family")["wan"](source=str(source))


# ---- weft sample --------------------------------------------------------------------------------------------------


def asked(folders: list[Path], *options: str) -> dict[bool, list[Shot]]:
    arguments = arguments_of([*map(str, folders), *options])
    arguments.prompt = arguments.prompt or []
    return shots_of(choose(folders, None), arguments)


def test_a_student_is_sampled_by_its_header_beside_a_base_as_the_run_sampled_it(folders, capsys):
    made = asked(folders[:1], "--steps", "4", "--compare", "--seed", "3")
    (student,), (teacher,) = made[True], made[False]
    assert (student.step_list, student.steps, student.guidance, student.seed) == (FOUR, 4, 1.0, 3)
    assert (teacher.step_list, teacher.steps, teacher.guidance, teacher.seed) == (None, 7, 3.0, 3)
    assert capsys.readouterr().err == "note: the base is sampled in 7 steps with guidance 3, as in the training run.\n"
    assert asked(folders[:1]) == {True: [replace(student, seed=0)]} and not capsys.readouterr().err


def test_other_steps_keep_the_shift_and_another_guidance_is_obeyed_both_with_a_note(folders, capsys):
    ((one,),) = asked(folders[:1], "--steps", "2", "--guidance", "2.5").values()
    assert (one.step_list, one.steps, one.guidance) == (StepList.of(2, 5.0), 2, 2.5)
    said = capsys.readouterr().err
    assert (
        "was distilled for 4 steps at 1, 0.9375, 0.8333, 0.625 (shift 5); it is asked in 2 steps at 1, 0.8333" in said
    )
    assert "note: the adapter was distilled for guidance 1; guidance 2.5 asks it twice a step." in said
    with pytest.raises(ConfigError, match="--steps: expected a whole number of at least 1, got 0"):
        asked(folders[:1], "--steps", "0")


def test_an_adapter_that_is_no_student_is_sampled_as_ever(adapters, base, tmp_path):
    config = {"name": "plain", "family": {"kind": "wan", "source": str(base)}, **CONFIG}
    plain = replace(adapters[1], metadata={"weft.config": json.dumps(config)})
    made = asked([PeftFolder().write(tmp_path / "plain", plain)], "--steps", "9", "--compare")
    assert made[True] == made[False] == [shot(negative="", steps=9, guidance=3.0, seed=0)]


def test_the_expert_without_a_student_keeps_its_guidance_and_that_is_said(adapters, tmp_path, capsys):
    pair = make_wan(tmp_path / "pair", kind="experts")
    config = {"name": "high", "family": {"kind": "wan", "source": str(pair), "expert": "high"}, **CONFIG}
    headed = {STEP_LIST: FOUR.to_json(), "weft.config": json.dumps(config), "weft.expert": "high"}
    high = PeftFolder().write(tmp_path / "high", replace(adapters[0], metadata=headed))
    low = PeftFolder().write(tmp_path / "low", replace(adapters[0], metadata={**headed, "weft.expert": "low"}))
    ((one,),) = asked([high]).values()
    assert (one.guidance, one.guidance_low) == (1.0, 3.0)
    assert "expert low has no few-step adapter" in capsys.readouterr().err
    ((one,),) = asked([high, low]).values()
    assert (one.guidance, one.guidance_low) == (1.0, 1.0) and not capsys.readouterr().err


def test_strengths_are_one_number_or_one_for_each_adapter():
    assert strengths("0.5", 2) == [0.5, 0.5] and strengths("1,0.8", 2) == [1.0, 0.8]
    for text, adapters in (("1,2", 1), ("1,2,3", 2), ("strong", 2)):
        with pytest.raises(ConfigError, match=f"--strength: expected one number.*got '{text}'"):
            strengths(text, adapters)


def test_sample_takes_a_student_and_a_concept_together(folders, tmp_path, capsys):
    words = [*map(str, folders), "--strength", "1,0.8", "--steps", "4", "--compare", "--out", str(tmp_path / "out")]
    assert run([*words, *SIZE, "--device", "cpu"]) == 0
    files = capsys.readouterr().out.split()
    assert [Path(file).name for file in files] == ["00.mp4", "00_base.mp4", "sheet.png"]
    assert Path(files[0]).read_bytes() != Path(files[1]).read_bytes()
