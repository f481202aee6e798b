"""What a run on many processes comes to, and what it may not ask, before any of them is started."""

from importlib.util import find_spec

import torch
from torch import nn

from weft.engines.deepspeed import DeepSpeed
from weft.engines.parallel import Layout
from weft.engines.single_device import device_here
from weft.engines.zero_optimizer import ZeroOptimizer
from weft.errors import ConfigError
from weft.run.assemble import check_needs
from weft.run.config import RunConfig
from weft.run.stand_ins import OneOfSequence


def layout_of(config: RunConfig, processes: int | None) -> Layout:
    """The layout of so many processes, or of the fewest that the config can mean. Raises ConfigError with the possible
    ones where these processes cannot make it."""
    return config.parallel.least() if processes is None else config.parallel.resolved(processes)


def check_layout(config: RunConfig, layout: Layout) -> None:
    """Raises ConfigError for a device that is not there, and for what the engine cannot do in a layout."""
    device_here(config.engine.device)
    config.engine.check(layout)
    check_needs(config, config.engine.can(layout))
    if isinstance(config.engine, DeepSpeed):
        check_zero(config)
    if layout.sequence > 1:
        with torch.device("meta"):
            network = config.family.skeleton("meta")
        config.family.divide(network, OneOfSequence(layout.sequence, config.parallel.sequence_method))


def check_zero(config: RunConfig) -> None:
    """Raises ConfigError for a run that DeepSpeed would refuse once weights are read."""
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "engine.kind: 'deepspeed' needs deepspeed, which is not installed. "
            "Run: DS_BUILD_OPS=0 pip install 'weft[deepspeed]', or write engine.kind=torch."
        )
    experts = [expert.name for expert in config.family.experts]
    if len(experts) > 1:
        raise ConfigError(
            f"engine.kind: 'deepspeed' trains one network, and this run trains {len(experts)}: {', '.join(experts)}. "
            "Write engine.kind=torch, or family.expert to train one of them."
        )
    for role in config.objective.roles(config.family.experts):
        recipe, parameter = config.adapter_of(role), nn.Parameter(torch.zeros(1))
        ZeroOptimizer(config.optimizer_of(role).build({"w": parameter}, recipe.lr_factor))
