"""The house keeps its plan: who may import whom, how large things may be, and what is never written."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "src" / "weft"
TEXTS = {path.relative_to(HOUSE).as_posix(): path.read_text("utf-8") for path in sorted(HOUSE.rglob("*.py"))}
TREES = {name: ast.parse(text, name) for name, text in TEXTS.items()}
FILE_LINES, FUNCTION_LINES, NESTING = 400, 60, 4
BLOCKS = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.Match)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
IMPORTS = (ast.Import, ast.ImportFrom)


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """(place, function) of the whole house."""
    for name, tree in TREES.items():
        yield from ((f"{name}:{n.lineno} {n.name}", n) for n in ast.walk(tree) if isinstance(n, FUNCTIONS))


def nesting(node: ast.AST) -> int:
    """Blocks inside one another; an elif is none, and neither is what an inner function holds."""
    inner = [child for child in ast.iter_child_nodes(node) if not isinstance(child, (*FUNCTIONS, ast.ClassDef))]
    elifs = node.orelse if isinstance(node, ast.If) and len(node.orelse) == 1 else []
    return max((nesting(child) + (isinstance(child, BLOCKS) and child not in elifs) for child in inner), default=0)


def section_classes() -> set[str]:
    """Names of all config sections: Section, and what inherits from one."""
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for tree in TREES.values()
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }
    found = {"Section"}
    while more := {name for name, parents in bases.items() if parents & found} - found:
        found |= more
    return found


SECTIONS = section_classes()


def defines_a_section(name: str) -> bool:
    return any(isinstance(node, ast.ClassDef) and node.name in SECTIONS for node in TREES[name].body)


def may_import_late(name: str) -> bool:
    """Sections are read without torch, the command line starts at once, and plug-ins are named before they exist."""
    return name.startswith(("cli/", "demo/")) or name in ("plugins.py", "__init__.py") or defines_a_section(name)


def test_every_room_imports_only_what_stands_below_it():
    lint = "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache'])"
    done = subprocess.run([sys.executable, "-c", lint], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_no_file_is_longer_than_400_lines():
    assert {name: text.count("\n") for name, text in TEXTS.items() if text.count("\n") > FILE_LINES} == {}


def test_no_function_is_longer_than_a_screen_or_nested_deeply():
    sizes = {place: ((node.end_lineno or 0) - node.lineno + 1, nesting(node)) for place, node in functions()}
    assert {p: size for p, size in sizes.items() if size[0] > FUNCTION_LINES or size[1] > NESTING} == {}


def test_every_file_begins_with_its_sentence_and_every_face_is_empty():
    faces = [name for name in TEXTS if name.endswith("/__init__.py")]
    assert [name for name in faces if TEXTS[name]] == []
    assert [name for name, tree in TREES.items() if name not in faces and not ast.get_docstring(tree)] == []


def is_optional(node: ast.AST) -> bool:
    """An extra that few have is imported where it is used."""
    return isinstance(node, ast.Import) and [name.name for name in node.names] == ["bitsandbytes"]


def test_imports_stand_at_the_top_and_name_whole_paths():
    late = [
        f"{place}: {ast.unparse(node)}"
        for place, function in functions()
        for node in ast.walk(function)
        if isinstance(node, IMPORTS) and not may_import_late(place.partition(":")[0]) and not is_optional(node)
    ]
    relative = [n for n, tree in TREES.items() for i in ast.walk(tree) if isinstance(i, ast.ImportFrom) and i.level]
    assert late == [] and relative == []


def knows_ranks(name: str) -> bool:
    """Engines talk to other processes; what a sharded tensor is, one file on the ground floor says."""
    return name.startswith("engines/") or name == "math/sharded.py"


def faults(name: str) -> Iterator[str]:
    """What a file may not say: code out of data, printing below the command line, promises instead of work."""
    for node in ast.walk(TREES[name]):
        text = ast.unparse(node) if isinstance(node, (ast.Call, ast.Raise, *IMPORTS)) else ""
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        runs_data = called in ("eval", "exec") or (called == "torch.load" and "weights_only=True" not in text)
        pickles = isinstance(node, IMPORTS) and any(word in text for word in ("pickle", "marshal", "shelve"))
        promises = isinstance(node, ast.Raise) and "NotImplementedError" in text
        prints = called == "print" and not name.startswith("cli/")
        talks_to_ranks = isinstance(node, IMPORTS) and "distributed" in text and not knows_ranks(name)
        if runs_data or pickles or promises or prints or talks_to_ranks:
            yield f"{name}:{node.lineno}: {text}"
    yield from (f"{name}: {word}" for word in ("TODO", "FIXME") if word in TEXTS[name])


def test_nothing_is_left_undone_and_no_file_that_is_read_can_run():
    assert [fault for name in TEXTS for fault in faults(name)] == []
