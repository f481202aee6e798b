"""A decoder's layer computed by Weft on transformers' own modules: the same numbers, with less kept and less moved.

A layer of Llama's kind keeps x, q, k, v, the answer of attention, x + that, gate and up. Whether it is of that kind is
found by asking: a small copy with random weights must give the same numbers both ways. Letters: B rows, L tokens.
"""

import copy
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from weft.errors import ConfigError
from weft.families.text_kernels import ACTIVATIONS, Activation, activation_of, gated_of, norm_form
from weft.families.text_packed import PACKED, PACKING, Packing, seen
from weft.math.packed_attention import Asked, TextHeads, packed_attention
from weft.math.products import products
from weft.math.rms_norm import Normed, RmsNorm
from weft.math.sdpa import Kernel, causal_kernel_for
from weft.projection import SPREAD, computing_dtype, projection

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
NORMS = {"q_norm", "k_norm"}
AFTER = ("pre_feedforward_layernorm", "post_feedforward_layernorm")  # of Gemma, whose outputs are normed too
SMALL = {"hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 4, "head_dim": 8}
LENGTHS = ((3, 2),)  # of the texts that a small copy is asked about


@dataclass(frozen=True)
class Form:
    """What a layer is made of. attends: the forms of the norms of q and k, None each where there is none; None: its
    attention is its own module's. gate: the activation; None: what follows attention is its own module's. window: how
    many tokens are seen, None: all before."""

    before: RmsNorm
    between: RmsNorm
    sandwiched: bool
    attends: tuple[RmsNorm | None, RmsNorm | None] | None
    gate: Activation | None
    window: int | None = None


def lean_layers(network: PreTrainedModel, layers: Any, choice: str, others: set[str]) -> None:
    """Give decoder layers our own forward where it fits. others: what was chosen for norms, gates and turns. Raises
    ConfigError where it was asked for and fits none."""
    if choice == "eager" or (choice == "auto" and not others <= {"auto", "fused"}):
        return
    known: dict[Any, Form | None] = {}
    for layer in layers:
        kind = _kind(layer)
        if kind not in known:
            known[kind] = _form(layer, network)
        form = known[kind]
        if form is not None:
            layer.forward = MethodType(_forward_of(form), layer)
    if choice == "fused" and not any(known.values()):
        raise ConfigError(
            "family.kernels.layer: 'fused' fits no layer of this model, which computes it in another way. Write auto "
            "or eager."
        )


# ---- A layer ------------------------------------------------------------------------------------------------------


def _forward_of(form: Form) -> Any:
    def forward(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs.get("past_key_values") is not None or _is_touched(layer):
            return type(layer).forward(layer, hidden_states, *args, **kwargs)
        x = hidden_states
        out = _attended(layer, x, form, kwargs)
        x = x + (layer.post_attention_layernorm(out) if form.sandwiched else out)
        norm = layer.pre_feedforward_layernorm if form.sandwiched else layer.post_attention_layernorm
        if form.gate is None:
            out = layer.mlp(norm(x))
            out = out[0] if isinstance(out, tuple) else out
        else:
            mlp = layer.mlp
            producer = Normed(form.between, norm.weight, computing_dtype(x))
            gate, up = products(x, [projection(mlp.gate_proj), projection(mlp.up_proj)], producer)
            (out,) = products(gate, [projection(mlp.down_proj)], Gate(form.gate, up))
        return x + (layer.post_feedforward_layernorm(out) if form.sandwiched else out)

    return forward


def _is_touched(layer: Any) -> bool:
    """Whether somebody stands between a layer's modules, or their weights are not here until they are called."""
    parts = [module for name, module in layer.named_modules() if name in ("self_attn", "mlp") or "norm" in name]
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in parts)
    return hooked or hasattr(layer.input_layernorm.weight, SPREAD)


def _attended(layer: Any, x: Tensor, form: Form, kwargs: dict[str, Any]) -> Tensor:
    attn = layer.self_attn
    packing: Packing | None = kwargs.get(PACKING)
    if form.attends is None or packing is None or not packing.by_text(form.window) or torch.compiler.is_compiling():
        return attn(hidden_states=layer.input_layernorm(x), **kwargs)[0]
    weights = [_weight(attn, name) for name in ("q_norm", "k_norm")]
    turn = kwargs["position_embeddings"]
    kernel = _kernel(attn, x)
    if kernel is None or turn[0].shape[-1] != attn.head_dim or any(w is not None and w.requires_grad for w in weights):
        return attn(hidden_states=layer.input_layernorm(x), **kwargs)[0]
    producer = Normed(form.before, layer.input_layernorm.weight, computing_dtype(x))
    qkv = products(x, [projection(each) for each in (attn.q_proj, attn.k_proj, attn.v_proj)], producer)
    queries, keys = (Asked(attn.head_dim, norm) for norm in form.attends)
    turn = [table.expand(len(x), -1, -1) for table in turn]
    found = packed_attention(qkv, weights, turn, TextHeads(queries, keys, attn.scaling, packing.texts), kernel)
    return products(found, [projection(attn.o_proj)])[0]


def _weight(attn: Any, name: str) -> Tensor | None:
    return getattr(attn, name).weight if name in attn._modules else None


def _kernel(attn: Any, x: Tensor) -> Kernel | None:
    """The kernel for its heads, asked with tensors that have no numbers."""
    dtype, width = computing_dtype(x), attn.head_dim
    heads = attn.config.num_attention_heads
    q = x.new_empty(len(x), x.shape[1], heads, width, dtype=dtype).transpose(1, 2)
    k = x.new_empty(len(x), x.shape[1], heads // attn.num_key_value_groups, width, dtype=dtype).transpose(1, 2)
    return causal_kernel_for(q, k, k)


class Gate:
    """h = act(gate) up: a Joint producer. Shazeer 2020, arXiv:2002.05202, eq. 5 and 6."""

    def __init__(self, activation: Activation, up: Tensor) -> None:
        self.tensors = (up,)
        self.activation = activation
        self.acted: Tensor | None = None  # act(gate), from `again` until `backward_all`

    def forward(self, x: Tensor, *tensors: Tensor) -> Tensor:
        (up,) = tensors
        return self.activation.of(x) * up

    def again(self, x: Tensor, *tensors: Tensor) -> Tensor:
        (up,) = tensors
        self.acted = self.activation.of(x)
        return self.acted * up

    def backward(self, x: Tensor, grad: Tensor, *tensors: Tensor) -> Tensor:
        return self.backward_all(x, grad, *tensors)[0]

    def backward_all(self, x: Tensor, grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        (up,) = tensors
        acted, self.acted = self.activation.of(x) if self.acted is None else self.acted, None
        of_up = acted.mul_(grad)
        return self.activation.slope_(grad.mul_(up), x), of_up


# ---- Whether it fits ----------------------------------------------------------------------------------------------


def _kind(layer: nn.Module) -> Any:
    """What tells the layers of a model apart, but for their numbers: classes, parts and settings."""
    found = []
    for path, module in layer.named_modules():
        settings = {n: v for n, v in vars(module).items() if isinstance(v, int | float | str) and n != "layer_idx"}
        found.append((path, type(module), frozenset(settings.items())))
    return frozenset(found)


def _form(layer: Any, network: PreTrainedModel) -> Form | None:
    """What a layer is, if a small copy of it in that form gives the numbers of its own code."""
    names = set(layer._modules)
    sandwiched = names == {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm", *AFTER}
    if not sandwiched and names != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return None
    before = norm_form(layer.input_layernorm)
    between = norm_form(layer._modules[AFTER[0]] if sandwiched else layer.post_attention_layernorm)
    if before is None or between is None or layer._parameters:
        return None
    gate = activation_of(layer.mlp) if layer.mlp in list(gated_of(layer)) else None
    packed = network.config._attn_implementation == PACKED
    activation = None if gate is None else ACTIVATIONS[gate]
    forms = [Form(before, between, sandwiched, _normed(layer.self_attn) if packed else None, activation)]
    forms.append(Form(before, between, sandwiched, None, activation))
    fitting = (_fitted(layer, network, form) for form in forms if form.attends or form.gate)
    return next((form for form in fitting if form is not None), None)


def _normed(attn: Any) -> tuple[RmsNorm | None, RmsNorm | None] | None:
    names, told = set(attn._modules), vars(attn)
    if names not in (ATTENTION, ATTENTION | NORMS) or attn._parameters:
        return None
    if not {"head_dim", "scaling", "num_key_value_groups"} <= set(told):
        return None
    if names == ATTENTION:
        return None, None
    norms = [norm_form(attn._modules[name]) for name in ("q_norm", "k_norm")]
    whole = any(attn._modules[name].weight.shape != (attn.head_dim,) for name in NORMS)
    return None if None in norms or whole else (norms[0], norms[1])


def _fitted(layer: Any, network: PreTrainedModel, form: Form) -> Form | None:
    """The form with its window, if a small copy gives the same numbers by its own forward and by ours."""
    try:
        with torch.device("cpu"), torch.no_grad(), torch.random.fork_rng([]):  # modules draw first weights
            return _compared(layer, network, form)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None  # it is made, or asked, in a way that is not known here


def _compared(layer: Any, network: PreTrainedModel, form: Form) -> Form | None:
    config = copy.deepcopy(network.config)
    grouped = layer.self_attn.num_key_value_groups > 1
    sizes = {**SMALL, "num_key_value_heads": 2 if grouped else 4}
    for name, size in sizes.items():
        if name != "head_dim" or hasattr(config, name):
            setattr(config, name, size)
    config._attn_implementation = PACKED if form.attends else "eager"
    chance = torch.Generator("cpu").manual_seed(0)
    twin = type(layer)(config, layer.self_attn.layer_idx).float().eval()
    for parameter in twin.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=chance) * 0.3)
    positions = torch.cat([torch.arange(length) for length in LENGTHS[0]])[None]
    angle = torch.randn(1, positions.shape[1], twin.self_attn.head_dim // 2, generator=chance).repeat(1, 1, 2)
    asked: dict[str, Any] = {"position_embeddings": (angle.cos(), angle.sin()), "position_ids": positions}
    noting = _Noting(LENGTHS, positions)
    if form.attends:
        asked |= {PACKING: noting, "attention_mask": None}
    else:
        asked["attention_mask"] = torch.zeros(()).where(seen(positions), -1e30)
    x = torch.randn(1, positions.shape[1], SMALL["hidden_size"], generator=chance)
    theirs = type(twin).forward(twin, x, **asked)
    found = replace(form, window=noting.windows[0] if form.attends else None)
    ours = _forward_of(found)(twin, x, **asked)
    same = isinstance(theirs, Tensor) and torch.allclose(theirs, ours, rtol=1e-4, atol=1e-5)
    return found if same else None


@dataclass
class _Noting(Packing):
    """Remembers which windows attention asked about."""

    windows: list[int | None] = field(default_factory=list)

    def by_text(self, window: int | None) -> bool:
        self.windows.append(window)
        return super().by_text(window)
