"""What a stream of documents asks of a run: names of classes, steps of each experience, and what is no part of it."""

from collections.abc import Mapping
from itertools import accumulate
from math import ceil
from typing import Any

from weft.engines.deepspeed import DeepSpeed
from weft.errors import ConfigError
from weft.run.config import RunConfig
from weft.run.estimate import precision_of


def labelled(config: RunConfig, survey: Any) -> RunConfig:
    """The config whose family knows the classes of the data, and the seed of a head that begins by chance. Other media
    as they are."""
    family = config.family
    if family.medium != "documents":
        return config
    told = {
        "labels": family.labels or survey.labels,
        "multi_label": survey.multi_label if family.multi_label is None else family.multi_label,
        "seed": config.seed if family.seed is None else family.seed,
    }
    # Made anew and not copied: a copy would keep what the family has worked out without them.
    return config.model_copy(update={"family": type(family).model_validate({**family.model_dump(), **told})})


def last_steps(config: RunConfig, stretches: Mapping[str, int], together: int) -> dict[str, int]:
    """Experience -> the step that it ends with.

    stretches: micro-batches of one pass over each. together: micro-batches of a step. Of schedule.steps each experience
    has as many as it has data, at least one. Raises ConfigError for fewer steps than experiences.
    """
    epochs, draws = config.schedule.epochs, sum(stretches.values())
    if epochs is not None:
        own = [ceil(epochs * each / together) for each in stretches.values()]
        return dict(zip(stretches, accumulate(own), strict=True))
    steps = config.schedule.steps
    if steps < len(stretches):
        raise ConfigError(
            f"schedule.steps: {steps} are fewer than the {len(stretches)} experiences of the data. Write at least one "
            "for each, or schedule.epochs."
        )
    ends = [round(steps * each / draws) for each in accumulate(stretches.values())]
    for i in range(len(ends)):  # none is left without a step, wherever rounding put it
        ends[i] = max(ends[i], (ends[i - 1] if i else 0) + 1)
    for i in reversed(range(len(ends))):
        ends[i] = min(ends[i], steps - (len(ends) - 1 - i))
    return dict(zip(stretches, ends, strict=True))


def check_documents(config: RunConfig) -> None:
    """Raises ConfigError for what a run of documents has no use for."""
    if config.samples.prompts:
        raise ConfigError("samples.prompts: an encoder sorts documents and generates nothing. Leave them out.")
    if config.schedule.reset_optimizer and config.engine.kind != "torch":
        raise ConfigError(
            f"schedule.reset_optimizer: engine '{config.engine.kind}' keeps the moments itself. Write "
            "engine.kind=torch, or leave it out."
        )
    if isinstance(config.engine, DeepSpeed) and config.engine.zero == 3:
        raise ConfigError(
            "engine.zero: ZeRO-3 parts frozen weights between the processes, and of an encoder the head is trained "
            "whole. Write engine.zero=2, or engine.kind=torch with parallel.shard."
        )
    precision = precision_of(config)
    if not config.adapter.has_base and (kept := config.family.weight_dtype(precision)) != "fp32":
        raise ConfigError(
            f"family.dtype: all weights are trained, and {kept} loses most of what small steps add to them. Write "
            "family.dtype=fp32, which engine.precision still multiplies in half precision; or train an adapter."
        )
    if not config.adapter.has_base and config.engine.residence().stream_blocks:
        raise ConfigError(
            "engine.stream_blocks: frozen weights wait in host memory, and with adapter.kind=none every weight is "
            "trained. Leave it out, or write adapter.kind=lora."
        )
    config.objective.check_run(config)
