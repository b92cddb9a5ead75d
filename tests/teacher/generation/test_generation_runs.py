"""Runs of `cache-teacher --generate`: interrupted, judged, refused, and what students make of the answers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

import cache_format as cf
from cache_format.write import unfinished
from cache_samples import contents
from generating import K, answers_of, generate, token_ids, write_predicates
from pipeline.errors import ConfigError, DataError
from pipeline.teacher.engines.answer_writer import AnswerWriter
from pipeline.teacher.generation import answer_store, answering
from pipeline.teacher.generation import generate as generation
from pipeline.teacher.generation.answer_store import AnswerStore
from pipeline.teacher.targets.rules import TargetRule
from runs import build_cache
from runs import command as run

ANSWERS = {"answers_per_prompt": 3, "max_new_tokens": 8, "batch_size": 4, "temperature": 1.3}
PROMPTS, PER_GROUP = 8, 6  # answers to two prompts, in two batches


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def predicates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_predicates(tmp_path_factory.mktemp("predicates") / "judge.py")


def count_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that are written from now on."""
    sizes: list[int] = []
    write = AnswerWriter.write

    def counted(self: AnswerWriter, requests: Any) -> Any:
        sizes.append(len(requests))
        return write(self, requests)

    monkeypatch.setattr(AnswerWriter, "write", counted)
    return sizes


# -- interrupted ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(teacher_dir: Path, data: Path, predicates: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "cache"
    generate(teacher_dir, data, output, **ANSWERS, keep_if=f"{predicates}:odd")
    assert sorted(path.name for path in output.parent.iterdir()) == ["cache"]
    return output


