"""The output directory of a training run, and whether it may be continued or replaced.

OUTPUT/
  distill_config.json    configuration and caches of the run, written before the first step (`run_record`)
  checkpoint-N/          written by Trainer: weights, optimizer, random state; trainer_state.json last
  config.json, …         the trained student, a plain transformers directory
  README.md              model card (`pipeline.student.model_card`)
  trainer_state.json     written last of all
  claims/                while a run works on it (`cache_format.storage.claims`)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerState

import cache_format as cf
from cache_format.storage.claims import CLAIMS, STALE_AFTER_S, WHOLE, Claims, Holder
from cache_format.storage.directory import open_directory
from pipeline.errors import ConfigError, DiskFullError
from pipeline.hub import is_student
from pipeline.losses import DistillLoss
from pipeline.options import CONFIG_FILE
from pipeline.overlap import check_inputs_apart
from pipeline.student.data.cache_mix import Mix
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.budget import Budget
from pipeline.student.training.checkpoints import checkpoints_of, is_disk_full
from pipeline.student.training.early_stopping import stopped_by
from pipeline.student.training.run_record import check_same_run, record_text, write_record

TRAINER_STATE = "trainer_state.json"
# How the names of a checkpoint's other parts begin; those of DeepSpeed are in a directory global_stepN.
PARTS: dict[str, str | tuple[str, ...]] = {
    "state of the optimizer": ("optimizer", "global_step"),
    "state of the schedule": ("scheduler", "global_step"),
    "state of the random generators": "rng_state",
}
INPUTS = ("cache", "eval_cache", "student", "tokenizer", "student_config", "training_args")


def check_output(
    config: TrainStudentConfig, mix: Mix, held_out: cf.Cache | None, budget: Budget, loss: DistillLoss
) -> str | None:
    """The checkpoint to resume from; None for a new run. Changes nothing.

    Raises:
        ConfigError: the directory has contents that this run may not replace, such as its own inputs, or no run to
            resume; or another process is training into it.
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
    for holder in _claims(output).others():
        raise _refused(output, holder)
    return check_contents(config, mix, held_out, budget, loss)


def check_contents(
    config: TrainStudentConfig, mix: Mix, held_out: cf.Cache | None, budget: Budget, loss: DistillLoss
) -> str | None:
    """The part of `check_output` to repeat under `claimed`: another run may have come first while this one loaded."""
    output = Path(config.output)
    found = _contents(output)
    occupied, ours = bool(found), is_student(output)
    if config.resume:
        if occupied and not ours:
            raise ConfigError(
                f"{output}: found no {CONFIG_FILE} of a run, so there is no run to resume. Check `output`."
            )
        checkpoint = last_checkpoint(output)
        if checkpoint is None and not is_finished(output):
            instead = "with `overwrite=True` instead of" if occupied else "without"
            partly = next((each for each in checkpoints_of(output).values() if (each / TRAINER_STATE).is_file()), None)
            why = "" if partly is None else f": {partly.name} has no {', '.join(_missing(partly))}"
            raise ConfigError(f"{output}: found no checkpoint to resume from{why}. Start {instead} `resume=True`.")
        check_same_run(config, mix, held_out, budget, loss, output / CONFIG_FILE)
        if is_finished(output):
            raise ConfigError(
                f"{output}: found a finished run{_early(output)}, nothing to resume. Choose another `output`, or "
                "replace the run with `overwrite=True`."
            )
        return str(checkpoint)
    if occupied and not config.overwrite and ours:
        state, next_step = "an unfinished run without a checkpoint", "Replace it with"
        if is_finished(output):
            state = "a finished run"
        elif last_checkpoint(output) is not None:
            state, next_step = "an unfinished run", "Continue it with `resume=True`, replace it with"
        raise ConfigError(
            f"{output}: found {state}, nothing was changed. {next_step} `overwrite=True`, or choose another directory."
        )
    if occupied and not config.overwrite:
        raise ConfigError(
            f"{output}: found {min(found).name!r}, expected an empty directory: nothing was changed. "
            "Choose another directory."
        )
    if occupied and not ours:
        raise ConfigError(
            f"{output}: found no {CONFIG_FILE} of a run, so it is not the output of a run, and `overwrite=True` does "
            "not delete it. Choose another directory."
        )
    return None


