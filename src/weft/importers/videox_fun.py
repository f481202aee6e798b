"""VideoX-Fun: the launch scripts of its LoRA and distillation trainers for Wan 2.1 and 2.2."""

import re
from collections.abc import Mapping, Sequence
from pathlib import PureWindowsPath
from typing import Any

from weft.errors import ConfigError
from weft.importers.draft import Draft, ReadFile
from weft.importers.flags import Arity
from weft.importers.launchers import Launch, launch_of, put_launcher, put_precision, script_of
from weft.importers.musubi_training import CURVES, put_trackers, put_warmup, run_name
from weft.importers.shell_words import Script
from weft.importers.values import Theirs, carry, drop_left
from weft.importers.videox_data import put_data
from weft.importers.videox_flags import ARITY, REASONS, SAME
from weft.importers.videox_model import ConfiguredWan, model_of, put_adapter, put_model

SCRIPTS = r"train(?:_distill|_control|_inpaint|_reward|_s2v|_animate|_edit)*(?:_lora)?\.py"
OURS = ("train_lora.py", "train_distill_lora.py")
FOLDERS = ("wan2.1", "wan2.2")
OWN = {"video_sample_n_frames", "token_sample_size", "train_data_meta", "boundary_type", "video_sample_stride",
       "video_sample_size", "training_with_video_token_length", "gen_update_interval", "vae_mini_batch"}  # fmt: skip
EVEN = [1000.0, 750.0, 500.0, 250.0]
USUAL_WARMUP = 500


class VideoXFun:
    """Reads a launch script, or a bare list of flags."""

    name = "VideoX-Fun"

    def recognises(self, file: ReadFile) -> float:
        """By flags that no other trainer has, behind a script of theirs."""
        if not isinstance(file.content, Script):
            return 0.0
        flags = {word.text.lstrip("-").partition("=")[0] for line in file.content.commands for word in line.words}
        if script_of(file, rf"scripts[/\\](?:{'|'.join(map(re.escape, FOLDERS))})[/\\]{SCRIPTS}"):
            return 1.0
        return 0.9 * (len(flags & OWN) >= 3)

    def read(self, files: Sequence[ReadFile], draft: Draft) -> None:
        """The whole run."""
        scripts = [file for file in files if isinstance(file.content, Script)]
        if not scripts:
            raise ConfigError(f"{files[0].path}: {self.name}'s options stand in launch scripts, and this is none.")
        launch = launch_of(scripts[0], SCRIPTS, _arity, self.name)
        theirs = launch.theirs
        distils = _distils(launch, scripts[0], self.name)
        model = model_of(theirs, draft, scripts[0].path)
        mode = theirs.choice("train_mode", ("normal", "i2v", "ti2v"), "normal")
        captions_alone = distils and mode == "normal"
        _put_folder(theirs, draft)
        put_model(theirs, draft, model)
        put_adapter(theirs, draft)
        if distils:
            _put_dmd(theirs, draft, model)
        else:
            _put_flow(theirs, draft, model)
        _put_mode(theirs, draft, model, mode, captions_alone)
        _put_optimizers(theirs, draft, launch, distils)
        put_data(theirs, draft, model, captions_alone)
        _put_schedule(theirs, draft)
        _put_rest(theirs, draft)
        carry(theirs, draft, [one for one in SAME if one.of in theirs.left])
        put_launcher(launch, draft)
        drop_left(theirs, draft, REASONS, ARITY)


def _arity(script: str) -> Mapping[str, Arity]:
    return ARITY


def _distils(launch: Launch, file: ReadFile, program: str) -> bool:
    """Whether the script is the distillation. Raises ConfigError for scripts of other models or of all weights."""
    assert isinstance(file.content, Script)
    command = file.content.running(rf"(?:.*[/\\])?{SCRIPTS}")
    path = next((word.text for word in command.words if word.text.endswith(launch.script)), "") if command else ""
    folder = PureWindowsPath(path).parent.name
    if launch.script and launch.script not in OURS:
        raise ConfigError(
            f"{launch.place}: {path} is {program}'s trainer of all weights, or of another task. Weft imports "
            f"{' and '.join(OURS)} of {' and '.join(FOLDERS)}."
        )
    if folder not in ("", ".", *FOLDERS):
        raise ConfigError(
            f"{launch.place}: {path} trains {folder}. Weft imports the scripts of {' and '.join(FOLDERS)}."
        )
    return "distill" in launch.script or (not launch.script and "gen_update_interval" in launch.theirs)


