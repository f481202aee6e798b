"""All of a learner that moves as a tree of plain data and tensors, and back; tensors that are sharded stay so."""

import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.optim import Optimizer

from weft.contracts import Adapters, Experience
from weft.engines.shards import empty_beside
from weft.errors import ModelError, RunError
from weft.run.learner import Learner

CONFIGURED = ("params", "lr", "base_lr", "betas", "eps", "weight_decay")  # of an optimizer's groups
Shape = tuple[tuple[int, ...], torch.dtype]


# ---- A tree of plain data and tensors <-> JSON and tensors by name --------------------------------------------------


def pack(tree: Any, tensors: dict[str, Tensor], place: str = "") -> Any:
    """Plain data in which each tensor is replaced by its name, shape and dtype; the tensors are added to the mapping
    and share their memory with the tree's."""
    if tree is None or isinstance(tree, str | int | float | bool):
        return tree
    if isinstance(tree, Tensor):
        tensors[place] = tree.detach()
        return {"$tensor": place, "shape": list(tree.shape), "dtype": str(tree.dtype).removeprefix("torch.")}
    if isinstance(tree, Mapping):
        assert all(isinstance(key, str) for key in tree), f"{place}: a key that is no string"
        return {key: pack(value, tensors, f"{place}/{key}" if place else key) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [pack(value, tensors, f"{place}/{i}") for i, value in enumerate(tree)]
    raise AssertionError(f"{place}: {type(tree)} cannot be saved")


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of pack, with lists for tuples."""
    if isinstance(tree, dict):
        if "$tensor" in tree:
            return tensors[tree["$tensor"]]
        return {key: unpack(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [unpack(value, tensors) for value in tree]
    return tree


def shapes_in(tree: Any) -> dict[str, Shape]:
    """(shape, dtype) of each tensor that a packed tree names."""
    if isinstance(tree, dict):
        if "$tensor" in tree:
            return {tree["$tensor"]: (tuple(tree["shape"]), getattr(torch, tree["dtype"]))}
        return {name: shape for value in tree.values() for name, shape in shapes_in(value).items()}
    if isinstance(tree, list):
        return {name: shape for value in tree for name, shape in shapes_in(value).items()}
    return {}


# ---- Optimizers and chance -----------------------------------------------------------------------------------------


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state with parameters by name, never by position."""
    whole = optimizer.state_dict()
    names = [name for group in whole["param_groups"] for name in group["names"]]
    numbers = [number for group in whole["param_groups"] for number in group["params"]]
    by_number = dict(zip(numbers, names, strict=True))
    groups = [{k: v for k, v in group.items() if k != "params"} for group in whole["param_groups"]]
    return {"groups": groups, "state": {by_number[number]: dict(entry) for number, entry in whole["state"].items()}}


def restore_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Put saved state back, parameter by parameter's name. Raises RunError when the parameters are others.

    What the config sets stays as the config now has it; it equals what was saved unless a change was allowed.
    """
    now = optimizer.state_dict()
    check_optimizer(optimizer, saved)
    groups = [
        {**{k: as_was(group.get(k), v) for k, v in old.items()}, **{k: v for k, v in group.items() if k in CONFIGURED}}
        for old, group in zip(saved["groups"], now["param_groups"], strict=True)
    ]
    numbers = {n: i for group in groups for n, i in zip(group["names"], group["params"], strict=True)}
    optimizer.load_state_dict(
        {"param_groups": groups, "state": {numbers[name]: entry for name, entry in saved["state"].items()}}
    )


def check_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Raises RunError when saved state is that of other parameters."""
    if [group["names"] for group in saved["groups"]] != [group["names"] for group in optimizer.param_groups]:
        raise RunError("the checkpoint's optimizer moves other parameters than this config's. Start a new run.")


def as_was(current: Any, saved: Any) -> Any:
    """JSON knows no tuples: give back the type that the optimizer has."""
    return tuple(saved) if isinstance(current, tuple) else saved


def chance_state(device: torch.device) -> dict[str, Any]:
    """The global generators: python's, numpy's, torch's, the GPU's.

    Weft's own draws are seeded for their place and need none of them; an optimizer or a model may. A checkpoint holds
    those of rank 0 and gives them to every rank, so that it fits any number of them.
    """
    version, internal, gauss = random.getstate()
    name, keys, *rest = numpy.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(numpy.asarray(keys).astype(numpy.int64)), *map(float, rest)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def seed_chance(seed: int) -> None:
    """Seed every global generator, so that what libraries draw from them is the run's own too."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def restore_chance(saved: Mapping[str, Any], device: torch.device) -> None:
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = saved["numpy"]
    numpy.random.set_state((name, keys.numpy().astype(numpy.uint32), int(position), int(has_gauss), cached))
    torch.set_rng_state(saved["torch"])
    if device.type == "cuda" and saved["cuda"] is not None:
        torch.cuda.set_rng_state(saved["cuda"], device)


# ---- A learner -----------------------------------------------------------------------------------------------------


def learner_state(learner: Learner) -> dict[str, Any]:
    """All of a learner that moves, nothing of which depends on how many ranks there are. Every rank must ask."""
    adapters, current = learner.model.adapters, under_way(learner)
    return {
        "step": learner.step,
        "drawn": learner.drawn,
        "skipped_in_a_row": learner.skipped_in_a_row,
        "rates": dict(learner.rates),
        "adapters": {name: tensors_of(adapters, name) for name in adapters.names},
        "optimizers": {name: optimizer_state(o) for name, o in learner.optimizers.items()},
        "ema": {name: average.tensors for name, average in learner.ema.items()},
        "objective": learner.state.state_dict(),
        "engine": learner.engine.state_dict(),
        "data": current.position(learner.drawn) if current else {},
        "chance": chance_state(learner.engine.device),
    }


def apart(learner: Learner, tree: Mapping[str, Any]) -> dict[str, Any]:
    """A learner's state with copies of whatever may change before its next optimizer step; the rest are the learner's
    own tensors. What an adapter has that is not trained may be carried about with the frozen weights meanwhile."""
    adapters = learner.model.adapters
    live = {
        "adapters": {name: own | copy_of(adapters.fixed(name)) for name, own in tree["adapters"].items()},
        "optimizers": {name: own | {"groups": copy_of(own["groups"])} for name, own in tree["optimizers"].items()},
        "ema": {name: dict(average) for name, average in tree["ema"].items()},
    }
    return {name: live[name] if name in live else copy_of(value) for name, value in tree.items()}


def copy_of(tree: Any) -> Any:
    """Plain data with containers and tensors of its own."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {key: copy_of(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [copy_of(value) for value in tree]
    return tree


def tensors_of(adapters: Adapters, name: str) -> dict[str, Tensor]:
    """An adapter's own tensors, trained and fixed."""
    return {**adapters.parameters(name), **adapters.fixed(name)}


def under_way(learner: Learner) -> Experience | None:
    """The stretch of the stream that the next step draws from."""
    return next((experience for experience in learner.stream if learner.step < experience.last_step), None)


def neighbours(learner: Learner, tree: Mapping[str, Any]) -> dict[str, Tensor]:
    """Name in the tree -> the parameter that the tensor of that name belongs to, whose sharding it shares."""
    adapters, found = learner.model.adapters, {}
    for name in adapters.names:
        for key, tensor in tensors_of(adapters, name).items():
            found[f"adapters/{name}/{key}"] = found[f"ema/{name}/{key}"] = tensor
    for name, optimizer in learner.optimizers.items():
        for group in optimizer.param_groups:
            for key, parameter in zip(group["names"], group["params"], strict=True):
                entries = tree["optimizers"][name]["state"].get(key, {})
                found |= {f"optimizers/{name}/state/{key}/{entry}": parameter for entry in entries}
    return found


def room_for(learner: Learner, tree: Mapping[str, Any]) -> dict[str, Tensor]:
    """An empty tensor for each that a packed tree names, sharded as this learner has it. Raises RunError or ModelError
    when the tree is that of another learner."""
    if sorted(tree["optimizers"]) != sorted(learner.optimizers) or sorted(tree["ema"]) != sorted(learner.ema):
        raise RunError("the checkpoint has other optimizers or averages than this config makes. Start a new run.")
    for name, optimizer in learner.optimizers.items():
        check_optimizer(optimizer, tree["optimizers"][name])
    beside = neighbours(learner, tree)
    shapes = shapes_in(tree)
    check_adapters(learner.model.adapters, shapes)
    return {name: empty_beside(beside.get(name), *shape) for name, shape in shapes.items()}


def check_adapters(adapters: Adapters, saved: Mapping[str, Shape]) -> None:
    """Raises ModelError when a checkpoint's adapters have other names or shapes than those that stand on the model."""
    own = {f"adapters/{n}/{key}": tuple(t.shape) for n in adapters.names for key, t in tensors_of(adapters, n).items()}
    there = {name: shape for name, (shape, _) in saved.items() if name.startswith("adapters/")}
    odd = sorted(name for name in own.keys() | there.keys() if own.get(name) != there.get(name))
    if odd:
        raise ModelError(
            f"the checkpoint's weights do not fit the adapter: {len(odd)} tensors differ, first "
            f"'{odd[0].removeprefix('adapters/')}', {there.get(odd[0], 'missing')} in place of "
            f"{own.get(odd[0], 'none')}. Go on with the config that it was made by."
        )


def adopt(learner: Learner, saved: Mapping[str, Any]) -> None:
    """Make a freshly assembled learner the one that was saved, from a tree whose tensors are sharded like its own."""
    learner.hold()
    for name, tensors in saved["adapters"].items():
        copy_alike(tensors_of(learner.model.adapters, name), tensors)
    for name, optimizer in learner.optimizers.items():
        restore_optimizer(optimizer, saved["optimizers"][name])
    for name, average in learner.ema.items():
        average.tensors = {k: v.to(learner.engine.device) for k, v in saved["ema"][name].items()}
    learner.state.load_state_dict(saved["objective"])
    learner.engine.load_state_dict(saved["engine"])
    learner.step, learner.drawn = saved["step"], saved["drawn"]
    learner.skipped_in_a_row = saved["skipped_in_a_row"]
    learner.rates = kept_rates(learner, saved)
    if current := under_way(learner):
        current.resume_at(saved["data"])
    restore_chance(saved["chance"], learner.engine.device)


def kept_rates(learner: Learner, saved: Mapping[str, Any]) -> dict[str, float]:
    """The rates that were set while it trained, but of optimizers whose config has another rate now: what a user wrote
    last counts. Older checkpoints have none."""
    rates: Mapping[str, float] = saved.get("rates", {})

    def is_as_configured_then(name: str) -> bool:
        then, now = saved["optimizers"][name]["groups"][0], learner.optimizers[name].param_groups[0]
        return then["base_lr"] == now["base_lr"]

    return {name: rate for name, rate in rates.items() if is_as_configured_then(name)}


@torch.no_grad()
def copy_alike(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into tensors of the same names and the same sharding, without a word to other ranks."""
    for name, tensor in tensors.items():
        tensor.copy_(values[name])
