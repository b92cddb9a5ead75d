"""Upload a finished cache to a dataset repository on the Hugging Face hub.

The card of a cache lists its shards, so `datasets.load_dataset("OWNER/NAME")` opens it, and a student trains from
hf://datasets/OWNER/NAME.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

import cache_format as cf
from pipeline.errors import ConfigError, DataError

FILES = (
    "manifest.json",
    "README.md",
    "distill_config.json",
    "lexicon.arrow",
    "head.safetensors",
    "answers.jsonl",
    "shards/*.arrow",
    "shards/*.json",
    "tokenizer/**",
)
CONNECTION = (
    "httpx",
    "httpx2",
    "httpcore",
    "httpcore2",
    "requests",
    "urllib3",
)  # packages whose connection errors reach the caller


def check_push(path: str | os.PathLike[str], name: str) -> None:
    """Check before days of work whether a cache can be pushed.

    Raises:
        ConfigError: `name` is not the name of a repository, or the cache is not on a local disk.
    """
    if "://" in os.fspath(path):
        raise ConfigError(
            f"`push_to_hub` {name}: only a local cache can be pushed, found {path}. Copy it to a disk first, then: "
            f"distill push DIRECTORY {name}"
        )
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"`push_to_hub` {name}: {error} Give OWNER/NAME.") from error


def push_cache(
    path: str | os.PathLike[str],
    repository: str,
    *,
    private: bool = False,
    on_stage: Callable[[str], None] = lambda _: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Upload a cache and return the address of its repository; an existing repository gets the files that differ.

    All checksums are verified first. The manifest is uploaded last, in a commit of its own: until then the repository
    is an unfinished cache and is read as one.

    Raises:
        ConfigError: `repository` is not the name of a repository, or the cache is not on a local disk.
        CacheError: the cache is damaged.
        DataError: the hub refuses, or cannot be reached.
    """
    check_push(path, repository)
    on_stage(f"checking {path}")
    cf.verify_cache(path, on_progress)
    on_stage(f"uploading to {repository}")
    api, folder = HfApi(), Path(path)
    try:
        address = api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        for patterns, message in ((FILES[1:], "shards"), (FILES[:1], "manifest")):
            api.upload_folder(
                repo_id=repository,
                repo_type="dataset",
                folder_path=folder,
                allow_patterns=list(patterns),
                commit_message=f"distill cache: {message}",
            )
    except Exception as error:
        expected = isinstance(error, (HfHubHTTPError, OSError, ValueError))
        if not expected and type(error).__module__.partition(".")[0] not in CONNECTION:
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"{repository}: the hub did not accept the cache: {lines[0].rstrip('.')}. {path} is complete and "
            f"unchanged; log in (hf auth login) or check the connection, then: distill push {path} {repository}"
        ) from error
    return str(address)
