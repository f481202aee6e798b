"""What a weight file holds, told from the names, shapes and dtypes in its header."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

from weft.errors import ModelError
from weft.families.known import Sizes, released
from weft.families.loading import safetensors_header

PREFIXES = ("model.diffusion_model.", "model.model.", "diffusion_model.")  # in which ComfyUI wraps transformers
FULL = {"F64": "fp64", "F32": "fp32", "BF16": "bf16", "F16": "fp16"}
SCALE_ENDS = (".scale_weight", ".weight_scale")
WORDS = {"wan": "Wan", "hunyuan-video": "HunyuanVideo"}

NO_SIZES = Sizes(0, 0, 0)  # of what is no transformer

Kind = Literal["network", "vae", "text encoder", "image encoder", "adapter", "unknown"]


@dataclass(frozen=True)
class Tensors:
    """Header of a weight file, or of several shards: name -> (safetensors' dtype, shape)."""

    entries: Mapping[str, tuple[str, tuple[int, ...]]]

    def has(self, name: str) -> bool:
        return name in self.entries

    def any(self, *parts: str) -> bool:
        return any(part in name for name in self.entries for part in parts)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name][1]

    def count(self, pattern: str) -> int:
        """How many blocks a list has: one more than the largest number in names that begin with the pattern."""
        found = (re.match(rf"{pattern}\.(\d+)\.", name) for name in self.entries)
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    def without_prefix(self) -> "Tensors":
        """The names without ComfyUI's prefix, which all of them have or none."""
        for prefix in PREFIXES:
            if self.entries and any(name.startswith(prefix) for name in self.entries):
                kept = {name.removeprefix(prefix): entry for name, entry in self.entries.items()}
                return Tensors(kept)
        return self

    @property
    def numbers(self) -> int:
        return sum(prod(shape) for name, (_, shape) in self.entries.items() if not name.endswith(SCALE_ENDS))


@dataclass(frozen=True)
class Content:
    """What a file holds. naming: of its tensors. precision: fp32, bf16, fp16, fp8, fp8 scaled, or a name that cannot be
    read. sizes: of a transformer."""

    kind: Kind
    family: str | None
    naming: Literal["official", "diffusers"] | None
    precision: str
    numbers: int
    sizes: Sizes = NO_SIZES
    foreign: str | None = None  # a quantization that Weft cannot read
    words: str = ""

    @property
    def task(self) -> str:
        """t2v, i2v or ti2v, by the channels that go in."""
        if self.family == "wan":
            return {16: "t2v", 36: "i2v", 48: "ti2v"}.get(
                self.sizes.channels, f"of {self.sizes.channels} input channels"
            )
        return "t2v" if self.sizes.channels == 16 else "i2v"

    def __str__(self) -> str:
        size = (
            f"{self.precision}, {self.numbers / 1e9:.1f}B"
            if self.numbers >= 5e7
            else f"{self.precision}, {self.numbers:,} parameters"
        )
        if self.foreign:
            family = WORDS.get(self.family or "")
            what = f"a {family} transformer, {self.task}," if family and self.kind == "network" else "weights"
            return f"{what} quantized by {self.foreign}"
        if self.kind == "network" and self.family:
            clip = " with image tokens" if self.sizes.clip else ""
            return f"a {WORDS[self.family]} transformer, {self.task}{clip} ({size})"
        return f"{self.words} ({size})" if self.words else f"an unknown model ({size})"


# Kind, family, naming, what to call it, and names of tensors that all of such a file have.
_SIGNS: tuple[tuple[Kind, str | None, Literal["official", "diffusers"] | None, str, tuple[str, ...]], ...] = (
    ("network", "wan", "official", "", ("blocks.0.self_attn.q.weight", "head.head.weight")),
    ("network", "wan", "diffusers", "", ("blocks.0.attn1.to_q.weight", "condition_embedder.time_proj.weight")),
    ("network", "hunyuan-video", "official", "",
     ("double_blocks.0.img_attn_qkv.weight", "txt_in.input_embedder.weight")),
    ("network", "hunyuan-video", "official", "",
     ("double_blocks.0.img_attn.qkv.weight", "txt_in.input_embedder.weight")),
    ("network", "hunyuan-video", "diffusers", "",
     ("transformer_blocks.0.attn.add_q_proj.weight", "context_embedder.proj_in.weight")),
    ("vae", "wan", "official", "a Wan autoencoder", ("encoder.middle.0.residual.0.gamma", "conv1.weight")),
    ("vae", "wan", "diffusers", "a Wan autoencoder",
     ("encoder.mid_block.resnets.0.norm1.gamma", "post_quant_conv.weight")),
    ("vae", "hunyuan-video", "diffusers", "a HunyuanVideo autoencoder",
     ("encoder.down_blocks.0.resnets.0.conv1.conv.weight",)),
    ("vae", "hunyuan-video", "official", "a HunyuanVideo autoencoder",
     ("vae.encoder.down_blocks.0.resnets.0.conv1.conv.weight",)),
    ("text encoder", "wan", "official", "a UMT5 text encoder",
     ("token_embedding.weight", "blocks.0.pos_embedding.embedding.weight")),
    ("text encoder", "wan", "diffusers", "a T5 text encoder", ("encoder.block.0.layer.0.SelfAttention.q.weight",)),
    ("text encoder", "hunyuan-video", "diffusers", "a Llama text encoder", ("model.layers.0.self_attn.q_proj.weight",)),
    ("text encoder", "hunyuan-video", "diffusers", "a Llama text encoder", ("layers.0.self_attn.q_proj.weight",)),
    ("text encoder", "hunyuan-video", "diffusers", "a CLIP text encoder",
     ("text_model.encoder.layers.0.self_attn.q_proj.weight",)),
    ("image encoder", "wan", "official", "a CLIP image encoder", ("visual.transformer.0.attn.to_qkv.weight",)),
    ("image encoder", "wan", "diffusers", "a CLIP image encoder",
     ("vision_model.encoder.layers.0.self_attn.q_proj.weight",)),
)  # fmt: skip

