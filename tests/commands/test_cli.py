"""The command line: help, results for people and for scripts, and what an interrupt leaves behind.

What goes wrong is in test_bad_input.py and test_bad_output.py.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import cache_format as cf
from cache_samples import contents, shards
from cli import main
from pipeline import commands
from pipeline.commands import COMMANDS, SUMMARIES
from pipeline.terminal.click_options import interrupted
from runs import build_cache, distance, train, weights
from runs import command as run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(teacher_dir: Path, student_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    build_cache(folder / "cache", teacher_dir, text_file)
    train(folder / "trained", folder / "cache", student=student_dir, max_steps=3, learning_rate=1e-2)
    return folder


# -- help -------------------------------------------------------------------------------------------------------------


def test_commands_stand_in_the_order_of_the_flow():
    names = [
        "cache-teacher",
        "plan",
        "train-student",
        "evaluate",
        "report",
        "inspect",
        "stats",
        "verify",
        "convert",
        "merge",
        "import",
        "export",
        "push",
        "env",
        "completion",
    ]
    assert main.list_commands(click.Context(main)) == list(COMMANDS) == list(SUMMARIES) == names
    text = run("--help").stdout
    places = [text.index(f"\n  {name} ") for name in names]
    assert places == sorted(places)
    assert run("-h").stdout == text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_that_is_valid(name: str):
    text = run(name, "--help").stdout
    assert max(len(line) for line in text.splitlines()) <= 100
    examples = text.partition("Example:")[2].replace("\\\n", " ")
    lines = [line.strip() for line in examples.splitlines() if line.strip()]
    assert lines and all(line.startswith(f"distill {name} ") for line in lines)
    command = main.get_command(click.Context(main), name)
    assert command is not None
    for line in lines:
        command.make_context(name, shlex.split(line)[2:])  # raises for an unknown option
    for parameter in command.params:
        assert isinstance(parameter, click.Argument) or parameter.help, parameter.name


def test_help_and_import_take_no_heavy_library():
    heavy = "{'torch', 'transformers', 'datasets', 'accelerate', 'numpy', 'pyarrow', 'rich'}"
    for words, expected in ((["--help"], "Compare students"), (["train-student", "--help-all"], "--kd-schedule")):
        code = f"""
import sys, cli, distill
try:
    cli.main({words})
finally:
    print(sorted({heavy} & set(sys.modules)))
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert expected in done.stdout and done.stdout.splitlines()[-1] == "[]", done.stderr


# -- results ----------------------------------------------------------------------------------------------------------


def test_both_stages_and_the_evaluation(tmp_path: Path, teacher_dir: Path, student_dir: Path, text_file: Path):
    cache, student = tmp_path / "cache", tmp_path / "student"
    stage_one = ["cache-teacher", "--teacher", teacher_dir, "--data", text_file, "--seq-len", 48, "--device", "cpu"]
    result = run(*stage_one, "--output", cache, "--top-k", 8)
    assert f"Cached {cache}" in result.stdout and "exact mass" in result.stdout
    assert "reading and tokenising the text …" in result.stderr.splitlines()
    data = json.loads(run(*stage_one, "--output", cache, "--overwrite", "--json").stdout)
    opened = cf.open_cache(cache)
    assert opened.metadata.targets["kind"] == "threshold"  # made again
    assert data["rows"] == len(opened) and data["loss_tokens"] == opened.num_loss_tokens

    stage_two = ["train-student", "--cache", cache, "--eval-cache", cache, "--output", student, "--device", "cpu"]
    options = [
        "--student",
        student_dir,
        "--max-steps",
        4,
        "--eval-steps",
        2,
        "--learning-rate",
        0.01,
        "--batch-size",
        4,
    ]
    result = run(*stage_two, *options)
    assert f"Trained {student}" in result.stdout and "held out" in result.stdout
    assert sum(line.startswith("step ") for line in result.stderr.splitlines()) == 2
    data = json.loads(run(*stage_two, *options, "--overwrite", "--json").stdout)
    assert data["steps"] == 4 and data["best_step"] == 4 and data["output"] == str(student)

    file = tmp_path / "result.json"
    both = ["--student", student, "--student", student_dir]
    result = run("evaluate", "--cache", cache, *both, "--device", "cpu", "--json", file)
    assert "KL to teacher" in result.stdout
    found = json.loads(file.read_text())
    assert found["cache"] == str(cache) and list(found["students"]) == [str(student), str(student_dir)]
    trained, untrained = found["students"].values()
    assert trained["kl"] == pytest.approx(data["eval"]["kl"], rel=1e-6) and trained["kl"] < untrained["kl"]
    assert f"{trained['kl']:.4f}" in result.stdout and f"{untrained['kl']:.4f}" in result.stdout


