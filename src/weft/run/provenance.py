"""Where an adapter comes from: what is written into its header, so that a file alone can be understood and repeated."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from weft.run.config import RunConfig
from weft.run.folder import environment

if TYPE_CHECKING:
    import torch


def provenance(config: RunConfig, survey: Any, identity: Mapping[str, str], device: "torch.device") -> dict[str, str]:
    """Safetensors metadata: all values are text. Captions are not in it; the config's own paths and prompts are."""
    facts = environment(str(device))
    return {
        "weft.version": facts["versions"]["weft"] or "",
        "weft.config": json.dumps(config.resolved(), ensure_ascii=False),
        "weft.data": survey.digest(),
        "weft.data.items": "streamed" if getattr(survey, "streamed", False) else str(len(survey.train)),
        "weft.base": identity["network"],
        "weft.family": config.family.kind,
        "base_model": config.family.source,
        "weft.seed": str(config.seed),
        "weft.versions": json.dumps(facts["versions"]),
        "weft.git": facts["git"] or "",
    }
