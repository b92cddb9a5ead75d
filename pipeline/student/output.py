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
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerState

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.student.arguments import TrainStudentConfig, read_training_args
from pipeline.student.stopping import stopped_by

CONFIG_FILE = "distill_config.json"

TRAINER_STATE = "trainer_state.json"

# May differ between a run and its --resume. Caches may have moved; what is in them must be the same.
RESUME_MAY_CHANGE = {"resume", "overwrite", "device", "student", "cache", "eval_cache", "output"}


def check_output(config: TrainStudentConfig, cache: cf.Cache) -> str | None:
    """The checkpoint to resume from, if any. Changes nothing.

    Raises:
        ConfigError, MismatchError: the directory holds something that this run may not touch or cannot continue.
    """
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
        _check_same_run(config, cache, output / CONFIG_FILE)
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
    """The configuration with the contents of the --training-args file instead of its name."""
    contents = {} if config.training_args is None else read_training_args(config.training_args)
    return {**asdict(config), "training_args": contents}


def _identity(cache: cf.Cache) -> dict[str, Any]:
    """What is in a cache, wherever it lies."""
    return {
        "teacher": dict(cache.metadata.teacher),
        "targets": dict(cache.metadata.targets),
        "token_stream_sha256": cache.metadata.corpus.get("token_stream_sha256"),
        "shards_sha256": [shard.sidecar_sha256 for shard in cache.manifest.shards],
    }


def begin_output(config: TrainStudentConfig, cache: cf.Cache) -> None:
    """Empties the directory, which `check_output` has allowed, and records everything that will make this student."""
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    for old in output.iterdir():
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    record = {"config": _settings(config), "cache": _identity(cache)}
    (output / CONFIG_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def _check_same_run(config: TrainStudentConfig, cache: cf.Cache, file: Path) -> None:
    try:
        recorded = json.loads(file.read_text())
        before, recorded_cache = dict(recorded["config"]), recorded["cache"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: cannot be read, so what it began cannot be resumed. Use --overwrite.") from error
    now = json.loads(json.dumps(_settings(config)))
    different = [
        f"{name} was {before[name]!r}, is {now[name]!r}"
        for name in sorted(before.keys() & now.keys() - RESUME_MAY_CHANGE)
        if before[name] != now[name]
    ]
    if recorded_cache != json.loads(json.dumps(_identity(cache))):
        different.append(f"{cache.path} does not hold the targets that {before.get('cache')} held")
    if different:
        raise cf.MismatchError(
            f"{file}: the interrupted run had other settings ({'; '.join(different)}): resuming would mix two "
            "runs. Use the same settings, or another --output."
        )
