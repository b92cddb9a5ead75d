"""Several students from one pass over a cache: each is, bit by bit, what it is when trained alone."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import pipeline.student.data.dataset as data_module
from cli import main
from pipeline.errors import ConfigError, DistillError
from pipeline.student.data.dataset import CacheDataset
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.many import _Turns, train_students
from pipeline.student.training.train import TrainSummary
from runs import build_cache, distance, log_history, train, weights
from tiny import english, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def cache(teacher_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("many") / "cache", teacher_dir, text_file)


@pytest.fixture(scope="module")
def held_out(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held-out")
    (folder / "text.txt").write_text(english(12, seed=5))
    return build_cache(folder / "cache", teacher_dir, folder / "text.txt")


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """Two Llamas of different size and one GPT-2, whose dropout asks for random numbers at every step."""
    folder = tmp_path_factory.mktemp("students")
    found = {"small": tiny_llama(folder / "small", tokenizer, layers=1, hidden=16, seed=3)}
    config = GPT2Config(vocab_size=400, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(4)
    GPT2LMHeadModel(config).save_pretrained(folder / "noisy")
    tokenizer.save_pretrained(folder / "noisy")
    found["noisy"] = folder / "noisy"
    found["wide"] = tiny_llama(folder / "wide", tokenizer, layers=1, hidden=32, seed=5)
    return found


def train_many(output: Path, cache: Path, students: dict[str, Path], **options: Any) -> dict[str, TrainSummary]:
    callbacks = {name: options.pop(name) for name in list(options) if name.startswith("on_")}
    config = TrainStudentConfig(cache=str(cache), output=str(output), device="cpu", **options)
    return train_students(config, [str(path) for path in students.values()], **callbacks)


TIMED = {"tokens_per_s", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


def numbers(output: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in entry.items() if k not in TIMED} for entry in log_history(output)]


def same(a: Path, b: Path) -> None:
    assert distance(weights(a), weights(b)) == 0.0
    assert numbers(a) == numbers(b)


OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 8,  # an epoch and a half
    "eval_steps": 2,
    "save_steps": 2,
    "logging_steps": 1,
    "learning_rate": 3e-2,
}


# -- equal to single runs ---------------------------------------------------------------------------------------------


def test_each_equals_its_single_run_and_each_batch_is_read_once(
    tmp_path: Path, cache: Path, held_out: Path, students: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    read: list[tuple[str, int]] = []
    collated: list[int] = []
    getitem, collate = CacheDataset.__getitem__, data_module.collate
    monkeypatch.setattr(
        CacheDataset, "__getitem__", lambda self, i: read.append((self.cache.path, i)) or getitem(self, i)
    )
    monkeypatch.setattr(data_module, "collate", lambda rows: collated.append(len(rows)) or collate(rows))
    (tmp_path / "args.json").write_text('{"max_grad_norm": 0.1}')  # clipping has something to do
    options = {**OPTIONS, "eval_cache": str(held_out), "training_args": str(tmp_path / "args.json")}
    alone = {name: train(tmp_path / name, cache, student=path, **options) for name, path in students.items()}
    single = len(read) // len(students), len(collated) // len(students)
    assert read[: single[0]] == read[single[0] : 2 * single[0]]
    read.clear(), collated.clear()
    together = train_many(tmp_path / "many", cache, students, **options)

    assert list(together) == list(students)
    assert (len(read), len(collated)) == single  # training and evaluations alike
    timed = {"output", "seconds"}
    for name in students:
        same(tmp_path / name, tmp_path / "many" / name)
        ours, theirs = (vars(found[name]) for found in (alone, together))
        assert {k: v for k, v in ours.items() if k not in timed} == {k: v for k, v in theirs.items() if k not in timed}
        record = json.loads((tmp_path / "many" / name / "distill_config.json").read_text())["config"]
        assert record["student"] == str(students[name])
    norms = [entry["grad_norm"] for entry in log_history(tmp_path / "small") if "grad_norm" in entry]
    assert min(norms) > 0.1  # of this student's own gradient


@pytest.mark.slow
def test_one_that_stops_early_leaves_the_others_alone(
    tmp_path: Path, cache: Path, held_out: Path, students: dict[str, Path]
):
    # GPT-2 has small weights: it begins far better, and has less to gain.
    options = {**OPTIONS, "eval_cache": str(held_out), "eval_steps": 1, "save_steps": 1, "max_steps": 10}
    options |= {"early_stopping": ("kl:0.05:1",), "gradient_accumulation_steps": 1}
    alone = {name: train(tmp_path / name, cache, student=path, **options) for name, path in students.items()}
    steps = [summary.steps for summary in alone.values()]
    assert min(steps) < 10 and len(set(steps)) > 1, steps
    together = train_many(tmp_path / "many", cache, students, **options)
    for name in students:
        assert together[name].stopped == alone[name].stopped
        same(tmp_path / name, tmp_path / "many" / name)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [None, "noisy"])
def test_interrupted_together_and_resumed_together(
    tmp_path: Path, cache: Path, held_out: Path, students: dict[str, Path], lost: str | None
):
    options = {**OPTIONS, "eval_cache": str(held_out)}
    alone = {name: train(tmp_path / name, cache, student=path, **options) for name, path in students.items()}

    def stop(step: int, total: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        train_many(tmp_path / "many", cache, students, on_step=stop, **options)
    assert threading.active_count() == before
    if lost is not None:  # as if killed between the checkpoints of two students: they are out of phase now
        for checkpoint in (tmp_path / "many" / lost).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    together = train_many(tmp_path / "many", cache, students, resume=True, **options)
    for name in students:
        assert distance(weights(tmp_path / name), weights(tmp_path / "many" / name)) == 0.0
        assert together[name].eval == alone[name].eval

    with pytest.raises(ConfigError, match="found finished runs only"):
        train_many(tmp_path / "many", cache, students, resume=True, **options)
    (tmp_path / "many/wide/trainer_state.json").unlink()
    assert list(train_many(tmp_path / "many", cache, students, resume=True, **options)) == ["wide"]


@pytest.mark.slow
def test_adapters_of_several_students(tmp_path: Path, cache: Path, students: dict[str, Path]):
    options = {"lora_rank": 2, "merge_adapter": True, "lora_dropout": 0.3, "max_steps": 2, "learning_rate": 1e-2}
    train_many(tmp_path / "many", cache, students, **options)
    for name, path in students.items():
        train(tmp_path / name, cache, student=path, **options)
        same(tmp_path / name, tmp_path / "many" / name)


# -- turns ------------------------------------------------------------------------------------------------------------


def test_turns_go_round_and_random_numbers_stay_with_their_owner():
    def draws(seed: int) -> list[tuple[float, float, float]]:
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        return [one() for _ in range(5)]

    def one() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    expected = [draws(seed) for seed in range(3)]
    turns, found, order = _Turns(3), [[], [], []], []

    def work(place: int) -> None:
        turns.wait(place)
        random.seed(place), np.random.seed(place), torch.manual_seed(place)
        for i in range(5):
            turns.hand_on(place)
            order.append(place)
            found[place].append(one())
            if place == 1 and i == 2:
                break
        turns.leave(place)

    threads = [threading.Thread(target=work, args=(place,)) for place in (2, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert order == [0, 1, 2] * 3 + [0, 2] * 2
    assert found == [expected[0], expected[1][:3], expected[2]]


# -- what cannot be had -----------------------------------------------------------------------------------------------


def test_one_that_does_not_fit_stops_all_before_anything_is_touched(
    tmp_path: Path, cache: Path, students: dict[str, Path]
):
    stranger = tiny_llama(tmp_path / "stranger", tiny_tokenizer(seed=1), hidden=16)
    with pytest.raises(DistillError, match="stranger: .*tokenizer is not the teacher's"):
        train_many(tmp_path / "many", cache, {**students, "stranger": stranger}, max_steps=1)
    assert not (tmp_path / "many").exists()

    broken = Path(shutil.copytree(students["wide"], tmp_path / "broken"))  # found out only when it is loaded
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(DistillError, match="broken"):
        train_many(tmp_path / "many", cache, {"small": students["small"], "broken": broken}, max_steps=1)
    assert not (tmp_path / "many").exists()
    assert threading.active_count() == 1 or all(not t.name.startswith("small") for t in threading.enumerate())


def test_names_and_outputs_that_clash(tmp_path: Path, cache: Path, students: dict[str, Path]):
    twin = Path(shutil.copytree(students["small"], tmp_path / "other" / "small"))
    with pytest.raises(ConfigError, match="is called small too, and each gets a directory of its name"):
        train_many(tmp_path / "many", cache, {"small": students["small"], "twin": twin}, max_steps=1)
    train(tmp_path / "one", cache, student=students["small"], max_steps=1)
    with pytest.raises(ConfigError, match="holds one student, expected a directory for several"):
        train_many(tmp_path / "one", cache, students, max_steps=1, overwrite=True)
    with pytest.raises(ConfigError, match="found no checkpoint to resume from. Start without --resume"):
        train_many(tmp_path / "none", cache, students, max_steps=1, resume=True)
    (tmp_path / "many/wide").mkdir(parents=True)
    (tmp_path / "many/wide/thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="wide: .*expected an empty directory"):
        train_many(tmp_path / "many", cache, students, max_steps=1)
    assert [path.name for path in (tmp_path / "many").iterdir()] == ["wide"]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"dataloader_num_workers": 1}, "--num-workers: a worker would read for one student alone"),
        ({"training_args": "args.json"}, "such a log is of one run"),
        ({"cross_tokenizer": "project"}, "--cross-tokenizer: each would need batches in its own tokens"),
    ],
)
def test_options_that_several_students_cannot_have(
    tmp_path: Path,
    cache: Path,
    students: dict[str, Path],
    options: dict[str, Any],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    Path("args.json").write_text('{"report_to": ["tensorboard"]}')
    with pytest.raises(ConfigError, match=expected):
        train_many(tmp_path / "many", cache, students, max_steps=1, **options)
    assert not (tmp_path / "many").exists()


# -- the command line -------------------------------------------------------------------------------------------------


def run(*words: object, status: int = 0) -> Any:
    before = signal.getsignal(signal.SIGTERM)
    try:
        result = CliRunner().invoke(main, [str(word) for word in words])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.exit_code == status, (result.output, result.exc_info)
    return result


@pytest.mark.slow
def test_command_line_names_them(tmp_path: Path, cache: Path, held_out: Path, students: dict[str, Path], monkeypatch):
    words = ["train-student", "--cache", cache, "--eval-cache", held_out, "--device", "cpu", "--output", tmp_path / "s"]
    words += ["--max-steps", 3, "--eval-steps", 1]
    for path in students.values():
        words += ["--student", path]
    result = run(*words)
    for name in students:
        assert f"Trained {tmp_path}/s/{name}" in result.stdout
        assert f"{name}: step 3 held out: loss" in result.stderr
        assert f"{name}: loading the student …" in result.stderr
    found = json.loads(run(*words, "--overwrite", "--json").stdout)["students"]
    assert [Path(each["output"]).name for each in found] == list(students)

    from pipeline.student.training import train as module

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **_: object) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(module._Report, "on_step_end", on_step_end)
        interrupted = run(*words, "--overwrite", status=130)
    assert interrupted.stderr.splitlines()[-1] == (
        f"Interrupted: checkpoints are kept in {tmp_path}/s. Continue from the last one with --resume."
    )
    run(*words, "--resume")
    assert (tmp_path / "s/wide/model.safetensors").exists()
