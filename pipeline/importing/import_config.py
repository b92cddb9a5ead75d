"""Options of `distill import` and `distill.import_cache`. Standard library only (see `pipeline.options`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pipeline.models.loading_options import REVISION, TRUST_REMOTE_CODE
from pipeline.options import check_ranges, option

IO, SOURCE, TARGETS, OUTPUT = "Input and output", "What the source holds", "Targets", "Cache"

Format = Literal["auto", "columns", "parquet", "distillkit", "responses", "axolotl", "nemo-aligner", "llama-cpp"]


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """One import of a cache that another tool made."""

    source: str = option(help="File, directory or glob pattern to import.", group=IO, common=True)
    output: str = option(help="Cache directory or URL to write.", group=IO, common=True)
    # A directory or hub name; or (Python only) a tokenizer.
    tokenizer: Any = option(help="The teacher's tokenizer: directory or hub name.", group=IO, common=True)
    format: Format = option(
        "auto",
        help="Tool that wrote the source. parquet: distill export. columns: any other, see `column`. auto: found by "
        "the column names.",
        group=SOURCE,
        common=True,
    )
    column: tuple[str, ...] = option(
        (),
        help="With format columns: ROLE=NAME for ids, top_ids, values, and optionally mask, position_mask, labels, "
        "attention, normaliser, entry_mask. With other formats: a column name to use instead of the usual one.",
        group=SOURCE,
        metavar="ROLE=NAME",
        common=True,
    )
    values: Literal["logprobs", "probabilities", "logits", "renormalised"] | None = option(
        None,
        help="What the values are. renormalised: they sum to 1 over the list, so the tail mass is unknown. logits: "
        "the same unless there is a normaliser.",
        group=SOURCE,
        default_text="that of the format; required for columns",
        common=True,
    )
    shift: int | None = option(
        None,
        help="0: list t predicts token t + 1. 1: list t predicts token t itself.",
        group=SOURCE,
        minimum=0,
        maximum=1,
        default_text="that of the format; required for columns",
        common=True,
    )
    flat_k: int | None = option(
        None,
        help="With format columns: entries per position, if the lists of a row are one flat list.",
        group=SOURCE,
        minimum=1,
        maximum=65535,
    )
    layout: str | None = option(
        None,
        help="With format distillkit: path of compression_config.yaml.",
        group=SOURCE,
        default_text="the one next to the files",
        metavar="FILE",
    )
    requests: str | None = option(
        None,
        help="With format responses: the requests of a batch (OpenAI, vllm run-batch), whose responses are the source.",
        group=SOURCE,
        metavar="FILE",
    )
    keep_columns: tuple[str, ...] = option(
        (),
        help="Column to keep for each document, such as its domain; may be given several times. Not available for "
        "llama-cpp.",
        group=SOURCE,
    )
    temperature: float | None = option(
        None,
        help="Temperature of the teacher's softmax.",
        group=SOURCE,
        above=0,
        default_text="that of an export, otherwise 1",
    )
    drop_repeated_bos: bool = option(
        False, help="Remove the first of two BOS tokens at the beginning of a document.", group=SOURCE
    )
    teacher: str | None = option(
        None,
        help="Name of the teacher to record in the manifest.",
        group=TARGETS,
        default_text="that of an export, otherwise unknown",
        common=True,
    )
    top_k: int | None = option(
        None,
        help="Number of most likely entries to keep per position; the others join the tail mass.",
        group=TARGETS,
        minimum=1,
        maximum=65535,
        default_text="all; 64 for llama-cpp",
        common=True,
    )
    encoding: Literal["columns", "packed"] = option(
        "columns", help="packed takes about four fifths of the bytes.", group=OUTPUT
    )
    compression_level: int = option(9, help="zstd level.", group=OUTPUT, minimum=1, maximum=22)
    rows_per_shard: int | None = option(
        None, help="Rows per shard file.", group=OUTPUT, minimum=1, default_text="about 262,144 tokens"
    )
    overwrite: bool = option(False, help="Replace the cache in `output`.", group=OUTPUT)
    revision: str | None = REVISION(group=OUTPUT)
    trust_remote_code: bool = TRUST_REMOTE_CODE(group=OUTPUT)

    def __post_init__(self) -> None:
        check_ranges(self)
