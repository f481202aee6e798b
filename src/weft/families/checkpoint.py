"""A base model as its parts, however they are laid out and named: configs, identities, weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import nn

from weft.contracts import Berth
from weft.errors import ModelError
from weft.families import names_wan, sniff
from weft.families.configs import INFERRED
from weft.families.dressed import dress
from weft.families.files import Files
from weft.families.known import RELEASED, Released, Sizes, released, scheduler_config
from weft.families.layouts import NETWORKS, TOKENIZERS, DiffusersFolder, Overridden, Place, in_known_words, layout_of
from weft.families.loading import read_config, sampled_digest, weight_files
from weft.families.storage import FULL, check_storage
from weft.families.stored import WeightFiles
from weft.families.weights import HERE, Form, Source, bare, fill, weight_bytes
from weft.names import hunyuan_video, wan
from weft.names.rules import Names, Piece, Shapes, unchanged

Module = TypeVar("Module", bound=nn.Module)
FamilyName = Literal["wan", "hunyuan-video"]

NETWORK_CLASS = {"wan": "WanTransformer3DModel", "hunyuan-video": "HunyuanVideoTransformer3DModel"}
KIND_OF_PART = {
    **dict.fromkeys(NETWORKS, "network"), "vae": "vae", "text_encoder": "text encoder",
    "text_encoder_2": "text encoder", "image_encoder": "image encoder",
}  # fmt: skip
TRANSLATIONS: Mapping[tuple[str, str], Callable[[Shapes], Names]] = {
    ("wan", "network"): wan.transformer,
    ("wan", "vae"): names_wan.vae,
    ("wan", "text encoder"): names_wan.text_encoder,
    ("wan", "image encoder"): names_wan.image_encoder,
    ("hunyuan-video", "network"): hunyuan_video.transformer,
    ("hunyuan-video", "vae"): hunyuan_video.vae,
}
# Parts of names by which files of whole models go beyond the encoder that Weft takes from them, and heads of names
# that versions of transformers put on or leave out.
LEFT_OUT = ("lm_head.", "visual_projection.", "text_projection.", "logit_scale", "spiece_model", "position_ids",
            "decoder.", "vision_tower.", "multi_modal_projector.")  # fmt: skip
HEADS = ("", "model.", "language_model.", "language_model.model.", "model.language_model.", "text_model.",
         "vision_model.", "text_encoder.", "clip_l.transformer.")  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What a model is beside the configs of its parts. shift and steps: of its sampler."""

    task: Literal["t2v", "i2v", "ti2v"]
    experts: int
    boundary_ratio: float | None  # in shifted time; None with one expert
    expand_timesteps: bool  # a time for each token
    shift: float
    steps: int
    model: str | None  # the released model, as far as sizes tell


