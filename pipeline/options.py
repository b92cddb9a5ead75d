"""Options, declared once: as fields of frozen dataclasses that carry their help, group and range as metadata.

    field of a dataclass ─▶ click option (`pipeline.terminal.click_options`), keyword argument of the Python API,
                            key in a `config` file, key in the saved distill_config.json

A configuration may consist of parts, which are dataclasses of their own (`part`). Their fields join the options of the
whole under flat names, so that every option has one name everywhere: `gen_top_p` is `GenerationConfig.top_p`.

Standard library only: commands read options before anything heavy is imported.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipeline.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

MAX_SEED = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What is declared of an option beside its name, type and default.

    Attributes:
        help: one sentence, without the default.
        group: heading in the help.
        common: whether the short help shows it.
        minimum, maximum: inclusive range of a number; `above` and `below` are exclusive.
        choices: allowed strings, of a number those allowed beside numbers; taken from a `Literal` type if not given.
        default_text: what the help says of the default where the value None stands for one; taken from the class's
            DEFAULT_TEXTS, by field name, if not given.
        name: flat name, if it is not prefix + field name.
        flag: short form of the flag, without dashes; the name is a flag as well.
        metavar: placeholder of the value in the help.
        python_only: no option of the command line, such as an object.
        table: whether a config file may give the contents of the file that the option names.
        several: whether a config file may give a list of strings, though the command line takes one.
    """

    help: str
    group: str
    common: bool = False
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    default_text: str | None = None
    name: str | None = None
    flag: str | None = None
    metavar: str | None = None
    python_only: bool = False
    table: bool = False
    several: bool = False


@dataclass(frozen=True, kw_only=True)
class Part:
    """A field whose value is a dataclass of options; `switch` names the flat boolean option that turns it on."""

    type: type
    prefix: str = ""
    optional: bool = False
    switch: str | None = None
    switch_metadata: Metadata | None = None


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option under its flat name."""

    name: str
    type: Any  # without None: str, int, float, bool or tuple (of strings)
    optional: bool  # None is allowed
    default: Any  # `dataclasses.MISSING` if it must be given
    metadata: Metadata
    path: tuple[str, ...]  # of attributes, from the whole configuration

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def flag(self) -> str:
        return "--" + (self.metadata.flag or self.name).replace("_", "-")

    @property
    def is_pair(self) -> bool:
        """Whether it is a boolean that has a flag for False too, since neither is the default."""
        return self.type is bool and (self.optional or self.default is True)


def option(default: Any = dataclasses.MISSING, *, help: str, group: str, **metadata: Any) -> Any:
    """A dataclass field that is an option; see `Metadata`."""
    return dataclasses.field(default=default, metadata={"option": Metadata(help=help, group=group, **metadata)})


def part(type_: type, *, optional: bool = False, **settings: Any) -> Any:
    """A dataclass field that is a part; optional ones are None unless one of their options is given."""
    declared = {"part": Part(type=type_, optional=optional, **settings)}
    if optional:
        return dataclasses.field(default=None, metadata=declared)
    required = any(field.default is dataclasses.MISSING for field in dataclasses.fields(type_))
    return dataclasses.field(
        default_factory=dataclasses.MISSING if required else type_,  # type: ignore[arg-type]
        metadata=declared,
    )


def options_of(config: type) -> dict[str, Option]:
    """Every option of a configuration and its parts, by flat name, in the order of declaration."""
    if config not in _OPTIONS:
        _OPTIONS[config] = {each.name: each for each in _walk(config, "", ())}
    return _OPTIONS[config]


_OPTIONS: dict[type, dict[str, Option]] = {}


def _walk(config: type, prefix: str, path: tuple[str, ...]) -> Iterator[Option]:
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        here = (*path, field.name)
        nested: Part | None = field.metadata.get("part")
        if nested is not None:
            if nested.switch is not None:
                assert nested.switch_metadata is not None
                yield Option(
                    name=nested.switch,
                    type=bool,
                    optional=False,
                    default=False,
                    metadata=nested.switch_metadata,
                    path=here,
                )
            yield from _walk(nested.type, prefix + nested.prefix, here)
        elif (metadata := field.metadata.get("option")) is not None:
            type_, optional, choices = _plain_type(hints[field.name])
            default_text = metadata.default_text or getattr(config, "DEFAULT_TEXTS", {}).get(field.name)
            yield Option(
                name=metadata.name or prefix + field.name,
                type=type_,
                optional=optional,
                default=field.default,
                metadata=dataclasses.replace(metadata, choices=metadata.choices or choices, default_text=default_text),
                path=here,
            )


def _plain_type(hint: Any) -> tuple[Any, bool, tuple[str, ...]]:
    """The type without None, whether None is allowed, and the choices of a `Literal`, alone or beside a number."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    optional = type(None) in kinds
    plain = [kind for kind in kinds if kind is not type(None)]
    if any(typing.get_origin(kind) is tuple for kind in plain):
        return tuple, optional, ()
    choices = tuple(str(each) for kind in plain if typing.get_origin(kind) is Literal for each in typing.get_args(kind))
    (kind, *_) = [kind for kind in plain if typing.get_origin(kind) is not Literal] or [str]
    return kind, optional, choices


