"""The output directory of a run: may it be continued or replaced, and the record of the run in it.

OUTPUT/
  distill_config.json    configuration and caches of the run, written before the first step (`_record`)
  checkpoint-N/          written by Trainer: weights, optimizer, random state; trainer_state.json last
  config.json, …         the trained student, a plain transformers directory
  README.md              model card (`pipeline.student.model_card`)
  trainer_state.json     written last of all
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerState

import cache_format as cf
from cache_format.manifest.manifest import MANIFEST, PARTIAL_MANIFEST
from pipeline.errors import ConfigError
from pipeline.losses import DistillLoss
from pipeline.models.loading import model_name
from pipeline.options import CONFIG_FILE, options_of
from pipeline.overlap import check_inputs_apart
from pipeline.student.data.cache_mix import Mix
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.budget import Budget
from pipeline.student.training.early_stopping import stopped_by
from pipeline.student.training.training_arguments import read_training_args

TRAINER_STATE = "trainer_state.json"
INPUTS = ("cache", "eval_cache", "student", "tokenizer", "student_config", "training_args")

# Settings that a resumed run may change. Models and caches may have moved; the contents of the caches must be the same.
RESUME_MAY_CHANGE = {"resume", "overwrite", "device", "student", "tokenizer", "cache", "eval_cache", "output"}
RESUME_MAY_CHANGE |= {"report_to", "run_name"}
# How rows are read does not change them.
RESUME_MAY_CHANGE |= {"cache_dir", "cache_dir_gb", "dataloader_num_workers", "dataloader_prefetch_factor"}
# These may change if the rows of a step, their product with the number of processes, stay the same.
FACTORS_OF_A_STEP = {"batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"}
# Resolved settings that the trained loss depends on; the others only affect what is measured.
RESOLVED_FOR_TRAINING = {"tail", "temperature"}


def check_output(config: TrainStudentConfig, mix: Mix, budget: Budget, loss: DistillLoss) -> str | None:
    """The checkpoint to resume from; None for a new run. Changes nothing.

    Raises:
        ConfigError: the directory has contents that this run may not replace, such as its own inputs, or no run to
            resume.
        MismatchError: the run to resume had other settings.
    """
    if "://" in config.output:
        raise ConfigError(
            f"`output` {config.output}: found a URL, expected a local directory, because checkpoints are renamed and "
            "removed there. Train to a local directory and copy the student afterwards."
        )
    inputs = {name: getattr(config, name) for name in INPUTS}
    check_inputs_apart(config.output, {**inputs, "cache": [cache.path for cache in mix.caches]})
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"`output` {output}: found a file, expected a directory. Choose another directory.")
    occupied = output.is_dir() and any(output.iterdir())
    ours = _has_run(output)
    if config.resume:
        if occupied and not ours:
            raise ConfigError(
                f"{output}: found no {CONFIG_FILE} of a run, so there is no run to resume. Check `output`."
            )
        checkpoint = last_checkpoint(output)
        if checkpoint is None:
            instead = "with `overwrite=True` instead of" if occupied else "without"
            raise ConfigError(f"{output}: found no checkpoint to resume from. Start {instead} `resume=True`.")
        _check_same_run(config, mix, budget, loss, output / CONFIG_FILE)
        if is_finished(output):
            raise ConfigError(
                f"{output}: found a finished run{_early(output)}, nothing to resume. Choose another `output`, or "
                "replace the run with `overwrite=True`."
            )
        return str(checkpoint)
    if occupied and not config.overwrite and ours:
        finished = is_finished(output)
        state = "a finished" if finished else "an unfinished"
        next_step = "Replace it with" if finished else "Continue it with `resume=True`, replace it with"
        raise ConfigError(
            f"{output}: found {state} run, nothing was changed. {next_step} `overwrite=True`, or choose another "
            "directory."
        )
    if occupied and not config.overwrite:
        raise ConfigError(
            f"{output}: found {min(output.iterdir()).name!r}, expected an empty directory: nothing was changed. "
            "Choose another directory."
        )
    if occupied and not ours:
        raise ConfigError(
            f"{output}: found no {CONFIG_FILE} of a run, so it is not the output of a run, and `overwrite=True` does "
            "not delete it. Choose another directory."
        )
    return None


def _has_run(output: Path) -> bool:
    """Whether the directory is the output of a run. A cache has a file of the same name, and is never replaced."""
    return (output / CONFIG_FILE).is_file() and not any(
        (output / name).exists() for name in (MANIFEST, PARTIAL_MANIFEST)
    )


def last_checkpoint(output: str | Path) -> Path | None:
    """The latest complete checkpoint: one with a state, which Trainer writes last."""
    complete = [
        state.parent for state in Path(output).glob(f"checkpoint-*/{TRAINER_STATE}") if _state(state) is not None
    ]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def processes_of(checkpoint: str | Path) -> int:
    """Number of processes that wrote a checkpoint; each saved the state of its random generators."""
    return len(list(Path(checkpoint).glob("rng_state*.pth")))


def is_finished(output: Path) -> bool:
    """Whether the trained student was saved. Its state is the last file written."""
    state = _state(output / TRAINER_STATE)
    return state is not None and (state.global_step >= state.max_steps or stopped_by(state) is not None)


def _early(output: Path) -> str:
    """Describes an early stop, for an error; empty without one."""
    state = _state(output / TRAINER_STATE)
    stopped = None if state is None else stopped_by(state)
    if state is None or stopped is None:
        return ""
    return f" that stopped early at step {stopped['step']} of {state.max_steps} ({'; '.join(stopped['reasons'])})"


def _state(file: Path) -> TrainerState | None:
    try:
        return TrainerState.load_from_json(str(file))
    except (OSError, ValueError, TypeError):
        return None


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


def begin_output(
    config: TrainStudentConfig,
    mix: Mix,
    budget: Budget,
    loss: DistillLoss,
    arithmetic: dict[str, Any],
    base_weights: str | None = None,
) -> None:
    """Empties the directory, which `check_output` has allowed, and writes the record of the run.

    Args:
        arithmetic: `used_arithmetic`.
        base_weights: `weights_fingerprint` of the model that adapters are trained on; checkpoints of adapters do not
            contain it.
    """
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    for old in output.iterdir():
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    record = {**_record(config, mix, budget, loss), "arithmetic": arithmetic}
    _write(output, record if base_weights is None else {**record, "adapted_weights": base_weights})


def recorded_arithmetic(config: TrainStudentConfig) -> dict[str, Any] | None:
    """`used_arithmetic` of the run in `output`; None without a readable record, which `check_output` refuses later.

    Earlier versions did not record it: they used bfloat16 only if it was asked for.
    """
    try:
        record = json.loads((Path(config.output) / CONFIG_FILE).read_text())
        return dict(record.get("arithmetic", {"bf16": bool(record["config"]["bf16"])}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def check_base_weights(config: TrainStudentConfig, base_weights: str) -> None:
    """Raises MismatchError if the run to resume trains adapters on other weights. Its path may have changed.

    Earlier versions did not record the weights; their runs pass.
    """
    file = Path(config.output) / CONFIG_FILE
    before = json.loads(file.read_text()).get("adapted_weights")
    if before not in (None, base_weights):
        name = "" if config.student is None else model_name(config.student)
        raise cf.MismatchError(
            f"`student` {name}: found weights {base_weights[:8]}…, expected {before[:8]}…, on which the adapter in "
            f"{config.output} was trained. Checkpoints have only the adapter, so resuming would put it on another "
            "model. Use the same student, or another `output`."
        )


def record_seen(config: TrainStudentConfig, seen: list[dict[str, Any]]) -> None:
    """Adds to the record how much of each cache a finished run has used, from `Mix.seen`."""
    output = Path(config.output)
    _write(output, {**json.loads((output / CONFIG_FILE).read_text()), "seen": seen})


def _write(output: Path, record: dict[str, Any]) -> None:
    scratch = output / f"{CONFIG_FILE}.tmp"
    scratch.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    scratch.replace(output / CONFIG_FILE)


def _record(config: TrainStudentConfig, mix: Mix, budget: Budget, loss: DistillLoss) -> dict[str, Any]:
    """The contents of distill_config.json.

    config           options as given; `training_args` has the contents of the file
    resolved         values of options that were left open
    rows_per_step    over all processes and accumulated batches
    cache            identity of the cache; a list for several caches
    mixture          for several caches, the planned use of each (`Mix.seen`)

    A run adds arithmetic (`used_arithmetic`), adapted_weights (fingerprint of the base model of adapters) and seen (the
    actual use of several caches).
    """
    record: dict[str, Any] = {
        "config": _settings(config),
        "resolved": loss.resolved,
        "rows_per_step": budget.rows_per_step,
    }
    if len(mix.portions) == 1:
        return {**record, "cache": _identity(mix.first)}
    planned = mix.seen(budget.rows_after(budget.steps))
    return {**record, "cache": [_identity(cache) for cache in mix.caches], "mixture": planned}


def _check_same_run(config: TrainStudentConfig, mix: Mix, budget: Budget, loss: DistillLoss, file: Path) -> None:
    try:
        recorded = json.loads(file.read_text())
        before, recorded_cache = dict(recorded["config"]), recorded["cache"]
        arguments_before = dict(before["training_args"])
        rows_per_epoch = [each["rows_per_epoch"] for each in recorded.get("mixture", [])]
        resolved_before = dict(recorded.get("resolved", {}))  # not recorded by earlier versions
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file}: cannot be read, so the run cannot be resumed. Start again with `overwrite=True`."
        ) from error
    record = json.loads(json.dumps(_record(config, mix, budget, loss)))
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
    if rows_before not in (None, budget.rows_per_step):
        different.append(
            f"a step had {rows_before} rows, has {budget.rows_per_step}: `batch_size` times "
            "`gradient_accumulation_steps` times processes must stay the same"
        )
    if different:
        raise cf.MismatchError(
            f"{file}: the interrupted run had other settings ({'; '.join(different)}): resuming would mix two "
            "runs. Use the same settings, or another `output`."
        )


def _join_paths(caches: Any) -> str:
    return " ".join(caches) if isinstance(caches, list) else str(caches)
