"""The checks of `weft doctor`: packages, devices, memory, file system, video encoding, copies to each device."""

import io
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module, metadata
from pathlib import Path
from typing import Literal

import torch

from weft.engines.attention_order import chip_of
from weft.engines.transfer import self_test
from weft.engines.visible import Visible, gpus_here
from weft.math.float8 import has_row_scales, lacking
from weft.math.sdpa import backend_of
from weft.math.sdpa_policy import policy_for

LITTLE_DISK = 20 << 30  # bytes; a 14B model and its cache need more


@dataclass(frozen=True)
class Check:
    """One line of the report. warn: works, but not as tested; fail: will not work."""

    group: str
    name: str
    status: Literal["ok", "warn", "fail", "note"]
    detail: str


def all_checks(folder: Path, copies: bool) -> Iterator[Check]:
    """Every check, as it is done. copies: also the self-test of each device."""
    yield from packages()
    yield from gpus(gpus_here())
    for device in devices():
        yield from device_facts(device)
        yield attention(device)
        yield float8(device)
        if copies:
            yield from copy_checks(device)
    yield from memory(folder)
    yield from file_system(folder)
    yield video()


# ---- Packages -----------------------------------------------------------------------------------------------------


def packages() -> Iterator[Check]:
    """Python and every package that Weft's own metadata names, against the range that it names."""
    yield Check("packages", "python", "ok", f"{platform.python_version()} on {platform.platform()}")
    for line in metadata.requires("weft") or ():
        requirement, _, marker = line.partition(";")
        extra = marker.partition("extra ==")[2].strip(" \"'")
        name = re.split(r"[\s\[<>=!~]", requirement.strip())[0]
        if extra != "test" and name != "weft":
            yield package(name, requirement.strip().removeprefix(name).strip(), extra)


def package(name: str, wanted: str, extra: str) -> Check:
    """One installed package. wanted: a range such as '>=5,<6'; extra: the optional group it belongs to, if any."""
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        if extra:
            return Check("packages", name, "note", f"not installed; pip install 'weft[{extra}]' adds it")
        return Check("packages", name, "fail", f"not installed. Run: pip install '{name}{wanted}'")
    if not within(found, wanted):
        return Check("packages", name, "warn", f"{found} is outside of {wanted}, with which Weft is tested")
    return Check("packages", name, "ok", found)


def within(version: str, wanted: str) -> bool:
    """Whether a version such as '2.13.0+cpu' lies in a range such as '>=2.11,<2.14'."""
    found = _numbers(version)
    for limit in filter(None, (part.strip() for part in wanted.split(","))):
        sign, bound = re.match(r"(>=|<=|==|!=|~=|<|>)?(.*)", limit).groups()  # type: ignore[union-attr]
        size = max(len(found), len(_numbers(bound)))
        ours, theirs = (numbers + (0,) * (size - len(numbers)) for numbers in (found, _numbers(bound)))
        holds = {">=": ours >= theirs, "<=": ours <= theirs, "<": ours < theirs, ">": ours > theirs,
                 "!=": ours != theirs, "~=": ours >= theirs, "==": ours == theirs}  # fmt: skip
        if not holds.get(sign or "==", True):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"[\d.]*", version.strip())
    return tuple(int(part) for part in (release.group() if release else "").split(".") if part)


# ---- Devices ------------------------------------------------------------------------------------------------------


def devices() -> list[torch.device]:
    """Every device that torch sees here, the processor last."""
    found = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return [*found, torch.device("cpu")]


def gpus(found: Visible) -> Iterator[Check]:
    """Each GPU that may be used here: its number in file names, what torch calls it, and how a child is given it."""
    for gpu in found.gpus:
        known = ", ".join(word for word in (gpu.name, gpu.uuid) if word)
        place = "number unknown" if gpu.physical is None else f"the driver's {gpu.physical}"
        detail = f"cuda:{gpu.ordinal}, {place}, CUDA_VISIBLE_DEVICES={gpu.entry}" + (f", {known}" if known else "")
        yield Check("gpus", f"gpu {gpu.number}", "ok", detail)
    if not found.gpus:
        yield Check("gpus", "visible", "note", f"none. {_hiding()}".rstrip())
    for note in found.notes:
        yield Check("gpus", "visible", "note", note)


def _hiding() -> str:
    """The variables of this process that may hide GPUs, as they stand."""
    names = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
    return " ".join(f"{name} is '{os.environ[name]}'." for name in names if name in os.environ)


def device_facts(device: torch.device) -> Iterator[Check]:
    yield Check(str(device), "device", "ok", _described(device))
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        fault = _multiplies(device, dtype)
        if not fault and device.type == "cuda" and dtype is torch.bfloat16:
            slow = not torch.cuda.is_bf16_supported(including_emulation=False)
            yield Check(str(device), name, "note" if slow else "ok", "emulated, use fp16" if slow else "in hardware")
        else:
            yield Check(str(device), name, "note" if fault else "ok", fault or "works")


def attention(device: torch.device) -> Check:
    """The order of attention kernels that a run follows here, and what runs of it on two heads of 64."""
    policy = policy_for(chip_of(device))
    q = torch.zeros(1, 2, 128, 64, dtype=torch.float32 if device.type == "cpu" else torch.float16, device=device)
    order = ", ".join(policy.order) or f"torch's own choice ({backend_of(q, q, q)})"
    return Check(str(device), "attention", "warn" if policy.is_slow else "ok", f"{order}: {policy.because}")


