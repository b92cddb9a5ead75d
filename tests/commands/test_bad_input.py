"""What a user can get wrong is one clear line on stderr, status 1, and nothing lost or overwritten.

Whatever the case, everything in the user's directory is compared byte by byte before and after.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from cache_samples import contents
from cli import main


def complain(here: Path, command: str, *expected: str, status: int = 1, new: tuple[str, ...] = ()) -> str:
    """Runs a command that must fail; returns its one line.

    Args:
        expected: words of the line: the file or option, what is wrong with it, a next step.
        new: files that the command may leave behind.
    """
    before = contents(here)
    result = CliRunner().invoke(main, command.split())
    assert result.exit_code == status, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert result.stdout == ""
    *stages, line = result.stderr.splitlines()
    assert line.startswith("Error: ")
    if status == 1:
        assert all(stage.endswith("…") or stage[0].isdigit() for stage in stages), result.stderr  # progress
        assert line.endswith(".") or line.endswith("?")
    for words in expected:
        assert words in line
    after = contents(here)
    for name in new:
        assert after.pop(name, None) is not None, f"{name} is not there"
    assert after == before
    return line


CACHE_TEACHER = "cache-teacher --teacher teacher --data text.txt --output new --seq-len 48 --device cpu"
TRAIN = "train-student --cache cache --student student --output new --max-steps 1 --device cpu"
EVALUATE = "evaluate --cache cache --student student --device cpu"


def instead(command: str, option: str, value: str) -> str:
    words = command.split()
    words[words.index(option) + 1] = value
    return " ".join(words)


# -- stage one: text and teacher --------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    "option, value, expected",
    [
        ("--data", "nowhere.txt", ("nowhere.txt", "no such file", "Check the path")),
        ("--data", "empty.txt", ("empty.txt", "is empty", "Check how it was written")),
        ("--data", "no-rows.jsonl", ("no-rows.jsonl", "no rows", "Check how it was written")),
        ("--data", "broken.jsonl", ("broken.jsonl, line 2", "invalid JSON", "Correct or remove")),
        ("--teacher", "./nowhere", ("./nowhere", "no such directory")),
        ("--teacher", "nowhere.gguf", ("nowhere.gguf", "no such file")),
        ("--teacher", "cache", ("cache", "no config.json", "expected a model directory", "Check the path")),
        ("--teacher", "text.txt", ("text.txt", "expected a model directory")),
        ("--teacher", "garbled", ("garbled", "cannot be")),
        ("--teacher", "no-weights", ("no-weights", "cannot be loaded")),
        ("--teacher", "unheard-of", ("unheard-of", "cannot be")),
        ("--teacher", "noise.gguf", ("noise.gguf", "cannot be")),
        ("--seq-len", "4096", ("--seq-len 4096", "at most 2048", "Use --seq-len 2048")),
        ("--device", "cuda", ("--device cuda", "no CUDA device", "--device auto or cpu")),
        ("--device", "abacus", ("--device abacus", "not a device", "Use auto")),
    ],
)
def test_text_or_teacher_that_cannot_be_used(here: Path, option: str, value: str, expected: tuple[str, ...]):
    (here / "empty.txt").write_text("")
    (here / "no-rows.jsonl").write_text("\n")
    (here / "broken.jsonl").write_text('{"text": "fine"}\n{"text": "not\n')
    shutil.copytree(here / "teacher", here / "garbled")
    (here / "garbled/model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{not a header...")
    shutil.copytree(here / "teacher", here / "no-weights")
    (here / "no-weights/model.safetensors").unlink()
    shutil.copytree(here / "teacher", here / "unheard-of")
    (here / "unheard-of/config.json").write_text('{"model_type": "unheard-of"}')
    (here / "noise.gguf").write_bytes(bytes(range(256)))
    complain(here, instead(CACHE_TEACHER, option, value), *expected)


def test_column_that_is_not_there(here: Path):
    complain(here, f"{CACHE_TEACHER.replace('text.txt', 'records.jsonl')} --text-column words", "words", "body")


def test_more_candidates_than_tokens(here: Path):
    complain(here, f"{CACHE_TEACHER} --top-k 500", "--top-k 500", "vocabulary has 400")
    top_p = f"{CACHE_TEACHER} --targets top-p --max-entries 5000"
    complain(here, top_p, "--max-entries 5000", "vocabulary has 400")


@pytest.mark.parametrize("shape", [None, (3,)])
def test_weights_that_are_missing_or_of_another_shape_are_not_made_up(here: Path, shape: tuple[int] | None):
    name = "model.layers.0.mlp.up_proj.weight"
    given = load_file(here / "student/model.safetensors")
    del given[name]
    if shape is not None:
        given[name] = torch.ones(shape)
    save_file(given, here / "student/model.safetensors", metadata={"format": "pt"})
    for command in (TRAIN, EVALUATE, instead(CACHE_TEACHER, "--teacher", "student")):
        complain(here, command, "student", "1 of its weights", name, "Check")


# -- the cache --------------------------------------------------------------------------------------------------------


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def newer(file: Path) -> None:
    text = file.read_text()
    assert '"format_version": 1' in text
    file.write_text(text.replace('"format_version": 1', '"format_version": 3'))


def unfinished(cache: Path) -> None:
    (cache / "manifest.json").rename(cache / "manifest.partial.json")


SHARD = "shards/shard-00001.arrow"
DAMAGE = {
    "truncated shard": (lambda cache: truncate(cache / SHARD), (SHARD, "bytes", "run cache-teacher again")),
    "flipped bit": (lambda cache: flip(cache / SHARD, 2000), (SHARD, "checksum", "run cache-teacher again")),
    "missing shard": (lambda cache: (cache / SHARD).unlink(), (SHARD, "cannot be read", "run cache-teacher again")),
    "newer version": (lambda cache: newer(cache / "manifest.json"), ("manifest.json", "version 3", "Install")),
    "flipped bit in the manifest": (lambda cache: flip(cache / "manifest.json", 900), ("manifest.json",)),
    "unfinished": (unfinished, ("unfinished", "Run distill cache-teacher again")),
    "missing": (shutil.rmtree, ("cache: no such directory", "Give")),
}
IN_A_SHARD = {"truncated shard", "flipped bit", "missing shard"}


@pytest.mark.long
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("command", [TRAIN, EVALUATE, "verify cache", "stats cache"])
def test_damaged_cache(here: Path, command: str, damage: str):
    change, expected = DAMAGE[damage]
    change(here / "cache")
    begun = ("new/distill_config.json",) if "train" in command and damage in IN_A_SHARD else ()
    complain(here, command, *expected, new=begun)


def test_damage_that_another_process_finds(here: Path):
    truncate(here / "cache" / SHARD)
    begun = ("new/distill_config.json",)
    line = complain(
        here, f"{TRAIN} --max-steps 9 --dataloader-num-workers 1", SHARD, "run cache-teacher again", new=begun
    )
    assert line.startswith(f"Error: cache/{SHARD}: found")


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name not in IN_A_SHARD])
def test_damaged_cache_cannot_be_inspected(here: Path, damage: str):
    change, expected = DAMAGE[damage]
    change(here / "cache")
    complain(here, "inspect cache", *expected)


def test_damaged_shard_is_inspected_around(here: Path):
    truncate(here / "cache" / SHARD)
    assert CliRunner().invoke(main, ["inspect", "cache", "--row", "0"]).exit_code == 0
    complain(here, "inspect cache --row 9", SHARD, "run cache-teacher again")


@pytest.mark.parametrize("command", [instead(TRAIN, "--cache", "student"), "verify student", "stats student"])
def test_something_else_as_cache(here: Path, command: str):
    complain(here, command, "student", "not a cache", "Give the one that cache-teacher wrote")


def test_file_as_cache(here: Path):
    complain(here, "verify text.txt", "text.txt", "found a file, expected a directory", "Give that directory")


# -- the student ------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("command", [TRAIN, EVALUATE])
@pytest.mark.parametrize(
    "student, expected",
    [
        (
            "stranger",
            (
                "stranger: the student's tokenizer is not the teacher's",
                "ids differ",
                "Choose a student of the teacher's family",
            ),
        ),
        ("cache", ("cache", "no config.json", "expected a model directory", "Check the path")),
        ("./nowhere", ("./nowhere", "no such directory")),
        ("nowhere.gguf", ("nowhere.gguf", "no such file")),
    ],
)
def test_student_that_cannot_be_used(here: Path, command: str, student: str, expected: tuple[str, ...]):
    found = complain(here, instead(command, "--student", student), *expected)
    if student == "stranger":  # what can be done about it is an option of either, of another kind
        assert ("--cross-tokenizer project or --cross-tokenizer uld" in found) == (command == TRAIN)
        assert ("end at the same byte: --cross-tokenizer project." in found) == (command == EVALUATE)


@pytest.mark.long
@pytest.mark.parametrize(
    "options, expected",
    [
        ("--student-layers 3", ("--student-layers 3", "1 layer.", "from 1 to 1")),
        ("--student-config student/config.json", ("both --student and --student-config", "Leave one out")),
        ("--learning-rate nan", ("--learning-rate nan", "expected a finite number, 0 or more")),
        ("--epochs inf", ("--epochs inf", "expected a finite number")),
        ("--cache-dir reads --cache-dir-gb inf", ("--cache-dir-gb inf", "expected a finite number, 0.001 or more")),
        ("--weight-decay inf", ("--weight-decay inf", "expected a finite number, 0 or more")),
        ("--warmup nan", ("--warmup nan", "expected a finite number, 0 or more")),
        ("--training-args eternal.json", ("eternal.json: num_train_epochs inf", "expected a finite number, 0 or more")),
        ("--training-args endless.json", ("endless.json: learning_rate inf", "expected a finite number, 0 or more")),
        ("--early-stopping-mode any", ("--early-stopping-mode any", "found no --early-stopping")),
        ("--kd-weight 1.5", ("--kd-weight 1.5", "from 0", "to 1")),
        ("--temperature 0", ("--temperature 0", "positive")),
        ("--device cuda:1", ("--device cuda:1", "CUDA_VISIBLE_DEVICES")),
        ("--lr-scheduler cosinus", ("cosinus", "Correct the options")),
        (
            "--eval-cache cache --eval-steps 3 --save-steps 2",
            ("--save-steps 2", "--eval-steps 3", "multiple"),
        ),
        ("--eval-cache student", ("student", "not a cache")),
        ("--training-args nowhere.json", ("nowhere.json", "no such file", "Check --training-args")),
        ("--training-args text.txt", ("text.txt", "not JSON", "Correct it")),
        ("--training-args list.json", ("list.json", "found a list, expected an object", "Correct it")),
        ("--training-args typo.json", ("typo.json", "warmup_step is not", "Did you mean warmup_steps?")),
        ("--training-args reserved.json", ("reserved.json", "output_dir cannot be set here", "use --output")),
        (
            "--training-args split.json",
            ("split.json", "split_batches of accelerator_config", "Remove it"),
        ),
        ("--training-args cache", ("cache", "Is a directory", "Check the path")),
    ],
)
def test_options_that_do_not_go_together(here: Path, options: str, expected: tuple[str, ...]):
    for name, value in (
        ("list", []),
        ("typo", {"warmup_step": 3}),
        ("endless", {"learning_rate": float("inf")}),
        ("eternal", {"num_train_epochs": float("inf")}),
        ("reserved", {"output_dir": "elsewhere"}),
        ("split", {"accelerator_config": {"split_batches": True}}),
    ):
        (here / f"{name}.json").write_text(json.dumps(value))
    complain(here, f"{TRAIN} {options}", *expected)


def test_no_student_at_all(here: Path):
    complain(
        here,
        TRAIN.replace(" --student student", ""),
        "neither --student nor --student-config",
        "Set --student to a model",
    )


# -- wrong usage ------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    "command, expected",
    [
        ("cache-teacher --teacher teacher", "--data"),
        ("train-student", "--cache"),
        (f"{TRAIN} --batch-size 0", "--batch-size"),
        (f"{TRAIN} --epochs 0", "--epochs"),
        (f"{TRAIN} --learning-rate -1", "--learning-rate"),
        (f"{TRAIN} --tail shave", "--tail"),
        (f"{CACHE_TEACHER} --top-k -1", "--top-k"),
        (f"{CACHE_TEACHER} --loss-on everything", "--loss-on"),
        ("inspect cache --row 5000", "--row"),
        ("inspect cache --row -5000", "--row"),
        ("inspect cache --row first", "--row"),
        ("evaluate --cache cache", "--student"),
        ("verify", "CACHE"),
        ("distil", "distil"),
        ("stats cache --jsn", "--json"),
    ],
)
def test_wrong_usage_is_status_2(here: Path, command: str, expected: str):
    complain(here, command, expected, status=2)
