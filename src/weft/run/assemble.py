"""From a config to a learner, in one order for new and resumed runs: load, attach, place, init, optimizers, restore."""

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from weft.adapters.modules import linears_of
from weft.adapters.targets import TargetReport
from weft.contracts import Engine, Model
from weft.errors import ConfigError
from weft.formats.canonical import tensors_at_scale
from weft.formats.reading import read_adapter
from weft.run.config import RunConfig
from weft.run.learner import Learner, MovingAverage


def target_report(config: RunConfig, network: nn.Module) -> TargetReport:
    """Which modules the adapter stands on. Raises ConfigError for a pattern that matches nothing."""
    adapter, family = config.adapter, config.family
    return adapter.match(linears_of(network), family.targets, family.aliases)


def check_engine(config: RunConfig, engine: Engine) -> None:
    """Refuse what the engine cannot do for this objective, by name."""
    missing = sorted(config.objective.needs - engine.can)
    if missing:
        raise ConfigError(
            f"engine: {config.engine.kind} cannot do what objective '{config.objective.kind}' needs: "
            f"{', '.join(missing)}. Choose another engine or objective."
        )


def assemble(config: RunConfig, engine: Engine) -> Learner:
    """The learner at step 0, its adapter untrained."""
    check_engine(config, engine)
    objective, family = config.objective, config.family
    network = family.load(engine.precision)
    paths = target_report(config, network).paths
    adapters = config.adapter.attach(network, paths, objective.roles, config.seed)
    network = engine.place(network, family.blocks(network))
    network.train()
    model = Model(network, family, adapters)
    state = objective.init(model)

    def build(name: str, parameters: Mapping[str, nn.Parameter]) -> Optimizer:
        return config.optimizer.build(parameters, config.adapter.lr_factor)

    optimizers = objective.optimizers(model, state, build)
    ema = {role: MovingAverage(config.ema.decay, config.ema.start) for role in objective.roles} if config.ema else {}
    return Learner(model, objective, state, engine, optimizers, config.seed, ema)


def start_from(config: RunConfig, learner: Learner) -> None:
    """Give a new run's first role the weights of an earlier adapter, at the strength that they had there.

    Raises ModelError when that adapter has other layers or another rank.
    """
    path = config.adapter.start_from
    if path is not None:
        tensors = tensors_at_scale(read_adapter(find_adapter(path)), config.adapter.scale)
        learner.model.adapters.load_state_dict(learner.objective.roles[0], tensors)


def find_adapter(path: Path) -> Path:
    """The adapter of a run's folder, or the path itself."""
    return path / "adapter" if (path / "events.rank0.jsonl").is_file() else path


@dataclass(frozen=True)
class Trainable:
    """How much of a model is trained."""

    trainable: int
    total: int

    def line(self) -> str:
        share = 100 * self.trainable / self.total
        return f"Trainable params: {self.trainable:,} || All params: {self.total:,} || Trainable: {share:.4f}%"


def count_parameters(learner: Learner) -> Trainable:
    """Trainable parameters of all roles, and all parameters of the network with its adapters."""
    adapters = learner.model.adapters
    trainable = sum(p.numel() for name in adapters.names for p in adapters.parameters(name).values())
    everything = {id(p): p.numel() for p in learner.model.network.parameters()}
    everything |= {id(p): p.numel() for name in adapters.names for p in adapters.parameters(name).values()}
    return Trainable(trainable, sum(everything.values()))


def free_memory() -> None:
    """Give back what models that are no longer needed held, before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
