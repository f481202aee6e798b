"""ai-toolkit's job files (config_modules.py, BaseSDTrainProcess.py) as configs of ours."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from weft.errors import ConfigError, did_you_mean
from weft.importers.ai_toolkit_data import put_data
from weft.importers.ai_toolkit_keys import ALL_ARCHS, ARCHS, REASONS, SECTIONS, TRAINERS, WHOLE, Arch
from weft.importers.ai_toolkit_learning import put_learning
from weft.importers.ai_toolkit_samples import put_samples
from weft.importers.draft import Draft, ReadFile
from weft.importers.nested import (
    PRECISIONS,
    dotted,
    leave,
    lora_in_place_of_full,
    only_known,
    put_source,
    run_name,
)
from weft.importers.values import Same, Theirs, carry

PROGRAM = "ai-toolkit"
FULL_RANK = 100_000  # wider than any layer, so that LoKr's second factor is whole
HUNYUAN = Arch(kind="hunyuan-video", shift=7.0, blocks=60)


class AiToolkit:
    """`job: extension` with a process of type sd_trainer or diffusion_trainer."""

    name = PROGRAM

    def recognises(self, file: ReadFile) -> float:
        """1 for its frame of job, config and process."""
        if file.kind not in ("yaml", "json") or not isinstance(file.content, dict) or "job" not in file.content:
            return 0.0
        config = file.content.get("config")
        return 1.0 if isinstance(config, dict) and "process" in config else 0.5

    def read(self, files: Sequence[ReadFile], draft: Draft) -> None:
        """Put the first trainer of one job into the draft. Raises ConfigError."""
        if len(files) != 1:
            raise ConfigError(f"{files[1].path}: {PROGRAM} keeps a job in one file. Import one after the other.")
        named = _named(files[0], draft)
        number = _trainer(named, draft)
        path = ("config", "process", number)
        theirs = dotted(named, PROGRAM, *path, sections=SECTIONS, whole=(*WHOLE, "datasets"))
        _run(theirs, draft)
        arch = _model(theirs, draft)
        _network(theirs, draft, arch)
        trigger = theirs.text("trigger_word")
        put_data(named, path, theirs, draft, trigger)
        put_learning(theirs, draft, arch)
        put_samples(theirs, draft, arch, trigger)
        leave(theirs, draft, REASONS, theirs.given.keys() & set(SECTIONS))


def _named(file: ReadFile, draft: Draft) -> ReadFile:
    """The file with [name] put in, as ai-toolkit does before it reads on; the run's name."""
    content = file.content
    config = content.get("config") if isinstance(content, dict) else None
    if not isinstance(config, dict) or not isinstance(config.get("process"), list) or not config["process"]:
        raise ConfigError(f"{file.place('config')}: a job of {PROGRAM} has config.process, a list, and here is none.")
    job = content.get("job")
    if job not in ("extension", "train"):
        raise ConfigError(f"{file.place('job')}: 'job' is {job!r}. Weft imports training: job: extension.")
    name = config.get("name")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{file.place('config')}: config.name is missing, and {PROGRAM} asks for it.")
    draft.set("name", run_name(name), of="config.name", theirs=name)
    return replace(file, content=_tagged(content, name))


