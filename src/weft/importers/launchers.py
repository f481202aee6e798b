"""The command that starts a training script: accelerate, torchrun, deepspeed or python, its script, and its flags."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import PureWindowsPath

from weft.errors import ConfigError
from weft.importers.draft import Draft, ReadFile
from weft.importers.flags import Arity, settings
from weft.importers.shell_words import Command, Script, Word
from weft.importers.values import Given, Theirs

PLACED = ("MASTER_ADDR", "MASTER_PORT", "PORT", "WORLD_SIZE", "NUM_PROCESS", "NUM_PROCESSES", "RANK", "NODE_RANK")
PRECISIONS = {"no": "fp32", "fp32": "fp32", "bf16": "bf16", "fp16": "fp16"}


@dataclass(frozen=True)
class Launch:
    """script: the file name of the training script; theirs: what stands behind it; launcher: what stands before."""

    script: str
    place: str
    theirs: Theirs
    launcher: Theirs
    environment: Mapping[str, Given]


def script_of(file: ReadFile, pattern: str) -> str | None:
    """The name of the last training script that a shell file starts, when it matches the regex."""
    if not isinstance(file.content, Script):
        return None
    found = file.content.running(_anywhere(pattern))
    return _name(found, pattern) if found else None


def launch_of(file: ReadFile, pattern: str, arity: Callable[[str], Mapping[str, Arity]], program: str) -> Launch:
    """The last command of a file that runs a matching script; of a bare list of flags, these alone.

    Lines of flags behind it belong to it: guides break long commands without a sign at the line's end.
    arity: of the flags of a script. Raises ConfigError when no command runs such a script.
    """
    script: Script = file.content
    found = script.running(_anywhere(pattern))
    if found is None:
        if script.commands and script.commands[0].words[0].text.startswith("--"):
            words = [word for command in script.commands for word in command.words]
            theirs = settings(words, arity(""), program, file.path)
            return Launch("", str(file.path), theirs, Theirs({}, "accelerate"), {})
        raise ConfigError(
            f"{file.path}: no command there starts a training script of {program}. Expected was a line such as: "
            "accelerate launch ... train.py --flag value."
        )
    at = found.find(_anywhere(pattern))
    assert at is not None
    name = _name(found, pattern)
    before = [*found.words[:at]]
    while before and not before[0].text.startswith("-"):
        before.pop(0)
    launcher = settings(before, {}, "the launcher", file.path)
    theirs = settings([*found.words[at + 1 :], *flags_behind(script, found)], arity(name), program, file.path)
    environment = {
        name: Given(word.text, f"{file.path}:{word.line}", word.unknown) for name, word in found.environment.items()
    }
    return Launch(name, f"{file.path}:{found.line}", theirs, launcher, environment)


def flags_behind(script: Script, command: Command) -> Iterator[Word]:
    """Words of the lines of flags that come right after a command."""
    behind = script.commands[script.commands.index(command) + 1 :]
    for line in takewhile(lambda line: re.match(r"--[A-Za-z]", line.words[0].text), behind):
        yield from line.words


def _anywhere(pattern: str) -> str:
    return rf"(?:.*[/\\])?(?:{pattern})"


def _name(command: Command, pattern: str) -> str:
    at = command.find(_anywhere(pattern))
    assert at is not None
    return PureWindowsPath(command.words[at].text).name


def put_launcher(launch: Launch, draft: Draft) -> None:
    """Tell what becomes of the launcher's flags, and of the environment that processes obey."""
    given = launch.launcher
    if "mixed_precision" in given and "mixed_precision" not in launch.theirs:
        put_precision(given, draft)
    _put_strategy(given, draft)
    for key in given.left:
        draft.drop(f"launcher: {key}", given.given[key].value, _how_to_start(key))
    for name, value in launch.environment.items():
        if why := _of_environment(name):
            draft.drop(f"environment: {name}", value.value, why)


def put_precision(theirs: Theirs, draft: Draft) -> None:
    """mixed_precision, as accelerate takes it."""
    word = theirs.choice("mixed_precision", list(PRECISIONS), "no")
    draft.set("engine.precision", PRECISIONS[word], "mixed_precision", "the adapter's own weights are fp32", word)


def _put_strategy(given: Theirs, draft: Draft) -> None:
    """FSDP and DeepSpeed as accelerate's flags choose them."""
    if "use_deepspeed" in given or "deepspeed_config_file" in given or "zero_stage" in given:
        file = str(given.take("deepspeed_config_file", ""))
        stage = given.whole("zero_stage") or (3 if re.search(r"zero_?(stage)?_?3", file) else 2)
        given.take("use_deepspeed")
        name = "deepspeed_config_file" if file else "zero_stage"
        draft.set("engine.kind", "deepspeed", "use_deepspeed", "ZeRO's own numbers are Weft's", True)
        draft.set("engine.zero", 3 if stage == 3 else 2, name, "", file or stage)
        for theirs, ours in (
            ("offload_param_device", "engine.offload_parameters"),
            ("offload_optimizer_device", "engine.offload_optimizer"),
        ):
            device = given.text(theirs, "none")
            if device not in (None, "none"):
                draft.set(ours, True, theirs, "", device)
        if "offload" in file:
            draft.set("engine.offload_parameters", True, name, "the file's name says offload", file)
            draft.warn(f"engine.offload_parameters: taken from the name '{file}'. Look what the file itself says.")
    elif "use_fsdp" in given:
        given.take("use_fsdp")
        strategy = str(given.text("fsdp_sharding_strategy", "FULL_SHARD"))
        if strategy.upper() in ("NO_SHARD", "3"):
            return
        draft.set("parallel.shard", "auto", "use_fsdp", "weights over all processes, by FSDP2", strategy)
        if given.flag("fsdp_offload_params"):
            draft.warn("fsdp_offload_params: sharded weights stay on the GPUs; family.dtype: fp8 halves them.")


def _how_to_start(key: str) -> str:
    if key.startswith(("fsdp", "deepspeed", "zero3", "offload")):
        return "Weft wraps blocks, gathers and saves by its own rules, adapters alone."
    if key in ("num_processes", "nproc_per_node", "num_gpus", "multi_gpu", "gpu_ids"):
        return "Processes are told on the command line: weft train run.yaml --gpus N."
    if key in ("num_machines", "nnodes", "num_nodes", "machine_rank", "node_rank", "main_process_ip",
               "main_process_port", "master_addr", "master_port", "rdzv_endpoint", "rdzv_backend", "rdzv_id",
               "rdzv_conf", "hostfile"):  # fmt: skip
        return "Machines are told on the command line: weft train run.yaml --gpus N --nodes M --rendezvous HOST:PORT."
    if key == "mixed_precision":
        return "The script's own mixed_precision counts."
    if key == "config_file":
        return (
            "accelerate's own file is not read here. accelerate launch --config_file FILE -m weft train run.yaml works."
        )
    return "It is the launcher's; weft train starts its own processes."


def _of_environment(name: str) -> str | None:
    """None for variables that only the script itself reads, which stand in the flags already."""
    if name in PLACED:
        return (
            "weft train --nodes M --node-rank I --rendezvous HOST:PORT, or the same variables under another launcher."
        )
    if name.startswith(("CUDA_", "NCCL_", "HIP_", "ROCR_", "OMP_", "PYTORCH_", "GLOO_", "TORCH_")):
        return "Weft's processes obey it too: set it before weft train."
    return None
