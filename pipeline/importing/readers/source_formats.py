"""From the name of a format, or the columns of a source, to its reader."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.errors import ConfigError, DataError
from pipeline.importing.exported_facts import ExportedFacts
from pipeline.importing.import_config import ImportConfig
from pipeline.importing.readers.axolotl_reader import LISTS, AxolotlReader
from pipeline.importing.readers.batch_requests import BatchRequests
from pipeline.importing.readers.column_reader import PRESETS, REQUIRED, ColumnReader, first_columns, parse_columns
from pipeline.importing.readers.distillkit_reader import INDICES, LOGPROBS, Compression, DistillKitReader, find_layout
from pipeline.importing.readers.foreign_rows import Values
from pipeline.importing.readers.format_reader import Reader
from pipeline.importing.readers.llama_cpp_reader import MAGIC, LlamaCppReader
from pipeline.importing.readers.server_reader import ServerReader
from pipeline.importing.readers.source_files import DATA_FILES, find_files

LLAMA_CPP_TOP_K = 64
BASE_FILES = (".kld", ".logits", ".dat", ".bin")

# Form of a format -> columns that it has and no other form does; the first that is there counts.
FORMS: tuple[tuple[str, set[str]], ...] = (
    ("distillkit", {LOGPROBS, INDICES}),
    ("distillkit-raw", {"input_ids", "token_ids", "top_values"}),
    ("axolotl-prepared", {"target_token_ids", "target_logprobs", "target_mask"}),
    ("axolotl", {"target_token_ids", "target_logprobs"}),
    ("parquet", {"input_ids", "top_ids", "logprobs"}),
    ("nemo-aligner", {"topk_logits", "topk_token_ids"}),
    *(("responses", {name}) for name in ("choices", "meta_info", "response")),
    *(("axolotl", {name, text}) for name in LISTS for text in ("input_ids", "messages")),
)


def open_source(config: ImportConfig, tokenizer: PreTrainedTokenizerBase) -> Reader:
    """The reader of `config.source`. Raises: DataError, ConfigError."""
    files = find_files(config.source, endings=BASE_FILES if config.format == "llama-cpp" else DATA_FILES)
    form = _form(config, files)
    _check_options(config, form)
    common: dict[str, Any] = {"files": files, "keep_columns": config.keep_columns}
    if config.shift is not None:
        common["shift"] = config.shift
    if form == "columns" or form in PRESETS:
        return _columns(config, files, form)
    if form == "distillkit":
        return DistillKitReader(compression=Compression.from_yaml(find_layout(config.layout, files)), **common)
    if form == "axolotl":
        columns = first_columns(files)
        column = next((each for each in LISTS if each in columns), None)
        return AxolotlReader(tokenizer=tokenizer, column=column, **common)
    if form == "responses":
        requests = None if config.requests is None else BatchRequests(config.requests)
        return ServerReader(tokenizer=tokenizer, requests=requests, **common)
    return LlamaCppReader(files=files, top_k=config.top_k or LLAMA_CPP_TOP_K)


def _form(config: ImportConfig, files: Sequence[Path]) -> str:
    """The form of the given format that the source has; of any format if it is `auto`."""
    if config.format in ("columns", "parquet", "llama-cpp", "responses", "nemo-aligner"):
        return config.format
    if config.format == "auto" and set(REQUIRED) <= set(parse_columns(config.column)):
        return "columns"
    if config.format == "auto" and _is_base(files):
        return "llama-cpp"
    columns = first_columns(files)
    for form, needed in FORMS:
        if needed <= columns and config.format in ("auto", form.partition("-")[0]):
            return form
    there = ", ".join(sorted(columns)) or "none"
    whose = "no known tool writes" if config.format == "auto" else f"{config.format} does not write"
    raise DataError(
        f"{config.source}: found columns {there}, which {whose}. Name them with `format=columns` and `column`, for "
        "example ids=tokens top_ids=ids values=logprobs."
    )


def _check_options(config: ImportConfig, form: str) -> None:
    columns = ("columns", *PRESETS)
    for option, given, takers in (
        ("column", config.column, columns),
        ("values", config.values, columns),
        ("flat_k", config.flat_k, columns),
        ("layout", config.layout, ("distillkit",)),
        ("requests", config.requests, ("responses",)),
        ("shift", config.shift, (*columns, "distillkit", "axolotl", "responses")),
        ("keep_columns", config.keep_columns, (*columns, "distillkit", "axolotl", "responses")),
    ):
        if given not in (None, ()) and form not in takers:
            raise ConfigError(
                f"`{option}`: the source has the form {form}, which does not have this option. Leave it out."
            )


def _columns(config: ImportConfig, files: Sequence[Path], form: str) -> ColumnReader:
    preset, given = PRESETS.get(form), parse_columns(config.column)
    columns = {**(preset.columns if preset else {}), **given}
    if missing := [role for role in REQUIRED if role not in columns]:
        raise ConfigError(f"`column`: {missing[0]} is missing, expected {', '.join(REQUIRED)}. Add {missing[0]}=NAME.")
    values, shift = config.values, config.shift
    exported = None if preset is None or "values" in given else ExportedFacts.of_files(files)
    if exported is not None:
        values = _exported_values(config, exported)
    if preset is not None:
        values, shift = values or preset.values, preset.shift if shift is None else shift
    if values is None or shift is None:
        option = "values" if values is None else "shift"
        raise ConfigError(
            f"`{option}`: missing, expected it with `format=columns`, because column names do not say what "
            "they hold. Give it."
        )
    return ColumnReader(
        files=files,
        keep_columns=config.keep_columns,
        columns=columns,
        values=values,
        shift=shift,
        flat_k=config.flat_k,
        optional=(preset.optional if preset else frozenset()) - set(given),
        exported=exported,
    )


def _exported_values(config: ImportConfig, exported: ExportedFacts) -> Values:
    """What the values of exported files are. Raises: ConfigError if an option says something else."""
    values: Values = "renormalised" if exported.renormalised else "logprobs"
    for option, given, recorded in (
        ("values", config.values, values),
        ("temperature", config.temperature, exported.temperature),
    ):
        if given not in (None, recorded):
            raise ConfigError(
                f"`{option}` {given}: the source was exported from a cache with {option} {recorded}. Leave it out."
            )
    return values


def _is_base(files: Sequence[Path]) -> bool:
    with files[0].open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC
