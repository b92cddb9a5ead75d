"""The Hugging Face hub: whether it can be reached; uploads of finished caches as datasets and of students as models.

The card of a cache lists its shards, so `datasets.load_dataset("OWNER/NAME")` opens it, and a student trains from
hf://datasets/OWNER/NAME.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import HfApi, constants, get_session
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

import cache_format as cf
from cache_format.manifest.manifest import MANIFEST, PARTIAL_MANIFEST, TOKENIZER_DIR
from cache_format.write.occupancy import BESIDE
from pipeline.errors import ConfigError, DataError
from pipeline.options import CONFIG_FILE

FILES = (MANIFEST, *BESIDE, "shards/*.arrow", "shards/*.json", f"{TOKENIZER_DIR}/**")
# Of a student: what only continues or watches its training, or has paths of this machine.
NOT_PUSHED = ("checkpoint-*/**", "claims/**", "runs/**", "training_args.bin", "*.tmp")
# What decides which model is loaded: left over from another student, it would be loaded instead, or mixed in.
REPLACED = ("config.json", "model*.safetensors", "model.safetensors.index.json", "adapter_*")
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
    _check_name(name)


def _check_name(repository: str) -> None:
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"`push_to_hub` {repository}: {error} Give OWNER/NAME.") from error


def push_cache(
    path: str | os.PathLike[str],
    repository: str,
    *,
    private: bool = True,
    on_stage: Callable[[str], None] = lambda _: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Upload a cache and return the address of its repository; it replaces a cache that is there.

    A new repository is private unless `private` is False; an existing one keeps its visibility, and files that are not
    of a cache.

    All checksums are verified first. The first commit deletes the manifest and what the new cache does not have, and
    the last one, after any number of them, adds the new manifest: in between, the repository is not read as a cache.

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
    with _refusals(path, repository, "cache", private):
        address = api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        for patterns, replaced, message in ((FILES[1:], FILES, "shards"), (FILES[:1], (), "manifest")):
            api.upload_folder(
                repo_id=repository,
                repo_type="dataset",
                folder_path=folder,
                allow_patterns=list(patterns),
                delete_patterns=list(replaced) or None,
                commit_message=f"distill cache: {message}",
            )
    return str(address)


def open_student_repository(repository: str, *, private: bool) -> None:
    """Checks before hours of training that a student can be pushed; creates the repository if there is none.

    Args:
        private: of a new repository; one that exists keeps its visibility.

    Raises:
        ConfigError: `repository` is not the name of a repository.
        DataError: there is no valid token, it may not write there, or the hub cannot be reached.
    """
    _check_name(repository)
    api = HfApi()
    try:
        with _errors_of_the_hub():
            api.whoami()
            api.create_repo(repository, repo_type="model", private=private, exist_ok=True)
            api.auth_check(repository, repo_type="model", write=True)
    except _HubError as error:
        raise DataError(
            f"`push_to_hub` {repository}: cannot be written: {error}. Nothing was trained; log in with a token that "
            "may write there (hf auth login), check the connection, or leave `push_to_hub` out and push later."
        ) from error


def is_student(path: str | os.PathLike[str]) -> bool:
    """Whether a directory is the output of a training run. A cache has a file of the same name."""
    folder = Path(path)
    return (folder / CONFIG_FILE).is_file() and not any(
        (folder / name).exists() for name in (MANIFEST, PARTIAL_MANIFEST)
    )


def push_student(
    path: str | os.PathLike[str],
    repository: str,
    *,
    private: bool = True,
    on_stage: Callable[[str], None] = lambda _: None,
) -> str:
    """Upload a trained student with its card, without checkpoints and logs; returns the address of its repository.

    It replaces the weights and the configuration of a model that is there.

    Raises:
        ConfigError: `repository` is not the name of a repository, or the run has not finished.
        DataError: the hub refuses, or cannot be reached.
    """
    check_push(path, repository)
    folder = Path(path)
    if not (folder / "trainer_state.json").is_file():  # written last
        raise ConfigError(f"{path}: the training run has not finished. Continue it with `resume=True`, then push it.")
    on_stage(f"uploading to {repository}")
    api = HfApi()
    with _refusals(path, repository, "student", private):
        address = api.create_repo(repository, repo_type="model", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            repo_type="model",
            folder_path=folder,
            ignore_patterns=list(NOT_PUSHED),
            delete_patterns=list(REPLACED),
            commit_message="distill student",
        )
    return str(address)


@contextlib.contextmanager
def copies_if_unreachable() -> Iterator[None]:
    """If the hub does not answer, the block runs in the offline mode of its libraries: it finds what has been
    downloaded before, and an error comes at once. Otherwise they would repeat every request for half a minute."""
    if constants.is_offline_mode() or _hub_answers():
        yield
        return
    settings = [(constants, "HF_HUB_OFFLINE"), (sys.modules.get("datasets.config"), "HF_HUB_OFFLINE")]
    before = [(module, name, getattr(module, name)) for module, name in settings if module is not None]
    try:
        for module, name, _ in before:
            setattr(module, name, True)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@functools.cache
def _hub_answers() -> bool:
    """One request, asked once in a process: any answer will do."""
    try:
        with _errors_of_the_hub():
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except _HubError:
        return False
    return True


@contextlib.contextmanager
def _refusals(path: str | os.PathLike[str], repository: str, what: str, private: bool) -> Iterator[None]:
    """Errors of the hub and of the connection as `DataError`."""
    try:
        with _errors_of_the_hub():
            yield
    except _HubError as error:
        raise DataError(
            f"{repository}: the hub did not accept the {what}: {error}. {path} is complete and "
            f"unchanged; log in (hf auth login) or check the connection, then: distill push {path} {repository}"
            f"{'' if private else ' with `public=True`'}"
        ) from error


class _HubError(Exception):
    """The first line of an error of the hub or of the connection."""


@contextlib.contextmanager
def _errors_of_the_hub() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        expected = isinstance(error, (HfHubHTTPError, OSError, ValueError))
        if not expected and type(error).__module__.partition(".")[0] not in CONNECTION:
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise _HubError(lines[0].rstrip(".")) from error
