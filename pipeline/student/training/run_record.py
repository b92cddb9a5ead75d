"""The record of a run, distill_config.json in its output directory, and whether a run to resume has the same settings.

config           every option; `training_args` has the contents of the file
given            names of the options that the user gave; `config` reads only these back
resolved         values of options that were left open
rows_per_step    over all processes and accumulated batches
cache            identity of the cache; a list for several caches
eval_cache       identity of the held-out cache; null without one
mixture          for several caches, the planned use of each (`Mix.seen`)

A run adds arithmetic (`used_arithmetic`), student_fingerprint (of the configuration of the model that is trained),
adapted_weights (fingerprint of the base model of adapters) and seen (the actual use of several caches).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cache_format as cf
from cache_format.json_object import json_object
from cache_format.wording import quantity
from pipeline.errors import ConfigError
from pipeline.losses import DistillLoss
from pipeline.models.loading import model_name
from pipeline.options import CONFIG_FILE, options_of
from pipeline.student.data.cache_mix import Mix
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.budget import Budget
from pipeline.student.training.training_arguments import read_training_args

# Settings that a resumed run may change. Models and caches may have moved; the contents of the caches and the
# configuration of the student must be the same.
RESUME_MAY_CHANGE = {"resume", "overwrite", "device", "student", "tokenizer", "cache", "eval_cache", "output"}
RESUME_MAY_CHANGE |= {"report_to", "run_name"}
# How rows are read does not change them.
RESUME_MAY_CHANGE |= {"cache_dir", "cache_dir_gb", "dataloader_num_workers", "dataloader_prefetch_factor"}
# These may change if the rows of a step, their product with the number of processes, stay the same.
FACTORS_OF_A_STEP = {"batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"}
# Resolved settings that the trained loss depends on; the others only affect what is measured.
RESOLVED_FOR_TRAINING = {"tail", "temperature"}


def _settings(config: TrainStudentConfig) -> dict[str, Any]:
    """Every option by name, with the contents of a `training_args` file instead of its name, and the
    name of a student that was given as an object."""
    declared = options_of(TrainStudentConfig)
    options = {name: getattr(config, name) for name, each in declared.items() if not each.metadata.python_only}
    student = None if config.student is None else model_name(config.student)
    return {**options, "student": student, "training_args": read_training_args(config.training_args)}


def _identity(cache: cf.Cache) -> dict[str, Any]:
    """Identifies the contents of a cache, independent of its path."""
    return {
        "teacher": dict(cache.metadata.teacher),
        "targets": dict(cache.metadata.targets),
        "token_stream_sha256": cache.metadata.corpus.get("token_stream_sha256"),
        "shards_sha256": [shard.sidecar_sha256 for shard in cache.manifest.shards],
    }


def recorded_arithmetic(config: TrainStudentConfig) -> dict[str, Any] | None:
    """`used_arithmetic` of the run in `output`; None without a readable record, which `check_output` refuses later.

    Earlier versions did not record it: they used bfloat16 only if it was asked for.
    """
    try:
        record = json.loads((Path(config.output) / CONFIG_FILE).read_text())
        return dict(record.get("arithmetic", {"bf16": bool(record["config"]["bf16"])}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def check_student_unchanged(config: TrainStudentConfig, fingerprint: str, base_weights: str | None) -> None:
    """Raises MismatchError if the run to resume trains another model, or adapters on other weights. Its path may have
    changed. Checkpoints have the weights of a student that is trained as a whole, so those may differ.

    Earlier versions recorded neither; their runs pass.
    """
    record = _read_record(Path(config.output) / CONFIG_FILE)
    name = "" if config.student is None else model_name(config.student)
    before = record.get("student_fingerprint")
    if before not in (None, fingerprint):
        raise cf.MismatchError(
            f"`student` {name}: found another configuration than that of the student in {config.output} "
            f"({fingerprint[:8]}…, expected {before[:8]}…), so its checkpoints are of another model. Use the same "
            "student, or another `output`."
        )
    before = record.get("adapted_weights")
    if base_weights is not None and before not in (None, base_weights):
        raise cf.MismatchError(
            f"`student` {name}: found weights {base_weights[:8]}…, expected {before[:8]}…, on which the adapter in "
            f"{config.output} was trained. Checkpoints have only the adapter, so resuming would put it on another "
            "model. Use the same student, or another `output`."
        )


def record_seen(config: TrainStudentConfig, seen: list[dict[str, Any]]) -> None:
    """Adds to the record how much of each cache a finished run has used, from `Mix.seen`."""
    output = Path(config.output)
    write_record(output, record_text({**_read_record(output / CONFIG_FILE), "seen": seen}))


def _read_record(file: Path) -> dict[str, Any]:
    return json_object(
        file.read_bytes(),
        str(file),
        expected="the record of a training run",
        next_step="Restore it from a copy, or start again with `overwrite=True`.",
        error=ConfigError,
    )


def record_text(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=2, sort_keys=True) + "\n"


def write_record(output: Path, text: str) -> None:
    """Args: text: from `record_text`."""
    scratch = output / f"{CONFIG_FILE}.tmp"
    scratch.write_text(text)
    scratch.replace(output / CONFIG_FILE)


def record_of(
    config: TrainStudentConfig, mix: Mix, held_out: cf.Cache | None, budget: Budget, loss: DistillLoss
) -> dict[str, Any]:
    """The record of a run that has not begun."""
    record: dict[str, Any] = {
        "config": _settings(config),
        "given": sorted(config.given),
        "resolved": loss.resolved,
        "rows_per_step": budget.rows_per_step,
        "eval_cache": None if held_out is None else _identity(held_out),
    }
    if len(mix.portions) == 1:
        return {**record, "cache": _identity(mix.first)}
    planned = mix.seen(budget.rows_after(budget.steps))
    return {**record, "cache": [_identity(cache) for cache in mix.caches], "mixture": planned}


def check_same_run(
    config: TrainStudentConfig, mix: Mix, held_out: cf.Cache | None, budget: Budget, loss: DistillLoss, file: Path
) -> None:
    """Raises: MismatchError unless the run in `file` had the same settings; ConfigError if the file is unreadable."""
    recorded = _read_record(file)
    try:
        before, recorded_cache = dict(recorded["config"]), recorded["cache"]
        arguments_before = dict(before["training_args"])
        rows_per_epoch = [each["rows_per_epoch"] for each in recorded.get("mixture", [])]
        resolved_before = dict(recorded.get("resolved", {}))  # not recorded by earlier versions
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file}: not the record of a training run ({error}), so the run cannot be resumed. Restore it from a "
            "copy, or start again with `overwrite=True`."
        ) from error
    record = json.loads(json.dumps(record_of(config, mix, held_out, budget, loss)))
    now, arguments_now = record["config"], record["config"]["training_args"]
    rows_before = recorded.get("rows_per_step")  # not recorded by earlier versions
    may_change = RESUME_MAY_CHANGE if rows_before is None else RESUME_MAY_CHANGE | FACTORS_OF_A_STEP
    for arguments in (arguments_before, arguments_now):
        for name in may_change & arguments.keys():
            del arguments[name]
    before["training_args"] = arguments_before
    defaults = options_of(TrainStudentConfig)  # an earlier version recorded None for them
    different = [
        f"{name} was {before[name]!r}, is {now[name]!r}"
        for name in sorted(before.keys() & now.keys() - may_change)
        if before[name] != now[name] and not (before[name] is None and now[name] == defaults[name].default)
    ]
    different += [
        f"{name} was resolved to {resolved_before[name]!r}, is {value!r}"
        for name, value in record["resolved"].items()
        if name in RESOLVED_FOR_TRAINING and name in resolved_before and resolved_before[name] != value
    ]
    paths = " ".join(cache.path for cache in mix.caches)
    if recorded_cache != record["cache"]:
        different.append(f"{paths} does not have the targets of {_join_paths(before.get('cache'))}")
    elif rows_per_epoch != [each["rows_per_epoch"] for each in record.get("mixture", [])]:
        rows_now = [portion.rows for portion in mix.portions]
        different.append(f"rows per epoch from {paths} were {rows_per_epoch}, are {rows_now}: the weights changed")
    if recorded.get("eval_cache", record["eval_cache"]) != record["eval_cache"]:  # not recorded by earlier versions
        different.append(
            f"eval_cache {config.eval_cache} is not the held-out cache {before.get('eval_cache')}, and the best "
            "checkpoint is chosen by one of them"
        )
    if rows_before not in (None, budget.rows_per_step):
        different.append(
            f"a step had {quantity(rows_before, 'row')}, has {budget.rows_per_step}: `batch_size` times "
            "`gradient_accumulation_steps` times processes must stay the same"
        )
    if different:
        raise cf.MismatchError(
            f"{file}: the interrupted run had other settings ({'; '.join(different)}): resuming would mix two "
            "runs. Use the same settings, or another `output`."
        )


def _join_paths(caches: Any) -> str:
    return " ".join(caches) if isinstance(caches, list) else str(caches)
