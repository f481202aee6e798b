"""Which attention kernels a chip should run, in what order, and why: a table that knows chips and no process."""

from dataclasses import dataclass

from weft.errors import ConfigError

GOOD_CUDNN = 91501  # 9.15.1: older ones are wrong where 128 does not divide the number of tokens
HOPPER, CONSUMER_BLACKWELL = 9, 12
FLASH_PACKAGES = {"FA3": "flash_attn_interface", "FA4": "flash_attn.cute"}  # as torch's registry knows them


@dataclass(frozen=True)
class Chip:
    """What decides. kind: cuda, mps, cpu, ... capability: (9, 0) of a Hopper. cudnn: 91501 is 9.15.1; None: there is
    none. hip: of AMD. flash: the later flash attentions whose packages are installed, FA3 or FA4."""

    kind: str
    capability: tuple[int, int] = (0, 0)
    cudnn: int | None = None
    hip: bool = False
    flash: tuple[str, ...] = ()

    @property
    def is_datacenter(self) -> bool:
        """Hopper and the large Blackwells, on which the second flash attention leaves half of the chip idle."""
        return self.kind == "cuda" and not self.hip and HOPPER <= self.capability[0] < CONSUMER_BLACKWELL


@dataclass(frozen=True)
class Policy:
    """order: kernels, best first; the others are switched off. (): torch's own choice. flash: version of the flash
    attention that is put in the place of torch's own. because: for the log, one clause. is_slow: whether the machine
    could do better with other software."""

    order: tuple[str, ...]
    because: str
    flash: str | None = None
    is_slow: bool = False


def policy_for(chip: Chip, choice: str = "auto") -> Policy:
    """What `family.attention` comes to on a chip. Raises ConfigError for a kernel that would be the wrong one there."""
    if choice == "flash" and chip.is_datacenter:
        return Policy(("flash", "efficient", "math"), "family.attention asks for it", _later_flash(chip))
    if choice in ("cudnn", "efficient", "math"):
        check_cudnn(chip, choice)
        return Policy(tuple(dict.fromkeys((choice, "math"))), "family.attention asks for it")
    if choice not in ("auto", "sdpa"):
        return Policy((), "family.attention leaves torch its own choice")
    return _best(chip)


def _best(chip: Chip) -> Policy:
    if chip.kind == "cpu":
        return Policy((), "a CPU has one fused kernel")
    if chip.kind != "cuda":
        return Policy((), "torch chooses on this kind of device")
    if chip.hip:
        return Policy((), "AMD's kernels are torch's own choice")
    if chip.capability < (8, 0):
        return Policy(("efficient", "math"), "before Ampere only the memory-efficient kernel runs")
    if not chip.is_datacenter:
        return Policy(("flash", "efficient", "cudnn", "math"), "flash attention 2 is made for this generation")
    if chip.cudnn is None or chip.cudnn < GOOD_CUDNN:
        return Policy(
            ("flash", "efficient", "math"),
            f"cuDNN {spelled(chip.cudnn)} is older than 9.15.1, which alone is right for any number of tokens; with a "
            "newer one (pip install -U nvidia-cudnn-cu13) attention takes about 0.6 of the time",
            is_slow=True,
        )
    return Policy(("cudnn", "flash", "efficient", "math"), f"cuDNN {spelled(chip.cudnn)} is the fastest of torch's own")


def _later_flash(chip: Chip) -> str:
    """The best later flash attention that is installed. Raises ConfigError where there is none."""
    able = [version for version in chip.flash if version == "FA4" or chip.capability[0] == HOPPER]
    if not able:
        raise ConfigError(
            "family.attention: 'flash' would run flash attention 2 here, at about 0.6 of the speed that cuDNN has on "
            f"this chip (capability {chip.capability[0]}.{chip.capability[1]}). Write family.attention=auto, or "
            "install flash-attn 3 or 4 (flash_attn_interface or flash_attn.cute), which torch then runs in its place."
        )
    return min(able)  # on Hopper the third, which was written for it


def check_cudnn(chip: Chip, choice: str) -> None:
    """Raises ConfigError where cuDNN is asked for and would give wrong numbers."""
    if choice == "cudnn" and chip.kind == "cuda" and not chip.hip and (chip.cudnn or 0) < GOOD_CUDNN:
        raise ConfigError(
            f"family.attention: 'cudnn' is {spelled(chip.cudnn)} here, and before 9.15.1 it is wrong where 128 does "
            "not divide the number of tokens. Write family.attention=auto, or update cuDNN."
        )


def spelled(version: int | None) -> str:
    """9.15.1 of 91501."""
    if version is None:
        return "(none)"
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"
