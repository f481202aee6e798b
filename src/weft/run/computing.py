"""Whether a run's products can be made in fp8, which a device, an objective and a family must agree to."""

import torch

from weft.contracts import ModelFamily
from weft.errors import ConfigError
from weft.families.causal_lm import CausalLM
from weft.families.video_model import VideoModel
from weft.math.float8 import lacking


def compute_of(family: ModelFamily) -> str:
    """full or fp8; of a family of a plug-in, which has no such option, full."""
    return family.compute if isinstance(family, VideoModel | CausalLM) else "full"


def check_compute(family: ModelFamily, needs: frozenset[str], device: torch.device) -> None:
    """Raises ConfigError where a family is to be multiplied in fp8 and the device, or the objective, cannot."""
    if compute_of(family) == "full":
        return
    reason = lacking(device)
    if reason is None and "functional" in needs:
        reason = "this objective differentiates twice, and rounded products have no second derivative"
    if reason is not None:
        raise ConfigError(f"family.compute: fp8 cannot be used here, for {reason}. Write family.compute=full.")
