"""Renew the tree in the README: every file of the package with its sentence. Run: python docs/readme_tree.py"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "src" / "weft"
BEGIN, END = "```text\nsrc/weft/\n", "```"
NAMES = ("Wan", "HunyuanVideo", "Hugging", "Ulysses", "DeepSpeed", "TensorBoard", "PyTorch", "Liger", "LLaMA", "VeOmni",
         "VideoX", "ComfyUI")  # fmt: skip
WIDTH = 26  # of a name with what stands before it


def printed(text: str) -> dict[str, str]:
    """Path -> sentence of the tree as it stands."""
    found, room = {}, ""
    for line in text.partition(BEGIN)[2].partition(END)[0].splitlines():
        name, _, sentence = line.strip().partition(" ")
        if name.endswith("/"):
            room = name
            continue
        found[(room if line.startswith("    ") else "") + name] = sentence.strip()
    return found


def sentence_of(path: Path) -> str:
    """The first sentence of a file, as the tree has it: in lower case, without its full stop."""
    whole = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    first = " ".join(whole.partition("\n\n")[0].split()).partition(". ")[0].rstrip(".")
    return first if first.startswith(NAMES) else first[:1].lower() + first[1:]


def tree(known: dict[str, str]) -> str:
    """The lines of the tree; a sentence that stands there already stays."""
    paths = [path.relative_to(HOUSE) for path in HOUSE.rglob("*.py")]
    paths = sorted(
        (p for p in paths if p.name != "__init__.py" or p.parent == Path()), key=lambda p: (p.parent, p.name)
    )
    lines, room = [], Path()
    for path in paths:
        if path.parent != room:
            room = path.parent
            lines.append(f"  {room.as_posix()}/")
        indent = "    " if room != Path() else "  "
        sentence = known.get(path.as_posix()) or sentence_of(HOUSE / path)
        lines.append(f"{indent}{path.name + ' ':<{WIDTH - len(indent)}}{sentence}".rstrip())
    return "\n".join(lines) + "\n"


def renewed(text: str) -> str:
    """The README's text with the tree of the files that are there."""
    head, _, rest = text.partition(BEGIN)
    return head + BEGIN + tree(printed(text)) + END + rest.partition(END)[2]


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(renewed(readme.read_text("utf-8")), "utf-8")
