"""`cache-teacher --generate` where its output is finished: it is the cache that the run would write, or is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import cache_format as cf
from cache_samples import contents
from generating import generate
from pipeline.teacher import opening
from pipeline.teacher.engines.engine_config import EngineConfig
from tiny import tiny_llama, write_jsonl

ANSWERS: dict[str, Any] = {"max_new_tokens": 4}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "teacher", tokenizer)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("The miller\nThe millstone\nThe river\n")
    return path


@pytest.fixture
def finished(teacher: Path, data: Path, tmp_path: Path) -> Path:
    generate(teacher, data, tmp_path / "cache", **ANSWERS)
    return tmp_path / "cache"


def test_the_same_run_loads_no_model(
    teacher: Path, data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(finished)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(data, tmp_path / "elsewhere")
    monkeypatch.setattr(opening, "load_model", None)
    for same in (data, tmp_path / "elsewhere" / data.name):
        assert generate(teacher, same, finished, **ANSWERS).rows == 1
    assert contents(finished) == before


@pytest.mark.parametrize(
    "change, named",
    [
        ({"sample_by": "line"}, 'corpus.sample_by recorded "document", given "line"'),
        ({"dtype": "bfloat16"}, 'teacher.dtype recorded "float32", given "bfloat16"'),
        ({"running": EngineConfig(engine="vllm")}, 'capture.engine recorded "transformers", given "vllm"'),
    ],
)
def test_an_option_that_changes_the_answers_is_refused(
    change: dict[str, Any], named: str, teacher: Path, data: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "check_installed", lambda **_: None)
    before, device = contents(finished), {"device": "auto"} if "running" in change else {}
    with pytest.raises(cf.MismatchError, match=f"finished cache .* made with other settings .*{named}"):
        generate(teacher, data, finished, **ANSWERS, **change, **device)
    assert contents(finished) == before


def test_the_recorded_dtype_may_be_given(teacher: Path, data: Path, finished: Path) -> None:
    assert generate(teacher, data, finished, **ANSWERS, dtype="float32").rows == 1


def test_other_prompts_of_the_same_name_are_refused(teacher: Path, tmp_path: Path) -> None:
    data, output = tmp_path / "prompts.jsonl", tmp_path / "cache"
    generate(teacher, write_jsonl(data, [{"prompt": "The miller"}]), output, **ANSWERS)
    write_jsonl(data, [{"prompt": "The river"}] * 2)
    with pytest.raises(cf.MismatchError, match=r"made with other settings \(prompts.files"):
        generate(teacher, data, output, **ANSWERS)


def test_another_tokenizer_is_refused(
    teacher: Path, data: Path, finished: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    settings = tmp_path / "tokenizer/tokenizer_config.json"
    settings.write_text(settings.read_text().replace("{", '{"chat_template": "{{ messages }}",', 1))
    (tmp_path / "tokenizer/chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(cf.MismatchError, match=r"made with other settings \(tokenizer.chat_template"):
        generate(teacher, data, finished, **ANSWERS, tokenizer=str(tmp_path / "tokenizer"))
