"""The output directory of a run: may it be continued or replaced.

OUTPUT/
  distill_config.json    configuration and caches of the run, written before the first step (`run_record`)
  checkpoint-N/          written by Trainer: weights, optimizer, random state; trainer_state.json last
  config.json, …         the trained student, a plain transformers directory
  README.md              model card (`pipeline.student.model_card`)
  trainer_state.json     written last of all
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerState

import cache_format as cf
from cache_format.manifest.manifest import MANIFEST, PARTIAL_MANIFEST
from pipeline.errors import ConfigError
from pipeline.losses import DistillLoss
from pipeline.options import CONFIG_FILE
from pipeline.overlap import check_inputs_apart
from pipeline.student.data.cache_mix import Mix
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.budget import Budget
from pipeline.student.training.early_stopping import stopped_by
from pipeline.student.training.run_record import check_same_run, write_record

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
        if checkpoint is None and not is_finished(output):
            instead = "with `overwrite=True` instead of" if occupied else "without"
            partly = next(output.glob(f"checkpoint-*/{TRAINER_STATE}"), None)
            why = "" if partly is None else f": {partly.parent.name} has no {', '.join(_missing(partly.parent))}"
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
    """The latest complete checkpoint. Without one of its parts, Trainer would begin that part anew without a word."""
    complete = [path for path in Path(output).glob("checkpoint-*") if not _missing(path)]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


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


def begin_output(config: TrainStudentConfig, record: dict[str, Any]) -> None:
    """Empties the directory, which `check_output` has allowed, and writes the record of the run."""
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    for old in output.iterdir():
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    write_record(output, record)