def _put_folder(theirs: Theirs, draft: Draft) -> None:
    folder = theirs.text("output_dir") or "sd-model-finetuned"
    path = PureWindowsPath(folder)
    draft.set("name", run_name(path.name), "output_dir", "the run's folder is output/name", folder)
    if path.parent.as_posix() != ".":
        draft.set("output", path.parent.as_posix(), "output_dir", theirs=folder)


# ---- What is learned ------------------------------------------------------------------------------------------------


def _put_flow(theirs: Theirs, draft: Draft, model: ConfiguredWan) -> None:
    """train_lora.py: an index into a table of times that the shift has moved."""
    draft.assume("objective.kind", "flow-matching", "train_lora.py: the velocity's squared error")
    draft.assume("objective.timesteps.kind", "shift", "their table of times is shifted")
    draft.assume("objective.timesteps.shift", model.shift, "of their config")
    scheme = theirs.choice("weighting_scheme", ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none"), "none")
    uniform = theirs.flag("uniform_sampling")
    std: float | None = None
    if uniform:
        draft.set("objective.strata", 16, "uniform_sampling", "counts draws in a row; theirs parts by processes", True)
    elif scheme == "logit_normal":
        mean, std = theirs.number("logit_mean", 0.0) or 0.0, theirs.number("logit_std", 1.0)
        if mean:
            draft.warn(f"logit_mean {mean:g}: before the shift Weft's density is centred; the mean is left out.")
    elif scheme == "mode":
        draft.warn("weighting_scheme mode: Weft has no such density; this run draws times uniformly before the shift.")
    if std is None:
        draft.assume("objective.timesteps.scale", None, "uniform before the shift")
    else:
        draft.set("objective.timesteps.scale", std, "logit_std")
    if scheme in ("sigma_sqrt", "cosmap"):
        draft.set("objective.weighting", scheme.replace("_", "-"), "weighting_scheme", theirs=scheme)
    elif scheme == "logit_normal" and not uniform:
        draft.set(
            "objective.timesteps.kind", "shift", "weighting_scheme", "a sigmoid of a normal, then shifted", scheme
        )
    for key in ("logit_mean", "logit_std"):
        if key in theirs.left:
            draft.drop(key, theirs.take(key), "It belongs to weighting_scheme logit_normal without uniform_sampling.")
    if not uniform and model.boundary is not None:
        draft.warn(
            "uniform_sampling is not given, and their code then trains the one expert on all times and ignores "
            f"boundary_type. This run keeps it to its own, parted at {model.boundary:g}."
        )


def _put_dmd(theirs: Theirs, draft: Draft, model: ConfiguredWan) -> None:
    """train_distill_lora.py: student, teacher and critic on one frozen base."""
    draft.assume("objective.kind", "dmd", "train_distill_lora.py: distribution matching; one base for all three")
    steps = theirs.numbers("denoising_step_indices_list") or EVEN
    even = [1000 - 1000 * place / len(steps) for place in range(len(steps))]
    if max(abs(one - other) for one, other in zip(steps, even, strict=True)) > 1:
        draft.warn(f"denoising_step_indices_list {steps}: Weft's steps are even before the shift, {even}.")
    if "denoising_step_indices_list" in theirs:
        draft.set("objective.steps", len(steps), "denoising_step_indices_list", "their number", steps)
    else:
        draft.assume("objective.steps", len(steps), "their default list of four")
    draft.assume("objective.shift", model.shift, "of their config")
    carried: Sequence[tuple[str, str, Any]] = (
        ("gen_update_interval", "objective.student_every", 5),
        ("real_guidance_scale", "objective.guidance", 6.0),
        ("fake_guidance_scale", "objective.critic_guidance", 0.0),
    )
    for of, key, usual in carried:
        value = theirs.number(of)
        ours = usual if value is None else value
        ours = 1.0 if of == "fake_guidance_scale" and ours == 0 else ours
        if value is None:
            draft.assume(key, ours, f"their default {of}")
        else:
            draft.set(key, ours, of, "their 0 is 1 here: off" if ours != value else "", value)
    negative = theirs.text("negative_prompt")
    if negative is None:
        draft.warn(
            "objective.negative: their teacher always has Wan's own negative prompt; write it there to have it too."
        )
    else:
        draft.set("objective.negative", negative, "negative_prompt", "their code takes Wan's own in its place")
    if "uniform_sampling" in theirs:
        draft.set("objective.strata", 16, "uniform_sampling", "draws in a row", theirs.flag("uniform_sampling"))


def _put_mode(theirs: Theirs, draft: Draft, model: ConfiguredWan, mode: str, captions_alone: bool) -> None:
    """How much of a clip is given."""
    said = "train_mode" in theirs
    if mode == "ti2v" or (model.clean_frame and not captions_alone):
        if not model.clean_frame:
            draft.warn(f"train_mode {mode}: it is for TI2V-5B, and their config is of another model.")
            return
        share = 0.5 if mode == "ti2v" else 0.0
        draft.set("objective.first_frame", share, "train_mode", "share of clips whose first frame is given", mode)
    elif said and not captions_alone:
        draft.drop("train_mode", mode, "The model's own channels say whether it goes on from an image.")


# ---- How it is learned ----------------------------------------------------------------------------------------------


def _put_optimizers(theirs: Theirs, draft: Draft, launch: Launch, distils: bool) -> None:
    rate = theirs.number("learning_rate")
    settings: dict[str, tuple[Any, str]] = {"lr": (rate, "learning_rate")}
    factor = 1
    if theirs.flag("scale_lr"):
        processes = launch.launcher.whole("num_processes", 1) or 1
        batch, accumulate = theirs.whole("train_batch_size", 16), theirs.whole("gradient_accumulation_steps", 1)
        factor = processes * (batch or 1) * (accumulate or 1)
        settings["lr"] = ((1e-4 if rate is None else rate) * factor, "learning_rate, scale_lr")
        draft.warn(f"scale_lr: {factor} items a step make the rate {settings['lr'][0]:g}; look whether that is meant.")
    if theirs.flag("use_came"):
        draft.set("optimizer.kind", "custom", "use_came", theirs=True)
        draft.assume("optimizer.path", "came_pytorch.CAME", "their use_came; pip install came-pytorch")
        draft.assume("optimizer.args", {"betas": [0.9, 0.999, 0.9999], "eps": [1e-30, 1e-16]}, "their numbers for it")
        for key in ("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon"):
            if key in theirs:
                draft.drop(key, theirs.take(key), "CAME has its own numbers.")
    else:
        eight = theirs.flag("use_8bit_adam")
        if eight:
            draft.set("optimizer.kind", "adamw8bit", "use_8bit_adam", theirs=True)
        else:
            draft.assume("optimizer.kind", "adamw", "theirs without use_8bit_adam")
        if {"adam_beta1", "adam_beta2"} & set(theirs.given):
            betas = [theirs.number("adam_beta1", 0.9), theirs.number("adam_beta2", 0.999)]
            settings["betas"] = (betas, "adam_beta1, adam_beta2")
        settings["weight_decay"] = (theirs.number("adam_weight_decay"), "adam_weight_decay")
        settings["eps"] = (theirs.number("adam_epsilon"), "adam_epsilon")
    for key, (value, of) in settings.items():
        if value is not None:
            draft.set(f"optimizer.{key}", value, of)
    critic = theirs.number("learning_rate_critic")
    if distils:
        _put_critic(draft, critic, (1e-4 if rate is None else rate))
    elif critic is not None:
        draft.drop("learning_rate_critic", critic, "train_lora.py has no critic.")


def _put_critic(draft: Draft, rate: float | None, student: float) -> None:
    """The critic's own rate; all else as the student's."""
    whole = draft.config()["optimizer"]
    usual = 1e-4 if rate is None else rate
    for key, value in {**whole, "lr": usual}.items():
        if key == "lr" and rate is not None:
            draft.set(
                "roles.critic.optimizer.lr", value, "learning_rate_critic", "a curve of its own, by the run's schedule"
            )
        else:
            why = "their default learning_rate_critic" if key == "lr" else "as the student's"
            draft.assume(f"roles.critic.optimizer.{key}", value, why)
    if usual < student:
        draft.warn(
            f"learning_rate_critic {usual:g} is below learning_rate {student:g}: a critic that is a LoRA falls behind. "
            "Weft's guide to distillation takes four times the student's."
        )


def _put_schedule(theirs: Theirs, draft: Draft) -> None:
    steps, epochs = theirs.whole("max_train_steps"), theirs.whole("num_train_epochs")
    if steps is not None:
        draft.set("schedule.steps", steps, "max_train_steps")
        if epochs is not None:
            draft.drop("num_train_epochs", epochs, "max_train_steps stands in its place, in theirs too.")
    elif epochs is not None:
        draft.set("schedule.epochs", epochs, "num_train_epochs")
    else:
        draft.assume("schedule.epochs", 100, "their default")
    name = theirs.choice("lr_scheduler", [*CURVES], "constant")
    if "lr_scheduler" in theirs:
        draft.set("schedule.curve", CURVES[name][0], "lr_scheduler", CURVES[name][1], name)
    if name == "constant":
        if "lr_warmup_steps" in theirs:
            draft.drop("lr_warmup_steps", theirs.take("lr_warmup_steps"), "lr_scheduler constant has no warm-up.")
    elif "lr_warmup_steps" in theirs:
        put_warmup(theirs, draft, steps, name)
    elif steps is None or steps > USUAL_WARMUP:
        draft.assume("schedule.warmup", USUAL_WARMUP, "their default lr_warmup_steps")
    else:
        draft.warn(f"lr_warmup_steps is not given, and their default {USUAL_WARMUP} outlasts the run. Here: none.")


def _put_rest(theirs: Theirs, draft: Draft) -> None:
    """The sections `engine`, `save`, `track` and `samples`."""
    if "mixed_precision" in theirs:
        put_precision(theirs, draft)
    if theirs.flag("gradient_checkpointing"):
        draft.set("engine.recompute", True, "gradient_checkpointing")
    every = theirs.whole("checkpointing_steps")
    if every is None:
        draft.assume("save.every", 500, "their default checkpointing_steps")
    else:
        draft.set("save.every", every, "checkpointing_steps")
    if (keep := theirs.whole("checkpoints_total_limit")) is not None:
        draft.set("save.keep", max(1, keep), "checkpoints_total_limit", theirs=keep)
        draft.set("save.prune_adapters", True, "checkpoints_total_limit", "older adapters are deleted too", keep)
    put_trackers(theirs, draft, "report_to")
    prompts, images = theirs.texts("validation_prompts"), theirs.texts("validation_paths")
    if not prompts:
        for key in ("validation_paths", "validation_steps"):
            if key in theirs:
                draft.drop(key, theirs.take(key), "There is no validation_prompts, so nothing is sampled.")
        return
    if images and len(images) != len(prompts):
        raise ConfigError(
            f"{theirs.place('validation_paths')}: there are {len(images)} validation_paths and {len(prompts)} "
            "validation_prompts. Each prompt has one."
        )
    paired = zip(prompts, images, strict=True) if images else ()
    items: list[Any] = [{"text": text, "image": image} for text, image in paired] or list(prompts)
    of = "validation_prompts, validation_paths" if images else "validation_prompts"
    draft.set("samples.prompts", items, of, theirs=prompts)
    every = theirs.whole("validation_steps")
    if every is None:
        draft.assume("samples.every", 2000, "their default validation_steps")
    else:
        draft.set("samples.every", every, "validation_steps")
    side = theirs.whole("video_sample_size", 512) or 512
    draft.assume("samples.width", side // 32 * 32, "video_sample_size, a square")
    draft.assume("samples.height", side // 32 * 32, "video_sample_size, a square")
    draft.assume("samples.frames", ((theirs.whole("video_sample_n_frames", 17) or 17) - 1) // 4 * 4 + 1, "of a clip")
