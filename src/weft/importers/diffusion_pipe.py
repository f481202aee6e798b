"""diffusion-pipe's TOML (examples/main_example.toml, train.py) with the dataset file that it names."""

import re
from collections.abc import Mapping, Sequence
from math import exp
from typing import Any

from weft.errors import ConfigError, did_you_mean
from weft.importers.diffusion_pipe_data import dataset_file, put_data, put_evaluated
from weft.importers.diffusion_pipe_keys import MODELS, REASONS, SECRETS, SECTIONS
from weft.importers.draft import Draft, ReadFile
from weft.importers.nested import (
    PRECISIONS,
    dotted,
    leave,
    lora_in_place_of_full,
    only_known,
    put_source,
    run_name,
    settle,
)
from weft.importers.values import Same, Theirs, carry

PROGRAM = "diffusion-pipe"
FULL_RANK = 1000  # a LoKr rank from which on people mean the whole matrix, as their example does with 1e6
BOUNDARIES = {"t2v": 0.875, "i2v": 0.9}  # docs/supported_models.md
COSINE_END = 1e-6  # the rate at which its cosine ends
# train.py: name -> ours. What is not there is a class of the package pytorch_optimizer.
OPTIMIZERS: Mapping[str, tuple[str, str]] = {
    "adamw": ("adamw", ""),
    "adamw_optimi": ("adamw", "Its sums with compensation are for bf16 weights; Weft's adapters are fp32."),
    "adamw8bit": ("adamw8bit", ""),
    "adamw8bitkahan": ("adamw8bit", "Its compensation is for bf16 weights; Weft's adapters are fp32."),
    "stableadamw": ("optimi.StableAdamW", ""),
    "sgd": ("torch.optim.SGD", ""),
    "offload": ("adamw", "Weft keeps the moments on the GPU; of an adapter they are small."),
}
INSIDE = ("automagic", "genericoptim")  # classes that only diffusion-pipe has
MISPLACED = ("min_t", "max_t", "shift", "flux_shift", "timestep_sample_method", "sigmoid_scale")


class DiffusionPipe:
    """A main file with [model] type, and the dataset file beside it."""

    name = PROGRAM

    def recognises(self, file: ReadFile) -> float:
        """1 for a main file, less for its dataset file."""
        if file.kind != "toml":
            return 0.0
        model = file.content.get("model")
        if isinstance(model, dict) and "type" in model:
            return 1.0 if {"dataset", "output_dir", "adapter", "epochs"} & file.content.keys() else 0.5
        folders = file.content.get("directory")
        first = folders[0] if isinstance(folders, list) and folders else None
        return 0.9 if isinstance(first, dict) and "path" in first else 0.0

    def read(self, files: Sequence[ReadFile], draft: Draft) -> None:
        """Put a main file and its dataset files into the draft. Raises ConfigError."""
        for file in files:
            if file.kind != "toml":
                raise ConfigError(f"{file.path}: {PROGRAM}'s configs are TOML, and this is none.")
        mains = [file for file in files if "model" in file.content]
        if not mains:
            raise ConfigError(
                f"{files[0].path}: this is {PROGRAM}'s dataset file. Name the main file too, the one with [model]."
            )
        if len(mains) > 1:
            raise ConfigError(f"{mains[1].path}: a second file with [model]. Import one after the other.")
        main, others = mains[0], [file for file in files if file is not mains[0]]
        theirs = dotted(main, PROGRAM, sections=SECTIONS, whole=("eval_datasets",))
        model = _model(theirs, draft, main)
        _run(theirs, draft, main)
        data = dataset_file(theirs.text("dataset"), main, others)
        sides = put_data(data, theirs, draft, theirs.text("dataset"))
        _times(theirs, draft, model, sides)
        _adapter(theirs, draft, model)
        _optimizer(theirs, draft)
        _schedule(theirs, draft)
        put_evaluated(theirs, draft, main, others)
        leave(theirs, draft, REASONS, (), SECRETS)


