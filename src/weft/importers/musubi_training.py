"""musubi-tuner's optimizer, schedule, memory, saving and logging options."""

import re
from collections.abc import Mapping
from math import ceil
from typing import Any

from weft.config.yaml_text import read_scalar
from weft.errors import ConfigError
from weft.importers.draft import Draft
from weft.importers.launchers import put_precision
from weft.importers.musubi_model import named_arguments
from weft.importers.values import Theirs

ADAM = {"adamw": "adamw", "adamw8bit": "adamw8bit"}
ADAFACTOR = "transformers.optimization.Adafactor"
# HF's and diffusers' names of curves -> ours, and what differs.
CURVES: Mapping[str, tuple[str, str]] = {
    "constant": ("constant", ""),
    "constant_with_warmup": ("constant", ""),
    "linear": ("linear", ""),
    "cosine": ("cosine", ""),
    "cosine_with_restarts": ("cosine", "one fall, without restarts"),
    "cosine_with_min_lr": ("cosine", ""),
    "polynomial": ("linear", "a straight line, which is power 1"),
    "inverse_sqrt": ("linear", "a straight line; Weft has no inverse root"),
    "warmup_stable_decay": ("constant", "it does not fall at the end"),
    "piecewise_constant": ("constant", "one step"),
    "rex": ("cosine", "the nearest of Weft's curves"),
}


def literal(text: str) -> Any:
    """A value as Python writes it: a number, True, None, a tuple of numbers, or else text. Nothing is evaluated."""
    words = {"True": True, "False": False, "None": None}
    bare = text.strip()
    if bare in words:
        return words[bare]
    if re.fullmatch(r"[(\[].*[)\]]|[^'\",]+(,[^'\",]+)+", bare):
        return [literal(item) for item in bare.strip("()[]").split(",") if item.strip()]
    return read_scalar(bare.strip("'\""))


def put_optimizer(theirs: Theirs, draft: Draft) -> None:
    """The section `optimizer`."""
    name = theirs.text("optimizer_type")
    arguments = {key: literal(value) for key, value in named_arguments(theirs, "optimizer_args").items()}
    if name is None:
        draft.assume("optimizer.kind", "adamw", "musubi names none, and stops without one")
    elif name.lower() in ADAM:
        draft.set("optimizer.kind", ADAM[name.lower()], "optimizer_type", theirs=name)
    else:
        _put_custom(theirs, draft, name, arguments)
    _put_rate(theirs, draft)
    custom = draft.get("optimizer.kind") == "custom"
    for key, value in arguments.items():
        if key == "weight_decay" or (not custom and key in ("betas", "eps")):
            draft.set(f"optimizer.{key}", value, f"optimizer_args {key}")
        elif custom:
            draft.set(f"optimizer.args.{key}", value, f"optimizer_args {key}")
        else:
            draft.drop(f"optimizer_args {key}", value, f"optimizer.kind {draft.get('optimizer.kind')} has no such key.")


def _put_custom(theirs: Theirs, draft: Draft, name: str, arguments: dict[str, Any]) -> None:
    lowered = name.lower()
    if lowered == "adafactor":
        path = ADAFACTOR
        if arguments.get("relative_step", True):
            draft.warn(
                "optimizer_type Adafactor: without relative_step=False musubi leaves the learning rate to Adafactor. "
                "This run has the rate that is written, and the schedule's curve."
            )
        arguments["relative_step"] = False
        arguments.pop("warmup_init", None)
    elif "." not in name:
        path = f"torch.optim.{name}"
    else:
        path = name
    draft.set("optimizer.kind", "custom", "optimizer_type", theirs=name)
    draft.set("optimizer.path", path, "optimizer_type", theirs=name)
    if lowered.endswith("schedulefree"):
        draft.warn(
            f"optimizer_type {name}: musubi switches such an optimizer between training and evaluation, and Weft does "
            "not, so saved and sampled weights are not its averages. adamw with a cosine curve stands nearest."
        )
    if lowered.endswith("8bit") and "." not in name:
        raise ConfigError(
            f"{theirs.place('optimizer_type')}: optimizer_type '{name}' is nothing that musubi can build. It has "
            "AdamW8bit; others need their whole path, such as bitsandbytes.optim.Lion8bit."
        )


