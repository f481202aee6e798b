"""From a config to a learner, in one order for new and resumed runs: load, attach, place, init, optimizers, restore."""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from weft.adapters.attach import Standing, attach
from weft.adapters.biases import places_of
from weft.adapters.several import SeveralAdapters
from weft.adapters.targets import TargetReport
from weft.contracts import DEFAULT, Adapters, Engine, Model, ModelFamily, as_encoder
from weft.errors import ConfigError
from weft.formats.adapter_file import SavedAdapter
from weft.formats.canonical import tensors_at_scale
from weft.formats.reading import experts_in, read_adapter
from weft.run.computing import check_compute
from weft.run.config import RunConfig
from weft.run.learner import Learner
from weft.run.moving_average import MovingAverage
from weft.run.pace import Pace


def target_report(config: RunConfig, network: nn.Module, role: str | None = None) -> TargetReport:
    """Which modules the adapter stands on, or that of a role. Raises ConfigError for a pattern that matches nothing."""
    adapter, family = config.adapter if role is None else config.adapter_of(role), config.family
    layers, heads = adapter.layers(network), heads_of(config, network, role)
    free = {path: shape for path, shape in layers.items() if not _is_within(path, heads)}
    try:
        report = adapter.match(layers, family.targets, family.aliases)
        if any(_is_within(path, heads) for path in report.paths):
            _refuse_heads_alone(report, heads)
            report = adapter.match(free, family.targets, family.aliases)
        return report
    except ConfigError as error:
        if role is None or adapter is config.adapter:
            raise
        key = role if role in config.roles else role.partition("_")[0]
        raise ConfigError(*(f"roles.{key}.{problem}" for problem in error.problems)) from None


def heads_of(config: RunConfig, network: nn.Module, role: str | None = None) -> tuple[str, ...]:
    """Paths of the modules that are trained whole beside the adapter of a role: of encoders their heads."""
    adapter = config.adapter if role is None else config.adapter_of(role)
    if config.family.medium != "documents" or not adapter.has_base:
        return ()
    return as_encoder(config.family).heads(network)


def trained_numbers(config: RunConfig, network: nn.Module, role: str) -> int:
    """Parameters that a role trains: its adapter's, those of modules that are trained whole, and biases."""
    adapter, report = config.adapter_of(role), target_report(config, network, role)
    heads = heads_of(config, network, role)
    whole = sum(p.numel() for path in heads for p in network.get_submodule(path).parameters())
    return adapter.trainable(report) + whole + bias_numbers(config, network, role)


def bias_numbers(config: RunConfig, network: nn.Module, role: str) -> int:
    """How many of them are the network's own."""
    adapter = config.adapter_of(role)
    if adapter.biases == "none":
        return 0
    standing = standings(config, network, (role,))[role]
    return sum(
        module.get_parameter(key).numel() for module, key in places_of(network, standing, adapter.biases).values()
    )


def _is_within(path: str, modules: Sequence[str]) -> bool:
    return any(path == module or path.startswith(f"{module}.") for module in modules)


def _refuse_heads_alone(report: TargetReport, heads: Sequence[str]) -> None:
    """Raises ConfigError for a target that names modules that are trained whole, and nothing else."""
    for match in report.matched:
        if all(_is_within(path, heads) for path in match.paths):
            raise ConfigError(
                f"adapter.targets: '{match.pattern}' names {match.paths[0]}, which is trained whole beside every "
                "adapter. Leave it out."
            )


def check_engine(config: RunConfig, engine: Engine) -> None:
    """Refuse what the engine cannot do for this objective, by name."""
    check_needs(config, engine.can)
    check_compute(config.family, config.objective.needs, engine.device)


def check_needs(config: RunConfig, can: frozenset[str]) -> None:
    """Refuse what an engine that can do so much cannot do for this objective, by name."""
    missing = sorted(config.objective.needs - can)
    if missing:
        raise ConfigError(
            f"engine: {config.engine.kind} cannot do what objective '{config.objective.kind}' needs: "
            f"{', '.join(missing)}. Choose another engine or objective."
        )


