"""Of each known kind of encoder the named sets stand on layers of its real network, and its places are counted."""

import re
from functools import cache

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from tests.small_encoders import OWN, PLACES, invented, tiny_config, word_tokenizer
from weft.adapters.targets import match_targets
from weft.families.encoder_kinds import KINDS
from weft.families.encoder_network import reserved

# Beneath the first block: what the literature adapts there, and all linear layers of attention.
LAYERS = {
    "bert": ("query value", "query key value output.dense"),
    "longformer": (
        "query value query_global value_global",
        "query key value query_global key_global value_global output.dense",
    ),
    "distilbert": ("q_lin v_lin", "q_lin k_lin v_lin out_lin"),
    "deberta": ("in_proj", "in_proj pos_proj pos_q_proj output.dense"),
    "deberta-v2": ("query_proj value_proj", "query_proj key_proj value_proj output.dense"),
    "modernbert": ("Wqkv", "Wqkv attn.Wo"),
    "mpnet": ("attn.q attn.v", "attn.q attn.k attn.v attn.o"),
    "albert": ("query value", "query key value attention.dense"),
    "xlnet": ("layer_1 layer_2", ""),
}


@cache
def network_of(kind: str) -> PreTrainedModel:
    tokenizer = word_tokenizer(invented(20), kind)
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(tiny_config(kind, 25, tokenizer, ("a", "b", "c")))


def test_every_known_kind_is_tested() -> None:
    assert set(KINDS) == set(OWN)


@pytest.mark.parametrize("kind", list(KINDS))
def test_each_set_names_layers_of_each_block_and_none_of_a_head(kind: str) -> None:
    network = network_of(kind)
    linears = {path: tuple(m.weight.shape) for path, m in network.named_modules() if isinstance(m, nn.Linear)}
    blocks = {path for path in linears if re.search(r"\.(layers?|albert_layers)\.\d+\.", path)}
    sets = KINDS[kind].targets
    found = {name: match_targets((name,), (), linears, sets, KINDS[kind].aliases).paths for name in sets}
    assert set(found["all"]) == blocks
    assert set(found.get("attention", ())) | set(found["mlp"]) == blocks
    assert not set(found.get("attention", ())) & set(found["mlp"])
    auto, attention = LAYERS.get(kind, LAYERS["bert"])
    first = next(iter(sorted(blocks))).partition(".0.")[0]
    for name, ends in (("auto", auto), ("attention", attention)):
        own = [path for path in found.get(name, ()) if path.startswith(f"{first}.0.")]
        assert len(own) == len(ends.split()), (name, own)
        assert all(any(path.endswith(f".{end}") for path in own) for end in ends.split()), own
    layers = 1 if kind == "albert" else 2
    narrowing = [path for path in found["mlp"] if linears[path][1] > linears[path][0]]
    assert [path for path in found["ia3"] if path in found["mlp"]] == narrowing
    assert len(narrowing) == layers
    assert len(found["auto"]) == layers * len(auto.split())


@pytest.mark.parametrize("kind", list(KINDS))
def test_names_of_other_kinds_find_the_same_layers(kind: str) -> None:
    network = network_of(kind)
    linears = {path: tuple(m.weight.shape) for path, m in network.named_modules() if isinstance(m, nn.Linear)}
    known = KINDS[kind]

    def paths(*names: str) -> set[str]:
        return set(match_targets(names, (), linears, known.targets, known.aliases).paths)

    if known.query and kind != "longformer":
        assert paths("q_proj", "v_lin") == paths("auto")
        assert paths("q", "k", "v", "o") == paths("attention")
    if known.joined:
        assert paths("qkv") == paths("auto")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "xlnet"])
def test_places_that_are_kept_for_padding_are_no_part_of_the_context(kind: str) -> None:
    """RoBERTa and its kin have a table of 514 places for 512 tokens."""
    network = network_of(kind)
    assert network.config.to_dict()["max_position_embeddings"] - reserved(network) == PLACES
