"""What an accelerate config asks for, in the words of a run's config: its options reach a program as variables only."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.errors import ConfigError

# How accelerate does what Weft does in one way of its own, with the same numbers: wrapping each block, prefetching,
# gathering state, reading weights without a copy for each process.
OF_NO_EFFECT = (
    "FSDP_MIN_NUM_PARAMS", "FSDP_TRANSFORMER_CLS_TO_WRAP", "FSDP_BACKWARD_PREFETCH", "FSDP_FORWARD_PREFETCH",
    "FSDP_STATE_DICT_TYPE", "FSDP_USE_ORIG_PARAMS", "FSDP_CPU_RAM_EFFICIENT_LOADING", "FSDP_SYNC_MODULE_STATES",
    "FSDP_VERSION", "ACCELERATE_DEEPSPEED_ZERO3_INIT", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL",
)  # fmt: skip
STRATEGIES = {"1": "FULL_SHARD", "2": "SHARD_GRAD_OP", "3": "NO_SHARD", "4": "HYBRID_SHARD", "5": "HYBRID_SHARD_ZERO2"}
UNSET = ("", "none", "no", "false", "auto")


@dataclass(frozen=True)
class Wish:
    """One key that a variable decides, in a value of ours. word: the variable as it stands."""

    key: str
    value: str
    word: str


def accelerate_overrides(environment: Mapping[str, str], written: Mapping[str, Any]) -> list[str]:
    """Assignments such as parallel.shard=auto that an accelerate config means, as far as the run's config leaves them
    open. written: that config as plain data. Raises ConfigError with all that contradicts it or means nothing here.
    """
    problems: list[str] = []
    wishes = [*general(environment, problems)]
    if is_true(environment, "ACCELERATE_USE_FSDP"):
        wishes += fsdp(environment, problems)
    if is_true(environment, "ACCELERATE_USE_DEEPSPEED"):
        wishes += deepspeed(environment, problems)
    if is_true(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        wishes += parallelism(environment, problems)
    overrides = []
    for wish in wishes:
        there = written_value(written, wish.key)
        if there is None:
            overrides.append(f"{wish.key}={wish.value}")
        elif not agrees(there, wish):
            problems.append(
                f"{wish.key} is {there} in the config, and accelerate's {wish.word} means {wish.value}. Leave one out."
            )
    if problems:
        raise ConfigError(*problems)
    return overrides


def agrees(there: Any, wish: Wish) -> bool:
    """Whether the config says what accelerate says; any sharding is what FSDP means."""
    if wish.key == "parallel.shard" and wish.value == "auto":
        return there == "auto" or int(there) > 1
    return plain(there) == plain(wish.value) or there == "auto"


def plain(value: Any) -> Any:
    """A value without its spelling: 1 and 1.0 and '1' are the same, so are true and True."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value).lower()


def written_value(written: Mapping[str, Any], key: str) -> Any:
    """What a config says under a dotted key; None when it leaves it open."""
    section, _, name = key.partition(".")
    inner = written.get(section)
    return inner.get(name) if isinstance(inner, Mapping) else None


