"""Which GPUs this process may use, under which names, whatever the environment and the driver call them."""

import json
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

PROCESS_NUMBER = "WEFT_PROCESS_NUMBER"  # handed to the processes of `weft train --independent`
PATIENCE = 20  # seconds that a driver's own program may take to list its GPUs


@dataclass(frozen=True)
class Installed:
    """One GPU as the driver lists it. slices: uuids of its MIG devices, where it is cut into such."""

    index: int
    uuid: str
    name: str = ""
    slices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gpu:
    """One GPU that may be used here. entry: what a child is given as its only visible device to get this one."""

    ordinal: int  # its place among the visible ones
    physical: int | None  # the driver's number, as far as it is known
    entry: str
    uuid: str | None
    name: str
    number: int  # in names of files and runs: its own among the visible ones


@dataclass(frozen=True)
class Visible:
    """The GPUs that may be used here. notes: sentences on what could not be found out, or differs."""

    gpus: tuple[Gpu, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Choice:
    """A device that a list names, before it has its place."""

    entry: str
    physical: int | None = None
    uuid: str | None = None
    name: str = ""


def visible_gpus(
    environment: Mapping[str, str],
    installed: Sequence[Installed] | None,
    seen: Sequence[str | None] | None = None,
    *,
    rocm: bool = False,
) -> Visible:
    """The GPUs that an environment leaves. installed: None when the driver cannot be asked. seen: the uuid, where it is
    known, of each device that torch itself shows; None when torch was not asked.

    On ROCm a list may name its own part of an earlier list: ROCR_VISIBLE_DEVICES comes first.
    """
    notes: list[str] = []
    choices = _of_rocm(environment, installed) if rocm else _of_cuda(environment, installed)
    if choices is None:
        choices = [_Choice(str(ordinal)) for ordinal in range(len(seen or ()))]
    if seen is not None:
        choices = _as_seen(choices, seen, installed or (), notes)
    if any(choice.physical is None for choice in choices):
        notes.append(UNASKED if installed is None else UNORDERED)
    return Visible(_numbered(choices), tuple(notes))


UNASKED = "The driver cannot be asked which GPUs these are, so they are numbered by their order."
UNORDERED = (
    "CUDA counts GPUs of different kinds by speed, so they are numbered by their order. Set "
    "CUDA_DEVICE_ORDER=PCI_BUS_ID to number them as nvidia-smi does."
)


def _numbered(choices: Sequence[_Choice]) -> tuple[Gpu, ...]:
    """Numbers for names: the driver's when every GPU has one for itself, else the order (MIG slices share a GPU)."""
    physical = [choice.physical for choice in choices]
    own = None not in physical and len(set(physical)) == len(physical)
    return tuple(
        Gpu(ordinal=i, physical=c.physical, entry=c.entry, uuid=c.uuid, name=c.name,
            number=c.physical if own and c.physical is not None else i)
        for i, c in enumerate(choices)
    )  # fmt: skip


def _as_seen(
    choices: list[_Choice], seen: Sequence[str | None], installed: Sequence[Installed], notes: list[str]
) -> list[_Choice]:
    """The choices, corrected by what torch itself shows: it is asked last, and knows the order."""
    sliced = bool(choices) and all((choice.uuid or choice.entry).startswith("MIG-") for choice in choices)
    if sliced and len(seen) == 1 and len(choices) > 1:
        notes.append("CUDA shows a process one MIG device only; weft train --independent gives each its own process.")
        return choices
    if len(seen) < len(choices):
        notes.append(f"The environment and the driver name {len(choices)} GPUs, but torch sees {len(seen)}.")
        choices = choices[: len(seen)]
    return [
        choice if uuid is None else _identified(choice, uuid, installed)
        for choice, uuid in zip(choices, [*seen, *[None] * len(choices)], strict=False)
    ]


def _identified(choice: _Choice, uuid: str, installed: Sequence[Installed]) -> _Choice:
    """The choice under the uuid that its device has. torch gives it without the driver's prefix."""
    for gpu in installed:
        for known in (gpu.uuid, *gpu.slices):
            if _body(known) == _body(uuid):
                return replace(choice, physical=gpu.index, uuid=known, name=gpu.name)
    return replace(choice, uuid=choice.uuid or uuid)


def _body(uuid: str) -> str:
    return re.sub(r"^(GPU-|MIG-)", "", uuid).lower()


# ---- CUDA ---------------------------------------------------------------------------------------------------------


def _of_cuda(environment: Mapping[str, str], installed: Sequence[Installed] | None) -> list[_Choice] | None:
    """What CUDA_VISIBLE_DEVICES leaves; None when it is not set and the driver cannot be asked.

    CUDA C++ Programming Guide, environment variables: an invalid name hides itself and all behind it. torch reads the
    list as CUDA does: names of one kind, and a name that is repeated hides all.
    """
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    indices_are_physical = _order_is_known(environment, installed)
    if listed is None:
        return None if installed is None else _all_of(installed, indices_are_physical)
    if listed.startswith("GPU-"):
        return _chosen(listed, lambda word: _by_uuid(word, installed))
    if listed.startswith("MIG-"):
        return _chosen(listed, lambda word: _by_slice(word, installed))
    return _chosen(listed, lambda word: _by_index(word, installed, indices_are_physical))


def _order_is_known(environment: Mapping[str, str], installed: Sequence[Installed] | None) -> bool:
    """Whether CUDA counts as the driver does: when told to, or when no GPU is faster than another."""
    alike = len({gpu.name for gpu in installed or ()}) <= 1
    return alike or environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"


def _all_of(installed: Sequence[Installed], indices_are_physical: bool) -> list[_Choice]:
    """Every GPU; where one is cut into MIG devices only those, for CUDA shows no whole GPU beside them."""
    slices = [_Choice(uuid, gpu.index, uuid, gpu.name) for gpu in installed for uuid in gpu.slices]
    if slices:
        return slices
    if indices_are_physical:
        return [_Choice(str(gpu.index), gpu.index, gpu.uuid, gpu.name) for gpu in installed]
    return [_Choice(str(i)) for i in range(len(installed))]


def _chosen(listed: str, choice_of: Callable[[str], _Choice | None]) -> list[_Choice]:
    """Choices up to the first invalid name; none at all when one is repeated."""
    found: list[_Choice] = []
    for word in listed.split(","):
        choice = choice_of(word)
        if choice is None:
            break
        if choice in found:
            return []
        found.append(choice)
    return found


def _by_index(word: str, installed: Sequence[Installed] | None, physical: bool) -> _Choice | None:
    # Like strtoul: '1st' is 1, and a word without digits in front is no index.
    digits = re.match(r"[+-]?\d+", word.strip())
    if digits is None or int(digits.group()) < 0:
        return None
    index = int(digits.group())
    if installed is None:
        return _Choice(str(index), index)
    if index >= len(installed):
        return None
    if not physical:
        return _Choice(str(index))
    gpu = installed[index]
    return _Choice(str(index), gpu.index, gpu.slices[0] if gpu.slices else gpu.uuid, gpu.name)


def _by_uuid(word: str, installed: Sequence[Installed] | None) -> _Choice | None:
    """A GPU by its uuid or a beginning of it that no other GPU shares."""
    if not word.startswith("GPU-"):
        return None
    if installed is None:
        return _Choice(word, uuid=word)
    found = [gpu for gpu in installed if gpu.uuid.startswith(word)]
    return _Choice(found[0].uuid, found[0].index, found[0].uuid, found[0].name) if len(found) == 1 else None


def _by_slice(word: str, installed: Sequence[Installed] | None) -> _Choice | None:
    """A MIG device: MIG-<uuid>, or MIG-GPU-<uuid>/<GPU instance>/<compute instance> as older drivers name it."""
    if not word.startswith("MIG-"):
        return None
    if installed is None:
        return _Choice(word, uuid=word)
    found = [(gpu, uuid) for gpu in installed for uuid in gpu.slices if uuid.startswith(word)]
    if len(found) == 1:
        gpu, uuid = found[0]
        return _Choice(uuid, gpu.index, uuid, gpu.name)
    whole = re.fullmatch(r"MIG-(GPU-[^/]+)/\d+/\d+", word)
    owner = _by_uuid(whole.group(1), installed) if whole and not found else None
    return replace(owner, entry=word, uuid=word) if owner else None


# ---- ROCm ---------------------------------------------------------------------------------------------------------


def _of_rocm(environment: Mapping[str, str], installed: Sequence[Installed] | None) -> list[_Choice] | None:
    """ROCR_VISIBLE_DEVICES chooses among all; HIP_VISIBLE_DEVICES (else CUDA_VISIBLE_DEVICES, else GPU_DEVICE_ORDINAL)
    counts within what it left. None when nothing is set and the driver cannot be asked.

    ROCm documentation, GPU isolation techniques.
    """
    pool = None if installed is None else [_Choice(str(g.index), g.index, g.uuid, g.name) for g in installed]
    if "ROCR_VISIBLE_DEVICES" in environment:
        pool = _first_kept(environment["ROCR_VISIBLE_DEVICES"], pool)
    listed = next((environment[name] for name in HIP_LISTS if name in environment), None)
    if listed is None:
        return None if pool is None else [replace(choice, entry=str(i)) for i, choice in enumerate(pool)]
    return _chosen(listed, lambda word: _within(word.strip(), pool))


HIP_LISTS = ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")


def _first_kept(listed: str, pool: list[_Choice] | None) -> list[_Choice]:
    """ROCR's list: indices and uuids may be mixed; an invalid or repeated name ends it."""
    found: list[_Choice] = []
    for word in listed.split(","):
        choice = _within(word.strip(), pool)
        if choice is None or choice in found:
            break
        found.append(choice)
    return found


def _within(word: str, pool: list[_Choice] | None) -> _Choice | None:
    """One name of a list that counts within a pool: an index in digits alone, or GPU-<uuid>, also abbreviated."""
    if word.isdecimal():
        index = int(word)
        if pool is None:
            return _Choice(word, index)
        return replace(pool[index], entry=str(index)) if index < len(pool) else None
    if not word.startswith("GPU-"):
        return None
    if pool is None:
        return _Choice(word, uuid=word)
    found = [i for i, choice in enumerate(pool) if (choice.uuid or "").lower().startswith(word.lower())]
    return replace(pool[found[0]], entry=str(found[0])) if len(found) == 1 else None


# ---- For a child --------------------------------------------------------------------------------------------------


def child_environment(environment: Mapping[str, str], gpu: Gpu, *, rocm: bool = False) -> dict[str, str]:
    """The environment of a process that is to see this one GPU, and to call its files by the same number."""
    child = {**environment, "CUDA_VISIBLE_DEVICES": gpu.entry, PROCESS_NUMBER: str(gpu.number)}
    if rocm:
        # ROCR's own list stays: the entry counts within what it leaves.
        child["HIP_VISIBLE_DEVICES"] = gpu.entry
        child.pop("GPU_DEVICE_ORDINAL", None)
    return child


def process_number(environment: Mapping[str, str], gpu: Gpu | None) -> int:
    """The number in the names of a process's files: as its parent has given it, else its GPU's, on a cpu 0."""
    given = environment.get(PROCESS_NUMBER, "")
    if given.isdecimal():
        return int(given)
    return gpu.number if gpu else 0


# ---- Asking -------------------------------------------------------------------------------------------------------


def gpus_here(identify: bool = True) -> Visible:
    """The GPUs of this process. identify: also ask torch for their uuids, which starts the GPU's runtime in this
    process; without it torch is only asked how many there are."""
    rocm = torch.version.hip is not None
    count = torch.cuda.device_count()
    seen = [torch_uuid(str(torch.cuda.get_device_properties(i).uuid), rocm) if identify else None for i in range(count)]
    return visible_gpus(os.environ, installed_gpus(rocm), seen, rocm=rocm)


def own_number(gpu: Gpu | None) -> int:
    """The number in the names of this process's files."""
    return process_number(os.environ, gpu)


def torch_uuid(text: str, rocm: bool) -> str:
    """A device's uuid as torch writes it. ROCm puts its 16 hexadecimal digits there as letters, two digits for each."""
    digits = re.sub(r"[^0-9a-f]", "", text.lower())
    if not rocm or len(digits) != 32:
        return text
    letters = bytes.fromhex(digits).decode("ascii", errors="replace")
    return letters if re.fullmatch(r"[0-9a-fA-F]{16}", letters) else text


def installed_gpus(rocm: bool) -> tuple[Installed, ...] | None:
    """All GPUs that the driver's own program lists; None where there is no such program or it fails."""
    if rocm:
        text = _answer(["rocm-smi", "--showuniqueid", "--showproductname", "--json"])
        return None if text is None else read_rocm_listing(text)
    text = _answer(["nvidia-smi", "-L"])
    return None if text is None else read_cuda_listing(text)


def _answer(command: Sequence[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def read_cuda_listing(text: str) -> tuple[Installed, ...]:
    """The GPUs in what `nvidia-smi -L` prints."""
    found: list[Installed] = []
    for line in text.splitlines():
        if gpu := re.match(r"GPU (\d+): (.*?) \(UUID: (GPU-[^)]+)\)", line):
            found.append(Installed(int(gpu.group(1)), gpu.group(3), gpu.group(2)))
        elif (cut := re.match(r"\s+MIG .*\(UUID: (MIG-[^)]+)\)", line)) and found:
            found[-1] = replace(found[-1], slices=(*found[-1].slices, cut.group(1)))
    return tuple(found)


def read_rocm_listing(text: str) -> tuple[Installed, ...] | None:
    """The GPUs in the JSON of `rocm-smi --showuniqueid`; a unique id 0x1f is the uuid GPU-1f in 16 digits."""
    try:
        cards = {int(name.removeprefix("card")): facts for name, facts in json.loads(text).items() if name != "system"}
    except (ValueError, AttributeError):
        return None
    return tuple(
        Installed(index, f"GPU-{str(facts.get('Unique ID', '')).removeprefix('0x').lower().zfill(16)}",
                  str(facts.get("Card series", facts.get("Card Series", ""))))
        for index, facts in sorted(cards.items())
    )  # fmt: skip
