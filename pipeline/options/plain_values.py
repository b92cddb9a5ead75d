"""The value of an option in the form in which a file holds it, and whether it is of the option's type."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from pipeline.errors import ConfigError
from pipeline.options.declarations import Option


def checked(value: Any, declared: Option, file: str | None = None) -> Any:
    """A plain value of an option, if it is of the right type. Raises: ConfigError.

    Args:
        file: the one it was read from. Without it the value is a keyword, which may be an object where one is expected.
    """
    expected: dict[Any, tuple[type, ...]] = {float: (int, float), int: (int,), bool: (bool,), str: (str,)}
    choices, table = declared.metadata.choices, declared.metadata.table and isinstance(value, dict)
    if value is None or (isinstance(value, str) and value in choices) or (table and _is_json(value)):
        return value
    if declared.objects and file is None and not table:
        return value
    if declared.type is tuple or (declared.metadata.several and isinstance(value, list)):
        if isinstance(value, str) and file is None:
            return value
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list | tuple) and all(isinstance(item, str) for item in items):
            return tuple(items)
        wanted = "a string or a list of strings"
    else:
        wanted = {float: "a number", int: "a whole number", bool: "true or false"}.get(declared.type, "a string")
        wanted = "values that JSON can hold" if table else wanted
        wanted += "".join(f" or {each}" for each in choices if declared.type is not str)
        right = isinstance(value, expected.get(declared.type, (str,)))
        if right and (declared.type is bool or not isinstance(value, bool)):
            return value
    if file is None:
        raise ConfigError(f"`{declared.name}` {value!r}: expected {wanted}. Correct it.")
    raise ConfigError(f"`config` {file}: {declared.name} is {json.dumps(value)}, expected {wanted}. Correct it.")


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def plain(value: Any, declared: Option) -> Any:
    """A keyword as a value that JSON can hold: paths, numbers of numpy and torch's devices and dtypes, also in a table
    or a list of strings. The ~ of a path stands for the user's directory. Other objects are returned as they are."""
    table = declared.metadata.table
    if table and isinstance(value, Mapping):
        within = dataclasses.replace(declared, metadata=dataclasses.replace(declared.metadata, text=True))
        return {name: plain(each, within) for name, each in value.items()}
    if isinstance(value, list | tuple) and (table or declared.type is tuple or all(map(_is_path, value))):
        return (list if table else tuple)(plain(each, declared) for each in value)
    if _is_path(value):
        return str(value) if declared.metadata.text else os.path.expanduser(str(value))
    if hasattr(value, "dtype") and getattr(value, "ndim", None) == 0:  # of numpy or torch
        return value.item()
    kind = type(value)
    return str(value).removeprefix("torch.") if (kind.__module__, kind.__name__) in OF_TORCH else value


OF_TORCH = {("torch", "device"), ("torch", "dtype")}


def _is_path(value: Any) -> bool:
    return isinstance(value, str) or hasattr(value, "__fspath__")
