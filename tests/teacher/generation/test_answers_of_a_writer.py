"""Answers written by another model, such as a student, with targets of the teacher."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

import cache_format as cf
from cache_samples import contents
from generating import K, answers_of, generate, load, logprobs_of, token_ids, write_predicates
from pipeline.errors import ConfigError
from pipeline.models import loading
from pipeline.models.paths import split_revision
from pipeline.student.validation.loss_checks import loss_for_cache
from pipeline.teacher import opening
from pipeline.teacher.capture import Capture
from pipeline.teacher.engines.answer_writer import AnswerWriter
from pipeline.teacher.engines.engine_config import EngineConfig
from pipeline.teacher.generation import caching
from pipeline.teacher.generation import generate as generation
from pipeline.teacher.generation.answer_store import AnswerStore
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.verification import verify_against_teacher
from pipeline.teacher.verify_config import TeacherCheckConfig
from runs import command as run
from runs import train
from sampled import threshold
from tiny import tiny_llama, tiny_tokenizer, write_jsonl

OPTIONS: dict[str, Any] = {"answers_per_prompt": 2, "max_new_tokens": 8, "batch_size": 4, "targets": threshold(0.05)}
PROMPTS, PER_GROUP = 6, 4


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def cache(teacher_dir: Path, student_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("caches") / "cache"
    generate(teacher_dir, data, output, writer=str(student_dir), **OPTIONS, rows_per_shard=4)
    return output


@pytest.mark.long
def test_the_writer_writes_and_the_teacher_gives_the_targets(
    cache: Path, teacher_dir: Path, student_dir: Path, data: Path, tmp_path: Path
) -> None:
    generate(student_dir, data, tmp_path / "own", **OPTIONS)
    assert token_ids(cache) == token_ids(tmp_path / "own")
    assert answers_of(cache) == answers_of(tmp_path / "own")  # with the log-probabilities of the writer
    opened, entropies = cf.open_cache(cache), []
    for model in (load(teacher_dir), load(student_dir)):
        texts = [logprobs_of(model, row.input_ids, 400)[row.loss_mask] for row in opened.iter_rows()]
        entropies.append(np.concatenate([-(np.exp(text) * text).sum(axis=1) for text in texts]))
    found = np.concatenate([row.targets.entropy[row.loss_mask] for row in opened.iter_rows()])
    by_teacher, by_writer = (np.abs(found - each).max() for each in entropies)
    assert by_teacher < 0.1 < 1.0 < by_writer  # entropies are stored in steps of 0.17
    assert sorted(path.name for path in cache.parent.iterdir()) == ["cache"]


def test_the_writer_reads_the_prompt_of_the_student_and_the_teacher_its_own(
    teacher_dir: Path, student_dir: Path, data: Path, tmp_path: Path
) -> None:
    records = [json.loads(line) for line in data.read_text().splitlines()]
    hints = [{**record, "teacher_prompt": f"Read this first. {record['prompt']}"} for record in records]
    with_hints = write_jsonl(tmp_path / "hints.jsonl", hints)
    generate(teacher_dir, with_hints, tmp_path / "hinted", writer=str(student_dir), **OPTIONS)
    generate(student_dir, data, tmp_path / "own", **OPTIONS)
    assert token_ids(tmp_path / "hinted") == token_ids(tmp_path / "own")
    assert "teacher_stream_sha256" in cf.open_cache(tmp_path / "hinted").metadata.corpus
    check = verify_against_teacher(
        TeacherCheckConfig(cache=str(tmp_path / "hinted"), teacher=str(teacher_dir), rows=12)
    )
    assert check.agrees and check.same_entries == 1.0


def test_the_writer_need_not_read_what_only_the_teacher_reads(
    teacher_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    writer = tiny_llama(tmp_path / "writer", tokenizer, layers=1)
    settings = json.loads((writer / "config.json").read_text())
    (writer / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 64}))
    records = [{"prompt": "The miller", "teacher_prompt": "Read this first. " * 10 + "The miller"}] * 2
    data = write_jsonl(tmp_path / "hints.jsonl", records)
    options = {**OPTIONS, "seq_len": 64, "writer": str(writer)}
    generate(teacher_dir, data, tmp_path / "cache", **options)
    assert cf.open_cache(tmp_path / "cache").metadata.corpus["teacher_window_length"] == 256
    shutil.copytree(writer, tmp_path / "moved")
    assert generate(teacher_dir, data, tmp_path / "cache", **options | {"writer": str(tmp_path / "moved")}).rows == 4
    with pytest.raises(ConfigError, match=r"`seq_len` 65: .*writer was trained on at most 64 positions"):
        generate(teacher_dir, data, tmp_path / "longer", **options | {"seq_len": 65})


def test_the_cache_holds_against_the_teacher_its_sample_included(cache: Path, teacher_dir: Path) -> None:
    check = verify_against_teacher(TeacherCheckConfig(cache=str(cache), teacher=str(teacher_dir), rows=12))
    assert check.agrees and check.same_entries == 1.0


def test_the_manifest_names_the_writer_and_the_text_is_no_sample_of_the_teacher(cache: Path, student_dir: Path) -> None:
    opened = cf.open_cache(cache)
    writer = opened.metadata.corpus["generation"]["writer"]
    assert writer["name"] == str(student_dir)
    assert writer["weights_fingerprint"] != opened.metadata.teacher["weights_fingerprint"]
    saved = json.loads((cache / "distill_config.json").read_text())["config"]
    assert saved["writer"] == str(student_dir)
    with pytest.raises(ConfigError, match="`tail` realized: the text of .* was written by .*student"):
        loss_for_cache(opened, kd_weight=0.5, tail="realized")


@pytest.mark.parametrize("kd_weight, warnings", [(1.0, 0), (0.9, 1)])
def test_labels_that_the_teacher_did_not_write_are_warned_about(
    kd_weight: float, warnings: int, cache: Path, student_dir: Path, tmp_path: Path
) -> None:
    summary = train(tmp_path / "student", cache, student=student_dir, kd_weight=kd_weight, max_steps=1)
    assert len(summary.warnings) == warnings and all("its labels are tokens" in each for each in summary.warnings)


def test_the_writer_leaves_before_the_teacher_comes(
    teacher_dir: Path, student_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[Any] = []
    open_engine = generation.open_engine

    def opened(*given: Any, **named: Any) -> Any:
        gc.collect()
        assert [model() for model in models] == [None] * len(models)
        engine = open_engine(*given, **named)
        models.append(weakref.ref(engine.head.model))
        return engine

    monkeypatch.setattr(generation, "open_engine", opened)
    generate(teacher_dir, data, tmp_path / "cache", writer=str(student_dir), **OPTIONS)
    assert len(models) == 2


def test_a_writer_that_is_the_teacher_changes_nothing(teacher_dir: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(teacher_dir)
    generate(teacher_dir, data, tmp_path / "one", **OPTIONS)
    generate(teacher_dir, data, tmp_path / "other", writer=str(tmp_path / "linked"), **OPTIONS)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


@pytest.mark.long
@pytest.mark.parametrize(
    "place, name, call",
    [
        (AnswerWriter, "write", 2),
        (AnswerStore, "save", 2),
        (cf, "write_answers", 2),
        (caching, "cache_metadata", 1),
        (Capture, "_shard", 2),
        (cf.CacheWriter, "write", 2),
        (AnswerStore, "remove", 1),
        (generation, "_summary_of", 1),
    ],
)
def test_killed_anywhere_it_continues_and_ends_with_the_same_bytes(
    place: Any,
    name: str,
    call: int,
    cache: Path,
    teacher_dir: Path,
    student_dir: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    function, calls = getattr(place, name), 0

    def killed(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return function(*given, **named)

    options = {**OPTIONS, "writer": str(student_dir), "rows_per_shard": 4}
    with monkeypatch.context() as patch:
        patch.setattr(place, name, killed)
        with pytest.raises(Killed):
            generate(teacher_dir, data, tmp_path / "cache", **options)
    generate(teacher_dir, data, tmp_path / "cache", **options)
    assert contents(tmp_path / "cache") == contents(cache)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]


def test_continuing_with_another_writer_is_refused_and_with_other_targets_is_not(
    teacher_dir: Path,
    student_dir: Path,
    data: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = tiny_llama(tmp_path / "other", tokenizer, layers=1, hidden=16, seed=4)
    with monkeypatch.context() as patch:
        patch.setattr(caching, "cache_metadata", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            generate(teacher_dir, data, tmp_path / "cache", writer=str(student_dir), **OPTIONS)
    for options in ({"writer": str(other)}, {}):
        with pytest.raises(cf.MismatchError, match="holds answers .*writer(\\.weights_fingerprint)? recorded"):
            generate(teacher_dir, data, tmp_path / "cache", **OPTIONS, **options)
    write, written = AnswerWriter.write, []
    monkeypatch.setattr(AnswerWriter, "write", lambda *given: written.append(given) or write(*given))
    options = {**OPTIONS, "targets": TargetRule(top_k=K), "writer": str(student_dir)}
    summary = generate(teacher_dir, data, tmp_path / "cache", **options)
    assert written == [] and summary.resumed_answers == summary.answers
    for options in ({"writer": str(other)}, {"writer": None}):
        with pytest.raises(cf.CacheError, match=r"made with other settings \(.*writer"):
            generate(teacher_dir, data, tmp_path / "cache", **{**OPTIONS, "targets": TargetRule(top_k=K), **options})


def test_a_finished_cache_is_known_under_another_name_of_the_writer(
    cache: Path, teacher_dir: Path, student_dir: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(student_dir, tmp_path / "moved")
    shutil.copytree(cache, tmp_path / "cache")
    generate(teacher_dir, data, tmp_path / "cache", writer=str(tmp_path / "moved"), **OPTIONS)
    assert contents(tmp_path / "cache") == contents(cache)


def test_a_revision_and_a_dtype_of_the_writer_alone(
    teacher_dir: Path, student_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    open_engine = generation.open_engine

    def remember(config: Any, *given: Any, **named: Any) -> Any:
        opened.append(config)
        engine = open_engine(config, *given, **named)
        opened.append(str(engine.head.model.dtype))
        return engine

    locate = loading.locate_model
    monkeypatch.setattr(generation, "open_engine", remember)
    on_the_hub = {"owner/student": str(student_dir)}
    monkeypatch.setattr(loading, "locate_model", lambda name, *files: locate(on_the_hub.get(name, name), *files))
    writer = {"writer": "owner/student@v2", "writer_dtype": "bfloat16"}
    generate(teacher_dir, data, tmp_path / "cache", **writer, **OPTIONS)
    assert [(each.teacher, each.revision) for each in opened[::2]] == [
        ("owner/student", "v2"),
        (str(teacher_dir), None),
    ]
    assert opened[1::2] == ["torch.bfloat16", "torch.float32"]
    recorded = cf.open_cache(tmp_path / "cache").metadata.corpus["generation"]["writer"]
    assert (recorded["name"], recorded["revision"], recorded["dtype"]) == ("owner/student", "v2", "bfloat16")


def test_the_writer_is_spread_by_a_device_map_of_its_own(
    cache: Path, teacher_dir: Path, student_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk = dict.fromkeys(("model.embed_tokens", "lm_head"), "disk")
    places = on_disk | dict.fromkeys(("model.layers", "model.norm", "model.rotary_emb"), "cpu")
    (tmp_path / "map.json").write_text(json.dumps(places))
    opened: list[Any] = []
    open_engine = generation.open_engine

    def remember(*given: Any, **named: Any) -> Any:
        engine = open_engine(*given, **named)
        opened.append(getattr(engine.head.model, "hf_device_map", None))
        return engine

    monkeypatch.setattr(generation, "open_engine", remember)
    writer = {"writer": str(student_dir), "writer_device_map": str(tmp_path / "map.json")}
    generate(teacher_dir, data, tmp_path / "cache", **writer, **OPTIONS)
    assert opened == [places, None]
    assert token_ids(tmp_path / "cache") == token_ids(cache)


class Opened(Exception):
    pass


def test_the_writer_in_vllm_has_its_own_quantization_and_number_of_devices(
    teacher_dir: Path, student_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(config: Any, *_: Any) -> Any:
        raise Opened(config.teacher, config.running.quantization, config.running.tensor_parallel_size)

    monkeypatch.setattr(opening, "check_installed", lambda **_: None)
    monkeypatch.setattr(generation, "open_engine", opened)
    running = EngineConfig(engine="vllm", quantization="fp8", tensor_parallel_size=4)
    options = {"running": running, "device": "auto", "batch_size": None}
    for writer, own, expected in (
        (student_dir, {}, (None, None)),
        (student_dir, {"writer_quantization": "awq", "writer_tensor_parallel_size": 2}, ("awq", 2)),
        (teacher_dir, {"writer_quantization": "awq"}, ("awq", None)),  # not the teacher as it is
        (teacher_dir, {"writer_quantization": "fp8", "writer_tensor_parallel_size": 4}, ("fp8", 4)),
    ):
        with pytest.raises(Opened) as error:
            generate(teacher_dir, data, tmp_path / "cache", writer=str(writer), **own, **{**OPTIONS, **options})
        assert error.value.args == (str(writer), *expected)


@pytest.mark.parametrize(
    "engine, option, expected",
    [
        ("transformers", {"writer_quantization": "fp8"}, "`writer_quantization`: only with `engine=vllm`"),
        ("transformers", {"writer_tensor_parallel_size": 2}, "`writer_tensor_parallel_size`: only with `engine=vllm`"),
        ("transformers", {"writer_device_map": "no.json"}, "`writer_device_map` no.json: expected auto"),
        ("vllm", {"writer_device_map": "auto"}, "`writer_device_map`: cannot be combined with `engine=vllm`"),
    ],
)
def test_what_the_engine_cannot_load_a_writer_with_is_refused(
    engine: Any, option: dict[str, Any], expected: str, teacher_dir: Path, student_dir: Path, data: Path, tmp_path: Path
) -> None:
    running = EngineConfig(engine=engine)
    options = {**OPTIONS, "running": running, "device": "auto", "batch_size": None}
    with pytest.raises(ConfigError, match=expected):
        generate(teacher_dir, data, tmp_path / "cache", writer=str(student_dir), **option, **options)


@pytest.mark.parametrize(
    "given, expected",
    [
        ("owner/name", ("owner/name", None)),
        ("owner/name@v2", ("owner/name", "v2")),
        ("owner/name@refs/pr/1", ("owner/name", "refs/pr/1")),
        ("students@home/first", ("students@home/first", None)),  # there
        ("@v2", ("@v2", None)),
    ],
)
def test_a_revision_follows_the_name(
    given: str, expected: tuple[str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "students@home" / "first").mkdir(parents=True)
    assert split_revision(given) == expected


def test_only_accepted_answers_are_scored(teacher_dir: Path, student_dir: Path, data: Path, tmp_path: Path) -> None:
    odd = f"{write_predicates(tmp_path / 'judge.py')}:odd"
    states: list[Any] = []
    summary = generate(
        teacher_dir,
        data,
        tmp_path / "cache",
        writer=str(student_dir),
        keep_if=odd,
        on_progress=states.append,
        **OPTIONS,
    )
    assert summary.passed == summary.rows == PROMPTS and states[-1].total_answers == PROMPTS
    assert {line["answer"] for line in answers_of(tmp_path / "cache")} == {0, 1}


def test_a_writer_with_another_tokenizer_is_refused(teacher_dir: Path, data: Path, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", tiny_tokenizer(390), layers=1, hidden=16)
    with pytest.raises(cf.MismatchError, match="the writer's tokenizer is not the teacher's"):
        generate(teacher_dir, data, tmp_path / "cache", writer=str(other), **OPTIONS)


def test_command_line(teacher_dir: Path, student_dir: Path, data: Path, tmp_path: Path) -> None:
    words = ("cache-teacher", "--teacher", teacher_dir, "--data", data, "--writer", student_dir)
    result = run(*words, "--output", tmp_path / "cache", "--generate", "--gen-max-new-tokens", 4, "--device", "cpu")
    assert "scoring 6 of 6 answers" in result.stderr
    result = run(*words, "--output", tmp_path / "none", status=1)
    assert "--writer: only with --generate" in result.stderr
    result = run(*(*words[:-1], "no/such/model"), "--output", tmp_path / "none", "--generate", status=1)
    assert "no/such/model" in result.stderr