# Models of other families, by names of tensors that all of such a file have: told, and not trained.
_OTHERS = (
    ("a FLUX transformer", ("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight")),
    ("a Qwen-Image transformer", ("transformer_blocks.0.attn.add_q_proj.weight", "txt_norm.weight")),
    ("an LTX-Video transformer", ("patchify_proj.weight",)),
    ("a CogVideoX transformer", ("patch_embed.text_proj.weight",)),
    ("a Stable Diffusion XL checkpoint", ("conditioner.embedders.1.model.ln_final.weight",)),
    ("a Stable Diffusion 1 checkpoint", ("cond_stage_model.transformer.text_model.final_layer_norm.weight",)),
)

# Parts of names, and the program whose quantization has them.
_FOREIGN = (
    ((".quant_state.bitsandbytes__nf4",), "bitsandbytes (NF4)"),
    ((".quant_state.bitsandbytes__fp4",), "bitsandbytes (FP4)"),
    ((".qzeros",), "GPTQ or AWQ"),
    ((".qweight", ".wscales", ".svdq_"), "nunchaku (SVDQuant)"),
    ((".weight_packed",), "compressed-tensors"),
    ((".SCB",), "bitsandbytes (int8)"),
    ((".weight_scale_2",), "ComfyUI in NVFP4"),
    ((".weight._data", ".weight:_data"), "quanto"),
)  # fmt: skip


def content_of(header: Tensors) -> Content:
    """Identify a file by its header."""
    tensors = header.without_prefix()
    precision = precision_of(header)
    foreign = next((who for marks, who in _FOREIGN if header.any(*marks)), None)
    if header.any(".lora_A.", ".lora_down.", ".hada_w1", ".lokr_w1") or any(
        n.startswith("lora_") for n in header.entries
    ):
        return Content("adapter", None, None, precision, header.numbers, words="an adapter (LoRA or like it)")
    for kind, family, naming, words, signs in _SIGNS:
        if all(tensors.has(sign) for sign in signs):
            return Content(kind, family, naming, precision, header.numbers, _sizes(tensors, kind, family, naming),
                           foreign=foreign, words=words)  # fmt: skip
    other = next((words for words, signs in _OTHERS if all(tensors.has(s) or header.has(s) for s in signs)), "")
    return Content("unknown", None, None, precision, header.numbers, foreign=foreign, words=other)


def _sizes(tensors: Tensors, kind: Kind, family: str | None, naming: str | None) -> Sizes:
    if kind != "network":
        return NO_SIZES
    if family == "wan":
        shape = tensors.shape("patch_embedding.weight")
        clip = tensors.any("img_emb.proj.", "image_embedder.")
        return Sizes(shape[0], tensors.count("blocks"), shape[1], clip)
    blocks = "double_blocks" if naming == "official" else "transformer_blocks"
    shape = tensors.shape("img_in.proj.weight" if naming == "official" else "x_embedder.proj.weight")
    return Sizes(shape[0], tensors.count(blocks), shape[1])


def precision_of(header: Tensors) -> str:
    """fp32, bf16, fp16, fp8, fp8 scaled: how most of the numbers are kept."""
    sizes: dict[str, int] = {}
    for dtype, shape in header.entries.values():
        sizes[dtype] = sizes.get(dtype, 0) + prod(shape)
    most = max(sizes, key=lambda name: sizes[name]) if sizes else "F32"
    if not most.startswith("F8"):
        return FULL.get(most, most.lower())
    return "fp8 scaled" if any(name.endswith(SCALE_ENDS) for name in header.entries) else "fp8"


def header_of(paths: Sequence[Path]) -> Tensors:
    """The tensors of safetensors files by their headers. Raises ModelError, by name for other kinds of files."""
    entries: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in paths:
        refuse_gguf(path)
        header = safetensors_header(path)
        entries |= {n: (e["dtype"], tuple(e["shape"])) for n, e in header.items() if n != "__metadata__"}
    return Tensors(entries)


def refuse_gguf(path: Path) -> None:
    """Raises ModelError for llama.cpp's format."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF" or path.suffix == ".gguf":
        raise ModelError(
            f"{path} is a GGUF file, whose quantization Weft cannot read. "
            "Take the model's .safetensors in bf16, fp16 or fp8; family.dtype=nf4 makes it as small."
        )


def names_expert(name: str, expert: str) -> bool:
    """Whether a file's name has the word high, or low: 'low_noise', 'LowNoise', 'LOW', but not 'flow'."""
    return re.search(rf"(?<![a-z]){expert}(?=noise|[^a-z]|$)", name.lower()) is not None


def released_name(content: Content, experts: int) -> str | None:
    """The released model that a transformer is of, as far as its sizes tell."""
    if content.kind != "network" or content.family is None:
        return None
    return released(content.family, content.sizes, experts)
