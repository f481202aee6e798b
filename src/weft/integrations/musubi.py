"""The network module of --network_module weft.integrations.musubi in musubi-tuner: LoRA by PEFT, or by Weft itself.

What musubi-tuner calls, and in which order, is told in docs/guides/musubi.md.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from weft.errors import ConfigError
from weft.integrations.musubi_args import NetworkArgs, network_args
from weft.integrations.musubi_layer import Method, Width, adapted_layers
from weft.integrations.musubi_network import MusubiNetwork
from weft.integrations.musubi_targets import PREFIX, Target, architecture_of, targets_in
from weft.integrations.musubi_weights import DORA_SCALE, widths_in

log = logging.getLogger(__name__)

# musubi's networks/lora.py, where these are given as None.
DIM, ALPHA = 4, 1.0


def create_arch_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: object,
    text_encoders: object,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> MusubiNetwork:
    """Fresh LoRA on the layers that musubi adapts in such a network. kwargs: --network_args. Raises ConfigError."""
    known, args = architecture_of(unet), network_args(kwargs)
    own = known.usual if args.exclude_patterns is None else args.exclude_patterns
    include = known.include if args.include_patterns is None else args.include_patterns
    args = replace(args, exclude_patterns=(*own, *known.exclude), include_patterns=include)
    return _created(known.blocks, multiplier, network_dim, network_alpha, unet, neuron_dropout, args)


def create_network(
    target_replace_modules: Sequence[str] | None,
    prefix: str,
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: object,
    text_encoders: object,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    module_class: None = None,
    module_kwargs: None = None,
    **kwargs: Any,
) -> MusubiNetwork:
    """Fresh LoRA on the layers in blocks of the classes told, nothing excluded but by kwargs: for networks that
    `create_arch_network` does not know. Raises ConfigError."""
    _refuse_foreign(prefix, module_class, module_kwargs)
    args = network_args(kwargs)
    return _created(target_replace_modules, multiplier, network_dim, network_alpha, unet, neuron_dropout, args)


def create_arch_network_from_weights(
    multiplier: float,
    weights_sd: Mapping[str, Tensor],
    text_encoders: object = None,
    unet: nn.Module | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> MusubiNetwork:
    """LoRA on the layers that some weights name, each of its own rank and alpha; the weights are not loaded. Raises
    ConfigError and ModelError."""
    assert unet is not None, "musubi gives the model"
    blocks = architecture_of(unet).blocks
    return create_network_from_weights(blocks, multiplier, weights_sd, text_encoders, unet, for_inference, **kwargs)


def create_network_from_weights(
    target_replace_modules: Sequence[str] | None,
    multiplier: float,
    weights_sd: Mapping[str, Tensor],
    text_encoders: object = None,
    unet: nn.Module | None = None,
    for_inference: bool = False,
    module_class: None = None,
    module_kwargs: None = None,
    **kwargs: Any,
) -> MusubiNetwork:
    """The same in blocks of the classes told."""
    assert unet is not None, "musubi gives the model"
    _refuse_foreign(PREFIX, module_class, module_kwargs)
    args, widths = network_args(kwargs), widths_in(weights_sd)
    targets = [
        (target, widths[target.name]) for target in targets_in(unet, target_replace_modules) if target.name in widths
    ]
    if len(targets) < len(widths):
        here = {target.name for target, _ in targets}
        absent = [name for name in widths if name not in here]
        log.warning("%d layers of the weights are not in this model, first %s", len(absent), absent[0])
    method = Method(
        backend=args.backend,
        dora=any(key.endswith(f".{DORA_SCALE}") for key in weights_sd),
        rank_dropout=args.rank_dropout or 0.0,
        module_dropout=args.module_dropout or 0.0,
    )
    network = _network(targets, method, multiplier, args)
    return network.eval() if for_inference else network


def prepare_network(network: MusubiNetwork, args: Any) -> None:
    """musubi asks a module for this name, and if it is there calls the network's own prepare_network."""
    network.prepare_network(args)


def _created(
    blocks: Sequence[str] | None,
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    unet: nn.Module,
    neuron_dropout: float | None,
    args: NetworkArgs,
) -> MusubiNetwork:
    dim, alpha = DIM if network_dim is None else network_dim, ALPHA if network_alpha is None else network_alpha
    method = Method(
        backend=args.backend,
        dora=args.dora,
        dropout=neuron_dropout or 0.0,
        rank_dropout=args.rank_dropout or 0.0,
        module_dropout=args.module_dropout or 0.0,
    )
    found = targets_in(unet, blocks, args.exclude_patterns or (), args.include_patterns or ())
    targets = []
    for target in found:
        width = _width(target, dim, alpha, args)
        if width is not None:
            targets.append((target, width))
    return _network(targets, method, multiplier, args)


def _network(
    targets: Sequence[tuple[Target, Width]], method: Method, multiplier: float, args: NetworkArgs
) -> MusubiNetwork:
    network = MusubiNetwork(adapted_layers(targets, method), multiplier)
    network.set_loraplus_lr_ratio(args.loraplus_lr_ratio)
    _tell(network, method, args.verbose)
    return network


def _width(target: Target, dim: int, alpha: float, args: NetworkArgs) -> Width | None:
    """Rank and alpha of a layer; None for one that is not adapted."""
    if target.has_wide_kernel:
        return None if args.conv_dim is None else Width.of(args.conv_dim, args.conv_alpha, args.rslora)
    return Width.of(dim, alpha, args.rslora) if dim else None


def _tell(network: MusubiNetwork, method: Method, verbose: bool) -> None:
    layers = network.unet_loras
    scales = sorted({f"{layer.scale:g} (rank {layer.lora_dim})" for layer in layers})
    kind = "DoRA" if method.dora else "LoRA"
    log.info("%s by %s on %d layers, scale alpha / rank = %s", kind, method.backend, len(layers), ", ".join(scales))
    if verbose:
        for layer in layers:
            log.info("    %-50s rank %d, alpha %g", layer.path, layer.lora_dim, float(layer.alpha))


def _refuse_foreign(prefix: str, module_class: object, module_kwargs: object) -> None:
    if prefix != PREFIX or module_class is not None or module_kwargs:
        raise ConfigError(
            f"weft.integrations.musubi: names begin with {PREFIX}, and a layer's class is its own; give no other "
            "prefix, module_class or module_kwargs."
        )
