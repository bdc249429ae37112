"""A pickle interpreter that calls only functions of an allow list.

Python's unpickler imports and calls whatever the file names. This interpreter has the same instructions, but a global
is only a key into an ``Allowed`` table of inert placeholders; an unknown global raises an error with its name. It never
imports, allocates no more than the size of the file, and limits the number of instructions.

Instructions that protocols 2 to 5 do not write (the text forms of protocol 0, instances of old classes, the
extension registry) are refused by name.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ..errors import BundleError, IntegrityError
from .allowed import Allowed, Budget, Buildable, Known

MAX_TEXT_BYTES = 16 << 20
"""Longest string; the longest real one is a source file of the network."""
_NAMES = {ord(op.code): op.name for op in pickletools.opcodes}


def read_pickle(
    data: memoryview, table: Mapping[str, Allowed], *, where: str, budget: Budget,
    at: int = 0, persistent: Callable[[Any], Any] | None = None,
) -> tuple[Any, int]:  # fmt: skip
    """Read one pickle.

    Args:
        data: Bytes with the pickle.
        table: Allowed globals by ``module.name``.
        where: Name of the file in messages.
        budget: Remaining instructions.
        at: Start offset.
        persistent: Resolves persistent ids; None refuses them.

    Returns:
        The object, and the end offset of the pickle. Bytes are views of ``data``.

    Raises:
        BundleError: If it names a global that is not in the table, or uses an instruction that no network needs.
        IntegrityError: If it is truncated or not a pickle.
    """
    return _Machine(data, table, where, budget, at, persistent).run()


@dataclass
class _Machine:
    data: memoryview
    table: Mapping[str, Allowed]
    where: str
    budget: Budget
    at: int
    persistent: Callable[[Any], Any] | None
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self) -> tuple[Any, int]:
        while True:
            self.budget.spend(self.where)
            start, code = self.at, self._take(1)[0]
            if code == 0x2E:  # STOP
                if len(self.stack) != 1 or self.marks:
                    self._damaged(start, "it stops with a stack that does not hold one object")
                return self.stack[0], self.at
            step = _STEPS.get(code)
            if step is None:
                self._refuse(start, f"the instruction {_NAMES.get(code, hex(code))}, which no network's file needs")
            try:
                step(self)
            except (IndexError, KeyError, TypeError, ValueError) as exc:
                self._damaged(start, f"{_NAMES[code]} cannot be carried out ({type(exc).__name__}: {exc})"[:300])

    # Reading

    def _take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise IntegrityError(
                f"{self.where} ends at byte {len(self.data)}, expected at least {count} bytes from byte {self.at}. "
                "It is truncated or no pickle; copy it again."
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def _int(self, form: str) -> int:
        value: int = struct.unpack(form, self._take(struct.calcsize(form)))[0]
        return value

    def _text(self, form: str) -> None:
        size = self._int(form)
        if size > MAX_TEXT_BYTES:
            raise ValueError(f"a string of {size} bytes, expected at most {MAX_TEXT_BYTES}")
        self.stack.append(str(self._take(size), "utf-8"))

    def _line(self) -> str:
        """Return the text up to the next line end."""
        room = bytes(self.data[self.at : self.at + 512])
        end = room.find(b"\n")
        if end < 0:
            raise ValueError("a name without an end")
        self.at += end + 1
        return str(room[:end], "utf-8")

    # The stack

    def _pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def _tuple(self, count: int) -> None:
        if count > len(self.stack):
            raise ValueError("the stack is too short")
        items = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        self.stack.append(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise ValueError("expected a dict and pairs")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Only text keys: Python salts their hashes, which prevents chosen collisions.
            if type(key) is not str:
                raise ValueError(f"a key of type {type(key).__name__}, expected text")
            target[key] = value

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is set and all(type(item) is str for item in items):
            target.update(items)
        else:
            raise ValueError("expected a list, or a set of text")

    # Instructions that would call

    def _global(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise ValueError("a global without a name")
        full = f"{module}.{name}"
        if full not in self.table:
            self._refuse(self.at, f"the global {full!r}, which is not one of those that a network's file needs")
        self.stack.append(Known(full, self.table[full]))

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not Known or type(arguments) is not tuple:
            raise ValueError("expected an allowed global and a tuple")
        if function.allowed.call is None:
            self._refuse(self.at, f"a call of {function.name!r}, which is allowed only as a name")
        self.stack.append(function.allowed.call(*arguments))

    def _new_object(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if type(kind) is not Known or type(arguments) is not tuple or arguments:
            raise ValueError("expected an allowed class and no arguments")
        if kind.allowed.new is None:
            self._refuse(self.at, f"a new object of {kind.name!r}, of which none may be made")
        self.stack.append(kind.allowed.new())

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is dict and type(state) is dict and state.keys() == {"_metadata"}:
            return  # versions of the modules of a state dict, which are not used
        if not isinstance(target, Buildable):
            self._refuse(self.at, f"a state for an object of type {type(target).__name__}, which takes none")
        target.build(state)

    def _persistent_id(self) -> None:
        if self.persistent is None:
            self._refuse(self.at, "a persistent id, which names something outside the file")
        self.stack.append(self.persistent(self.stack.pop()))

    # End of a pickle

    def _refuse(self, at: int, what: str) -> NoReturn:
        raise BundleError(
            f"{self.where} holds {what} (byte {at}). A pickle can run any code, so nothing of it was used. "
            "If you trust who made the file, save its weights as safetensors where it was made."
        )

    def _damaged(self, at: int, what: str) -> NoReturn:
        raise IntegrityError(f"{self.where} is damaged or no network's pickle: {what} at byte {at}. Copy it again.")


def _number(form: str) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(m._int(form))


def _constant(make: Callable[[], Any]) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(make())


def _bytes(form: str) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(m._take(m._int(form)))


def _put(index: Callable[[_Machine], int]) -> Callable[[_Machine], None]:
    return lambda m: m.memo.__setitem__(index(m), m.stack[-1])


def _get(form: str) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(m.memo[m._int(form)])


def _mark(m: _Machine) -> None:
    m.marks.append(m.stack)
    m.stack = []


def _protocol(m: _Machine) -> None:
    if not 2 <= (found := m._int("<B")) <= 5:
        raise ValueError(f"protocol {found}, expected 2 to 5")


def _marked_tuple(m: _Machine) -> None:
    items = m._pop_mark()  # first: it changes which list the stack is
    m.stack.append(tuple(items))


def _frame(m: _Machine) -> None:
    m._take(8)  # a length that only a stream needs


def _pop(m: _Machine) -> None:
    m.stack.pop()


def _stack_global(m: _Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    m._global(module, name)


def _pair(m: _Machine) -> list[Any]:
    value, key = m.stack.pop(), m.stack.pop()
    return [key, value]


_STEPS: dict[int, Callable[[_Machine], None]] = {
    0x80: _protocol,
    0x95: _frame,
    ord("("): _mark,
    ord("0"): _pop,
    ord("N"): _constant(lambda: None),
    0x88: _constant(lambda: True),
    0x89: _constant(lambda: False),
    ord("J"): _number("<i"),
    ord("K"): _number("<B"),
    ord("M"): _number("<H"),
    0x8A: lambda m: m.stack.append(int.from_bytes(m._take(m._int("<B")), "little", signed=True)),
    ord("G"): lambda m: m.stack.append(struct.unpack(">d", m._take(8))[0]),
    0x8C: lambda m: m._text("<B"),
    ord("X"): lambda m: m._text("<I"),
    0x8D: lambda m: m._text("<Q"),
    ord("C"): _bytes("<B"),
    ord("B"): _bytes("<I"),
    0x8E: _bytes("<Q"),
    0x96: _bytes("<Q"),
    ord(")"): _constant(tuple),
    ord("t"): _marked_tuple,
    0x85: lambda m: m._tuple(1),
    0x86: lambda m: m._tuple(2),
    0x87: lambda m: m._tuple(3),
    ord("]"): _constant(list),
    ord("a"): lambda m: m._extend([m.stack.pop()]),
    ord("e"): lambda m: m._extend(m._pop_mark()),
    ord("}"): _constant(dict),
    ord("s"): lambda m: m._set_items(_pair(m)),
    ord("u"): lambda m: m._set_items(m._pop_mark()),
    0x8F: _constant(set),
    0x90: lambda m: m._extend(m._pop_mark()),
    ord("q"): _put(lambda m: m._int("<B")),
    ord("r"): _put(lambda m: m._int("<I")),
    0x94: _put(lambda m: len(m.memo)),
    ord("h"): _get("<B"),
    ord("j"): _get("<I"),
    ord("c"): lambda m: m._global(m._line(), m._line()),
    0x93: _stack_global,
    ord("R"): lambda m: m._reduce(),
    0x81: lambda m: m._new_object(),
    ord("b"): lambda m: m._build(),
    ord("Q"): lambda m: m._persistent_id(),
}
