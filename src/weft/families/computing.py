"""In what the frozen layers of a network are multiplied: the words of the option, and what does not go with it."""

from typing import Literal

from weft.errors import ConfigError

Compute = Literal["full", "fp8"]
SAID = (
    "in what the frozen layers of the blocks are multiplied, forward and for the input's gradient; full: the engine's "
    "precision; fp8: e4m3 with a scale for each row, from Ada and Hopper on (a CPU emulates it, slowly). That is "
    "APPROXIMATE: each product is off by about 4 %, and the run begins by measuring it. It pays where few tokens or a "
    "wide network make attention small (images, language models: up to 1.6 times as fast; 480p video: 1.1 times), and "
    "these weights then take one byte each. First and last block, embedders, head, norms, attention and adapters stay "
    "as they are. Needs engine.precision=bf16"
)


def check_storage_goes(compute: Compute, dtype: str) -> None:
    """Raises ValueError for weights whose codes nothing multiplies."""
    if compute == "fp8" and dtype in ("int8", "nf4"):
        raise ValueError(
            f"compute: fp8 multiplies eight-bit floats, and dtype={dtype} keeps weights as something else. Write "
            "dtype=auto, or compute=full"
        )


def check_precision_goes(compute: Compute, precision: str) -> None:
    """Raises ConfigError for a precision that what is not in fp8 would be multiplied in."""
    if compute == "fp8" and precision != "bf16":
        raise ConfigError(
            f"family.compute: fp8 answers in bf16, and the engine's precision is {precision} here. Write "
            "engine.precision=bf16, or family.compute=full."
        )
