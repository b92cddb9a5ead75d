"""The command line: one file for each command, which turns options into one call and its result into one view.

    distill cache-teacher   text + teacher ─▶ cache          distill inspect   one row, token by token
    distill train-student   cache + student ─▶ checkpoint    distill stats     sizes and distributions
    distill evaluate        held-out cache + student         distill verify    checksums, values, teacher
    distill plan            bytes and time in advance        distill convert   other encoding, fewer entries
    distill merge           shards of several machines       distill push      cache ─▶ hub
    distill import          another tool's files ─▶ cache    distill export    cache ─▶ another tool's files
    distill report          cache + students ─▶ HTML page    distill env       versions and devices, for bug reports
    distill completion      script for a shell

Results go to stdout, progress and errors to stderr. An error that the user can act on is one line and exit status 1,
wrong usage 2, an interrupt 130; a bug keeps its traceback. A command is imported when it is called, and what it needs
when its options have been checked: help takes neither numpy nor torch.
"""

from __future__ import annotations

import importlib
import os
import signal
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from pipeline.terminal.output_encoding import use_fallbacks

COMMANDS = {
    "cache-teacher": "cache_teacher_command",
    "plan": "plan_command",
    "train-student": "train_student_command",
    "evaluate": "evaluate_command",
    "report": "report_command",
    "inspect": "inspect_command",
    "stats": "stats_command",
    "verify": "verify_command",
    "convert": "convert_command",
    "merge": "merge_command",
    "import": "exchange.import_command",
    "export": "exchange.export_command",
    "push": "push_command",
    "env": "installation.env_command",
    "completion": "installation.completion_command",
}
"""Command -> module of this package that defines it as `command`, in the order of the flow."""

SUMMARIES = {
    "cache-teacher": "Run a teacher over a text and cache its targets.",
    "plan": "Predict size and time of a cache.",
    "train-student": "Train a student on a cache.",
    "evaluate": "Compare students with their teacher on a held-out cache.",
    "report": "Write an HTML page that shows where students and teacher disagree.",
    "inspect": "Show one row of a cache, token by token.",
    "stats": "Show sizes and distributions of a cache.",
    "verify": "Check a cache: bytes, values, and some rows against the teacher.",
    "convert": "Rewrite a cache: other encoding, other shards, fewer entries.",
    "merge": "Finish a cache whose shards were written separately.",
    "import": "Make a cache from another tool's log-probabilities.",
    "export": "Write a cache as another tool's files.",
    "push": "Upload a cache or a student to the Hugging Face hub.",
    "env": "Show versions and devices, for bug reports.",
    "completion": "Print a completion script for a shell.",
}


class _Commands(click.Group):
    """Imports a command when it is called; the overview needs none of them."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        use_fallbacks()
        return super().main(*args, **kwargs)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"pipeline.commands.{COMMANDS[cmd_name]}")
        command: click.Command = module.command
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        found = [CompletionItem(name, help=text) for name, text in SUMMARIES.items() if name.startswith(incomplete)]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(SUMMARIES.items()))

    def invoke(self, ctx: click.Context) -> Any:
        signal.signal(signal.SIGTERM, _interrupt)
        return super().invoke(ctx)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _end_at_once() -> None:
    """In a forked process. A pool that is closed ends its workers with this signal and waits for them, but a worker may
    never get to run a handler."""
    if signal.getsignal(signal.SIGTERM) is _interrupt:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_end_at_once)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="distill", prog_name="distill")
def main() -> None:
    """Offline knowledge distillation of language models.

    A large teacher runs once over a text and leaves a cache of sparse soft targets. Any number of students are then
    trained from the cache, on machines that never see the teacher.
    """
