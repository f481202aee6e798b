"""Which layers of a network musubi-tuner adapts, and what it calls them in its files."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from weft.errors import ConfigError

PREFIX = "lora_unet"
ADAPTED = ("Linear", "Conv2d", "Conv3d")  # names of classes, as musubi's networks/lora.py asks for them


@dataclass(frozen=True)
class Architecture:
    """A network that musubi trains; facts of musubi_tuner/networks/lora_*.py at commit 30c658c4."""

    sign: str  # the class of module by which the network is known
    blocks: tuple[str, ...] | None  # classes of the modules in which layers are adapted; None: everywhere
    exclude: tuple[str, ...] = ()  # always
    usual: tuple[str, ...] = ()  # excluded too, unless exclude_patterns are given
    include: tuple[str, ...] = ()  # kept in spite of any exclusion, unless include_patterns are given


MODULATION = r".*(img_mod\.lin|txt_mod\.lin|modulation\.lin).*"
ATTENTION = tuple(
    rf".*{kind}_attention\.{layer}.*"
    for kind in ("self", "cross")
    for layer in ("to_query", "to_key", "to_value", "out_layer")
)

# The first whose sign is there: HunyuanVideo 1.5 has one class of blocks of HunyuanVideo, Krea 2 one of Flux.
ARCHITECTURES = (
    Architecture(
        "WanAttentionBlock",
        ("WanAttentionBlock",),
        (r".*(patch_embedding|text_embedding|time_embedding|time_projection|norm|head).*",),
    ),
    Architecture("QwenImageTransformerBlock", ("QwenImageTransformerBlock",), (r".*(_mod_).*",)),
    Architecture("ZImageTransformerBlock", ("ZImageTransformerBlock",), (r".*(_modulation|_refiner).*",)),
    Architecture(
        "HunyuanVideoTransformerBlock",  # FramePack
        ("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock"),
        (r".*(norm).*",),
    ),
    Architecture("DoubleStreamBlock", ("DoubleStreamBlock", "SingleStreamBlock"), (r".*(norm).*",), (MODULATION,)),
    Architecture(
        "MMSingleStreamBlock",  # HunyuanVideo
        ("MMDoubleStreamBlock", "MMSingleStreamBlock"),
        (r".*(img_mod|txt_mod|modulation).*",),
    ),
    Architecture("MMDoubleStreamBlock", ("MMDoubleStreamBlock",), (r".*(_in).*",)),  # HunyuanVideo 1.5
    Architecture("Ideogram4TransformerBlock", ("Ideogram4TransformerBlock",), (r".*adaln_modulation.*",)),
    Architecture(
        "TransformerDecoderBlock",  # Kandinsky 5
        ("TransformerEncoderBlock", "TransformerDecoderBlock"),
        (r".*modulation.*",),
        include=(*ATTENTION, r".*feed_forward\.in_layer.*", r".*feed_forward\.out_layer.*"),
    ),
    Architecture("SingleStreamDiT", None),  # Krea 2
)


@dataclass(frozen=True)
class Target:
    """A layer that is adapted."""

    path: str  # in the network
    layer: nn.Module

    @property
    def name(self) -> str:
        """The name of its adapter: kohya's, with underscores."""
        return f"{PREFIX}.{self.path}".replace(".", "_")

    @property
    def has_wide_kernel(self) -> bool:
        """Whether it is a convolution that musubi adapts with conv_dim alone: one of more than 1x1."""
        layer = self.layer
        return isinstance(layer, nn.Conv2d | nn.Conv3d) and any(size != 1 for size in layer.kernel_size)


def architecture_of(network: nn.Module) -> Architecture:
    """The architecture of a network of musubi's. Raises ConfigError for one that is not known here."""
    classes = {type(module).__name__ for module in network.modules()}
    found = next((known for known in ARCHITECTURES if known.sign in classes), None)
    if found is None:
        signs = ", ".join(known.sign for known in ARCHITECTURES)
        raise ConfigError(
            f"network_module: weft.integrations.musubi does not know the blocks of {type(network).__name__}. It knows "
            f"networks with {signs}; for others call its create_network with your block classes, or use musubi's own "
            "module for that model."
        )
    return found


def targets_in(
    network: nn.Module, blocks: Sequence[str] | None, exclude: Sequence[str] = (), include: Sequence[str] = ()
) -> tuple[Target, ...]:
    """The layers in blocks whose whole path no pattern of exclude matches, or one of include does as well: include
    alone takes nothing in or out. Raises ConfigError for a pattern that is no regex, or two layers of one name."""
    excluded, included = _compiled("exclude_patterns", exclude), _compiled("include_patterns", include)
    found: dict[str, Target] = {}
    for path, layer in _layers_in(network, blocks):
        out = any(pattern.fullmatch(path) for pattern in excluded)
        if out and not any(pattern.fullmatch(path) for pattern in included):
            continue
        target = Target(path, layer)
        if target.name in found:
            raise ConfigError(
                f"network_module: '{path}' and '{found[target.name].path}' are both called {target.name} in musubi's "
                "files. Exclude one of them by exclude_patterns."
            )
        found[target.name] = target
    return tuple(found.values())


def _layers_in(network: nn.Module, blocks: Sequence[str] | None) -> Iterator[tuple[str, nn.Module]]:
    roots = [("", network)]
    if blocks is not None:
        roots = [(path, module) for path, module in network.named_modules() if type(module).__name__ in blocks]
    for root, block in roots:
        for path, module in block.named_modules():
            if type(module).__name__ in ADAPTED:
                yield ".".join(part for part in (root, path) if part), module


def _compiled(argument: str, patterns: Sequence[str]) -> list[re.Pattern[str]]:
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise ConfigError(f"network_args, {argument}: '{pattern}' is no regular expression: {error}.") from None
    return compiled
