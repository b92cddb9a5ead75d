"""The output directory of a run: it takes one run at a time, keeps the user's copies, and reports a full disk."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cache_format.storage.claims import CLAIMS
from pipeline.errors import ConfigError, DiskFullError
from pipeline.evaluation.report.report_config import ReportConfig
from pipeline.evaluation.report.report_sources import find_sources
from pipeline.student.training import train as training
from pipeline.student.training.output_directory import claimed, last_checkpoint, saving
from pipeline.student.training.trainer import DistillTrainer
from runs import Stop, build_cache, train

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def cache(teacher_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("output") / "cache", teacher_dir, text_file)


def test_only_checkpoints_of_trainer_count(tmp_path: Path, cache: Path, student_dir: Path):
    """A copy that the user keeps next to them is not one, whatever its name ends with."""
    output, options = tmp_path / "s", {"max_steps": 4, "batch_size": 4, "save_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        train(output, cache, student=student_dir, on_step=Stop(3), **options)
    latest = last_checkpoint(output)
    assert latest is not None and latest.name == "checkpoint-2"
    copies = ("checkpoint-2-backup", "checkpoint-best", "checkpoint-good-9")
    for name in copies:
        shutil.copytree(latest, output / name)
    assert last_checkpoint(output) == latest
    (student,) = find_sources(ReportConfig(source=(str(cache), str(output)))).students
    assert student.model == str(latest)
    assert train(output, cache, student=student_dir, resume=True, **options).steps == 4
    assert {each.name for each in output.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4", *copies}


# -- one run at a time ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [{"resume": True}, {"overwrite": True}])
def test_run_is_refused_while_another_trains(tmp_path: Path, cache: Path, student_dir: Path, second: dict[str, bool]):
    output, options = tmp_path / "s", {"max_steps": 4, "batch_size": 4, "save_steps": 1, "student": student_dir}

    def stop(step: int, total: int) -> None:
        assert (output / CLAIMS).is_dir()
        Stop(3)(step, total)

    with pytest.raises(KeyboardInterrupt):
        train(output, cache, on_step=stop, **options)
    with claimed(str(output)):
        before = sorted(output.rglob("*"))
        with pytest.raises(ConfigError, match=rf"process {os.getpid()} on .*, is training into this directory.*stop"):
            train(output, cache, **options, **second)
        assert sorted(output.rglob("*")) == before
    assert not (output / CLAIMS).exists()
    assert train(output, cache, **options, **second).steps == 4


@pytest.mark.parametrize("finishes", [False, True])
def test_second_run_is_refused_if_the_first_began_while_it_loaded(
    tmp_path: Path, cache: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch, finishes: bool
):
    output, options = tmp_path / "s", {"max_steps": 2, "batch_size": 4, "save_steps": 1, "student": student_dir}
    load, expected = training.load_run_student, "a finished run" if finishes else "is training into this directory"

    def first_run(*args: object) -> object:
        """In the middle of the loading of the second run."""
        monkeypatch.setattr(training, "load_run_student", load)
        loaded = load(*args)
        if finishes:
            train(output, cache, **options)
        else:
            held.enter_context(claimed(str(output)))
        return loaded

    with contextlib.ExitStack() as held:
        monkeypatch.setattr(training, "load_run_student", first_run)
        with pytest.raises(ConfigError, match=f"{expected}.*nothing was changed"):
            train(output, cache, **options)
    assert (output / "model.safetensors").exists() == finishes


KILLED = """
import os, signal, sys
from pathlib import Path
from runs import train
options = {"max_steps": 3, "batch_size": 4, "save_steps": 1}
kill = lambda step, total: os.kill(os.getpid(), signal.SIGKILL) if step == 2 else None
train(Path(sys.argv[1]), Path(sys.argv[2]), student=Path(sys.argv[3]), on_step=kill, **options)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only the age of a claim tells")
@pytest.mark.parametrize("again", ["resume", "overwrite"])
def test_claim_of_a_killed_run_does_not_block_the_next(tmp_path: Path, cache: Path, student_dir: Path, again: str):
    output = tmp_path / "s"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers")])}
    killed = subprocess.run([sys.executable, "-c", KILLED, output, cache, student_dir], env=environment, timeout=110)
    assert killed.returncode == -signal.SIGKILL and (output / CLAIMS).is_dir()
    options = {"max_steps": 3, "batch_size": 4, "save_steps": 1, again: True}
    assert train(output, cache, student=student_dir, **options).steps == 3
    assert not (output / CLAIMS).exists()


# -- a full disk ------------------------------------------------------------------------------------------------------

TORCH = RuntimeError("[enforce fail at inline_container.cc:661] . unexpected pos 64 vs 0")
SAFETENSORS = Exception("Error while serializing: I/O error: No space left on device (os error 28)")
PYTHON = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [TORCH, SAFETENSORS, PYTHON], ids=["torch", "safetensors", "python"])
@pytest.mark.parametrize(
    "full_at, expected", [(1, "no complete checkpoint.*`overwrite=True`"), (2, "is .*/checkpoint-1.*`resume=True`")]
)
def test_full_disk_names_the_last_checkpoint_and_the_next_step(
    tmp_path: Path,
    cache: Path,
    student_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    full_at: int,
    expected: str,
):
    output, options = tmp_path / "s", {"max_steps": 3, "batch_size": 4, "save_steps": 1, "student": student_dir}
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
        save = DistillTrainer._save_optimizer_and_scheduler

        def without_space(trainer: DistillTrainer, folder: str) -> None:
            save(trainer, folder)
            if trainer.state.global_step == full_at:
                raise error

        patch.setattr(DistillTrainer, "_save_optimizer_and_scheduler", without_space)
        with pytest.raises(DiskFullError, match=f"no space left.*{expected}") as caught:
            train(output, cache, **options)
    assert isinstance(caught.value, OSError) and caught.value.errno == errno.ENOSPC
    assert not (output / f"checkpoint-{full_at}").exists()
    again = {"overwrite": True} if full_at == 1 else {"resume": True}
    assert train(output, cache, **options, **again).steps == 3


def test_other_errors_of_saving_are_not_taken_for_a_full_disk(tmp_path: Path):
    with pytest.raises(RuntimeError, match="inline_container"), saving(str(tmp_path)):
        raise TORCH


@pytest.mark.long
@pytest.mark.parametrize("room", [100, 300, 500])
def test_disk_that_is_really_full(tmp_path: Path, cache: Path, student_dir: Path, room: int):
    """In the weights or the optimizer of the first checkpoint, or in the second one."""
    disk, options = tmp_path / "disk", {"max_steps": 3, "batch_size": 4, "save_steps": 1, "student": student_dir}
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size={room}k none {disk} 2>/dev/null") != 0:
        pytest.skip("cannot mount a small disk here")
    try:
        with pytest.raises(DiskFullError, match="no space left on the disk") as caught:
            train(disk / "s", cache, **options)
        again = "overwrite" if "`overwrite=True`" in str(caught.value) else "resume"
        assert all((each / "trainer_state.json").is_file() for each in (disk / "s").glob("checkpoint-*"))
        os.system(f"mount -o remount,size=64m {disk}")
        assert train(disk / "s", cache, **options, **{again: True}).steps == 3
    finally:
        os.system(f"umount -l {disk}")  # weights that were read may still be mapped
