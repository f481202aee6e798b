"""Ready configs: found by their name in configs/ here, then among those that ship with Weft."""

from collections.abc import Iterator
from pathlib import Path

from weft.errors import ConfigError, nearest

HERE = Path("configs")  # in the working folder: a user's own experiments, and what they share
SHIPPED = Path(__file__).parents[1] / "ready"
ENDING = ".yaml"
PARTS = ("model", "paths")  # of experiments, and no experiment


def find_config(path: Path) -> Path:
    """A file as it is written; of a bare name the ready config that it means, or the path as it is where a reader will
    say what is wrong with it. Raises ConfigError with the nearest name."""
    if path.exists() or path.suffix or path.parent != Path():
        return path
    for folder in (HERE, SHIPPED):
        if (file := folder / f"{path.name}{ENDING}").is_file():
            return file
    if near := nearest(path.name, ready_names()):
        raise ConfigError(f"no file and no ready config is called '{path.name}'. Did you mean '{near[0]}'?")
    return path


def ready_names() -> list[str]:
    """Names of the experiments that can be trained as they are, those here first."""
    return list(dict.fromkeys(file.stem for folder in (HERE, SHIPPED) for file in experiments(folder)))


def experiments(folder: Path) -> Iterator[Path]:
    """The experiments in a folder of configs; what they are composed of lies in folders below, or is one of PARTS."""
    return (file for file in sorted(folder.glob(f"*{ENDING}")) if file.stem not in PARTS)


def find_base(folder: Path, base: str) -> Path:
    """The file that a config of this folder extends. For a shipped config the user's own of that name comes first, so
    that a model and paths are written once, in configs/; and anybody's config may extend a shipped part."""
    beside = folder / base
    if folder.resolve().is_relative_to(SHIPPED):
        part = beside.resolve()
        own = HERE / part.relative_to(SHIPPED) if part.is_relative_to(SHIPPED) else HERE / base
        return own if own.is_file() else beside
    return beside if beside.exists() or not (SHIPPED / base).is_file() else SHIPPED / base
