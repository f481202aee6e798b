"""Whether a run's steps are recorded as CUDA graphs: what speaks against it, and where it pays."""

from collections.abc import Collection, Iterator
from typing import Any

import torch

from weft.contracts import Drawn, Engine
from weft.engines.graphs import MOST, Graphs, OnCuda
from weft.errors import ConfigError
from weft.events import Listener, Notice
from weft.run.config import RunConfig
from weft.run.questions import Shape, shapes_of

SMALL = 8192  # tokens of a micro-batch: above, the device has longer to do than the host to launch


def obstacles(config: RunConfig, device: torch.device, world: int, precision: str) -> Iterator[str]:
    """Each reason why steps cannot be recorded, as a clause."""
    engine, family, objective = config.engine, config.family, config.objective
    roles = objective.roles(family.experts)
    if engine.kind != "torch":
        yield f"engine.kind is {engine.kind}"
    if device.type != "cuda":
        yield f"the device is {device.type}, and graphs are CUDA's"
    if torch.version.hip is not None:
        yield "ROCm's graphs have lost writes (zero_ under 7.0)"
    if world > 1:
        yield f"{world} processes exchange gradients in a step"
    if precision == "fp16":
        yield "fp16's loss scale is kept on the host (engine.precision)"
    if engine.recompute:
        yield "engine.recompute looks at the state of chance on the way"
    if engine.stream_blocks or engine.offload_activations:
        yield "weights or activations travel on the way (engine.stream_blocks, engine.offload_activations)"
    if len(family.experts) > 1 and engine.experts != "together":
        yield "two experts may take turns on the device (engine.experts is not together)"
    if not isinstance(objective, Drawn):
        yield f"objective '{objective.kind}' decides on the way what it asks"
    if others := sorted({config.optimizer_of(role).kind for role in roles} - {"adamw"}):
        yield f"optimizer '{others[0]}' reads numbers on the host"
    for role in roles:
        fields = config.adapter_of(role).model_dump()
        if drops := [name for name, value in fields.items() if name.endswith("dropout") and value]:
            yield f"adapter.{drops[0]} draws from torch's global generator"
            return


def check_graphs(config: RunConfig, device: torch.device, world: int, precision: str) -> None:
    """Raises ConfigError where graphs were asked for and cannot be."""
    reason = next(obstacles(config, device, world, precision), None) if config.engine.graphs is True else None
    if reason:
        raise ConfigError(f"engine.graphs: steps cannot be recorded, for {reason}. Change that, or write graphs: auto.")


def pays(config: RunConfig, survey: Any) -> bool:
    """Whether a run's steps are worth recording."""
    fixed = config.family.medium == "video" or bool(survey.capacity)
    return fixed and pays_at(config, shapes_of(config, survey))


def pays_at(config: RunConfig, shapes: Collection[Shape]) -> bool:
    """Whether steps are so small that the host can hardly keep up, and of few shapes."""
    small = all(shape.tokens * config.data.batch_size <= SMALL for shape in shapes)
    return bool(shapes) and small and len(shapes) ** config.schedule.accumulate <= MOST


def graphs_of(config: RunConfig, survey: Any, engine: Engine, tell: Listener) -> Graphs | None:
    """What records the steps of a run; None where they are launched operator by operator."""
    wanted = config.engine.graphs is True or (config.engine.graphs == "auto" and pays(config, survey))
    return recorder(config, engine, tell) if wanted else None


def graphs_at(config: RunConfig, shape: Shape, engine: Engine, tell: Listener) -> Graphs | None:
    """What records steps of one shape, as a run of it would; rows of text that are not packed have many there."""
    fixed = config.family.medium == "video" or config.data.pack
    worth = config.engine.graphs == "auto" and fixed and pays_at(config, [shape])
    return recorder(config, engine, tell) if config.engine.graphs is True or worth else None


def recorder(config: RunConfig, engine: Engine, tell: Listener) -> Graphs | None:
    """What records steps; None where something speaks against it."""
    if any(obstacles(config, engine.device, engine.world, engine.precision)):
        return None
    return Graphs(OnCuda(engine.device), engine.device, lambda text: tell(Notice(text=text)))
