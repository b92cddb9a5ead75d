"""`distill report`: one HTML file that shows where students and their teacher disagree."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from pipeline.evaluation.report.report_config import ReportConfig
from pipeline.terminal.click_options import build_config, config_options, distill_command, json_option


@distill_command(
    "report",
    "distill report caches/heldout --student students/first --student students/second",
    "distill report students/first --output first.html",
    config=ReportConfig,
    flags={"source": "CACHE|RUN"},
)
@click.argument("source", nargs=-1, required=True, metavar="CACHE|RUN...")
@config_options(ReportConfig, without=("source",))
@json_option()
def command(source: tuple[str, ...], config_file: str | None, json_file: str | None, **given: Any) -> None:
    """Write an HTML page that shows where students and their teacher disagree.

    Give a cache and the students to compare, or the output directory of a training run, which knows its held-out cache.
    """
    config = build_config(ReportConfig, {**given, "source": source}, config_file)
    from pipeline.evaluation.report.report_sources import find_sources

    find_sources(config)  # wrong paths, before seconds of imports
    from pipeline.terminal.console import Status, quiet_libraries, show_result

    quiet_libraries()
    from pipeline.evaluation.report.report import write_report
    from pipeline.terminal.report_view import report_view

    with Status() as status:
        summary = write_report(
            config,
            on_stage=status.stage,
            on_progress=lambda done, total: status.step(done, total, "rows"),
            on_warning=status.warn,
        )
    show_result(lambda: report_view(summary), lambda: asdict(summary), json_file)
