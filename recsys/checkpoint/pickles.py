"""Pickles read as what they say, without doing it.

A pickle is a program that names functions and calls them. This reads the few instructions with which Python writes
plain values and objects, and gives calls as `Made` of a `Name`: nothing is imported and nothing is called, so hashing,
copying or printing what a hostile one describes is never asked of it either. Time and memory are in proportion to its
bytes: values that it repeats are one object, and keys are texts or objects, never tuples, whose hashes would be taken
all the way down.
"""

import struct
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

MAX_STEPS = 1 << 25
"""Instructions of one pickle: those of an index of half a million chunks."""
_MAX_TEXT = 1 << 16
_MAX_STACK = 1 << 16


class PickleError(Exception):
    """The bytes are no pickle that this reads; the message says why in one line."""


class Name(NamedTuple):
    """What a pickle refers to by name."""

    module: str
    name: str


class Made:
    """What a pickle would have Python call.

    Attributes:
        of: what is called.
        arguments: with which.
        state: what would be given to the result.
    """

    __slots__ = ("arguments", "of", "state")

    def __init__(self, of: Name, arguments: tuple[Any, ...]) -> None:
        self.of, self.arguments = of, arguments
        self.state: Any = None


class Reference(NamedTuple):
    """What a pickle takes from beside it: `torch.save` refers to the bytes of tensors so."""

    to: Any


def read_pickle(data: bytes, names: Collection[Name]) -> Any:
    """What a pickle describes: None, bools, integers of 64 bits, texts, tuples, lists, dicts, and the above.

    Args:
        data: the pickle.
        names: what it may refer to.

    Raises:
        PickleError: it is cut off or damaged, names something else, or has another kind of value.
    """
    machine = _Machine(data, names)
    try:
        return machine.run()
    except (IndexError, KeyError, struct.error, UnicodeDecodeError):
        raise PickleError(f"it is damaged at byte {machine.at:,}") from None


