"""Finished adapters on their base, ready to generate: from the adapters' own headers, or from what the user says."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from weft import plugins
from weft.adapters.recipe import recipe_of
from weft.contracts import DEFAULT, Adapters, Encoders, Engine, Model, ModelFamily, as_video
from weft.errors import ConfigError, ModelError
from weft.families.causal_lm import is_language_model
from weft.formats.adapter_file import SavedAdapter
from weft.formats.canonical import at_strength
from weft.formats.reading import read_adapter
from weft.run.assemble import adapter_folder, joined


@dataclass(frozen=True)
class Applied:
    """A base with adapters on it. config: of the run that made the first one, empty when the file does not say.

    trained_here: False when an adapter's header names other base weights than these.
    """

    model: Model
    engine: Engine
    config: Mapping[str, Any]
    trained_here: bool

    @cached_property
    def encoders(self) -> Encoders:
        """Those of a video model, loaded when they are first asked for."""
        return as_video(self.model.family).encoders(self.engine.device, self.engine.carry)

    @contextmanager
    def use(self, adapter: bool = True) -> Iterator[None]:
        """Answer under all adapters, or as the base alone."""
        with ExitStack() as stack:
            for role in self.model.adapters.names if adapter else (None,):
                stack.enter_context(self.model.adapters.use(role))
            yield


@dataclass(frozen=True)
class Chosen:
    """Adapters, and the family of the base that they go on: what is known before weights are read. source: of the base,
    where another one was named than the adapters were trained on."""

    found: Sequence["Found"]
    family: Any
    source: str | None

    @property
    def config(self) -> Mapping[str, Any]:
        return self.found[0].config


@dataclass(frozen=True)
class Found:
    """An adapter that was read. expert: the network that it belongs to."""

    path: Path
    adapter: SavedAdapter
    expert: str

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved config of its run; empty when another program wrote the file."""
        return json.loads(self.adapter.metadata.get("weft.config", "{}"))


def find_adapters(paths: Sequence[Path]) -> list[Found]:
    """The adapters at paths; of a run's folder those of all its experts. Raises ModelError when two are for one."""
    found = []
    for path in paths:
        inside = [path / adapter_folder("adapter", name) for name in (DEFAULT.name, "high", "low")]
        for folder in [folder for folder in inside if folder.is_dir()] or [path]:
            adapter = read_adapter(folder)
            found.append(Found(folder, adapter, adapter.metadata.get("weft.expert", DEFAULT.name)))
    experts = [one.expert for one in found]
    twice = [one for one in found if experts.count(one.expert) > 1]
    if twice:
        raise ModelError(
            f"{twice[0].path} and {twice[1].path} are both for "
            f"{'the same network' if twice[0].expert == DEFAULT.name else 'expert ' + twice[0].expert}. Give one, or "
            "make one of them: weft merge --average."
        )
    return found


def base_family(config: Mapping[str, Any], source: str | None) -> Any:
    """The family section: the training run's own, with another source when one is given, and with all experts.

    Raises ConfigError when neither says what the base is.
    """
    if config:
        family = trained_family(config, source)
        if config["family"].get("expert"):
            return family.model_copy(update={"expert": "both"})
        return family
    if not source:
        raise ConfigError("this adapter's file does not say which base it was trained on. Add --base FOLDER.")
    kind = "causal-lm" if is_language_model(Path(source)) else "wan"
    return plugins.section_types("family")[kind](source=source)


def trained_family(config: Mapping[str, Any], source: str | None) -> Any:
    """The family section of a training run, with another source when one is given."""
    facts = {**config["family"], **({"source": source} if source else {})}
    facts.pop("kernels", None)  # of the machine that trained; those of another compute the same
    return plugins.section_types("family")[facts["kind"]](**facts)


def choose(paths: Sequence[Path], source: str | None) -> Chosen:
    """Read adapters, and tell their base. Raises WeftError."""
    found = find_adapters(paths)
    return Chosen(found, base_family(found[0].config, source), source)


def apply_adapters(paths: Sequence[Path], source: str | None, device: str, precision: str, strength: float) -> Applied:
    """Load the base, put adapters on it at a strength (1: as trained), in eval mode. Raises WeftError."""
    return apply_chosen(choose(paths, source), device, precision, strength)


def apply_chosen(chosen: Chosen, device: str, precision: str, strength: float) -> Applied:
    """The same with adapters that were read."""
    for one in chosen.found:
        if (one.adapter.dora or one.adapter.kind == "oft") and strength != 1:
            name = "a DoRA" if one.adapter.dora else "an OFT"
            raise ConfigError(f"--strength: {one.path} is {name}, no multiple of whose weights is a weaker one.")
    engine = plugins.find("engine", "torch")(device=device, precision=precision).open()
    model = applied_model(chosen.found, chosen.family, engine, strength)
    trained_here = all(is_trained_on(one, chosen.source) for one in chosen.found)
    return Applied(model, engine, chosen.config, trained_here)


def is_trained_on(one: Found, source: str | None) -> bool:
    """Whether an adapter's header names the base weights that are there now; True where it names none."""
    base = one.adapter.metadata.get("weft.base")
    return base is None or not one.config or base == trained_family(one.config, source).identity()["network"]


def applied_model(found: Sequence[Found], family: ModelFamily, engine: Engine, strength: float) -> Model:
    """All networks of a family, those with an adapter under it. Raises ModelError for an adapter without a network."""
    names = [expert.name for expert in family.all_experts]
    for one in found:
        if one.expert not in names:
            known = "has one network" if names == [DEFAULT.name] else f"has the experts {' and '.join(names)}"
            raise ModelError(f"{one.path} is for expert '{one.expert}', but this model {known}. Name another --base.")
    by_expert = {one.expert: one for one in found}
    networks: dict[str, nn.Module] = {}
    adapters: dict[str, Adapters] = {}
    for number, name in enumerate(names):
        network = family.load(engine.precision, name, engine.berth(number))
        if name in by_expert:
            adapters[name] = attached(by_expert[name], network, strength)
        networks[name] = engine.place(network, family.blocks(network)).eval()
    return joined(networks, adapters, engine, family)


def attached(one: Found, network: nn.Module, strength: float) -> Adapters:
    """An adapter on its network. Raises ModelError when that has not the layers that it changes."""
    adapter = one.adapter
    paths = adapter.paths
    modules = {name for name, _ in network.named_modules()}
    strange = [path for path in paths if path not in modules]
    if strange:
        raise ModelError(
            f"{one.path}: this base has no '{strange[0]}', which the adapter changes, nor {len(strange) - 1} others. "
            "It was trained on another model: name that one with --base."
        )
    adapters = recipe_of(adapter, paths).attach(network, paths, (one.expert,), seed=0)
    adapters.load_state_dict(one.expert, at_strength(adapter, strength).tensors)
    return adapters