def assemble(config: RunConfig, engine: Engine) -> Learner:
    """The learner at step 0, its adapters untrained."""
    check_engine(config, engine)
    objective, family = config.objective, config.family
    roles = {expert.name: objective.roles((expert,)) for expert in family.experts}
    model = built(config, engine, roles)
    model.network.train()
    state = objective.init(model)

    def build(name: str, parameters: Mapping[str, nn.Parameter]) -> Optimizer:
        return config.optimizer_of(name).build(parameters, config.adapter_of(name).lr_factor)

    optimizers = engine.own(model.network, objective.optimizers(model, state, build))
    shown = objective.shown(family.experts)
    ema = {role: MovingAverage(config.ema.decay, config.ema.start) for role in shown} if config.ema else {}
    pace = Pace(objective, family.experts, config.schedule.steps)
    return Learner(model, objective, state, engine, optimizers, config.seed, pace, ema)


def built(config: RunConfig, engine: Engine, roles: Mapping[str, Sequence[str]]) -> Model:
    """The networks of the experts that roles name, each with its own adapters, where the engine wants them."""
    family = config.family
    networks: dict[str, nn.Module] = {}
    adapters: dict[str, Adapters] = {}
    for number, (expert, names) in enumerate(roles.items()):
        network = family.load(engine.precision, expert, engine.berth(number))
        adapters[expert] = attach(network, standings(config, network, names), config.seed)
        if engine.sequence is not None:
            family.divide(network, engine.sequence)
        networks[expert] = engine.place(network, family.blocks(network))
        adapters[expert].initialize()
    return joined(networks, adapters, engine, family)


def standings(config: RunConfig, network: nn.Module, names: Sequence[str]) -> dict[str, Standing]:
    """The recipe of each role, and the layers of a network that it stands on."""
    return {
        name: Standing(
            config.adapter_of(name), target_report(config, network, name).paths, heads_of(config, network, name)
        )
        for name in names
    }


def joined(
    networks: Mapping[str, nn.Module], adapters: Mapping[str, Adapters], engine: Engine, family: ModelFamily
) -> Model:
    """One model of one network, or of several under their experts' names."""
    if len(networks) == 1:
        (network,), (own,) = networks.values(), adapters.values()
        return Model(network, family, own)
    together = nn.ModuleDict(dict(networks))
    return Model(together, family, SeveralAdapters(adapters), ready=engine.alternate(networks))


def start_from(config: RunConfig, learner: Learner) -> None:
    """Give a new run's adapters the weights of an earlier one, at the strength that they had there.

    Raises ModelError when that adapter has other layers or another rank.
    """
    path = config.adapter.start_from
    if path is None:
        return
    for role, expert in zip(learner.shown, learner.experts, strict=True):
        earlier, recipe = earlier_adapter(path, expert.name), config.adapter_of(role)
        tensors = tensors_at_scale(earlier, recipe.scale, recipe.conv_scale)
        learner.model.adapters.load_state_dict(role, tensors)


def earlier_adapter(path: Path, expert: str) -> SavedAdapter:
    """What an expert begins with: its own adapter in a run's folder or a file for both, else the one that is there."""
    found = find_adapter(path, expert)
    return read_adapter(found, expert if expert in experts_in(found) else None, heads=True)


def find_adapter(path: Path, role: str = DEFAULT.name) -> Path:
    """A role's adapter in a run's folder, or else the path itself."""
    named = path / adapter_folder("adapter", role)
    return named if named.is_dir() else path


def adapter_folder(stem: str, role: str) -> str:
    """adapter, or adapter_high for the adapter of an expert."""
    return stem if role == DEFAULT.name else f"{stem}_{role}"


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
