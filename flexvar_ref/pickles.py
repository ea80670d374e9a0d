"""A reader of pickles that cannot run code: it looks up no name and calls nothing from a file.

It interprets the opcodes that `pickletools` decodes. Numbers, text, lists, tuples and dictionaries become themselves.
Every other value becomes an `Opaque`, which keeps only the name of its class or function.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_OPCODES = 2_000_000  # far more than a checkpoint needs; bounds the time and memory of reading

MAX_NAME = 200  # characters of a name that are kept

Call = Callable[[str, tuple[Any, ...]], Any]
"""(name of a class or function in the file, arguments) -> the value to use in place of the call's result"""

_MARK = object()
_LITERALS = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    }
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True, eq=False, slots=True)
class Opaque:
    """A value that is not read. name: the class or function in the file, such as "datetime.datetime"."""

    name: str


def opaque(name: str, arguments: tuple[Any, ...]) -> Any:
    """The default `Call`. It keeps only the name of what the file asks to call."""
    return Opaque(name)


def read_pickle(file: Any, call: Call = opaque, persistent: Callable[[Any], Any] | None = None) -> Any:
    """Read one pickle from a binary file, from its position on. Afterwards the position is the end of the pickle.

    persistent: turns a persistent id into a value. Without it, ids are errors. Keys of dictionaries that are neither
    text nor whole numbers are left out, and sets become lists, because hashing foreign values can take forever.
    Raises exceptions of many types for a damaged pickle.
    """
    machine = _Machine(call, persistent)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if count >= MAX_OPCODES:
            raise ValueError(f"its pickle has more than {MAX_OPCODES} operations")
        machine.step(opcode.name, argument)
    return machine.stack.pop()


class _Machine:
    """The stack machine of a pickle."""

    def __init__(self, call: Call, persistent: Callable[[Any], Any] | None) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.call, self.persistent = call, persistent

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            stack.append(tuple(self.pop(_TUPLES[name])))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        elif name not in ("PROTO", "FRAME", "STOP"):
            self.build(name, argument)

    def build(self, name: str, argument: Any) -> None:
        """The operations that make, fill or call something."""
        stack = self.stack
        if name in ("TUPLE", "LIST", "FROZENSET"):
            items = self.pop_to_mark()
            stack.append(tuple(items) if name == "TUPLE" else items)
        elif name == "DICT":
            items = self.pop_to_mark()
            stack.append({})
            self.set_items(items)
        elif name in ("SETITEM", "SETITEMS"):
            self.set_items(self.pop(2) if name == "SETITEM" else self.pop_to_mark())
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = self.pop(1) if name == "APPEND" else self.pop_to_mark()
            if isinstance(stack[-1], list):
                stack[-1].extend(items)
        elif name == "GLOBAL":
            stack.append(_named(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(_named(*self.pop(2)))
        elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            function, arguments = self.pop(3 if name == "NEWOBJ_EX" else 2)[:2]
            self.append_call(function, arguments)
        elif name == "INST":
            self.append_call(_named(*argument.split(" ", 1)), tuple(self.pop_to_mark()))
        elif name == "OBJ":
            function, *rest = self.pop_to_mark()
            self.append_call(function, tuple(rest))
        elif name in ("BUILD", "POP"):  # the state of an object is left out
            self.pop(1)
        elif name == "POP_MARK":
            self.pop_to_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "BINPERSID" and self.persistent is not None:
            stack.append(self.persistent(stack.pop()))
        else:
            raise ValueError(f"its pickle has the operation {name}, which checkpoints do not use")

    def pop(self, count: int) -> list[Any]:
        """The last values of the stack."""
        if len(self.stack) < count:
            raise ValueError("its pickle is damaged")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def pop_to_mark(self) -> list[Any]:
        """The values behind the last mark."""
        for place in reversed(range(len(self.stack))):
            if self.stack[place] is _MARK:
                items = self.stack[place + 1 :]
                del self.stack[place:]
                return items
        raise ValueError("its pickle is damaged")

    def append_call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, Opaque) or not isinstance(arguments, tuple):
            raise ValueError("its pickle is damaged")
        self.stack.append(self.call(function.name, arguments))

    def set_items(self, items: list[Any]) -> None:
        if isinstance(target := self.stack[-1], dict):
            target.update((k, v) for k, v in zip(items[::2], items[1::2], strict=True) if type(k) in (str, int))


def _named(module: Any, attribute: Any) -> Opaque:
    if not isinstance(module, str) or not isinstance(attribute, str):
        raise ValueError("its pickle is damaged")
    return Opaque(f"{module}.{attribute}"[:MAX_NAME])
