"""Fields of a config by their names: older names, and plain values in place of typed ones."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

RENAMED = {
    ("Distill", "views"): "view_epochs",
    ("Heads", "inner"): "num_inner",
    ("Detect", "layer_decay"): "optim.layer_decay",
}
"""(class, former field) -> field. Run folders keep the former ones; nobody may write them anew."""

C = TypeVar("C")


def with_new_names(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that an older config.json has for a class, under today's names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        part, _, inner = RENAMED.get((kind.__name__, name), name).partition(".")
        if inner:  # it moved into a part of the config
            found[part] = dict(found.get(part) or values.get(part) or {}, **{inner: value})
        else:
            found.setdefault(part, value)
    return found


def changed(config: C, changes: Mapping[str, Any], within: str = "") -> C:
    """Return a config with some of its fields changed.

    Values may be plain: a list for a tuple, text for a path or for whatever has a `parse`, and for
    a field that is a config itself a mapping of the fields to change in it.

    Args:
        changes: Field -> value, as in `dict(steps=100, optim=dict(lr=3e-4))`.
        within: Names of the fields around it, each with a dot behind: `"optim."`.

    Raises:
        ValueError: there is no such field (the nearest is named), or it takes no such value.
    """
    kind: Any = type(config)
    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind)]
    values = {}
    for name, value in changes.items():
        if name not in known:
            raise ValueError(_no_field(kind, name, known, within))
        values[name] = _value(hints[name], value, getattr(config, name), within + name)
    return replace(config, **values)  # pyright: ignore[reportArgumentType]


def built(kind: type[C], values: Any, within: str = "") -> C:
    """Build a config of the dataclass `kind` from plain data, as JSON has it.

    Fields that were renamed are known by their former names too (`RENAMED`).

    Args:
        within: Names of the fields around it, each with a dot behind: `"optim."`.

    Raises:
        ValueError: there is no such field, one is missing, or it takes no such value.
    """
    what = f"{within[:-1] or kind.__name__}"
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} is {values!r}; it must be a mapping of fields.")
    hints, values = get_type_hints(kind), with_new_names(kind, values)
    if unknown := set(values) - set(hints):
        raise ValueError(f"Unknown fields of {kind.__name__}: {', '.join(sorted(unknown))}.")
    for one in fields(kind):  # pyright: ignore[reportArgumentType]
        if one.default is MISSING and one.default_factory is MISSING and one.name not in values:
            raise ValueError(f"{what} lacks the field {one.name}.")
    return kind(**{n: _value(hints[n], value, None, within + n) for n, value in values.items()})


def _no_field(kind: type[Any], name: str, known: Sequence[str], within: str) -> str:
    renamed = RENAMED.get((kind.__name__, name))
    if renamed:
        return f"{within}{name} is called {within}{renamed} now."
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {within}{near[0]}?" if near else f" There are {', '.join(known)}."
    return f"There is no field {within}{name}.{hint}"


def _value(hint: Any, value: Any, now: Any, name: str) -> Any:
    """Bring a value to the type of its field."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _any_value(args, value, now, name)
    if hint is Any or (origin is Mapping and isinstance(value, Mapping)):
        return value
    if origin is tuple and isinstance(value, list | tuple):
        if Ellipsis not in args and len(value) != len(args):
            raise ValueError(f"{name} is {value!r}; it has {len(args)} values.")
        return tuple(_value(args[0], item, None, name) for item in value)
    if origin is Literal and value in args:
        return value
    if isinstance(value, Mapping) and is_dataclass(now):
        return changed(now, value, name + ".")
    if isinstance(value, Mapping) and isinstance(hint, type) and is_dataclass(hint):
        return built(hint, value, name + ".")
    if isinstance(value, str) and hasattr(hint, "parse"):  # as TeacherSpec has it
        return hint.parse(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is str and isinstance(value, Path):
        return str(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{name} is larger than any number that a run works with.") from None
    if (
        isinstance(hint, type)
        and isinstance(value, hint)
        and (hint is bool or not isinstance(value, bool))
    ):
        return value
    raise ValueError(f"{name} is {value!r}; it must be {_described(hint)}.")


def _any_value(hints: Sequence[Any], value: Any, now: Any, name: str) -> Any:
    for hint in hints:
        try:
            return _value(hint, value, now, name)
        except ValueError:
            continue
    allowed = " or ".join(_described(hint) for hint in hints)
    raise ValueError(f"{name} is {value!r}; it must be {allowed}.")


def _described(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"a list of {_described(get_args(hint)[0])}"
    if hint is type(None):
        return "None"
    return hint.__name__
