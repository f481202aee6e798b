"""Which attention each kind of chip runs, and what is refused there."""

import pytest

from weft.errors import ConfigError
from weft.math.sdpa_policy import Chip, policy_for, spelled

HOPPER = Chip("cuda", (9, 0), 91900)


@pytest.mark.parametrize(
    ("chip", "order"),
    [
        (HOPPER, ("cudnn", "flash", "efficient", "math")),
        (Chip("cuda", (10, 0), 91501), ("cudnn", "flash", "efficient", "math")),
        (Chip("cuda", (9, 0), 91500), ("flash", "efficient", "math")),  # wrong where 128 does not divide the tokens
        (Chip("cuda", (9, 0), None), ("flash", "efficient", "math")),
        (Chip("cuda", (8, 9), 91900), ("flash", "efficient", "cudnn", "math")),
        (Chip("cuda", (8, 0), 91900), ("flash", "efficient", "cudnn", "math")),
        (Chip("cuda", (12, 0), 91900), ("flash", "efficient", "cudnn", "math")),
        (Chip("cuda", (7, 5), 91900), ("efficient", "math")),
        (Chip("cuda", (7, 0), 91900), ("efficient", "math")),
        (Chip("cuda", (9, 4), None, hip=True), ()),
        (Chip("mps"), ()),
        (Chip("cpu"), ()),
    ],
)
def test_each_generation_has_its_order(chip: Chip, order: tuple[str, ...]) -> None:
    policy = policy_for(chip)
    assert policy.order == order and policy.flash is None and policy.because


def test_flash_attention_2_is_refused_on_hopper_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"family.attention: 'flash' would run flash attention 2 .* 0.6 of the speed"):
        policy_for(HOPPER, "flash")
    assert policy_for(Chip("cuda", (8, 9), 91900), "flash").order == ()  # there it is the flash-attn package's own


@pytest.mark.parametrize(
    ("chip", "version"),
    [
        (Chip("cuda", (9, 0), 91900, flash=("FA3", "FA4")), "FA3"),
        (Chip("cuda", (9, 0), 91900, flash=("FA4",)), "FA4"),
        (Chip("cuda", (10, 0), 91900, flash=("FA3", "FA4")), "FA4"),
    ],
)
def test_flash_on_the_large_chips_is_a_later_version_where_that_is_installed(chip: Chip, version: str) -> None:
    assert policy_for(chip, "flash").flash == version
    assert policy_for(chip, "flash").order[0] == "flash"


def test_the_third_version_is_nothing_for_blackwell() -> None:
    with pytest.raises(ConfigError, match="flash-attn 3 or 4"):
        policy_for(Chip("cuda", (10, 0), 91900, flash=("FA3",)), "flash")


def test_a_cudnn_that_is_wrong_is_refused_by_its_version() -> None:
    with pytest.raises(ConfigError, match=r"'cudnn' is 9\.10\.2 here, and before 9\.15\.1"):
        policy_for(Chip("cuda", (9, 0), 91002), "cudnn")
    assert policy_for(HOPPER, "cudnn").order == ("cudnn", "math")


def test_a_choice_is_followed_and_native_leaves_torch_its_own() -> None:
    assert policy_for(HOPPER, "math").order == ("math",)
    assert policy_for(HOPPER, "efficient").order == ("efficient", "math")
    assert policy_for(HOPPER, "native").order == policy_for(HOPPER, "flex").order == ()
    assert policy_for(HOPPER, "sdpa") == policy_for(HOPPER, "auto")


def test_versions_are_spelled() -> None:
    assert (spelled(91501), spelled(91002), spelled(None)) == ("9.15.1", "9.10.2", "(none)")
