"""A finished adapter on its base, ready to generate: from the adapter's own header, or from what the user says."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft import plugins
from weft.adapters.lora import Lora
from weft.contracts import Encoders, Engine, Model
from weft.errors import ConfigError, ModelError
from weft.formats.adapter_file import SavedAdapter, paths_in
from weft.formats.reading import read_adapter
from weft.run.assemble import find_adapter

ROLE = "default"


@dataclass(frozen=True)
class Applied:
    """A base with an adapter on it. config: of the run that made the adapter, empty when the file does not say.

    trained_here: False when the adapter's header names other base weights than these.
    """

    model: Model
    engine: Engine
    encoders: Encoders
    config: Mapping[str, Any]
    trained_here: bool


def training_config(adapter: SavedAdapter) -> Mapping[str, Any]:
    """The resolved config in an adapter's header; empty when another program wrote the file."""
    return json.loads(adapter.metadata.get("weft.config", "{}"))


def base_family(config: Mapping[str, Any], source: str | None) -> Any:
    """The family section: the training run's own, with another source when one is given.

    Raises ConfigError when neither says what the base is.
    """
    if config:
        facts = dict(config["family"])
        if source:
            facts["source"] = source
        return plugins.section_types("family")[facts["kind"]](**facts)
    if not source:
        raise ConfigError("this adapter's file does not say which base it was trained on. Add --base FOLDER.")
    return plugins.section_types("family")["wan"](source=source)


def apply_adapter(path: Path, source: str | None, device: str, precision: str, strength: float) -> Applied:
    """Load the base, put the adapter on it at a strength (1: as trained), in eval mode. Raises WeftError."""
    adapter = read_adapter(find_adapter(path))
    config = training_config(adapter)
    if adapter.dora and strength != 1:
        raise ConfigError(f"--strength: {path} is a DoRA, whose change is no multiple of its weights. Leave it at 1.")
    family = base_family(config, source)
    engine = plugins.find("engine", "single")(device=device, precision=precision).open()
    network = family.load(engine.precision)
    paths = adapter.targets or paths_in(adapter.tensors)
    modules = {name for name, _ in network.named_modules()}
    strange = [path for path in paths if path not in modules]
    if strange:
        raise ModelError(
            f"{path}: this base has no '{strange[0]}', which the adapter changes, nor {len(strange) - 1} others. "
            "It was trained on another model: name that one with --base."
        )
    section = Lora(
        backend="native", rank=adapter.rank, alpha=adapter.alpha, rslora=adapter.rslora, dora=adapter.dora,
        targets=tuple(paths),
    )  # fmt: skip
    adapters = section.attach(network, paths, (ROLE,), seed=0)
    tensors = {n: t * strength if n.endswith(".lora_B.weight") else t for n, t in adapter.tensors.items()}
    adapters.load_state_dict(ROLE, tensors)
    network = engine.place(network, family.blocks(network)).eval()
    base = family.identity()["network"]
    return Applied(
        Model(network, family, adapters),
        engine,
        family.encoders(engine.device, engine.carry),
        config,
        trained_here=adapter.metadata.get("weft.base", base) == base,
    )
