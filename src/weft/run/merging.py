"""Adapters into a base: which go into which of its networks, and whether they fit. Nothing is written here."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from weft.contracts import DEFAULT
from weft.errors import ConfigError, ModelError, did_you_mean
from weft.families.checkpoint import open_checkpoint
from weft.families.loading import SHIPPED, model_folder
from weft.families.sniff import names_expert
from weft.families.text_weights import JoinedSource
from weft.families.weights import Source
from weft.formats.adapter_file import STEP_LIST
from weft.formats.reading import experts_in, read_adapter
from weft.formats.sniff import sniff
from weft.run.apply import Found, by_expert, refuse_twice
from weft.run.base_weights import BaseWeights, open_weights
from weft.run.block_strengths import BlockStrengths
from weft.run.checkpoint_folders import sha256_of
from weft.run.merge import folders_of
from weft.run.merged_weights import Edits, Share, check_sizes, edits_of
from weft.run.summed import kind_of

EXPERTS = ("high", "low")
TIED = ("lm_head", "embed_tokens")  # ends of names of layers that may be one tensor


@dataclass(frozen=True)
class Asked:
    """What is to be merged, as the command says. weights: how much each adapter counts. expert: high or low. dtype:
    bf16, fp16 or fp32, of the merged weights; None keeps each tensor's own. force: also where an adapter's header
    names other base weights."""

    adapters: Sequence[Path]
    base: Path
    weights: Sequence[float] = ()
    blocks: BlockStrengths = field(default_factory=BlockStrengths)
    expert: str | None = None
    dtype: str | None = None
    force: bool = False


@dataclass(frozen=True)
class Network:
    """One network of the base, and what goes into it. expert: default where the base has one."""

    expert: str
    weights: BaseWeights
    adapters: Sequence[Found]
    edits: Edits

    @property
    def layers(self) -> int:
        """How many layers are changed."""
        return len({share.path for rows in self.edits.values() for each in rows for share in each.shares})


@dataclass(frozen=True)
class Merge:
    """A merge that can be made. notes: what the user should know of it."""

    asked: Asked
    networks: Sequence[Network]
    notes: Sequence[str]

    def record(self, network: Network) -> dict[str, Any]:
        """What the header of a merged file says."""
        return {
            "method": "merged into a base",
            "base": str(self.asked.base),
            "base_identity": network.weights.identity,
            "dtype": self.asked.dtype or "as stored",
            "blocks": str(self.asked.blocks) or None,
            "adapters": [_record(one) for one in network.adapters],
        }


def planned(asked: Asked) -> Merge:
    """Read the adapters and the headers of the base. Raises WeftError for what does not go together."""
    known = str(asked.base) in SHIPPED
    asked = replace(asked, base=model_folder(str(asked.base)) if known else asked.base.expanduser())
    found = _adapters(asked)
    experts = _experts_of(asked.base)
    if not experts:
        found = _of_one_network(found, asked)
    asked.blocks.check(path for one in found for path in one.adapter.paths)
    networks, notes = [], []
    for expert, together in by_expert(found).items():
        _refuse_other_expert(together[0], experts, asked)
        weights = open_weights(asked.base, expert if experts else None)
        notes += _checked(together, weights, asked)
        shares = [
            Share(one.adapter, path, strength)
            for one in together for path in one.adapter.paths
            if (strength := one.strength * asked.blocks.of(path))
        ]  # fmt: skip
        if not shares:
            raise ConfigError("--blocks: every adapted layer has the strength 0, so nothing would change.")
        networks.append(Network(expert, weights, together, edits_of(weights.source, shares)))
    left = [expert for expert in experts if expert not in by_expert(found)]
    if left:
        notes.append(f"expert {left[0]} stays as it is: no adapter is for it")
    notes += [f"{one.path} is a few-step student: {one.adapter.step_list}, guidance 1"
              for one in found if STEP_LIST in one.adapter.metadata]  # fmt: skip
    return Merge(asked, networks, notes)


# ---- The adapters ---------------------------------------------------------------------------------------------------


def _adapters(asked: Asked) -> list[Found]:
    """Those at the paths; of a run's folder, or a file for both, those of all experts, or of the one that is asked
    for."""
    weights = list(asked.weights) or [1.0] * len(asked.adapters)
    if len(weights) != len(asked.adapters):
        raise ConfigError(
            f"--weights: expected {len(asked.adapters)} numbers, one for each adapter, got {len(weights)}."
        )
    found = []
    for path, weight in zip(asked.adapters, weights, strict=True):
        inside = [(folder, expert) for folder in folders_of(path) for expert in experts_in(folder) or (None,)]
        own = [_found(folder, weight, asked.expert, expert) for folder, expert in inside]
        found += [one for one in own if len(own) == 1 or asked.expert in (None, one.expert)]
    for one in found:
        if asked.expert is not None and one.expert != asked.expert:
            raise ModelError(f"{one.path} is for expert {one.expert}, as its header says, and not for {asked.expert}.")
    return found


def _found(path: Path, weight: float, expert: str | None, inside: str | None) -> Found:
    """An adapter and its expert, as its header, the option or else its name says. inside: which of a file for both."""
    adapter = read_adapter(path, inside)
    told = adapter.metadata.get("weft.expert")
    named = [each for each in EXPERTS if names_expert(path.name, each)]
    by_name = named[0] if len(named) == 1 else DEFAULT.name
    return Found(path, adapter, told if told in EXPERTS else expert or by_name, weight)


def _experts_of(base: Path) -> tuple[str, ...]:
    """The experts that a base has; none where it has one network."""
    folders = {"high": ("high_noise_model", "transformer"), "low": ("low_noise_model", "transformer_2")}
    two = (base / "transformer_2").is_dir() or any((base / f"{each}_noise_model").is_dir() for each in EXPERTS)
    return tuple(each for each in EXPERTS if two and any((base / name).is_dir() for name in folders[each]))


def _of_one_network(found: Sequence[Found], asked: Asked) -> list[Found]:
    """All adapters as for the only network of a base, which a file of one expert is, too."""
    experts = sorted({one.expert for one in found} - {DEFAULT.name})
    if len(experts) > 1:
        raise ModelError(
            f"{asked.base} is one network, and the adapters are for the experts {' and '.join(experts)}. Name one with "
            "--expert, or a base with both."
        )
    for expert in experts:
        other = EXPERTS[1 - EXPERTS.index(expert)]
        if names_expert(asked.base.name, other) and not names_expert(asked.base.name, expert):
            raise ModelError(
                f"{asked.base} calls itself the expert for {other} noise, and {found[0].path} is for {expert}."
            )
    return [Found(one.path, one.adapter, DEFAULT.name, one.strength) for one in found]


def _record(one: Found) -> dict[str, Any]:
    told = one.adapter.metadata
    return {
        "adapter": str(one.path),
        "sha256": sha256_of(sniff(one.path).weights),
        "weight": one.strength,
        "kind": kind_of(one.adapter),
        "rank": one.adapter.rank,
        "expert": one.expert,
        "run": one.config.get("name"),
        **{key: told[key] for key in ("weft.step", "weft.data", "weft.base", "weft.merged", STEP_LIST) if key in told},
    }


# ---- Whether they go together ---------------------------------------------------------------------------------------


def _checked(together: Sequence[Found], weights: BaseWeights, asked: Asked) -> list[str]:
    """Raises for adapters that do not fit a network; returns what is to be noted."""
    refuse_twice(together)
    _refuse_8_bits(weights, asked)
    for one in together:
        _refuse_other_layers(one, weights)
        for path in one.adapter.paths:
            check_sizes(weights.source, Share(one.adapter, path, 1.0), str(one.path))
        _refuse_fractions(one, asked.blocks)
    whole = next((one for one in together if _depends_on_the_weight(one)), None)
    if whole is not None and len(together) > 1:
        other = next(one for one in together if one is not whole)
        raise ModelError(
            f"{whole.path} is of kind {kind_of(whole.adapter)}, whose change depends on the weights that {other.path} "
            "changes too: there is no sum of both. Merge one, and then the other into what came out."
        )
    notes = (_other_base(one, weights, asked) for one in together)
    return [note for note in notes if note]


def _refuse_other_expert(one: Found, experts: Sequence[str], asked: Asked) -> None:
    if experts and one.expert == DEFAULT.name:
        raise ConfigError(
            f"--expert: {asked.base} has two networks, and {one.path} does not say which it is for. Write --expert "
            "high or --expert low."
        )
    if experts and one.expert not in experts:
        raise ModelError(f"{one.path} is for expert {one.expert}; {asked.base} has {' and '.join(experts)} alone.")


def _refuse_8_bits(weights: BaseWeights, asked: Asked) -> None:
    source = weights.source
    packed = [name for name in source.names if source.in_8_bits(name)]
    if packed and asked.dtype is None:
        raise ConfigError(
            f"--dtype: {asked.base} keeps weights in {weights.precision}, whose steps are larger than what most "
            "adapters change. Write --dtype bf16 to decode them, or take the model in bf16."
        )
    for name in packed:
        if len(source.shape(name)) > 1:
            source.scale_shape(name)  # raises for a kind that nobody knows


def _refuse_other_layers(one: Found, weights: BaseWeights) -> None:
    source = weights.source
    tied = next((path for path in one.adapter.paths if path.endswith(TIED)), None)
    if tied is not None and _is_tied(source):
        raise ModelError(
            f"{one.path} changes '{tied}', which is one tensor for the words that are read and those that are written "
            f"in {weights.path}: the change would be in both. Use the adapter unmerged."
        )
    missing = [path for path in one.adapter.paths if f"{path}.weight" not in source.names]
    if missing:
        layers = [name.removesuffix(".weight") for name in source.names if name.endswith(".weight")]
        near = did_you_mean(missing[0], layers) if layers else ""
        raise ModelError(
            f"{one.path}: {weights.path} has no layer '{missing[0]}', which the adapter changes, nor "
            f"{len(missing) - 1} others of {len(one.adapter.paths)}. It was trained on another model. {near}"
        )
    joined = source.joined if isinstance(source, JoinedSource) else {}
    several = next((path for path in one.adapter.paths if f"{path}.weight" in joined), None)
    if several is not None:
        raise ModelError(
            f"{one.path}: '{several}' is made of several tensors of {weights.path}, into which Weft cannot merge. Use "
            "the adapter unmerged."
        )


def _is_tied(source: Source) -> bool:
    ends = {name.removesuffix(".weight").rpartition(".")[2] for name in source.names}
    return "embed_tokens" in ends and "lm_head" not in ends


def _depends_on_the_weight(one: Found) -> bool:
    return one.adapter.dora or one.adapter.kind == "oft"


def _refuse_fractions(one: Found, blocks: BlockStrengths) -> None:
    """A DoRA or OFT is in a layer or not."""
    odd = next((path for path in one.adapter.paths if one.strength * blocks.of(path) not in (0, 1)), None)
    if odd is not None and _depends_on_the_weight(one):
        option = "--weights" if one.strength != 1 else "--blocks"
        raise ConfigError(
            f"{option}: {one.path} is of kind {kind_of(one.adapter)}, no part of whose change is a weaker one. Its "
            "strength is 1, or 0 in blocks that it is left out of."
        )


def _other_base(one: Found, weights: BaseWeights, asked: Asked) -> str | None:
    """What to note of an adapter whose header names other base weights. Raises ModelError when that is not allowed."""
    named = one.adapter.metadata.get("weft.base")
    if named is None or named in _identities(weights):
        return None
    if asked.force:
        return f"{one.path} was trained on other files than {asked.base}; merged because of --force"
    raise ModelError(
        f"{one.path} was trained on other base weights than {asked.base} (weft.base in its header is {named}, and this "
        f"is {weights.identity}). If these are the same model in other files or another precision, add --force."
    )


def _identities(weights: BaseWeights) -> tuple[str, ...]:
    """Those of a network, and of both experts, as an adapter of a run on both says it."""
    if weights.expert is None or weights.family == "causal-lm":
        return (weights.identity,)
    checkpoint = open_checkpoint(weights.path, None, weights.family)
    both = [part for part in EXPERTS if checkpoint.has(part)]
    return weights.identity, checkpoint.fingerprint(*both)