# ---- from values to a configuration, and back


@typing.runtime_checkable
class TracksExplicit(typing.Protocol):
    """A configuration that knows which options were given, even if at their default."""

    explicit: frozenset[str]

    def check_explicit(self) -> None:
        """Raises: ConfigError for options that exclude one another."""
        ...


def build(config: type[T], values: Mapping[str, Any]) -> T:
    """The configuration that flat values make; options that are not named, or None, keep their defaults.

    Raises: ConfigError for a name that is no option, with the nearest one; or a value out of its range.
    """
    known = options_of(config)
    for name in values:
        if name not in known:
            raise unknown_option(name, known)
    for each in known.values():
        if each.required and values.get(each.name) is None:
            raise ConfigError(f"`{each.name}`: missing. Give it.")
    given = {name: value for name, value in values.items() if value is not None}
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
            names = [each.name for each in _walk(nested.type, inner, ()) if each.name in values]
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


def unknown_option(name: str, known: Mapping[str, Option]) -> ConfigError:
    if RENAMED.get(name) in known:
        return ConfigError(f"`{name}` is now `{RENAMED[name]}`. Use that name.")
    near = difflib.get_close_matches(name, [each.name for each in known.values()], n=1)
    return ConfigError(
        f"`{name}`: no such option." + (f" Did you mean `{near[0]}`?" if near else " Check the spelling.")
    )


RENAMED = {
    "answers_per_prompt": "gen_answers_per_prompt",
    "max_new_tokens": "gen_max_new_tokens",
    "stop": "gen_stop",
    "keep_if": "gen_keep_if",
    "keep": "gen_keep",
    "window_length": "seq_len",
    "per_device_train_batch_size": "batch_size",
    "num_train_epochs": "epochs",
    "lr_scheduler_type": "lr_scheduler",
    "warmup_steps": "warmup",
    "num_workers": "dataloader_num_workers",
}
"""Earlier name of an option -> its name."""


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
        kind, _, found = _plain_type(hints[field.name])
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


# ---- files


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
        found[name] = _converted(value, known[name], file)
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


def _converted(value: Any, declared: Option, file: str) -> Any:
    expected: dict[Any, tuple[type, ...]] = {float: (int, float), int: (int,), bool: (bool,), str: (str,)}
    choices = declared.metadata.choices
    if value is None or (declared.metadata.table and isinstance(value, dict)) or value in choices:
        return value
    if declared.type is tuple or (declared.metadata.several and isinstance(value, list)):
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list) and all(isinstance(item, str) for item in items):
            return tuple(items)
        wanted = "a string or a list of strings"
    else:
        wanted = {float: "a number", int: "a whole number", bool: "true or false"}.get(declared.type, "a string")
        wanted += "".join(f" or {each}" for each in choices if declared.type is not str)
        right = isinstance(value, expected.get(declared.type, (str,)))
        if right and (declared.type is bool or not isinstance(value, bool)):
            return value
    raise ConfigError(f"`config` {file}: {declared.name} is {json.dumps(value)}, expected {wanted}. Correct it.")
