"""From declared options (`pipeline.options`) to click: parameters, grouped help, `--config`, errors that name flags.

A parameter that was not given is None, so that a config file can give it and the dataclass keeps its default.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
from click.shell_completion import CompletionItem

from cache_format.cache_errors import DistillError
from pipeline.errors import OPTION
from pipeline.options import RENAMED, Option, build, options_of, read_config

T = TypeVar("T")


class _Text(click.types.StringParamType):
    """A string that a shell completes as a path: most are, and the others have nothing to complete."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


TEXT = _Text()
MANIFESTS = ("manifest.json", "manifest.partial.json")


class DistillCommand(click.Command):
    """A command whose help shows options in groups, and whose errors name flags.

    Args:
        flags: the flags of further options whose flag is not their name, by name.
    """

    def __init__(
        self, *args: Any, config: type | None = None, flags: dict[str, str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        for parameter in self.params:
            if parameter.type is click.STRING:
                parameter.type = TEXT
        declared = {} if config is None else options_of(config)
        self.flags = {each.name: each.flag for each in declared.values()} | (flags or {})
        self.groups = {each.name: each.metadata.group for each in declared.values()}
        self.common = {each.name for each in declared.values() if each.metadata.common}
        if any(name not in self.common for name in self.groups):
            self.params.append(
                click.Option(
                    ["--help-all"],
                    is_flag=True,
                    expose_value=False,
                    is_eager=True,
                    callback=_show_everything,
                    help="Show every option and exit.",
                )
            )

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        found = super().shell_complete(ctx, incomplete)
        for each in found:
            each.help = None if each.help is None else with_flags(each.help, self.flags)
        return found

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            new = RENAMED.get(error.option_name.lstrip("-").replace("-", "_"))
            if new in self.flags:
                raise click.UsageError(f"{error.option_name} is now {self.flags[new]}. Use that name.", ctx) from error
            raise

    def invoke(self, ctx: click.Context) -> Any:
        from pipeline.terminal.error_lines import describe_os_error, is_lost_peer, rank_prefix

        try:
            return super().invoke(ctx)
        except DistillError as error:
            line = " ".join(str(error).split("\n"))
            raise click.ClickException(rank_prefix() + with_flags(line, self.flags)) from error
        except KeyboardInterrupt:
            interrupted("nothing was changed.")
        except BrokenPipeError:
            raise
        except OSError as error:
            raise click.ClickException(rank_prefix() + describe_os_error(error, ctx.params.get("output"))) from error
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
            raise click.ClickException(f"{rank_prefix()}another process has failed; see its error.") from error

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        everything = ctx.meta.get("distill.help_all", False)
        sections: dict[str, list[tuple[str, str]]] = {}
        hidden = 0
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            group = self.groups.get(parameter.name or "", "Options")
            if not everything and parameter.name in self.groups and parameter.name not in self.common:
                hidden += 1
                continue
            sections.setdefault(group, []).append((record[0], with_flags(record[1], self.flags)))
        rest = sections.pop("Options", [])
        for title, records in (*sections.items(), ("Options", rest)):
            with formatter.section(title):
                formatter.write_dl(records)
        if hidden:
            formatter.write_paragraph()
            formatter.write_text(f"{hidden} more options: see {ctx.command_path} --help-all")


def distill_command(
    name: str, *examples: str, config: type | None = None, flags: dict[str, str] | None = None
) -> Callable[[Callable[..., Any]], DistillCommand]:
    """A decorator that makes a function a command.

    Args:
        examples: lines to show at the end of the help.
        config, flags: of `DistillCommand`; options of the configuration are added by `config_options`.
    """
    epilog = "Example:\n\n\b\n" + "\n".join(f"  {line}" for line in examples)
    return click.command(name, cls=DistillCommand, config=config, flags=flags, epilog=epilog)


def _show_everything(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:  # not while a shell completes
        ctx.meta["distill.help_all"] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


def with_flags(text: str, flags: dict[str, str]) -> str:
    """`top_k` -> --top-k, `tail=bucket` -> --tail bucket, `packing=False` -> --no-packing, everywhere in `text`."""

    def flag(found: Any) -> str:
        name, value = found[1], found[2]
        shown = flags.get(name, "--" + name.replace("_", "-"))
        if value is None or value == "True":
            return shown
        if value == "False":
            return "--no-" + shown.removeprefix("--")
        return f"{shown} {value}"

    return OPTION.sub(flag, text)


def here_with_flags(text: str) -> str:
    """`with_flags` for the command that is running."""
    ctx = click.get_current_context(silent=True)
    command = None if ctx is None else ctx.command
    return with_flags(text, command.flags if isinstance(command, DistillCommand) else {})


def config_options(
    config: type, *, without: Sequence[str] = (), multiple: Sequence[str] = (), optional: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that adds the options of a configuration, and `--config`.

    Args:
        without: options that this command does not have.
        multiple: options that this command takes several times, once for each run.
        optional: options without which this command does something else.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        function = click.option(
            "--config",
            "config_file",
            metavar="FILE",
            help="TOML or JSON file of options (names as here, without the leading --), or a directory with "
            "distill_config.json; flags override it.",
        )(function)
        for each in reversed(options_of(config).values()):
            if each.name not in without and not each.metadata.python_only:
                function = _click_option(
                    each, several=each.name in multiple, required=each.required and each.name not in optional
                )(function)
        return function

    return decorate


def _click_option(
    declared: Option, *, several: bool, required: bool
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    metadata = declared.metadata
    text = metadata.help
    settings: dict[str, Any] = {"default": None}
    names = [declared.flag]
    if metadata.flag is not None:
        names.append("--" + declared.name.replace("_", "-"))
    if declared.type is bool:
        if declared.is_pair:
            names = [f"{declared.flag}/--no-{declared.flag.removeprefix('--')}"]
        settings["is_flag"] = True
    else:
        settings |= {"type": _click_type(declared), "metavar": metadata.metavar, "multiple": several}
        if declared.type is tuple:
            settings["multiple"] = True
    default = metadata.default_text
    if default is None and not declared.required and not any(declared.default is each for each in (None, False, ())):
        default = f"{declared.default:g}" if isinstance(declared.default, float) else str(declared.default)
    if default is not None:
        text += f" [default: {default}]"
    elif required:
        text += " [required]"
    return click.option(*names, declared.name, cls=_Option, help=text, **settings)


def _click_type(declared: Option) -> Any:
    metadata = declared.metadata
    if metadata.choices and declared.type is str:
        return click.Choice(metadata.choices)
    if metadata.choices:
        return _NumberOr(metadata.choices, _number_type(declared))
    return _number_type(declared)


def _number_type(declared: Option) -> Any:
    metadata = declared.metadata
    if declared.type is int:
        low, high = metadata.minimum, metadata.maximum
        if low is None and high is None:
            return int
        return click.IntRange(None if low is None else int(low), None if high is None else int(high))
    if declared.type is not float:
        return click.STRING
    low = metadata.minimum if metadata.above is None else metadata.above
    high = metadata.maximum if metadata.below in (None, math.inf) else metadata.below
    if low is None and high is None:
        return click.FLOAT
    return click.FloatRange(low, high, min_open=metadata.above is not None, max_open=high == metadata.below)


class _NumberOr(click.ParamType):
    """A number, or one of a few words."""

    def __init__(self, words: Sequence[str], number: click.ParamType) -> None:
        self.words, self.number, self.name = words, number, "|".join(["N", *words])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in self.words:
            return value
        if not str(value).lstrip("-").replace(".", "", 1).isdecimal():
            self.fail(f"{value!r} is neither a number nor {' or '.join(self.words)}.", param, ctx)
        return self.number.convert(value, param, ctx)


class _Option(click.Option):
    """Its help does not repeat ranges such as x>=1; an error does."""

    def get_help_extra(self, ctx: click.Context) -> Any:
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        return extra

    def make_metavar(self, ctx: click.Context) -> str:
        names = {click.IntRange: "INTEGER", click.FloatRange: "NUMBER"}
        return (
            names.get(type(self.type), "")
            if not self.metavar and type(self.type) in names
            else super().make_metavar(ctx)
        )


def read_values(config: type, given: dict[str, Any], config_file: str | None) -> dict[str, Any]:
    """The options of a command by name: the config file's, overridden by those on the command line.

    Raises: UsageError (exit status 2) if one that must be given is missing.
    """
    named = {name: value for name, value in given.items() if value is not None and value != ()}
    values = {**({} if config_file is None else read_config(config_file, config, named)), **named}
    for each in options_of(config).values():
        if each.required and each.name in given and values.get(each.name) is None:
            raise click.UsageError(f"Missing option '{each.flag}'.")
    return values


def build_config(config: type[T], given: dict[str, Any], config_file: str | None) -> T:
    """The configuration that a command was given. Raises: UsageError, ConfigError."""
    return build(config, read_values(config, given, config_file))


def json_option() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`--json [FILE]`, the same for every command."""
    return click.option(
        "--json",
        "json_file",
        is_flag=False,
        flag_value="-",
        metavar="[FILE]",
        callback=_check_json_file,
        help="Write the result as JSON to FILE, or print it instead of the table.",
    )


def _check_json_file(ctx: click.Context, _: click.Parameter, value: str | None) -> str | None:
    """Finds a wrong path before hours of work rather than after. Raises: UsageError."""
    if value in (None, "-"):
        return value
    file = Path(value)
    if file.is_dir():
        raise click.UsageError(f"--json {value}: found a directory, expected the name of a file.", ctx)
    if not file.exists() and not (file.parent.is_dir() and os.access(file.parent, os.W_OK)):
        raise click.UsageError(f"--json {value}: {file.parent} is not a writable directory. Choose another one.", ctx)
    if any((file.parent / name).exists() for name in MANIFESTS):
        problem = "it lies in a cache, which no command would write to afterwards"
        raise click.UsageError(f"--json {value}: {problem}. Choose another directory.", ctx)
    if file.exists() and not os.access(file, os.W_OK):
        raise click.UsageError(f"--json {value}: the file may not be written. Choose another name.", ctx)
    return value


def interrupted(what_is_kept: str) -> NoReturn:
    """Says what an interrupt left behind, once, and exits with status 130. A second interrupt says nothing more."""
    from pipeline.terminal.console import err

    meta = click.get_current_context().meta
    if int(os.environ.get("RANK", "0")) == 0 and not meta.get("distill.interrupted"):
        meta["distill.interrupted"] = True
        err.print(f"Interrupted: {what_is_kept}")
    raise SystemExit(130)