@dataclass(frozen=True)
class Checkpoint:
    """A source, and the files that stand in for its parts. Parts: transformer, or high and low of a model with two
    experts; vae; text_encoder, text_encoder_2; image_encoder; tokenizer, tokenizer_2; scheduler."""

    source: str
    family: FamilyName
    where: Overridden

    @property
    def layout(self) -> Literal["diffusers", "official", "files"]:
        return self.where.name

    def has(self, part: str) -> bool:
        return self.where.place(part) is not None

    def place(self, part: str) -> Place:
        """Where a part lies. Raises ModelError."""
        found = self.where.place(part)
        if found is not None:
            return found
        if isinstance(self.where.base, DiffusersFolder) and part not in (*TOKENIZERS, "scheduler"):
            folder = {"high": "transformer", "low": "transformer_2"}.get(part, part)
            read_config(self.where.base.root, folder, "")  # names what is there
        raise ModelError(
            f"family.source: {self.source} has no {part.replace('_', ' ')}. "
            f"Name it in family.files.{part}, or use a source that has it."
        )

    # ---- What it is -----------------------------------------------------------------------------------------------

    @cached_property
    def _opened(self) -> dict[str, Source]:
        return {}

    @cached_property
    def _contents(self) -> dict[str, sniff.Content]:
        return {}

    def weights(self, part: str) -> WeightFiles:
        """The files of a part, whole. Raises ModelError."""
        place = self.place(part)
        if place.folder is not None:
            return WeightFiles(tuple(weight_files(place.folder.parent, place.folder.name)))
        for path in place.weights:
            sniff.refuse_gguf(path)
        return WeightFiles(place.weights)

    def content(self, part: str) -> sniff.Content:
        """What the files of a part hold, by their headers."""
        if part not in self._contents:
            entries = self.weights(part).entries
            header = sniff.Tensors({name: (entry.dtype, entry.shape) for name, entry in entries.items()})
            self._contents[part] = sniff.content_of(header)
        return self._contents[part]

    def stored(self, part: str) -> str:
        """How most of a part's numbers are kept: fp32, bf16, fp16, fp8 or fp8 scaled."""
        return self.content(part).precision

    def tensors(self, part: str) -> Source:
        """The tensors of a part under diffusers' and transformers' names. Raises ModelError for no such part."""
        if part not in self._opened:
            self._opened[part] = self._open(part)
        return self._opened[part]

    def _open(self, part: str) -> Source:
        place, weights, content = self.place(part), self.weights(part), self.content(part)
        self._check(place, content)
        kind = KIND_OF_PART[part]
        names = unchanged if content.naming != "official" else TRANSLATIONS[self.family, kind]
        return Source.open(weights, lambda shapes: _without_prefix(shapes, names), place.label)

    def _check(self, place: Place, content: sniff.Content) -> None:
        kind = KIND_OF_PART[place.part]
        wanted = (
            f"a {sniff.WORDS[self.family]} transformer" if kind == "network" else f"its {place.part.replace('_', ' ')}"
        )
        if content.foreign:
            raise ModelError(
                f"{place.label} holds {content}, which Weft cannot read. Take the model in bf16, fp16 or fp8; "
                "family.dtype=nf4 or int8 makes it as small."
            )
        own_folder = place.folder is not None and self.layout == "diffusers"
        if content.kind == "unknown" and own_folder:
            return  # its config says what it is
        if content.kind != kind:
            raise ModelError(f"{place.label} holds {content}. Expected was {wanted}; name its file in {place.where}.")
        if content.family != self.family and kind in ("network", "vae"):
            raise ModelError(
                f"{place.label} holds {content}, but the config's family is {self.family}. "
                f"Write family.kind={content.family}, or name {wanted}."
            )
        self._check_expert(place)

    def _check_expert(self, place: Place) -> None:
        """The two experts have the same shapes: only the name of a file can say that they were swapped."""
        other = {"high": "low", "low": "high"}.get(place.part)
        if other is None or not place.where.startswith("family.files"):
            return
        path = place.weights[0]
        name = f"{path.parent.name}/{path.name}" if path.name.startswith("diffusion_pytorch_model") else path.name
        if sniff.names_expert(name, other) and not sniff.names_expert(name, place.part):
            raise ModelError(
                f"{place.where}: {name} calls itself the expert for {other} noise. The files' shapes "
                f"are equal and cannot tell. Swap family.files.high and low, or rename the file if its name is wrong."
            )

    def config(self, part: str) -> dict[str, Any]:
        """The config of a part in diffusers' or transformers' words: read, or inferred from names and shapes."""
        if part == "scheduler":
            return self._scheduler_config()
        place = self.place(part)
        kind = "network" if part in NETWORKS else part
        if place.folder is not None:
            expected = {"network": NETWORK_CLASS[self.family], "vae": _VAE_CLASS[self.family]}.get(kind, "")
            return read_config(place.folder.parent, place.folder.name, expected)
        beside = place.read_config()
        if in_known_words(beside):
            return beside
        source = self.tensors(part)
        shapes = {name: source.shape(name) for name in source.names}
        return INFERRED[self.family, kind](shapes, self._heads(part, beside), place.label)

    def _heads(self, part: str, beside: Mapping[str, Any]) -> int | None:
        """How many heads, where the official config beside the weights, or the folder's own, says it."""
        if "num_heads" in beside:
            return int(beside["num_heads"])
        replaced = self.where.base.place(part) if part in self.where.files else None
        config = replaced.read_config() if replaced is not None else {}
        found = config.get("num_attention_heads", config.get("num_heads"))
        return None if found is None else int(found)

    def inferred(self, part: str) -> bool:
        """Whether a part's config was told from its tensors, because no file says it."""
        place = self.place(part)
        return place.folder is None and not in_known_words(place.read_config())

    def _scheduler_config(self) -> dict[str, Any]:
        place = self.where.place("scheduler")
        if place is not None and place.config is not None:
            return place.read_config()
        if self.layout == "diffusers":
            folder = f"{self.source}/scheduler" if place is None else str(place.folder)
            raise ModelError(
                f"family.source: {folder} has no scheduler/scheduler_config.json. Fetch it; samples need it."
            )
        return dict(scheduler_config(self.family, self._released.shift))

    @cached_property
    def first_network(self) -> str:
        """The network that the others are like: transformer, high, or low where it stands alone."""
        order = ("high", "low") if self.where.two_experts else ("transformer",)
        return next((part for part in order if self.has(part)), order[0])

    @property
    def kind_of_network(self) -> FamilyName:
        """The family that the transformer is of, whatever this checkpoint was opened as. Raises ModelError."""
        place, found = self.place(self.first_network), self.content(self.first_network)
        if found.kind != "network" or found.family is None:
            raise ModelError(f"{place.label} holds {found}. Expected was a transformer of Wan or HunyuanVideo.")
        return found.family  # type: ignore[return-value]

    @cached_property
    def _network(self) -> tuple[str | None, Released]:
        """Name and release that the network is of, or the likest one."""
        config = self.config(self.first_network)
        channels, out = config["in_channels"], config["out_channels"]
        experts = 2 if self.where.two_experts else 1
        name = released(self.family, Sizes.of(config), experts)
        if name is not None:
            return name, RELEASED[name]
        if self.family == "hunyuan-video":
            return None, RELEASED["HunyuanVideo"]
        if channels != out:
            return None, RELEASED["Wan 2.2 I2V A14B" if experts == 2 else "Wan 2.1 I2V 14B 720P"]
        if channels == 48:
            return None, RELEASED["Wan 2.2 TI2V 5B"]
        return None, RELEASED["Wan 2.2 T2V A14B" if experts == 2 else "Wan 2.1 T2V 14B"]

    @property
    def _released(self) -> Released:
        return self._network[1]

    @cached_property
    def facts(self) -> Facts:
        """Raises ModelError when there is no transformer."""
        name, like = self._network
        base = self.where.base
        index = base.index() if isinstance(base, DiffusersFolder) else {}
        two = self.where.two_experts
        place = self.where.place("scheduler")
        scheduler = place.read_config() if place is not None else {}
        shift = scheduler.get("flow_shift", scheduler.get("shift", like.shift))
        return Facts(
            task=like.task,
            experts=2 if two else 1,
            boundary_ratio=(index.get("boundary_ratio") or like.boundary) if two else None,
            expand_timesteps=bool(index.get("expand_timesteps", like.expand_timesteps)),
            shift=float(shift),
            steps=like.steps,
            model=name,
        )

    def fingerprint(self, *parts: str) -> str:
        """Identity of the parts' weights and configs, from samples of their bytes. Raises ModelError for weights that
        were cut off."""
        digest = sha256()
        for part in parts:
            place = self.place(part)
            if place.folder is not None:
                paths = sorted(path for path in place.folder.iterdir() if path.is_file())
            else:
                paths = [*place.weights, *([place.config] if place.config is not None else [])]
            label = place.folder.name if place.folder is not None else part
            for path in paths:
                sampled_digest(digest, f"{label}/{path.name}", path)
        return digest.hexdigest()[:32]

    def tokenizer_folder(self, part: str = "tokenizer") -> Path:
        """Raises ModelError when there is none."""
        folder = self.place(part).folder
        assert folder is not None
        return folder

    # ---- Loading --------------------------------------------------------------------------------------------------

    def network(
        self, part: str, network: Module, blocks: Sequence[nn.Module], form: Form, berth: Berth = HERE
    ) -> Module:
        """Fill a network that has shapes only (on meta), tensor by tensor; frozen, in eval mode."""
        check_storage(form.storage)
        return fill(network, blocks, self.tensors(part), form, berth).requires_grad_(False).eval()

    def dress(self, part: str, network: nn.Module, blocks: Sequence[nn.Module], form: Form) -> None:
        """Let a network of shapes alone be as it is when it has been filled."""
        check_storage(form.storage)
        dress(network, blocks, form, self.tensors(part))

    def weight_bytes(
        self, part: str, network: nn.Module, blocks: Sequence[nn.Module], form: Form
    ) -> dict[int | None, int]:
        """Bytes in memory that `network` will fill, by block; None: outside of blocks."""
        check_storage(form.storage)
        return weight_bytes(network, blocks, form, self.tensors(part))

    def module(self, part: str, cls: type[Module], dtype: str) -> Module:
        """An encoder, frozen, on the cpu; dtype: fp32, bf16, fp16, or 'stored' for the file's own."""
        dtype = self.full_dtype(part) if dtype == "stored" else dtype
        place = self.place(part)
        if place.folder is not None:
            self.weights(part)
            names = {"diffusers": "torch_dtype", "transformers": "dtype"}
            option = {names[cls.__module__.partition(".")[0]]: FULL[dtype]}
            made: Any = cls.from_pretrained(place.folder, local_files_only=True, **option)  # type: ignore[attr-defined]
            return made.requires_grad_(False).eval()
        module = bare(lambda: from_config(cls, self.config(part)))
        source = self.tensors(part)
        if part != "vae":
            source = _fitting(source, set(module.state_dict()))
        return fill(module, (), source, Form(dtype)).requires_grad_(False).eval()

    def full_dtype(self, part: str) -> str:
        """The full precision that a part's file has, or that its 8-bit weights are decoded to."""
        precision = self.stored(part)
        if precision.startswith("fp8"):
            return "bf16"
        if precision not in FULL:
            raise ModelError(f"{self.place(part).label}: weights in {precision}. Weft reads fp32, bf16, fp16 and fp8.")
        return precision


