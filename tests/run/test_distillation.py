"""Whole runs of few-step distillation: what is logged, saved and exported, and resume to the bit within a cycle of
student and critic."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.run.test_resume import STEPS, Killed, assert_same_run, flat, silent, train_in_child
from tests.small import config_of, make_wan, merged, plain_config
from weft.errors import ConfigError, RunError
from weft.events import StepEnded
from weft.few_steps import StepList
from weft.formats.reading import read_adapter
from weft.run.checkpoint import read_checkpoint, whole_state
from weft.run.checkpoint_folders import list_checkpoints
from weft.run.checks import check
from weft.run.config import RunConfig
from weft.run.listeners import read_steps
from weft.run.resuming import resumed_state
from weft.run.start import train_run

EVERY = 3  # steps of the critic to one of the student
CAPTIONS = {
    "kind": "prompts", "texts": ["a square", "a red circle", "a blue ring", "a green square moves right"],
    "buckets": {"sizes": [[64, 64]], "frames": [9]}, "batch_size": 2,
}  # fmt: skip
CRITIC = {
    "adapter": {"kind": "lora", "backend": "native", "rank": 2, "targets": "attention", "input_dropout": 0.1},
    "optimizer": {"kind": "adamw", "lr": 4e-3}, "curve": "linear", "warmup": 2, "floor": 0.1,
}  # fmt: skip
EXACT = {
    "schedule": {"steps": STEPS, "accumulate": 2, "curve": "cosine", "warmup": 1},
    "save": {"every": 1, "keep": 3},
    "adapter": {"input_dropout": 0.1, "rank_dropout": 0.1},
    "ema": {"decay": 0.8},
    "data": {"caption_dropout": 0.3},
    "engine": {"recompute": True},
}


def distilling(root: Path, world: Path, data: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """A run on captions, or on clips, as plain data."""
    plain = plain_config(root, world / "model", world / "clips", **options)
    clips = {**plain["data"], "validation_items": 0}
    plain["data"] = {**(clips if data is None else data), "cache_folder": str(world / "cache")}
    plain["objective"] = {"kind": "dmd", "student_every": EVERY}
    plain["validation"] = {"every": 0}
    return plain


def run(plain: dict[str, Any], **change: Any) -> RunConfig:
    config = config_of(plain, **change)
    train_run(config, silent)
    return config


def metrics(config: RunConfig) -> dict[int, dict[str, float]]:
    steps = read_steps(config.folder / "events.rank0.jsonl")
    return {step: row["metrics"] for step, row in steps.items()}


def state(config: RunConfig) -> dict[str, Any]:
    """Every leaf of the last checkpoint."""
    return flat(whole_state(read_checkpoint(list_checkpoints(config.folder)[-1])))


@pytest.fixture
def plain(world: Path, tmp_path: Path) -> dict[str, Any]:
    return distilling(tmp_path, world, CAPTIONS) | {"roles": {"critic": CRITIC}}


@pytest.fixture(scope="module")
def unbroken(world: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Nine steps in which the student moves three times, with all that chance and memory can have to do with them."""
    plain = distilling(tmp_path_factory.mktemp("distilled"), world, CAPTIONS) | {"roles": {"critic": CRITIC}}
    return run(plain, **EXACT)


# ---- What is logged and saved --------------------------------------------------------------------------------------


def test_student_and_critic_are_logged_under_their_own_names_and_the_student_at_every_kth_step(unbroken):
    each = {"loss", "lr", "grad_norm"}
    for step, row in metrics(unbroken).items():
        expected = {f"critic/{name}" for name in each}
        if step % EVERY == 0:
            expected |= {f"student/{name}" for name in (*each, "distance", "gap")}
        assert row.keys() == expected, step
        assert all(math.isfinite(value) for value in row.values())
        assert all(value > 0 for value in row.values())


def test_each_learning_rate_is_the_configs_curve_over_the_roles_own_steps(unbroken):
    """Trap 40. The critic: 4e-3, two steps of warm-up, then linear to a tenth over seven. The student: 1e-3, one step
    of warm-up, then half a cosine over the two that are left."""
    rows = metrics(unbroken)
    critic = [4e-3 * f for f in (1 / 3, 2 / 3, *(1 - 0.9 * k / 7 for k in range(7)))]
    student = [1e-3 * f for f in (1 / 2, 1.0, (1 + math.cos(math.pi / 2)) / 2)]
    assert [row["critic/lr"] for row in rows.values()] == pytest.approx(critic)
    assert [row["student/lr"] for row in rows.values() if "student/lr" in row] == pytest.approx(student)


def test_a_checkpoint_holds_both_adapters_both_optimizers_and_the_average_of_the_student_alone(unbroken):
    found = state(unbroken)
    places = {tuple(key.split("/")[1:3]) for key in found}
    assert {place for place in places if place[0] in ("adapters", "optimizers", "ema")} == {
        ("adapters", "student"), ("adapters", "critic"), ("optimizers", "student"), ("optimizers", "critic"),
        ("ema", "student"),
    }  # fmt: skip


