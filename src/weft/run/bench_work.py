"""The FLOP of a config's step: by closed forms for the families that have them, else counted on fake tensors."""

from collections.abc import Sequence
from math import prod
from statistics import mean
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from weft.contracts import Distilled, ModelFamily, Phase
from weft.events import StepEnded
from weft.families.causal_lm import CausalLM
from weft.families.hunyuan_video import HunyuanVideo
from weft.families.wan import CLIP_TOKENS, Wan
from weft.math.flops import Block, Linear, Work, decoder_blocks, hunyuan_blocks, wan_blocks, work_of
from weft.run.assemble import target_report
from weft.run.config import RunConfig
from weft.run.questions import Shape
from weft.run.rehearsal import Rehearsal, Stage, rehearsed

TIMES = ("norm", "linear_in", "mod")  # heads of names of layers inside blocks that see one token an item


def closed_work(config: RunConfig, shape: Shape, document: int = 0) -> Work | None:
    """Of one micro-batch by the formulas of math/flops.py; None for networks, adapters and objectives that they do not
    describe. document: tokens of each conversation in a row of text; 0: the row is one."""
    family = config.family
    if config.adapter.kind != "lora" or config.objective.parts:
        return None
    network = family.skeleton()
    made = blocks_of(config, shape, document or shape.tokens)
    if made is None or not describes(made[0], family, network):
        return None
    blocks, head = made
    paths = {id(module): path for path, module in network.named_modules()}
    heads = [paths[id(block)] for block in family.blocks(network)]
    report = target_report(config, network)
    adapted = set(report.paths)
    before = any(not path.startswith((*(f"{at}." for at in heads), "proj_out", "lm_head")) for path in adapted)
    rank = config.adapter.rank

    def rank_of(number: int, name: str) -> int:
        return rank if f"{heads[number]}.{name}" in adapted else 0

    return work_of(blocks, rank_of, head, before)


def blocks_of(config: RunConfig, shape: Shape, document: int) -> tuple[list[Block], list[Linear]] | None:
    """Blocks of a network in closed form, and its head."""
    family, items = config.family, config.data.batch_size
    if isinstance(family, CausalLM):
        return decoder_of(family, items * shape.tokens, document)
    if isinstance(family, Wan):
        network = family.network_config
        width, picture = network["num_attention_heads"] * network["attention_head_dim"], family.has_eyes
        sizes = (network["num_layers"], width, network["ffn_dim"], shape.tokens, family.tokens_of_text)
        return wan_blocks(*sizes, items, CLIP_TOKENS if picture else 0), []
    if isinstance(family, HunyuanVideo):
        network = family.network_config
        width = network["num_attention_heads"] * network["attention_head_dim"]
        ffn = int(width * network["mlp_ratio"])
        depths = (network["num_layers"], network["num_single_layers"])
        return hunyuan_blocks(*depths, width, ffn, shape.tokens, family.text_length, items), []
    return None


def decoder_of(family: CausalLM, tokens: int, document: int) -> tuple[list[Block], list[Linear]] | None:
    """Of a decoder as Qwen, Llama and Mistral are; None for one without their layers."""
    told = family.config.to_dict()
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    if any(told.get(name) is None for name in names):
        return None
    layers, width, ffn, heads, keys = (told[name] for name in names)
    shape = (heads, keys, told.get("head_dim") or width // heads)
    learned = tokens - tokens // document
    return decoder_blocks(layers, width, ffn, shape, tokens, document), [
        Linear("head", learned, width, told["vocab_size"])
    ]


def describes(blocks: Sequence[Block], family: ModelFamily, network: nn.Module) -> bool:
    """Whether the linear layers of closed blocks are those of the network's, by name and size."""
    own = list(family.blocks(network))
    if len(own) != len(blocks):
        return False
    seen: dict[int, bool] = {}
    for block, module in zip(blocks, own, strict=True):
        key = id(block)
        if key not in seen:
            wanted = {each.name: (each.inputs, each.outputs) for stage in block.stages for each in stage.linears}
            there = {
                name: (layer.in_features, layer.out_features)
                for name, layer in module.named_modules()
                if isinstance(layer, nn.Linear) and not name.startswith(TIMES)
            }
            seen[key] = wanted == there
    return all(seen.values())


# ---- Counted ------------------------------------------------------------------------------------------------------


def model_flops(config: RunConfig, shape: Shape) -> int:
    """FLOP of one micro-batch of an objective of one part, see `flops_by_phase`. Experts are networks of one size."""
    return next(iter(flops_by_phase(config, shape).values()))


def flops_by_phase(config: RunConfig, shape: Shape) -> dict[str, int]:
    """FLOP of one micro-batch of each phase, forward and backward without recomputation, counted on fake tensors. A
    student that is left after another number of steps each time is counted for each number, and the mean is taken.

    Matrix products and convolutions as torch counts them; attention 4 Nq Nk d forward and 8 Nq Nk d backward, of a row
    of text as if each token saw all others. A head of words counts for every token.
    """
    objective = config.objective
    times = len(objective.step_list(config.family).times) if isinstance(objective, Distilled) else 1
    with rehearsed(config, shape, Stage()) as rehearsal:
        return {
            phase.name: round(mean(counted(rehearsal, phase, done) for done in range(times)))
            for phase in rehearsal.phases
        }


def flops_of(config: RunConfig, shape: Shape, events: Sequence[StepEnded], work: Work | None) -> list[int]:
    """FLOP of each step. work: of a micro-batch, where it is known in closed form."""
    schedule, experts = config.schedule, config.family.experts
    if not config.objective.parts:
        one = model_flops(config, shape) if work is None else work.model
        return [one * schedule.accumulate] * len(events)
    of = flops_by_phase(config, shape)
    return [
        schedule.accumulate * sum(of[phase.name] for phase in config.objective.phases(event.step - 1, experts))
        for event in events
    ]


def counted(rehearsal: Rehearsal, phase: Phase, done: int) -> int:
    """FLOP of one micro-batch of a phase that has had so many steps."""
    counter = FlopCounterMode(display=False, custom_mapping=further_flops())
    with rehearsal.adapters.use(phase.role), counter:
        rehearsal.loss(phase, done).backward()
    return counter.get_total_flops()


def further_flops() -> dict[Any, Any]:
    """Formulas that torch's table lacks: of the cpu's attention kernel, and of products that are added in place."""

    def added(_: Any, a: tuple[int, ...], b: tuple[int, ...], *__: Any, **___: Any) -> int:
        return 2 * prod(a) * b[-1]

    def forward(query: tuple[int, ...], key: tuple[int, ...], *_: Any, **__: Any) -> int:
        batch, heads, queries, width = query
        return 4 * batch * heads * queries * key[2] * width

    def backward(_: Any, query: tuple[int, ...], key: tuple[int, ...], *__: Any, **___: Any) -> int:
        return 2 * forward(query, key)

    ops = torch.ops.aten
    return {
        ops.addmm_: added,
        ops.baddbmm_: added,
        ops._scaled_dot_product_flash_attention_for_cpu: forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
