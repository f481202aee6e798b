"""What weft plan, the memory ladder and weft bench say of a run that trains several parts of one base."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.learners import learner_of
from tests.small import config_of, make_wan
from weft.cli.bench import largest_shape
from weft.cli.plan import print_plan
from weft.contracts import Model, Rng
from weft.data.buckets import Bucket
from weft.engines.parallel import Layout
from weft.errors import ConfigError
from weft.run.bench import bench, warm_up_of
from weft.run.bench_work import flops_by_phase
from weft.run.config import RunConfig
from weft.run.estimate import Card, Estimate, Held, equal_blocks, held_by_phase
from weft.run.ladder import changed_config
from weft.run.parts import moves_of, ordinal, parts_of, trained_of
from weft.run.plan import Plan, disk_bytes, plan
from weft.run.questions import latents_of, phases_of, told
from weft.run.rehearsal import AskedOnce, LiveBytes
from weft.run.rungs import Need, smaller_moments
from weft.run.shares import adapter_bytes

SMALL = Bucket(frames=9, height=64, width=96, tokens=3 * 4 * 6)
FULL_CRITIC = {"critic": {"adapter": {"kind": "full", "targets": "attention"}}}
GPU = Card(gpu=True, memory=None)


def dmd_config(root: Path, model: Path | str, **change: Any) -> RunConfig:
    """A run on captions alone; of the shipped model or of one of tests/small.py."""
    plain = {
        "name": "run", "output": str(root / "runs"),
        "family": {"kind": "wan", "source": str(model)},
        "adapter": {"kind": "lora", "backend": "native", "rank": 4, "targets": "attention"},
        "objective": {"kind": "dmd"},
        "optimizer": {"kind": "adamw", "lr": 2e-4},
        "data": {"kind": "prompts", "texts": ["a red square", "a blue circle", "a green ring"],
                 "buckets": {"sizes": [[64, 64]], "frames": [9]}, "batch_size": 2, "cache_folder": str(root / "cache")},
        "engine": {"kind": "torch", "device": "cpu", "precision": "fp32"},
        "schedule": {"steps": 100},
    }  # fmt: skip
    return config_of(plain, **change)


def on_clips(config: RunConfig, root: Path) -> RunConfig:
    """The config with data that are never looked for, in place of captions alone."""
    clips = {"kind": "video", "sources": [{"path": str(root)}], "buckets": {"sizes": [[64, 64]], "frames": [9]}}
    return RunConfig.model_validate({**config.resolved(), "data": clips})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan(tmp_path_factory.mktemp("small") / "model", layers=1)


# ---- Memory ---------------------------------------------------------------------------------------------------------


def really_held(config: RunConfig, done: int) -> dict[str, Held]:
    """What the phases of a real step hold, by the objective's own loss."""
    learner, found = learner_of(config), {}
    for phase in phases_of(config):
        batch = told(config, torch.randn(config.data.batch_size, *latents_of(config, SMALL)), "clip")
        rng = Rng(torch.Generator().manual_seed(1), torch.Generator(), config.seed, draw=0, done=done)
        for parameter in learner.model.adapters.parameters(phase.role).values():
            parameter.grad = torch.zeros_like(parameter)
        with learner.model.adapters.use(phase.role), LiveBytes() as live:
            with learner.engine.computing():
                total = learner.objective.loss(phase.name, learner.model, batch, learner.state, rng).total
            kept = live.now
            total.backward()
        found[phase.name] = Held(kept, live.peak)
        del total, batch
    return found


@pytest.mark.parametrize(("change", "tolerance"), [
    ({}, 0.01),
    ({"engine": {"recompute": True}, "roles": FULL_CRITIC}, 0.01),
    ({"engine": {"precision": "bf16"}, "adapter": {"backend": "peft"}, "objective": {"guidance": 1.0}}, 0.05),
])  # fmt: skip
def test_each_phase_is_rehearsed_as_it_goes_rollout_teacher_and_critic_included(small, tmp_path, change, tolerance):
    """Though in the real step the student is left at another of its steps. In bf16 as in tests/run/test_estimate.py."""
    config = dmd_config(tmp_path, small, **change)
    found = held_by_phase(config, SMALL)
    for phase, real in really_held(config, done=1).items():
        assert found[phase].kept == pytest.approx(real.kept, rel=tolerance)
        assert found[phase].peak == pytest.approx(real.peak, rel=tolerance)
    if not change:  # the student's graph waits while critic and teacher are asked; the critic's phase asks nobody then
        assert found["student"].peak > found["critic"].peak


