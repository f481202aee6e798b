"""The networks that samples are made with: those under training, and the other expert of two, read when needed."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from weft.contracts import Model
from weft.run.assemble import free_memory
from weft.run.learner import Learner


@contextmanager
def staged(learner: Learner, everyone: bool) -> Iterator[Model]:
    """A model that answers at all times: with the experts that are not trained, when everyone is asked for.

    The others have no adapter. They are read anew each time, since two 14B networks seldom fit beside a training.
    """
    model, engine, family = learner.model, learner.engine, learner.model.family
    trained = [expert.name for expert in learner.experts]
    others = [expert.name for expert in family.all_experts if expert.name not in trained] if everyone else []
    if not others:
        yield model
        return
    assert len(trained) == 1, "all but the trained experts are missing, and there are two"
    networks: dict[str, nn.Module] = {trained[0]: model.network}
    for number, name in enumerate(others, start=1):
        network = family.load(engine.precision, name, engine.berth(number))
        networks[name] = engine.place(network, family.blocks(network)).eval()
    ready = engine.alternate(networks)
    try:
        yield Model(nn.ModuleDict(networks), family, model.adapters, ready=ready)
    finally:
        ready(trained[0])
        networks.clear()
        free_memory()
