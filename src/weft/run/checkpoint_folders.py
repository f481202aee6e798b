"""Checkpoint folders: which there are, whether each is what was saved, and which one a run goes on from."""

import json
import shutil
from collections.abc import Mapping
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from weft.durable import remove_folder
from weft.errors import RunError, did_you_mean
from weft.run.retention import Retention

FORMAT = 2
OF_OTHERS = {1: "Weft wrote it before it trained on several processes"}
PREFIX = "global_step_"


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run by step, oldest first, whole or not."""
    found = [p for p in (run / "checkpoints").glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.rpartition("_")[2])


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


def prune(run: Path, retention: Retention) -> None:
    """Delete the checkpoints of a run that are kept no longer, and their adapters where those go too."""
    folders = {step_of(folder): folder for folder in list_checkpoints(run)}
    for step in retention.surplus({step: loss_of(folder) for step, folder in folders.items()}):
        remove_folder(folders[step])
        if retention.adapters:
            name = f"{PREFIX}{step}"
            for adapter in [run / name, *run.glob(f"{name}_*")]:  # one, or one of each expert
                if adapter.is_dir():
                    remove_folder(adapter)


# ---- The manifest ---------------------------------------------------------------------------------------------------


def facts_of(folder: Path, path: Path) -> dict[str, dict[str, Any]]:
    """A file's line in the manifest."""
    return {path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}}


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {**manifest, "seal": seal_of(manifest)}


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def seal_of(manifest: Mapping[str, Any]) -> str:
    """Hash of a manifest's own content."""
    return sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """A checkpoint's manifest, or None when it is damaged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.pop("seal", None) != seal_of(manifest):
        return None
    return manifest


def loss_of(folder: Path) -> float | None:
    """The validation loss at a checkpoint's step, where it was measured then."""
    return (read_manifest(folder) or {}).get("loss")


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None when every file is as its manifest says."""
    if not (folder / "manifest.json").is_file():
        return "it has no manifest.json"
    manifest = read_manifest(folder)
    if manifest is None:
        return "its manifest.json is damaged"
    form = manifest["format"]
    if form != FORMAT:
        author = OF_OTHERS.get(form, f"Weft {manifest.get('weft', 'of another version')} wrote it")
        return (
            f"its format is {form}, this Weft reads format {FORMAT}: {author}. Finish it with that Weft, or begin a "
            "new run with adapter.start_from"
        )
    for name, facts in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != facts["bytes"] or sha256_of(file) != facts["sha256"]:
            return f"{name} is not what was saved"
    return None


# ---- Choosing one ---------------------------------------------------------------------------------------------------


def find_checkpoint(run: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint that `resume` means, and a sentence for each damaged one that was passed over.

    It reads whole checkpoints: of several ranks one alone should ask. Raises RunError when one was asked for and is
    not there, or is damaged.
    """
    there = list_checkpoints(run)
    if resume == "never":
        if there:
            raise RunError(
                f"resume: never, but {run} has checkpoints up to step {step_of(there[-1])}. "
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
            raise RunError(" ".join([f"resume: {run} has no whole checkpoint.", *passed]))
        return None, []
    return named_checkpoint(run, resume, there), []


def named_checkpoint(run: Path, resume: str, there: list[Path]) -> Path:
    """A checkpoint by its name in the run or by its path. Raises RunError."""
    folder = Path(resume)
    if not folder.is_dir():
        folder = run / "checkpoints" / resume
    names = [p.name for p in there]
    if not folder.is_dir():
        raise RunError(
            f"resume: there is no checkpoint '{resume}'. {run / 'checkpoints'} holds: {', '.join(names) or 'nothing'}."
            + (f" {did_you_mean(Path(resume).name, names)}" if names else "")
        )
    problem = damage(folder)
    if problem:
        raise RunError(f"resume: {folder} cannot be used: {problem}. Choose another: {names}.")
    return folder
