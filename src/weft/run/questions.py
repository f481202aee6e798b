"""The largest questions that a run asks its network: clips of a bucket, rows of tokens, or documents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.contracts import Batch, Denoise, Documents, Model, Phase, Rng, Tokens, as_encoder, as_video
from weft.data.buckets import Bucket
from weft.run.config import RunConfig

OF_TEXT = ("text", "text_mask", "pooled")  # conditions that come of a text, as a family calls them
# Of an objective: the dearest question every time, plain draws of times, and no ordinary steps before the dear ones.
MOST = {"first_frame": 1.0, "strata": 1, "warm_up_steps": 0}


@dataclass(frozen=True, order=True)
class Row:
    """A row of text or a document, the shape in which a language model or an encoder is asked."""

    tokens: int

    def __str__(self) -> str:
        return f"rows of {self.tokens:,} tokens"


Shape = Bucket | Row


def shapes_of(config: RunConfig, survey: Any) -> dict[Shape, int]:
    """Items of an epoch by their shape, the largest first. Of text there is one: rows that are not packed to a length
    are as long as the longest text in a batch, which in a stream may be data.length."""
    if config.family.medium == "video":
        return survey.buckets()
    longest = config.data.length if survey.streamed else survey.longest  # of documents as they are read
    length = survey.capacity or longest
    return {Row(length): survey.rows} if length else {}


def shape_at(config: RunConfig, shape: Sequence[int]) -> Shape:
    """The shape whose tensor is at hand: latents (B, C, f, h, w), or ids (B, L)."""
    if config.family.medium != "video":
        return Row(shape[1])
    geometry, (_, _, f, h, w) = as_video(config.family).geometry(), shape
    frames, height, width = (f - 1) * geometry.time_stride + 1, h * geometry.space_stride, w * geometry.space_stride
    return Bucket(frames, height, width, geometry.tokens(frames, height, width))


def asked(config: RunConfig, shape: Shape, model: Model, own: torch.Generator) -> Callable[[Phase, int], Tensor]:
    """What makes the loss of a phase's n-th step. An objective of one part asks one question; one of several is asked
    for its own loss, with all that it looks at on the way. own: the chance of its noise and times."""
    documents = config.family.medium == "documents"  # of which a learner may ask many questions for one loss
    if not (config.objective.parts or documents):
        one = question(config, shape)
        return lambda phase, done: answered(model, one)
    objective, items = dearest(config.objective), config.data.batch_size
    if isinstance(shape, Row):
        batch = documents_of(config, shape.tokens)
    else:
        batch = told(config, torch.randn(items, *latents_of(config, shape)), "clip")
    state = objective.init(model)

    def loss(phase: Phase, done: int) -> Tensor:
        rng = Rng(own, torch.Generator(), config.seed, done * config.schedule.accumulate, done)
        return objective.loss(phase.name, model, batch, state, rng).total

    return loss


def dearest(objective: Any) -> Any:
    """The objective, asking the most wherever it may ask less."""
    chosen = objective.model_dump(include=set(MOST))
    return objective.model_copy(update={name: MOST[name] for name, value in chosen.items() if value != 0})


def phases_of(config: RunConfig) -> tuple[Phase, ...]:
    """The phases of the first expert, each once, as the run comes to them; others are like them."""
    experts = config.family.experts
    objective = dearest(config.objective)
    roles, found = objective.roles(experts[:1]), dict[str, Phase]()
    for step in range(config.schedule.steps):
        for phase in objective.phases(step, experts):
            if phase.role in roles:
                found.setdefault(phase.name, phase)
        if len(found) == len(roles) and config.family.medium != "documents":  # whose one role may begin by a warm-up
            break
    return tuple(found.values())


def latents_of(config: RunConfig, bucket: Bucket) -> tuple[int, ...]:
    """(C, F, H, W) of the latents of a bucket."""
    return as_video(config.family).geometry().latent_shape(bucket.frames, bucket.height, bucket.width)


def told(config: RunConfig, latents: Tensor, key: str) -> Batch:
    """A batch of latents (B, C, F, H, W) with conditions of the right shapes, and with the objective's own texts; of
    data that have captions alone, without the latents' values."""
    items, shape = len(latents), latents.shape[2:]
    family = as_video(config.family)
    beside = {
        f"{text}/{name}": tensor
        for text in config.objective.texts
        for name, tensor in family.conditions(1, *shape).items()
        if name in OF_TEXT
    }
    main = {"latents": latents} if config.data.has_latents else {"blank": torch.zeros_like(latents)}
    tensors = {**main, **family.conditions(items, *shape), **beside}
    return Batch(tensors, tuple(f"{key}.{i}" for i in range(items)))


def documents_of(config: RunConfig, tokens: int) -> Batch:
    """A micro-batch of documents of so many tokens, with as many that are replayed as there may be."""
    classes = len(as_encoder(config.family).labels)

    def rows(items: int) -> dict[str, Tensor]:
        labels = torch.zeros(items, classes) if config.family.multi_label else torch.zeros(items, dtype=torch.long)
        ids = torch.zeros(items, tokens, dtype=torch.long)
        return {"ids": ids, "mask": torch.ones(items, tokens, dtype=torch.bool), "labels": labels}

    items, replay = config.data.batch_size, config.data.replay
    replayed = rows(replay.batch) if replay is not None else {}
    beside = {f"replay/{name}": tensor for name, tensor in replayed.items()}
    tensors = {**rows(items), "fresh": torch.ones(items, dtype=torch.bool), **beside}
    return Batch(tensors, tuple(f"document.{i}" for i in range(items)))


def question(config: RunConfig, shape: Shape) -> Denoise | Tokens | Documents:
    """One micro-batch of a shape, in all that a family may be told; of text with every token learned."""
    items = config.data.batch_size
    if config.family.medium == "documents":
        batch = documents_of(config, shape.tokens)
        return Documents(batch["ids"], batch["mask"])
    if isinstance(shape, Row):
        ids = torch.zeros(items, shape.tokens, dtype=torch.long)
        return Tokens(ids, torch.arange(shape.tokens).repeat(items, 1), ids.clone())
    family, latents = as_video(config.family), latents_of(config, shape)
    given = torch.zeros(items, latents[1], dtype=torch.bool) if family.image == "frames" else None
    conditions, expert = family.conditions(items, *latents[1:]), family.experts[0].name
    return Denoise(torch.randn(items, *latents), torch.rand(items), conditions, given, expert)


def answered(model: Model, asked: Denoise | Tokens | Documents) -> Tensor:
    """A number that a backward pass can begin with."""
    if isinstance(asked, Documents):
        return model.logits(asked).sum()
    if isinstance(asked, Tokens):
        return model.losses(asked).sum()
    return model.velocity(asked).float().square().sum()