@pytest.mark.parametrize("change", [
    {"objective": {"critic_guidance": 2.0}}, {"engine": {"precision": "bf16"}, "adapter": {"backend": "peft"}},
])  # fmt: skip
def test_a_question_without_a_graph_takes_the_same_each_time_so_it_is_rehearsed_once(
    small, tmp_path, monkeypatch, change
):
    """Twelve questions of a rollout of four steps, a guided teacher and a critic are seven or eight."""
    config, asked = dmd_config(tmp_path, small, **change), []
    forward = type(config.family).forward

    def counted(*args: Any) -> Any:
        asked.append(1)
        return forward(*args)

    monkeypatch.setattr(type(config.family), "forward", counted)
    once = held_by_phase(config, SMALL)
    few = len(asked)
    monkeypatch.setattr(AskedOnce, "velocity", Model.velocity)
    assert held_by_phase(config, SMALL) == once
    assert len(asked) - few > few


def test_a_model_that_takes_a_clean_frame_is_rehearsed_with_one(tmp_path):
    """And with clips, for captions alone give none."""
    model = make_wan(tmp_path / "model", layers=1, kind="ti2v")
    config = on_clips(dmd_config(tmp_path, model, objective={"first_frame": 1.0}), tmp_path)
    found = held_by_phase(config, SMALL)
    for phase, real in really_held(config, 1).items():
        assert found[phase].peak == pytest.approx(real.peak, rel=0.01)


def test_a_long_row_of_blocks_is_rehearsed_in_short_with_all_roles(tmp_path, monkeypatch):
    quick = {"steps": 1, "guidance": 1.0}
    config = dmd_config(tmp_path, make_wan(tmp_path / "five", layers=5), roles=FULL_CRITIC, objective=quick)
    assert equal_blocks(config) == 5
    short = held_by_phase(config, SMALL)
    monkeypatch.setattr("weft.run.estimate.DEPTH", 5)
    assert short == held_by_phase(config, SMALL)