def is_true(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() in ("1", "true", "yes", "on")


def said(environment: Mapping[str, str], name: str) -> str:
    """A variable's value; '' when it stands for nothing."""
    value = environment.get(name, "")
    return "" if value.lower() in UNSET else value


def means_nothing(name: str, value: str, instead: str) -> str:
    return f"accelerate's {name} is {value}, which has no meaning here. {instead}"


# ---- By section of an accelerate config ---------------------------------------------------------------------------


def general(environment: Mapping[str, str], problems: list[str]) -> Iterator[Wish]:
    """Device, precision, accumulation; and what Weft has no counterpart of."""
    if is_true(environment, "ACCELERATE_USE_CPU"):
        yield Wish("engine.device", "cpu", "ACCELERATE_USE_CPU=true")
    if precision := said(environment, "ACCELERATE_MIXED_PRECISION").lower():
        if precision in ("bf16", "fp16"):
            yield Wish("engine.precision", precision, f"ACCELERATE_MIXED_PRECISION={precision}")
        else:
            instead = (
                "Write family.dtype=fp8 in the run's config for frozen weights in 8 bits, and mixed precision bf16."
            )
            problems.append(means_nothing("ACCELERATE_MIXED_PRECISION", precision, instead))
    if steps := said(environment, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"):
        yield from accumulation(steps, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if norm := said(environment, "ACCELERATE_GRADIENT_CLIPPING"):
        yield Wish("schedule.max_norm", norm, f"ACCELERATE_GRADIENT_CLIPPING={norm}")
    if backend := said(environment, "ACCELERATE_DYNAMO_BACKEND"):
        problems.append(means_nothing("ACCELERATE_DYNAMO_BACKEND", backend, "Set dynamo_backend to 'no'."))
    if is_true(environment, "ACCELERATE_USE_MEGATRON_LM"):
        problems.append(means_nothing("ACCELERATE_USE_MEGATRON_LM", "true", "Use FSDP or DeepSpeed."))


def accumulation(steps: str, name: str) -> Iterator[Wish]:
    # accelerate's 1 is also what it writes when nobody chose.
    if steps != "1":
        yield Wish("schedule.accumulate", steps, f"{name}={steps}")


def fsdp(environment: Mapping[str, str], problems: list[str]) -> Iterator[Wish]:
    """FSDP options of either version: ours is FSDP2, which gathers a block's weights for each use."""
    strategy = said(environment, "FSDP_SHARDING_STRATEGY") or "FULL_SHARD"
    strategy = STRATEGIES.get(strategy, strategy)
    if environment.get("FSDP_VERSION", "1") == "2":
        strategy = "FULL_SHARD" if environment.get("FSDP_RESHARD_AFTER_FORWARD", "true") == "true" else "SHARD_GRAD_OP"
    elif environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").upper() in STRATEGIES.values():
        strategy = environment["FSDP_RESHARD_AFTER_FORWARD"].upper()  # where version 1 of a config may say it
    word = f"FSDP_SHARDING_STRATEGY={strategy}"
    if strategy == "FULL_SHARD":
        yield Wish("parallel.shard", "auto", word)
    elif strategy == "HYBRID_SHARD":
        yield Wish("parallel.shard", environment.get("LOCAL_WORLD_SIZE", "auto"), word)
    elif strategy != "NO_SHARD":
        instead = "Weights are given back after each use: write FULL_SHARD or HYBRID_SHARD, in version 2 fsdp_reshard_"
        problems.append(means_nothing("FSDP_SHARDING_STRATEGY", strategy, f"{instead}after_forward: true."))
    if is_true(environment, "FSDP_ACTIVATION_CHECKPOINTING"):
        yield Wish("engine.recompute", "true", "FSDP_ACTIVATION_CHECKPOINTING=true")
    for name in ("FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD"):
        if is_true(environment, name):
            instead = "Set it to false; more processes, parallel.shard and family.dtype=fp8 save memory."
            problems.append(means_nothing(name, "true", instead))
    if (policy := said(environment, "FSDP_AUTO_WRAP_POLICY")) not in ("", "TRANSFORMER_BASED_WRAP"):
        problems.append(means_nothing("FSDP_AUTO_WRAP_POLICY", policy, "Weft wraps each block. Leave it out."))
    if modules := said(environment, "FSDP_IGNORED_MODULES"):
        problems.append(means_nothing("FSDP_IGNORED_MODULES", modules, "Leave it out."))


def deepspeed(environment: Mapping[str, str], problems: list[str]) -> Iterator[Wish]:
    """ZeRO options, from variables or from the file that they name."""
    yield Wish("engine.kind", "deepspeed", "ACCELERATE_USE_DEEPSPEED=true")
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    places = {
        "offload_optimizer": environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none"),
        "offload_parameters": environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none"),
    }
    source = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
    if file := said(environment, "ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        options = read_options(Path(file))
        zero = options.get("zero_optimization", {})
        stage, source = str(zero.get("stage", 0)), f"{file}, zero_optimization.stage"
        places = {
            "offload_optimizer": zero.get("offload_optimizer", {}).get("device", "none"),
            "offload_parameters": zero.get("offload_param", {}).get("device", "none"),
        }
        yield from of_options(options, file, problems)
    if stage in ("2", "3"):
        yield Wish("engine.zero", stage, f"{source}={stage}")
    elif stage is not None:
        problems.append(means_nothing(source, stage, "Write 2 or 3; for data parallelism alone leave DeepSpeed out."))
    for key, place in places.items():
        if place == "cpu":
            yield Wish(f"engine.{key}", "true", f"DeepSpeed {key}={place}")
        elif place not in ("none", ""):
            problems.append(means_nothing(f"DeepSpeed {key}", place, "Write cpu or none."))
    if layers := said(environment, "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES"):
        problems.append(means_nothing("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES", layers, "Leave it out."))


def read_options(file: Path) -> dict[str, Any]:
    """A DeepSpeed config file. Raises ConfigError when it is none."""
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"accelerate's deepspeed_config_file {file} cannot be read as JSON: {error}") from None


# Keys of a DeepSpeed config file whose numbers Weft has elsewhere or needs not know.
UNUSED_OPTIONS = ("zero_optimization", "train_batch_size", "steps_per_print", "wall_clock_breakdown",
                  "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")  # fmt: skip


def of_options(options: Mapping[str, Any], file: str, problems: list[str]) -> Iterator[Wish]:
    """The keys of a DeepSpeed config file outside of zero_optimization."""
    keys = {"train_micro_batch_size_per_gpu": "data.batch_size", "gradient_clipping": "schedule.max_norm"}
    for name, value in options.items():
        if value == "auto":
            continue
        if name == "gradient_accumulation_steps":
            yield from accumulation(str(value), f"{file}, {name}")
        elif name in keys:
            yield Wish(keys[name], str(value), f"{file}, {name}={value}")
        elif name in ("bf16", "fp16"):
            if value.get("enabled") is True:
                yield Wish("engine.precision", name, f"{file}, {name}.enabled")
        elif name not in UNUSED_OPTIONS:
            instead = "The run's config says it, or nothing does. Take it out of that file."
            problems.append(means_nothing(f"{file}, {name}", "set", instead))


def parallelism(environment: Mapping[str, str], problems: list[str]) -> Iterator[Wish]:
    """accelerate's ParallelismConfig."""
    keys = {"DP_REPLICATE_SIZE": "parallel.data", "DP_SHARD_SIZE": "parallel.shard", "SP_SIZE": "parallel.sequence"}
    for name, key in keys.items():
        variable = f"PARALLELISM_CONFIG_{name}"
        if (size := environment.get(variable, "1")) != "1":
            yield Wish(key, size, f"{variable}={size}")
    for name in ("TP_SIZE", "CP_SIZE"):
        variable = f"PARALLELISM_CONFIG_{name}"
        if (size := environment.get(variable, "1")) != "1":
            instead = "To part the tokens of a sequence write parallel.sequence (sp_size); tensors are not parted."
            problems.append(means_nothing(variable, size, instead))
