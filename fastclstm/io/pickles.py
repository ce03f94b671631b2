"""Pickles, read without running anything in them and at a cost that the size of their file bounds.

The opcodes are carried out on dictionaries, lists, tuples, numbers and strings alone; whatever a pickle would import is
a `Global`, whatever it would build of one an `Inert`. Nothing of what a pickle holds is hashed, compared, printed or
walked through, but for short strings, so that neither nesting nor sharing costs more than the opcodes that make it.
"""

from __future__ import annotations

import pickletools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

from fastclstm.io.bounds import Bounds, Refused

LONGEST_NAME = 1000
"""Of dictionary keys and of globals, in characters."""

_EACH, _TUPLE, _LIST, _DICT, _INERT, _GLOBAL = 8, 56, 80, 80, 72, 120
"""Bytes that an opcode and what is built cost, rounded up; what is put into dictionaries comes on top."""
_LARGEST_GAP = 1000
"""Of the numbers in the memo, which count on."""
_NOTHING = object()


class Damaged(Exception):
    """What a file says of itself does not hold."""


@dataclass(frozen=True, slots=True)
class Global:
    """What a pickle would import: module and name in one, as in "torch.FloatStorage"."""

    name: str


@dataclass(eq=False, slots=True)
class Inert:
    """An object of any class: it has its class's name, the state and items that it was given, and does nothing."""

    name: str
    state: dict[str, Any] | None = None
    items: dict[str, Any] | None = None


Call = Callable[[Global, tuple[Any, ...]], Any]
"""What a global called with arguments is; `inert` where nothing is known of it."""


def inert(function: Global, arguments: tuple[Any, ...]) -> Any:
    """Return what stands for an object of which nothing is known."""
    return Inert(function.name)


def load(
    file: BinaryIO, bounds: Bounds, call: Call = inert, refer: Callable[[Any], Any] | None = None
) -> Any:  # fmt: skip
    """Read one pickle from `file`, to its end and no further.

    Dictionaries have those of their items whose keys are strings of up to `LONGEST_NAME` characters; sets are lists.

    Parameters
    ----------
    file : binary file
    bounds : Bounds
        What its file may cost.
    call : function
        See `Call`.
    refer : function, optional
        What a persistent id stands for. None: such pickles are refused.

    Raises
    ------
    Damaged
        It is no pickle.
    Refused
        It would cost more than its file may.

    Examples
    --------
    >>> import pickle, tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     _ = file.write(pickle.dumps({"a": (1, {2.5}), "b": print})), file.seek(0)
    ...     load(file, Bounds(file.name))
    {'a': (1, [2.5]), 'b': Global(name='builtins.print')}
    """
    machine = _Machine(bounds, call, refer)
    try:
        for opcode, argument, _ in pickletools.genops(file):
            machine.step(opcode.name, argument)
        return machine.pop()
    except Refused:
        raise
    except (ArithmeticError, LookupError, ValueError) as error:  # of pickletools, of a stack that is empty
        raise Damaged(str(error)[:80]) from error