@pytest.mark.long
def test_evaluation_on_stdout(folder: Path):
    words = ["evaluate", "--cache", folder / "cache", "--student", folder / "trained", "--max-rows", 2, "--json"]
    data = json.loads(run(*words).stdout)
    assert data["students"][str(folder / "trained")]["tokens"] < 100


@pytest.mark.parametrize(
    "file, expected",
    [("nowhere/result.json", "nowhere is not a writable directory"), ("cache", "found a directory, expected")],
)
def test_wrong_json_file_is_found_before_any_work(folder: Path, file: str, expected: str):
    words = ["evaluate", "--cache", folder / "cache", "--student", folder / "trained", "--max-rows", 2]
    result = run(*words, "--json", folder / file, status=2)
    line = result.stderr.splitlines()[-1]
    assert line.startswith(f"Error: --json {folder}/{file}: ") and expected in line and result.stdout == ""


def test_inspect(folder: Path):
    rows = len(cf.open_cache(folder / "cache"))
    assert "teacher expects next" in run("inspect", folder / "cache").stdout
    last = json.loads(run("inspect", folder / "cache", "--row", -1, "--json", "--positions", 3).stdout)
    assert last["row"] == rows - 1 and len(last["positions"]) == 3
    same = json.loads(run("inspect", folder / "cache", "--row", rows - 1, "--json", "--positions", 3).stdout)
    assert last == same
    candidates = json.loads(run("inspect", folder / "cache", "--json", "--candidates", 2, "--start", 1).stdout)
    assert candidates["positions"][0]["position"] == 1 and len(candidates["positions"][0]["candidates"]) == 2


@pytest.mark.parametrize("row", ["57000", "-57000"])
def test_inspecting_a_row_that_is_not_there(folder: Path, row: str):
    result = run("inspect", folder / "cache", "--row", row, status=2)
    last = len(cf.open_cache(folder / "cache")) - 1
    assert f"--row: {folder / 'cache'} has rows 0 to {last}" in result.stderr


def test_stats(folder: Path):
    assert "bytes per token" in run("stats", folder / "cache").stdout
    data = json.loads(run("stats", folder / "cache", "--json").stdout)
    on_disk = sum(file.stat().st_size for file in (folder / "cache/shards").glob("*.arrow"))
    assert data["bytes"] == on_disk
    assert 0 < sum(data["column_bytes_per_token"].values()) * data["tokens"] < on_disk
    assert 0 < data["exact_mass_p5"] < data["exact_mass_mean"] < 1


def test_verify(folder: Path):
    assert "intact" in run("verify", folder / "cache").stdout
    data = json.loads(run("verify", folder / "cache", "--json").stdout)
    cache = cf.open_cache(folder / "cache")
    assert data.pop("ok") is True
    assert data["rows"] == len(cache) and data["entries"] == cache.manifest.num_entries


def test_a_long_path_with_brackets_is_printed_as_it_is(folder: Path, tmp_path: Path):
    name = tmp_path / ("a-rather-long-name-" * 5 + "[b] :cat:")
    name.symlink_to(folder / "cache")
    assert str(name) in run("verify", name).stdout
    assert str(name) in run("stats", name).stdout


def test_a_run_is_repeated_from_the_configuration_it_saved(folder: Path, tmp_path: Path):
    run("train-student", "--config", folder / "trained", "--output", tmp_path / "again")
    first, again = (path / "model.safetensors" for path in (folder / "trained", tmp_path / "again"))
    assert first.read_bytes() == again.read_bytes()


# -- interrupts -------------------------------------------------------------------------------------------------------

SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)


def cache_command(teacher: Path, text: Path, output: Path) -> list[str]:
    words = ["cache-teacher", "--teacher", teacher, "--data", text, "--output", output, "--seq-len", 48]
    words += ["--rows-per-shard", 1, "--batch-size", 1, "--device", "cpu"]
    return [str(word) for word in words]


