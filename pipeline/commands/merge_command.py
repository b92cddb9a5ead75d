"""`distill merge`: the manifest of a cache whose shards were written separately."""

from __future__ import annotations

import click

from cache_format.wording import quantity
from pipeline.terminal.click_options import distill_command, json_option


@distill_command("merge", "distill merge caches/train")
@click.argument("cache")
@click.option(
    "--stale-after",
    type=click.FloatRange(0, min_open=True),
    default=300.0,
    show_default=True,
    help="Seconds without a sign of life after which a writer on another machine counts as dead.",
)
@json_option()
def command(cache: str, stale_after: float, json_file: str | None) -> None:
    """Finish a cache by writing its manifest, once all shards exist.

    When several processes write one cache, the last of them does this by itself. Use this command for shards that were
    written separately (cache-teacher --shard-range) and then copied into one directory. It does not change a finished
    cache.
    """
    import cache_format as cf
    from pipeline.terminal.console import Status, show_result
    from pipeline.terminal.tables import size

    with Status() as status:
        manifest = cf.finish_cache(
            cache,
            stale_after_s=stale_after,
            on_progress=lambda done, total: status.step(done, total, "shards checked"),
        )
    show_result(
        lambda: (
            f"{cache}: finished. {quantity(manifest.num_rows, 'row')}, {quantity(manifest.num_tokens, 'token')}, "
            f"{size(manifest.stored_bytes)} in {quantity(len(manifest.shards), 'shard')}."
        ),
        lambda: {
            "rows": manifest.num_rows,
            "tokens": manifest.num_tokens,
            "shards": len(manifest.shards),
            "bytes": manifest.stored_bytes,
        },
        json_file,
    )