def test_each_part_has_the_recipe_that_the_config_gives_it(unbroken):
    """The student: rank 4 on attention and ffn. The critic: rank 2 on attention."""
    shapes = {key: t.shape for key, t in state(unbroken).items() if key.endswith("lora_A.weight")}
    for name, rank, layers in (("student", 4, {"attn1", "attn2", "ffn"}), ("critic", 2, {"attn1", "attn2"})):
        own = {key: shape for key, shape in shapes.items() if key.startswith(f"/adapters/{name}/")}
        assert {shape[0] for shape in own.values()} == {rank}
        assert {key.split(".")[2] for key in own} == layers


def test_the_export_is_the_average_of_the_student_alone_and_says_how_it_is_sampled(unbroken):
    found, folder = state(unbroken), unbroken.folder
    adapter = read_adapter(folder / "adapter")
    for key, tensor in adapter.tensors.items():
        assert torch.equal(tensor, found[f"/ema/student/{key}"]), key
    assert StepList.from_json(adapter.metadata["weft.step_list"]) == StepList.of(4, unbroken.family.flow_shift)
    folders = {p.parent.name for p in folder.rglob("adapter_model.safetensors")}
    assert folders == {"adapter", *(f"global_step_{step}" for step in range(1, STEPS + 1))}
    assert all(read_adapter(folder / name).tensors.keys() == adapter.tensors.keys() for name in folders)


def test_both_parts_have_learned(unbroken):
    for name in ("student", "critic"):
        b = [t for key, t in state(unbroken).items() if key.startswith(f"/adapters/{name}/") and "lora_B" in key]
        assert b and all(tensor.any() for tensor in b)  # zero at first


# ---- Resume --------------------------------------------------------------------------------------------------------


def test_kills_anywhere_in_a_cycle_of_student_and_critic_change_no_bit(unbroken, plain):
    """After the first step, right after a student's step, and right before one; the run is resumed each time."""
    config = config_of(plain, **EXACT)
    for last in (1, EVERY, 2 * EVERY - 1):
        with pytest.raises(Killed):
            train_run(config, killing_after(last))
    train_run(config, silent)
    assert_same_run(unbroken.folder, config.folder)


def killing_after(step: int) -> Any:
    def kill(event: object) -> None:
        if isinstance(event, StepEnded) and event.step == step:
            raise Killed

    return kill


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(2))
def test_random_kills_of_a_process_change_no_bit(unbroken, plain, attempt):
    """A checkpoint is written at every step, so many kills fall into one; others into a start, or between phases."""
    rows = read_steps(unbroken.folder / "events.rank0.jsonl").values()
    whole = 1.0 + sum(row["seconds"]["total"] for row in rows)
    chance, kills = random.Random(attempt), 0
    config = config_of(plain, **EXACT)
    while not train_in_child(config, chance.uniform(0.2, 1.2) * whole if kills < 4 else None):
        kills += 1
    assert_same_run(unbroken.folder, config.folder)


# ---- Engine options ------------------------------------------------------------------------------------------------

SHORT = {
    "schedule": {"steps": 4, "curve": "constant", "warmup": 0},
    "objective": {"student_every": 2},
    "adapter": {"input_dropout": 0.1},
}


def assert_same_numbers(one: RunConfig, other: RunConfig) -> None:
    """All metrics, and all trained weights and moments of the end."""
    assert metrics(one) == metrics(other)
    first, second = state(one), state(other)
    assert first.keys() == second.keys()
    tensors = {key: value for key, value in first.items() if isinstance(value, torch.Tensor)}
    assert tensors and all(torch.equal(value, second[key]) for key, value in tensors.items())


