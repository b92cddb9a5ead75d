"""`distill inspect`: one row, token by token, with what the teacher expected."""

from __future__ import annotations

import click

from pipeline.terminal.click_options import distill_command, json_option


@distill_command("inspect", "distill inspect caches/train --row 3")
@click.argument("cache")
@click.option("--row", default=0, show_default=True, type=int, help="Number of the row; negative counts from the end.")
@click.option("--start", default=0, show_default=True, type=click.IntRange(0), help="First position to show.")
@click.option("--positions", default=32, show_default=True, type=click.IntRange(1), help="Number of positions to show.")
@click.option(
    "--candidates",
    default=4,
    show_default=True,
    type=click.IntRange(1),
    help="Number of tokens to show per position, most likely first.",
)
@json_option()
def command(cache: str, row: int, start: int, positions: int, candidates: int, json_file: str | None) -> None:
    """Show one row, token by token, with what the teacher expected next."""
    import cache_format as cf

    opened = cf.open_cache(cache, hidden_layers=[]).with_states()
    if not -len(opened) <= row < len(opened):
        raise click.BadParameter(f"{cache} has rows 0 to {len(opened) - 1}", param_hint="--row")
    from pipeline.inspection import inspect_row
    from pipeline.terminal.console import quiet_libraries, show_result
    from pipeline.terminal.row_view import row_view

    quiet_libraries()
    from pipeline.models.tokenizers import load_cache_tokenizer

    tokenizer = load_cache_tokenizer(opened)
    shown = inspect_row(
        opened,
        row % len(opened),
        lambda token: tokenizer.decode([token]),
        candidates=candidates,
        start=start,
        positions=positions,
    )
    show_result(lambda: row_view(shown), lambda: shown, json_file)
