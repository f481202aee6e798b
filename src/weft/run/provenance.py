"""Where an adapter comes from: what is written into its header, so that a file alone can be understood and repeated."""

import json
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weft.run.config import RunConfig
from weft.run.folder import environment

if TYPE_CHECKING:
    from weft.contracts import Engine

PACKAGE = Path(__file__).parents[1]
CPU_INFO = Path("/proc/cpuinfo")


def provenance(config: RunConfig, survey: Any, inputs: Mapping[str, str], engine: "Engine") -> dict[str, str]:
    """Safetensors metadata of all adapters of a run; all values are text. Captions are not in it, nor the names of
    machine and user; the config's own paths and prompts are."""
    facts = environment(str(engine.device))
    return {
        "weft.version": facts["versions"]["weft"] or "",
        "weft.config": json.dumps(config.resolved(), ensure_ascii=False),
        "weft.data": survey.digest(),
        "weft.data.items": "streamed" if getattr(survey, "streamed", False) else str(len(survey.train)),
        "weft.base": inputs["network"],
        "weft.family": config.family.kind,
        "base_model": config.family.source,
        "weft.seed": str(config.seed),
        "weft.versions": json.dumps({**facts["versions"], "python": facts["python"]}),
        "weft.git": facts["git"] or "",
        "weft.source": source_commit(PACKAGE) or "",
        "weft.hardware": hardware(engine.device),
        "weft.processes": str(engine.world),
        "weft.items_per_step": inputs["items_per_step"],
        "weft.precision": engine.precision,
        "weft.started": str(int(time.time())),
    }


def hardware(device: torch.device) -> str:
    """The name of the GPU or, without one, of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu" and CPU_INFO.is_file():
        named = (line.partition(":") for line in CPU_INFO.read_text(errors="replace").splitlines())
        found = next((value.strip() for key, _, value in named if key.strip() == "model name"), "")
        return found or platform.machine()
    return f"{platform.machine()} {device.type}"


def source_commit(package: Path) -> str | None:
    """The commit that Weft's own code is of, with a plus when files have changed; None where it was installed as a
    package, also within a folder that another repository holds."""
    try:
        for asked in (["ls-files", "--error-unmatch", "__init__.py"],
                      ["describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"]):  # fmt: skip
            found = subprocess.run(["git", *asked], cwd=package, capture_output=True, text=True, timeout=5, check=False)
            if found.returncode:
                return None
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
