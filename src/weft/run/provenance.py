"""Where an adapter comes from: what is written into its header, so that a file alone can be understood and repeated."""

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import TYPE_CHECKING

from weft.data.survey import Survey
from weft.run.config import RunConfig
from weft.run.folder import environment

if TYPE_CHECKING:
    import torch


def manifest_hash(survey: Survey) -> str:
    """Hash over what every training item is: key, captions, bucket, repeats, rate. The data as it was trained on."""
    digest = sha256()
    for clip in survey.train:
        rate = (clip.stride, clip.declared_fps)
        digest.update(repr((clip.key, clip.captions, clip.bucket, clip.repeats, rate)).encode())
    return digest.hexdigest()


def provenance(
    config: RunConfig, survey: Survey, identity: Mapping[str, str], device: "torch.device"
) -> dict[str, str]:
    """Safetensors metadata: all values are text. Captions are not in it; the config's own paths and prompts are."""
    facts = environment(str(device))
    return {
        "weft.version": facts["versions"]["weft"] or "",
        "weft.config": json.dumps(config.resolved(), ensure_ascii=False),
        "weft.data": manifest_hash(survey),
        "weft.data.items": str(len(survey.train)),
        "weft.base": identity["network"],
        "weft.family": config.family.kind,
        "base_model": config.family.source,
        "weft.seed": str(config.seed),
        "weft.versions": json.dumps(facts["versions"]),
        "weft.git": facts["git"] or "",
    }