def _run(theirs: Theirs, draft: Draft, main: ReadFile) -> None:
    name = theirs.text("monitoring.wandb_run_name") or ""
    draft.assume("name", run_name(name or main.path.stem), "Runs there are named by the time at which they begin.")
    carry(theirs, draft, [Same("output_dir", "output", "text")])
    if theirs.flag("monitoring.enable_wandb"):
        draft.set("track.to", ["wandb"], "monitoring.enable_wandb", theirs=True)
        carry(theirs, draft, [Same("monitoring.wandb_tracker_name", "track.project", "text")])
    theirs.take("monitoring.wandb_tracker_name")


# ---- The model ------------------------------------------------------------------------------------------------------


def _model(theirs: Theirs, draft: Draft, main: ReadFile) -> str:
    """Put the family; what it is called here."""
    kind = theirs.text("model.type") or ""
    if kind not in ("wan", "hunyuan-video"):
        near = "" if kind in MODELS else f" {did_you_mean(kind, MODELS)}"
        where = theirs.place("model.type") if kind else f"{main.path}: [model] type"
        raise ConfigError(
            f"{where}: the model is '{kind}', and Weft trains Wan, HunyuanVideo and language models. Of {PROGRAM}'s "
            f"types it imports wan and hunyuan-video.{near}"
        )
    draft.set("family.kind", kind, "model.type")
    paths = {key: theirs.text(f"model.{key}") for key in ("ckpt_path", "transformer_path", "vae_path", "llm_path")}
    folder, network = paths["ckpt_path"], paths["transformer_path"]
    if not (folder or network):
        raise ConfigError(f"{main.path}: model.ckpt_path is missing, and {PROGRAM} asks for it.")
    put_source(draft, folder or network or "", "model.ckpt_path" if folder else "model.transformer_path")
    expert = _expert(theirs, draft, folder or "", network or "") if kind == "wan" else None
    if folder and network:
        part = expert if expert in ("high", "low") else "transformer"
        draft.set(f"family.files.{part}", network, "model.transformer_path")
    if paths["vae_path"]:
        draft.set("family.files.vae", paths["vae_path"], "model.vae_path")
    for key, part, words in (("llm_path", "text_encoder", "tokenizer"), ("clip_path", "text_encoder_2", "tokenizer_2")):
        if path := theirs.text(f"model.{key}"):
            draft.set(f"family.files.{part}", path, f"model.{key}")
            if kind == "hunyuan-video" and not path.endswith(".safetensors"):
                draft.assume(f"family.files.{words}", path, "It lies in the encoder's folder.")
    if "skyreels" in f"{folder}{network}".lower():
        draft.set("data.fps", 24, "model.ckpt_path", theirs=folder, note="SkyReels is Wan at 24 frames a second.")
    if kind == "hunyuan-video":
        carry(theirs, draft, [Same("model.guidance", "family.guidance", "number")])
    if told := theirs.text("model.dtype"):
        draft.set("engine.precision", only_known(theirs, draft, "model.dtype", PRECISIONS, "bf16"), "model.dtype",
                  theirs=told)  # fmt: skip
    if (weights := theirs.text("model.transformer_dtype")) and weights.startswith("float8"):
        note = "Of the blocks' linear layers, decoded for each multiplication."
        draft.set("family.dtype", "fp8", "model.transformer_dtype", theirs=weights, note=note)
    elif weights:
        word = PRECISIONS.get(weights)
        if word is None:
            draft.drop("model.transformer_dtype", weights, "Weft takes fp32, bf16, fp16, fp8, int8 and nf4.")
        else:
            draft.set("family.dtype", word, "model.transformer_dtype", theirs=weights)
    return kind


def _expert(theirs: Theirs, draft: Draft, folder: str, network: str) -> str | None:
    """Which network of Wan 2.2 A14B is trained; None for models of one."""
    if found := re.search(r"(high|low)[ _-]?noise", network.lower()):
        draft.set("family.expert", found[1], "model.transformer_path", theirs=network)
        return found[1]
    if "a14b" not in f"{folder}{network}".lower():
        return None
    low, high = _range(theirs)
    if (low, high) == (0.0, 1.0):
        draft.ask("family.expert", "low", "Nothing says which of the two networks is trained: high or low.")
        return "low"
    expert = "low" if low < 0.5 else "high"
    draft.set("family.expert", expert, "model.min_t", theirs=[low, high], note="The range of times is that network's.")
    return expert


