"""What an option is: a field of a frozen dataclass, with its help, group and range as metadata.

A configuration may consist of parts, which are dataclasses of their own (`part`). Their fields join the options of the
whole under flat names, so that every option has one name everywhere: `gen_top_p` is `GenerationConfig.top_p`.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.errors import ConfigError

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
        text: whether a string is text rather than a path, so that a ~ at its beginning is kept.
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
    text: bool = False


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
    objects: bool = False  # Python may give an object, such as a loaded model

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
        _OPTIONS[config] = {each.name: each for each in walk(config, "", ())}
    return _OPTIONS[config]


_OPTIONS: dict[type, dict[str, Option]] = {}


def walk(config: type, prefix: str, path: tuple[str, ...]) -> Iterator[Option]:
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
            yield from walk(nested.type, prefix + nested.prefix, here)
        elif (metadata := field.metadata.get("option")) is not None:
            type_, optional, choices = plain_type(hints[field.name])
            default_text = metadata.default_text or getattr(config, "DEFAULT_TEXTS", {}).get(field.name)
            yield Option(
                name=metadata.name or prefix + field.name,
                type=type_,
                optional=optional,
                default=field.default,
                metadata=dataclasses.replace(metadata, choices=metadata.choices or choices, default_text=default_text),
                path=here,
                objects=Any in (hints[field.name], *typing.get_args(hints[field.name])),
            )


def plain_type(hint: Any) -> tuple[Any, bool, tuple[str, ...]]:
    """The type without None, whether None is allowed, and the choices of a `Literal`, alone or beside a number."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    optional = type(None) in kinds
    plain = [kind for kind in kinds if kind is not type(None)]
    if any(typing.get_origin(kind) is tuple for kind in plain):
        return tuple, optional, ()
    choices = tuple(str(each) for kind in plain if typing.get_origin(kind) is Literal for each in typing.get_args(kind))
    (kind, *_) = [kind for kind in plain if typing.get_origin(kind) is not Literal] or [str]
    return kind, optional, choices


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
