"""`distill env`: what a bug report should say about an installation and its machine."""

from __future__ import annotations

from pipeline.terminal.click_options import distill_command, json_option


@distill_command("env", "distill env --json environment.json")
@json_option()
def command(json_file: str | None) -> None:
    """Show versions, devices, attention kernels and cache directories, for bug reports.

    The output contains no access tokens and no names of users or hosts.
    """
    from pipeline.commands.installation.environment import describe_environment
    from pipeline.commands.installation.environment_view import environment_view
    from pipeline.terminal.console import quiet_libraries, show_result

    try:
        quiet_libraries()
    except Exception:  # transformers does not load, which the report says
        pass
    found = describe_environment()
    show_result(lambda: environment_view(found), lambda: found, json_file)
