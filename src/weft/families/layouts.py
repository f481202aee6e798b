"""Where the parts of a model lie: in diffusers' folders, in the official directories, or in single files."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from weft.errors import ModelError
from weft.families.loading import SHIPPED, model_folder, weight_files

FOLDER_OF = {"high": "transformer", "low": "transformer_2"}  # diffusers' own names of the two experts
NETWORKS = ("transformer", "high", "low")
TOKENIZERS = ("tokenizer", "tokenizer_2")
WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".gguf")  # the last only to say what it is
OFFICIAL_CLASS = "WanModel"  # in the makers' config.json, which has other words than diffusers'
HUNYUAN_FOLDER = "hunyuan-video-t2v-720p"


@dataclass(frozen=True)
class Place:
    """Where one part lies. where: the field of the config that leads to it. config: its JSON file, if there is one."""

    part: str
    where: str
    weights: tuple[Path, ...] = ()
    config: Path | None = None
    folder: Path | None = None  # of this part alone; read by the libraries' own ways

    @property
    def label(self) -> str:
        """For messages."""
        name = self.folder or (self.weights[0] if self.weights else self.config)
        return f"{self.where}: {name}"

    def read_config(self) -> dict[str, Any]:
        """The JSON beside the weights; empty when there is none. Raises ModelError."""
        if self.config is None:
            return {}
        try:
            return json.loads(self.config.read_text(encoding="utf-8"))
        except ValueError as damaged:
            raise ModelError(f"{self.config}: not valid JSON ({damaged}). Fetch the file again.") from damaged


def in_known_words(config: Mapping[str, Any]) -> bool:
    """Whether a config is diffusers' or transformers', not the makers' own."""
    return config.get("_class_name") != OFFICIAL_CLASS and ("_class_name" in config or "model_type" in config)


class Layout(Protocol):
    """A way to lay out a model."""

    @property
    def name(self) -> Literal["diffusers", "official", "files"]: ...
    @property
    def two_experts(self) -> bool: ...
    def place(self, part: str) -> Place | None: ...


@dataclass(frozen=True)
class DiffusersFolder:
    """A folder for each part, with its config."""

    root: Path
    name: Literal["diffusers"] = "diffusers"

    @property
    def two_experts(self) -> bool:
        return (self.root / "transformer_2").is_dir()

    def place(self, part: str) -> Place | None:
        folder = self.root / FOLDER_OF.get(part, part)
        return folder_place(part, folder, "family.source") if folder.is_dir() else None

    def index(self) -> dict[str, Any]:
        """model_index.json; empty when there is none."""
        path = self.root / "model_index.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@dataclass(frozen=True)
class OfficialWan:
    """The directory as the makers of Wan publish it."""

    root: Path
    name: Literal["official"] = "official"

    @property
    def two_experts(self) -> bool:
        return any((self.root / f"{expert}_noise_model").is_dir() for expert in ("high", "low"))

    def place(self, part: str) -> Place | None:
        if part in NETWORKS:
            folder = self.root if part == "transformer" else self.root / f"{part}_noise_model"
            there = folder.is_dir() and any(folder.glob("diffusion_pytorch_model*.safetensors"))
            if not there or (part == "transformer" and self.two_experts):
                return None
            files = tuple(weight_files(folder, "."))
            config = folder / "config.json"
            return Place(part, "family.source", files, config if config.is_file() else None)
        if part == "tokenizer":
            folder = self.root / "google" / "umt5-xxl"
            return Place(part, "family.source", folder=folder) if folder.is_dir() else None
        patterns = {"vae": "Wan2.?_VAE", "text_encoder": "models_t5_*", "image_encoder": "models_clip_*"}
        found = [p for end in (".safetensors", ".pth") for p in sorted(self.root.glob(patterns.get(part, "-") + end))]
        return Place(part, "family.source", (found[0],)) if found else None


@dataclass(frozen=True)
class OfficialHunyuan:
    """The directory as the makers of HunyuanVideo publish it; its text encoders in transformers' folders."""

    root: Path
    name: Literal["official"] = "official"
    two_experts: bool = False

    def place(self, part: str) -> Place | None:
        inner = self.root / HUNYUAN_FOLDER
        inner = inner if inner.is_dir() else self.root
        if part == "transformer":
            found = sorted(
                (inner / "transformers").glob("mp_rank_00_model_states*.pt"), key=lambda path: len(path.name)
            )
            return Place(part, "family.source", (found[0],)) if found else None
        if part == "vae":
            found = sorted((inner / "vae").glob("pytorch_model.pt"))
            return Place(part, "family.source", (found[0],)) if found else None
        folder = self.root / part.replace("tokenizer", "text_encoder")
        if part == "scheduler" or not folder.is_dir():
            return None
        return (
            Place(part, "family.source", folder=folder)
            if part in TOKENIZERS
            else folder_place(part, folder, "family.source")
        )


