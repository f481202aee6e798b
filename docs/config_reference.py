"""Write the reference in docs/config.md anew, from the config's own types: python docs/config_reference.py"""

from pathlib import Path

from weft.config.explain import explain, keys
from weft.run.config import RunConfig

DOCUMENT = Path(__file__).with_name("config.md")
BEGIN, END = "<!-- reference: written by docs/config_reference.py -->", "<!-- end of reference -->"


def section_paths() -> list[str]:
    """Dotted paths of all sections, the whole run first; '' is the run. List items stand under their list, and what a
    role may have of its own under adapter and optimizer."""
    around = [key.rpartition(".")[0].removesuffix(".0") for key in keys(RunConfig)]
    return [path for path in dict.fromkeys(around) if not path.startswith("roles.NAME.")]


def reference() -> str:
    """Every section's help, each under its own heading."""
    parts = [f"### {path or 'a run'}\n\n```text\n{explain(RunConfig, path)}\n```" for path in section_paths()]
    return "\n\n".join(parts)


def renewed(text: str) -> str:
    """The document with its reference written anew."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{reference()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    DOCUMENT.write_text(renewed(DOCUMENT.read_text("utf-8")), "utf-8")