_VAE_CLASS = {"wan": "AutoencoderKLWan", "hunyuan-video": "AutoencoderKLHunyuanVideo"}


def open_checkpoint(source: str, files: Files | None, family: FamilyName) -> Checkpoint:
    """The model at a source. Nothing of it is read yet but names of files. Raises ModelError."""
    return Checkpoint(source, family, layout_of(source, files.given() if files is not None else {}, family))


def from_config(cls: type[Module], config: Mapping[str, Any]) -> Module:
    """A module of diffusers or transformers, made as a config says."""
    if cls.__module__.startswith("transformers."):
        made: Any = cls.config_class.from_dict(dict(config))  # type: ignore[attr-defined]
        return cls(made)
    return cls.from_config(dict(config))  # type: ignore[attr-defined]


def _without_prefix(shapes: Shapes, names: Callable[[Shapes], Names]) -> Names:
    """Translate names without the prefix that ComfyUI gives them."""
    prefix = next((p for p in sniff.PREFIXES if any(name.startswith(p) for name in shapes)), "")
    if not prefix:
        return names(shapes)
    found = names({name.removeprefix(prefix): shape for name, shape in shapes.items()})
    original = {name.removeprefix(prefix): name for name in shapes}
    return {target: Piece(original[p.source], p.rows, p.shape) for target, p in found.items()}


def _fitting(source: Source, wanted: set[str]) -> Source:
    """The same tensors under the heads of names that a class has, without those of a larger model around it."""
    kept = {name: piece for name, piece in source.names.items() if not any(part in name for part in LEFT_OUT)}
    if kept.keys() & wanted == wanted:
        return source if kept == source.names else Source(source.weights, kept, source.scales, source.label)
    best: Names = kept
    for theirs in HEADS:
        for ours in HEADS:
            names = {ours + name.removeprefix(theirs): piece for name, piece in kept.items() if name.startswith(theirs)}
            if len(names.keys() & wanted) > len(best.keys() & wanted):
                best = names
    return Source(source.weights, best, source.scales, source.label)