@pytest.fixture(scope="module")
def ordinary(world: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    plain = distilling(tmp_path_factory.mktemp("ordinary"), world, CAPTIONS)
    return run(plain, **SHORT, roles={"critic": CRITIC | {"warmup": 0}})


@pytest.mark.parametrize("engine", [{}, {"offload_inputs": True, "stream_blocks": 1}], ids=["recompute", "offload"])
def test_where_memory_is_saved_no_number_changes(ordinary, plain, engine):
    """With dropout, which a recomputed block must draw again; and with the teacher and the critic asked between the
    student's forward and backward pass (trap 42)."""
    saving = run(plain, **SHORT, roles={"critic": CRITIC | {"warmup": 0}}, engine={"recompute": True, **engine})
    assert_same_numbers(ordinary, saving)


# ---- Every kind of model -------------------------------------------------------------------------------------------

TWO = {"schedule": {"steps": 2, "warmup": 0}, "objective": {"student_every": 1, "turn": 1}}


def model_of(kind: Any, root: Path, world: Path) -> Path:
    """A folder with a model of a kind, and the clips of all."""
    make_wan(root / "model", kind=kind)
    (root / "clips").symlink_to(world / "clips")
    return root


@pytest.mark.parametrize("kind", ["ti2v", "i2v21"])
def test_models_that_go_on_from_a_first_frame_are_distilled_on_clips(world, tmp_path, kind):
    config = run(distilling(tmp_path, model_of(kind, tmp_path, world)), **TWO)
    rows = metrics(config)
    assert all(math.isfinite(value) and value > 0 for row in rows.values() for value in row.values())
    assert all("student/loss" in row for row in rows.values())
    assert "weft.step_list" in read_adapter(config.folder / "adapter").metadata


@pytest.fixture(scope="module")
def pair(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_of("experts", tmp_path_factory.mktemp("pair"), world)


def test_both_experts_are_distilled_on_captions_alone_and_one_on_the_device_changes_no_number(pair, tmp_path):
    change = merged(TWO, {"objective": {"shift": 5.0}, "schedule": {"steps": 4}})  # two steps of the list for each
    plain = distilling(tmp_path, pair, CAPTIONS, expert="both")
    together = run(plain, **change, name="together", engine={"experts": "together"})
    for step, row in metrics(together).items():
        name = "high" if step % 2 else "low"
        expected = {f"{part}_{name}/{what}" for part in ("student", "critic") for what in ("loss", "lr", "grad_norm")}
        assert expected < row.keys() and all(name in key for key in row)
    for name in ("high", "low"):
        adapter = read_adapter(together.folder / f"adapter_{name}")
        assert adapter.metadata["weft.expert"] == name and "weft.step_list" in adapter.metadata
    assert sorted(p.name for p in together.folder.glob("adapter*")) == ["adapter_high", "adapter_low"]
    assert_same_numbers(together, run(plain, **change, name="one", engine={"experts": "one"}))


def test_the_low_expert_alone_is_distilled_on_clips_and_refused_captions_alone(pair, tmp_path):
    change = merged(TWO, {"objective": {"shift": 5.0}})
    refused = config_of(distilling(tmp_path, pair, CAPTIONS, expert="low"), **change)
    with pytest.raises(ConfigError, match=r"expert 'low' alone begins at time 0.8333.* Write data\.kind=video"):
        check(refused)
    config = run(distilling(tmp_path, pair, expert="low"), **change)
    assert {key.split("/")[0] for row in metrics(config).values() for key in row} == {"critic_low", "student_low"}


def test_a_model_that_always_goes_on_from_an_image_is_refused_captions_alone(world, tmp_path):
    config = config_of(distilling(tmp_path, model_of("i2v22", tmp_path, world), CAPTIONS))
    with pytest.raises(ConfigError, match=r"captions alone, but this model goes on from a clip's first frame"):
        check(config)


def test_inputs_of_data_are_refused_captions_alone(plain):
    with pytest.raises(ConfigError, match=r"captions alone, but objective\.inputs is data"):
        check(config_of(plain, objective={"inputs": "data"}))


def test_first_frames_are_refused_captions_alone(world, tmp_path):
    config = config_of(
        distilling(tmp_path, model_of("ti2v", tmp_path, world), CAPTIONS), objective={"first_frame": 0.5}
    )
    with pytest.raises(ConfigError, match=r"captions alone, but objective\.first_frame is 0\.5"):
        check(config)


def test_targets_that_a_role_alone_names_are_refused_by_its_own_key(plain):
    roles = {"critic": {"adapter": {"kind": "full", "targets": "all"}, "warmup": 0}}
    with pytest.raises(ConfigError, match=r"^roles\.critic\.adapter\.targets: 'all' matches no linear layer"):
        check(RunConfig.model_validate({**config_of(plain).resolved(), "roles": roles}))


def test_a_student_that_would_never_move_is_refused(plain):
    with pytest.raises(ConfigError, match=r"too few for student to move once"):
        check(config_of(plain, schedule={"steps": 4, "warmup": 0}, objective={"student_every": 5}))
    del plain["roles"]
    with pytest.raises(ConfigError, match=r"too few for student to move once"):
        check(config_of(plain, schedule={"steps": 4, "warmup": 0}, objective={"student_every": 5}))


def test_a_changed_role_is_refused_key_by_key_and_a_rank_that_no_state_fits_is_not_offered(unbroken):
    config = unbroken.resolved()
    latest = list_checkpoints(unbroken.folder)[-1]
    inputs = read_checkpoint(latest).config["inputs"]

    def refused(**critic: Any) -> str:
        roles = {"critic": {**config["roles"]["critic"], **critic}}
        with pytest.raises(RunError) as told:
            resumed_state(RunConfig.model_validate({**config, "roles": roles}), inputs, latest)
        return str(told.value)

    assert "allow it: resume_allow=[roles.critic.optimizer.lr]" in refused(optimizer={"kind": "adamw", "lr": 1e-3})
    as_the_student = refused(adapter=None)  # of rank 4
    assert "roles.critic.adapter.rank: 2 -> 4" in as_the_student
    assert "resume_allow" not in as_the_student
