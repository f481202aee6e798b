"""Which module of a network has which name with the model's makers: for adapters, which stand on modules.

The makers fuse some layers: then one of theirs stands for several of ours, whose outputs are its rows in order.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property

from weft.names import hunyuan_video, wan
from weft.names.rules import Names, Piece

Rows = tuple[tuple[int, int], ...]  # of a fused layer's outputs, ranges one after another; (): all of them

PREFIX = {"wan": "blocks", "hunyuan-video": "transformer_blocks"}

FAMILIES = ("wan", "hunyuan-video")  # whose modules have other names with their makers

# What ComfyUI calls modules that stand in no block of HunyuanVideo; those in blocks it knows by the official names too.
# Source: comfy/ldm/hunyuan_video/model.py, comfy/lora.py (model_lora_keys_unet).
_COMFYUI = {
    "mlp.0": "in_layer", "mlp.2": "out_layer",
    "c_embedder.linear_1": "c_embedder.in_layer", "c_embedder.linear_2": "c_embedder.out_layer",
}  # fmt: skip


@dataclass(frozen=True)
class Modules:
    """The modules of one network that an adapter may stand on, between the makers' names and those of diffusers, which
    are the canonical ones. parts: an official name -> the canonical ones that it stands for, in the order of rows."""

    family: str
    parts: Mapping[str, tuple[str, ...]]

    @cached_property
    def official(self) -> Mapping[str, str]:
        """A canonical name -> the official one."""
        return {path: name for name, paths in self.parts.items() for path in paths}

    @cached_property
    def underscored(self) -> Mapping[str, str]:
        """An official name with underscores in place of dots, as kohya's files have it -> the official name."""
        return {name.replace(".", "_"): name for name in self.parts}

    @cached_property
    def underscored_paths(self) -> Mapping[str, str]:
        """A canonical name with underscores in place of dots -> the canonical name."""
        return {path.replace(".", "_"): path for path in self.official}

    def found(self, name: str) -> str | None:
        """The official or canonical name of what a file calls so, with dots; None for a module that there is not."""
        if name in self.parts or name in self.official:
            return name
        if self.family == "hunyuan-video":
            official = hunyuan_video.official_name(f"{name}.weight").removesuffix(".weight")
            return official if official in self.parts else None
        return None

    def found_underscored(self, name: str) -> str | None:
        """The same of a name with underscores in place of dots."""
        return self.underscored.get(name) or self.underscored_paths.get(name) or self._comfyui_underscored.get(name)

    @cached_property
    def _comfyui_underscored(self) -> Mapping[str, str]:
        names = {self.comfyui(name): name for name in self.parts}
        if self.family == "hunyuan-video":
            words = (("_attn_qkv", "_attn.qkv"), ("_attn_proj", "_attn.proj"), ("mlp.fc1", "mlp.0"),
                     ("mlp.fc2", "mlp.2"), ("mod.linear", "mod.lin"),
                     ("modulation.linear", "modulation.lin"))  # fmt: skip
            for name in self.parts:
                theirs = name
                for official, word in words:
                    theirs = theirs.replace(official, word)
                names[theirs] = name
        return {theirs.replace(".", "_"): name for theirs, name in names.items()}

    def comfyui(self, name: str) -> str:
        """What ComfyUI's loader of adapters calls an official module."""
        if self.family == "hunyuan-video" and re.match(r"(time_in|guidance_in|txt_in\.[tc]_embedder)\.", name):
            for official, theirs in _COMFYUI.items():
                name = re.sub(rf"{re.escape(official)}$", theirs, name)
        return name

    def rows(self, name: str, out: int, inner: int) -> dict[str, Rows]:
        """Where the outputs of an official module (out, inner) go: canonical name -> its rows. Raises KeyError for a
        module that the network has not."""
        paths = self.parts[name]
        if len(paths) == 1 and self.family != "hunyuan-video":
            return {paths[0]: ()}
        return {path: piece.rows for path, piece in self._pieces(name, out, inner).items()}

    def _pieces(self, name: str, out: int, inner: int) -> dict[str, Piece]:
        shapes = {f"{name}.weight": (out, inner)}
        if ".linear1" in name:  # its parts are as wide as linear2's outputs, and as the network
            shapes[name.replace("linear1", "linear2") + ".weight"] = (inner, 0)
        found = _TRANSLATED[self.family](shapes)
        return {
            path.removesuffix(".weight"): piece for path, piece in found.items() if piece.source == f"{name}.weight"
        }