@contextmanager
def claimed(output: str) -> Iterator[None]:
    """Lets one run at a time train into a directory. The claim of a process that was killed does not count.

    Raises: ConfigError if another process has it.
    """
    claims = _claims(Path(output))
    try:
        if (holder := claims.take(WHOLE)) is not None:
            raise _refused(output, holder)
        yield
    finally:
        claims.close()


def _claims(output: Path) -> Claims:
    return Claims(open_directory(output))


def _refused(output: str | Path, holder: Holder) -> ConfigError:
    return ConfigError(
        f"{output}: {holder}, is training into this directory: nothing was changed. Wait for it, stop it, or choose "
        f"another `output`; if it is gone, its claim ends {STALE_AFTER_S / 60:.0f} minutes after its last sign of life."
    )


def _contents(output: Path) -> list[Path]:
    """What is in the directory, without the claims of runs."""
    return [each for each in output.iterdir() if each.name != CLAIMS] if output.is_dir() else []


def last_checkpoint(output: str | Path) -> Path | None:
    """The latest complete checkpoint. Without one of its parts, Trainer would begin that part anew without a word."""
    found = checkpoints_of(output)
    return next((found[step] for step in sorted(found, reverse=True) if not _missing(found[step])), None)


def _missing(checkpoint: Path) -> list[str]:
    """Parts that a checkpoint lacks, for example after `save_only_model`, or if it was copied in part."""
    try:
        names = os.listdir(checkpoint)
    except OSError:  # not a directory, or deleted meanwhile by the run that it belongs to
        names = []
    missing = [part for part, begin in PARTS.items() if not any(name.startswith(begin) for name in names)]
    # Trainer writes it last.
    return missing if _state(checkpoint / TRAINER_STATE) is not None else [*missing, TRAINER_STATE]


def follow_best(checkpoint: str, output: str) -> None:
    """Lets the state of a checkpoint name the best checkpoint in `output`, which may have been moved since."""
    file = Path(checkpoint) / TRAINER_STATE
    state = json.loads(file.read_text())
    best = state.get("best_model_checkpoint")
    if best is None or not (here := Path(output) / Path(best).name).is_dir() or str(here) == best:
        return
    scratch = file.with_name(f"{file.name}.tmp")
    scratch.write_text(json.dumps({**state, "best_model_checkpoint": str(here)}, indent=2, sort_keys=True) + "\n")
    scratch.replace(file)


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


@contextmanager
def saving(output: str, step: int | None = None) -> Iterator[None]:
    """Writes to the directory of a run. On a full disk, the incomplete checkpoint of `step` is removed.

    Raises: DiskFullError, with the checkpoint to continue from.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error, output):
            raise
        checkpoint = None if step is None else checkpoints_of(output).get(step)
        if checkpoint is not None and _state(checkpoint / TRAINER_STATE) is None:
            shutil.rmtree(checkpoint, ignore_errors=True)
        last = last_checkpoint(output)
        kept = "There is no complete checkpoint" if last is None else f"The last complete checkpoint is {last}"
        again = "start again with `overwrite=True`" if last is None else "continue with `resume=True`"
        raise DiskFullError(f"{output}: no space left on the disk. {kept}. Free some space, then {again}.") from error


def begin_output(config: TrainStudentConfig, record: dict[str, Any]) -> None:
    """Empties the directory, which `check_contents` has allowed, and writes the record of the run."""
    output, text = Path(config.output), record_text(record)  # made while the old contents are there
    output.mkdir(parents=True, exist_ok=True)
    for old in _contents(output):
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    write_record(output, text)