def _put_rate(theirs: Theirs, draft: Draft) -> None:
    rate = theirs.number("learning_rate")
    if rate is None:
        draft.assume("optimizer.lr", 2e-6, "musubi's default")
        draft.warn("learning_rate is not given, and musubi's 2e-6 hardly moves a LoRA. 1e-4 to 2e-4 are usual.")
    else:
        draft.set("optimizer.lr", rate, "learning_rate")


# ---- The schedule ---------------------------------------------------------------------------------------------------


def put_schedule(theirs: Theirs, draft: Draft) -> None:
    """The section `schedule`, but for what is the same in both."""
    steps, epochs = theirs.whole("max_train_steps"), theirs.number("max_train_epochs")
    if epochs is not None:
        draft.set("schedule.epochs", epochs, "max_train_epochs")
        if steps is not None:
            draft.drop("max_train_steps", steps, "max_train_epochs stands in its place, in musubi too.")
        steps = None
    elif steps is not None:
        draft.set("schedule.steps", steps, "max_train_steps")
    else:
        steps = 1600
        draft.assume("schedule.steps", steps, "musubi's default")
    name = theirs.text("lr_scheduler") or "constant"
    if name.partition(":")[0] == "adafactor":
        draft.drop("lr_scheduler", name, "Adafactor's own rate is not here; optimizer.lr is constant.")
        name = "constant"
    if name not in CURVES:
        theirs.choice("lr_scheduler", list(CURVES), "constant")
    curve, differs = CURVES[name]
    if "lr_scheduler" in theirs:
        draft.set("schedule.curve", curve, "lr_scheduler", differs, name)
    else:
        draft.assume("schedule.curve", curve, "musubi's default")
    _put_curve_details(theirs, draft, name)
    put_warmup(theirs, draft, steps, name)


def _put_curve_details(theirs: Theirs, draft: Draft, name: str) -> None:
    floor = theirs.number("lr_scheduler_min_lr_ratio")
    if floor is not None:
        if name in ("cosine_with_min_lr", "rex", "warmup_stable_decay"):
            draft.set("schedule.floor", floor, "lr_scheduler_min_lr_ratio")
        else:
            draft.drop("lr_scheduler_min_lr_ratio", floor, f"It has no part in lr_scheduler {name}.")
    cycles, power = theirs.number("lr_scheduler_num_cycles", 1), theirs.number("lr_scheduler_power", 1)
    if cycles != 1:
        draft.drop("lr_scheduler_num_cycles", cycles, "The rate falls once, over the whole run.")
        if name == "cosine_with_restarts":
            draft.warn(f"lr_scheduler cosine_with_restarts: {cycles:g} falls become one.")
    if power != 1:
        draft.drop("lr_scheduler_power", power, "The line is straight.")


def put_warmup(theirs: Theirs, draft: Draft, steps: int | None, name: str) -> None:
    """lr_warmup_steps: steps, or a share of them. steps: of the run, None where only epochs are known."""
    said = theirs.text("lr_warmup_steps")
    if said is None:
        return
    try:
        value = float(said[:-1]) / 100 if said.endswith("%") else float(said)
    except ValueError:
        raise theirs.refused("lr_warmup_steps", "a number of steps, a share below 1, or a share such as 5%") from None
    if value == 0:
        return
    if value < 1 or said.endswith("%"):
        if steps is None:
            draft.drop(
                "lr_warmup_steps", said, "It is a share of steps, whose number epochs decide. See schedule.warmup."
            )
            draft.warn(f"lr_warmup_steps {said}: fill schedule.warmup in, in steps; weft plan says how many there are.")
            return
        value = value * steps
    warmup = int(value)
    if steps is not None and warmup >= steps:
        draft.warn(
            f"lr_warmup_steps {said}: the run has only {steps} steps. schedule.warmup is lowered to {steps - 1}."
        )
        warmup = steps - 1
    draft.set("schedule.warmup", warmup, "lr_warmup_steps", theirs=said)
    if name == "constant":
        draft.warn(
            "lr_scheduler constant takes no warm-up there; Weft's constant curve begins with schedule.warmup steps."
        )


