"""An output that may not be written: taken, unreadable, of another run, or holding one of the run's inputs."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
from test_bad_input import CACHE_TEACHER, TRAIN, complain, instead

from pipeline.evaluation.report import report
from pipeline.importing import export_cache
from runs import build_cache
from runs import command as run


@pytest.mark.long
@pytest.mark.parametrize(
    "command, output, expected",
    [
        (CACHE_TEACHER, "student", ("student", "nothing was changed", "Choose another directory")),
        (CACHE_TEACHER, "cache", ("cache", "finished cache", "nothing was changed", "--overwrite")),
        (CACHE_TEACHER, "trained", ("trained", "nothing was changed", "Choose another directory")),
        (CACHE_TEACHER, "records.jsonl", ("records.jsonl", "found a file, expected a directory")),
        (CACHE_TEACHER, "text.txt/new", ("text.txt", "Not a directory", "Check the path")),
        (TRAIN, "student", ("student", "nothing was changed", "Choose another directory")),
        (TRAIN, "cache", ("cache", "nothing was changed", "Choose another directory")),
        (TRAIN, "trained", ("trained", "a finished run, nothing was changed", "--overwrite")),
        (TRAIN, "stopped", ("stopped", "an unfinished run, nothing was changed", "--resume", "--overwrite")),
        (TRAIN, "text.txt", ("text.txt", "found a file, expected a directory", "Choose another")),
        (TRAIN, "text.txt/new", ("text.txt", "Not a directory", "Check the path")),
        (f"{TRAIN} --overwrite", "student", ("--student student in it", "Choose another directory")),
        (f"{TRAIN} --overwrite", "teacher", ("teacher", "not the output of a run", "Choose another directory")),
        (f"{TRAIN} --overwrite", "cache", ("--cache cache in it", "nothing was changed", "Choose another directory")),
        (f"{CACHE_TEACHER} --overwrite", "student", ("student", "nothing was changed", "Choose another directory")),
        (f"{CACHE_TEACHER} --overwrite", "trained", ("trained", "nothing was changed", "Choose another directory")),
        (f"{TRAIN} --resume", "new", ("new", "no checkpoint", "Start without --resume")),
        (f"{TRAIN} --resume", "teacher", ("teacher", "no run to resume")),
        (f"{TRAIN} --max-steps 2 --resume", "trained", ("trained", "finished run", "--overwrite")),
        (f"{TRAIN} --max-steps 3 --save-steps 1 --kd-weight 0.5 --resume", "stopped", ("kd_weight was 0.9, is 0.5",)),
        (f"{TRAIN} --max-steps 9 --save-steps 1 --resume", "stopped", ("max_steps was 3, is 9", "another --output")),
    ],
)
def test_output_that_is_taken(here: Path, command: str, output: str, expected: tuple[str, ...]):
    complain(here, instead(command, "--output", output), *expected)


@pytest.mark.long
def test_unfinished_run_without_a_checkpoint(here: Path):
    """`--resume` could not continue it."""
    shutil.copytree(here / "stopped", here / "begun", ignore=shutil.ignore_patterns("checkpoint-*"))
    line = complain(here, instead(TRAIN, "--output", "begun"), "an unfinished run without a checkpoint", "--overwrite")
    assert "--resume" not in line


@pytest.mark.long
@pytest.mark.parametrize(
    "output, expected",
    [
        ("s3://bucket/files", ("--output s3://bucket/files: found a URL", "copy the files afterwards")),
        ("cache/files", ("--output cache/files: it lies in the cache to export (cache)", "Choose another directory")),
        ("link/files", ("--output link/files: it lies in the cache to export", "Choose another directory")),
        ("cache", ("cache: found files there", "Choose another")),
    ],
)
def test_output_of_an_export(here: Path, output: str, expected: tuple[str, ...]):
    (here / "link").symlink_to("cache")
    complain(here, f"export cache --output {output}", *expected)


def no_space(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28] No space left on device")


@pytest.mark.parametrize(
    "free, line", [(0, "Error: files: No space left on device."), (1 << 40, "Error: No space left on device.")]
)
@pytest.mark.parametrize("existed", [False, True])
def test_export_on_a_full_disk_can_be_repeated(
    here: Path, monkeypatch: pytest.MonkeyPatch, free: int, line: str, existed: bool
):
    """The directory is only named if its disk is the one that is full."""
    if existed:
        (here / "files").mkdir()
    replace, done = os.replace, list[str]()

    def at_the_second(partial: str, file: str) -> None:
        no_space() if done else replace(partial, file)
        done.append(file)

    with monkeypatch.context() as patch:
        patch.setattr(export_cache.os, "replace", at_the_second)
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        complain(here, "export cache --output files", line, "Free some space and run the same command again.")
    assert done and (here / "files").exists() == existed
    run("export", "cache", "--output", "files")


@pytest.mark.parametrize(
    "output, expected",
    [
        ("cache/r.html", ("--output cache/r.html: it lies in the cache (cache)", "Choose another directory")),
        ("link/shards/r.html", ("--output link/shards/r.html: it lies in the cache (cache)",)),
        ("r" * 300, ("File name too long", "Check the path")),
    ],
)
def test_output_of_a_report(here: Path, monkeypatch: pytest.MonkeyPatch, output: str, expected: tuple[str, ...]):
    """Found before anything is computed."""
    (here / "link").symlink_to("cache")
    monkeypatch.setattr(report, "read_positions", None)
    complain(here, f"report cache --device cpu --output {output}", *expected)


def test_report_on_a_full_disk_leaves_nothing(here: Path, monkeypatch: pytest.MonkeyPatch):
    write = Path.write_bytes

    def half_of_it(file: Path, data: bytes) -> int:
        written = write(file, data[: len(data) // 2] if file.suffix == ".tmp" else data)
        return no_space() if file.suffix == ".tmp" else written

    (here / "r.html").write_text("before")
    monkeypatch.setattr(Path, "write_bytes", half_of_it)
    complain(here, "report cache --device cpu --output r.html", "No space left on device", "Free some space")


def test_json_file_in_a_cache(here: Path):
    complain(here, "stats cache --json cache/stats.json", "--json cache/stats.json: it lies in a cache", status=2)


INPUTS_IN_OUTPUT = [
    (TRAIN, "trained", "--student", "trained"),
    (TRAIN, "trained", "--student", "elsewhere"),  # a link into it
    (TRAIN, "trained", "--student", "trained/student"),
    (TRAIN, "trained", "--cache", "trained/cache:0.5"),
    (TRAIN, "trained", "--eval-cache", "trained/cache"),
    (TRAIN, "trained", "--training-args", "trained/arguments.json"),
    (CACHE_TEACHER, "cache", "--teacher", "cache/student"),
    (CACHE_TEACHER, "cache", "--data", "cache/shards/*.txt"),
    (CACHE_TEACHER, "cache", "--device-map", "cache/arguments.json"),
    (f"{CACHE_TEACHER} --generate", "cache", "--teacher", "cache/student"),
    (f"{CACHE_TEACHER} --generate", "cache", "--data", "cache.answers/text.txt"),
    (f"{CACHE_TEACHER} --generate", "cache", "--gen-keep-if", "cache/checks.py:accept"),
]


@pytest.mark.long
@pytest.mark.parametrize("command, output, option, place", INPUTS_IN_OUTPUT)
def test_input_that_the_output_would_replace(here: Path, command: str, output: str, option: str, place: str):
    for folder in ("trained", "cache"):
        shutil.copytree(here / "student", here / folder / "student")
        (here / folder / "arguments.json").write_text("{}")
    shutil.copytree(here / "cache", here / "trained/cache")
    (here / "cache.answers").mkdir()
    shutil.copy(here / "text.txt", here / "cache.answers/text.txt")
    shutil.copy(here / "text.txt", here / "cache/shards/text.txt")
    (here / "cache/checks.py").write_text("def accept(example, answer):\n    return True\n")
    (here / "elsewhere").symlink_to("trained")
    command = instead(command, "--output", output)
    command = instead(command, option, place) if option in command else f"{command} {option} {place}"
    found = place.partition(":")[0].replace("*", "text")
    complain(here, f"{command} --overwrite", f"{option} {found} in it", "nothing was changed", "Choose another")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("command", [CACHE_TEACHER, TRAIN])
def test_output_without_permission(here: Path, command: str):
    (here / "locked").mkdir(mode=0o500)
    complain(here, instead(command, "--output", "locked/new"), "locked/new", "Permission denied", "permissions")


def test_resuming_with_other_training_arguments(here: Path):
    (here / "arguments.json").write_text('{"max_grad_norm": 0.5}')
    command = f"{instead(TRAIN, '--output', 'stopped')} --max-steps 3 --save-steps 1 --resume"
    complain(here, f"{command} --training-args arguments.json", "training_args was {}, is {'max_grad_norm': 0.5}")


def test_resuming_on_another_cache(here: Path, teacher_dir: Path):
    shutil.rmtree(here / "cache")
    build_cache(here / "cache", teacher_dir, here / "text.txt", top_k=8)
    command = f"{instead(TRAIN, '--output', 'stopped')} --max-steps 3 --save-steps 1 --resume"
    complain(here, command, "does not have the targets of", "another --output")


def test_resuming_a_run_whose_record_is_damaged(here: Path):
    (here / "stopped/distill_config.json").write_text("{")
    complain(here, f"{instead(TRAIN, '--output', 'stopped')} --resume", "distill_config.json", "--overwrite")


def test_run_that_has_no_checkpoint_yet_is_begun_again(here: Path):
    for checkpoint in (here / "stopped").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    command = f"{instead(TRAIN, '--output', 'stopped')} --resume"
    complain(here, command, "no checkpoint", "Start with --overwrite instead of --resume")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda path: (path / "model.safetensors").write_bytes(b"noise"), "cannot be loaded"),
        (lambda path: (path / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda path: (path / "config.json").write_text("{}"), "cannot be"),
    ],
)
def test_overwrite_deletes_nothing_before_the_new_student_is_there(here: Path, change: Callable, words: str):
    change(here / "student")
    complain(here, f"{instead(TRAIN, '--output', 'trained')} --overwrite", "student", words)


def test_overwrite_deletes_nothing_before_the_new_teacher_is_there(here: Path):
    (here / "teacher/model.safetensors").write_bytes(b"noise")
    complain(here, f"{instead(CACHE_TEACHER, '--output', 'cache')} --overwrite", "teacher", "cannot be loaded")
    complain(here, f"{CACHE_TEACHER} --output cache --overwrite --data nowhere.txt", "nowhere.txt", "no such file")