def _range(theirs: Theirs) -> tuple[float, float]:
    """min_t and max_t, from wherever they stand."""
    found = []
    for key, default in (("min_t", 0.0), ("max_t", 1.0)):
        places = [f"model.{key}", key, *(f"{section}.{key}" for section in SECTIONS)]
        of = next((place for place in places if place in theirs), f"model.{key}")
        found.append(float(theirs.number(of, default) or 0.0))
    return found[0], found[1]


# ---- Times ----------------------------------------------------------------------------------------------------------


def _times(theirs: Theirs, draft: Draft, kind: str, sides: Sequence[int]) -> None:
    """Density and range. utils/common.py: the density is shifted first and then cut, as ours is."""
    draft.assume("objective.kind", "flow-matching", "The loss of these models.")
    at = {key: _at(theirs, draft, key) for key in MISPLACED}
    method = theirs.choice(at["timestep_sample_method"], ("logit_normal", "uniform"), "logit_normal")
    of = at["timestep_sample_method"]
    scale = theirs.number(at["sigmoid_scale"], 1.0) if method == "logit_normal" else None
    theirs.take(at["sigmoid_scale"])
    shift = theirs.number(at["shift"])
    if not shift and theirs.flag(at["flux_shift"]):
        side = max(sides or [512])
        tokens = (side // 16) ** 2
        shift = round(exp(0.5 + 0.65 * (tokens - 256) / (4096 - 256)), 3)
        note = f"There it follows from each picture's size; here it is that of {side} x {side}, for all."
        draft.set("objective.timesteps", {"kind": "shift", "shift": shift, "scale": scale}, at["flux_shift"],
                  theirs=True, note=note)  # fmt: skip
    elif shift:
        theirs.take(at["flux_shift"])
        draft.set("objective.timesteps", {"kind": "shift", "shift": shift, "scale": scale}, at["shift"], theirs=shift)
    elif scale is None:
        draft.set("objective.timesteps.kind", "uniform", of)
    else:
        settle(theirs, draft, of, "objective.timesteps.kind", "sigmoid", shown=method)
        if scale != 1:
            draft.set("objective.timesteps.scale", scale, at["sigmoid_scale"])
    _put_range(theirs, draft, at)


def _at(theirs: Theirs, draft: Draft, key: str) -> str:
    """Where a key of [model] stands; of one that stands elsewhere diffusion-pipe takes no notice (its issue 355)."""
    right = f"model.{key}"
    wrong = [place for place in (key, *(f"{s}.{key}" for s in SECTIONS if s != "model")) if place in theirs]
    if right in theirs or not wrong:
        for place in wrong:
            draft.drop(place, theirs.take(place), f"{right} stands in its place, and {PROGRAM} reads only that.")
        return right
    draft.warn(
        f"{theirs.place(wrong[0])}: '{key}' belongs under [model]; {PROGRAM} does not read it here, so it trained "
        "without it. It was brought along as it was meant."
    )
    return wrong[0]


def _put_range(theirs: Theirs, draft: Draft, at: Mapping[str, str]) -> None:
    low, high = _range(theirs)
    of = at["min_t"] if at["min_t"] in theirs else at["max_t"]
    given = of in theirs
    if low > high:
        draft.warn(f"{theirs.place(of)}: min_t {low:g} is above max_t {high:g}; they were exchanged.")
        low, high = high, low
    expert = draft.get("family.expert")
    if expert is None:
        if given:
            draft.set("objective.times", [low, high], of, theirs=f"{low:g} to {high:g}")
        return
    if not given:
        draft.warn(
            f"{PROGRAM} trains the {expert}-noise network at all times here, for min_t and max_t are not given. Weft "
            "trains it in its own part, as it is sampled."
        )
        return
    edge, other = (high, low) if expert == "low" else (low, 1 - high)
    if 0 < edge < 1:
        model = f"{draft.get('family.source')} {draft.get(f'family.files.{expert}', '')}".lower()
        own = next((value for task, value in BOUNDARIES.items() if task in model), None)
        if edge == own:
            draft.drop(of, f"{low:g} to {high:g}", "This network's own part, which Weft takes by itself.")
        else:
            draft.set("family.boundary", edge, of, theirs=f"{low:g} to {high:g}")
    if other > 0:
        draft.set("objective.times", [low, high], of, theirs=f"{low:g} to {high:g}")


# ---- The adapter ----------------------------------------------------------------------------------------------------


def _adapter(theirs: Theirs, draft: Draft, model: str) -> None:
    every = "all-linear" if model == "hunyuan-video" else "attention+ffn"
    draft.assume("adapter.targets", every, f"{PROGRAM} adapts every linear layer of the blocks.")
    if not any(key.startswith("adapter.") for key in theirs.given):
        lora_in_place_of_full(draft, "[adapter]", "not given")
        return
    kind = theirs.choice("adapter.type", ("lora", "lokr"), "lora")
    settle(theirs, draft, "adapter.type", "adapter.kind", kind)
    rank = theirs.whole("adapter.rank")
    if rank is None:
        raise ConfigError(f"adapter.rank is missing, and {PROGRAM} asks for it.")
    note = "The second factor is then whole." if kind == "lokr" and rank >= FULL_RANK else ""
    draft.set("adapter.rank", rank, "adapter.rank", note=note or "alpha is the rank, there as here.")
    if kind == "lokr":
        factor = theirs.whole("adapter.decompose_factor", -1)
        settle(theirs, draft, "adapter.decompose_factor", "adapter.factor", factor)
    elif dropout := theirs.number("adapter.dropout"):
        draft.set("adapter.input_dropout", dropout, "adapter.dropout", note="On the input of A.")
    if without := theirs.texts("adapter.exclude_modules"):
        draft.set("adapter.exclude", without, "adapter.exclude_modules", note="One that matches nothing is an error.")
    start = theirs.text("adapter.init_from_existing")
    if start:
        draft.set("adapter.start_from", start, "adapter.init_from_existing", note="A folder or a file of an adapter.")


def _optimizer(theirs: Theirs, draft: Draft) -> None:
    told = theirs.text("optimizer.type")
    if told is None:
        raise ConfigError(f"optimizer.type is missing, and {PROGRAM} asks for it.")
    lower = told.lower()
    ours, note = OPTIMIZERS.get(lower, (f"pytorch_optimizer.{told}", "Of the package pytorch_optimizer, as there."))
    if lower in INSIDE:
        ours, note = "adamw", "Its class is a part of diffusion-pipe."
        draft.warn(f"{theirs.place('optimizer.type')}: '{told}' is replaced by AdamW; look at the learning rate.")
    kind = "custom" if "." in ours else ours
    draft.set("optimizer.kind", kind, "optimizer.type", theirs=told, note=note)
    fixed = theirs.number("force_constant_lr")
    of = "force_constant_lr" if fixed else "optimizer.lr"
    lr = fixed or theirs.number("optimizer.lr")
    theirs.take("optimizer.lr")
    if lr:
        draft.set("optimizer.lr", lr, of)
    elif kind != "custom":
        draft.assume("optimizer.lr", 1e-3, "torch's own value for AdamW, for optimizer.lr does not stand there.")
    if theirs.take("optimizer.weight_decay") is not None:
        draft.set("optimizer.weight_decay", theirs.number("optimizer.weight_decay"), "optimizer.weight_decay")
    if kind != "custom":
        if betas := theirs.numbers("optimizer.betas"):
            draft.set("optimizer.betas", betas, "optimizer.betas")
        carry(theirs, draft, [Same("optimizer.eps", "optimizer.eps", "number")])
        return
    draft.set("optimizer.path", ours, "optimizer.type", theirs=told)
    arguments: dict[str, Any] = {}
    for key in [key for key in theirs.left if key.startswith("optimizer.") and key not in REASONS]:
        arguments[key.partition(".")[2]] = theirs.take(key)
    if arguments:
        draft.set("optimizer.args", arguments, f"optimizer.{', optimizer.'.join(arguments)}")


# ---- The schedule ---------------------------------------------------------------------------------------------------


def _schedule(theirs: Theirs, draft: Draft) -> None:
    steps, epochs = theirs.whole("max_steps"), theirs.number("epochs")
    if steps:
        draft.set("schedule.steps", steps, "max_steps")
        if epochs:
            draft.drop("epochs", epochs, "max_steps ends the run; Weft takes one of the two.")
    elif epochs:
        draft.set("schedule.epochs", epochs, "epochs")
    else:
        raise ConfigError(f"epochs is missing, and {PROGRAM} asks for it.")
    accumulate = theirs.whole("gradient_accumulation_steps", 1)
    settle(theirs, draft, "gradient_accumulation_steps", "schedule.accumulate", accumulate)
    settle(theirs, draft, "gradient_clipping", "schedule.max_norm", theirs.number("gradient_clipping", 1.0))
    if warmup := theirs.whole("warmup_steps"):
        if steps and warmup >= steps:
            draft.warn(f"warmup_steps {warmup} is not below max_steps {steps}, so the run would only warm up.")
            warmup = steps - 1
        draft.set("schedule.warmup", warmup, "warmup_steps")
    curve = theirs.choice("lr_scheduler", ("constant", "linear", "cosine"), "constant")
    if theirs.number("force_constant_lr") and curve != "constant":
        draft.drop("lr_scheduler", curve, "force_constant_lr stands above it.")
        curve = "constant"
        draft.assume("schedule.curve", curve, "As force_constant_lr says.")
    else:
        settle(theirs, draft, "lr_scheduler", "schedule.curve", curve)
    lr = draft.get("optimizer.lr")
    if curve == "cosine" and lr:
        draft.assume("schedule.floor", min(1.0, round(COSINE_END / lr, 6)), "Its cosine ends at a rate of 1e-6.")
    _memory(theirs, draft)
    _save(theirs, draft)


def _memory(theirs: Theirs, draft: Draft) -> None:
    recompute = theirs.take("activation_checkpointing", False)
    swapped = theirs.whole("blocks_to_swap", 0) or 0
    of = "activation_checkpointing"
    if isinstance(recompute, str) and recompute == "unsloth":
        draft.set("engine.offload_inputs", True, of, theirs=recompute, note="Blocks' inputs wait in host memory.")
    if recompute or not swapped:
        settle(theirs, draft, of, "engine.recompute", bool(recompute), shown=recompute)
    else:
        draft.assume("engine.recompute", True, "Weft streams blocks only where it recomputes them.")
    if swapped:
        draft.set("engine.stream_blocks", swapped, "blocks_to_swap", note="Frozen weights; adapters never move.")
    stages = theirs.whole("pipeline_stages", 1) or 1
    if stages > 1:
        note = (
            f"The weights lie on {stages} GPUs, and each trains on other clips, so a step sees {stages} times as many."
        )
        draft.set("parallel.shard", stages, "pipeline_stages", note=note)
        draft.warn(
            f"pipeline_stages {stages}: a GPU there has some of the blocks, and all see one batch; here each has a "
            f"part of every weight and its own batch. Divide schedule.accumulate by {stages} to keep the batch."
        )
        if swapped:
            draft.warn("engine.stream_blocks is for weights that one GPU holds whole; take it or parallel.shard out.")


def _save(theirs: Theirs, draft: Draft) -> None:
    if every := theirs.whole("save_every_n_steps"):
        draft.set("save.every", every, "save_every_n_steps")
    elif examples := theirs.whole("save_every_n_examples"):
        batch = (draft.get("data.batch_size") or 1) * (draft.get("schedule.accumulate") or 1)
        note = f"On one GPU, by a batch of {batch}."
        draft.set("save.every", max(1, examples // batch), "save_every_n_examples", theirs=examples, note=note)
    if epochs := theirs.whole("save_every_n_epochs"):
        draft.set("save.every_epochs", epochs, "save_every_n_epochs")
        if not draft.has("save.every") and not theirs.take("checkpoint_every_n_minutes"):
            draft.assume("save.every", 0, "Saved after epochs alone.")
    if "checkpoint_every_n_minutes" in theirs:
        why = "Weft's checkpoints hold adapter and state together: save.every, in steps."
        draft.drop("checkpoint_every_n_minutes", theirs.take("checkpoint_every_n_minutes"), why)