# ---- Memory and saving ----------------------------------------------------------------------------------------------


def put_engine(theirs: Theirs, draft: Draft) -> None:
    """The section `engine`."""
    if "mixed_precision" in theirs:
        put_precision(theirs, draft)
    recompute = theirs.flag("gradient_checkpointing")
    if recompute:
        draft.set("engine.recompute", True, "gradient_checkpointing")
    swapped = theirs.whole("blocks_to_swap", 0) or 0
    if swapped:
        note = "any blocks, evenly spread; adapters never move"
        draft.set("engine.stream_blocks", swapped, "blocks_to_swap", note)
    offload = theirs.flag("gradient_checkpointing_cpu_offload")
    if offload:
        draft.set("engine.offload_inputs", True, "gradient_checkpointing_cpu_offload")
    if (swapped or offload) and not recompute:
        why = "blocks_to_swap needs it here" if swapped else "the offload needs it"
        draft.assume("engine.recompute", True, why)
    if swapped:
        pinned = theirs.flag("use_pinned_memory_for_block_swap")
        if "use_pinned_memory_for_block_swap" in theirs:
            draft.set("engine.pinned", pinned, "use_pinned_memory_for_block_swap")
    elif "use_pinned_memory_for_block_swap" in theirs:
        draft.drop(
            "use_pinned_memory_for_block_swap", theirs.take("use_pinned_memory_for_block_swap"), "No block swaps."
        )
    workers = theirs.whole("max_data_loader_n_workers", 0)
    if workers:
        draft.set("data.workers", workers, "max_data_loader_n_workers", "threads that decode clips")
    elif "max_data_loader_n_workers" in theirs:
        draft.drop("max_data_loader_n_workers", workers, "Clips are always decoded beside the computation.")


def put_saving(theirs: Theirs, draft: Draft) -> None:
    """The sections `save` and `track`, and the run's name."""
    name = theirs.text("output_name")
    if name is None:
        draft.assume("name", "imported", "output_name is not given")
    else:
        draft.set("name", run_name(name), "output_name", theirs=name)
    every, epochs = theirs.whole("save_every_n_steps"), theirs.number("save_every_n_epochs")
    if every:
        draft.set("save.every", every, "save_every_n_steps")
    if epochs:
        draft.set("save.every_epochs", epochs, "save_every_n_epochs")
        if not every:
            draft.assume("save.every", 0, "only by epochs, as theirs")
    for key, between in (("save_last_n_steps", every), ("save_last_n_epochs", epochs)):
        last = theirs.whole(key)
        if last is None:
            continue
        if between:
            keep = max(1, ceil(last / between))
            draft.set("save.keep", keep, key, "a number of checkpoints", last)
            draft.set("save.prune_adapters", True, key, "older adapters are deleted too", last)
        else:
            draft.drop(key, last, f"It needs {key.replace('last', 'every')}.")
    put_trackers(theirs, draft, "log_with")


def put_trackers(theirs: Theirs, draft: Draft, key: str) -> None:
    """track.to from a word of accelerate's."""
    word = theirs.text(key)
    if word is None or word == "none":
        return
    known = {"tensorboard": ["tensorboard"], "wandb": ["wandb"], "all": ["tensorboard", "wandb"]}
    if word in known:
        draft.set("track.to", known[word], key, theirs=word)
    else:
        draft.drop(key, word, "Weft has tensorboard, wandb and trackio.")


def run_name(name: str) -> str:
    """A run's name from theirs, which is a file's."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
