"""LLaMA-Factory's YAML (src/llamafactory/hparams) with the dataset_info.json and DeepSpeed file that it names."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from weft.errors import ConfigError
from weft.importers.draft import Draft, ReadFile
from weft.importers.llama_factory_command import as_config, starts
from weft.importers.llama_factory_data import put_data
from weft.importers.llama_factory_keys import REASONS, REFUSED_STAGES, SECRETS
from weft.importers.nested import (
    beside,
    dotted,
    leave,
    lora_in_place_of_full,
    mapping,
    only_known,
    popped,
    put_folder,
    put_source,
    run_name,
    settle,
    warmup_steps,
)
from weft.importers.reading import read
from weft.importers.values import Same, Theirs, carry

PROGRAM = "LLaMA-Factory"
ATTENTION = {"auto": "auto", "disabled": "eager", "sdpa": "sdpa", "fa2": "flash", "fa3": "flash"}
LIGER = ("cross_entropy", "rms_norm", "mlp", "rotary")
OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "adamw_8bit": "adamw8bit",
    "adamw_bnb_8bit": "adamw8bit", "paged_adamw_8bit": "adamw8bit", "paged_adamw_32bit": "adamw",
    "paged_adamw": "adamw", "adafactor": "transformers.optimization.Adafactor", "sgd": "torch.optim.SGD",
}  # fmt: skip
CURVES = {
    "linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
}  # fmt: skip
TRICKS = (
    "use_galore", "use_apollo", "use_badam", "use_muon", "use_adam_mini", "use_dft_loss", "use_asft_loss",
    "use_eaft_loss", "neftune_noise_alpha", "rope_scaling", "resize_vocab", "add_tokens", "shift_attn",
)  # fmt: skip


class LlamaFactory:
    """A flat file with model_name_or_path and stage."""

    name = PROGRAM

    def recognises(self, file: ReadFile) -> float:
        """1 where the model, the stage and the data are named in its words."""
        if starts(file):
            return 1.0
        if file.kind not in ("yaml", "json") or not isinstance(file.content, dict):
            return 0.0
        keys = file.content.keys()
        if "model_name_or_path" not in keys:
            return 0.0
        return min(1.0, 0.4 + 0.3 * len({"stage", "finetuning_type", "template", "dataset_dir", "cutoff_len"} & keys))

    def read(self, files: Sequence[ReadFile], draft: Draft) -> None:
        """Put one config into the draft, with the files beside it that it names. Raises ConfigError."""
        files = [as_config(file) for file in files]
        mains = [file for file in files if isinstance(file.content, dict) and "model_name_or_path" in file.content]
        if len(mains) != 1:
            where = mains[1].path if mains else files[0].path
            what = "a second config" if mains else f"no config of {PROGRAM}, for it names no model_name_or_path"
            raise ConfigError(f"{where}: this is {what}. Import one, with the files that it names.")
        main, others = mains[0], [file for file in files if file is not mains[0]]
        theirs = dotted(main, PROGRAM, whole=tuple(main.content))
        _refuse(theirs)
        _model(theirs, draft)
        _run(main, theirs, draft)
        _adapter(theirs, draft)
        put_data(theirs, draft, main, others)
        _optimizer(theirs, draft)
        _schedule(theirs, draft)
        _engine(theirs, draft, main, others)
        for key in TRICKS:
            if key in theirs and theirs.take(key):
                draft.drop(key, theirs.take(key), REASONS[key])
                draft.warn(f"{theirs.place(key)}: '{key}' changes what is learned there, and is left out here.")
        leave(theirs, draft, REASONS, (), SECRETS)


def _refuse(theirs: Theirs) -> None:
    stage = theirs.choice("stage", ("sft", "pt", *REFUSED_STAGES), "sft")
    if stage in REFUSED_STAGES:
        raise ConfigError(
            f"{theirs.place('stage')}: stage '{stage}' trains on {REFUSED_STAGES[stage]}, which Weft does not have "
            "yet. It imports sft and pt."
        )
    if theirs.text("export_dir"):
        raise ConfigError(
            f"{theirs.place('export_dir')}: this config merges an adapter and trains nothing. Weft does it by: weft "
            "merge ADAPTER --into BASE."
        )


def _model(theirs: Theirs, draft: Draft) -> None:
    named = theirs.text("model_name_or_path") or ""
    draft.assume("family.kind", "causal-lm", "LLaMA-Factory trains language models.")
    if any(word in named.lower() for word in ("-vl", "_vl", "llava", "omni")):
        raise ConfigError(f"{theirs.place('model_name_or_path')}: '{named}' sees pictures; Weft trains text alone.")
    put_source(draft, named, "model_name_or_path")
    bits = theirs.whole("quantization_bit")
    if bits:
        if bits not in (4, 8):
            draft.drop("quantization_bit", bits, "Weft's smallest weights have four bits.")
        note = "Of the blocks' linear layers, decoded for each multiplication."
        draft.set("family.dtype", "int8" if bits == 8 else "nf4", "quantization_bit", note=note, theirs=bits)
    if told := theirs.text("flash_attn"):
        ours = only_known(theirs, draft, "flash_attn", ATTENTION, "auto")
        note = "It needs the extra 'flash'; auto is torch's own." if ours == "flash" else ""
        draft.set("family.kernels.attention", ours, "flash_attn", theirs=told, note=note)
    of = "enable_liger_kernel" if theirs.flag("enable_liger_kernel") else "use_liger_kernel"
    if theirs.flag("use_liger_kernel") or of == "enable_liger_kernel":
        for kernel in LIGER:
            draft.set(f"family.kernels.{kernel}", "liger", of, theirs=True, note="It needs the extra 'liger'.")


def _run(main: ReadFile, theirs: Theirs, draft: Draft) -> None:
    if folder := theirs.text("output_dir"):
        put_folder(draft, folder, "output_dir")
    else:
        draft.assume("name", run_name(main.path.stem), "The config names no folder.")
    settle(theirs, draft, "seed", "seed", theirs.whole("seed", 42))
    told = [word for text in theirs.texts("report_to") for word in text.replace(",", " ").split()]
    known = [word for word in told if word in ("tensorboard", "wandb", "trackio")]
    if known:
        draft.set("track.to", known, "report_to", theirs=told)
        carry(theirs, draft, [Same("project", "track.project", "text")])
    for word in told:
        if word not in (*known, "none"):
            draft.drop("report_to", word, "Weft reports to TensorBoard, wandb and trackio, and keeps its own files.")
    theirs.take("project")
    again: Any = theirs.take("resume_from_checkpoint")
    if again is True or str(again).lower() == "true":
        draft.set("resume", "latest", "resume_from_checkpoint", theirs=True, note="The run must have a checkpoint.")
    elif again:
        why = f"A checkpoint of {PROGRAM} is no run of Weft's. Start from its adapter: adapter.start_from."
        draft.drop("resume_from_checkpoint", again, why)


# ---- The adapter ----------------------------------------------------------------------------------------------------


def _adapter(theirs: Theirs, draft: Draft) -> None:
    kind = theirs.choice("finetuning_type", ("lora", "oft", "freeze", "full"), "lora")
    start = theirs.text("adapter_name_or_path")
    if start and "," in start:
        draft.warn(f"adapter_name_or_path names several adapters; merge all but the last: weft merge. {start}")
        start = start.rpartition(",")[2].strip()
    if kind in ("freeze", "full"):
        lora_in_place_of_full(draft, "finetuning_type", kind)
        draft.assume("adapter.targets", "all", "Every linear layer of the blocks.")
        return
    settle(theirs, draft, "finetuning_type", "adapter.kind", kind)
    if start:
        draft.set("adapter.start_from", start, "adapter_name_or_path")
    of = f"{kind}_target"
    names = [name.strip() for text in theirs.texts(of) for name in text.split(",") if name.strip()] or ["all"]
    targets: Any = "all" if names == ["all"] else names
    settle(theirs, draft, of, "adapter.targets", targets)
    if kind == "oft":
        settle(theirs, draft, "oft_block_size", "adapter.block_size", theirs.whole("oft_block_size", 32))
        return
    _lora(theirs, draft)


def _lora(theirs: Theirs, draft: Draft) -> None:
    rank = theirs.whole("lora_rank", 8) or 8
    settle(theirs, draft, "lora_rank", "adapter.rank", rank)
    alpha = theirs.number("lora_alpha")
    if alpha:
        draft.set("adapter.alpha", alpha, "lora_alpha")
    else:
        draft.assume("adapter.alpha", 2 * rank, f"{PROGRAM}'s alpha is twice the rank when it is not given.")
    carry(theirs, draft, [
        Same("lora_dropout", "adapter.input_dropout", "number", "On the input of A."),
        Same("loraplus_lr_ratio", "adapter.lora_plus", "number"),
    ])  # fmt: skip
    for key, ours in (("use_rslora", "adapter.rslora"), ("use_dora", "adapter.dora")):
        if theirs.flag(key):
            draft.set(ours, True, key)
    if theirs.flag("pissa_init"):
        draft.set("adapter.init", "pissa", "pissa_init", theirs=True)
        rounds = theirs.whole("pissa_iter", 16)
        exact = rounds is None or rounds < 1
        note = "The exact decomposition." if exact else ""
        settle(theirs, draft, "pissa_iter", "adapter.pissa_iterations", None if exact else rounds, note, shown=rounds)
    theirs.take("pissa_iter")


# ---- How it learns --------------------------------------------------------------------------------------------------


def _optimizer(theirs: Theirs, draft: Draft) -> None:
    told = theirs.text("optim") or "adamw_torch"
    ours = OPTIMIZERS.get(told)
    if ours is None:
        draft.drop("optim", told, "Weft takes AdamW, its 8-bit form, or any class by its path: optimizer.path.")
        draft.assume("optimizer.kind", "adamw", f"In place of '{told}'.")
        ours = "adamw"
    else:
        settle(theirs, draft, "optim", "optimizer.kind", "custom" if "." in ours else ours, shown=told)
    if "." in ours:
        draft.set("optimizer.path", ours, "optim", theirs=told)
        if told == "adafactor":
            fixed = {"relative_step": False, "scale_parameter": False}
            draft.assume("optimizer.args", fixed, "As transformers' trainer makes it.")
    settle(theirs, draft, "learning_rate", "optimizer.lr", theirs.number("learning_rate", 5e-5))
    settle(theirs, draft, "weight_decay", "optimizer.weight_decay", theirs.number("weight_decay", 0.0))
    betas = [theirs.number("adam_beta1", 0.9), theirs.number("adam_beta2", 0.999)]
    eps = theirs.number("adam_epsilon", 1e-8)
    if "." not in ours:
        if "adam_beta1" in theirs or "adam_beta2" in theirs:
            draft.set("optimizer.betas", betas, "adam_beta1, adam_beta2")
        if "adam_epsilon" in theirs:
            draft.set("optimizer.eps", eps, "adam_epsilon")


def _schedule(theirs: Theirs, draft: Draft) -> None:
    steps = theirs.whole("max_steps", -1) or -1
    epochs = theirs.number("num_train_epochs", 3.0)
    if steps > 0:
        draft.set("schedule.steps", steps, "max_steps")
        if "num_train_epochs" in theirs:
            draft.drop("num_train_epochs", epochs, "max_steps stands above it, there as here.")
    else:
        settle(theirs, draft, "num_train_epochs", "schedule.epochs", epochs)
    of = "gradient_accumulation_steps"
    settle(theirs, draft, of, "schedule.accumulate", theirs.whole(of, 1))
    settle(theirs, draft, "max_grad_norm", "schedule.max_norm", theirs.number("max_grad_norm", 1.0))
    _curve(theirs, draft)
    warmup = theirs.number("warmup_steps", 0) or 0
    ratio = theirs.number("warmup_ratio", 0.0) or 0.0
    if warmup >= 1:
        if 0 < steps <= warmup:
            draft.warn(f"warmup_steps {warmup:g} is not below max_steps {steps}, so the run would only warm up.")
            warmup = steps - 1
        draft.set("schedule.warmup", int(warmup), "warmup_steps")
    elif warmup or ratio:
        of = "warmup_steps" if warmup else "warmup_ratio"
        warmup_steps(draft, warmup or ratio, of, steps if steps > 0 else None)
    _save(theirs, draft)


def _curve(theirs: Theirs, draft: Draft) -> None:
    told = theirs.text("lr_scheduler_type") or "linear"
    curve = CURVES.get(told)
    if curve is None:
        draft.drop("lr_scheduler_type", told, "Weft's curves are constant, linear and cosine; it is cosine here.")
        draft.assume("schedule.curve", "cosine", f"In place of '{told}'.")
    else:
        settle(theirs, draft, "lr_scheduler_type", "schedule.curve", curve, shown=told)
    of = "lr_scheduler_kwargs"
    options = mapping(theirs, of)
    lr = draft.get("optimizer.lr")
    if share := popped(theirs, of, options, "min_lr_rate"):
        draft.set("schedule.floor", share, f"{of}.min_lr_rate")
    elif lr and (least := popped(theirs, of, options, "min_lr")):
        draft.set("schedule.floor", float(f"{least / lr:.4g}"), f"{of}.min_lr", theirs=least)
    for key, value in options.items():
        draft.drop(f"lr_scheduler_kwargs.{key}", value, "Weft's curves end with the run.")


def _save(theirs: Theirs, draft: Draft) -> None:
    strategy = theirs.text("save_strategy") or "steps"
    every = theirs.number("save_steps", 500) or 500
    if strategy == "epoch":
        draft.set("save.every_epochs", 1, "save_strategy", theirs=strategy)
        draft.assume("save.every", 0, "Saved after epochs alone.")
    elif strategy in ("no", "best"):
        draft.set("save.every", 0, "save_strategy", theirs=strategy, note="Weft saves at the end.")
    elif every < 1:
        draft.drop("save_steps", every, "A share of the run's steps; Weft takes steps: save.every.")
    else:
        settle(theirs, draft, "save_steps", "save.every", int(every))
    carry(theirs, draft, [Same("save_total_limit", "save.keep", "whole", "Of checkpoints; adapters all stay.")])
    strategy = theirs.text("eval_strategy") or theirs.text("evaluation_strategy") or "no"
    measured = theirs.number("eval_steps")
    if strategy == "steps" and measured and measured >= 1:
        draft.set("validation.every", int(measured), "eval_steps")
    elif strategy == "epoch":
        draft.drop("eval_strategy", strategy, "Weft measures after steps: validation.every.")


# ---- Where it runs --------------------------------------------------------------------------------------------------


def _engine(theirs: Theirs, draft: Draft, main: ReadFile, others: Sequence[ReadFile]) -> None:
    half = next((key for key in ("bf16", "pure_bf16", "fp16") if theirs.flag(key)), None)
    for key in ("bf16", "pure_bf16", "fp16"):
        theirs.take(key)
    spread = _deepspeed(theirs, draft, main, others)
    if half:
        draft.set("engine.precision", half[-4:], half, theirs=True)
    off = theirs.flag("disable_gradient_checkpointing")
    kept = "gradient_checkpointing" if "gradient_checkpointing" in theirs else "disable_gradient_checkpointing"
    recompute = not off and theirs.flag("gradient_checkpointing", True)
    settle(theirs, draft, kept, "engine.recompute", recompute, shown=theirs.take(kept))
    if theirs.flag("use_unsloth_gc") and not spread and recompute:
        note = "Blocks' inputs wait in host memory."
        draft.set("engine.offload_inputs", True, "use_unsloth_gc", note=note)
    told = " ".join(theirs.texts("fsdp"))
    if told and not spread:
        note = "FSDP2 over all GPUs; which layers are wrapped follows from the model."
        draft.set("parallel.shard", "auto", "fsdp", theirs=told, note=note)


def _deepspeed(theirs: Theirs, draft: Draft, main: ReadFile, others: Sequence[ReadFile]) -> bool:
    """`engine` from a DeepSpeed config, which is a section or the path of a JSON file."""
    told: Any = theirs.take("deepspeed")
    if not told:
        return False
    settings = told if isinstance(told, dict) else _stage_file(str(told), main, others)
    zero: Any = settings.get("zero_optimization", {}) if isinstance(settings, Mapping) else None
    if zero is not None and not isinstance(zero, Mapping):
        raise theirs.refused("deepspeed", "a DeepSpeed config whose zero_optimization is a section")
    stage = zero.get("stage", 0) if zero is not None else next((int(d) for d in "0123" if f"z{d}" in str(told)), 2)
    if stage in (0, 1) or not isinstance(stage, int):
        why = f"ZeRO stage {stage} spreads no weights; Weft's own data parallelism does the same."
        draft.drop("deepspeed", told if isinstance(told, str) else json.dumps(told), why)
        return False
    note = "" if zero is not None else "By the file's name, for the file itself was not found."
    draft.set("engine.kind", "deepspeed", "deepspeed", theirs=told, note="It needs the extra 'deepspeed'.")
    draft.set("engine.zero", min(stage, 3), "deepspeed", theirs=told, note=note)
    for key, ours in (("offload_optimizer", "offload_optimizer"), ("offload_param", "offload_parameters")):
        away = (zero or {}).get(key)
        if isinstance(away, Mapping) and away.get("device") in ("cpu", "nvme"):
            if ours == "offload_parameters" and stage != 3:
                continue
            note = "In host memory, not on a disk." if away["device"] == "nvme" else ""
            draft.set(f"engine.{ours}", True, f"deepspeed: zero_optimization.{key}", note=note)
    return True


def _stage_file(named: str, main: ReadFile, others: Sequence[ReadFile]) -> Any:
    """A DeepSpeed file's content, among the files given or where it lies; None: it is not there."""
    for file in others:
        if file.path.name == named.replace("\\", "/").rpartition("/")[2]:
            return file.content
    found = beside(main.path, named)
    return read(found).content if found else None