def family_of(paths: Iterable[str]) -> str | None:
    """The family of a network that has canonical modules of such names: wan, hunyuan-video or causal-lm."""
    for path in paths:
        if re.match(r"(single_)?transformer_blocks\.\d+\.(attn|ff|ff_context|norm|norm1|norm1_context|proj_)", path):
            return "hunyuan-video"
        if re.match(r"blocks\.\d+\.(attn[12]|ffn\.net)\.", path):
            return "wan"
        if re.match(r"(model\.)?layers\.\d+\.(self_attn|mlp)\.", path):
            return "causal-lm"
    return None


@cache
def modules(family: str, blocks: int = 64, singles: int = 64) -> Modules:
    """Those of a family's networks with up to so many blocks. Raises KeyError for a family without other names."""
    names = _OFFICIAL[family](blocks, singles)
    return Modules(family, {name: _paths(family, name) for name in names})


def _paths(family: str, name: str) -> tuple[str, ...]:
    shapes = {f"{name}.weight": (8, 1), f"{name.replace('linear1', 'linear2')}.weight": (1, 8)}
    found = _TRANSLATED[family](shapes)
    of_this = [path for path, piece in found.items() if piece.source == f"{name}.weight"]
    return tuple(path.removesuffix(".weight") for path in of_this)


def _wan(blocks: int, singles: int) -> list[str]:
    """singles: none in Wan."""
    inside = [f"{kind}_attn.{each}" for kind in ("self", "cross") for each in "qkvo"]
    inside += ["cross_attn.k_img", "cross_attn.v_img", "ffn.0", "ffn.2"]
    around = ["patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2",
              "time_projection.1", "img_emb.proj.1", "img_emb.proj.3", "head.head"]  # fmt: skip
    return [*(f"blocks.{n}.{name}" for n in range(blocks) for name in inside), *around]


def _hunyuan_video(blocks: int, singles: int) -> list[str]:
    streams = [f"{stream}_{name}" for stream in ("img", "txt")
               for name in ("attn_qkv", "attn_proj", "mlp.fc1", "mlp.fc2", "mod.linear")]  # fmt: skip
    refiner = ["self_attn_qkv", "self_attn_proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]
    around = [f"{name}.{end}" for name in ("time_in", "guidance_in") for end in ("mlp.0", "mlp.2")]
    around += [f"vector_in.{end}_layer" for end in ("in", "out")]
    around += [f"txt_in.{end}" for end in ("input_embedder", "t_embedder.mlp.0", "t_embedder.mlp.2",
               "c_embedder.linear_1", "c_embedder.linear_2")]  # fmt: skip
    around += ["img_in.proj", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    return [
        *(f"double_blocks.{n}.{name}" for n in range(blocks) for name in streams),
        *(f"single_blocks.{n}.{name}" for n in range(singles) for name in ("linear1", "linear2", "modulation.linear")),
        *(f"txt_in.individual_token_refiner.blocks.{n}.{name}" for n in range(2) for name in refiner),
        *around,
    ]


def _translated_wan(shapes: Mapping[str, tuple[int, ...]]) -> Names:
    return wan.transformer(shapes)


_OFFICIAL = {"wan": _wan, "hunyuan-video": _hunyuan_video}
_TRANSLATED = {"wan": _translated_wan, "hunyuan-video": hunyuan_video.transformer}