@dataclass(frozen=True)
class SingleFiles:
    """A transformer in one file, and nothing else but what family.files names."""

    network: Path | None
    name: Literal["files"] = "files"
    two_experts: bool = False

    def place(self, part: str) -> Place | None:
        if part != "transformer" or self.network is None:
            return None
        return Place(part, "family.source", (self.network,), beside(self.network))


@dataclass(frozen=True)
class Overridden:
    """A layout in which some parts lie elsewhere."""

    base: Layout
    files: Mapping[str, Path] = field(default_factory=dict)

    @property
    def name(self) -> Literal["diffusers", "official", "files"]:
        return self.base.name

    @property
    def two_experts(self) -> bool:
        return bool({"high", "low"} & set(self.files)) or (self.base.two_experts and "transformer" not in self.files)

    def place(self, part: str) -> Place | None:
        path = self.files.get(part)
        return self.base.place(part) if path is None else file_place(part, path)


def layout_of(source: str, files: Mapping[str, Path], family: str) -> Overridden:
    """Tell how a source is laid out. Raises ModelError."""
    path = Path(source).expanduser()
    if source not in SHIPPED and path.is_file():
        if path.suffix not in WEIGHT_FILES:
            raise ModelError(
                f"family.source: '{source}' is a file, and no weights. Expected was a folder with a model, or the "
                "transformer as one .safetensors file."
            )
        return Overridden(SingleFiles(path), files)
    root = model_folder(source)
    if (root / "model_index.json").is_file() or any(
        (root / part / "config.json").is_file() for part in FOLDER_OF.values()
    ):
        return Overridden(DiffusersFolder(root), files)
    if any((root / f"{expert}_noise_model").is_dir() for expert in ("high", "low")) or any(
        root.glob("diffusion_pytorch_model*.safetensors")
    ):
        return Overridden(OfficialWan(root), files)
    if (root / HUNYUAN_FOLDER).is_dir() or any((root / "transformers").glob("mp_rank_00_model_states*.pt")):
        return Overridden(OfficialHunyuan(root), files)
    if any(part in files for part in NETWORKS):
        return Overridden(DiffusersFolder(root), files)
    found = sorted(entry.name for entry in root.iterdir())
    inside = ", ".join(found[:6]) + (" and more" if len(found) > 6 else "") if found else "nothing"
    raise ModelError(
        f"family.source: {root} is no model that Weft knows: it holds {inside}. Expected were diffusers' folders "
        f"(transformer/config.json, ...), the official directory of the model, or one .safetensors file."
    )


def folder_place(part: str, folder: Path, where: str) -> Place:
    """A part in a folder of its own."""
    config = folder / ("scheduler_config.json" if part == "scheduler" else "config.json")
    weights = () if part in (*TOKENIZERS, "scheduler") else tuple(sorted(folder.glob("*.safetensors")))
    return Place(part, where, weights, config if config.is_file() else None, folder)


def file_place(part: str, path: Path) -> Place:
    """A part that family.files names: a folder or a file. Raises ModelError when it is not there."""
    where = f"family.files.{part}"
    if path.is_dir():
        place = folder_place(part, path, where)
        return replace(place, folder=None) if place.weights and not in_known_words(place.read_config()) else place
    if not path.is_file():
        raise ModelError(f"{where}: there is no file or folder '{path}' (looked from {Path.cwd()}).")
    if part in TOKENIZERS:
        return Place(part, where, folder=path.parent)
    if part == "scheduler":
        return Place(part, where, config=path)
    if path.suffix.lower() not in WEIGHT_FILES:
        raise ModelError(f"{where}: '{path}' is no file of weights; expected was one ending in .safetensors or .pth.")
    return Place(part, where, (path,), beside(path))


def beside(path: Path) -> Path | None:
    """A config of the same name as a weight file."""
    config = path.with_suffix(".json")
    return config if config.is_file() else None
