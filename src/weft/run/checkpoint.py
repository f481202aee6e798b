"""Checkpoints: everything that a run needs to go on exactly, in one folder that is whole or not there.

A folder holds `state.json` (a tree in which tensors are named), `state.safetensors` and `tensors/` (those tensors: what
is small or alike on all ranks, and the slices of each rank), `config.json` (the resolved config) and, written last,
`manifest.json` with the size and sha256 of each file. No pickle, and nothing that depends on how many ranks there were.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from weft import __version__
from weft.durable import draft_of, force_to_disk, take_place
from weft.engines.shards import Copies, Part, Shards, is_sharded, part_of
from weft.errors import RunError
from weft.run.checkpoint_folders import FORMAT, PREFIX, facts_of, prune, sealed
from weft.run.checkpoint_tree import adopt, apart, learner_state, pack, room_for, shapes_in, unpack
from weft.run.learner import Learner
from weft.run.retention import Retention

LAST_WORD = 60.0  # seconds that a save under way has to end in, when the run has failed


COPIED_BEHIND = ("cpu", "cuda")  # devices that another thread copies from while this one computes


@dataclass(frozen=True)
class Snapshot:
    """A learner's state at one step, whose tensors may be the learner's own. beside: tensors that a file beside the
    checkpoint is made of."""

    step: int
    tree: Mapping[str, Any]
    beside: Mapping[str, Tensor]
    config: Mapping[str, Any]
    loss: float | None


@dataclass(frozen=True)
class Packed:
    """A snapshot as it is written. tree: names tensors. shared: this rank's parts of what all ranks write. small: what
    rank 0 writes."""

    step: int
    tree: Mapping[str, Any]
    shared: Mapping[str, Part]
    small: Mapping[str, Tensor]
    beside: Mapping[str, Tensor]
    config: Mapping[str, Any]
    loss: float | None


BESIDE = "beside:"  # no name in a tree begins so


def packed(state: Snapshot, copies: Copies | None) -> Packed:
    """A snapshot in the form of its files. copies: makes them of its tensors; None: the memory stays shared."""
    tensors: dict[str, Tensor] = {}
    trees: list[Any] = []

    def parts() -> dict[str, Part]:
        trees.append(pack(state.tree, tensors))
        found = {name: part_of(tensor) for name, tensor in tensors.items()}
        return found | {f"{BESIDE}{name}": part_of(tensor) for name, tensor in state.beside.items()}

    made = parts() if copies is None else copies.make(parts)
    shared = {name for name, tensor in tensors.items() if is_sharded(tensor) or is_large(tensor)}
    return Packed(
        state.step,
        trees[0],
        {name: made[name] for name in tensors if name in shared},
        {name: made[name].local for name in tensors if name not in shared},
        {name: made[f"{BESIDE}{name}"].local for name in state.beside},
        state.config,
        state.loss,
    )


def is_large(tensor: Tensor) -> bool:
    """Whether the ranks share the writing of a tensor that they all have: the weights and their moments."""
    return tensor.is_floating_point() and tensor.ndim > 0 and tensor.numel() > 0


def write_checkpoint(run: Path, state: Packed, shards: Shards, retention: Retention) -> Path:
    """Write a checkpoint of a run, then delete those that are kept no longer. All ranks together. Raises RunError."""
    target = run / "checkpoints" / f"{PREFIX}{state.step}"
    draft = Path(shards.first(lambda: str(draft_of(target))))
    try:
        files = shards.write(draft / "tensors", state.shared) if state.shared else []
        facts = shards.each(lambda: {name: fact for path in files for name, fact in facts_of(draft, path).items()})
        shards.first(lambda: complete(draft, state, {name: fact for own in facts for name, fact in own.items()}))
        shards.first(lambda: take_place(draft, target))
    except BaseException:
        if shards.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
        raise
    shards.first(lambda: prune(run, retention))
    return target


def complete(draft: Path, state: Packed, facts: Mapping[str, Any]) -> None:
    """What rank 0 writes beside the shards, whose facts it was told; the manifest last."""
    save_file({name: tensor.cpu().contiguous() for name, tensor in state.small.items()}, draft / "state.safetensors")
    (draft / "state.json").write_text(json.dumps(state.tree))
    (draft / "config.json").write_text(json.dumps(state.config, indent=1))
    own = [draft / name for name in ("config.json", "state.json", "state.safetensors")]
    for path in own:
        force_to_disk(path)
    files = {**dict(facts), **{name: fact for path in own for name, fact in facts_of(draft, path).items()}}
    manifest = {"format": FORMAT, "weft": __version__, "step": state.step, "loss": state.loss, "files": files}
    (draft / "manifest.json").write_text(json.dumps(sealed(manifest), indent=1))


Beside = Callable[[Mapping[str, Tensor]], None]  # writes what belongs beside a checkpoint, of tensors by name


def nothing(tensors: Mapping[str, Tensor]) -> None:
    """Nothing is written beside a checkpoint."""


@dataclass
class CheckpointWriter:
    """Writes the checkpoints of a run, one after the other; in the background: while training goes on.

    Every rank calls each method at the same places, except `done`.
    """

    run: Path
    retention: Retention
    background: bool
    shards: Shards = field(default_factory=Shards)
    _thread: Thread | None = None
    _failure: BaseException | None = None
    _written: list[Path] = field(default_factory=list)

    def save(
        self,
        learner: Learner,
        config: Mapping[str, Any],
        loss: float | None = None,
        beside: Beside = nothing,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Save the learner as it is now, and on rank 0 before that what belongs beside it, which is given tensors as
        they are now. loss: of validation at this step. In the background: what an optimizer step moves is copied while
        the next one's passes run; `Learner.hold` waits for that. Raises RunError when this save or the one before it
        failed."""
        self.wait()
        state = Snapshot(learner.step, learner_state(learner), tensors or {}, config, loss)
        if not self.background:
            self._write(partial(packed, state, None), beside)
            self._raise()
            return
        copies = Copies(learner.engine.device)
        taken = partial(packed, replace(state, tree=apart(learner, state.tree)), copies)
        if learner.engine.device.type not in COPIED_BEHIND:
            taken = partial(replace, taken())
        self._thread = Thread(target=self._write, args=(taken, beside), name="checkpoint", daemon=True)
        self._thread.start()
        learner.copying = copies.hold

    def _write(self, taken: Callable[[], Packed], beside: Beside) -> None:
        try:
            state = taken()
            self.shards.first(lambda: beside(state.beside))
            self._written.append(write_checkpoint(self.run, state, self.shards, self.retention))
        except BaseException as failed:
            self._failure = failed

    def done(self) -> list[Path]:
        """Checkpoints that have become complete since this was last asked. Raises RunError when one failed."""
        self._raise()
        written = list(self._written)
        del self._written[: len(written)]  # the thread may have added one meanwhile
        return written

    def wait(self) -> None:
        """Until nothing is being written. Raises RunError when that failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()

    def close(self) -> None:
        """Let a save that is under way end, unless the other ranks are gone and it never will."""
        if self._thread is not None:
            self._thread.join(LAST_WORD)
            self._thread = None

    def _raise(self) -> None:
        failed, self._failure = self._failure, None
        if failed is not None:
            raise RunError(f"{self.run}: a checkpoint could not be written: {failed}") from failed


# ---- Reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint whose tensors have not been read. tree: they are named in it. config: resolved."""

    folder: Path
    tree: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def step(self) -> int:
        return self.tree["step"]