def _tagged(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {key: _tagged(inner, name) for key, inner in value.items()}
    if isinstance(value, list):
        return [_tagged(inner, name) for inner in value]
    return value.replace("[name]", name) if isinstance(value, str) else value


def _trainer(file: ReadFile, draft: Draft) -> int:
    """The place of the process that trains."""
    kinds = [item.get("type") if isinstance(item, dict) else None for item in file.content["config"]["process"]]
    fitting = [number for number, kind in enumerate(kinds) if kind in TRAINERS]
    if not fitting:
        place = file.place("config", "process", 0, "type")
        raise ConfigError(f"{place}: the process is a '{kinds[0]}', and Weft imports {', '.join(TRAINERS)}.")
    for number, kind in enumerate(kinds):
        if number != fitting[0]:
            draft.drop(f"process.{number}", str(kind), "One run is one training; import a file that has it alone.")
    return fitting[0]


def _run(theirs: Theirs, draft: Draft) -> None:
    theirs.take("type")
    if not theirs.flag("train.train_unet", True):
        raise theirs.refused("train.train_unet", "true, for Weft trains the transformer")
    theirs.take("name")
    device = theirs.text("device")
    if device and re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        draft.set("engine.device", device, of="device")
    carry(theirs, draft, [Same("training_folder", "output", "text"), Same("training_seed", "seed", "whole")])
    if theirs.flag("logging.use_wandb"):
        draft.set("track.to", ["wandb"], of="logging.use_wandb", theirs=True)
        carry(theirs, draft, [Same("logging.project_name", "track.project", "text")])
    theirs.take("logging.project_name")


# ---- The model ------------------------------------------------------------------------------------------------------


def _model(theirs: Theirs, draft: Draft) -> Arch:
    arch = _arch(theirs, draft)
    draft.set("family.kind", arch.kind, of="model.arch", theirs=theirs.take("model.arch"))
    model = theirs.text("model.name_or_path")
    if model is None:
        raise ConfigError(f"model.name_or_path is missing, and {PROGRAM} asks for it.")
    put_source(draft, model, of="model.name_or_path")
    for key in ("model.vae_path", "model.te_name_or_path", "model.extras_name_or_path"):
        if (value := theirs.text(key)) and value != model:
            draft.drop(key, value, "Parts that lie elsewhere are named under family.files, each by its folder or file.")
    _weights(theirs, draft, arch)
    high, low = (
        theirs.flag("model.model_kwargs.train_high_noise", True),
        theirs.flag("model.model_kwargs.train_low_noise", True),
    )
    if arch.two:
        if not (high or low):
            raise theirs.refused("model.model_kwargs.train_low_noise", "one of high and low noise at least")
        expert = "both" if high and low else "high" if high else "low"
        draft.set("family.expert", expert, of="model.model_kwargs", theirs=f"high {high}, low {low}".lower())
        if arch.image:
            draft.warn(
                "ai-toolkit parts the two networks of Wan 2.2 I2V at 0.875, as those of T2V. Weft parts them at the "
                "model's own 0.9; family.boundary: 0.875 would do as there."
            )
    return arch


def _arch(theirs: Theirs, draft: Draft) -> Arch:
    """What is trained. A tag behind a colon, such as wan22_14b:t2v, is their page's."""
    told, of = theirs.text("model.arch"), "model.arch"
    if told is None:
        for kind in ("flux", "xl", "v2", "v3", "pixart", "auraflow", "lumina2"):
            if theirs.take(f"model.is_{kind}"):
                told, of = kind, f"model.is_{kind}"
        told = told or "sd1"
    name = told.partition(":")[0]
    if name in ARCHS:
        return ARCHS[name]
    if name.replace("-", "_").startswith("hunyuan_video"):
        draft.warn(f"model.arch is '{told}', which ai-toolkit itself does not have; it was read as HunyuanVideo.")
        return HUNYUAN
    where = theirs.place(of) if of in theirs else "model.arch is not given"
    known = "" if name in ALL_ARCHS else f" {did_you_mean(name, list(ARCHS))}"
    raise ConfigError(
        f"{where}: the model is '{told}', and Weft trains Wan, HunyuanVideo and language models. Of {PROGRAM}'s it "
        f"imports {', '.join(ARCHS)}.{known}"
    )


def _weights(theirs: Theirs, draft: Draft, arch: Arch) -> None:
    """Precision and place of the frozen weights."""
    qtype = theirs.text("model.qtype") or "qfloat8"
    if theirs.flag("model.quantize"):
        plain, _, recovery = qtype.partition("|")
        ours = "fp8" if "float8" in plain else "int8" if "8" in plain else "nf4"
        note = "Weft's own decoding, of the blocks' linear layers."
        draft.set("family.dtype", ours, of="model.qtype", theirs=plain, note=note)
        if recovery:
            draft.drop("model.qtype", recovery, "Weft's nf4 base has no recovery adapter, which made it more exact.")
    if theirs.flag("model.low_vram") and arch.two:
        note = "The network that is not trained waits in host memory."
        draft.set("engine.experts", "one", of="model.low_vram", theirs=True, note=note)
    elif theirs.take("model.low_vram"):
        draft.drop("model.low_vram", True, "Weft encodes first, and keeps nothing but the transformer on the device.")
    share = theirs.number("model.layer_offloading_transformer_percent", 1.0) or 0.0
    if theirs.flag("model.layer_offloading") and share > 0:
        blocks = arch.blocks or (30 if "1.3b" in str(theirs.take("model.name_or_path")).lower() else 40)
        count = min(blocks - 1, max(3, round(share * blocks)))
        note = f"{share:.0%} of {blocks} blocks."
        draft.set("engine.stream_blocks", count, of="model.layer_offloading", theirs=True, note=note)
    if dtype := theirs.text("train.dtype"):
        precision = only_known(theirs, draft, "train.dtype", PRECISIONS, "bf16")
        draft.set("engine.precision", precision, of="train.dtype", theirs=dtype)
    if backend := theirs.text("train.attention_backend"):
        ours = "flash" if "flash" in backend else "native" if backend == "native" else "auto"
        draft.set("family.attention", ours, of="train.attention_backend", theirs=backend)


# ---- The adapter ----------------------------------------------------------------------------------------------------


def _network(theirs: Theirs, draft: Draft, arch: Arch) -> None:
    if not any(key.startswith("network.") for key in theirs.given):
        lora_in_place_of_full(draft, "network", None)
        draft.assume("adapter.targets", "attention+ffn", "The layers of the blocks.")
        return
    kind = (theirs.text("network.type") or "lora").lower()
    if kind not in ("lora", "locon", "dora", "lokr"):
        raise ConfigError(
            f"{theirs.place('network.type')}: the network is a '{kind}'. Weft imports lora, dora, locon and lokr."
        )
    draft.set("adapter.kind", "lokr" if kind == "lokr" else "lora", of="network.type", theirs=kind)
    if kind == "dora":
        draft.set("adapter.dora", True, of="network.type", theirs=kind)
    of = "network.rank" if theirs.take("network.rank") is not None else "network.linear"
    theirs.take("network.linear")
    _scale(theirs, draft, kind, of)
    _layers(theirs, draft, arch)
    if kind != "lokr":
        carry(theirs, draft, [
            Same("network.dropout", "adapter.activation_dropout", "number", "It acts between A and B."),
            Same("network.network_kwargs.rank_dropout", "adapter.rank_dropout", "number"),
            Same("network.network_kwargs.module_dropout", "adapter.module_dropout", "number"),
        ])  # fmt: skip
    carry(theirs, draft, [Same("network.pretrained_lora_path", "adapter.start_from", "text")])


def _scale(theirs: Theirs, draft: Draft, kind: str, of: str) -> None:
    """Rank and alpha; ai-toolkit's alpha is 1 when nobody says it."""
    rank = theirs.whole(of, 4) or 4
    alpha_of = "network.linear_alpha" if theirs.take("network.linear_alpha") is not None else "network.alpha"
    alpha = theirs.number(alpha_of)
    theirs.take("network.alpha")
    whole, factor = theirs.flag("network.lokr_full_rank", True), theirs.whole("network.lokr_factor", -1)
    if kind == "lokr":
        draft.set("adapter.factor", factor, of="network.lokr_factor")
        if whole:
            note = "Full rank: the second factor is whole, and rank and alpha say nothing."
            draft.set("adapter.rank", FULL_RANK, of="network.lokr_full_rank", theirs=True, note=note)
            return
    draft.set("adapter.rank", rank, of=of)
    if alpha is not None:
        draft.set("adapter.alpha", alpha, of=alpha_of)
        if alpha == 1 and rank > 4:
            draft.warn(f"{alpha_of} is 1 at rank {rank}: the change is scaled by 1/{rank}. Most mean alpha: {rank}.")
    else:
        draft.assume("adapter.alpha", 1.0, f"{PROGRAM}'s alpha is 1 when it is not given.")
        draft.warn(
            f"network.linear_alpha is not given, and {PROGRAM} then takes 1: at rank {rank} the change is scaled by "
            f"1/{rank}. If that was not meant, write adapter.alpha: {rank}."
        )


def _layers(theirs: Theirs, draft: Draft, arch: Arch) -> None:
    """Linear layers of the blocks, as network_kwargs narrows them."""
    every = "all-linear" if arch.kind == "hunyuan-video" else "attention+ffn"
    only = theirs.texts("network.network_kwargs.only_if_contains")
    if only:
        patterns = [rf"(\w+\.)*blocks\.(.*\.)?.*{re.escape(_inside(word))}.*" for word in only]
        note = "Parts of names there; here regexes on whole paths."
        draft.set("adapter.targets", patterns, of="network.network_kwargs.only_if_contains", theirs=only, note=note)
    else:
        draft.assume("adapter.targets", every, f"{PROGRAM} adapts the linear layers of the blocks.")
    if without := theirs.texts("network.network_kwargs.ignore_if_contains"):
        patterns = [rf".*{re.escape(_inside(word))}.*" for word in without]
        note = "One that matches no layer is an error here."
        draft.set(
            "adapter.exclude", patterns, of="network.network_kwargs.ignore_if_contains", theirs=without, note=note
        )


def _inside(word: str) -> str:
    """A part of a path, without what ai-toolkit's paths begin with."""
    return re.sub(r"^(transformer|blocks)\.(blocks\.)?", "", word.replace("$$", "."))
