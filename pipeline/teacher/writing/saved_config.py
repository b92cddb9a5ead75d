"""distill_config.json of a cache: the options that made it, in a form that `config` takes back to make it again."""

from __future__ import annotations

import json

from cache_format.storage.directory import open_directory, write_bytes
from pipeline.models.loading import model_name
from pipeline.options import CONFIG_FILE, NOT_SAVED, flat, options_of
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.writing.worker_config import PROCESSES


def config_record(config: CacheTeacherConfig) -> bytes:
    """The contents of the file; made before an old cache is removed, so that nothing is lost if they cannot be.

    They leave out the output and which process wrote what, so that every run with the same settings writes the same
    bytes; text given as an object, which no file can hold; and what is not repeated.
    """
    declared = options_of(CacheTeacherConfig)
    options = {
        name: value
        for name, value in flat(config).items()
        if name not in NOT_SAVED and declared[name].metadata.group != PROCESSES
    }
    options["teacher"] = model_name(config.teacher)
    data = config.data.data
    if not (isinstance(data, str) or (isinstance(data, tuple) and all(isinstance(each, str) for each in data))):
        options.pop("data", None)
    if not isinstance(config.tokenizer, str):
        options.pop("tokenizer", None)
    return (json.dumps({"config": options}, indent=2, sort_keys=True) + "\n").encode()


def save_config(output: str, record: bytes) -> None:
    """Writes the file into a cache that has been begun, unless it is there. Before the manifest, so that no finished
    cache is without it."""
    directory = open_directory(output)
    if CONFIG_FILE in directory.names():
        return
    try:
        write_bytes(directory, CONFIG_FILE, record)
    except FileNotFoundError:
        # Another worker finished the cache, which removes temporary files. It had written this file before.
        if CONFIG_FILE not in directory.names():
            raise
