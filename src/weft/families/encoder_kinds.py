"""The kinds of text encoders that are known, by transformers' word for them, and what an adapter stands on in each."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

LAYER = r"(?:\w+\.)+(?:layer|layers|albert_layers)\.\d+\."
# What others call the four layers of attention, and all of them at once.
SAID: Mapping[str, tuple[str, ...]] = {
    "query": ("query", "q", "q_proj", "query_proj", "q_lin"),
    "key": ("key", "k", "k_proj", "key_proj", "k_lin"),
    "value": ("value", "v", "v_proj", "value_proj", "v_lin"),
    "out": ("out", "o", "o_proj", "out_lin"),
}


@dataclass(frozen=True)
class Kind:
    """Paths of linear layers within a block of an encoder. joined: query, key and value in one layer. more: what else
    belongs to attention. usual: what the literature adapts there; of most the query and the value.

    ends: documents end where their answer is read, so that padding must stand before them. unread: modules that the
    network has and never asks. wide: it overflows in half precision.
    """

    mlp: tuple[str, ...]
    query: str = ""
    key: str = ""
    value: str = ""
    out: str = ""
    joined: str = ""
    more: tuple[str, ...] = ()
    usual: tuple[str, ...] = ()
    ends: bool = False
    unread: tuple[str, ...] = ()
    wide: bool = False

    @property
    def targets(self) -> Mapping[str, str]:
        """Named sets, each a regex for whole paths: auto, attention (where it has linear layers), mlp, ia3, all."""
        auto = self.usual or tuple(filter(None, (self.query, self.value, self.joined)))
        attention = tuple(filter(None, (self.query, self.key, self.value, self.joined, self.out, *self.more)))
        scaled = tuple(filter(None, (self.key, self.value, self.joined, self.mlp[-1])))  # as in arXiv:2205.05638
        sets = {"auto": auto, "attention": attention, "mlp": self.mlp, "ia3": scaled, "all": (r".+",)}
        return {name: LAYER + f"(?:{'|'.join(ends)})" for name, ends in sets.items() if ends}

    @property
    def aliases(self) -> Mapping[str, str | tuple[str, ...]]:
        """Names that other kinds have for these layers."""
        ours = {"query": self.query, "key": self.key, "value": self.value, "out": self.out}
        found = {said: end for name, end in ours.items() if end for said in SAID[name]}
        joined = self.joined or tuple(filter(None, (self.query, self.key, self.value)))
        return {**found, **({"qkv": joined} if joined else {})}


BERT = Kind(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    out="attention.output.dense",
    mlp=("intermediate.dense", "output.dense"),
)
KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        **dict.fromkeys(("bert", "ernie", "megatron-bert", "rembert", "electra"), BERT),
        **dict.fromkeys(("roberta", "xlm-roberta", "camembert", "data2vec-text", "roberta-prelayernorm"), BERT),
        "big_bird": replace(BERT, unread=("bert.pooler",)),  # its classifier reads the first token itself
        "longformer": replace(
            BERT,
            more=tuple(f"attention.self.{name}_global" for name in ("query", "key", "value")),
            usual=(BERT.query, BERT.value, "attention.self.query_global", "attention.self.value_global"),
        ),
        "mpnet": replace(
            BERT, query="attention.attn.q", key="attention.attn.k", value="attention.attn.v", out="attention.attn.o"
        ),
        "distilbert": Kind(
            query="attention.q_lin",
            key="attention.k_lin",
            value="attention.v_lin",
            out="attention.out_lin",
            mlp=("ffn.lin1", "ffn.lin2"),
        ),
        "deberta": replace(
            BERT,
            query="",
            key="",
            value="",
            joined="attention.self.in_proj",
            wide=True,  # it masks with the least number of another precision
            more=("attention.self.pos_proj", "attention.self.pos_q_proj"),
        ),
        "deberta-v2": replace(
            BERT,
            query="attention.self.query_proj",
            key="attention.self.key_proj",
            value="attention.self.value_proj",
            more=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
        ),
        "modernbert": Kind(joined="attn.Wqkv", out="attn.Wo", mlp=("mlp.Wi", "mlp.Wo")),
        "albert": Kind(
            query="attention.query",
            key="attention.key",
            value="attention.value",
            out="attention.dense",
            mlp=("ffn", "ffn_output"),
        ),
        # Its attention has no linear layers: five plain tensors.
        "xlnet": Kind(mlp=("ff.layer_1", "ff.layer_2"), usual=("ff.layer_1", "ff.layer_2"), ends=True),
    }
)


def is_encoder(folder: Path) -> bool:
    """Whether a folder is one of a known text encoder as transformers saves it, and no decoder made of its layers."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    try:
        plain = json.loads(path.read_text("utf-8"))
    except ValueError:
        return False
    return isinstance(plain, dict) and plain.get("model_type") in KINDS and not plain.get("is_decoder", False)
