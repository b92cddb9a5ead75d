"""What becomes of a cache of generated answers: checked, converted, learned from; and the worked example."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import cache_format as cf
from benchmarks.reasoning import is_right
from generating import answers_of, generate, write_predicates
from pipeline.errors import ConfigError
from pipeline.inspection import cache_statistics
from pipeline.student.validation.loss_checks import loss_for_cache, loss_for_held_out
from pipeline.teacher.generation.predicates import Answered
from runs import build_cache, dense_evaluation, train
from sampled import threshold
from tiny import completions, write_jsonl


@pytest.fixture(scope="module")
def written(teacher_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Caches of answers of up to 8 tokens, by how they were drawn and chosen; and one of given text."""
    folder = tmp_path_factory.mktemp("written")
    data = write_jsonl(folder / "data.jsonl", [{**record, "number": i} for i, record in enumerate(completions(8))])
    predicates = write_predicates(folder / "judge.py")
    options: dict[str, dict[str, Any]] = {
        "raw": {},
        "more": {"answers_per_prompt": 3},
        "cool": {"temperature": 0.7},
        "nucleus": {"top_p": 0.9},
        "top": {"top_k": 5},
        "judged": {"answers_per_prompt": 3, "keep_if": f"{predicates}:odd"},
        "best": {"answers_per_prompt": 2, "keep": "best"},
        "sampled": {"targets": threshold(0.05)},
    }
    for name, settings in options.items():
        generate(teacher_dir, data, folder / name, **{"max_new_tokens": 8, **settings})
    build_cache(folder / "given", teacher_dir, text_file)
    return {name: folder / name for name in (*options, "given")}


# -- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_every_byte_of_the_answers_is_checked_and_converting_keeps_them(
    written: dict[str, Path], tmp_path: Path
) -> None:
    for _ in cf.convert_cache(written["judged"], tmp_path / "packed", cf.Conversion(encoding="packed")):
        pass
    assert answers_of(tmp_path / "packed") == answers_of(written["judged"])
    file = tmp_path / "packed/answers.jsonl"
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    with pytest.raises(cf.FormatError, match="answers.jsonl: checksum"):
        cf.verify_cache(tmp_path / "packed")
    file.unlink()
    with pytest.raises(cf.FormatError, match="answers.jsonl: no such file"):
        list(cf.open_cache(tmp_path / "packed").answers())


def test_sizes_include_the_answers(written: dict[str, Path]) -> None:
    path = written["judged"]
    parts = [*path.glob("shards/*.arrow"), path / "answers.jsonl"]
    total = sum(part.stat().st_size for part in parts)
    stats = cache_statistics(cf.open_cache(path))
    assert stats["bytes"] == total == cf.verify_cache(path).bytes
    lines = stats["beside_bytes_per_token"]
    assert lines["answers.jsonl"] == parts[-1].stat().st_size / stats["tokens"]
    assert sum([*stats["column_bytes_per_token"].values(), *lines.values()]) == pytest.approx(stats["bytes_per_token"])


