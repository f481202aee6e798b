"""Checkpoints: everything that a run needs to go on exactly, in one folder that is whole or not there.

A folder holds `state.json` (a tree in which tensors are named), `state.safetensors` (those tensors), `config.json`
(the resolved config) and, written last, `manifest.json` with the size and sha256 of each file. No pickle.
"""

import json
import random
import re
import shutil
from collections.abc import Mapping
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from weft.durable import write_folder
from weft.errors import RunError, did_you_mean
from weft.run.learner import Learner

FORMAT = 1
CONFIGURED = ("params", "lr", "base_lr", "betas", "eps", "weight_decay")  # of an optimizer's groups
NAME = re.compile(r"global_step_(\d+)")


# ---- A tree of plain data and tensors <-> JSON and safetensors -----------------------------------------------------


def pack(tree: Any, tensors: dict[str, Tensor], place: str = "") -> Any:
    """Plain data in which each tensor is replaced by its name; the tensors are added to the mapping."""
    if isinstance(tree, Tensor):
        tensors[place] = tree.detach().cpu().contiguous().clone()
        return {"$tensor": place}
    if isinstance(tree, Mapping):
        assert all(isinstance(key, str) for key in tree), f"{place}: a key that is no string"
        return {key: pack(value, tensors, f"{place}/{key}" if place else key) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [pack(value, tensors, f"{place}/{i}") for i, value in enumerate(tree)]
    assert tree is None or isinstance(tree, str | int | float | bool), f"{place}: {type(tree)} cannot be saved"
    return tree


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of pack, with lists for tuples."""
    if isinstance(tree, dict):
        if set(tree) == {"$tensor"}:
            return tensors[tree["$tensor"]]
        return {key: unpack(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [unpack(value, tensors) for value in tree]
    return tree


# ---- What moves, as a tree -----------------------------------------------------------------------------------------


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state with parameters by name, never by position."""
    whole = optimizer.state_dict()
    names = [name for group in whole["param_groups"] for name in group["names"]]
    numbers = [number for group in whole["param_groups"] for number in group["params"]]
    by_number = dict(zip(numbers, names, strict=True))
    groups = [{k: v for k, v in group.items() if k != "params"} for group in whole["param_groups"]]
    return {"groups": groups, "state": {by_number[number]: dict(entry) for number, entry in whole["state"].items()}}


def restore_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Put saved state back, parameter by parameter's name. Raises RunError when the parameters are others.

    What the config sets stays as the config now has it; it equals what was saved unless a change was allowed.
    """
    now = optimizer.state_dict()
    names = [group["names"] for group in now["param_groups"]]
    if [group["names"] for group in saved["groups"]] != names:
        raise RunError("the checkpoint's optimizer moves other parameters than this config's. Start a new run.")
    groups = [
        {**{k: as_was(group.get(k), v) for k, v in old.items()}, **{k: v for k, v in group.items() if k in CONFIGURED}}
        for old, group in zip(saved["groups"], now["param_groups"], strict=True)
    ]
    numbers = {n: i for group in groups for n, i in zip(group["names"], group["params"], strict=True)}
    optimizer.load_state_dict(
        {"param_groups": groups, "state": {numbers[name]: entry for name, entry in saved["state"].items()}}
    )


def as_was(current: Any, saved: Any) -> Any:
    """JSON knows no tuples: give back the type that the optimizer has."""
    return tuple(saved) if isinstance(current, tuple) else saved


def chance_state() -> dict[str, Any]:
    """Every global generator: python's, numpy's, torch's, each GPU's. Weft's own draws are seeded for their place and
    need none of them; an optimizer or a model may."""
    version, internal, gauss = random.getstate()
    name, keys, *rest = numpy.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(numpy.asarray(keys).astype(numpy.int64)), *map(float, rest)],
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
    }


def seed_chance(seed: int) -> None:
    """Seed every global generator, so that what libraries draw from them is the run's own too."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def restore_chance(saved: Mapping[str, Any]) -> None:
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = saved["numpy"]
    numpy.random.set_state((name, keys.numpy().astype(numpy.uint32), int(position), int(has_gauss), cached))
    torch.set_rng_state(saved["torch"])
    if torch.cuda.is_available() and len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(saved["cuda"])


def learner_state(learner: Learner) -> dict[str, Any]:
    """All of a learner that moves."""
    adapters = learner.model.adapters
    return {
        "step": learner.step,
        "drawn": learner.drawn,
        "skipped_in_a_row": learner.skipped_in_a_row,
        "adapters": {name: adapters.state_dict(name) for name in adapters.names},
        "optimizers": {name: optimizer_state(o) for name, o in learner.optimizers.items()},
        "ema": {name: average.tensors for name, average in learner.ema.items()},
        "objective": learner.state.state_dict(),
        "engine": learner.engine.state_dict(),
        "chance": chance_state(),
    }


def restore_learner(learner: Learner, saved: Mapping[str, Any]) -> None:
    """Make a freshly assembled learner the one that was saved. Raises RunError or ModelError."""
    if sorted(saved["optimizers"]) != sorted(learner.optimizers) or sorted(saved["ema"]) != sorted(learner.ema):
        raise RunError("the checkpoint has other optimizers or averages than this config makes. Start a new run.")
    for name, tensors in saved["adapters"].items():
        learner.model.adapters.load_state_dict(name, tensors)
    for name, optimizer in learner.optimizers.items():
        restore_optimizer(optimizer, saved["optimizers"][name])
    for name, average in learner.ema.items():
        average.tensors = {k: v.to(learner.engine.device) for k, v in saved["ema"][name].items()}
    learner.state.load_state_dict(saved["objective"])
    learner.engine.load_state_dict(saved["engine"])
    learner.step, learner.drawn = saved["step"], saved["drawn"]
    learner.skipped_in_a_row = saved["skipped_in_a_row"]
    restore_chance(saved["chance"])


# ---- Folders -------------------------------------------------------------------------------------------------------


def save_checkpoint(run: Path, learner: Learner, config: Mapping[str, Any], keep: int) -> Path:
    """Write the newest checkpoint of a run, then delete all but the newest `keep`."""
    target = run / "checkpoints" / f"global_step_{learner.step}"

    def fill(folder: Path) -> None:
        tensors: dict[str, Tensor] = {}
        tree = pack(learner_state(learner), tensors)
        save_file(tensors, folder / "state.safetensors")
        (folder / "state.json").write_text(json.dumps(tree))
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in sorted(folder.iterdir())}
        manifest = {"format": FORMAT, "step": learner.step, "files": files}
        (folder / "manifest.json").write_text(json.dumps({**manifest, "seal": seal_of(manifest)}, indent=1))

    write_folder(target, fill)
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return target


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run by step, oldest first, whole or not."""
    found = [p for p in (run / "checkpoints").glob("global_step_*") if NAME.fullmatch(p.name)]
    return sorted(found, key=step_of)


def set_aside_after(run: Path, checkpoint: Path | None) -> list[Path]:
    """Rename the checkpoints beyond the one that a run goes on from, so that its own later ones take their place.

    They belong to a branch that is left, or are damaged; none is deleted.
    """
    start = step_of(checkpoint) if checkpoint else -1
    moved = []
    for folder in list_checkpoints(run):
        if step_of(folder) > start:
            target = folder.with_name(f"set_aside_{folder.name}")
            shutil.rmtree(target, ignore_errors=True)
            moved.append(folder.rename(target))
    return moved


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.rpartition("_")[2])


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def seal_of(manifest: Mapping[str, Any]) -> str:
    """Hash of a manifest's own content."""
    return sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None when every file is as its manifest says."""
    path = folder / "manifest.json"
    if not path.is_file():
        return "it has no manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except ValueError:
        return "its manifest.json is damaged"
    if not isinstance(manifest, dict) or manifest.pop("seal", None) != seal_of(manifest):
        return "its manifest.json is damaged"
    if manifest.get("format") != FORMAT:
        return f"its format is {manifest.get('format')}; this Weft reads format {FORMAT}"
    for name, facts in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != facts["bytes"] or sha256_of(file) != facts["sha256"]:
            return f"{name} is not what was saved"
    return None


def find_checkpoint(run: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint that `resume` means, and a sentence for each damaged one that was passed over.

    Raises RunError when one was asked for and is not there, or is damaged.
    """
    there = list_checkpoints(run)
    if resume == "never":
        if there:
            raise RunError(
                f"resume: never, but {run} has checkpoints up to step {there[-1].name.rpartition('_')[2]}. "
                "Choose another 'name', delete the folder, or write resume=auto."
            )
        return None, []
    if resume in ("auto", "latest"):
        passed = []
        for folder in reversed(there):
            problem = damage(folder)
            if problem is None:
                return folder, passed
            passed.append(f"{folder}: passed over, {problem}.")
        if resume == "latest" or passed:
            raise RunError(f"resume: {run} has no whole checkpoint. " + " ".join(passed))
        return None, []
    folder = Path(resume)
    if not folder.is_dir():
        folder = run / "checkpoints" / resume
    if not folder.is_dir():
        names = [p.name for p in there]
        raise RunError(
            f"resume: there is no checkpoint '{resume}'. {run / 'checkpoints'} holds: {', '.join(names) or 'nothing'}."
            + (f" {did_you_mean(Path(resume).name, names)}" if names else "")
        )
    problem = damage(folder)
    if problem:
        raise RunError(f"resume: {folder} cannot be used: {problem}. Choose another: {[p.name for p in there]}.")
    return folder, []


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state of the learner, resolved config) of a whole checkpoint."""
    tree = json.loads((folder / "state.json").read_text())
    return unpack(tree, load_file(folder / "state.safetensors")), json.loads((folder / "config.json").read_text())
