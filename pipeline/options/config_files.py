"""The values in a TOML or JSON file: options by name, or what a run has saved."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.options.declarations import Option, options_of, unknown_option
from pipeline.options.plain_values import checked

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_config(file: str, config: type, given: Collection[str] = ()) -> dict[str, Any]:
    """The options in a TOML or JSON file, checked by name and type; a distill_config.json gives those of its run.

    Args:
        given: names of options that are given beside the file.

    Raises: ConfigError naming the file and the key.
    """
    path = Path(file).expanduser()
    values = read_table("config", str(path / CONFIG_FILE if path.is_dir() else path))
    known = options_of(config)
    if isinstance(values.get("config"), dict):  # what a run has saved
        values = _recorded(values, known)
        if (predicate := values.pop("gen_keep_if", None)) is not None and "gen_keep_if" not in given:
            raise ConfigError(
                f"`config` {file}: its answers were chosen by {predicate}, and code is not taken from a record. Give "
                "`gen_keep_if` again."
            )
    found = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in known or known[name].metadata.python_only:
            problem = str(unknown_option(name, known)).replace("`", "")
            raise ConfigError(f"`config` {file}: {problem}")
        found[name] = checked(value, known[name], file)
    return found


def read_table(option_name: str, file: str) -> dict[str, Any]:
    """The names and values in a TOML or JSON file. Raises: ConfigError naming the option and the file."""
    path, where = Path(file).expanduser(), f"`{option_name}` {file}"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror or error}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 text. Give a TOML or JSON file.") from error
    kind = "TOML" if path.suffix == ".toml" else "JSON"
    try:
        values = tomllib.loads(text) if kind == "TOML" else json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where}: not {kind}: {error}. Correct it.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: found a {type(values).__name__}, expected names with their values.")
    return values


CONFIG_FILE = "distill_config.json"
"""Written into every cache and every student: the options of the run under "config"."""

NOT_REPEATED = {"overwrite", "resume", "trust_remote_code"}
"""Not taken from the record of a run: they delete, continue or run something that the reader may not have looked at."""

NOT_SAVED = {"output", *NOT_REPEATED}
"""Not written into the record of a cache."""


def _recorded(record: Mapping[str, Any], known: Mapping[str, Option]) -> dict[str, Any]:
    """The options that a run was given. Earlier versions recorded all options, and not which of them were given."""
    values, given = record["config"], record.get("given")
    if not isinstance(given, list):
        given = [name for name, value in values.items() if name not in known or value != known[name].default]
    return {name: values[name] for name in given if name in values and name not in NOT_REPEATED}
