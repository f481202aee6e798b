"""The account of a run's adapters: when it is taken, what stands in it, and that training does not notice."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from tests.learners import learner_of, small_config
from tests.multi import spawn
from tests.small import config_of, make_wan
from weft.adapters.lora import Lora
from weft.events import Event, Notice, StepEnded
from weft.formats.reading import read_adapter
from weft.math.lowrank import delta_weight
from weft.run import health as module
from weft.run.health import FILE, Health, append
from weft.run.learner import Learner
from weft.run.start import train_run


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / FILE).read_text().splitlines()]


def newest(run: Path) -> dict[tuple[int, str], dict[str, Any]]:
    """Of a step that was repeated the later line counts."""
    return {(line["step"], line["role"]): line for line in lines(run)}


def numbers(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key != "time"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan(tmp_path_factory.mktemp("health") / "model")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts."""
    return make_wan(tmp_path_factory.mktemp("pair") / "model", kind="experts")


@pytest.fixture
def learner(model: Path, tmp_path: Path) -> Learner:
    """One whose adapter changes the network, before step 7."""
    made = learner_of(small_config(tmp_path, model))
    made.step = 7
    return made


@pytest.fixture
def health(model: Path, tmp_path: Path) -> Health:
    folder = small_config(tmp_path, model)
    folder.folder.mkdir(parents=True)
    return Health(folder, lambda event: None)


def test_a_line_holds_every_layer_with_the_share_that_it_moved(learner, health):
    health.measure(learner)
    (line,) = lines(health.config.folder)
    adapters = learner.model.adapters
    assert (line["step"], line["role"], line["kind"], line["rank"]) == (7, "default", "lora", 4)
    assert line["paths"] == list(adapters.paths) and len(line["change"]) == len(line["effective_rank"])
    state = adapters.state_dict("default")
    for path, change, rank in zip(line["paths"], line["change"], line["effective_rank"], strict=True):
        delta = delta_weight(state[f"{path}.lora_A.weight"], state[f"{path}.lora_B.weight"], 1.0)
        weight = adapters.base_layer("default", path).weight.float()
        assert change == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-5)
        assert 1 < rank <= 4


def test_a_step_is_measured_once_and_the_first_state_is_not(learner, health):
    learner.step = 0
    health.measure(learner)  # nothing has moved
    assert not (health.config.folder / FILE).exists()
    learner.step = 7
    health.measure(learner)  # a validation
    health.measure(learner)  # a checkpoint of the same step
    learner.step = 8
    health.measure(learner)
    assert [line["step"] for line in lines(health.config.folder)] == [7, 8]


def test_it_can_be_switched_off(learner, health):
    off = health.config.model_copy(update={"save": health.config.save.model_copy(update={"health": False})})
    Health(off, lambda event: None).measure(learner)
    assert not (off.folder / FILE).exists()


def test_the_weights_are_measured_and_not_their_moving_averages(model, tmp_path):
    config = small_config(tmp_path, model, ema={"decay": 0.9})
    config.folder.mkdir(parents=True)
    learner = learner_of(config)
    learner.step = 1
    (average,) = learner.ema.values()
    average.update(0, {name: 0 * p for name, p in learner.model.adapters.parameters("default").items()})
    Health(config, lambda event: None).measure(learner)
    assert min(lines(config.folder)[0]["change"]) > 0


def test_a_weight_of_nothing_has_no_share_and_that_is_said_once(learner, health):
    told: list[Event] = []
    path = learner.model.adapters.paths[0]
    with torch.no_grad():
        learner.model.adapters.base_layer("default", path).weight.zero_()
    health.tell = told.append
    for learner.step in (7, 8):
        health.measure(learner)
    assert [line["change"][0] for line in lines(health.config.folder)] == [None, None]
    assert all(value is not None for value in lines(health.config.folder)[0]["change"][1:])
    (notice,) = told
    assert isinstance(notice, Notice) and path in notice.text


def test_a_kind_that_nobody_can_measure_is_said_once(learner, health, monkeypatch):
    told: list[Event] = []
    health.tell = told.append
    monkeypatch.setattr(module, "sizes", module.sizes.dispatch(object))
    for learner.step in (7, 8):
        health.measure(learner)
    assert {*lines(health.config.folder)[1]["change"], *lines(health.config.folder)[1]["effective_rank"]} == {None}
    (notice,) = told
    assert isinstance(notice, Notice) and "kind lora" in notice.text


def test_numbers_that_are_none_are_null_and_the_file_stays_json(learner, health):
    with torch.no_grad():
        next(iter(learner.model.adapters.parameters("default").values())).fill_(float("inf"))
    health.measure(learner)
    (line,) = lines(health.config.folder)
    assert line["change"][0] is None and line["effective_rank"][0] is None and None not in line["change"][1:]


def test_a_line_that_a_kill_cut_off_does_not_swallow_the_next(learner, health):
    (health.config.folder / FILE).write_text('{"time": 1, "st')
    health.measure(learner)
    torn, whole = (health.config.folder / FILE).read_text().splitlines()
    assert torn == '{"time": 1, "st' and json.loads(whole)["step"] == 7


def test_nothing_moves_and_no_chance_is_drawn(learner, health):
    before = {name: p.detach().clone() for name, p in learner.model.adapters.parameters("default").items()}
    chance = torch.random.get_rng_state()
    health.measure(learner)
    assert torch.equal(torch.random.get_rng_state(), chance)
    after = learner.model.adapters.parameters("default")
    assert all(torch.equal(after[name], p) and after[name].grad is None for name, p in before.items())
    assert all(p.requires_grad for p in after.values())