class _Machine:
    """The stack, the marks in it and the memo of a pickle that is being read."""

    def __init__(self, bounds: Bounds, call: Call, refer: Callable[[Any], Any] | None) -> None:
        self._bounds, self._call, self._refer = bounds, call, refer
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: list[Any] = []

    def step(self, name: str, argument: Any) -> None:
        """Carry out the opcode `name`, whose argument stands in the pickle."""
        self._spend(_EACH)
        if name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            if not (type(argument) is int and -5 <= argument <= 256):  # those are there already
                self._spend(sys.getsizeof(argument))
            self._stack.append(argument)
        elif name in _STEPS:
            _STEPS[name](self, argument)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise Damaged(f"it has the opcode {name}")

    def _spend(self, cost: int) -> None:
        self._bounds.spend("what it pickles", cost)

    def pop(self) -> Any:
        return self._stack.pop()

    def _push(self, value: Any, cost: int) -> None:
        self._spend(cost)
        self._stack.append(value)

    def _marked(self) -> list[Any]:
        """Take what stands above the last mark."""
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def drop(self, _: Any) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def drop_marked(self, _: Any) -> None:
        self._marked()

    def double(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def remember(self, index: int | None) -> None:
        gap = 0 if index is None else index - len(self._memo)
        if gap > _LARGEST_GAP or (index is not None and index < 0):
            raise Damaged("it numbers its parts beyond reason")
        if index is None or gap >= 0:
            self._spend(3 * _EACH * gap)  # a list that grows is there twice
            self._memo += [_NOTHING] * gap
            self._memo.append(self._stack[-1])
        else:
            self._memo[index] = self._stack[-1]

    def recall(self, index: int) -> None:
        value = self._memo[index] if 0 <= index < len(self._memo) else _NOTHING
        if value is _NOTHING:
            raise Damaged("it refers to a part that it has not")
        self._stack.append(value)

    def new_list(self, _: Any) -> None:
        self._push([], _LIST)

    def new_dict(self, _: Any) -> None:
        self._push({}, _DICT)

    def marked_list(self, _: Any) -> None:
        items = self._marked()
        self._push(items, _LIST + 8 * len(items))

    def marked_dict(self, _: Any) -> None:
        items = self._marked()
        self._push({}, _DICT)
        self._set(items)

    def marked_tuple(self, _: Any) -> None:
        items = tuple(self._marked())
        self._push(items, _TUPLE + 8 * len(items))

    def short_tuple(self, count: int) -> None:
        if len(self._stack) < count:
            raise Damaged("it takes what is not there")
        items = tuple(self._stack[-count:])
        del self._stack[-count:]
        self._push(items, _TUPLE)

    def append(self, _: Any) -> None:
        self._append([self._stack.pop()])

    def append_marked(self, _: Any) -> None:
        self._append(self._marked())

    def _append(self, items: Iterable[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Inert):
            raise Damaged("it appends to what is no list")

    def set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def set_marked(self, _: Any) -> None:
        self._set(self._marked())

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Inert):
            if target.items is None:
                self._spend(_DICT)
                target.items = {}
            target = target.items
        if not isinstance(target, dict) or len(items) % 2:
            raise Damaged("it sets items of what is no dictionary")
        self._fill(target, zip(items[::2], items[1::2], strict=True))

    def _fill(self, target: dict[str, Any], pairs: Iterable[tuple[Any, Any]]) -> None:
        before = sys.getsizeof(target)
        for key, value in pairs:
            if type(key) is str and len(key) <= LONGEST_NAME:
                target[key] = value
                if (size := sys.getsizeof(target)) != before:
                    self._spend(size - before)
                    before = size

    def name(self, argument: str) -> None:
        self._push(Global(argument.replace(" ", ".", 1)), _GLOBAL + len(argument))

    def name_on_stack(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not (type(name) is type(module) is str and len(name) + len(module) <= LONGEST_NAME):
            raise Damaged("it imports what has no name")
        self._push(Global(f"{module}.{name}"), _GLOBAL + len(name) + len(module))

    def called(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._make(function, arguments)

    def called_with_options(self, _: Any) -> None:
        self._stack.pop()
        self.called(None)

    def called_marked(self, _: Any) -> None:
        function, *arguments = self._marked()
        self._make(function, tuple(arguments))

    def called_by_name(self, argument: str) -> None:
        self._make(Global(argument.replace(" ", ".", 1)), tuple(self._marked()))

    def _make(self, function: Any, arguments: Any) -> None:
        self._spend(_INERT)
        if not (isinstance(function, Global | Inert) and type(arguments) is tuple):
            raise Damaged("it calls what is no function")
        if isinstance(function, Inert):
            made: Any = Inert(function.name)
        elif function.name in _DICTIONARIES:
            made = self._dictionary(*arguments[:1])
        elif function.name in _SETS:
            made = arguments[0] if arguments and type(arguments[0]) is list else []
        elif function.name in _RECONSTRUCTORS and arguments and isinstance(arguments[0], Global):
            made = Inert(arguments[0].name)
        else:
            made = self._call(function, arguments)
        self._stack.append(made)

    def _dictionary(self, items: Any = ()) -> dict[str, Any]:
        """Return the dictionary of a list of pairs, as Python 2 wrote an OrderedDict."""
        made: dict[str, Any] = {}
        self._spend(_DICT)
        if type(items) is list:
            self._spend(_EACH * len(items))  # it may be asked to for one list again and again
            self._fill(made, ((p[0], p[1]) for p in items if type(p) in (list, tuple) and len(p) == 2))
        return made

    def build(self, _: Any) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Inert):
            parts = state if type(state) is tuple else (state,)
            target.state = next((part for part in parts[:2] if type(part) is dict), None)
        elif not isinstance(target, dict):  # whose attributes do not matter
            raise Damaged("it sets attributes of what has none")

    def persistent(self, argument: Any) -> None:
        pid = self._stack.pop() if argument is None else argument
        if self._refer is None:
            raise Damaged("it refers to what is not there")
        self._push(self._refer(pid), _GLOBAL)


_DICTIONARIES = {"collections.OrderedDict", "builtins.dict", "__builtin__.dict"}
_SETS = {f"{module}.{kind}" for module in ("builtins", "__builtin__") for kind in ("set", "frozenset")}
_RECONSTRUCTORS = {"copy_reg._reconstructor", "copyreg._reconstructor", "copyreg.__newobj__", "copyreg.__newobj_ex__"}

_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark, "POP": _Machine.drop, "POP_MARK": _Machine.drop_marked, "DUP": _Machine.double,
    "PUT": _Machine.remember, "BINPUT": _Machine.remember, "LONG_BINPUT": _Machine.remember,
    "MEMOIZE": _Machine.remember, "GET": _Machine.recall, "BINGET": _Machine.recall, "LONG_BINGET": _Machine.recall,
    "EMPTY_LIST": _Machine.new_list, "EMPTY_SET": _Machine.new_list, "LIST": _Machine.marked_list,
    "FROZENSET": _Machine.marked_list, "EMPTY_DICT": _Machine.new_dict, "DICT": _Machine.marked_dict,
    "TUPLE": _Machine.marked_tuple, "TUPLE1": lambda m, _: m.short_tuple(1), "TUPLE2": lambda m, _: m.short_tuple(2),
    "TUPLE3": lambda m, _: m.short_tuple(3), "APPEND": _Machine.append, "APPENDS": _Machine.append_marked,
    "ADDITEMS": _Machine.append_marked, "SETITEM": _Machine.set_item, "SETITEMS": _Machine.set_marked,
    "GLOBAL": _Machine.name, "STACK_GLOBAL": _Machine.name_on_stack, "REDUCE": _Machine.called,
    "NEWOBJ": _Machine.called, "NEWOBJ_EX": _Machine.called_with_options, "OBJ": _Machine.called_marked,
    "INST": _Machine.called_by_name, "BUILD": _Machine.build, "PERSID": _Machine.persistent,
    "BINPERSID": _Machine.persistent,
}  # fmt: skip