@pytest.mark.long
@SIGNALS
def test_interrupted_capture_is_continued_to_the_same_bytes(
    tmp_path: Path, teacher_dir: Path, text_file: Path, number: int, monkeypatch: pytest.MonkeyPatch
):
    from pipeline.teacher import capture

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(*cache_command(teacher_dir, text_file, whole))
    report = capture.Capture._report

    def interrupt(self: capture.Capture, *reported: Any) -> None:
        report(self, *reported)
        if self.rows_done == 7:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(capture.Capture, "_report", interrupt)
        result = run(*cache_command(teacher_dir, text_file, parts), status=130)
    assert result.stderr.splitlines()[-1] == (
        f"Interrupted: complete shards are kept in {parts}. Run the same command again to continue."
    )
    assert not (parts / "manifest.json").exists()
    kept = shards(parts)
    assert 0 < len(kept) < len(shards(whole))
    run(*cache_command(teacher_dir, text_file, parts))
    assert shards(parts) == shards(whole)
    assert (parts / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()
    assert kept.items() <= shards(parts).items()


@pytest.mark.long
@SIGNALS
def test_interrupted_training_is_resumed(folder: Path, tmp_path: Path, student_dir: Path, number: int, monkeypatch):
    from pipeline.student.training import train as module

    words = ["train-student", "--cache", folder / "cache", "--student", student_dir, "--device", "cpu"]
    words += ["--max-steps", 4, "--save-steps", 2, "--learning-rate", 0.01]
    run(*words, "--output", tmp_path / "whole")

    def interrupt_at(step: int) -> Result:
        def on_step_end(self, args, state, control, **_: object) -> None:
            if state.global_step == step:
                os.kill(os.getpid(), number)

        with monkeypatch.context() as patch:
            patch.setattr(module._Report, "on_step_end", on_step_end)
            return run(*words, "--output", tmp_path / "parts", *(["--overwrite"] if step == 3 else []), status=130)

    early, late = interrupt_at(1), interrupt_at(3)
    assert early.stderr.splitlines()[-1] == (
        f"Interrupted: no checkpoint was saved in {tmp_path}/parts yet. Start again with --overwrite."
    )
    assert late.stderr.splitlines()[-1] == (
        f"Interrupted: checkpoints are kept in {tmp_path}/parts. Continue from the last one with --resume."
    )
    run(*words, "--output", tmp_path / "parts", "--resume")
    assert distance(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0.0


@pytest.mark.long
@pytest.mark.parametrize("more", [["--overwrite"], []])
def test_interrupt_before_training_begins_changes_nothing(
    folder: Path, tmp_path: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
):
    """The checkpoints in the output are of the old run, and no run of this command could continue from them."""
    from pipeline.student.training import train as module

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "s"
    words = ["train-student", "--cache", folder / "cache", "--student", student_dir, "--device", "cpu"]
    words += ["--max-steps", 1, "--output", output, *more]
    if more:
        run(*words)
    before = contents(tmp_path)
    monkeypatch.setattr(module, "load_run_student", interrupt)
    result = run(*words, status=130)
    assert result.stderr.splitlines()[-1] == "Interrupted: nothing was changed. Run the same command again."
    assert contents(tmp_path) == before


def test_interrupt_anywhere_else(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def verify_cache(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cf, "verify_cache", verify_cache)
    result = run("verify", folder / "cache", status=130)
    assert result.stderr == "Interrupted: nothing was changed.\n"


def test_a_second_interrupt_does_not_contradict_the_first(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def verify_cache(*_: object, **__: object) -> None:
        try:
            interrupted("complete shards are kept.")
        finally:
            raise KeyboardInterrupt

    monkeypatch.setattr(cf, "verify_cache", verify_cache)
    result = run("verify", folder / "cache", status=130)
    assert result.stderr == "Interrupted: complete shards are kept.\n"


def test_a_bug_keeps_its_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cf, "verify_cache", lambda *_, **__: 1 / 0)
    result = CliRunner().invoke(main, ["verify", str(folder / "cache")])
    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.slow
def test_terminated_process_says_how_to_go_on(tmp_path: Path, teacher_dir: Path, text_file: Path):
    """The real thing once: a process of its own, a real signal, its exit status, and the same command again."""
    parts = tmp_path / "parts"
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text() * 20)  # long enough to be caught in the middle
    command = [*cache_command(teacher_dir, text, parts), "--max-documents", "100", "--sample-by", "line"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 100
        while not list(parts.glob("shards/*.json")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert stderr.splitlines()[-1].endswith("Run the same command again to continue.")
    assert "Traceback" not in stderr
    stopped_at = len(shards(parts)) // 2
    result = json.loads(run(*command, "--json").stdout)
    assert 0 < result["resumed_rows"] == stopped_at < result["rows"]
    assert cf.verify_cache(parts).rows == result["rows"]


def test_forked_helpers_end_at_the_signal_that_interrupts_a_command() -> None:
    signal.signal(signal.SIGTERM, commands._interrupt)
    child = os.fork()
    if not child:
        os._exit(0 if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert signal.getsignal(signal.SIGTERM) is commands._interrupt
