"""The directory that a run writes to: what is in it, whether that may be continued or replaced, what is recorded there.

OUTPUT/
  distill_config.json    what made this student, written before the first step
  checkpoint-N/          Trainer's: weights, optimizer, random state; trainer_state.json last
  config.json, …         the trained student, a plain transformers directory
  trainer_state.json     written last of all
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerState

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.options import CONFIG_FILE, options_of
from pipeline.student.data.cache_mix import Mix
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.budget import Budget
from pipeline.student.training.early_stopping import stopped_by
from pipeline.student.training.recipe import LossRecipe
from pipeline.student.training.training_arguments import read_training_args

TRAINER_STATE = "trainer_state.json"

# May differ between a run and its --resume. Caches may have moved; what is in them must be the same.
RESUME_MAY_CHANGE = {"resume", "overwrite", "device", "student", "cache", "eval_cache", "output"}
# Who reads makes no difference to what is read.
RESUME_MAY_CHANGE |= {"cache_dir", "cache_dir_gb", "dataloader_num_workers", "dataloader_prefetch_factor"}
# What makes up the rows of a step: their number must be the same.
PARTS_OF_A_STEP = {"batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"}
# Of what was resolved, what the loss depends on; the rest is how it is measured.
TRAINED = {"tail", "temperature"}


def check_output(config: TrainStudentConfig, mix: Mix, budget: Budget, recipe: LossRecipe) -> str | None:
    """The checkpoint to resume from, if any. Changes nothing.

    Raises:
        ConfigError, MismatchError: the directory holds something that this run may not touch or cannot continue.
    """
    if "://" in config.output:
        raise ConfigError(
            f"{config.output}: a URL, expected a directory: checkpoints are written, renamed and removed there. Train "
            "to a disk and copy the student afterwards."
        )
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output}: found a file, expected a directory to write to. Choose another --output.")
    found = output.is_dir() and any(output.iterdir())
    ours = (output / CONFIG_FILE).is_file()
    if config.resume:
        if found and not ours:
            raise ConfigError(f"{output}: has no {CONFIG_FILE}, so there is no run of ours to resume. Check --output.")
        checkpoint = last_checkpoint(output)
        if checkpoint is None:
            instead = "with --overwrite instead of" if found else "without"
            raise ConfigError(f"{output}: found no checkpoint to resume from. Start {instead} --resume.")
        _check_same_run(config, mix, budget, recipe, output / CONFIG_FILE)
        if is_finished(output):
            raise ConfigError(
                f"{output}: found a finished run{_early(output)}, nothing to resume. Choose another --output, or "
                "replace it with --overwrite."
            )
        return str(checkpoint)
    if found and not config.overwrite and ours:
        state = "a finished" if is_finished(output) else "an unfinished"
        continuing = "Replace it with" if is_finished(output) else "Continue it with --resume, replace it with"
        raise ConfigError(
            f"{output}: found {state} run, nothing was changed. {continuing} --overwrite, or choose another directory."
        )
    if found and not config.overwrite:
        raise ConfigError(
            f"{output}: found {min(output.iterdir()).name!r}, expected an empty directory: nothing was changed. "
            "Choose another directory."
        )
    if found and not ours:
        raise ConfigError(
            f"{output}: has no {CONFIG_FILE}, so it is not a student of ours and --overwrite does not touch it. "
            "Choose another directory."
        )
    return None


def last_checkpoint(output: str | Path) -> Path | None:
    """The latest complete one: Trainer writes its state last, and a run may be killed while it writes."""
    complete = [
        state.parent for state in Path(output).glob(f"checkpoint-*/{TRAINER_STATE}") if _state(state) is not None
    ]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def processes_of(checkpoint: str | Path) -> int:
    """How many processes wrote it: each left the state of its random generators."""
    return len(list(Path(checkpoint).glob("rng_state*.pth")))


def is_finished(output: Path) -> bool:
    """Whether the student itself was saved: the state beside it is the last thing written."""
    state = _state(output / TRAINER_STATE)
    return state is not None and (state.global_step >= state.max_steps or stopped_by(state) is not None)


def _early(output: Path) -> str:
    """Words for a run that ended before its last step."""
    state = _state(output / TRAINER_STATE)
    stopped = None if state is None else stopped_by(state)
    if state is None or stopped is None:
        return ""
    return f" that had stopped early at step {stopped['step']} of {state.max_steps} ({'; '.join(stopped['reasons'])})"


def _state(file: Path) -> TrainerState | None:
    try:
        return TrainerState.load_from_json(str(file))
    except (OSError, ValueError, TypeError):
        return None


def _settings(config: TrainStudentConfig) -> dict[str, Any]:
    """Every option by name, with the contents of a `training_args` file instead of its name."""
    declared = options_of(TrainStudentConfig)
    options = {name: getattr(config, name) for name, each in declared.items() if not each.metadata.python_only}
    return {**options, "training_args": read_training_args(config.training_args)}


def _identity(cache: cf.Cache) -> dict[str, Any]:
    """What is in a cache, wherever it lies."""
    return {
        "teacher": dict(cache.metadata.teacher),
        "targets": dict(cache.metadata.targets),
        "token_stream_sha256": cache.metadata.corpus.get("token_stream_sha256"),
        "shards_sha256": [shard.sidecar_sha256 for shard in cache.manifest.shards],
    }


def begin_output(
    config: TrainStudentConfig, mix: Mix, budget: Budget, recipe: LossRecipe, adapted: str | None = None
) -> None:
    """Empties the directory, which `check_output` has allowed, and records everything that will make this student.

    Args:
        adapted: `weights_fingerprint` of what adapters are trained to: their checkpoints do not hold it.
    """
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    for old in output.iterdir():
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    record = _record(config, mix, budget, recipe)
    _write(output, record if adapted is None else {**record, "adapted_weights": adapted})


def check_adapted(config: TrainStudentConfig, adapted: str) -> None:
    """Raises MismatchError if the run to resume trains adapters to other weights than these; earlier ones do not say.

    Where the student is may have changed: its path is no part of what has to be the same.
    """
    file = Path(config.output) / CONFIG_FILE
    before = json.loads(file.read_text()).get("adapted_weights")
    if before not in (None, adapted):
        raise cf.MismatchError(
            f"--student {config.student}: its weights (fingerprint {adapted[:8]}…) are not those that the adapter in "
            f"{config.output} was trained to ({before[:8]}…), and its checkpoints hold the adapter alone: resuming "
            "would put it on another model. Name the same student, or another --output."
        )


def record_seen(config: TrainStudentConfig, seen: list[dict[str, Any]]) -> None:
    """Adds what a finished run has seen of each of several caches, as `Mix.seen`."""
    output = Path(config.output)
    _write(output, {**json.loads((output / CONFIG_FILE).read_text()), "seen": seen})


def _write(output: Path, record: dict[str, Any]) -> None:
    scratch = output / f"{CONFIG_FILE}.tmp"
    scratch.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    scratch.replace(output / CONFIG_FILE)


def _record(config: TrainStudentConfig, mix: Mix, budget: Budget, recipe: LossRecipe) -> dict[str, Any]:
    """For several caches `cache` is a list, and `mixture` says what is planned, as `Mix.seen`."""
    record: dict[str, Any] = {
        "config": _settings(config),  # as given
        "resolved": recipe.resolved,
        "rows_per_step": budget.rows_per_step,
    }
    if len(mix.portions) == 1:
        return {**record, "cache": _identity(mix.first)}
    planned = mix.seen(budget.rows_after(budget.steps))
    return {**record, "cache": [_identity(cache) for cache in mix.caches], "mixture": planned}


def _check_same_run(config: TrainStudentConfig, mix: Mix, budget: Budget, recipe: LossRecipe, file: Path) -> None:
    try:
        recorded = json.loads(file.read_text())
        before, recorded_cache = dict(recorded["config"]), recorded["cache"]
        arguments_before = dict(before["training_args"])
        rows_of_each = [each["rows_per_epoch"] for each in recorded.get("mixture", [])]
        resolved_before = dict(recorded.get("resolved", {}))  # earlier versions did not say
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: cannot be read, so what it began cannot be resumed. Use --overwrite.") from error
    record = json.loads(json.dumps(_record(config, mix, budget, recipe)))
    now, arguments_now = record["config"], record["config"]["training_args"]
    rows_before = recorded.get("rows_per_step")  # earlier versions did not say
    may_change = RESUME_MAY_CHANGE if rows_before is None else RESUME_MAY_CHANGE | PARTS_OF_A_STEP
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
        f"{name} was taken to be {resolved_before[name]!r}, is {value!r}"
        for name, value in record["resolved"].items()
        if name in TRAINED and name in resolved_before and resolved_before[name] != value
    ]
    paths = " ".join(cache.path for cache in mix.caches)
    if recorded_cache != record["cache"]:
        different.append(f"{paths} does not hold the targets that {_named(before.get('cache'))} held")
    elif rows_of_each != [each["rows_per_epoch"] for each in record.get("mixture", [])]:
        rows_now = [portion.rows for portion in mix.portions]
        different.append(f"of {paths} an epoch had {rows_of_each} rows, has {rows_now}: other weights")
    if rows_before not in (None, budget.rows_per_step):
        different.append(
            f"a step took {rows_before} rows, takes {budget.rows_per_step}: --batch-size times "
            "--gradient-accumulation-steps times processes must stay the same"
        )
    if different:
        raise cf.MismatchError(
            f"{file}: the interrupted run had other settings ({'; '.join(different)}): resuming would mix two "
            "runs. Use the same settings, or another --output."
        )


def _named(caches: Any) -> str:
    return " ".join(caches) if isinstance(caches, list) else str(caches)
