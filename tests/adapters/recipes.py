"""One small recipe of every kind of adapter, and PEFT's own config of the same."""

from typing import Any

from weft.adapters.loha import LoHa
from weft.adapters.lokr import LoKr
from weft.adapters.lora import Lora
from weft.adapters.oft import Oft
from weft.adapters.recipe import Recipe

KINDS: dict[str, Recipe] = {
    "loha": LoHa(rank=3, alpha=2, targets="attention+ffn"),
    "lokr": LoKr(rank=2, alpha=3, targets="attention+ffn"),
    "lokr by 4, both": LoKr(rank=1, factor=12, decompose_both=True),
    "oft": Oft(block_size=8, targets="attention+ffn"),
    "oft exact, shared": Oft(block_size=16, series=None, share_blocks=True),
    "pissa": Lora(rank=4, alpha=8, init="pissa", targets="attention+ffn"),
    "pissa native": Lora(rank=4, alpha=8, init="pissa", backend="native", pissa_iterations=None),
    "conv": Lora(rank=4, alpha=2, conv_rank=3, conv_alpha=6, targets=("attention", "patch_embedding")),
    "conv native": Lora(
        rank=4, alpha=2, conv_rank=3, conv_alpha=6, targets=("attention", "patch_embedding"), backend="native"
    ),
    "conv pissa": Lora(rank=4, conv_rank=2, conv_alpha=4, init="pissa", targets="patch_embedding", rslora=True),
}


def saved(recipe: Recipe, adapters: Any, name: str = "student") -> Any:
    """An adapter as a run would save it."""
    from weft.formats.adapter_file import SavedAdapter

    tensors = {key: tensor.clone() for key, tensor in adapters.state_dict(name).items()}
    return SavedAdapter(**recipe.exported(tensors), targets=adapters.paths, metadata={"weft.step": "3"})
