"""What a meta-learner's settings mean, and what they are refused beside."""

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from tests.small_documents import (
    ROLE,
    ToyDocuments,
    documents,
    learner_of,
    model_of,
    trained,
)
from weft.adapters.attach import Standing, attach
from weft.adapters.lora import Lora
from weft.adapters.no_adapter import NoAdapter
from weft.contracts import DEFAULT, Model
from weft.engines.deepspeed import DeepSpeed
from weft.engines.parallel import Parallel
from weft.engines.torch_engine import Torch
from weft.errors import ConfigError
from weft.events import StepEnded
from weft.objectives.agem import Agem
from weft.objectives.experience_replay import ExperienceReplay
from weft.objectives.meta_learning import CMaml, LaMaml, SyncMaml
from weft.objectives.outer_steps import RateDescent
from weft.objectives.traditional import Traditional
from weft.run.optimizers import AdamW

SINGLE = ToyDocuments(dtype=torch.float32)
ADAMW = AdamW(lr=1e-2)
BATCHES = [documents(6, seed, replay=4) for seed in range(3)]
NO_REPLAY = SimpleNamespace(batch_size=16, replay=None)


def test_trap_28_fp16_that_an_engine_chose_for_itself_is_refused() -> None:
    learner = learner_of(CMaml(warm_up=0.0, order="first"), SINGLE)
    rng = learner.rng("train", 0, 1)
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(ConfigError, match="multiplies in fp16"):
        learner.objective.loss("train", learner.model, BATCHES[0], learner.state, rng)


def run_of(objective: Any, **change: Any) -> Any:
    """A run's config, as far as an objective asks of it."""
    given: dict[str, Any] = {
        "objective": objective, "adapter": Lora(), "engine": Torch(), "parallel": Parallel(), "optimizer": AdamW(),
        "data": SimpleNamespace(batch_size=16, replay=SimpleNamespace(batch=16)),
    }  # fmt: skip
    return SimpleNamespace(**{**given, **change})


class Inner(Lora):
    """An adapter that no inner loop can train."""

    inner: ClassVar[str | None] = "it looks at .grad between the steps. Write adapter.kind=lora."


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "replay": (ExperienceReplay(), {"data": NO_REPLAY}, r"data\.replay: .* none are kept"),
    "agem without": (Agem(), {"data": NO_REPLAY}, r"data\.replay: "),
    "ordinary": (Traditional(), {}, r"data\.replay: .* would never look"),
    "parts": (CMaml(inner_steps=20), {}, r"objective\.inner_steps: 20 .*batch_size is 16"),
    "adapter": (CMaml(), {"adapter": Inner()}, r"adapter\.kind: 'lora' does not go .* looks at \.grad"),
    "recompute, trap 4": (CMaml(), {"engine": Torch(recompute=True)}, r"engine\.recompute: .* wrong without an error"),
    "compile, trap 29": (LaMaml(), {"engine": Torch(compile=True)}, r"engine\.compile: .* differentiate twice"),
    "offload": (CMaml(), {"engine": Torch(offload_activations=True)}, r"engine\.offload_activations: .*order=first"),
    "streaming": (LaMaml(), {"engine": Torch(stream_blocks=1)}, r"engine\.stream_blocks: .* one within another"),
    "shards, trap 29": (LaMaml(order="first"), {"parallel": Parallel(shard=2)}, r"parallel\.shard: .*=1"),
    "ZeRO, trap 29": (Agem(), {"engine": DeepSpeed()}, r"engine\.kind: deepspeed gathers"),
    "fp16, trap 28": (SyncMaml(), {"engine": Torch(precision="fp16")}, r"engine\.precision: fp16"),
    "idle": (LaMaml(outer="sgd_alpha", warm_up=0), {"optimizer": AdamW(lr=1.0)}, r"optimizer\.lr: .* never moves"),
}  # fmt: skip


@pytest.mark.parametrize("objective, change, reason", REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_together_is_refused(objective: Any, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        objective.check_run(run_of(objective, **change))


def test_what_goes_together_is_not() -> None:
    for engine in (Torch(recompute=True), Torch(compile=True)):
        CMaml(order="first").check_run(run_of(CMaml(order="first"), engine=engine))
    for objective in (CMaml(), SyncMaml(), LaMaml(), LaMaml(preset="paper"), Agem(), ExperienceReplay()):
        objective.check_run(run_of(objective))
    assert CMaml().needs == {"functional"} and not CMaml(order="first").needs


def test_running_statistics_are_refused_where_inner_steps_would_be_noted_in_them() -> None:
    model = model_of(ToyDocuments())
    model.network.get_submodule("body")[1] = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).double()  # type: ignore[index]
    model = Model(model.network, model.family, attach_anew(model.network))
    with pytest.raises(ConfigError, match=r"objective.dropout: 'body.1.1' keeps running statistics"):
        CMaml(dropout=True).init(model)
    CMaml().init(model)


def attach_anew(network: nn.Module) -> Any:
    """Adapters of a network that has been changed since it had some."""
    network.__dict__.pop("weft_attached", None)
    return attach(network, {ROLE: Standing(NoAdapter(), ())}, 0)


# ---- Settings ------------------------------------------------------------------------------------------------------


def test_a_warm_up_is_a_share_of_the_first_experience() -> None:
    assert LaMaml(warm_up=0.5).fitted({"2019": 12, "2020": 30}).warm_up_steps == 6
    assert LaMaml(warm_up_steps=2).fitted({"2019": 12}).warm_up_steps == 2
    fitted = LaMaml().fitted({"2019": 4, "2020": 8})
    assert [phase.optimizers for step in (0, 1, 2) for phase in fitted.phases(step, (DEFAULT,))] == [
        ("default",), ("default",), ("rates", "default")
    ]  # fmt: skip


def test_with_rates_as_the_step_a_warm_up_is_the_optimizers() -> None:
    learner = learner_of(LaMaml(outer="sgd_alpha", warm_up_steps=2), SINGLE, ADAMW)
    assert sorted(learner.optimizers) == ["default", "rates", "warm_up"]
    assert isinstance(learner.optimizers["default"], RateDescent)
    told = [e.metrics for e in trained(learner, BATCHES, 3) if isinstance(e, StepEnded)]
    assert ["warm_up/lr" in step for step in told] == [True, True, False]


def test_the_papers_settings_fill_in_what_is_not_given_and_survive_being_written_down() -> None:
    paper = LaMaml(preset="paper", inner_steps=10, rates={"lr": 0.25})  # type: ignore[arg-type]
    assert (paper.outer, paper.warm_up, paper.inner_clip, paper.inner_steps) == ("sgd_alpha", 0.0, 2.0, 10)
    assert (paper.rates.granularity, paper.rates.param, paper.rates.optimizer, paper.rates.lr) == (
        "element", "relu", "sgd", 0.25
    )  # fmt: skip
    assert LaMaml.model_validate(paper.model_dump(mode="json")) == paper


def test_what_a_step_costs_is_counted_in_passes_of_a_batch() -> None:
    assert CMaml(inner_steps=4).gradient_evaluations == 9
    assert CMaml(inner_steps=4, order="first").gradient_evaluations == 5
    assert ExperienceReplay().gradient_evaluations == Traditional().gradient_evaluations == 1
