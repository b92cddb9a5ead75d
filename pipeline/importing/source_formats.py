"""From a name of a format to the reader of a source, and from the columns of a source to the name of its format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pipeline.errors import ConfigError, DataError
from pipeline.importing.axolotl_reader import LISTS, AxolotlReader
from pipeline.importing.column_reader import PRESETS, REQUIRED, ColumnReader, Preset, first_columns, parse_columns
from pipeline.importing.distillkit_reader import INDICES, LOGPROBS, Compression, DistillKitReader, find_layout
from pipeline.importing.foreign_rows import Reader
from pipeline.importing.import_config import ImportConfig
from pipeline.importing.llama_cpp_reader import MAGIC, LlamaCppReader
from pipeline.importing.server_reader import ServerReader
from pipeline.importing.source_files import DATA_FILES, find_files

LLAMA_CPP_TOP_K = 64
BASE_FILES = (".kld", ".logits", ".dat", ".bin")


def open_source(config: ImportConfig, tokenizer: PreTrainedTokenizerBase) -> Reader:
    """The reader of `config.source`. Raises: DataError, ConfigError."""
    files = find_files(config.source, endings=BASE_FILES if config.format == "llama-cpp" else DATA_FILES)
    name: str = config.format
    columns: set[str] = set()
    if name in ("auto", "distillkit", "axolotl"):
        columns = set() if _is_base(files) else first_columns(files)
    if name == "auto":
        name = _recognised(config, files, columns)
    _check_options(config, name)
    if name == "columns":
        return _columns(config, files, None)
    if name == "llama-cpp":
        return LlamaCppReader(files, config.top_k or LLAMA_CPP_TOP_K)
    if name == "responses":
        return ServerReader(files, tokenizer, **_shift(config))
    if name == "nemo-aligner":
        return _columns(config, files, PRESETS[name])
    if name == "axolotl":
        lists = next((each for each in LISTS if each in columns), None)
        if lists is not None and "target_token_ids" not in columns:
            return AxolotlReader(files, tokenizer, lists, **_shift(config))
        return _columns(config, files, PRESETS[name])
    if {"token_ids", "top_values"} <= columns:
        return _columns(config, files, PRESETS["distillkit-raw"])
    return DistillKitReader(files, Compression.from_yaml(find_layout(config.layout, files)), **_shift(config))


def _recognised(config: ImportConfig, files: Sequence[Path], columns: set[str]) -> str:
    if config.column and {each.partition("=")[0] for each in config.column} >= set(REQUIRED):
        return "columns"
    if _is_base(files):
        return "llama-cpp"
    for name, needed in (
        ("distillkit", {LOGPROBS, INDICES}),
        ("distillkit", {"input_ids", "token_ids", "top_values"}),
        ("axolotl", {"target_token_ids", "target_logprobs"}),
        ("nemo-aligner", {"topk_logits", "topk_token_ids"}),
        ("responses", {"choices"}),
        ("responses", {"meta_info"}),
        ("responses", {"response"}),
        *(("axolotl", {each}) for each in LISTS),
    ):
        if needed <= columns:
            return name
    there = ", ".join(sorted(columns)) or "none"
    raise DataError(
        f"{config.source}: found columns {there}, which no known tool writes. Name them with `format=columns` and "
        "`column`, for example ids=tokens top_ids=ids values=logprobs."
    )


def _check_options(config: ImportConfig, name: str) -> None:
    for option, given, takers in (
        ("column", config.column, ("columns", "distillkit", "axolotl", "nemo-aligner")),
        ("flat_k", config.flat_k, ("columns",)),
        ("layout", config.layout, ("distillkit",)),
        ("values", config.values, ("columns", "distillkit", "axolotl", "nemo-aligner")),
        ("shift", config.shift, ("columns", "distillkit", "axolotl", "nemo-aligner", "responses")),
    ):
        if given not in (None, ()) and name not in takers:
            raise ConfigError(f"`{option}`: format {name} does not have this option. Leave it out.")


def _columns(config: ImportConfig, files: Sequence[Path], preset: Preset | None) -> ColumnReader:
    given = parse_columns(config.column)
    columns = {**(preset.columns if preset else {}), **given}
    if missing := [role for role in REQUIRED if role not in columns]:
        raise ConfigError(f"`column`: {missing[0]} is missing, expected {', '.join(REQUIRED)}. Add {missing[0]}=NAME.")
    values, shift = config.values, config.shift
    if preset is not None:
        values, shift = values or preset.values, preset.shift if shift is None else shift
    if values is None or shift is None:
        option = "values" if values is None else "shift"
        raise ConfigError(f"`{option}`: missing, because columns of any name may hold anything. Give it.")
    return ColumnReader(
        files,
        columns,
        values=values,
        shift=shift,
        flat_k=config.flat_k,
        optional=(preset.optional if preset else frozenset()) - set(given),
    )


def _shift(config: ImportConfig) -> dict[str, int]:
    return {} if config.shift is None else {"shift": config.shift}


def _is_base(files: Sequence[Path]) -> bool:
    with files[0].open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC
