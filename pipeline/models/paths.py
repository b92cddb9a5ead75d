"""What the name or path of a model refers to: a transformers directory, an adapter, a .gguf file, or a hub name.

Takes the standard library only, so that a wrong path is reported before torch and transformers are imported, which
takes seconds. A name that looks like a path is only looked for on this disk: a misspelt directory must not become a
request to a server.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

from pipeline.errors import ModelError

ADAPTER_FILE = "adapter_config.json"
MODEL_FILES = ("config.json",)
TOKENIZER_FILES = (*MODEL_FILES, "tokenizer_config.json", "tokenizer.json")


def is_url(model: object) -> bool:
    """Whether a teacher is given as the URL of a server."""
    return isinstance(model, str) and model.lower().startswith(("http://", "https://"))


def split_revision(model: str) -> tuple[str, str | None]:
    """owner/name@revision as name and revision. Anything without an @, and a path that exists, has no revision."""
    name, at, revision = model.rpartition("@")
    if not at or not name or not revision or Path(model).expanduser().exists():
        return model, None
    return name, revision


def check_model_path(model: object, files: tuple[str, ...] = MODEL_FILES) -> None:
    """Check that a model which is clearly meant to be on this disk is there. Loaded models pass.

    Args:
        files: what a directory has to hold one of.

    Raises:
        ModelError: no such file or directory, or it holds no model.
    """
    if isinstance(model, str | os.PathLike):
        locate_model(os.fspath(model), files)


def locate_model(name: str, files: tuple[str, ...] = MODEL_FILES) -> tuple[str, str | None]:
    """What `from_pretrained` takes: the directory or hub name, and the name of the .gguf file if it is one.

    Raises:
        ModelError: no such file or directory, it holds no model, or the package that reads it is missing.
    """
    if is_url(name):
        raise ModelError(
            f"{name}: found the URL of a server, expected a model directory, hub name or .gguf file. Only a teacher "
            "whose targets are cached may be on a server."
        )
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{name}: no such file. Check the path.")
        if importlib.util.find_spec("gguf") is None:
            raise ModelError(f"{name}: reading GGUF needs the gguf package: pip install 'distill[gguf]'")
        return str(path.parent), path.name
    if path.exists():
        if not any((path / file).is_file() for file in files) and adapter_base(name) is None:
            raise ModelError(
                f"{name}: no {' or '.join(files)} in it, expected a model directory of transformers or a .gguf file. "
                "Check the path."
            )
        return str(path), None
    if looks_local(name):
        raise ModelError(f"{name}: no such directory. Check the path{or_elsewhere(name)}.")
    return name, None


def looks_local(name: str) -> bool:
    """Whether a name that is not on this disk can only be a misspelt path. A hub name is `name` or `owner/name`."""
    return (
        name.startswith(("/", ".", "~"))
        or name.endswith("/")
        or "\\" in name
        or name.count("/") > 1
        or _has_parent(name)
    )


def or_elsewhere(name: str) -> str:
    """What to do if a missing path was meant as a hub name."""
    owner = name.partition("/")[0]
    return f", or start in a folder without {owner}/ if you mean the hub" if _has_parent(name) else ""


def _has_parent(name: str) -> bool:
    """Whether `models` of the missing `models/student` is a directory here: then it is hardly an owner on the hub."""
    owner, slash, rest = name.partition("/")
    return bool(slash and owner and rest and "/" not in rest) and Path(owner).is_dir()


def adapter_base(name: str) -> str | None:
    """The base model that an adapter directory names, or None for anything else.

    Raises:
        ModelError: the adapter's configuration cannot be read, or names no base model.
    """
    base, _ = adapter_source(name)
    return base


def adapter_source(name: str) -> tuple[str | None, str | None]:
    """The base model that an adapter directory names, and its revision. Raises: as `adapter_base`."""
    file = Path(name).expanduser() / ADAPTER_FILE
    if not file.is_file():
        return None, None
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))
        base, revision = recorded["base_model_name_or_path"], recorded.get("revision")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: not an adapter's configuration ({error}). Check the directory.") from error
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{file}: names no base model to merge the adapter into. A run that creates its student keeps only the "
            "adapter in its checkpoints: finish it with `resume=True`, and use the student that it saves."
        )
    return base, revision
