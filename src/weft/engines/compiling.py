"""Blocks compiled one by one: blocks of a network share their graphs, which keep what a memory budget allows."""

import inspect
import itertools
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
import torch._dynamo.config
import torch._functorch.config
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, Unsupported
from torch.utils._triton import has_triton

from weft.errors import ConfigError
from weft.math.traced import COMPILED

# Graphs of one network: its kinds of blocks, doubled by whether their input wants a gradient, by a second number of
# tokens, and for each role; beyond that something changes in every call.
GRAPHS = 64
INDUCTOR = "weft.engines.inductor"  # imported for those who compile
Backend = Callable[[torch.fx.GraphModule, Sequence[Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Compiler:
    """How blocks are compiled. budget: share of what a graph would like to keep for its backward pass that it may
    keep, in [0, 1]; 0: its inputs alone. strict: a block that does not compile is an error; otherwise it is told, and
    the block runs as it is. backend: what compiles a graph, inductor where None. tell: hears of what is given up.

    torch keeps what it compiled in a folder of its own (TORCHINDUCTOR_CACHE_DIR), and a second run starts faster.
    """

    budget: float = 1.0
    strict: bool = True
    backend: Backend | None = None
    tell: Callable[[str], None] = lambda sentence: warnings.warn(sentence, RuntimeWarning, stacklevel=4)

    def compiled(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """A backend for torch.compile. What torch reads from its settings is set here, since the setting belongs to
        one thread, and a block may be compiled on any."""
        with torch._functorch.config.patch(activation_memory_budget=self.budget):
            backend: Backend = self.backend or import_module(INDUCTOR).compiled
            return backend(graph, inputs)


@dataclass(eq=False)
class Region:
    """The compiled blocks of one network. stopped: why the rest of its calls run as they are, where they do.
    any_size: one graph serves all numbers of tokens from the second on; without it each has one of its own, in which
    all sizes are numbers."""

    compiler: Compiler
    limit: int = GRAPHS
    any_size: bool = True
    stopped: str | None = None
    graphs: int = 0  # compiled so far
    _run: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        # torch counts graphs by code object, and remembers by its name which sizes have changed: a copy under a name of
        # its own gives each network a count, a lookup and a memory of its own.
        name = f"block_{next(_regions)}"
        own = types.FunctionType(_call.__code__.replace(co_name=name), _call.__globals__, name)
        sizes = None if self.any_size else False
        self._run = torch.compile(own, fullgraph=True, dynamic=sizes, backend=self._backend, **_limits(self.limit))

    def _backend(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return self.compiler.compiled(graph, inputs)

    def compile(self, block: nn.Module) -> None:
        """Replace a block's forward."""
        forward: Callable[..., Any] = block.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            # Samples and validation come in few questions of shapes of their own: compiling would take longer.
            few = not block.training and not torch.is_grad_enabled()
            if few or self.stopped is not None:
                return forward(*args, **kwargs)
            return self._compiled(forward, args, kwargs)

        block.forward = run  # type: ignore[method-assign]
        setattr(block, COMPILED, True)

    def _compiled(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return self._run(forward, args, kwargs)
        except FailOnRecompileLimitHit as storm:
            self._stop(f"blocks were compiled anew {self.limit} times, so they go on uncompiled: {_reason(storm)}")
        except (Unsupported, BackendCompilerFailed) as failed:
            if self.compiler.strict:
                raise ConfigError(
                    f"engine.compile: a block of this model cannot be compiled: {_reason(failed)} "
                    "Write engine.compile=false."
                ) from failed
            self._stop(f"a block of this model cannot be compiled, so none is: {_reason(failed)}")
        return forward(*args, **kwargs)

    def _stop(self, why: str) -> None:
        self.stopped = why
        self.compiler.tell(f"engine.compile: {why}")


_regions = itertools.count()


def _call(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return forward(*args, **kwargs)


def _limits(limit: int) -> dict[str, Any]:
    """How torch.compile is told of the most graphs. From 2.12 on a setting holds in one thread alone, and a backward
    pass that recomputes has another; before, it held in all."""
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {"recompile_limit": limit}
    torch._dynamo.config.recompile_limit = max(limit, torch._dynamo.config.recompile_limit)
    return {}


def _reason(error: Exception) -> str:
    """The first lines of what torch says, as one sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{' '.join(lines[:3]).rstrip('.')}."[:600]


def compiler_missing(device: torch.device) -> str | None:
    """Why torch.compile cannot work for a device on this machine; None where it can."""
    if device.type == "cuda":
        return None if has_triton() else "Triton is not installed, or does not know this GPU"
    if device.type != "cpu":
        return f"for {device.type} there is no compiler that Weft was tried with"
    return None if import_module(INDUCTOR).has_cpp_compiler() else "no C++ compiler was found"


def check_compiler(device: torch.device) -> None:
    """Raises ConfigError where torch.compile was asked for and cannot work."""
    why = compiler_missing(device)
    if why is not None:
        install = "pip install triton" if device.type == "cuda" else "install g++ or clang++"
        raise ConfigError(f"engine.compile: {why}. Write engine.compile=false, or: {install}.")