def test_a_run_writes_at_every_validation_and_checkpoint_and_learns_the_same_without(plain):
    """Steps 2, 4, 6 save, 3 and 6 validate; PEFT's layers are switched off for the look at their bases."""
    adapter = {"backend": "peft", "input_dropout": 0.2}
    runs = {}
    for name, health in (("with", True), ("without", False)):
        config = config_of({**plain, "name": name}, adapter=adapter, save={"health": health})
        runs[name] = train_run(config, lambda event: None)
    assert [line["step"] for line in lines(runs["with"].folder)] == [2, 3, 4, 6]
    assert not (runs["without"].folder / FILE).exists()
    states: list[dict[str, Tensor]] = []
    for run in runs.values():
        assert run.adapter is not None
        states.append(dict(read_adapter(run.adapter).tensors))
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_steps_that_a_resumed_run_repeats_are_written_again_and_say_the_same(plain):
    config, heard = config_of(plain), list[Event]()

    def stop() -> bool:  # after step 3, as a signal would
        return any(isinstance(event, StepEnded) and event.step == 3 for event in heard)

    train_run(config, heard.append, stop=stop)
    shutil.rmtree(config.folder / "checkpoints" / "global_step_3")  # a kill before it was whole: on from step 2
    train_run(config, lambda event: None)
    written = lines(config.folder)
    assert [line["step"] for line in written] == [2, 3, 3, 4, 6]
    assert numbers(written[1]) == numbers(written[2])
    assert newest(config.folder) == {(line["step"], "default"): line for line in (written[0], *written[2:])}


SHARED: dict[str, dict[str, Any]] = {
    "ddp": {"parallel": {"data": 2}},
    "fsdp": {"parallel": {"shard": 2}},
    "zero-3": {"engine": {"kind": "deepspeed", "zero": 3, "device": "cpu"}},
}


def measured(root: Path, model: Path, changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Layout -> the lines that were written, of the same weights everywhere."""
    found = {}
    for name, change in changes.items():
        config = small_config(root / name, model, **change)
        learner = learner_at_7(config)
        Health(config, lambda event: None).measure(learner)
        learner.engine.barrier()
        found[name] = [numbers(line) for line in lines(config.folder)]
    return found


def learner_at_7(config: Any) -> Learner:
    from weft.run.assemble import assemble

    learner = assemble(config, config.engine.open(config.parallel))
    config.folder.mkdir(parents=True, exist_ok=True)
    chance, adapters = torch.Generator().manual_seed(3), learner.model.adapters
    state = adapters.state_dict("default")
    adapters.load_state_dict("default", {k: t + 0.1 * torch.randn(t.shape, generator=chance) for k, t in state.items()})
    learner.step = 7
    return learner


@pytest.mark.slow
def test_processes_together_write_what_one_does_and_once(model, tmp_path):
    (expected,) = measured(tmp_path, model, {"one": {}})["one"]
    for rank in spawn(2, measured, tmp_path, model, SHARED):
        for name in SHARED:
            (line,) = rank[name]
            for key in ("paths", "step", "role"):
                assert line[key] == expected[key], name
            for key in ("change", "effective_rank"):
                assert line[key] == pytest.approx(expected[key], rel=2e-6), name  # six digits are kept


@pytest.mark.parametrize("engine", [{}, {"experts": "one"}, {"recompute": True, "stream_blocks": 1}])
def test_weights_are_measured_wherever_they_wait_and_each_expert_has_its_line(pair, tmp_path, engine):
    config = small_config(
        tmp_path, pair, family={"expert": "both"}, engine=engine, adapter={"targets": ["attn1.to_q"]}
    )  # fmt: skip
    learner = learner_of(config)
    learner.step = 1
    config.folder.mkdir(parents=True)
    Health(config, lambda event: None).measure(learner)
    found = {line["role"]: line for line in lines(config.folder)}
    assert list(found) == ["high", "low"]
    for role, line in found.items():
        folder = pair / {"high": "transformer", "low": "transformer_2"}[role]
        stored = WanTransformer3DModel.from_pretrained(folder).state_dict()
        state = learner.model.adapters.state_dict(role)
        for path, change in zip(line["paths"], line["change"], strict=True):
            delta = delta_weight(state[f"{path}.lora_A.weight"], state[f"{path}.lora_B.weight"], 1.0)
            assert change == pytest.approx(float(delta.norm() / stored[f"{path}.weight"].float().norm()), rel=1e-5)


def test_each_role_has_a_line_of_its_own_and_its_own_recipe(model, tmp_path):
    config = small_config(
        tmp_path, model,
        objective={"kind": "dmd"}, roles={"critic": {"adapter": {"kind": "full", "targets": "attention"}}},
    )  # fmt: skip
    learner = learner_of(config)
    learner.step = 1
    config.folder.mkdir(parents=True)
    Health(config, lambda event: None).measure(learner)
    found = {line["role"]: line for line in lines(config.folder)}
    assert {role: line["kind"] for role, line in found.items()} == {"student": "lora", "critic": "full"}
    assert found["critic"]["rank"] is None and found["student"]["rank"] == 4
    assert isinstance(config.adapter_of("student"), Lora) and None not in found["critic"]["change"]


def test_lines_are_added_to_a_file_whose_folder_nobody_has_made_yet_and_behind_a_torn_one(tmp_path):
    path = tmp_path / "run" / FILE
    append(path, [{"step": 1}])
    with path.open("a") as file:
        file.write('{"ste')
    append(path, [{"step": 2}])
    assert path.read_text().splitlines() == ['{"step": 1}', '{"ste', '{"step": 2}']
