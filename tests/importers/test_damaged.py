"""A file that was damaged anywhere is read or refused with a sentence; it is never a fault of Weft."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.importers.conftest import CONFIGS, Import
from weft.errors import WeftError
from weft.importers.detect import IMPORTERS

SPICE = ("'", '"', "[", "]", "{", "}", "=", "--", "\\", "\n", "$", "$(x)", "`", "nan", "inf", "-1", "1e999", "true",
         "None", "\x00", "é", "(", ")", ",", "9" * 30, "#", "\t", ";", "&a", "*a")  # fmt: skip


def damaged(text: str, rng: random.Random) -> str:
    """One to three pieces taken out, put in or replaced."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(text))
        end = at + rng.choice((0, 0, 1, 6, 12))
        text = text[:at] + rng.choice(("", *SPICE)) + text[end:]
    return text


@pytest.mark.parametrize("program", IMPORTERS)
def test_a_damaged_file_is_read_or_refused(program: str, imported: Import, script: Callable[..., Path]):
    rng = random.Random(7)
    files = sorted(path for path in (CONFIGS / program).iterdir() if path.is_file() and path.suffix != ".txt")
    for _ in range(12):
        original = rng.choice(files)
        path = script(damaged(original.read_text(), rng), original.name)
        try:
            imported(path, program=program)
        except WeftError as refused:
            assert str(refused).strip()
