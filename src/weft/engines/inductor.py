"""What Weft asks of inductor, torch's own compiler, whose import takes seconds: only those who compile import it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.exc import InvalidCxxCompiler

from weft.engines import kept_attention, recompute


class KeptAttention(CustomGraphPass):
    """Marks attention in a graph of both passes, before it is parted."""

    def __call__(self, graph: fx.Graph) -> None:
        kept_attention.keep_attention(graph)

    def uuid(self) -> Any:
        """Part of the key under which torch caches what it compiled."""
        return get_hash_for_files(tuple(str(Path(module.__file__ or "")) for module in (kept_attention, recompute)))


def compiled(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend for torch.compile: inductor, that keeps what attention answered."""
    with config.patch(joint_custom_post_pass=KeptAttention()):
        return compile_fx(graph, list(inputs))  # type: ignore[return-value]


def has_cpp_compiler() -> bool:
    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return False
    return True
