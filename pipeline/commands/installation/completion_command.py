"""`distill completion`: a script with which a shell completes commands, options, choices and paths."""

from __future__ import annotations

import click

from pipeline.terminal.click_options import distill_command

PROGRAM = "distill"
VARIABLE = "_DISTILL_COMPLETE"
"""Set by the script when it asks for completions; click derives the name from the program's."""


@distill_command("completion", "distill completion bash")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print a completion script for a shell.

    Save the output once where your shell looks for such scripts, and start a new shell. The folder must exist.

    \b
      bash  ~/.local/share/bash-completion/completions/distill
      zsh   ~/.zfunc/_distill (with fpath+=~/.zfunc before compinit in ~/.zshrc)
      fish  ~/.config/fish/completions/distill.fish
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    group = click.get_current_context().find_root().command
    click.echo(found(group, {}, PROGRAM, VARIABLE).source())