def read_checkpoint(folder: Path) -> Checkpoint:
    """A whole checkpoint's plain data."""
    return Checkpoint(
        folder, json.loads((folder / "state.json").read_text()), json.loads((folder / "config.json").read_text())
    )


def restore_learner(learner: Learner, checkpoint: Checkpoint) -> None:
    """Make a freshly assembled learner the one that was saved, each rank reading its own slices. All ranks together.
    Raises RunError or ModelError."""
    tensors = room_for(learner, checkpoint.tree)
    fill(checkpoint.folder, tensors)
    adopt(learner, unpack(checkpoint.tree, tensors))


def whole_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """The tree with whole tensors, on any rank alike. All ranks together."""
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes_in(checkpoint.tree).items()}
    fill(checkpoint.folder, tensors)
    return unpack(checkpoint.tree, tensors)


def fill(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read a checkpoint's tensors into tensors of the same names, of sharded ones this rank's slices."""
    small = load_file(folder / "state.safetensors")
    parts = {name: part_of(tensor) for name, tensor in tensors.items()}
    for name in small.keys() & parts.keys():
        parts[name].take(small[name])
    shared = {name: part for name, part in parts.items() if name not in small}
    if shared:
        shards = Shards()
        try:
            shards.read(folder / "tensors", shared)
        finally:
            shards.close()
