"""ai-toolkit's train and save sections: times, optimizer, schedule, averages."""

from collections.abc import Mapping
from math import exp
from statistics import NormalDist

from weft.importers.ai_toolkit_keys import Arch
from weft.importers.draft import Draft
from weft.importers.nested import mapping, popped, settle
from weft.importers.values import Theirs

EPS = 1e-6  # of the Adam that toolkit/optimizer.py makes
# toolkit/optimizer.py: name -> ours; the custom ones are classes of packages that it imports.
OPTIMIZERS: Mapping[str, str] = {
    "adamw": "adamw", "adamw8bit": "adamw8bit", "adamw8": "adamw8bit", "adam": "torch.optim.Adam",
    "adam8bit": "bitsandbytes.optim.Adam8bit", "adam8": "bitsandbytes.optim.Adam8bit",
    "ademamix8bit": "bitsandbytes.optim.AdEMAMix8bit", "lion8bit": "bitsandbytes.optim.Lion8bit",
    "lion": "lion_pytorch.Lion", "adagrad": "torch.optim.Adagrad", "prodigy": "prodigyopt.Prodigy",
    "adafactor": "transformers.optimization.Adafactor", "dadaptation": "dadaptation.DAdaptAdam",
    "dadaptationadam": "dadaptation.DAdaptAdam", "dadaptationlion": "dadaptation.DAdaptLion",
}  # fmt: skip
FREE_OF_LR = ("prodigy", "dadaptation")  # they take an lr below 0.1 for 1


