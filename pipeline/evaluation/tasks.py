"""Scores on tasks of EleutherAI's lm-evaluation-harness (lm-eval), from its Python API.

A task is a name that lm-eval knows, or a YAML file that defines one (its `data_files` may be local). Models are loaded
as for the other metrics and given to lm-eval as objects, so adapters and .gguf files work too; scores equal those of
lm-eval's own command at the same dtype and batch size.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """value ± error: a metric of a task and its standard error as lm-eval reports it, None if it reports none."""

    value: float
    error: float | None
    samples: int | None


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises: ConfigError if lm-eval is missing, or does not know a task."""
    if not tasks:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("`tasks`: needs the lm-eval package: pip install 'distill[tasks]'")
    _open_tasks(tuple(tasks))


def task_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], *, batch_size: int = 8
) -> dict[str, TaskScore]:
    """Scores by "task metric", such as "arc_easy acc_norm"; lm-eval's filter is named too unless it is "none".

    Raises: ConfigError if lm-eval is missing, or does not know a task.
    """
    if not tasks:
        return {}
    check_tasks(tasks)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    manager, names = _open_tasks(tuple(tasks))
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=names,
        task_manager=manager,
        log_samples=False,
    )
    counts = found.get("n-samples", {})
    return {
        name: score
        for task, results in found["results"].items()
        for name, score in _scores(task, results, counts.get(task, {}).get("effective")).items()
    }


def _scores(task: str, results: dict[str, Any], samples: int | None) -> dict[str, TaskScore]:
    scores = {}
    for key, value in results.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        error = results.get(f"{metric}_stderr,{filtered}")
        if not isinstance(error, int | float) or not math.isfinite(error):
            error = None  # lm-eval writes "N/A"
        name = f"{task} {metric}" + ("" if filtered == "none" else f" {filtered}")
        scores[name] = TaskScore(value=float(value), error=error, samples=samples)
    return scores


@functools.lru_cache(maxsize=1)
def _open_tasks(tasks: tuple[str, ...]) -> tuple[Any, list[str]]:
    """lm-eval's TaskManager, and the names by which it knows the tasks. Reading the thousands of files that come with
    lm-eval takes seconds: once for all students, and only if a task is given by name."""
    from lm_eval.tasks import TaskManager

    folders, names = [], []
    for task in tasks:
        if task.endswith((".yaml", ".yml")):
            folders.append(str(Path(task).resolve().parent))
            names.append(_name_in(task))
        else:
            names.append(task)
    manager = TaskManager(include_path=sorted(set(folders)) or None, include_defaults=len(folders) < len(tasks))
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise ConfigError(
            f"`tasks` {unknown[0]}: lm-eval has no task of this name. `lm-eval ls tasks` lists them; a task of "
            "your own is a YAML file."
        )
    return manager, names


def _name_in(file: str) -> str:
    """The name of the task that a YAML file defines."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Accepts lm-eval's tag !function, without importing what it names."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    try:
        with open(file, encoding="utf-8") as stream:
            content = yaml.load(stream, Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"`tasks` {file}: cannot be read ({' '.join(str(error).split())}). Correct it.") from error
    name = content.get("task") if isinstance(content, dict) else None
    if not isinstance(name, str):
        raise ConfigError(f"`tasks` {file}: found no name under `task`, expected a task of lm-eval. Add `task: NAME`.")
    return name
