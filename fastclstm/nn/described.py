"""Objects that are told by the name of their class and their options, so that files can hold them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np

from fastclstm.nn.names import unknown_option

Description = dict[str, Any]
"""``{"class": name, "options": {…}, "functions": [options that could not be told, and matter]}``, as JSON holds it."""

_CLASSES: dict[str, type[Described]] = {}


class Described:
    """A dataclass whose fields are its constructor's arguments, known to `restore` by its name."""

    _elsewhere: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Names that other libraries have for options, each with those it may have here: for the message about it."""

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Refuse options that the constructor does not have."""
        if unknown := [name for name in options if name not in cls.__dict__.get("__dataclass_fields__", ())]:
            _refuse_unknown(cls, unknown)
        return super().__new__(cls)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _CLASSES[class_name(cls)] = cls

    @classmethod
    def _from_options(cls, options: dict[str, Any]) -> Self:
        """Return the object with these `options`."""
        return cls(**options)

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's arguments, by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]


def _refuse_unknown(cls: type[Described], names: list[str]) -> None:
    """Raise TypeError where one of these is no argument of the constructor."""
    parameters = list(inspect.signature(cls).parameters.values())
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return
    known = [one.name for one in parameters if one.kind not in (one.POSITIONAL_ONLY, one.VAR_POSITIONAL)]
    for name in names:
        if name not in known:
            raise TypeError(unknown_option(cls.__name__, name, known, cls._elsewhere))


def class_name(cls: type) -> str:
    """Return the name under which files tell a class: of others' classes with its module, so that it is ours alone."""
    ours = cls.__module__.partition(".")[0] == "fastclstm"
    return cls.__name__ if ours else f"{cls.__module__}.{cls.__qualname__}"


def describe(thing: Described) -> Description:
    """Return the description of `thing`.

    Of options that JSON cannot hold (functions, generators) only the names are in it, and of those that say how
    parameters are drawn (seed, initializers) nothing.
    """
    told = {name: _tell(value) for name, value in thing.options.items() if is_tellable(value)}
    lost = [n for n in thing.options if n not in told and n != "seed" and not n.endswith("_initializer")]
    return {"class": class_name(type(thing)), "options": told, "functions": lost}


def restore(description: Mapping[str, Any], **options: Any) -> Any:
    """Return the object described; `options` replace those in the description.

    Raises
    ------
    ValueError
        A class that is not known, an option that is missing because it was a function.
    """
    name = description["class"]
    if name not in _CLASSES:
        raise ValueError(f"unknown class {name!r}; import the module that defines it before loading")
    if lost := [option for option in description.get("functions", ()) if option not in options]:
        given = ", ".join(f"{option}=…" for option in lost)
        raise ValueError(
            f"{name} had functions as options, which files do not hold; give them: {name}.load(path, {given}), or, "
            f"where it is part of another layer, build that and use set_parameters(fastclstm.io.weights.load(path)[0])"
        )
    told = {key: _restored(value) for key, value in description["options"].items() if key not in options}
    return _CLASSES[name]._from_options(told | options)


def anew(value: Any) -> Any:
    """Return a `Described` object made once more of its options, also those in tuples and lists; others as they are."""
    if isinstance(value, Described):
        return type(value)._from_options({name: anew(option) for name, option in value.options.items()})
    return type(value)(map(anew, value)) if type(value) in (tuple, list) else value


def is_tellable(value: Any) -> bool:
    """Whether a description can hold `value`: None, numbers, strings, `Described` objects and tuples of these."""
    if isinstance(value, list | tuple):
        return all(map(is_tellable, value))
    return value is None or isinstance(value, bool | int | float | str | Described)


def plain(value: Any) -> Any:
    """Return `value` with NumPy scalars and arrays as Python numbers, and lists as tuples."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    return tuple(map(plain, value)) if isinstance(value, list | tuple) else value


def _tell(value: Any) -> Any:
    if isinstance(value, Described):
        return describe(value)
    return list(map(_tell, value)) if isinstance(value, list | tuple) else value


def _restored(value: Any) -> Any:
    if isinstance(value, Mapping):
        return restore(value)
    return tuple(map(_restored, value)) if isinstance(value, list | tuple) else value