def float8(device: torch.device) -> Check:
    """Whether family.compute=fp8 works here."""
    reason = lacking(device)
    if reason is None and device.type == "cpu":
        reason = "emulated, slowly"
    if reason is not None:
        return Check(str(device), "fp8 compute", "note", reason)
    scales = "a scale for each row" if has_row_scales(device) else "scales of rows are multiplied in afterwards"
    return Check(str(device), "fp8 compute", "ok", scales)


def _described(device: torch.device) -> str:
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        api = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        free, total = torch.cuda.mem_get_info(device)
        return (
            f"{facts.name}, {total / 2**30:.1f} GiB ({free / 2**30:.1f} free), capability {facts.major}.{facts.minor}, "
            f"{api}, driver {driver()}"
        )
    if device.type == "mps":
        return f"Apple GPU, macOS {platform.mac_ver()[0]}"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def driver() -> str:
    """The display driver's version; 'unknown' where it cannot be asked."""
    kernel = Path("/sys/module/amdgpu/version")
    if torch.version.hip and kernel.is_file():
        return kernel.read_text().strip()
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (found.splitlines() or ["unknown"])[0].strip()


def _multiplies(device: torch.device, dtype: torch.dtype) -> str:
    """What goes wrong in a product of ones; nothing when it is right."""
    try:
        product = torch.ones(64, 64, dtype=dtype, device=device) @ torch.ones(64, 64, dtype=dtype, device=device)
        return "" if bool((product.float().cpu() == 64).all()) else "gives wrong products"
    except (RuntimeError, TypeError) as error:
        return f"not supported: {str(error).splitlines()[0]}"


def copy_checks(device: torch.device) -> Iterator[Check]:
    """The self-test for GPUs whose copies return zeros (requirement A5)."""
    for probe in self_test(device):
        advice = "" if probe.passed else ". Set engine.verified_copy: true, and update the driver"
        detail = f"{probe.detail} in {probe.seconds:.2f} s{advice}"
        yield Check(str(device), probe.name, "ok" if probe.passed else "fail", detail)


# ---- Machine ------------------------------------------------------------------------------------------------------


def memory(folder: Path) -> Iterator[Check]:
    usage = shutil.disk_usage(folder)
    little = usage.free < LITTLE_DISK
    yield Check("machine", "disk", "warn" if little else "ok", f"{usage.free / 2**30:.1f} GiB free at {folder}")
    free = free_memory()
    yield Check("machine", "memory", "ok" if free else "note", f"{free / 2**30:.1f} GiB free" if free else "unknown")


def free_memory() -> int:
    """Bytes that a new process could take; 0 where the system does not say."""
    info = Path("/proc/meminfo")
    if info.is_file():
        found = re.search(r"^MemAvailable:\s+(\d+) kB", info.read_text(), re.MULTILINE)
        return int(found.group(1)) << 10 if found else 0
    names = os.sysconf_names if platform.system() != "Windows" else {}
    if "SC_PHYS_PAGES" in names:  # macOS counts its whole memory, and not what is free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0


def file_system(folder: Path) -> Iterator[Check]:
    """What checkpoints and caches rely on: a rename that replaces at once, and a file that only one can create."""
    try:
        with tempfile.TemporaryDirectory(prefix=".weft-doctor-", dir=folder) as temporary:
            yield _renames(Path(temporary))
            yield _creates_once(Path(temporary))
    except OSError as error:
        yield Check("machine", "folder", "fail", f"{folder} cannot be written: {error.strerror}. Work in another one.")


def _renames(folder: Path) -> Check:
    old, new = folder / "old", folder / "new"
    old.write_text("old")
    new.write_text("new")
    os.replace(new, old)
    whole = old.read_text() == "new" and not new.exists()
    detail = "replaces files at once" if whole else "does not replace: checkpoints may be lost here"
    return Check("machine", "rename", "ok" if whole else "fail", detail)


def _creates_once(folder: Path) -> Check:
    with (folder / "lock").open("x"):
        try:
            with (folder / "lock").open("x"):
                pass
        except FileExistsError:
            return Check("machine", "locks", "ok", "only one process gets a lock file")
    return Check("machine", "locks", "fail", "two processes get the same lock file: do not share a cache here")


def video() -> Check:
    """Encode some frames as H.264 and count them again."""
    try:
        av = import_module("av")
    except ImportError:
        return Check("machine", "video", "note", "PyAV is not installed; pip install 'weft[video]' adds it")
    try:
        found = _encode_and_count(av)
    except (ValueError, OSError, RuntimeError) as error:  # PyAV's own errors are among these
        return Check("machine", "video", "fail", f"H.264 cannot be encoded: {error}. Reinstall av from PyPI's wheels.")
    version = ".".join(map(str, av.library_versions["libavcodec"]))
    detail = f"H.264 works (libavcodec {version})" if found == 5 else f"5 frames were encoded, {found} came back"
    return Check("machine", "video", "ok" if found == 5 else "fail", detail)


def _encode_and_count(av: object) -> int:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:  # type: ignore[attr-defined]
        stream = container.add_stream("libx264", rate=Fraction(16))
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))  # type: ignore[attr-defined]
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file) as container:  # type: ignore[attr-defined]
        return sum(1 for _ in container.decode(video=0))
