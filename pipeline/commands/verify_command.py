"""`distill verify`: every byte of a cache, on demand every value, and some rows against the teacher."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from pipeline.teacher.verify_config import TeacherCheckConfig
from pipeline.terminal.click_options import build_config, config_options, distill_command, here_with_flags, json_option


@distill_command(
    "verify",
    "distill verify caches/train",
    "distill verify caches/train --deep --against-teacher models/teacher --rows 16",
    "distill verify caches/train --against-teacher http://host:8000/v1 --tokenizer models/teacher",
    config=TeacherCheckConfig,
)
@click.argument("cache")
@click.option(
    "--deep", is_flag=True, help="Also check every value: counts, ids, order, sums of probabilities, entropy."
)
@config_options(TeacherCheckConfig, without=("cache",), optional=("against_teacher",))
@json_option()
def command(cache: str, deep: bool, config_file: str | None, json_file: str | None, **given: Any) -> None:
    """Check every byte of a cache, and optionally every value and some rows against the teacher.

    If anything is wrong, the error names the file and the place, and the exit status is 1.
    """
    config = None
    if given["against_teacher"] is not None or config_file is not None:
        config = build_config(TeacherCheckConfig, {**given, "cache": cache}, config_file)
        config.check_paths()
    else:
        for name, value in given.items():
            if value is not None:
                raise click.UsageError(here_with_flags(f"`{name}`: only with `against_teacher`. Name the teacher."))
    import cache_format as cf
    from pipeline.terminal.console import Status, quiet_libraries, show_result
    from pipeline.terminal.verify_view import failed_check, verify_view

    with Status() as status:
        summary = cf.verify_cache(cache, lambda done, total: status.step(done, total, "rows checked"), deep=deep)
        found = None
        if config is not None:
            quiet_libraries()
            from pipeline.teacher.verification import verify_against_teacher

            found = verify_against_teacher(
                config,
                on_stage=status.stage,
                on_progress=lambda done, total: status.step(done, total, "rows computed"),
            )
    if status.silent:  # one of several processes that compute together: the first one reports
        return
    teacher = None if config is None else config.teacher
    compared = {} if found is None else {"teacher": found.to_json()}
    show_result(
        lambda: verify_view(cache, summary, deep, teacher, found),
        lambda: {"ok": found is None or found.agrees, **asdict(summary), **compared},
        json_file,
    )
    if found is not None and not found.agrees:
        raise click.ClickException(failed_check(cache, teacher, found))
