"""The plain step of the libraries, to take turns with ours: diffusers or transformers with PEFT, as one writes it by
hand, on the same weights, adapters, batches and chance."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.optim import AdamW

from weft.adapters.lora import Lora
from weft.contracts import UNLEARNED, Denoise, Model, Tokens
from weft.errors import ConfigError, RunError
from weft.families.causal_lm import CausalLM
from weft.families.hunyuan_video import HunyuanVideo
from weft.families.storage import FULL
from weft.families.video_model import VideoModel
from weft.families.wan import Wan
from weft.families.weights import Source, bare, real_buffers
from weft.run.bench import Running
from weft.run.bench_machine import clock_of, waiter
from weft.run.bench_watch import allocated_peak, bytes_of, counted_peak, states_of
from weft.run.config import RunConfig

BOUNDS = {"fp32": 1e-5, "bf16": 1e-2}  # relative difference of the losses of the first step


@dataclass(frozen=True, kw_only=True)
class PlainModel(Model):
    """A network that is asked in its library's own words. The objective's noise, times and loss are ours."""

    def velocity(self, inputs: Denoise) -> Tensor:
        x, family, cond = inputs.x, self.family, inputs.cond
        if isinstance(family, HunyuanVideo):
            guidance = torch.full_like(inputs.t, 1000 * family.guidance) if family.embeds_guidance else None
            return self.network(
                hidden_states=x, timestep=1000 * inputs.t, encoder_hidden_states=cond["text"].to(x.dtype),
                encoder_attention_mask=cond["text_mask"].expand(cond["text"].shape[:2]),
                pooled_projections=cond["pooled"].to(x.dtype), guidance=guidance, return_dict=False,
            )[0]  # fmt: skip
        assert isinstance(family, Wan)
        timestep, (_, high, wide) = 1000 * inputs.t, family.network_config["patch_size"]
        if inputs.given is not None:
            by_frame = timestep[:, None] * ~inputs.given
            timestep = by_frame.repeat_interleave((x.shape[3] // high) * (x.shape[4] // wide), dim=1)
        text = pad(cond["text"], (0, 0, 0, family.tokens_of_text - cond["text"].shape[1]))
        return self.network(hidden_states=x, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]

    def losses(self, inputs: Tokens) -> Tensor:
        logits = self.network(input_ids=inputs.ids, position_ids=inputs.positions, use_cache=False).logits
        flat = cross_entropy(
            logits.float().flatten(0, 1), inputs.labels.flatten(), reduction="none", ignore_index=UNLEARNED
        )
        return flat.view_as(inputs.labels)


@dataclass
class Plain:
    """A plain network, its optimizer, and the learner whose chance and batches it shares."""

    model: PlainModel
    optimizer: AdamW
    ours: Running
    losses: list[float] = field(default_factory=list)

    def go(self, steps: int) -> float:
        """As a training script does: forward, backward, clip, step, zero, and the loss for its log. Returns seconds."""
        wait = waiter(self.ours.engine.device) or (lambda: None)
        wait()
        began = perf_counter()
        for _ in range(steps):
            self._step()
        wait()
        return perf_counter() - began

    def clocked(self) -> float:
        clock = clock_of(self.ours.engine.device)
        began = clock()
        self.go(1)
        return clock() - began

    def _step(self) -> None:
        learner, engine = self.ours.learner, self.ours.engine
        accumulate = self.ours.config.schedule.accumulate
        phase = learner.objective.phases(learner.step, learner.experts)[0]
        drawn = self.ours.stream.batches(0, 0, 1)
        batches = [next(drawn) for _ in range(accumulate)]
        items, total = sum(map(learner.objective.count, batches)), 0.0
        for number, batch in enumerate(map(engine.put, batches)):
            rng = learner.rng(phase.name, number, accumulate)
            with engine.computing():
                loss = learner.objective.loss(phase.name, self.model, batch, learner.state, rng).total / items
            loss.backward()
            total += loss.item()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(trained, self.ours.config.schedule.max_norm or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(total)

    def meet(self, ours: Running) -> None:
        """The first step of both. Raises RunError when their losses differ: then they do not compute the same."""
        self.go(1)
        ours.go(1)
        self.go(ours.warm_up)
        own, theirs, bound = ours.losses[0], self.losses[0], BOUNDS[ours.engine.precision]
        if not abs(own - theirs) <= bound * abs(theirs):
            raise RunError(
                f"--against: the loss of the first step is {own:.6g} with Weft and {theirs:.6g} with the plain step, "
                f"further apart than {bound:g} of it, so that a comparison of their speeds would mean nothing. Please "
                "report this, with the command."
            )

    def compared(self, own: Sequence[float], theirs: Sequence[float], figures: Mapping[str, Any]) -> dict[str, Any]:
        """What the plain step takes, and how many times what ours does in the same round."""
        ratios = [other / each for each, other in zip(own, theirs, strict=True)]
        low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else (ratios[0],) * 3
        text, peak = isinstance(self.model.family, CausalLM), self.peak()
        return {
            "name": f"{'transformers' if text else 'diffusers'} + PEFT",
            "step_seconds": {"median": median(theirs)},
            "ratio": median(ratios),
            "ratio_p25": low,
            "ratio_p75": high,
            "memory_bytes": {"peak": peak, "ratio": peak / figures["memory_bytes"]["peak"]},
            "loss_first": {"own": self.ours.losses[0], "theirs": self.losses[0]},
        }

    def peak(self) -> int:
        """Bytes at the most: what stands, and what a step adds."""
        network, device = self.model.network, self.ours.engine.device
        tensors = [*network.parameters(), *network.buffers(), *states_of([self.optimizer])]
        stands = bytes_of(tensors)
        if device.type == "cuda":
            return allocated_peak(device, stands, self.go)
        return counted_peak(stands, self.go)


# ---- Made of ours -------------------------------------------------------------------------------------------------


def plain_of(ours: Running) -> Plain:
    """A plain network with the weights of ours, and adapters with the values of ours, before a step was made. Raises
    ConfigError for what the plain step cannot do."""
    config, adapters = ours.config, ours.learner.model.adapters
    check(config, ours)
    network = plain_network(config, ours)
    role = adapters.names[0]
    values = adapters.state_dict(role)
    recipe = config.adapter_of(role)
    paths = sorted({name.rpartition(".lora_")[0] for name in values})
    told = LoraConfig(r=recipe.rank, lora_alpha=recipe.strength, target_modules=paths, use_rslora=recipe.rslora)
    inject_adapter_in_model(told, network)
    trained = dict[str, nn.Parameter]()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            # PEFT's own get_peft_model widens adapters to fp32 too; in half precision small updates would be lost.
            parameter.data = values[name.replace(".default", "")].to(parameter.device, torch.float32).clone()
            trained[name] = parameter
    recompute(network, config)
    group = ours.learner.optimizers[role].param_groups[0]
    options = {name: group[name] for name in ("betas", "eps", "weight_decay")}
    optimizer = AdamW(trained.values(), lr=group["base_lr"], fused=True, **options)
    model = PlainModel(network=network.train(), family=config.family, adapters=adapters)
    return Plain(model, optimizer, ours)


def check(config: RunConfig, ours: Running) -> None:
    """Raises ConfigError."""
    family, recipe = config.family, config.adapter
    reasons = {
        f"objective '{config.objective.kind}' trains several parts": bool(config.objective.parts),
        "two networks take turns: write family.expert=high": len(family.experts) > 1,
        "the adapter is no plain LoRA": not isinstance(recipe, Lora) or recipe.dora or recipe.init != "kaiming",
        "convolutions are adapted": bool(getattr(recipe, "conv_rank", None)),
        "A and B have learning rates of their own": getattr(recipe, "lora_plus", 1.0) != 1.0,
        f"the optimizer is {config.optimizer.kind}": config.optimizer.kind != "adamw",
        "weights are packed": family.dtype in ("fp8", "int8", "nf4"),
        "this model goes on from a picture": isinstance(family, Wan) and family.image == "channels",
        "loss scaling of fp16": ours.engine.precision not in BOUNDS,
    }
    for reason, there in reasons.items():
        if there:
            raise ConfigError(f"--against diffusers-peft: not with this config, since {reason}.")


def plain_network(config: RunConfig, ours: Running) -> Any:
    """The library's own network with our weights, where its own loading would put them."""
    family, engine = config.family, ours.engine
    dtype = FULL[family.weight_dtype(engine.precision)]
    network: Any = bare(family._built)
    if isinstance(family, CausalLM):
        network.config._attn_implementation = "sdpa"
        source, kept = family.source_of(network), set[str]()
    else:
        assert isinstance(family, VideoModel)
        kept = set(network._keep_in_fp32_modules or ())
        source = family.checkpoint.tensors(family.part_of(family.experts[0].name))
    assign(network, source, lambda name: torch.float32 if kept & set(name.split(".")) else dtype, engine.device)
    real_buffers(network)
    return network.to(engine.device).requires_grad_(False)


def assign(network: nn.Module, source: Source, dtype: Callable[[str], torch.dtype], device: torch.device) -> None:
    """Fill a network that has shapes only; tensors that two modules share stay one."""
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(network.named_parameters(remove_duplicate=False)):
        key = id(parameter)
        if key not in made:
            there = name if name in source.names else _other_name(network, parameter, source)
            made[key] = nn.Parameter(source.read(there).to(device, dtype(name)), requires_grad=False)
        path, _, end = name.rpartition(".")
        network.get_submodule(path)._parameters[end] = made[key]


def _other_name(network: nn.Module, parameter: nn.Parameter, source: Source) -> str:
    """The name under which files have a shared tensor."""
    names = (name for name, each in network.named_parameters(remove_duplicate=False) if each is parameter)
    return next(name for name in names if name in source.names)


def recompute(network: Any, config: RunConfig) -> None:
    """As the libraries recompute."""
    if not config.engine.recompute:
        return
    if isinstance(config.family, CausalLM):
        network.gradient_checkpointing_enable({"use_reentrant": False})
        network.enable_input_require_grads()
    else:
        network.enable_gradient_checkpointing()
