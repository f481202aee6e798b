"""A transformers decoder that answers for a group of ranks, each with a part of the tokens, wired from outside.

Hidden states and rotary tables are split before layer 0; ids, positions and masks stay whole, for attention sees whole
sequences. Each rank works out the losses of its own tokens, and those are gathered. Letters: L tokens, n on this rank.
"""

import copy
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from weft.errors import ConfigError
from weft.families.text_network import blocks_of
from weft.families.text_packed import PACKED
from weft.math.attention import Attention
from weft.models import SequenceGroup

OWN = "weft_sequence_of_"  # before the name of the attention that is given whole sequences
ROWS = "weft_sequence_rows_of_"  # before that of one whose masks are made for own rows alone
GROUP = "weft_sequence"  # under which attention layers hand their group on


def divide_text(network: nn.Module, sequence: SequenceGroup) -> None:
    """Make network(ids=, positions=, labels=), which gives losses (B, L), answer for a group. Called in transformers'
    own words (to generate) it stays whole. Once kernels are chosen. Raises ConfigError where that is not possible."""
    assert isinstance(network, PreTrainedModel)
    attentions: list[Any] = [module for module in network.modules() if _asks_interface(module)]
    _check(network, attentions)
    _register(network, attentions, whole=sequence.by_heads(attentions[0].config.num_attention_heads))

    def hand_on(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, GROUP: sequence}

    for module in attentions:
        module.register_forward_pre_hook(hand_on, with_kwargs=True)
    parted = _Parted(sequence)
    blocks_of(network)[0].register_forward_pre_hook(parted.hidden, with_kwargs=True)
    for module in network.modules():
        if "RotaryEmbedding" in type(module).__name__:
            module.register_forward_hook(parted.table)
    parted.around(network)


def _asks_interface(module: nn.Module) -> bool:
    """Whether a layer lets transformers' registry choose its attention."""
    forward = type(module).forward
    return isinstance(forward, FunctionType) and "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names


def _check(network: PreTrainedModel, attentions: list[Any]) -> None:
    name = type(network).__name__
    if not attentions:
        raise ConfigError(
            f"parallel.sequence: {name} does not attend through transformers' registry, and its tokens cannot be "
            "parted. Write sequence=1."
        )
    if any("sinks" in module._parameters for module in attentions):
        raise ConfigError(
            f"parallel.sequence: {name} has attention sinks, one for each head, and Weft does not part those. Write "
            "sequence=1."
        )


def _register(network: PreTrainedModel, attentions: list[Any], *, whole: bool) -> None:
    """Put the exchange between the layers and the attention that was chosen for them."""
    chosen = attentions[0].config._attn_implementation or "eager"
    if chosen == PACKED:  # ranks that part the tokens attend under a mask
        chosen = "sdpa"
    make = AttentionMaskInterface()[chosen]
    name = (OWN if whole else ROWS) + chosen
    AttentionInterface.register(name, functools.partial(exchanged, implementation=chosen))
    AttentionMaskInterface.register(name, make if whole else functools.partial(_lazy_mask, make=make))
    configs = [vars(module)["config"] for module in network.modules() if "config" in vars(module)]
    for config in configs:
        config._attn_implementation = name


