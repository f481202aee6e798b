"""The calls that musubi-tuner's trainer makes of a network module, in its order, with real accelerate.

kohya-ss/musubi-tuner at 30c658c4, src/musubi_tuner/training/trainer_base.py: _build_network (1534-1614),
_build_optimizer_and_dataloader (1619), _prepare_with_accelerator (1677-1740), _run_training_loop (2026-2082, 2171).
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file
from torch import Tensor, nn

import weft.integrations.musubi as network_module
from tests.integrations.small_wan import WanModel, question


@dataclass
class Run:
    """A training: what is told to the trainer, and what came of it."""

    args: Namespace
    transformer: WanModel
    before_step: Callable[[WanModel, int], None] = lambda transformer, step: None
    after_backward: Callable[[Any, WanModel, int], None] = lambda network, transformer, step: None
    losses: list[float] = field(default_factory=list)
    network: Any = None
    optimizer: Any = None
    accelerator: Any = None
    norms: list[tuple[int, float, float]] = field(default_factory=list)


def arguments(**given: Any) -> Namespace:
    """musubi's command line as far as a network sees it, with its defaults."""
    usual = {
        "network_dim": 4, "network_alpha": 2.0, "network_dropout": None, "network_args": None, "network_weights": None,
        "base_weights": None, "base_weights_multiplier": None, "dim_from_weights": False, "learning_rate": 1e-2,
        "gradient_checkpointing": False, "scale_weight_norms": None, "max_grad_norm": 1.0, "mixed_precision": "no",
        "dit_high_noise": None, "seed": 42,
    }  # fmt: skip
    assert set(given) <= set(usual)
    return Namespace(**{**usual, **given})


def build(run: Run, module: Any = network_module) -> Any:
    """_build_network."""
    args, transformer = run.args, run.transformer
    for path in args.base_weights or []:
        weights = load_file(path)
        merged = module.create_arch_network_from_weights(0.5, weights, unet=transformer, for_inference=True)
        merged.merge_to(None, transformer, weights, torch.float32, "cpu")
    net_kwargs = dict(given.split("=") for given in args.network_args or [])
    network = module.create_arch_network(
        1.0, args.network_dim, args.network_alpha, None, None, transformer, neuron_dropout=args.network_dropout,
        **net_kwargs,
    )  # fmt: skip
    if hasattr(module, "prepare_network"):
        network.prepare_network(args)
    network.apply_to(None, transformer, apply_text_encoder=False, apply_unet=True)
    if args.network_weights is not None:
        network.load_weights(args.network_weights)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing(False)
        network.enable_gradient_checkpointing()
    return network


def train(run: Run, steps: int = 10, module: Any = network_module) -> Run:
    """The whole of it; losses are in the run."""
    args, transformer = run.args, run.transformer
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    accelerator = run.accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=True)
    torch.manual_seed(args.seed)
    network = build(run, module)
    params, descriptions = network.prepare_optimizer_params(unet_lr=args.learning_rate)
    assert len(params) == len(descriptions)
    optimizer = torch.optim.AdamW(params)
    transformer = accelerator.prepare(transformer)
    network, optimizer = accelerator.prepare(network, optimizer)
    transformer.train(args.gradient_checkpointing)
    accelerator.unwrap_model(network).prepare_grad_etc(transformer)
    accelerator.unwrap_model(network).on_epoch_start(transformer)
    for step in range(steps):
        run.before_step(run.transformer, step)
        with accelerator.accumulate(network):
            accelerator.unwrap_model(network).on_step_start()
            loss = _loss(accelerator, transformer, step)
            accelerator.backward(loss)
            run.after_backward(accelerator.unwrap_model(network), run.transformer, step)
            params_to_clip = accelerator.unwrap_model(network).get_trainable_params()
            accelerator.clip_grad_norm_(params_to_clip, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if args.scale_weight_norms:
            scaled = accelerator.unwrap_model(network).apply_max_norm_regularization(
                args.scale_weight_norms, accelerator.device
            )
            run.norms.append(scaled)
        run.losses.append(loss.detach().item())
    run.network, run.optimizer = accelerator.unwrap_model(network), optimizer
    return run


def _loss(accelerator: Accelerator, transformer: nn.Module, step: int) -> Tensor:
    asked = {name: tensor.requires_grad_(name != "t") for name, tensor in question(step).items()}
    with accelerator.autocast():
        predicted = transformer(**asked)
    target = torch.randn(predicted.shape, generator=torch.Generator().manual_seed(100 + step))
    return (predicted.float() - target).square().mean()


def save(run: Run, path: Path, dtype: torch.dtype = torch.float32, **metadata: str) -> Path:
    """save_model."""
    run.network.save_weights(str(path), dtype, {"ss_network_module": "weft.integrations.musubi", **metadata})
    return path


class PlainNetwork:
    """LoRA by its formula alone, with musubi's surface as far as `train` needs it: a second way to compute.

    y = W x + multiplier alpha / rank B A x; A and B are taken from another network's first values.
    """

    def __init__(self, first: dict[str, Tensor], names: dict[str, str], scale: float) -> None:
        self.first, self.names, self.scale = first, names, scale

    def create_arch_network(self, *given: Any, **kwargs: Any) -> "PlainNetwork.Net":
        return self.Net(self)

    class Net(nn.Module):
        def __init__(self, plain: "PlainNetwork") -> None:
            super().__init__()
            self.scale, self.names = plain.scale, plain.names
            self.weights = nn.ParameterDict(
                {key.replace(".", "/"): nn.Parameter(t.clone()) for key, t in plain.first.items()}
            )

        def apply_to(self, text_encoders: None, unet: nn.Module, apply_text_encoder: bool, apply_unet: bool) -> None:
            for name, path in self.names.items():
                layer = unet.get_submodule(path)
                a, b = (self.weights[f"{name}/lora_{end}/weight"] for end in ("down", "up"))
                layer.forward = self._answer(layer.forward, a, b)

        def _answer(self, base: Callable[[Tensor], Tensor], a: Tensor, b: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda x: base(x) + self.scale * (x @ a.T @ b.T)

        def prepare_optimizer_params(self, unet_lr: float) -> tuple[list[dict[str, Any]], list[str]]:
            return [{"params": list(self.parameters()), "lr": unet_lr}], ["unet"]

        def prepare_grad_etc(self, unet: nn.Module) -> None: ...
        def on_epoch_start(self, unet: nn.Module) -> None: ...
        def on_step_start(self) -> None: ...
        def enable_gradient_checkpointing(self) -> None: ...
        def get_trainable_params(self) -> Any:
            return self.parameters()
