"""Names, shapes and dtypes of the tensors in a PyTorch file, by looking at its pickle's instructions: none is carried
out, so a file that would run code runs none."""

import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from weft.errors import ModelError

LARGEST = 1 << 27  # bytes of instructions: those of a network of 10,000 tensors take some MB
DTYPES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip

# ---- Instructions -------------------------------------------------------------------------------------------------
# Of protocols 2 to 5, by the letters of CPython's Lib/pickle.py. Those of older protocols come in no file of tensors.

PLAIN = {
    b".": "STOP", b"(": "MARK", b"}": "EMPTY_DICT", b"]": "EMPTY_LIST", b")": "EMPTY_TUPLE", b"\x8f": "EMPTY_SET",
    b"\x94": "MEMOIZE", b"s": "SETITEM", b"u": "SETITEMS", b"a": "APPEND", b"e": "APPENDS", b"\x90": "APPENDS",
    b"b": "BUILD", b"t": "TUPLE", b"\x85": "TUPLE1", b"\x86": "TUPLE2", b"\x87": "TUPLE3", b"l": "LIST", b"d": "DICT",
    b"\x93": "STACK_GLOBAL", b"R": "REDUCE", b"\x81": "NEWOBJ", b"Q": "BINPERSID", b"N": "NONE", b"\x88": "NEWTRUE",
    b"\x89": "NEWFALSE",
}  # fmt: skip
NUMBERS = {
    b"\x80": ("PROTO", "<B"), b"\x95": ("FRAME", "<Q"), b"q": ("PUT", "<B"), b"r": ("PUT", "<I"), b"h": ("GET", "<B"),
    b"j": ("GET", "<I"), b"K": ("PUSH", "<B"), b"M": ("PUSH", "<H"), b"J": ("PUSH", "<i"), b"G": ("PUSH", ">d"),
}  # fmt: skip
BYTES = {
    b"X": "<I", b"\x8c": "<B", b"\x8d": "<Q", b"U": "<B", b"T": "<I", b"C": "<B", b"B": "<I", b"\x8a": "<B",
    b"\x8e": "<Q",
}  # fmt: skip
TEXTS = (b"X", b"\x8c", b"\x8d", b"U", b"T")
LONG = b"\x8a"


def instructions(raw: bytes) -> Iterator[tuple[str, Any]]:
    """Name and argument of each. Raises ValueError for one that a file of tensors does not need."""
    file = BytesIO(raw)
    while letter := file.read(1):
        if letter in PLAIN:
            yield PLAIN[letter], None
        elif letter in NUMBERS:
            name, form = NUMBERS[letter]
            yield name, _number(file, form)
        elif letter in BYTES:
            held = file.read(_number(file, BYTES[letter]))
            text = held.decode(errors="replace") if letter in TEXTS else held
            yield "PUSH", int.from_bytes(held, "little", signed=True) if letter == LONG else text
        elif letter == b"c":
            yield "GLOBAL", (_line(file), _line(file))
        else:
            raise ValueError(f"instruction {letter!r}")


def _number(file: BytesIO, form: str) -> Any:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _line(file: BytesIO) -> str:
    return file.readline().decode(errors="replace").rstrip("\n")


# ---- What they would make -----------------------------------------------------------------------------------------

TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
MARK = object()
FRESH: Mapping[str, Callable[[], Any]] = {
    "MARK": lambda: MARK, "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": list, "NONE": lambda: None,
    "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
}  # fmt: skip


@dataclass(frozen=True)
class Named:
    """A class or function of the file's, which stays a name."""

    module: str
    name: str


@dataclass(frozen=True)
class Made:
    """What the instructions would call, with what."""

    called: Any
    given: Any


@dataclass
class Machine:
    """A stack on which dictionaries, tuples, lists, numbers and texts are built, and nothing else."""

    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def since_mark(self) -> list[Any]:
        at = max(i for i, item in enumerate(self.stack) if item is MARK)
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def take(self, count: int) -> list[Any]:
        start = len(self.stack) - count
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def step(self, name: str, argument: Any) -> None:
        """One instruction."""
        stack = self.stack
        if name in ("PROTO", "FRAME", "STOP"):
            return
        if name in ("PUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = stack[-1]
        elif name in ("SETITEM", "SETITEMS"):
            self._set(self.take(2) if name == "SETITEM" else self.since_mark())
        elif name in ("APPEND", "APPENDS"):
            items = self.take(1) if name == "APPEND" else self.since_mark()
            if isinstance(stack[-1], list):
                stack[-1].extend(items)
        elif name == "BUILD":  # the state of an object, which nobody asks for
            stack.pop()
        else:
            stack.append(self._made(name, argument))

    def _set(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            pairs_of = zip(pairs[::2], pairs[1::2], strict=True)
            target.update({key: value for key, value in pairs_of if isinstance(key, str | int | float)})

    def _made(self, name: str, argument: Any) -> Any:
        """What an instruction puts on the stack."""
        if name in FRESH:
            return FRESH[name]()
        if name in TUPLES:
            return tuple(self.take(TUPLES[name]))
        if name in ("TUPLE", "LIST"):
            return tuple(self.since_mark())
        if name == "DICT":
            items = self.since_mark()
            return dict(zip(items[::2], items[1::2], strict=True))
        if name == "GET":
            return self.memo[argument]
        if name == "GLOBAL":
            return Named(*argument)
        if name == "STACK_GLOBAL":
            return Named(*map(str, self.take(2)))
        if name in ("REDUCE", "NEWOBJ"):
            called, given = self.take(2)
            return {} if called == Named("collections", "OrderedDict") else Made(called, given)
        return self.stack.pop() if name == "BINPERSID" else argument


# ---- Tensors ------------------------------------------------------------------------------------------------------


def tensors_in(path: Path) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    """Name -> (safetensors' dtype, shape) of the tensors in a PyTorch file, also those one dictionary deeper. Raises
    ModelError for a file that is none, or is of PyTorch's old form."""
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
            if entry is None or archive.getinfo(entry).file_size > LARGEST:
                raise ModelError(f"{path} is a zip archive, but no file of PyTorch's.")
            raw = archive.read(entry)
    except zipfile.BadZipFile:
        raise ModelError(
            f"{path} is a pickle in PyTorch's old form, or another file. Weft loads no pickles to look at them: "
            "convert it to safetensors."
        ) from None
    machine = Machine()
    try:
        for name, argument in instructions(raw):
            machine.step(name, argument)
        return _tensors(machine.stack[-1])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error) as damaged:
        raise ModelError(f"{path}: its pickle cannot be followed ({damaged}). Convert it to safetensors.") from None


def _tensors(held: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Those of a dictionary, or else of the first one in it that has some."""
    if not isinstance(held, dict):
        return {}
    found = {str(name): entry for name, value in held.items() if (entry := _tensor(value))}
    return found or next((deeper for value in held.values() if (deeper := _tensors(value))), {})


def _tensor(value: Any) -> tuple[str, tuple[int, ...]] | None:
    """torch._utils._rebuild_tensor_v2((storage, its type, key, place, numbers), offset, size, stride, gradient, hooks);
    v3, of younger dtypes, has the dtype behind them."""
    if not (isinstance(value, Made) and isinstance(value.called, Named) and value.called.module == "torch._utils"):
        return None
    if value.called.name == "_rebuild_parameter":
        return _tensor(value.given[0])
    if value.called.name not in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
        return None
    storage, _, size, _, _, _, *younger = value.given
    kind: str = (younger[0] if value.called.name.endswith("v3") else storage[1]).name
    return DTYPES.get(kind, kind), tuple(size)