def test_one_gradient_at_a_time_two_moments_each_and_an_average_of_the_student_alone(small, tmp_path):
    config = dmd_config(
        tmp_path, small, ema={"decay": 0.99}, roles={"critic": {"optimizer": {"kind": "adamw8bit", "lr": 1e-5}}}
    )
    trained = {"student": 1000, "critic": 3000}
    weights, gradients, moments, average = 4 * 4000, 4 * 3000, 8 * 1000 + 2 * 3000, 4 * 1000
    assert adapter_bytes(config, trained) == (weights + gradients + moments + average, 0)
    assert adapter_bytes(config, trained, Layout(shard=2)) == ((weights + gradients + moments + average) // 2, 0)


def test_what_a_learner_trains_is_what_was_planned(small, tmp_path):
    config = dmd_config(tmp_path, small, roles=FULL_CRITIC)
    adapters = learner_of(config).model.adapters
    real = {name: sum(p.numel() for p in adapters.parameters(name).values()) for name in adapters.names}
    assert trained_of(config) == real
    assert real == {"student": 8 * 4 * 2 * 24, "critic": 8 * (24 * 24 + 24)}  # A and B against a matrix and a bias


def test_the_ladder_makes_the_moments_of_each_optimizer_smaller(small, tmp_path):
    roles = {"critic": {"optimizer": {"kind": "adamw", "lr": 1e-5}}}
    need = Need(dmd_config(tmp_path, small, roles=roles), SMALL, GPU, {}, Estimate(0, 0, 0, 0), {})
    step = smaller_moments(need, 1)
    assert step and step.changes == dict.fromkeys(["optimizer.kind", "roles.critic.optimizer.kind"], "adamw8bit")
    changed = changed_config(need.config, step.changes)
    assert changed and {changed.optimizer_of(role).kind for role in ("student", "critic")} == {"adamw8bit"}
    assert smaller_moments(replace(need, config=changed), 1) is None


# ---- The plan -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planned(small, tmp_path_factory) -> tuple[RunConfig, Plan, str]:
    """A run whose critic has an adapter and a rate of its own, its plan, and what is printed of it."""
    roles = {"critic": {**FULL_CRITIC["critic"], "optimizer": {"kind": "adamw", "lr": 4e-5}}}
    config = dmd_config(tmp_path_factory.mktemp("planned"), small, roles=roles)
    made, console = plan(config), Console(file=io.StringIO(), width=160, highlight=False)
    print_plan(config, made, console, everything=False)
    return config, made, console.file.getvalue()  # type: ignore[attr-defined]


def test_a_plan_names_each_role_with_its_rate_and_its_steps_and_the_students_own_times(planned):
    _, made, text = planned
    assert made.problems == ()
    assert "student: LoRA scale 1 (rank 4), backend native, lr 0.0002, every 5th step, 20 steps" in text
    assert "critic: full rank, biases too, lr 4e-05, every step, 100 steps" in text
    assert "Steps of the student: 1, 0.9, 0.75, 0.5 (shift 3, the model's own)" in text
    assert "teacher's guidance 4 (u + g (c - u))" in text
    assert "Targets of student" not in text  # both name the same set


def test_a_base_is_held_once_where_three_copies_would_be_three_times_as_much(planned):
    config, _, text = planned
    base, adapters = sum(config.family.weight_bytes("fp32").values()), 4 * sum(trained_of(config).values())
    one, three = (f"{size / 2**20:.1f} MiB" for size in (base + adapters, 3 * base + adapters))
    assert f"the base once and adapters, {one}; with 3 copies of the base they would be {three}" in text


def test_a_step_draws_for_each_of_its_phases(planned):
    """100 critic's and 20 student's steps of 2 captions; an epoch of 3 captions is 2 draws."""
    _, made, text = planned
    assert made.epochs == 120 / 2
    assert made.steps_per_epoch == 2
    assert [part.steps for part in made.parts] == [20, 100]
    assert "100 steps of 2 captions for each part that moves = 60.0 epochs" in text


def test_an_average_is_kept_and_an_adapter_is_written_of_the_student_alone(small, tmp_path):
    """A checkpoint has three numbers for each that is trained, and a fourth for each that is averaged."""
    formats, kept = 2, 1
    config = dmd_config(tmp_path, small, ema={"decay": 0.99}, save={"every": 0})
    checkpoint = 4 * (3 * (1000 + 3000) + 1000)
    assert disk_bytes(config, {"student": 1000, "critic": 3000}, None) == kept * checkpoint + 2 * formats * 4 * 1000


def test_two_experts_have_four_parts_which_move_in_their_own_turns(tmp_path):
    model = make_wan(tmp_path / "experts", kind="experts")
    config = dmd_config(
        tmp_path, model, family={"expert": "both"}, objective={"turn": 10, "student_every": 4}, schedule={"steps": 40}
    )
    parts = {part.role: part for part in parts_of(config, config.family.skeleton())}
    assert list(parts) == ["student_high", "critic_high", "student_low", "critic_low"]
    assert [part.steps for part in parts.values()] == [5, 20, 5, 20]
    assert [part.every for part in parts.values()] == [4, 1, 4, 1]
    assert moves_of(config)["critic_low"][:2] == [10, 11]
    assert [ordinal(n) for n in (1, 2, 3, 4, 11, 22, 113)] == ["1st", "2nd", "3rd", "4th", "11th", "22nd", "113th"]


# ---- The bench ------------------------------------------------------------------------------------------------------


def test_a_bench_times_steps_with_and_without_the_student_apart(small, tmp_path):
    config = dmd_config(tmp_path, small, objective={"student_every": 2, "steps": 1}, data={"batch_size": 1})
    assert warm_up_of(config) == 3
    figures = bench(config, largest_shape(config), 4)
    kinds = figures["kinds"]
    assert {name: kind["steps"] for name, kind in kinds.items()} == {"critic": 2, "critic + student": 2}
    assert kinds["critic + student"]["model_flops"] > 2 * kinds["critic"]["model_flops"]
    assert figures["memory_bytes"]["planned"] > 0


def test_the_flop_of_a_phase_are_those_of_its_questions(small, tmp_path):
    """Two steps are 1 or 2 questions of a rollout, in the mean half of one more than one step is; guidance asks the
    teacher once more. Adapters of rank 1 add little to a question."""
    plain = {"steps": 1, "guidance": 1.0}
    one, two = (
        flops_by_phase(dmd_config(tmp_path, small, adapter={"rank": 1}, objective=objective), SMALL)
        for objective in (plain, {"steps": 2})
    )
    teacher = one["student"] - one["critic"]  # a graph, critic and teacher, against a rollout and a graph
    assert two["critic"] - one["critic"] == pytest.approx(0.5 * teacher, rel=0.03)
    assert two["student"] - one["student"] == pytest.approx(1.5 * teacher, rel=0.03)


def test_two_experts_with_several_parts_are_timed_one_at_a_time(tmp_path):
    model = make_wan(tmp_path / "experts", kind="experts")
    config = dmd_config(tmp_path, model, family={"expert": "both"})
    with pytest.raises(ConfigError, match=r"family\.expert=high"):
        bench(config, SMALL, 1)