def put_learning(theirs: Theirs, draft: Draft, arch: Arch) -> None:
    draft.assume("objective.kind", "flow-matching", "The loss of these models.")
    _timesteps(theirs, draft, arch)
    turn = theirs.whole("train.switch_boundary_every", 1)
    if draft.get("family.expert") == "both":
        settle(theirs, draft, "train.switch_boundary_every", "objective.turn", turn)
    _optimizer(theirs, draft)
    accumulate = theirs.whole("train.gradient_accumulation", 1) or 1
    legacy = theirs.whole("train.gradient_accumulation_steps", 1) or 1
    steps = theirs.whole("train.steps", 1000) or 1000
    if legacy > 1:
        draft.set("schedule.accumulate", legacy, of="train.gradient_accumulation_steps")
        note = f"There each of {legacy} micro-batches counts as a step."
        draft.set("schedule.steps", max(1, steps // legacy), of="train.steps", theirs=steps, note=note)
    else:
        settle(theirs, draft, "train.steps", "schedule.steps", steps)
        settle(theirs, draft, "train.gradient_accumulation", "schedule.accumulate", accumulate)
    settle(theirs, draft, "train.max_grad_norm", "schedule.max_norm", theirs.number("train.max_grad_norm", 1.0))
    _curve(theirs, draft)
    recompute = theirs.flag("train.gradient_checkpointing", True)
    if draft.has("engine.stream_blocks") and not recompute:
        recompute = True
        draft.warn("model.layer_offloading: Weft streams blocks only where it recomputes them, and so it does.")
    settle(theirs, draft, "train.gradient_checkpointing", "engine.recompute", recompute)
    if theirs.flag("train.ema_config.use_ema"):
        decay = theirs.number("train.ema_config.ema_decay", 0.999)
        settle(theirs, draft, "train.ema_config.ema_decay", "ema.decay", decay)
    theirs.take("train.ema_config.ema_decay")
    for key in ("train.ema_config.use_feedback", "train.ema_config.param_multiplier"):
        if theirs.take(key) not in (None, False, 1, 1.0):
            draft.drop(key, theirs.take(key), "Weft's average is a plain one, and nothing is fed back.")
    if (loss := theirs.text("train.loss_type") or "mse") != "mse":
        draft.drop("train.loss_type", loss, "Weft's loss is the mean squared error of the velocity.")
        draft.warn(f"train.loss_type is '{loss}' there, and the mean squared error here: losses do not compare.")
    _save(theirs, draft)


def _timesteps(theirs: Theirs, draft: Draft, arch: Arch) -> None:
    """The density of training times. CustomFlowMatchEulerDiscreteScheduler.set_train_timesteps."""
    kind = theirs.text("train.timestep_type") or "sigmoid"
    of = "train.timestep_type"
    if kind == "sigmoid":
        settle(theirs, draft, of, "objective.timesteps.kind", "sigmoid")
    elif kind in ("shift", "flux_shift", "lumina2_shift"):
        shifted = {"kind": "shift", "shift": arch.shift, "scale": None}
        draft.set("objective.timesteps", shifted, of, theirs=kind, note="The shift of its training scheduler.")
    elif kind == "linear":
        draft.set("objective.timesteps.kind", "uniform", of, theirs=kind)
    else:
        why = "Times are uniform here, and each counts alike." if kind == "weighted" else "Times are uniform here."
        draft.drop(of, kind, f"Weft has no such density. {why}")
        draft.assume("objective.timesteps.kind", "uniform", f"In place of '{kind}'.")
    if (side := theirs.text("train.content_or_style") or "balanced") != "balanced":
        why = "Weft has no cubic density; timesteps of kind shift favour noise, logit-normal with a mean below 0 data."
        draft.drop("train.content_or_style", side, why)
    first = theirs.whole("train.min_denoising_steps", 0) or 0
    last = theirs.whole("train.max_denoising_steps", 999)
    last = 999 if last is None else min(last, 999)
    if (first, last) == (0, 999):
        return
    if arch.two:
        draft.drop("train.min_denoising_steps", [first, last], "The two networks part the times, there as here.")
        return
    if first >= last:
        draft.warn(f"train.min_denoising_steps {first} is not below max_denoising_steps {last}; they were exchanged.")
        first, last = last, first
    times = [_time(last + 1, kind, arch.shift), _time(first, kind, arch.shift)]
    note = "Places in the list of times from noise to data there; times from 0, data, to 1, noise, here."
    draft.set("objective.times", times, of="train.min_denoising_steps", theirs=[first, last], note=note)


def _time(place: int, kind: str, shift: float) -> float:
    """The time at a place from 0, noise, to 1000, data, in the sorted list that ai-toolkit draws from."""
    share = 1 - place / 1000
    if kind == "sigmoid" and 0 < share < 1:
        odds = exp(NormalDist().inv_cdf(share))
        return round(odds / (1 + odds), 4)
    if "shift" in kind:
        return round(shift * share / (1 + (shift - 1) * share), 4)
    return round(share, 4)


def _optimizer(theirs: Theirs, draft: Draft) -> None:
    told = (theirs.text("train.optimizer") or "adamw").lower()
    lr_of = "train.unet_lr" if theirs.take("train.unet_lr") is not None else "train.lr"
    lr = theirs.number(lr_of, 1e-6) or 1e-6
    theirs.take("train.lr")
    options = mapping(theirs, "train.optimizer_params")
    ours = OPTIMIZERS.get(told)
    if ours is None:
        draft.drop(
            "train.optimizer", told, "Its class is a part of ai-toolkit; Weft takes AdamW, or any class by path."
        )
        draft.warn(
            f"train.optimizer '{told}' finds its own learning rate; AdamW takes {lr:g} as it stands. Look at it."
        )
        draft.assume("optimizer.kind", "adamw", f"In place of '{told}'.")
        draft.set("optimizer.lr", lr, of=lr_of)
        return
    if told.startswith(FREE_OF_LR) and lr < 0.1:
        draft.warn(f"{lr_of} is {lr:g}, and ai-toolkit takes 1 for {told} below 0.1; so does the config.")
        lr = 1.0
    settle(theirs, draft, "train.optimizer", "optimizer.kind", ours if "." not in ours else "custom", shown=told)
    settle(theirs, draft, lr_of, "optimizer.lr", lr)
    decay = popped(theirs, "train.optimizer_params", options, "weight_decay")
    if decay is not None:
        draft.set("optimizer.weight_decay", decay, of="train.optimizer_params.weight_decay")
    if "." in ours:
        fixed = {"relative_step": False, "scale_parameter": False, "warmup_init": False} if told == "adafactor" else {}
        eps = {} if told in ("adafactor", "lion", "lion8bit", "adagrad") else {"eps": EPS}
        draft.set("optimizer.path", ours, of="train.optimizer", theirs=told)
        if arguments := {**eps, **fixed, **options}:
            draft.set("optimizer.args", arguments, of="train.optimizer_params", note="With what ai-toolkit adds.")
        return
    draft.assume("optimizer.eps", EPS, "As ai-toolkit makes it.")
    if (betas := options.pop("betas", None)) is not None:
        draft.set("optimizer.betas", betas, of="train.optimizer_params.betas")
    if (eps := popped(theirs, "train.optimizer_params", options, "eps")) is not None:
        draft.set("optimizer.eps", eps, of="train.optimizer_params.eps")
    for key, value in options.items():
        draft.drop(f"train.optimizer_params.{key}", value, "Weft's AdamW has lr, betas, eps and weight_decay.")


def _curve(theirs: Theirs, draft: Draft) -> None:
    told = theirs.text("train.lr_scheduler") or "constant"
    options = mapping(theirs, "train.lr_scheduler_params")
    of = "train.lr_scheduler"
    warmup = popped(theirs, "train.lr_scheduler_params", options, "num_warmup_steps")
    if warmup is None and told == "constant_with_warmup":
        warmup = 1000  # what toolkit/scheduler.py then takes
    if warmup:
        draft.set("schedule.warmup", int(warmup), of="train.lr_scheduler_params.num_warmup_steps")
    if told.startswith("constant"):
        settle(theirs, draft, of, "schedule.curve", "constant", shown=told)
    elif told == "cosine":
        draft.set("schedule.curve", "cosine", of)
        lr = draft.get("optimizer.lr")
        if floor := popped(theirs, "train.lr_scheduler_params", options, "eta_min"):
            draft.set("schedule.floor", round(floor / lr, 6), of="train.lr_scheduler_params.eta_min", theirs=floor)
    elif told == "linear":
        why = "ai-toolkit's linear is torch's LinearLR, which rises from a third of lr to lr over the run."
        draft.drop(of, told, f"{why} Weft's linear falls, so the rate is constant here.")
        draft.warn(f"{of}: {why} It was left constant; schedule.curve: linear would fall to 0.")
        draft.assume("schedule.curve", "constant", "In place of a rate that rises.")
    else:
        draft.drop(of, told, "Weft's curves are constant, linear and cosine; it is constant here.")
        draft.assume("schedule.curve", "constant", f"In place of '{told}'.")
    for key, value in options.items():
        draft.drop(f"train.lr_scheduler_params.{key}", value, "Weft's curves end with the run.")


def _save(theirs: Theirs, draft: Draft) -> None:
    for key, default, ours in (
        ("save.save_every", 1000, "save.every"),
        ("save.max_step_saves_to_keep", 5, "save.keep"),
    ):
        value = theirs.whole(key, default)
        note = "Of checkpoints; adapters all stay." if ours == "save.keep" else ""
        settle(theirs, draft, key, ours, max(1, value or default), note=note)