def nth(call: int, function: Callable[..., Any], *, after: bool = False) -> Callable[..., Any]:
    """Killed at its n-th call, before or after it has done its work."""
    calls = 0

    def killed(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            raise Killed
        result = function(*given, **named)
        if calls == call:
            raise Killed
        return result

    return killed


@pytest.mark.long
@pytest.mark.parametrize(
    "place, name, call, after, kept_groups",
    [
        (AnswerWriter, "_next", 5, False, 0),
        (AnswerWriter, "write", 4, True, 1),
        (AnswerStore, "save", 2, False, 1),
        (AnswerStore, "save", 2, True, 2),
        (answer_store, "write_bytes", 1, True, 0),
        (answering, "choose", 5, False, 3),
        (cf, "write_answers", 1, True, 4),
        (cf, "write_answers", 2, False, 4),
        (cf.CacheWriter, "write", 2, False, 4),
        (unfinished, "card", 1, False, 4),
        (AnswerStore, "remove", 1, False, None),
        (generation, "_summary_of", 1, False, None),
    ],
)  # fmt: skip
def test_killed_anywhere_it_goes_on_and_ends_with_the_same_bytes(
    place: Any,
    name: str,
    call: int,
    after: bool,
    kept_groups: int | None,
    whole: Path,
    teacher_dir: Path,
    data: Path,
    predicates: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`kept_groups`: those that are not written again; None: the cache was finished already."""
    options = {**ANSWERS, "keep_if": f"{predicates}:odd"}
    with monkeypatch.context() as patch:
        patch.setattr(place, name, nth(call, getattr(place, name), after=after))
        with pytest.raises(Killed):
            generate(teacher_dir, data, tmp_path / "cache", **options)
    sizes = count_batches(monkeypatch)
    summary = generate(teacher_dir, data, tmp_path / "cache", **options)
    if kept_groups is None:
        assert summary.resumed_answers == 24 and sizes == []
    else:
        assert summary.resumed_answers == kept_groups * PER_GROUP and sum(sizes) == 24 - summary.resumed_answers
    assert contents(tmp_path / "cache") == contents(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]


def test_a_damaged_group_of_answers_is_written_again(
    whole: Path, teacher_dir: Path, data: Path, predicates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**ANSWERS, "keep_if": f"{predicates}:odd"}
    with monkeypatch.context() as patch:
        patch.setattr(cf.CacheWriter, "write", nth(1, cf.CacheWriter.write))
        with pytest.raises(Killed):
            generate(teacher_dir, data, tmp_path / "cache", **options)
    groups = sorted((tmp_path / "cache.answers").glob("group-*.arrow"))
    assert len(groups) == 4
    damaged = bytearray(groups[1].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    groups[1].write_bytes(damaged)
    (tmp_path / "cache.answers/.group-00009.arrow.7.tmp").write_bytes(b"half")
    sizes = count_batches(monkeypatch)
    generate(teacher_dir, data, tmp_path / "cache", **options)
    assert sum(sizes) == PER_GROUP and contents(tmp_path / "cache") == contents(whole)


def test_a_batch_that_does_not_fit_is_halved(
    teacher_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(teacher_dir, data, tmp_path / "whole", **ANSWERS)
    write = AnswerWriter.write

    def small_device(self: AnswerWriter, requests: Any) -> Any:
        if len(requests) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return write(self, requests)

    monkeypatch.setattr(AnswerWriter, "write", small_device)
    generate(teacher_dir, data, tmp_path / "halved", **ANSWERS)
    assert token_ids(tmp_path / "halved") == token_ids(tmp_path / "whole")
    sidecar = json.loads((tmp_path / "halved/shards/shard-00000.json").read_text())
    assert sidecar["annotations"]["batch_size"] == 2


def test_answers_of_other_settings_are_neither_used_nor_lost(
    teacher_dir: Path, data: Path, predicates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError):
        generate(teacher_dir, data, tmp_path / "cache", **ANSWERS, keep_if=f"{predicates}:none")
    before = contents(tmp_path)
    for change in ({"temperature": 0.9}, {"seed": 1}, {"targets": TargetRule(top_k=K + 1)}, {"batch_size": 8}):
        with pytest.raises(cf.MismatchError, match="cache.answers: holds answers .*start again with `overwrite`"):
            generate(teacher_dir, data, tmp_path / "cache", **{**ANSWERS, **change})
    assert contents(tmp_path) == before
    sizes = count_batches(monkeypatch)
    generate(teacher_dir, data, tmp_path / "cache", **{**ANSWERS, "seed": 1, "overwrite": True})
    assert sum(sizes) == 24 and cf.open_cache(tmp_path / "cache").metadata.corpus["generation"]["seed"] == 1
    assert not (tmp_path / "cache.answers").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_of_something_else_is_left_alone(
    overwrite: bool, teacher_dir: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache.answers").mkdir()
    (tmp_path / "cache.answers/thesis.txt").write_text("years of work")
    with pytest.raises(cf.CacheError, match="found 'thesis.txt'.*Choose another `output`"):
        generate(teacher_dir, data, tmp_path / "cache", overwrite=overwrite)
    assert (tmp_path / "cache.answers/thesis.txt").read_text() == "years of work" and not (tmp_path / "cache").exists()


# -- judged -----------------------------------------------------------------------------------------------------------


def test_only_what_the_predicate_passes_is_cached_and_counted(whole: Path, predicates: Path) -> None:
    cache = cf.open_cache(whole)
    places = [(line["document"], line["answer"]) for line in answers_of(whole)]
    assert places == [(d, a) for d in range(PROMPTS) for a in range(3) if (d + a) % 2 == 1]
    recorded = cache.metadata.corpus["generation"]
    assert recorded["keep_if"]["function"] == f"{predicates}:odd" and len(recorded["keep_if"]["sha256"]) == 64
    assert (recorded["answers"], recorded["passed"], recorded["prompts_kept"], len(cache)) == (24, 12, 8, 12)


@pytest.mark.long
@pytest.mark.parametrize("keep", ["all", "first", "best"])
def test_of_the_answers_to_a_prompt_that_pass(
    keep: str, teacher_dir: Path, data: Path, predicates: Path, tmp_path: Path
) -> None:
    generate(teacher_dir, data, tmp_path / "all", **ANSWERS)
    summary = generate(teacher_dir, data, tmp_path / "some", **ANSWERS, keep_if=f"{predicates}:odd", keep=keep)
    expected = []
    for document in range(PROMPTS):
        passed = [
            line for line in answers_of(tmp_path / "all")
            if line["document"] == document and (document + line["answer"]) % 2 == 1
        ]  # fmt: skip
        best = max(passed, key=lambda line: line["mean_logprob"])
        expected += {"all": passed, "first": passed[:1], "best": [best]}[keep]
    for line, other in zip(answers_of(tmp_path / "some"), expected, strict=True):
        assert {**line, "row": None} == {**other, "row": None}
    assert (summary.passed, summary.rows, summary.prompts_kept) == (12, len(expected), 8)
    assert [line["row"] for line in answers_of(tmp_path / "some")] == list(range(len(expected)))


def test_a_predicate_is_told_all_about_an_answer(
    teacher_dir: Path, data: Path, predicates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(predicates.parent)
    summary = generate(teacher_dir, data, tmp_path / "cache", **ANSWERS, keep_if="judge:told")
    assert summary.passed == 24


@pytest.mark.parametrize(
    "name, message",
    [
        ("breaks", r"raised ZeroDivisionError: division by zero on .*prompts.jsonl, row 5, answer 0. Fix"),
        ("forgets", r"returned None on .*prompts.jsonl, row 0, answer 0, expected True or False"),
    ],
)
def test_a_predicate_that_fails_names_the_example_and_costs_no_answer(
    name: str,
    message: str,
    teacher_dir: Path,
    data: Path,
    predicates: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match=f"`gen_keep_if` {predicates}:{name}: {message}"):
        generate(teacher_dir, data, tmp_path / "cache", **ANSWERS, keep_if=f"{predicates}:{name}")
    assert not (tmp_path / "cache").exists()
    sizes = count_batches(monkeypatch)
    summary = generate(teacher_dir, data, tmp_path / "cache", **ANSWERS, keep_if=f"{predicates}:odd")
    assert summary.resumed_answers + sum(sizes) == 24 and summary.resumed_answers == {"breaks": 18, "forgets": 6}[name]


def test_nothing_kept_changes_nothing_and_keeps_the_answers(
    whole: Path, teacher_dir: Path, data: Path, predicates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, tmp_path / "cache")
    options = {**ANSWERS, "overwrite": True}
    with pytest.raises(
        DataError, match="none of 24 answers passed .*nothing was changed. The answers are in .*checks them"
    ):
        generate(teacher_dir, data, tmp_path / "cache", **options, keep_if=f"{predicates}:none")
    assert contents(tmp_path / "cache") == contents(whole)
    sizes = count_batches(monkeypatch)
    summary = generate(teacher_dir, data, tmp_path / "cache", **options)
    assert summary.rows == 24 == summary.resumed_answers and sizes == []


@pytest.mark.parametrize(
    "keep_if, message",
    [
        ("judge", "expected module:function or path/to/file.py:function"),
        ("judge:", "expected module:function"),
        ("nowhere.py:odd", "nowhere.py: no such file"),
        ("nowhere:odd", "nowhere cannot be imported: ModuleNotFoundError"),
        ("judge.py:even", "found nothing of that name in judge.py, expected a function"),
        ("judge.py:number", "found a int in judge.py, expected a function"),
        ("judge.py:lonely", r"it takes \(example\), expected \(example, answer\)"),
        ("broken.py:odd", "broken.py cannot be imported: SyntaxError"),
    ],
)
def test_a_predicate_that_cannot_be_used_is_refused_before_anything_is_loaded(
    keep_if: str, message: str, data: Path, predicates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(predicates.parent)
    Path("broken.py").write_text("def odd(:\n")
    with pytest.raises(ConfigError, match=f"^`gen_keep_if` .*{message}"):
        generate(tmp_path / "no teacher", data, tmp_path / "cache", keep_if=keep_if)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_command_says_how_many_answers_were_kept(
    teacher_dir: Path, data: Path, predicates: Path, whole: Path, tmp_path: Path
) -> None:
    words = ["cache-teacher", "--teacher", teacher_dir, "--data", data, "--output", tmp_path / "cache", "--generate"]
    words += ["--gen-temperature", 1.3, "--gen-answers-per-prompt", 3, "--gen-max-new-tokens", 8, "--batch-size", 4]
    words += ["--seq-len", 256, "--top-k", K, "--rows-per-shard", 16, "--device", "cpu", "--gen-keep-if"]
    result = run(*words, f"{predicates}:odd")
    assert "12 for 8 prompts, 12 accepted (50.0%)" in result.stdout
    assert "24/24 answers" in result.stderr and "12 accepted" in result.stderr
    assert contents(tmp_path / "cache") == contents(whole)
    found = json.loads(
        run(*words, f"{predicates}:odd", "--overwrite", "--json", "--gen-stop", "X", "--gen-stop", "Y").stdout
    )
    assert found["answers"] == 24 and found["rows"] == found["passed"] == 12 and math.isfinite(found["mean_logprob"])
    assert sum(found["stop_reasons"].values()) == 24
    assert cf.open_cache(tmp_path / "cache").metadata.corpus["generation"]["stop"] == ["X", "Y"]
    result = run(*words, f"{predicates}:none", "--overwrite", status=1)
    assert result.stderr.splitlines()[-1].startswith("Error: ") and "none of 24 answers passed" in result.stderr


def test_an_interrupt_says_where_the_answers_are(
    teacher_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(AnswerWriter, "write", interrupted)
    words = ["cache-teacher", "--teacher", teacher_dir, "--data", data, "--output", tmp_path / "cache"]
    result = run(*words, "--seq-len", 256, "--generate", status=130)
    assert f"answers are kept in {tmp_path / 'cache'}.answers. Run the same command again" in result.stderr


@pytest.mark.parametrize(
    "words, status, message",
    [
        (["--gen-temperature", 0.5], 1, "--gen-temperature: only with --generate"),
        (["--gen-stop", "x"], 1, "--gen-stop: only with --generate"),
        (["--gen-keep-if", "a:b"], 1, "--gen-keep-if: only with --generate"),
        (["--generate", "--no-packing"], 1, "--packing: cannot be combined with --generate: each answer is a row"),
        (["--generate", "--all-positions"], 1, "--all-positions: cannot be combined with --generate"),
        (
            ["--generate", "--num-workers", 2, "--worker-index", 0],
            1,
            "--num-workers: cannot be combined with --generate",
        ),
        (["--generate", "--tp"], 1, "--tp: cannot be combined with --generate: one process"),
        (["--generate", "--mask-seed", 1], 1, "--mask-seed: cannot be combined with --generate"),
        (["--generate", "--loss-on", "all"], 1, "--loss-on: cannot be combined with --generate"),
        (["--generate", "--gen-temperature", -1], 2, "'--gen-temperature': -1.0 is not in the range"),
        (["--generate", "--gen-top-p", 0], 2, "'--gen-top-p': 0.0 is not in the range"),
        (["--generate", "--gen-top-k", -1], 2, "'--gen-top-k': -1 is not in the range"),
        (["--generate", "--gen-stop", ""], 1, "--gen-stop: found an empty string"),
        (
            ["--generate", "--gen-temperature", 0, "--gen-answers-per-prompt", 2],
            1,
            "all answers to a prompt are the same",
        ),
        (["--generate", "--top-k", 401], 1, "--top-k 401: the vocabulary has 400 tokens"),
        (["--generate", "--seq-len", 4096], 1, "was trained on at most 2048"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    words: list[object], status: int, message: str, teacher_dir: Path, data: Path, tmp_path: Path
) -> None:
    given = ["cache-teacher", "--teacher", teacher_dir, "--data", data, "--output", tmp_path / "cache"]
    result = run(*given, *words, status=status)
    assert message in " ".join(result.stderr.split()) and list(tmp_path.iterdir()) == []


def test_one_process_writes_the_answers_of_a_run(
    teacher_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = AnswerWriter.write

    def second_run_meanwhile(self: AnswerWriter, requests: Any) -> Any:
        monkeypatch.setattr(AnswerWriter, "write", write)
        before = contents(tmp_path / "cache.answers")
        with pytest.raises(cf.CacheError, match="cache.answers: process .* writes these answers.*nothing was changed"):
            generate(teacher_dir, data, tmp_path / "cache", **ANSWERS)
        assert contents(tmp_path / "cache.answers") == before
        return write(self, requests)

    monkeypatch.setattr(AnswerWriter, "write", second_run_meanwhile)
    assert generate(teacher_dir, data, tmp_path / "cache", **ANSWERS).rows == 24
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]


def test_a_finished_cache_is_left_as_it_is(
    whole: Path, teacher_dir: Path, data: Path, predicates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, tmp_path / "cache")
    monkeypatch.setattr(AnswerWriter, "write", None)
    options = {**ANSWERS, "keep_if": f"{predicates}:odd"}
    summary = generate(teacher_dir, data, tmp_path / "cache", **options)
    assert (summary.answers, summary.passed, summary.rows, summary.resumed_answers) == (24, 12, 12, 24)
    lines = answers_of(whole)
    expected = sum(sum(line["token_logprobs"]) for line in lines) / sum(len(line["token_logprobs"]) for line in lines)
    assert summary.mean_logprob == pytest.approx(expected)
    for change in ({"seed": 3}, {"keep": "best"}, {"keep_if": None}, {"targets": TargetRule(top_k=K + 1)}):
        with pytest.raises(cf.CacheError, match="finished cache .* made with other settings .*nothing was changed"):
            generate(teacher_dir, data, tmp_path / "cache", **{**options, **change})
    assert contents(tmp_path / "cache") == contents(whole)


def test_a_cache_of_given_text_is_no_finished_run(teacher_dir: Path, data: Path, tmp_path: Path) -> None:
    build_cache(tmp_path / "cache", teacher_dir, data)
    before = contents(tmp_path)
    with pytest.raises(cf.CacheError, match="finished cache .* made with other settings"):
        generate(teacher_dir, data, tmp_path / "cache")
    assert contents(tmp_path) == before


def test_several_processes_are_refused(
    teacher_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="`generate`: one process writes the answers"):
        generate(teacher_dir, data, tmp_path / "cache")


def test_a_masked_teacher_is_refused(tmp_path: Path, data: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=400, **shape)).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ConfigError, match="is a masked language model, which cannot continue a text"):
        generate(tmp_path / "teacher", data, tmp_path / "cache")
