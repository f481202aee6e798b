"""VeOmni's YAML (veomni/arguments, configs/dit, configs/text), in the names of both its generations."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from weft.errors import ConfigError
from weft.importers.draft import Draft, Note, ReadFile
from weft.importers.nested import (
    PRECISIONS,
    dotted,
    leave,
    lora_in_place_of_full,
    only_known,
    put_folder,
    put_source,
    run_name,
    settle,
    warmup_steps,
)
from weft.importers.values import Given, Same, Theirs, carry
from weft.importers.veomni_data import put_clips, put_texts
from weft.importers.veomni_keys import OLDER, REASONS, SECTIONS, WHOLE
from weft.importers.writing import FILL_IN

PROGRAM = "VeOmni"
LORA = "model.lora_config."
NEWER = {f"{LORA}r": f"{LORA}rank", f"{LORA}lora_alpha": f"{LORA}alpha", f"{LORA}target_modules": f"{LORA}lora_modules"}
REFUSED = ("flux", "ltx", "qwen_image", "qwen-image", "seedvr", "minimax", "hunyuan_image", "stable-diffusion")
MULTIMODAL = ("-vl", "_vl", "omni", "janus", "bagel")
BETAS = [0.9, 0.95]  # veomni/optim/optimizer.py
ATTENTION: Mapping[str, str] = {
    "eager": "eager", "sdpa": "sdpa", "flash_attention_2": "flash", "flash_attention_3": "flash",
    "flash_attention_4": "flash", "native-sparse": "auto",
}  # fmt: skip
OF_VIDEO = {"eager": "math", "sdpa": "native", "flash": "flash", "auto": "auto"}
KERNELS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "cross_entropy_loss": ("cross_entropy", {"eager": "eager", "liger_kernel": "liger"}),
    "rms_norm": ("rms_norm", {"eager": "eager", "liger_kernel": "liger"}),
    "swiglu_mlp": ("mlp", {"eager": "eager", "liger_kernel": "liger"}),
    "rotary_pos_emb": ("rotary", {"eager": "eager", "liger_kernel": "liger"}),
}


class VeOmni:
    """A file with model, data and train."""

    name = PROGRAM

    def recognises(self, file: ReadFile) -> float:
        """1 where its own keys stand in its three sections."""
        if file.kind not in ("yaml", "json") or not isinstance(file.content, dict):
            return 0.0
        if not all(isinstance(file.content.get(section), dict) for section in ("model", "data", "train")):
            return 0.0
        model, data = file.content["model"], file.content["data"]
        named = {"model_path", "config_path", "lora_config", "condition_model_path"} & model.keys()
        return 1.0 if named and "train_path" in data else 0.4

    def read(self, files: Sequence[ReadFile], draft: Draft) -> None:
        """Put one config into the draft. Raises ConfigError."""
        if len(files) != 1:
            raise ConfigError(f"{files[1].path}: {PROGRAM} keeps a run in one file. Import one after the other.")
        file = files[0]
        if not isinstance(file.content, dict):
            raise ConfigError(f"{file.path}: a config of {PROGRAM} has the sections {', '.join(SECTIONS)}.")
        older: dict[str, str] = {}
        theirs = _renamed(dotted(file, PROGRAM, sections=SECTIONS, whole=WHOLE), older)
        _refuse(file, theirs)
        kind = _model(file, theirs, draft)
        _run(file, theirs, draft)
        _adapter(theirs, draft, kind)
        steps = put_texts(theirs, draft) if kind == "causal-lm" else put_clips(theirs, draft)
        _parallel(theirs, draft)
        _optimizer(theirs, draft)
        _schedule(theirs, draft, steps)
        leave(theirs, draft, REASONS, ())
        draft.notes = [_in_older_names(note, older) for note in draft.notes]


def _renamed(theirs: Theirs, older: dict[str, str]) -> Theirs:
    """Older names as those of today; a newer one that stands beside an older goes before it.

    older: takes each newer name for which the file has an older one.
    """
    given: dict[str, Given] = {}
    for key, value in theirs.given.items():
        newer = OLDER.get(key, NEWER.get(key, key))
        if newer == key or newer not in theirs.given:
            given[newer] = value
            if newer != key:
                older[newer] = key
    return Theirs(given, PROGRAM)


def _in_older_names(note: Note, older: Mapping[str, str]) -> Note:
    """A note that names keys as the file does."""
    return replace(note, of=re.sub(r"[\w.]+", lambda name: older.get(name[0], name[0]), note.of))


def _refuse(file: ReadFile, theirs: Theirs) -> None:
    """What Weft does not train."""
    kind = theirs.text("data.data_type") or ""
    if kind == "dpo" or "dpo_config" in file.content:
        where = file.place("dpo_config") if "dpo_config" in file.content else theirs.place("data.data_type")
        raise ConfigError(f"{where}: this trains on preferences (DPO), which Weft does not have yet.")
    if kind in ("classification", "rl", "grpo"):
        raise ConfigError(f"{theirs.place('data.data_type')}: '{kind}' has no equivalent; Weft learns the next token.")


# ---- The model ------------------------------------------------------------------------------------------------------


def _model(file: ReadFile, theirs: Theirs, draft: Draft) -> str:
    """Put the family; its kind."""
    encoders, path = theirs.text("model.condition_model_path"), theirs.text("model.model_path")
    config = theirs.text("model.config_path")
    of = "model.condition_model_path" if encoders else "model.model_path"
    named = encoders or path or ""
    told = f"{encoders or ''} {path or ''} {config or ''}".lower()
    where = theirs.place(of) if of in theirs else str(file.path)
    for word in (*REFUSED, *MULTIMODAL):
        if word in told:
            raise ConfigError(f"{where}: '{named or config}': Weft trains Wan, HunyuanVideo and models of text alone.")
    kind = "wan" if "wan" in told.replace("wand", "") else "hunyuan-video" if "hunyuan" in told else "causal-lm"
    if kind == "causal-lm" and (encoders or theirs.text("data.data_type") == "diffusion"):
        raise ConfigError(f"{where}: '{named}' is no Wan or HunyuanVideo by its name. Name it with --model and rename.")
    draft.set("family.kind", kind, of, theirs=named or config)
    if named:
        folder = named.removesuffix("/").removesuffix("/transformer") if kind != "causal-lm" else named
        put_source(draft, folder, of)
    elif draft.model:
        put_source(draft, config or "", "model.config_path")
    else:
        draft.ask("family.source", f"{FILL_IN}-folder", "There weights begin at random; Weft needs a model's folder.")
    if kind == "wan" and "a14b" in told.replace("-", ""):
        draft.ask("family.expert", "both", "The model has two networks: high, low or both.")
    _kernels(theirs, draft, kind)
    return kind


def _kernels(theirs: Theirs, draft: Draft, kind: str) -> None:
    at = "model.ops_implementation."
    if told := theirs.text(f"{at}attn_implementation"):
        ours = only_known(theirs, draft, f"{at}attn_implementation", ATTENTION, "auto")
        key = "family.kernels.attention" if kind == "causal-lm" else "family.attention"
        ours = ours if kind == "causal-lm" else OF_VIDEO[ours]
        note = "It needs the extra 'flash'; auto is torch's own." if ours == "flash" else ""
        draft.set(key, ours, f"{at}attn_implementation", theirs=told, note=note)
    for name, (ours, words) in KERNELS.items():
        of = f"{at}{name}_implementation"
        told = theirs.text(of)
        if told is None:
            continue
        if kind != "causal-lm":
            draft.drop(of, told, "Kernels to choose are those of language models; Wan's are diffusers' own.")
        else:
            word = only_known(theirs, draft, of, words, "auto")
            draft.set(f"family.kernels.{ours}", word, of, theirs=told,
                      note="It needs the extra 'liger'." if word == "liger" else "")  # fmt: skip


def _run(file: ReadFile, theirs: Theirs, draft: Draft) -> None:
    folder = theirs.text("train.checkpoint.output_dir")
    name = theirs.text("train.wandb.name")
    if folder:
        put_folder(draft, folder, "train.checkpoint.output_dir")
    else:
        draft.assume("name", run_name(name or file.path.stem), f"{PROGRAM} names no run.")
    settle(theirs, draft, "train.seed", "seed", theirs.whole("train.seed", 42))
    if theirs.flag("train.wandb.enable"):
        draft.set("track.to", ["wandb"], "train.wandb.enable", theirs=True)
        settle(theirs, draft, "train.wandb.project", "track.project", theirs.text("train.wandb.project", "VeOmni"))
    theirs.take("train.wandb.project")
    load = theirs.text("train.checkpoint.load_path")
    if load == "auto":
        draft.set("resume", "auto", "train.checkpoint.load_path", note="The newest whole checkpoint of the run.")
    elif load:
        why = f"A checkpoint of {PROGRAM} is no run of Weft's. Start from its adapter: adapter.start_from."
        draft.drop("train.checkpoint.load_path", load, why)


# ---- The adapter ----------------------------------------------------------------------------------------------------


def _adapter(theirs: Theirs, draft: Draft, kind: str) -> None:
    theirs.take("train.train_architecture")
    if not any(key.startswith(LORA) for key in theirs.given):
        lora_in_place_of_full(draft, "model.lora_config", "not given")
        draft.assume("adapter.targets", "all" if kind == "causal-lm" else "attention+ffn", "Every linear layer.")
        return
    draft.assume("adapter.kind", "lora", "As lora_config says.")
    rank, alpha = theirs.whole(f"{LORA}rank", 8) or 8, theirs.number(f"{LORA}alpha", 8) or 8
    settle(theirs, draft, f"{LORA}rank", "adapter.rank", rank)
    settle(theirs, draft, f"{LORA}alpha", "adapter.alpha", alpha)
    if f"{LORA}alpha" not in theirs and rank != 8:
        draft.warn(f"{LORA}alpha is not given, and {PROGRAM} takes 8: at rank {rank} the scale is {8 / rank:g}.")
    _targets(theirs, draft)
    if theirs.flag(f"{LORA}use_rslora"):
        draft.set("adapter.rslora", True, f"{LORA}use_rslora")
    carry(theirs, draft, [
        Same(f"{LORA}lora_dropout", "adapter.input_dropout", "number", "On the input of A."),
        Same(f"{LORA}exclude_modules", "adapter.exclude", "texts", "One that matches nothing is an error here."),
        Same(f"{LORA}lora_adapter", "adapter.start_from", "text", "A folder as PEFT writes it."),
    ])  # fmt: skip
    if theirs.text(f"{LORA}bias") not in (None, "none"):
        draft.drop(f"{LORA}bias", theirs.text(f"{LORA}bias"), "Weft's LoRA trains no biases.")


def _targets(theirs: Theirs, draft: Draft) -> None:
    told: Any = theirs.take(f"{LORA}lora_modules")
    of = f"{LORA}lora_modules"
    if isinstance(told, str) and "," in told and not set(told) & set("*+?()[]|\\^$"):
        draft.set("adapter.targets", [name.strip() for name in told.split(",")], of, theirs=told)
    elif isinstance(told, str) and set(told) & set("*+?()[]|\\^$"):
        draft.set("adapter.targets", told, of, note="A regex on whole paths, there as here.")
    elif told:
        draft.set("adapter.targets", theirs.texts(of), of, theirs=told)
    else:
        raise ConfigError(f"{of} is missing, and {PROGRAM} asks for the names of layers.")


# ---- Processes ------------------------------------------------------------------------------------------------------


def _parallel(theirs: Theirs, draft: Draft) -> None:
    at = "train.accelerator."
    mode = theirs.text(f"{at}fsdp_config.fsdp_mode") or "fsdp2"
    replicas, shards = theirs.whole(f"{at}dp_replicate_size", -1) or -1, theirs.whole(f"{at}dp_shard_size", -1) or -1
    if mode == "ddp":
        draft.set("parallel.shard", 1, f"{at}fsdp_config.fsdp_mode", theirs=mode, note="Each has a whole copy.")
    else:
        note = "FSDP2, as all spreading of weights here." if mode == "fsdp1" else ""
        shard: Any = shards if shards > 0 else "auto"
        of = f"{at}dp_shard_size" if shards > 0 else f"{at}fsdp_config.fsdp_mode"
        settle(theirs, draft, of, "parallel.shard", shard, note=note, shown=shards if shards > 0 else mode)
        if replicas > 0:
            draft.set("parallel.data", replicas, f"{at}dp_replicate_size")
    ulysses, ring = theirs.whole(f"{at}ulysses_size", 1) or 1, theirs.whole(f"{at}cp_size", 1) or 1
    if ulysses * ring > 1:
        of = f"{at}ulysses_size" if ulysses >= ring else f"{at}cp_size"
        note = "Ulysses and ring together are one here." if min(ulysses, ring) > 1 else ""
        draft.set("parallel.sequence", ulysses * ring, of, note=note)
        method = "ulysses" if ring == 1 else "ring" if ulysses == 1 else "auto"
        draft.assume("parallel.sequence_method", method, "By which of ulysses_size and cp_size is above 1.")
    for name, what in (("tp_size", "tensors"), ("pp_size", "layers"), ("ep_size", "experts")):
        if (count := theirs.whole(f"{at}{name}", 1) or 1) > 1:
            draft.drop(f"{at}{name}", count, f"Weft does not part {what}; it spreads weights: parallel.shard.")
            draft.warn(f"{at}{name} {count}: Weft does not part {what}, so look at the number of processes.")
    of = "train.broadcast_model_weights_from_rank0"
    broadcast = theirs.flag(of, True)
    settle(theirs, draft, of, "engine.read", "broadcast" if broadcast else "each", shown=broadcast)
    mixed = theirs.flag(f"{at}fsdp_config.mixed_precision.enable", True)
    dtype = theirs.text(f"{at}fsdp_config.mixed_precision.param_dtype") or "bfloat16"
    word = PRECISIONS.get(dtype, "bf16")
    note = "" if mixed else "Without mixed precision VeOmni's weights are bf16 throughout; Weft's adapter stays fp32."
    settle(theirs, draft, f"{at}fsdp_config.mixed_precision.enable", "engine.precision", word, note=note, shown=mixed)
    recompute = theirs.flag("train.gradient_checkpointing.enable", True)
    settle(theirs, draft, "train.gradient_checkpointing.enable", "engine.recompute", recompute)
    if theirs.flag(f"{at}offload.enable_activation"):
        if recompute:
            draft.set("engine.offload_inputs", True, f"{at}offload.enable_activation")
        else:
            draft.drop(f"{at}offload.enable_activation", True, "Weft offloads inputs of blocks that it recomputes.")
    if theirs.flag("train.checkpoint.save_async"):
        draft.set("save.background", True, "train.checkpoint.save_async")


# ---- How it learns --------------------------------------------------------------------------------------------------


def _optimizer(theirs: Theirs, draft: Draft) -> None:
    at = "train.optimizer."
    kind = theirs.choice(f"{at}type", ("adamw", "anyprecision_adamw", "muon"), "adamw")
    lr = theirs.number(f"{at}lr", 5e-5)
    decay = theirs.number(f"{at}weight_decay", 0.0)
    if kind == "muon":
        _muon(theirs, draft, lr or 5e-5)
        theirs.take(f"{at}weight_decay")
        return
    note = "Weft's adapters are fp32, so no more exact sums are needed." if kind == "anyprecision_adamw" else ""
    settle(theirs, draft, f"{at}type", "optimizer.kind", "adamw", note=note, shown=kind)
    settle(theirs, draft, f"{at}lr", "optimizer.lr", lr)
    settle(theirs, draft, f"{at}weight_decay", "optimizer.weight_decay", decay)
    draft.assume("optimizer.betas", BETAS, f"As {PROGRAM} makes AdamW.")


def _muon(theirs: Theirs, draft: Draft, lr: float) -> None:
    """torch.optim.Muon, of which theirs is a variation."""
    at = "train.optimizer.muon_"
    draft.set("optimizer.kind", "custom", "train.optimizer.type", theirs="muon", note="torch's own Muon, for matrices.")
    draft.set("optimizer.path", "torch.optim.Muon", "train.optimizer.type", theirs="muon")
    own = theirs.number(f"{at}lr")
    draft.set("optimizer.lr", own or lr, f"{at}lr" if own else "train.optimizer.lr")
    draft.set("optimizer.weight_decay", theirs.number(f"{at}weight_decay", 0.0), f"{at}weight_decay")
    arguments: dict[str, Any] = {
        "momentum": theirs.number(f"{at}momentum", 0.95),
        "nesterov": theirs.flag(f"{at}nesterov", True),
        "ns_steps": theirs.whole(f"{at}ns_steps", 5),
        "adjust_lr_fn": theirs.text(f"{at}adjust_lr_fn") or "match_rms_adamw",
    }
    draft.set("optimizer.args", arguments, f"{at}momentum, nesterov, ns_steps, adjust_lr_fn")
    for key in [key for key in theirs.left if key.startswith(at)]:
        draft.drop(key, theirs.take(key), "torch's Muon has no such argument, or the same value by itself.")


def _schedule(theirs: Theirs, draft: Draft, per_epoch: int | None) -> None:
    """per_epoch: steps of an epoch as VeOmni counts them, where they are known before the data is."""
    epochs = theirs.whole("train.num_train_epochs", 1) or 1
    most = theirs.whole("train.max_steps")
    steps = None
    if most or per_epoch:
        steps = min(value for value in (most, per_epoch) if value) * epochs
        of = "train.max_steps" if most and most <= (per_epoch or most) else "data.train_size"
        note = f"Of one epoch there, at most, and it has {epochs}." if epochs > 1 else "At most, there."
        draft.set("schedule.steps", steps, of, note=note, theirs=theirs.take(of))
    else:
        settle(theirs, draft, "train.num_train_epochs", "schedule.epochs", epochs)
    theirs.take("train.num_train_epochs")
    if batch := theirs.whole("train.global_batch_size"):
        note = "Rows on all processes together."
        draft.set("schedule.global_batch", batch, "train.global_batch_size", note=note)
    norm = theirs.number("train.optimizer.max_grad_norm", 1.0)
    settle(theirs, draft, "train.optimizer.max_grad_norm", "schedule.max_norm", norm)
    curve = theirs.choice("train.optimizer.lr_decay_style", ("constant", "linear", "cosine"), "constant")
    settle(theirs, draft, "train.optimizer.lr_decay_style", "schedule.curve", curve)
    least, lr = theirs.number("train.optimizer.lr_min", 1e-7) or 0.0, draft.get("optimizer.lr")
    if curve != "constant" and lr and 0 < least < lr:
        note = "As a share of lr."
        settle(theirs, draft, "train.optimizer.lr_min", "schedule.floor", float(f"{least / lr:.3g}"), note, shown=least)
    ratio = theirs.number("train.optimizer.lr_decay_ratio", 1.0)
    if ratio not in (None, 1.0):
        draft.drop("train.optimizer.lr_decay_ratio", ratio, "Weft's curve ends with the run.")
    warmup_steps(draft, theirs.number("train.optimizer.lr_warmup_ratio", 0.0), "train.optimizer.lr_warmup_ratio", steps)
    every = theirs.whole("train.checkpoint.save_steps", 0) or 0
    settle(theirs, draft, "train.checkpoint.save_steps", "save.every", every)
    settle(theirs, draft, "train.checkpoint.save_epochs", "save.every_epochs",
           theirs.number("train.checkpoint.save_epochs", 1))  # fmt: skip
    if measured := theirs.whole("train.eval_steps"):
        draft.set("validation.every", measured, "train.eval_steps")