class _Machine:
    """The state of a pickle's program."""

    def __init__(self, data: bytes, names: Collection[Name]) -> None:
        self.data, self.names = data, names
        self.at = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        data, operations = self.data, _OPERATIONS
        for _ in range(MAX_STEPS):
            code = data[self.at]
            self.at += 1
            if code == _STOP:
                return self.stack[-1]
            operation = operations[code]
            if operation is None:
                raise PickleError(
                    f"it holds instruction {code:#04x} at byte {self.at - 1:,}, which no checkpoint needs"
                )
            operation(self)
        raise PickleError(f"it has more than {MAX_STEPS:,} instructions")

    def take(self, number: int) -> bytes:
        """The next bytes."""
        start, self.at = self.at, self.at + number
        if self.at > len(self.data):
            raise IndexError
        return self.data[start : self.at]

    def text(self, length: int) -> str:
        """The next bytes as text."""
        if length > _MAX_TEXT:
            raise PickleError(f"it holds a text of {length:,} bytes at byte {self.at:,}")
        return self.take(length).decode("utf-8")

    def top(self, kind: type) -> Any:
        """The value on top, which must be of a kind."""
        if type(value := self.stack[-1]) is not kind:
            raise PickleError(f"it takes a {type(value).__name__} for a {kind.__name__} at byte {self.at - 1:,}")
        return value

    def pop(self, kind: type) -> Any:
        value = self.top(kind)
        del self.stack[-1]
        return value

    def push_container(self, value: Any) -> None:
        if len(self.stack) > _MAX_STACK:
            raise PickleError(f"it keeps more than {_MAX_STACK:,} values open")
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def memoize(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def named(self, module: Any, name: Any) -> None:
        if not (type(module) is str and type(name) is str):
            raise PickleError(f"it names something by no text at byte {self.at - 1:,}")
        if (found := Name(module, name)) not in self.names:
            shown = f"{module}.{name}"[:200].encode("unicode_escape").decode()
            raise PickleError(f"it names {shown}, which no checkpoint of ours has")
        self.stack.append(found)

    def set_items(self, pairs: list[Any]) -> None:
        into = self.top(dict)
        if len(pairs) % 2:
            raise IndexError
        for at in range(0, len(pairs), 2):
            key = pairs[at]
            if type(key) is not str and type(key) is not Made:
                raise PickleError(f"it has a {type(key).__name__} for a key at byte {self.at - 1:,}")
            into[key] = pairs[at + 1]

    def call(self) -> None:
        arguments = self.pop(tuple)
        self.stack[-1] = Made(self.top(Name), arguments)

    def build(self) -> None:
        state = self.stack.pop()
        made: Made = self.top(Made)
        if made.state is not None:
            raise PickleError(f"it gives an object its state twice at byte {self.at - 1:,}")
        made.state = state

    def long(self) -> None:
        if (length := self.take(1)[0]) > 8:
            raise PickleError(f"it holds an integer of {length} bytes at byte {self.at:,}")
        self.stack.append(int.from_bytes(self.take(length), "little", signed=True))

    def protocol(self) -> None:
        if (version := self.take(1)[0]) > 5:
            raise PickleError(f"it is of protocol {version}")

    def line(self) -> str:
        end = self.data.index(b"\n", self.at, self.at + _MAX_TEXT)
        text = self.take(end - self.at).decode("utf-8")
        self.at += 1
        return text

    def global_(self) -> None:
        try:
            self.named(self.line(), self.line())
        except ValueError as error:
            raise IndexError from error

    def tuple_of(self, number: int) -> None:
        if len(self.stack) < number:
            raise IndexError
        self.stack[-number:] = [tuple(self.stack[-number:])]

    def uint(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")


def _append(machine: _Machine, values: list[Any]) -> None:
    machine.top(list).extend(values)


_STOP = ord(".")
_NAMED: dict[bytes, Callable[[_Machine], object]] = {
    b"\x80": _Machine.protocol,
    b"\x95": lambda machine: machine.take(8),  # the length of a frame, which only readers of streams need
    b"(": lambda machine: machine.marks.append(len(machine.stack)),
    b"N": lambda machine: machine.stack.append(None),
    b"\x88": lambda machine: machine.stack.append(True),
    b"\x89": lambda machine: machine.stack.append(False),
    b"J": lambda machine: machine.stack.append(int.from_bytes(machine.take(4), "little", signed=True)),
    b"K": lambda machine: machine.stack.append(machine.take(1)[0]),
    b"M": lambda machine: machine.stack.append(machine.uint(2)),
    b"\x8a": _Machine.long,
    b"\x8c": lambda machine: machine.stack.append(machine.text(machine.take(1)[0])),
    b"X": lambda machine: machine.stack.append(machine.text(machine.uint(4))),
    b")": lambda machine: machine.stack.append(()),
    b"\x85": lambda machine: machine.tuple_of(1),
    b"\x86": lambda machine: machine.tuple_of(2),
    b"\x87": lambda machine: machine.tuple_of(3),
    b"t": lambda machine: machine.stack.append(tuple(machine.since_mark())),
    b"]": lambda machine: machine.push_container([]),
    b"a": lambda machine: _append(machine, [machine.stack.pop()]),
    b"e": lambda machine: _append(machine, machine.since_mark()),
    b"}": lambda machine: machine.push_container({}),
    b"s": lambda machine: machine.set_items([machine.stack.pop(-2), machine.stack.pop()]),
    b"u": lambda machine: machine.set_items(machine.since_mark()),
    b"\x94": lambda machine: machine.memoize(len(machine.memo)),
    b"q": lambda machine: machine.memoize(machine.take(1)[0]),
    b"r": lambda machine: machine.memoize(machine.uint(4)),
    b"h": lambda machine: machine.stack.append(machine.memo[machine.take(1)[0]]),
    b"j": lambda machine: machine.stack.append(machine.memo[machine.uint(4)]),
    b"\x93": lambda machine: machine.named(*[machine.stack.pop() for _ in range(2)][::-1]),
    b"c": _Machine.global_,
    b"R": _Machine.call,
    b"\x81": _Machine.call,
    b"b": _Machine.build,
    b"Q": lambda machine: machine.stack.append(Reference(machine.stack.pop())),
}
_OPERATIONS = [_NAMED.get(bytes([code])) for code in range(256)]
