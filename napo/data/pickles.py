"""Data frames out of pickles, without unpickling: nothing that the file names is ever imported, called or built.

A pickle is a program for a small stack machine. ``pickle.Unpickler`` runs it with the real classes, and the classes of
numpy and pandas trust what they are given: a made-up dtype turns bytes of the file into object pointers. Here the
machine knows lists, tuples, dicts with text as keys, numbers and text; a global is a name, a call of it is a record of
the name and its arguments, and ``read_frame`` picks the columns out of those records. No step of it recurses into what
the file nests, and bounds on bytes, steps, containers and entries keep time and memory in proportion.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

from .texts import shown

MOST_BYTES = 1 << 27  # fifty times the biggest file of the field; no step goes back, so it bounds the steps too
MOST_CONTAINERS = 20_000_000
MOST_COLUMNS = 1000
MOST_ENTRIES = 10_000_000  # of one column's lists together: a list may stand in many rows and cost two bytes in each
MOST_OPEN = 100  # containers begun and not ended

# Everything that the pickle of a frame of plain columns names, in old and new pandas and numpy.
GLOBALS = {
    ("builtins", "slice"): "slice",
    ("__builtin__", "slice"): "slice",
    ("_codecs", "encode"): "encode",
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("numpy._core.multiarray", "_reconstruct"): "_reconstruct",
    ("numpy._core.multiarray", "scalar"): "scalar",
    ("numpy._core.numeric", "_frombuffer"): "_frombuffer",
    ("pandas", "DataFrame"): "DataFrame",
    ("pandas.core.frame", "DataFrame"): "DataFrame",
    ("pandas.core.internals.managers", "BlockManager"): "BlockManager",
    ("pandas._libs.internals", "_unpickle_block"): "_unpickle_block",
    ("pandas", "Index"): "Index",
    ("pandas", "RangeIndex"): "RangeIndex",
    ("pandas.core.indexes.base", "Index"): "Index",
    ("pandas.core.indexes.base", "_new_Index"): "_new_Index",
    ("pandas.core.indexes.range", "RangeIndex"): "RangeIndex",
    ("pandas.core.indexes.numeric", "Int64Index"): "Index",
}
# numpy's codes of plain numbers -> struct's
NUMBERS = {"i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q", "f4": "f", "f8": "d"}


class Global:
    """A global name in the file."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Made:
    """A call that is not made: the name, its arguments, and the state set afterwards."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name, self.args, self.state = name, args, None


class _Machine:
    def __init__(self, content: bytes) -> None:
        self.content = content
        self.at = 0
        self.containers = 0

    def take(self, count: int) -> bytes:
        part = self.content[self.at : self.at + count]
        if len(part) != count:
            raise EOFError("it ends early")
        self.at += count
        return part

    def sized(self, width: int) -> bytes:
        return self.take(int.from_bytes(self.take(width), "little"))

    def line(self) -> str:
        end = self.content.index(b"\n", self.at, self.at + 1000)
        return self.take(end + 1 - self.at)[:-1].decode("ascii")

    def new(self, container: Any) -> Any:
        """Counts the memory of instructions that take more than their own bytes."""
        self.containers += 1
        if self.containers > MOST_CONTAINERS:
            raise ValueError(f"more than {MOST_CONTAINERS} lists and tuples; is it a file of LLaRA?")
        return container

    def run(self) -> Any:
        """The value that the program leaves on the stack."""
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}
        content, push = self.content, stack.append

        def since_mark() -> list[Any]:
            begin = marks.pop()
            items = stack[begin:]
            del stack[begin:]
            return items

        # From the most to the least frequent: sequences of small integers are nearly all of a file.
        while True:
            code = content[self.at]
            self.at += 1
            if code == 0x4D:  # BININT2
                push(int.from_bytes(self.take(2), "little"))
            elif code == 0x4B:  # BININT1
                push(content[self.at])
                self.at += 1
            elif code == 0x94:  # MEMOIZE
                memo[len(memo)] = self.new(stack[-1])
            elif code == 0x28:  # MARK
                marks.append(len(stack))
                if len(marks) > MOST_OPEN:
                    raise ValueError("nested deeper than a data frame")
            elif code == 0x65:  # APPENDS
                items = since_mark()
                _list(stack[-1]).extend(items)
            elif code == 0x5D:  # EMPTY_LIST
                push(self.new([]))
            elif code == 0x86:  # TUPLE2
                stack[-2:] = [self.new((stack[-2], stack[-1]))]
            elif code == 0x68:  # BINGET
                push(memo[content[self.at]])
                self.at += 1
            elif code == 0x6A:  # LONG_BINGET
                push(memo[int.from_bytes(self.take(4), "little")])
            elif code == 0x71:  # BINPUT
                memo[content[self.at]] = self.new(stack[-1])
                self.at += 1
            elif code == 0x72:  # LONG_BINPUT
                memo[int.from_bytes(self.take(4), "little")] = self.new(stack[-1])
            elif code == 0x4A:  # BININT
                push(int.from_bytes(self.take(4), "little", signed=True))
            elif code == 0x8A:  # LONG1
                digits = self.sized(1)
                if len(digits) > 9:
                    raise ValueError("an integer of more than 64 bits")
                push(int.from_bytes(digits, "little", signed=True))
            elif code == 0x47:  # BINFLOAT
                push(struct.unpack(">d", self.take(8))[0])
            elif code in (0x58, 0x8C, 0x8D):  # BINUNICODE, SHORT_BINUNICODE, BINUNICODE8
                push(self.sized({0x58: 4, 0x8C: 1, 0x8D: 8}[code]).decode("utf-8", "surrogatepass"))
            elif code in (0x42, 0x43, 0x8E, 0x96):  # BINBYTES, SHORT_BINBYTES, BINBYTES8, BYTEARRAY8
                push(self.sized({0x42: 4, 0x43: 1, 0x8E: 8, 0x96: 8}[code]))
            elif code in (0x4E, 0x88, 0x89):  # NONE, NEWTRUE, NEWFALSE
                push({0x4E: None, 0x88: True, 0x89: False}[code])
            elif code == 0x29:  # EMPTY_TUPLE
                push(())
            elif code == 0x85:  # TUPLE1
                stack[-1] = self.new((stack[-1],))
            elif code == 0x87:  # TUPLE3
                stack[-3:] = [self.new((stack[-3], stack[-2], stack[-1]))]
            elif code == 0x74:  # TUPLE
                push(self.new(tuple(since_mark())))
            elif code == 0x61:  # APPEND
                item = stack.pop()
                _list(stack[-1]).append(item)
            elif code == 0x7D:  # EMPTY_DICT
                push(self.new({}))
            elif code in (0x73, 0x75):  # SETITEM, SETITEMS
                pairs = since_mark() if code == 0x75 else [stack.pop(-2), stack.pop()]
                if type(stack[-1]) is not dict or any(type(name) is not str for name in pairs[::2]):
                    raise ValueError("a dict whose keys are not text")
                stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))
            elif code == 0x63:  # GLOBAL
                push(_global(self.line(), self.line()))
            elif code == 0x93:  # STACK_GLOBAL
                name, module = stack.pop(), stack.pop()
                push(_global(module, name))
            elif code in (0x52, 0x81):  # REDUCE, NEWOBJ
                args, called = stack.pop(), stack.pop()
                if type(args) is not tuple or type(called) is not Global:
                    raise ValueError("a call of what is no name")
                push(self.new(Made(called.name, args)))
            elif code == 0x62:  # BUILD
                state = stack.pop()
                if type(stack[-1]) is not Made or stack[-1].state is not None:
                    raise ValueError("a state for what has none")
                stack[-1].state = state
            elif code == 0x80:  # PROTO
                self.take(1)
            elif code == 0x95:  # FRAME: how much to read at once, and it is all here
                self.take(8)
            elif code == 0x30:  # POP
                stack.pop()
            elif code == 0x2E:  # STOP
                return stack.pop()
            else:
                raise ValueError(
                    f"opcode {code:#04x} at byte {self.at - 1}, which the pickle of a data frame does not have; save "
                    "the frame again with protocol 4"
                )


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise ValueError("entries for what is no list")
    return value


def _global(module: Any, name: Any) -> Global:
    if type(module) is not str or type(name) is not str:
        raise ValueError("a global whose name is no text")
    found = GLOBALS.get((module.replace("numpy.core.", "numpy._core.", 1), name))
    if found:
        return Global(found)
    called = shown(f"{module}.{name}", 100)
    if module.split(".")[0] in ("pandas", "pyarrow"):
        raise ValueError(
            f"the pickle asks for {called}, expected a frame of plain lists and integers; save it again "
            "after frame.columns = frame.columns.astype(object), with protocol 4"
        )
    raise ValueError(f"the pickle asks for {called}, which no data frame needs and which may run code; refused")


def read_frame(path: Path, content: bytes, names: tuple[str, ...]) -> dict[str, list[Any]]:
    """The named columns of a pickled data frame. Entries are as the file has them; ``sequence`` and ``integer`` read
    those. Raises ValueError, with the path, for whatever is no such file."""
    if len(content) > MOST_BYTES:
        raise ValueError(f"{path}: {len(content)} bytes, expected at most {MOST_BYTES}; is it a file of LLaRA?")
    try:
        columns = _columns(_Machine(content).run(), names)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (EOFError, LookupError, struct.error) as error:
        raise ValueError(f"{path}: cut short or damaged ({type(error).__name__}); fetch it again") from None
    missing = [name for name in names if name not in columns]
    if missing:
        raise ValueError(f"{path}: expected columns {', '.join(names)}; {missing[0]} is missing")
    chosen = {name: columns[name] for name in names}
    if len({len(column) for column in chosen.values()}) > 1:
        raise ValueError(f"{path}: the columns {', '.join(names)} are of different lengths; fetch it again")
    return chosen


def sequence(value: Any) -> list[Any]:
    """An entry that is a list, a tuple or an array of one dimension."""
    if type(value) in (list, tuple):
        return value  # type: ignore[no-any-return]
    if type(value) is Made and value.name in ("_reconstruct", "_frombuffer"):
        shape, items, _ = _array(value)
        if len(shape) == 1:
            return items
    raise ValueError(f"expected a list, got {_kind(value)}")


def integer(value: Any) -> int:
    """An entry that is a whole number, in whatever type."""
    if type(value) is Made and value.name == "scalar":
        kind, data = _args(value, 2)
        (value,) = _unpack(kind, data, 1)
    if type(value) is float and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if type(value) is not int:
        raise ValueError(f"expected a whole number, got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    """An entry in a few words: it may be huge, deep or hold itself."""
    if type(value) in (int, float, bool) or value is None:
        return repr(value)
    if type(value) is str:
        return repr(shown(value, 40))
    return value.name if type(value) in (Made, Global) else type(value).__name__


def _columns(frame: Any, wanted: tuple[str, ...]) -> dict[str, list[Any]]:
    if type(frame) is not Made or frame.name != "DataFrame":
        raise ValueError(f"expected a pickled data frame, got {_kind(frame)}")
    if type(frame.state) is not dict:
        raise ValueError("expected a data frame as pandas writes it, with its manager")
    manager = frame.state.get("_mgr", frame.state.get("_data"))
    if type(manager) is not Made or manager.name != "BlockManager":
        raise ValueError("expected a data frame as pandas writes it, with its manager")
    if type(manager.state) is tuple and len(manager.state) == 4:  # before pandas 1.3
        parts = _dict(_dict(manager.state[3]).get("0.14.1"))
        axes = sequence(parts.get("axes"))
        blocks = [(_dict(block).get("values"), _dict(block).get("mgr_locs")) for block in sequence(parts.get("blocks"))]
    else:
        made, axes = _args(manager, 2)
        blocks = [tuple(_args(block, 3)[:2]) for block in sequence(made)]
    labels = _labels(sequence(axes)[0])
    twice = next((name for name in wanted if labels.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two columns are called {twice}")
    columns: dict[str, list[Any]] = {}
    for values, where in blocks:
        places = _places(where, len(labels))
        names = [labels[place] for place in places]
        if not set(names) & set(wanted) - set(columns):
            continue
        shape, items, fortran = _array(values)
        if len(shape) != 2 or shape[0] != len(names):
            raise ValueError(f"a block of the shape {shape} for {len(names)} columns")
        for row, name in enumerate(names):
            columns[name] = items[row :: shape[0]] if fortran else items[row * shape[1] : (row + 1) * shape[1]]
    return columns


def _dict(value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise ValueError(f"expected a dict of the frame, got {_kind(value)}")
    return value


def _args(value: Any, count: int) -> tuple[Any, ...]:
    if type(value) is not Made or len(value.args) != count:
        raise ValueError(f"expected a part of a data frame, got {_kind(value)}")
    return value.args


def _labels(index: Any) -> list[str]:
    if type(index) is Made and index.name == "_new_Index":
        index = _dict(_args(index, 2)[1]).get("data")
    labels = sequence(index)
    if len(labels) > MOST_COLUMNS or not all(type(label) is str for label in labels):
        raise ValueError(f"expected names of at most {MOST_COLUMNS} columns, as text")
    return labels


def _places(value: Any, count: int) -> list[int]:
    """Which columns a block holds: a slice or an array of numbers."""
    if type(value) is Made and value.name == "slice":
        begin, end, step = (integer(part) for part in _args(value, 3))
        if not step or max(abs(begin), abs(end), abs(step)) > MOST_COLUMNS:
            raise ValueError(f"a block for columns beyond the {count} of the frame")
        places: Any = range(begin, end, step)
    else:
        places = sequence(value)
    numbers = [integer(place) for place in places]
    if any(not 0 <= number < count for number in numbers):
        raise ValueError(f"a block for columns beyond the {count} of the frame")
    return numbers


def _array(value: Any) -> tuple[tuple[int, ...], list[Any], bool]:
    """Shape, entries, and whether the first index runs fastest."""
    if type(value) is not Made:
        raise ValueError(f"expected an array, got {_kind(value)}")
    if value.name == "_frombuffer":
        data, kind, shape, order = _args(value, 4)
        fortran = order == "F"
    elif value.name == "_reconstruct" and type(value.state) is tuple and len(value.state) == 5:
        _, shape, kind, fortran, data = value.state
    else:
        raise ValueError(f"expected an array, got {_kind(value)}")
    if type(shape) is not tuple or not 1 <= len(shape) <= 2 or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError("expected an array of one or two dimensions")
    return shape, _unpack(kind, data, math.prod(shape)), bool(fortran)


def _unpack(kind: Any, data: Any, count: int) -> list[Any]:
    """``count`` entries of the dtype ``kind``: objects are in a list already, numbers in bytes."""
    if type(kind) is not Made or kind.name != "dtype" or not kind.args:
        raise ValueError(f"expected a dtype, got {_kind(kind)}")
    code = kind.args[0]
    if code in ("O", "O8", "O4"):
        if type(data) is not list or len(data) != count:
            raise ValueError(f"an array of {count} objects that are not there")
        return data
    if type(data) is Made and data.name == "encode":  # bytes as protocol 2 has them
        text, encoding = _args(data, 2)
        if type(text) is not str or encoding != "latin1":
            raise ValueError("bytes in an encoding other than latin1")
        data = text.encode("latin1", "replace")
    if type(code) is not str or code not in NUMBERS or type(data) is not bytes:
        raise ValueError(f"an array of the type {_kind(code)}, expected numbers or lists")
    order = kind.state[1] if type(kind.state) is tuple and len(kind.state) > 1 else "<"
    if order not in ("<", ">", "|", "="):
        raise ValueError("an array of an unknown byte order")
    layout = f"{'>' if order == '>' else '<'}{count}{NUMBERS[code]}"
    if count > len(data) or struct.calcsize(layout) != len(data):
        raise ValueError(f"an array of {count} numbers in {len(data)} bytes")
    return list(struct.unpack(layout, data))