class _Parted:
    """Splits what the layers are given, while losses are asked for."""

    def __init__(self, sequence: SequenceGroup) -> None:
        self.sequence = sequence
        self.asked = False

    def hidden(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Own hidden states (B, n, D) of layer 0."""
        if not self.asked:
            return None
        if args:
            return (self.sequence.split(args[0], 1), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.sequence.split(kwargs["hidden_states"], 1)}

    def table(self, module: nn.Module, args: object, output: Any) -> Any:
        """Own rows of rotary tables (B, L, d): cosines and sines, or one of complex numbers."""
        if not self.asked:
            return None
        if isinstance(output, Tensor):
            return self.sequence.split(output, 1)
        return tuple(self.sequence.split(table, 1) for table in output)

    def around(self, network: nn.Module) -> None:
        """Give the network own labels, and gather its losses."""
        forward = network.forward

        @functools.wraps(forward)
        def divided(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if "ids" not in kwargs:
                return forward(*args, **kwargs)
            labels = kwargs["labels"]
            self.asked = True
            try:
                # Its places are those of the whole row; of its own part it looks for them.
                own = forward(*args, **{**kwargs, "labels": self.sequence.split(labels, 1), "learned": None})
            finally:
                self.asked = False
            return self.sequence.gather(own, 1, labels.shape[1])

        network.forward = MethodType(divided, network)  # type: ignore[method-assign]


# ---- Attention ----------------------------------------------------------------------------------------------------


def exchanged(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, implementation: str, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """An attention as transformers calls it, q (B, H, n, d) -> (B, n, H, d), of own tokens over those of all ranks."""
    sequence: SequenceGroup = options.pop(GROUP)
    attend, length = _of_name(module, implementation), options["position_ids"].shape[-1]
    lazy = attention_mask if isinstance(attention_mask, _LazyMask) else None
    if query.shape[2] == length:  # nobody asked for losses
        whole = attention_mask if lazy is None else lazy.make()
        stand_in = _StandIn(module, query.shape[1] // key.shape[1], implementation)
        return attend(stand_in, query, key, value, whole, **options)

    def kernel(q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        mask = attention_mask if lazy is None else _mask_of(lazy, rows, length, implementation, q)
        stand_in = _StandIn(module, q.shape[2] // k.shape[2], implementation)
        return attend(stand_in, *(x.transpose(1, 2) for x in (q, k, v)), mask, **options)[0]

    seen = None if lazy is None else lazy.seen
    question = Attention(kernel, seen, options.get("scaling"), plain=options.get("softcap") is None)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return sequence.attend(question, q, k, v, (length,)), None


def _of_name(module: Any, implementation: str) -> Callable[..., Any]:
    """The attention of that name; eager is found in the model's own file."""
    if implementation != "eager":
        return AttentionInterface()[implementation]
    files = (vars(sys.modules[cls.__module__]) for cls in type(module).__mro__)
    return next(names["eager_attention_forward"] for names in files if "eager_attention_forward" in names)


class _StandIn:
    """An attention layer as kernels look at it: with the heads that this rank has of it, and the name of the kernel,
    by which the flash ones are told apart."""

    def __init__(self, module: Any, groups: int, implementation: str) -> None:
        self._of, self.num_key_value_groups, self._implementation = module, groups, implementation

    @property
    def config(self) -> Any:
        config = copy.copy(self._of.config)
        config._attn_implementation = self._implementation
        return config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


@dataclass(frozen=True)
class _LazyMask:
    """What transformers says of who sees whom, worked out for those who are asked about, and not for all (L, L)."""

    function: Callable[..., Tensor]
    items: int
    make: Callable[[], Any]  # the mask of all, as the chosen attention wants it

    def seen(self, rows: Tensor, columns: Tensor) -> Tensor:
        """(B, 1, rows, columns) bool."""
        item = torch.arange(self.items, device=rows.device)[:, None, None, None]
        mask = self.function(item, item.new_zeros(()), rows[None, None, :, None], columns[None, None, None, :])
        return mask.expand(self.items, 1, len(rows), len(columns))


def _lazy_mask(*, make: Callable[..., Any], **options: Any) -> _LazyMask:
    """In the place of transformers' makers of masks."""
    return _LazyMask(options["mask_function"], options["batch_size"], functools.partial(make, **options))


def _mask_of(mask: _LazyMask, rows: Tensor | None, length: int, implementation: str, q: Tensor) -> Tensor:
    """Who sees whom among own rows and all tokens, as an attention wants it. Raises ConfigError."""
    assert rows is not None, "a mask for own rows, and heads that divide"
    if implementation not in ("sdpa", "eager"):
        raise ConfigError(
            f"family.kernels.attention: '{implementation}' cannot attend from some tokens to all, as it must where the "
            "heads do not divide by parallel.sequence. Write sdpa, or another number, or sequence_method=ring."
        )
    seen = mask.seen(rows, torch.arange(length, device=rows.device))
    if implementation == "sdpa":
        return seen
    return torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, torch.finfo(q.dtype).min)
