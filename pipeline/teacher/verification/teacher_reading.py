"""What the teacher of a cache read, where that is not what the rows hold.

A cache holds the student's side alone. If the teacher had prompts of its own (`teacher_prompts`), they are read again
from the data that the cache was made from, with the options that the manifest records, and their fingerprint is
compared with the recorded one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

import cache_format as cf
from pipeline.errors import ConfigError, DataError
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.formats.teacher_prompts import TeacherText
from pipeline.teacher.text.packing import build_corpus
from pipeline.teacher.text.prompts import open_prompts
from pipeline.teacher.text.reading.data_paths import data_name

Reading = Callable[[cf.CacheRow], TeacherText | None]
"""What the teacher read for a row; None: the row."""


def open_reading(cache: cf.Cache, location: str, tokenizer: PreTrainedTokenizerBase, data: Any) -> Reading:
    """What the teacher of a cache read.

    Args:
        location: of the cache, for errors.
        data: what the cache was made from; None: what its manifest names.

    Raises:
        ConfigError: the data are not those that the cache was made from, cannot be found, or are not needed.
    """
    recorded = cache.metadata.corpus
    if recorded.get("teacher_stream_sha256") is None:
        if data is not None:
            raise ConfigError(
                "`data`: the teacher of this cache read the cache's own rows, so no data are needed. Leave it out."
            )
        return lambda row: None
    given = recorded["source"] if data is None else data
    try:
        found, reading = _read(cache, given, tokenizer)
    except DataError as error:
        raise ConfigError(
            f"{location}: its teacher read prompts that are not in the cache, and they cannot be read from the data "
            f"again: {error} Give the data that the cache was made from as `data`."
        ) from error
    expected = {name: recorded.get(name) for name in found}
    if found != expected:
        raise ConfigError(
            f"{location}: found another text in {data_name(given)} than its teacher read ("
            f"{cf.listed(cf.differences(expected, found))}). Give the data that the cache was made from as `data`."
        )
    return reading


def _read(cache: cf.Cache, data: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, Any], Reading]:
    """Fingerprints of the data, as in a manifest, and what the teacher reads of them."""
    recorded = dict(cache.metadata.corpus)
    if recorded.get("generation") is None:
        corpus = build_corpus(DataConfig.from_json(recorded, data), tokenizer)
        fingerprint = corpus.description.get("teacher_stream_sha256")
        found = {"token_stream_sha256": corpus.token_stream_sha256, "teacher_stream_sha256": fingerprint}
        return found, lambda row: corpus[row.row].teacher
    del recorded["loss_on"]  # the answer
    prompts = open_prompts(DataConfig.from_json(recorded, data), tokenizer)
    answers = [(line["document"], line["prompt_tokens"]) for line in cache.answers()]

    def reading(row: cf.CacheRow) -> TeacherText | None:
        document, prompt_tokens = answers[row.row]
        return prompts.teacher_text(document, row.input_ids, prompt_tokens)

    return {"teacher_stream_sha256": prompts.description.get("teacher_stream_sha256")}, reading
