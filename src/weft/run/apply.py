"""Finished adapters on their base, ready to generate: from the adapters' own headers, or from what the user says."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from weft import plugins
from weft.adapters.recipe import recipe_of
from weft.contracts import DEFAULT, Adapters, Encoders, Engine, Model, ModelFamily, as_video
from weft.errors import ConfigError, ModelError
from weft.families.causal_lm import is_language_model
from weft.few_steps import StepList
from weft.formats.adapter_file import STEP_LIST, SavedAdapter
from weft.formats.canonical import at_strength
from weft.formats.reading import experts_in, read_adapter
from weft.run.assemble import adapter_folder, joined
from weft.run.attention import attending
from weft.run.summed import Part, common_step_list, refuse_without_sum, summed

OF_MACHINE = ("kernels", "attention", "compute")  # that trained: another may lack them, and does as well without
OF_RUN = ("weft.config", "weft.data")  # what the headers of all states of one run say alike


@dataclass(frozen=True)
class Applied:
    """A base with adapters on it. config: of the run that made the first one whose file says so, else empty.

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
        """Answer under all adapters, or as the base alone, with the attention kernels of this chip."""
        with ExitStack() as stack:
            stack.enter_context(attending(self.model.family, self.engine.device))
            for role in self.model.adapters.names if adapter else (None,):
                stack.enter_context(self.model.adapters.use(role))
            yield


@dataclass(frozen=True)
class Chosen:
    """Adapters, and the family of the base that they go on: what is known before weights are read. source: of the base,
    where another one was named than the adapters were trained on. step_list: the times at which the few-step students
    among them are asked; None when none is one."""

    found: Sequence["Found"]
    family: Any
    source: str | None
    step_list: StepList | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        return config_of(self.found)

    @property
    def students(self) -> tuple[str, ...]:
        """The networks that answer in few steps."""
        return tuple(dict.fromkeys(one.expert for one in self.found if STEP_LIST in one.adapter.metadata))


