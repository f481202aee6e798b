"""What a field means: its description, or the comment behind it in the section's source."""

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Mapping
from functools import cache

from pydantic import BaseModel


def meaning(section: type[BaseModel], name: str) -> str:
    """The field's help without a full stop; empty when there is none."""
    words = section.model_fields[name].description or ""
    if not words:
        owner = next((c for c in section.__mro__ if name in vars(c).get("__annotations__", {})), section)
        words = _comments(owner).get(name, "")
    return words.strip().rstrip(".")


def summary(section: type[BaseModel]) -> str:
    """The first sentence of the section's docstring."""
    return inspect.cleandoc(section.__doc__ or "").partition("\n")[0]


@cache
def _comments(section: type) -> Mapping[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(section))
    except (OSError, TypeError):  # a class that was made, not written
        return {}
    comments: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("# type:", "# noqa", "# fmt")):
            comments[token.start[0]] = token.string.lstrip("# ").strip()
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for line in body.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            lines = range(line.lineno, (line.end_lineno or line.lineno) + 1)
            words = " ".join(comments[number] for number in lines if number in comments)
            if words:
                found[line.target.id] = words.partition("  # type:")[0]
    return found
