"""What a report is about: one cache, students, and the logs of their training runs.

A training run stands for the student in it. Its held-out cache, or the cache that it was trained on, is used if no
cache is named. Nothing is loaded here, so wrong paths are reported at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_format.manifest.manifest import MANIFEST, PARTIAL_MANIFEST
from pipeline.errors import ConfigError
from pipeline.evaluation.report.report_config import ReportConfig
from pipeline.models.paths import check_model_path
from pipeline.options import CONFIG_FILE
from pipeline.student.cache_paths import parse_weight
from pipeline.student.training.checkpoints import checkpoints_of

STATE = "trainer_state.json"


@dataclass(frozen=True, kw_only=True)
class Run:
    """Records of a training run.

    Attributes:
        record: distill_config.json; empty if it cannot be read.
        history: what Trainer logged, in order: finite numbers by name, `step` among them.
        max_steps: planned steps; None if unknown.
    """

    path: str
    record: Mapping[str, Any]
    history: tuple[Mapping[str, float], ...]
    max_steps: int | None


@dataclass(frozen=True, kw_only=True)
class Student:
    """Attributes: name: as given. label: short and unique. model: what to load."""

    name: str
    label: str
    model: Any
    run: Run | None


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Attributes: trained_on: the cache is the training text of a student, for lack of a held-out one."""

    cache: str
    students: tuple[Student, ...]
    trained_on: bool = False


def find_sources(config: ReportConfig) -> Sources:
    """Sorts what was named into a cache and students.

    Raises: ConfigError, ModelError: something is neither, there is no cache, or there are several.
    """
    caches, models = [], []
    for source in config.source:
        if "://" in source or any((Path(source) / name).exists() for name in (MANIFEST, PARTIAL_MANIFEST)):
            caches.append(source)
        elif _state_file(source) is not None:
            models.append(source)
        else:
            raise ConfigError(f"`source` {source}: {_what_it_is(source)}")
    if len(caches) > 1:
        raise ConfigError(
            f"`source`: found {len(caches)} caches ({', '.join(caches)}), expected one, because all students are "
            "compared on the same text. Make one report for each cache."
        )
    models += config.student
    students = _students(models)
    if caches:
        return Sources(cache=caches[0], students=students)
    cache, trained_on = _cache_of_runs([each.run for each in students if each.run is not None])
    return Sources(cache=cache, students=students, trained_on=trained_on)


def _what_it_is(source: str) -> str:
    if not Path(source).exists():
        return "no such directory. Check the path."
    if (Path(source) / "config.json").is_file():
        return (
            "a model without the records of a training run. Name a cache, and give the model as `student`; a report "
            "compares it with its teacher on the cache."
        )
    return f"found neither {MANIFEST} (a cache) nor {STATE} (a training run) in it. Check the path."


def _state_file(directory: str) -> Path | None:
    """The latest state of a run: that of the finished run, or of its last checkpoint."""
    if (finished := Path(directory) / STATE).is_file():
        return finished
    found = checkpoints_of(directory)
    states = (found[step] / STATE for step in sorted(found, reverse=True))
    return next((state for state in states if state.is_file()), None)


def _students(models: list[Any]) -> tuple[Student, ...]:
    names = [each if isinstance(each, str) else None for each in models]
    if all(name is not None for name in names):
        shown = names
    else:
        from pipeline.models.loading import model_name  # takes torch; a loaded model has it already

        shown = [model_name(each) for each in models]
    students = []
    for name, path, model, label in zip(shown, names, models, _labels([str(name) for name in shown]), strict=True):
        run = None
        if path is not None and (state := _state_file(path)) is not None:
            run, model = _read_run(path, state), str(state.parent)
        check_model_path(model)
        students.append(Student(name=str(name), label=label, model=model, run=run))
    return tuple(students)


def _labels(names: list[str]) -> list[str]:
    """The last parts of paths, as many as it takes to tell them apart; equal names are numbered."""
    parts = [[part for part in name.split("/") if part] or [name] for name in names]
    for length in range(1, max(map(len, parts), default=1) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label} ({i})" for i, label in enumerate(labels, 1)] if names else []


def _read_run(path: str, state: Path) -> Run:
    record = _read_json(Path(path) / CONFIG_FILE)
    try:
        contents = json.loads(state.read_text(encoding="utf-8"))
        logged = [dict(each) for each in contents["log_history"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{state}: not the state of a training run ({error}). Check the directory.") from error
    history = tuple({name: float(value) for name, value in each.items() if _is_number(value)} for each in logged)
    planned = contents.get("max_steps")
    return Run(
        path=path,
        record=record,
        history=tuple(each for each in history if "step" in each),
        max_steps=int(planned) if _is_number(planned) and planned > 0 else None,
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return contents if isinstance(contents, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _cache_of_runs(runs: list[Run]) -> tuple[str, bool]:
    """The held-out cache of the runs, else the one they were trained on; and whether it is the latter."""
    if not runs:
        raise ConfigError("`source`: found no cache. Name the cache to compare the students on.")
    held_out = _recorded(runs, "eval_cache")
    found = held_out or _recorded(runs, "cache")
    if len(found) != 1:
        which = ", ".join(sorted(found)) or "none"
        raise ConfigError(
            f"`source`: the training runs name these caches: {which}. A report is about one cache: name it "
            "together with the runs."
        )
    (cache,) = found
    if "://" not in cache and not Path(cache).exists():
        raise ConfigError(
            f"`source`: the cache {cache}, which the training run names, is not here. Name the cache as well, or start "
            "in the directory where the run was started."
        )
    return cache, not held_out


def _recorded(runs: list[Run], option: str) -> set[str]:
    found: set[str] = set()
    for run in runs:
        options = run.record.get("config")
        value = options.get(option) if isinstance(options, dict) else None
        found |= {parse_weight(each)[0] for each in ([value] if isinstance(value, str) else value or [])}
    return found
