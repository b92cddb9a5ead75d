"""`distill import`: log-probabilities of another tool or a server in, cache out."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from pipeline.importing.import_config import ImportConfig
from pipeline.terminal.click_options import build_config, config_options, distill_command, interrupted, json_option


@distill_command(
    "import",
    "distill import distillkit-data/ --output caches/train --tokenizer models/teacher",
    "distill import responses.jsonl --output caches/answers --tokenizer models/teacher",
    "distill import 'rows-*.parquet' --output caches/rows --tokenizer models/teacher --shift 0 \\",
    '    --column "ids=tokens top_ids=ids values=logprobs" --values logprobs',
    config=ImportConfig,
)
@click.argument("source", required=False)
@config_options(ImportConfig, without=("source",))
@json_option()
def command(config_file: str | None, json_file: str | None, **given: Any) -> None:
    """Make a cache from log-probabilities that another tool or a server wrote.

    Reads Parquet, Arrow and JSON lines of DistillKit, axolotl and NeMo-Aligner, responses of vLLM, SGLang and
    OpenAI-compatible servers, base files of llama-perplexity, and any columns with --format columns. The source is read
    twice, and the first pass checks everything. After an interruption, the same command continues.
    """
    if given["source"] is None and config_file is None:
        raise click.UsageError("Missing argument 'SOURCE'.")
    config = build_config(ImportConfig, given, config_file)
    from pipeline.models.paths import check_model_path
    from pipeline.terminal.console import Status, quiet_libraries, show_result

    check_model_path(config.tokenizer)
    quiet_libraries()
    from pipeline.importing.import_cache import import_cache
    from pipeline.terminal.import_view import import_view

    with Status() as status:
        try:
            summary = import_cache(
                config,
                on_stage=status.stage,
                on_step=lambda done, total: status.step(done, total, "rows"),
                on_warning=status.warn,
            )
        except KeyboardInterrupt:
            interrupted(f"complete shards are kept in {config.output}. Run the same command again to continue.")
    show_result(lambda: import_view(summary), lambda: asdict(summary), json_file)
