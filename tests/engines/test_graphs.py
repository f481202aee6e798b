"""Steps from recordings: bit by bit those of the plain loop, over shapes, schedules and a resume."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.learners import NoMilestones, batch_of, learner_of, small_config, weights
from weft.contracts import Batch
from weft.engines.graphs import MOST, WARM_UP, Graphs, OnCuda, OnHost
from weft.run.checkpoint_tree import adopt, learner_state, pack, unpack
from weft.run.config import RunConfig
from weft.run.learner import Learner
from weft.run.train import Course, train

STEPS = 50
HOST = torch.device("cpu")


def long_batch(seed: int) -> Batch:
    """Another bucket: three latent frames in place of two."""
    short = batch_of(2, seed)
    tensors = {**short.tensors, "latents": torch.cat([short["latents"], short["latents"][:, :, :1]], dim=2)}
    return Batch(tensors, short.keys)


BATCHES = [long_batch(i) if i % 3 == 1 else batch_of(2, i) for i in range(7)]


@dataclass(frozen=True)
class Turning:
    """The given batches over and over, from any draw on."""

    given: Sequence[Batch]
    last_step: int
    name: str = "turning"

    def batches(self, start: int, rank: int, world: int) -> Iterator[Batch]:
        while True:
            yield self.given[start % len(self.given)]
            start += 1


@pytest.fixture
def configured(model, tmp_path):
    def make(**change: Any) -> RunConfig:
        schedule = {"steps": STEPS, "warmup": 5, "curve": "cosine", **change.pop("schedule", {})}
        return small_config(tmp_path, model, optimizer={"lr": 1e-3}, schedule=schedule, **change)

    return make


def run_of(learner: Learner, config: RunConfig, graphs: Graphs | None, until: int = STEPS) -> list[dict[str, float]]:
    """What the steps tell, from where the learner stands; told one step late."""
    told: list[Any] = []
    course = Course(config.schedule, NoMilestones(), told.append, graphs=graphs, depth=1)
    drawn = learner.drawn
    train(learner, [Turning(BATCHES, until)], course)
    learner.drawn = drawn + (len(told) * config.schedule.accumulate)
    return [event.metrics for event in told]


def recording() -> tuple[Graphs, list[str]]:
    said: list[str] = []
    return Graphs(OnHost(), HOST, said.append), said


def test_fifty_steps_of_two_buckets_from_recordings_are_bit_by_bit_those_of_the_plain_loop(configured):
    assert_alike(configured(), STEPS, shapes=2)


def test_so_are_steps_of_two_micro_batches_under_lora_plus_with_a_moving_average(configured):
    change = {"adapter": {"lora_plus": 4}, "ema": {"decay": 0.9}, "schedule": {"accumulate": 2}}
    assert_alike(configured(**change), 14, shapes=3)


def assert_alike(config: RunConfig, steps: int, shapes: int) -> None:
    """Of shapes of a step, which are recorded each after its warm-up."""
    plain, recorded = learner_of(config), learner_of(config)
    graphs, said = recording()
    expected = run_of(plain, config, None, steps)
    assert run_of(recorded, config, graphs, steps) == expected
    assert not said and graphs.replays == steps - WARM_UP * shapes
    assert all(torch.equal(p, weights(recorded)[name]) for name, p in weights(plain).items())
    for role, average in plain.ema.items():
        assert all(torch.equal(t, recorded.ema[role].tensors[name]) for name, t in average.tensors.items())
    # What checkpoints and logs read is plain again.
    assert all(isinstance(g["lr"], float) for o in recorded.optimizers.values() for g in o.param_groups)


def test_a_run_that_is_resumed_in_the_middle_goes_on_bit_by_bit(configured):
    config = configured(schedule={"steps": 14})
    whole = learner_of(config)
    expected = run_of(whole, config, recording()[0], 14)
    first = learner_of(config)
    told = run_of(first, config, recording()[0], 8)
    tensors: dict[str, Tensor] = {}
    tree = pack(learner_state(first), tensors)
    second = learner_of(config)
    adopt(second, unpack(tree, {name: t.clone() for name, t in tensors.items()}))
    assert told + run_of(second, config, recording()[0], 14) == expected
    assert all(torch.equal(p, weights(second)[name]) for name, p in weights(whole).items())


def test_a_gradient_that_is_not_finite_moves_nothing_in_a_replay_either(configured):
    config = configured(schedule={"steps": 8})
    learner, (graphs, _) = learner_of(config), recording()
    bad = Batch(
        {**BATCHES[0].tensors, "latents": torch.full_like(BATCHES[0]["latents"], torch.inf)}, ("bad 0", "bad 1")
    )
    stream = Turning([BATCHES[0]] * 5 + [bad] + [BATCHES[0]] * 2, 8)
    told: list[Any] = []
    milestones = NoMilestones()
    train(learner, [stream], Course(config.schedule, milestones, told.append, graphs=graphs, depth=1))
    assert [event.metrics.get("train/skipped", 0.0) for event in told] == [0, 0, 0, 0, 0, 1, 0, 0]
    assert all(bool(p.isfinite().all()) for p in weights(learner).values()) and graphs.replays == 6


def test_work_that_draws_from_the_global_generator_is_told_and_launched_as_before(configured):
    config = configured(adapter={"input_dropout": 0.1}, schedule={"steps": 6, "accumulate": 1})
    plain, learner = learner_of(config), learner_of(config)
    graphs, said = recording()
    assert run_of(learner, config, graphs, 6) == run_of(plain, config, None, 6)
    assert graphs.replays == 0
    assert len(said) == 2 and all("draws from torch's global generator" in line for line in said)  # one a bucket


class Failing(OnHost):
    def capture(self, run):
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")


def test_what_cannot_be_recorded_is_told_once_and_launched_as_before(configured):
    config = configured(schedule={"steps": 8})
    plain, learner, said = learner_of(config), learner_of(config), []
    graphs = Graphs(Failing(), HOST, said.append)
    assert run_of(learner, config, graphs, 8) == run_of(plain, config, None, 8)
    assert said[0] == (
        "engine.graphs: train at (2, 16, 2, 4, 4) is not recorded, but launched as before: operation not permitted "
        "when stream is capturing"
    )
    assert len(said) == 1  # the other bucket is still warming up


def counted(graphs: Graphs, name: str, value: float, parameter: torch.nn.Parameter, optimizer: Any) -> float:
    def work(given: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            parameter.sub_(given["x"] * optimizer.param_groups[0]["lr"])
        return {"out": given["x"] * 2}

    return graphs.run(name, {"x": torch.tensor([value])}, [optimizer], work)["out"].item()


def test_a_replay_reads_the_inputs_and_the_rate_of_now_and_shows_that_weights_have_moved():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    graphs, _ = recording()
    for step in range(1, 6):
        optimizer.param_groups[0]["lr"] = 10.0**step
        before = parameter._version
        assert counted(graphs, "work", step, parameter, optimizer) == 2 * step
        assert parameter._version > before
    assert graphs.replays == 3 and optimizer.param_groups[0]["lr"] == 10.0**5
    assert parameter.item() == -sum(step * 10.0**step for step in range(1, 6))


def test_weights_that_were_laid_elsewhere_are_recorded_anew():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    recorder = OnHost()
    captured: list[int] = []
    recorder.capture = lambda run: (captured.append(1), run)[1]  # type: ignore[method-assign]
    graphs = Graphs(recorder, HOST, lambda text: None)
    for step in range(6):
        if step == 4:
            parameter.data = parameter.data.clone()
        counted(graphs, "work", 1.0, parameter, optimizer)
    assert len(captured) == 2


def test_there_are_no_more_recordings_than_memory_is_meant_for():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    graphs, said = recording()
    for number in range(MOST + 1):
        for _ in range(WARM_UP + 1):
            counted(graphs, f"work {number}", 1.0, parameter, optimizer)
    assert graphs.replays == MOST and len(said) == 1 and f"{MOST} recordings" in said[0]


def test_on_a_gpu_rates_are_those_that_a_recording_can_hold():
    on_gpu = Graphs(OnHost(), torch.device("cuda"), lambda text: None)
    assert on_gpu.rate(1e-4) == torch.tensor(1e-4).item() != 1e-4
    assert recording()[0].rate(1e-4) == 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_graphs_learn_what_the_plain_loop_learns(model, tmp_path):
    schedule = {"steps": STEPS, "warmup": 5, "curve": "cosine"}
    config = small_config(
        tmp_path, model, engine={"device": "cuda", "precision": "bf16"}, optimizer={"lr": 1e-3},
        schedule=schedule,
    )  # fmt: skip
    plain, recorded = learner_of(config), learner_of(config)
    device, said = plain.engine.device, []
    graphs = Graphs(OnCuda(device), device, said.append)
    expected = run_of(plain, config, None)
    found = run_of(recorded, config, graphs)
    assert not said and graphs.replays == STEPS - 2 * WARM_UP
    for one, other in zip(expected, found, strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-3)
