"""`distill stats`: where the bytes of a cache are, and how its values are distributed."""

from __future__ import annotations

import click

from pipeline.terminal.click_options import distill_command, json_option


@distill_command(
    "stats",
    "distill stats caches/train",
    "distill stats caches/train --json",
)
@click.argument("cache")
@json_option()
def command(cache: str, json_file: str | None) -> None:
    """Show bytes per token by column, file and packed stream, the exact mass, and the teacher's entropy."""
    import cache_format as cf
    from pipeline.inspection import cache_statistics
    from pipeline.terminal.console import Status, show_result
    from pipeline.terminal.statistics_view import statistics_view

    with Status() as status:
        found = cache_statistics(
            cf.open_cache(cache, hidden_layers=[]), on_progress=lambda done, total: status.step(done, total, "rows")
        )
    show_result(lambda: statistics_view(found), lambda: found, json_file)