@dataclass(frozen=True)
class Found:
    """An adapter that was read. expert: the network that it belongs to. strength: of its change; 1 is as trained."""

    path: Path
    adapter: SavedAdapter
    expert: str
    strength: float = 1.0

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved config of its run; empty when another program wrote the file."""
        return json.loads(self.adapter.metadata.get("weft.config", "{}"))


def find_adapters(paths: Sequence[Path], strengths: Sequence[float]) -> list[Found]:
    """The adapters at paths, each with the strength of its path; of a run's folder or of a file those of all experts.

    Several may be for one network. Raises ModelError for those whose changes cannot be added up.
    """
    found = []
    for path, strength in zip(paths, strengths, strict=True):
        inside = [path / adapter_folder("adapter", name) for name in (DEFAULT.name, "high", "low")]
        folders = [folder for folder in inside if folder.is_dir()]
        experts = () if folders else experts_in(path)
        read = [(path, read_adapter(path, expert)) for expert in experts]
        for folder, adapter in read or [(folder, read_adapter(folder)) for folder in folders or [path]]:
            found.append(Found(folder, adapter, adapter.metadata.get("weft.expert", DEFAULT.name), strength))
    for together in by_expert(found).values():
        refuse_twice(together)
        if len(together) > 1:
            refuse_without_sum(parts_of(together))
    return found


def by_expert(found: Sequence[Found]) -> dict[str, list[Found]]:
    """Those that are for one network, in the order that they were named in."""
    names = dict.fromkeys(one.expert for one in found)
    return {name: [one for one in found if one.expert == name] for name in names}


def refuse_twice(together: Sequence[Found]) -> None:
    """Raises ModelError for two states of one run on one network: their sum would be its change twice."""
    for i, one in enumerate(together):
        for other in together[:i]:
            ours, theirs = one.adapter.metadata, other.adapter.metadata
            merged = "weft.merged" in {**ours, **theirs}  # keeps the config of its first parent, and is another
            if one.config and not merged and all(ours.get(key) == theirs.get(key) for key in OF_RUN):
                where = "the same network" if one.expert == DEFAULT.name else f"expert {one.expert}"
                raise ModelError(
                    f"{other.path} and {one.path} are both for {where} and of one run, so that what it learned would "
                    "count twice. Give one of them."
                )


def parts_of(together: Sequence[Found]) -> list[Part]:
    return [Part(one.path, one.adapter, one.strength) for one in together]


def config_of(found: Sequence[Found]) -> Mapping[str, Any]:
    """Of the first that says how it was made."""
    return next((one.config for one in found if one.config), {})


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
    """The family section of a training run, with another source when one is given.

    Raises ConfigError for a header by another version of Weft, whose words for a base this one does not know.
    """
    facts = {**config["family"], **({"source": source} if source else {})}
    for choice in OF_MACHINE:
        facts.pop(choice, None)
    section = plugins.section_types("family").get(facts.get("kind", ""))
    try:
        if section is not None:
            return section(**facts)
        problem = f"kind '{facts.get('kind')}'"
    except ValidationError as error:
        problem = ", ".join(".".join(map(str, each["loc"])) or each["msg"] for each in error.errors())
    raise ConfigError(
        f"the header of the adapter says of its base what this version of Weft does not know: {problem}. It was "
        "written by another version; train it on with that one, or export it there."
    )


def choose(paths: Sequence[Path], source: str | None, strength: float | Sequence[float] = 1.0) -> Chosen:
    """Read adapters, and tell their base. strength: one for all, or one for each path. Raises WeftError."""
    strengths = [strength] * len(paths) if isinstance(strength, (int, float)) else strength
    found = find_adapters(paths, strengths)
    for one in found:
        if (one.adapter.dora or one.adapter.kind == "oft") and one.strength != 1:
            name = "a DoRA" if one.adapter.dora else "an OFT"
            raise ConfigError(f"--strength: {one.path} is {name}, no multiple of whose weights is a weaker one.")
    steps = common_step_list([(one.path, one.adapter) for one in found])
    return Chosen(found, base_family(config_of(found), source), source, steps)


def apply_adapters(
    paths: Sequence[Path], source: str | None, device: str, precision: str, strength: float | Sequence[float]
) -> Applied:
    """Load the base, put adapters on it at a strength (1: as trained), in eval mode. Raises WeftError."""
    return apply_chosen(choose(paths, source, strength), device, precision)


def apply_chosen(chosen: Chosen, device: str, precision: str) -> Applied:
    """The same with adapters that were read."""
    engine = plugins.find("engine", "torch")(device=device, precision=precision).open()
    model = applied_model(chosen.found, chosen.family, engine)
    return Applied(model, engine, chosen.config, all(is_trained_on(one, chosen) for one in chosen.found))


def is_trained_on(one: Found, chosen: Chosen) -> bool:
    """Whether an adapter's header names the base weights that are there now; True where it names none."""
    base = one.adapter.metadata.get("weft.base")
    if base is None or not one.config:
        return True
    # What is compared are the networks that this adapter was trained on, and those of the base that it now goes on.
    expert = {key: value for key, value in one.config["family"].items() if key == "expert"}
    there = {"family": {**chosen.config["family"], **expert}}
    return base == trained_family(there, chosen.source).identity()["network"]


def applied_model(found: Sequence[Found], family: ModelFamily, engine: Engine) -> Model:
    """All networks of a family, those with adapters under the sum of them. Raises ModelError for an adapter without a
    network."""
    names = [expert.name for expert in family.all_experts]
    for one in found:
        if one.expert not in names:
            known = "has one network" if names == [DEFAULT.name] else f"has the experts {' and '.join(names)}"
            raise ModelError(f"{one.path} is for expert '{one.expert}', but this model {known}. Name another --base.")
    together = by_expert(found)
    networks: dict[str, nn.Module] = {}
    adapters: dict[str, Adapters] = {}
    for number, name in enumerate(names):
        network = family.load(engine.precision, name, engine.berth(number))
        if name in together:
            adapters[name] = attached(together[name], network)
        networks[name] = engine.place(network, family.blocks(network)).eval()
    return joined(networks, adapters, engine, family)


def attached(together: Sequence[Found], network: nn.Module) -> Adapters:
    """One adapter on a network, which is the sum of those that are for it. Raises ModelError when the network has not
    the layers that one of them changes."""
    modules = {name for name, _ in network.named_modules()}
    for one in together:
        strange = [path for path in one.adapter.paths if path not in modules]
        if strange:
            raise ModelError(
                f"{one.path}: this base has no '{strange[0]}', which the adapter changes, nor {len(strange) - 1} "
                "others. It was trained on another model: name that one with --base."
            )
    first = together[0]
    adapter = at_strength(first.adapter, first.strength)
    if len(together) > 1:
        adapter = summed(parts_of(together), {}).adapter
    adapters = recipe_of(adapter, adapter.paths).attach(network, adapter.paths, (first.expert,), seed=0)
    adapters.load_state_dict(first.expert, adapter.tensors)
    return adapters
