"""`distill convert`: the same text and teacher in another form."""

from __future__ import annotations

from typing import Any

import click

from pipeline.terminal.click_options import distill_command, interrupted, json_option


@distill_command(
    "convert",
    "distill convert caches/train caches/train-packed --encoding packed",
    "distill convert caches/train caches/thinner --tail-threshold 0.125",
    "distill convert caches/top-64 caches/top-16 --top-k 16",
)
@click.argument("cache")
@click.argument("output")
@click.option(
    "--encoding",
    type=click.Choice(["columns", "packed"]),
    help="packed: 2/3 to 4/5 of the bytes of columns, readable by distill only.",
)
@click.option(
    "--compression-level",
    type=click.IntRange(1, 22),
    help="zstd level. 19 saves 5 to 10 % of the bytes of columns, but is slow.",
)
@click.option("--levels", type=click.IntRange(36, 256), help="Number of values that a log-probability can take.")
@click.option(
    "--top-k",
    type=click.IntRange(1),
    help="Number of most likely entries to keep; the others join the tail mass. Hidden targets: entries to compute.",
)
@click.option("--samples", type=click.IntRange(1), help="Number of tail samples to keep, from the first.")
@click.option("--tail-threshold", type=float, help="Larger τ for threshold targets: fewer entries, still unbiased.")
@click.option("--drop-hidden", is_flag=True, default=None, help="Leave out the hidden states.")
@click.option("--rows-per-shard", type=click.IntRange(1), help="Rows per shard file.")
@click.option(
    "--rows-per-record-batch", type=click.IntRange(1), help="Rows per record batch, which are compressed together."
)
@json_option()
def command(cache: str, output: str, json_file: str | None, **changes: Any) -> None:
    """Rewrite a cache with another encoding, codebook or shard size, or with fewer entries.

    Everything that no option changes stays the same. After an interruption, the same command continues where it
    stopped.
    """
    import cache_format as cf
    from pipeline.terminal.console import Status, show_result
    from pipeline.terminal.statistics_view import conversion_view

    source = cf.open_cache(cache)
    with Status() as status:
        try:
            for done in cf.convert_cache(cache, output, cf.Conversion(**changes)):
                status.step(done, len(source), "rows")
        except KeyboardInterrupt:
            interrupted(f"complete shards are kept in {output}. Run the same command again to continue.")
    before, after = (cf.open_cache(path).manifest.stored_bytes for path in (cache, output))
    rows, tokens = len(source), source.num_tokens
    show_result(
        lambda: conversion_view(output, rows, tokens, before, after, source.manifest.head_bytes),
        lambda: {"rows": rows, "tokens": tokens, "bytes": {cache: before, output: after}},
        json_file,
    )
