"""The network object that musubi-tuner's trainer holds: all adapted layers of a model, and every call made of them."""

import logging
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import ConfigError, ModelError
from weft.integrations.musubi_layer import AdaptedLayer
from weft.integrations.musubi_weights import ALPHA, DORA_SCALE, DOWN, UP, read_weights, write_weights
from weft.math.lowrank import delta_norm, norm_ratio

log = logging.getLogger(__name__)


class MusubiNetwork(nn.Module):
    """LoRA on the layers of a DiT. Its state dict has the names of musubi's own network, so that files and the state
    folders of --save_state go from one to the other; the DiT's own state dict stays as it was.

    layers: not yet applied.
    """

    def __init__(self, layers: Sequence[AdaptedLayer], multiplier: float) -> None:
        super().__init__()
        self.unet_loras = list(layers)
        self.text_encoder_loras: list[AdaptedLayer] = []  # none is ever adapted; musubi's networks have the name
        self.loraplus_lr_ratio: float | None = None
        self.kept: dict[str, Tensor] = {}  # name of a layer -> its base's weight before pre_calculation
        self.folded: set[str] = set()  # names of layers whose base holds the change at this time
        for layer in layers:
            self.add_module(layer.lora_name, layer)
        self.set_multiplier(multiplier)
        self.register_load_state_dict_post_hook(_rescale)

    @property
    def has_magnitudes(self) -> bool:
        """Whether it is a DoRA."""
        return any(layer.dora_scale is not None for layer in self.unet_loras)

    def prepare_network(self, args: Namespace) -> None:
        """Refuse what the trainer would do to these adapters and they cannot bear. Raises ConfigError."""
        given = vars(args)  # which arguments there are depends on the model's script
        if self.has_magnitudes and given.get("scale_weight_norms"):
            raise ConfigError("network_args, dora=True: --scale_weight_norms has no meaning for DoRA. Leave one out.")
        if self.has_magnitudes and given.get("dit_high_noise"):
            raise ConfigError(
                "network_args, dora=True: with --dit_high_noise one adapter stands on two experts, and DoRA's "
                "magnitudes are those of one. Train each expert by itself, or leave dora out."
            )

    def apply_to(
        self, text_encoders: object, unet: nn.Module | None, apply_text_encoder: bool = True, apply_unet: bool = True
    ) -> None:
        """Let the layers answer in their bases' places. Raises ConfigError when there are none."""
        if not apply_unet:
            for layer in self.unet_loras:
                delattr(self, layer.lora_name)
            self.unet_loras = []
        if not self.unet_loras:
            raise ConfigError(
                "network_module: there are no layers to adapt. Look at exclude_patterns in --network_args, and at "
                "--network_dim, which must not be 0."
            )
        for layer in self.unet_loras:
            layer.apply_to()

    def load_weights(self, file: str | Path) -> Any:
        """Continue from a file in musubi's names: what torch's load_state_dict returns, names missing here or there.
        Each layer's scale becomes the file's. Raises ModelError when nothing fits, or a rank is another."""
        weights = read_weights(Path(file))
        own = self.state_dict()
        if not any(key in own for key in weights):
            raise ModelError(
                f"{file}: none of its {len(weights)} tensors belongs to this network, first "
                f"'{next(iter(weights), 'nothing')}'. Write it in musubi's names: weft convert {file} --to musubi."
            )
        for key, tensor in weights.items():
            if key in own and key.endswith(DORA_SCALE):
                weights[key] = tensor.view_as(own[key])  # (out, 1) in files
            elif key in own and tensor.shape != own[key].shape:
                raise ModelError(
                    f"{file}: '{key}' is {tuple(tensor.shape)}, and this network's {tuple(own[key].shape)}. "
                    "Give --network_dim the file's rank, or another --network_weights."
                )
        for layer in self.unet_loras:
            alpha = weights.get(f"{layer.lora_name}.{ALPHA}")
            if alpha is not None and float(alpha) != float(layer.alpha):
                log.warning(
                    "%s: its alpha %g counts, and not the %g of --network_alpha, or its strength would be another",
                    file, float(alpha), float(layer.alpha),
                )  # fmt: skip
                break
        return self.load_state_dict(weights, strict=False)

    def enable_gradient_checkpointing(self) -> None:
        """Nothing: the layers are recomputed with the blocks that they stand in."""

    def set_loraplus_lr_ratio(self, loraplus_lr_ratio: float | None) -> None:
        """The learning rate of lora_up over that of all else; None: the same."""
        self.loraplus_lr_ratio = loraplus_lr_ratio

    def prepare_optimizer_params(
        self, unet_lr: float | None = 1e-4, **kwargs: Any
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Parameter groups and their descriptions: "unet", and with LoRA+ "unet plus". Groups of rate 0 or None are
        left out."""
        self.requires_grad_(True)
        ratio = self.loraplus_lr_ratio
        groups: dict[str, tuple[float | None, list[nn.Parameter]]] = {
            "unet": (unet_lr, []),
            "unet plus": (None if unet_lr is None or ratio is None else unet_lr * ratio, []),
        }
        for name, parameter in self.named_parameters():
            groups["unet plus" if ratio is not None and ".lora_up." in name else "unet"][1].append(parameter)
        taken = {key: {"params": held, "lr": rate} for key, (rate, held) in groups.items() if rate and held}
        return list(taken.values()), list(taken)

    def prepare_grad_etc(self, unet: nn.Module) -> None:
        """Train every parameter."""
        self.requires_grad_(True)

    def on_epoch_start(self, unet: nn.Module) -> None:
        """Dropouts act from now on."""
        self.train()

    def on_step_start(self) -> None:
        """Nothing."""

    def get_trainable_params(self) -> Iterator[nn.Parameter]:
        """What the gradient's norm is taken of."""
        return self.parameters()

    @torch.no_grad()
    def apply_max_norm_regularization(self, max_norm_value: float, device: torch.device) -> tuple[int, float, float]:
        """Shrink every ||scale B A||_F above the limit to it, half in A and half in B. Returns how many were shrunk,
        and the mean and the largest norm afterwards."""
        norms, ratios = [], []
        for layer in self.unet_loras:
            down, up = layer.lora_down.weight, layer.lora_up.weight
            norm = delta_norm(down.to(device).flatten(1), up.to(device).flatten(1), layer.scale)
            ratio = norm_ratio(norm, max_norm_value)
            for factor in (down, up):
                factor.mul_(ratio.sqrt().to(factor.device))
            norms.append(norm * ratio)
            ratios.append(ratio)
        after, shrunk = torch.stack(norms), torch.stack(ratios) < 1
        return int(shrunk.sum()), float(after.mean()), float(after.max())

    def save_weights(self, file: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write the weights in musubi's names, in a dtype, or None: as they are."""
        tensors = self.state_dict()
        for key in tensors:
            if key.endswith(f".{DORA_SCALE}"):
                tensors[key] = tensors[key].unsqueeze(1)  # (out, 1), as LyCORIS and ComfyUI have it
        write_weights(Path(file), tensors, dtype, metadata or {})

    def set_multiplier(self, multiplier: float) -> None:
        """Let every layer count so much."""
        self.multiplier = multiplier
        for layer in self.unet_loras:
            layer.multiplier = multiplier
            layer.rescale()

    def set_enabled(self, is_enabled: bool) -> None:
        """Whether the layers add anything to their bases' answers."""
        for layer in self.unet_loras:
            layer.enabled = is_enabled

    def is_mergeable(self) -> bool:
        """Whether `merge_to` can be asked."""
        return not self.has_magnitudes

    @torch.no_grad()
    def merge_to(
        self,
        text_encoders: object,
        unet: nn.Module | None,
        weights_sd: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        non_blocking: bool = False,
    ) -> None:
        """Add the change by other weights of the same layers to the bases: W + multiplier scale B A, computed in fp32
        on a device, rounded to dtype. Raises ModelError for weights of which nothing fits."""
        self._refuse_magnitudes(weights_sd)
        merged = 0
        for layer in self.unet_loras:
            down, up = (weights_sd.get(f"{layer.lora_name}.{end}") for end in (DOWN, UP))
            if down is None or up is None:
                continue
            weight = plain_weight(layer)
            place = weight.device if device is None else device
            alpha = weights_sd.get(f"{layer.lora_name}.{ALPHA}")
            scale = 1.0 if alpha is None else float(alpha) / len(down)
            down, up = (factor.to(place, non_blocking=non_blocking) for factor in (down, up))
            whole = weight.to(place, torch.float32, non_blocking=non_blocking) + layer.delta(down, up, scale)
            weight.copy_(whole.to(dtype or weight.dtype))
            merged += 1
        if not merged:
            raise ModelError(
                f"merge: none of the file's {len(weights_sd)} tensors belongs to a layer of this model, first "
                f"'{next(iter(weights_sd), 'nothing')}'. Is it an adapter of another model?"
            )
        log.info("weights are merged into %d of %d layers", merged, len(self.unet_loras))

    @torch.no_grad()
    def backup_weights(self) -> None:
        """Keep the bases' weights, unless that is done."""
        for layer in self.unet_loras:
            if layer.lora_name not in self.kept:
                self.kept[layer.lora_name] = plain_weight(layer).detach().clone()

    @torch.no_grad()
    def restore_weights(self) -> None:
        """Give the bases their own weights back, bit for bit; the layers stay as `set_enabled` has them."""
        for layer in self.unet_loras:
            if layer.lora_name in self.folded:
                plain_weight(layer).copy_(self.kept[layer.lora_name])
        self.folded.clear()

    @torch.no_grad()
    def pre_calculation(self) -> None:
        """Put the changes into the bases' weights, whose own are kept, and add nothing to their answers any more."""
        self._refuse_magnitudes({})
        self.backup_weights()
        for layer in self.unet_loras:
            weight, own = plain_weight(layer), self.kept[layer.lora_name]
            down, up = (factor.weight.to(own.device) for factor in (layer.lora_down, layer.lora_up))
            weight.copy_((own.float() + layer.delta(down, up, layer.scale)).to(own.dtype))
            layer.enabled = False
            self.folded.add(layer.lora_name)

    def _refuse_magnitudes(self, weights: Mapping[str, Tensor]) -> None:
        if self.has_magnitudes or any(key.endswith(f".{DORA_SCALE}") for key in weights):
            raise ModelError("a DoRA is not added to a base but norms its rows: merge it by weft merge, not by musubi.")


def plain_weight(layer: AdaptedLayer) -> Tensor:
    """The base's weight, to be changed in place. Raises ModelError for one whose numbers need scales beside them."""
    (base,) = layer.base
    if "scale_weight" in base._buffers:
        raise ModelError(
            f"'{layer.path}' is in scaled fp8, and merging would leave its scales behind: merge into the unquantized "
            "model first (weft merge), and quantize that."
        )
    weight = base.weight
    assert isinstance(weight, Tensor)
    return weight


def _rescale(network: nn.Module, incompatible: object) -> None:
    assert isinstance(network, MusubiNetwork)
    for layer in network.unet_loras:
        layer.rescale()
