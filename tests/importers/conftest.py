"""Reading a file of another trainer as weft import does, down to a run that is checked."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from weft.importers.detect import importer, recognised
from weft.importers.draft import Draft, Note
from weft.importers.reading import read
from weft.importers.writing import story, written
from weft.run.config import RunConfig

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Imported:
    """run: the config of the draft, checked. text: as it was written, checked too; empty when only read."""

    program: str
    draft: Draft
    text: str
    run: RunConfig

    @property
    def warnings(self) -> list[str]:
        return [note.text for note in self.draft.notes if note.kind == "warn"]

    @property
    def asked(self) -> list[str]:
        """Keys that the user has to fill in."""
        return [note.key for note in self.draft.notes if note.kind == "ask"]

    @property
    def dropped(self) -> dict[str, str]:
        """Their key -> why it has no equivalent."""
        return {note.of: note.text for note in self.draft.notes if note.kind == "drop"}

    def of(self, theirs: str) -> list[Note]:
        """All that is said of one of their keys."""
        return [note for note in self.draft.notes if note.of == theirs]

    @property
    def story(self) -> str:
        return "\n".join(story(self.draft))


Import = Callable[..., Imported]


def import_files(*paths: Path, program: str | None = None, model: str | None = None, write: bool = True) -> Imported:
    """Read, write and parse. program: as --from; None: told by the content. write: also as YAML."""
    files = [read(path) for path in paths]
    found = importer(program or recognised(files))
    draft = Draft(found.name, model)
    found.read(files, draft)
    return Imported(found.name, draft, written(draft) if write else "", RunConfig.model_validate(draft.config()))


@pytest.fixture(scope="session")
def imported() -> Import:
    return import_files


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], Path]:
    """A file of the test's own."""

    def write(text: str, name: str = "train.sh") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write
