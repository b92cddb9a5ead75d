"""Which answers go into the cache: those that a user's predicate accepts, or one of them.

    def correct(example, answer):
        return answer.text.strip().endswith(example["solution"])

`example` is the row of the source with all its columns, `answer` an `Answered`. The function is named by import path,
`package.module:function`, or by file, `path/to/file.py:function`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import ConfigError
from pipeline.teacher.engines.answers import Answer
from pipeline.teacher.generation.generation_config import Keep

_RUN: dict[str, str] = {}  # name of a module -> sha256 of the file that its code was read from


@dataclass(frozen=True, kw_only=True)
class Answered:
    """The second argument of a predicate: an answer to the example."""

    text: str  # without the token or stop string that ended it
    token_ids: tuple[int, ...]  # including it
    stop_reason: str  # eos, stop-string or length
    mean_logprob: float  # natural log, per token, by the probabilities of the model that wrote it
    index: int  # among the answers to this prompt, from 0


@dataclass(frozen=True)
class Predicate:
    """A user's function with its name and the checksum of its file."""

    name: str  # as given
    function: Callable[[dict[str, Any], Answered], bool]
    sha256: str | None  # of the file that defines it, if there is one

    def __call__(self, example: Mapping[str, Any], answer: Answer, where: str) -> bool:
        """Raises: ConfigError naming `where` if it raises or does not return a bool."""
        told = Answered(
            text=answer.text,
            token_ids=tuple(answer.token_ids.tolist()),
            stop_reason=answer.stop_reason,
            mean_logprob=answer.mean_logprob,
            index=answer.index,
        )
        try:
            verdict = self.function(dict(example), told)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(f"`gen_keep_if` {self.name}: raised {reason} on {where}. Fix the function.") from error
        if not isinstance(verdict, (bool, np.bool_)):
            raise ConfigError(
                f"`gen_keep_if` {self.name}: returned {_short(verdict)} on {where}, expected True or False. Fix the "
                "function."
            )
        return bool(verdict)

    def to_json(self) -> dict[str, Any]:
        return {"function": self.name, "sha256": self.sha256}


def load_predicate(name: str) -> Predicate:
    """Raises: ConfigError if there is no such function."""
    place, colon, function_name = name.rpartition(":")
    if not colon or not place or not function_name.isidentifier():
        raise ConfigError(f"`gen_keep_if` {name}: expected module:function or path/to/file.py:function, with a colon.")
    try:
        module = _from_file(place) if place.endswith(".py") else _from_path(place, function_name)
    except ConfigError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"`gen_keep_if` {name}: {place} cannot be imported: {reason}. Correct it.") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        found = "nothing of that name" if function is None else f"a {type(function).__name__}"
        raise ConfigError(f"`gen_keep_if` {name}: found {found} in {place}, expected a function. Check the name.")
    try:
        inspect.signature(function).bind({}, None)
    except TypeError as error:
        raise ConfigError(
            f"`gen_keep_if` {name}: it takes {inspect.signature(function)}, expected (example, answer). Change it."
        ) from error
    except ValueError:  # a builtin without a signature
        pass
    file = getattr(module, "__file__", None)
    digest = None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return Predicate(name, function, digest)


def choose(answers: Sequence[Answer], keep: Keep) -> list[Answer]:
    """The accepted answers to keep: all, the first, or the one with the highest mean log-probability.

    Args:
        answers: accepted answers to one prompt.
    """
    if keep == "all" or not answers:
        return list(answers)
    return [answers[0] if keep == "first" else max(answers, key=lambda answer: (answer.mean_logprob, -answer.index))]


def _from_file(place: str) -> Any:
    path = Path(place).expanduser()
    if not path.is_file():
        raise ConfigError(f"`gen_keep_if` {place}: no such file. Check the path.")
    spec = importlib.util.spec_from_file_location(f"distill_keep_if_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"`gen_keep_if` {place}: not a Python file. Check the path.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    # Not by the loader, which would write `__pycache__` beside the file, perhaps into a cache.
    exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    return module


def _from_path(place: str, function_name: str) -> Any:
    # Like `python -m`, also search the current directory.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    loaded = place in sys.modules
    module = importlib.import_module(place)
    file = getattr(module, "__file__", None)
    if place == "__main__" or file is None or not file.endswith(".py"):
        return module
    contents = Path(file).read_bytes()
    digest = hashlib.sha256(contents).hexdigest()
    if loaded and _RUN.get(place) != digest:
        # Imported from a file that may have changed since, as in a notebook: the code must be that of the checksum.
        vars(module).pop(function_name, None)
        exec(compile(contents, file, "exec"), vars(module))
    _RUN[place] = digest
    return module


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
