"""From flat values to a configuration, and back; and the ranges of its fields."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from pipeline.errors import ConfigError
from pipeline.options.declarations import Metadata, Part, options_of, plain_type, unknown_option, walk
from pipeline.options.plain_values import checked, plain

T = TypeVar("T")


@typing.runtime_checkable
class TracksExplicit(typing.Protocol):
    """A configuration that knows which options were given, even if at their default."""

    explicit: frozenset[str]

    def check_explicit(self) -> None:
        """Raises: ConfigError for options that exclude one another."""
        ...


def build(config: type[T], values: Mapping[str, Any]) -> T:
    """The configuration that flat values make; options that are not named, or None, keep their defaults. Values are
    made `plain` first.

    Raises: ConfigError for a name that is no option, with the nearest one; or a value of another type or out of range.
    """
    known = options_of(config)
    for name in values:
        if name not in known:
            raise unknown_option(name, known)
    for each in known.values():
        if each.required and values.get(each.name) is None:
            raise ConfigError(f"`{each.name}`: missing. Give it.")
    given = {name: plain(value, known[name]) for name, value in values.items() if value is not None}
    given = {name: checked(value, known[name]) for name, value in given.items()}
    built = _build(config, "", given)
    if isinstance(built, TracksExplicit):
        object.__setattr__(built, "explicit", frozenset(given))
        built.check_explicit()
    return built


def _build(config: type[T], prefix: str, values: Mapping[str, Any]) -> T:
    given: dict[str, Any] = {}
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        nested: Part | None = field.metadata.get("part")
        if nested is not None:
            inner = prefix + nested.prefix
            names = [each.name for each in walk(nested.type, inner, ()) if each.name in values]
            if nested.switch is not None:
                if not values.get(nested.switch, False):
                    if names:
                        raise ConfigError(f"`{names[0]}`: only with `{nested.switch}=True`. Add it, or leave this out.")
                    continue
            elif nested.optional and not names:
                continue
            given[field.name] = _build(nested.type, inner, values)
        elif (metadata := field.metadata.get("option")) is not None:
            name = metadata.name or prefix + field.name
            if name in values:
                single = isinstance(values[name], str) and typing.get_origin(hints[field.name]) is tuple
                given[field.name] = (values[name],) if single else values[name]
    return config(**given)


def flat(config: Any) -> dict[str, Any]:
    """Every option that is not at its default, as values that `build` takes and JSON can hold."""
    found: dict[str, Any] = {}
    for each in options_of(type(config)).values():
        value: Any = config
        for name in each.path:
            value = None if value is None else getattr(value, name)
        if dataclasses.is_dataclass(value):  # the switch of a part
            value = True
        elif each.type is bool and value is None and not each.optional:
            value = False
        # A required option has no default, and may be an object that compares item by item, such as a DataFrame.
        if each.metadata.python_only or value is None or (not each.required and value == each.default):
            continue
        found[each.name] = list(value) if isinstance(value, tuple) else value
    return found


def check_ranges(config: Any, prefix: str = "") -> None:
    """Checks the fields of one dataclass against the ranges and choices they are declared with.

    Raises: ConfigError naming the option, what was found and what is expected.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        metadata: Metadata | None = field.metadata.get("option")
        value = getattr(config, field.name)
        if metadata is None or value is None:
            continue
        name = metadata.name or prefix + field.name
        kind, _, found = plain_type(hints[field.name])
        choices = metadata.choices or found
        number = kind in (int, float) and isinstance(value, int | float)
        if choices and not number and value not in choices:
            what = f"a number or {' or '.join(choices)}" if kind in (int, float) else f"one of {', '.join(choices)}"
            raise ConfigError(f"`{name}` {value}: expected {what}.")
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        low, high, above, below = metadata.minimum, metadata.maximum, metadata.above, metadata.below
        fits = (
            (low is None or value >= low)
            and (high is None or value <= high)
            and (above is None or value > above)
            and (below is None or value < below)
            and not math.isnan(value)
        )
        if not fits:
            raise ConfigError(f"`{name}` {value}: expected {_range(metadata)}.")


def _range(metadata: Metadata) -> str:
    low, high = metadata.minimum, metadata.maximum
    if low is not None and high is not None:
        return f"{_number(low)} to {_number(high)}"
    lower = f"{_number(low)} or more" if low is not None else None
    if metadata.above is not None:
        lower = "a positive number" if metadata.above == 0 else f"a number above {_number(metadata.above)}"
    upper = None
    if high is not None:
        upper = f"at most {_number(high)}"
    if metadata.below == math.inf:
        return f"a finite number, {lower}" if lower else "a finite number"
    if metadata.below is not None:
        upper = f"below {_number(metadata.below)}"
    return " and ".join(text for text in (lower, upper) if text) or "a number"


def _number(value: float) -> str:
    return f"{int(value)}" if value == int(value) else f"{value:g}"