def test_a_cache_of_given_text_has_no_answers(teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    assert list(cf.open_cache(build_cache(tmp_path / "cache", teacher_dir, text_file)).answers()) == []


# -- students ---------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("kd_weight", [0.0, 0.9])
def test_students_learn_from_answers(
    kd_weight: float, written: dict[str, Path], student_dir: Path, tmp_path: Path
) -> None:
    options = {"learning_rate": 1e-2, "epochs": 8.0, "batch_size": 4}
    train(tmp_path / "student", written["more"], student=student_dir, kd_weight=kd_weight, **options)
    rows = list(cf.open_cache(written["more"]).iter_rows())
    before, after = (
        dense_evaluation(AutoModelForCausalLM.from_pretrained(path), rows, 400)
        for path in (student_dir, tmp_path / "student")
    )
    assert after["ce"] < before["ce"] - 0.2 and after["kl"] < before["kl"]


@pytest.mark.parametrize("name, warnings", [("raw", 0), ("sampled", 0), ("judged", 1), ("best", 1), ("given", 1)])
def test_the_realized_tail_warns_where_the_text_may_not_be_a_sample(
    name: str, warnings: int, written: dict[str, Path], student_dir: Path, tmp_path: Path
) -> None:
    summary = train(tmp_path / "student", written[name], student=student_dir, tail="realized", max_steps=1)
    assert len(summary.warnings) == warnings and all("`tail` realized" in warning for warning in summary.warnings)


@pytest.mark.parametrize("name", ["cool", "nucleus", "top"])
def test_the_realized_tail_is_refused_where_the_text_is_no_sample(
    name: str, written: dict[str, Path], student_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="`tail` realized: the text of .* was generated with `gen_temperature`"):
        train(tmp_path / "student", written[name], student=student_dir, tail="realized", max_steps=1)
    recipe = loss_for_cache(cf.open_cache(written["raw"]), kd_weight=0.5, tail="realized")
    assert loss_for_held_out(recipe, cf.open_cache(written[name])).tail == "bucket"
    assert loss_for_held_out(recipe, cf.open_cache(written["judged"])).tail == "realized"


def test_a_policy_for_the_teachers_own_text_is_not_carried_over_to_another_held_out(
    written: dict[str, Path], teacher_dir: Path, tmp_path: Path
) -> None:
    """The teacher itself as the student: it agrees with the teacher about any text."""
    options = {"tail": "realized", "kd_weight": 1.0, "max_steps": 1, "eval_steps": 1, "learning_rate": 1e-30}
    summary = train(tmp_path / "s", written["raw"], student=teacher_dir, eval_cache=str(written["given"]), **options)
    assert abs(summary.eval["loss"]) < 0.01 and summary.eval["agreement"] > 0.9  # ties of entries count in part
    (warning,) = summary.warnings
    assert "given: its targets do not support `tail=realized`, the held-out loss uses `tail=bucket`" in warning
    own = train(tmp_path / "t", written["raw"], student=teacher_dir, eval_cache=str(written["more"]), **options)
    assert own.warnings == []


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda lines: lines[:-1], "lines, expected"),
        (lambda lines: [*lines[:-1], lines[-1].rstrip("\n")], "lines, expected"),
        (lambda lines: ["[1]\n", *lines[1:]], "line 1 is not an answer"),
        (lambda lines: [lines[0], "[" * 100_000 + "\n", *lines[2:]], "line 2 is not an answer"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], "line 1 is not an answer .row 1;"),
        (lambda lines: [lines[0].replace('"document": 0', '"document": "0"'), *lines[1:]], "wrong: document"),
    ],
)
def test_answers_that_lie_under_a_true_checksum_are_refused(
    change: Callable[[list[str]], list[str]], problem: str, written: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(written["judged"], tmp_path / "cache")
    file, manifest = tmp_path / "cache/answers.jsonl", tmp_path / "cache/manifest.json"
    before = file.read_bytes()
    after = "".join(change(before.decode().splitlines(keepends=True))).encode()
    assert after != before
    file.write_bytes(after)
    text = manifest.read_text().replace(*(hashlib.sha256(data).hexdigest() for data in (before, after)))
    claimed = json.loads(text)["manifest_sha256"]
    zeroed = text.replace(claimed, "0" * 64)
    manifest.write_text(text.replace(claimed, hashlib.sha256(zeroed.encode()).hexdigest()))
    with pytest.raises(cf.FormatError, match=f"answers.jsonl: .*{problem}"):
        list(cf.open_cache(tmp_path / "cache").answers())


# -- the worked example


@pytest.mark.parametrize(
    "text, right",
    [
        ("4 - 1 = 3", True),
        ("We add 1,200 and 34.5 to get 1,234.5.", False),
        ("The answer is **3**.", True),
        ("It is 3.0, as 4 - 1 is", False),
        ("-3", False),
        ("three", False),
        ("", False),
    ],
)
def test_the_worked_example_looks_at_the_last_number(text: str, right: bool) -> None:
    answer = Answered(text=text, token_ids=(), stop_reason="eos", mean_logprob=0.0, index=0)
    assert is_right({"solution": "3"}, answer) is right
    assert is_right({"solution": "1234.5"}, answer) is text.startswith("We add")
