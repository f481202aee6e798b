"""The header that diffusers reads: ranks and alphas that differ among layers mean here what they mean there."""

import json
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from safetensors.torch import save_file

from tests.families import networks
from tests.formats.test_round_trips import chosen, lora
from weft.formats.layers import trimmed
from weft.formats.reading import read_adapter
from weft.run.changes import change_of


@pytest.mark.parametrize("header", ["patterns", "none"])
def test_patterns_of_ranks_and_alphas_are_read_as_diffusers_loads_them(header, tmp_path):
    """Without a header every layer's alpha is its own rank."""
    adapter = lora("wan", chosen("wan", "attention"), [5, 2, 3], seed=1, alpha=3.0)
    tensors, ranks, alphas = {}, {}, {}
    for path, a, b, scale, _ in trimmed(adapter):
        tensors |= {f"transformer.{path}.lora_A.weight": a, f"transformer.{path}.lora_B.weight": b}
        if len(a) != 5:
            ranks[f"^{path}"], alphas[f"^{path}"] = len(a), 2 * scale * len(a)
    fields = {
        "r": 5,
        "lora_alpha": 3.0,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": adapter.paths,
    }
    said = {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in fields.items()})}
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt", **(said if header == "patterns" else {})})
    read = read_adapter(tmp_path / "a.safetensors")
    network = networks.wan(layers=1)
    nothing = None
    pipeline = WanPipeline(nothing, nothing, nothing, FlowMatchEulerDiscreteScheduler(), transformer=network)  # type: ignore[arg-type]
    pipeline.load_lora_weights(tmp_path / "a.safetensors", adapter_name="a")
    for path in adapter.paths:
        layer: Any = network.get_submodule(path)
        torch.testing.assert_close(change_of(read, path).delta(), layer.get_delta_weight("a"), rtol=1e-5, atol=1e-6)
