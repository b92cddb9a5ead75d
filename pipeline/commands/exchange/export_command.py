"""`distill export`: a cache in, Parquet files of another tool out."""

from __future__ import annotations

from dataclasses import asdict

import click

from pipeline.terminal.click_options import distill_command, json_option


@distill_command(
    "export",
    "distill export caches/train --output train-parquet",
    "distill export caches/train --output train-axolotl --format axolotl",
)
@click.argument("cache")
@click.option("--output", required=True, help="Directory to write; it must be empty or not exist. [required]")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["parquet", "axolotl"]),
    default="parquet",
    help="parquet: lists of ids and log-probabilities. axolotl: as in its prepared datasets. [default: parquet]",
)
@json_option()
def command(cache: str, output: str, format_: str, json_file: str | None) -> None:
    """Write the exact entries of a cache as Parquet files that other tools read.

    distill import can read both formats.
    """
    from pipeline.importing.export_cache import export_cache
    from pipeline.terminal.console import Status, show_result
    from pipeline.terminal.import_view import export_view

    with Status() as status:
        summary = export_cache(cache, output, format_, on_step=lambda done, of: status.step(done, of, "rows"))
    show_result(lambda: export_view(summary), lambda: asdict(summary), json_file)
