"""Options that only apply to one mode of a command: in another, each is refused by its own name, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.options import Option, build, options_of
from pipeline.student.train_config import LORA, TrainStudentConfig
from pipeline.teacher.cache_config import WITHOUT_VLLM, CacheTeacherConfig
from pipeline.teacher.engines.engine_config import VLLM
from pipeline.teacher.engines.server.server_config import SERVER, WITHOUT_SERVER
from pipeline.teacher.generation.generation_config import GENERATION
from pipeline.teacher.targets.hidden_rule import HIDDEN
from pipeline.teacher.text.data_config import TEXT
from pipeline.teacher.text.masked.mask_rule import MASKED
from pipeline.teacher.verify_config import TeacherCheckConfig
from pipeline.teacher.writing.worker_config import PROCESSES
from runs import command as run

TEACHER = options_of(CacheTeacherConfig)
BASE = {"teacher": "t", "data": "d", "output": "o"}
# Options that are of use with generated text as well.
ALSO_GENERATED = {"data_config", "split", "text_column", "sample_by", "max_documents", "seq_len", "teacher_seq_len"}
ALSO_GENERATED |= {"keep_columns", "chat_template_kwargs", "template_date", "allow_rounding", "stale_after"}
VALUES = {"chat_template_kwargs": '{"enable_thinking": false}', "template_date": "2026-01-31", "device_map": "auto"}


def names(group: str, options: dict[str, Option] = TEACHER) -> list[str]:
    found = [name for name, each in options.items() if each.metadata.group == group]
    assert found
    return found


def other_value(declared: Option) -> Any:
    """A value in range that is not the default."""
    if declared.name in VALUES:
        return VALUES[declared.name]
    if declared.type is bool:
        return declared.default is not True
    if declared.metadata.choices:
        return next(choice for choice in declared.metadata.choices if choice != declared.default)
    if declared.type is int:
        return (declared.default or 0) + 2
    return {float: 0.05, tuple: ("x",)}.get(declared.type, "1:2")


def refused(config: type, values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        build(config, values)
    return str(error.value)


@pytest.mark.parametrize("name", [name for name in names(GENERATION) if name != "generate"])
def test_options_of_generation_without_it(name: str):
    message = refused(CacheTeacherConfig, {**BASE, name: other_value(TEACHER[name])})
    assert message.startswith(f"`{name}`: only with `generate=True`")


GIVEN_TEXT = [*names(TEXT), *names(MASKED), *names(HIDDEN), *names(PROCESSES), "tensor_parallel", "all_positions"]


@pytest.mark.parametrize("name", [name for name in GIVEN_TEXT if name not in ALSO_GENERATED])
def test_options_of_given_text_with_generation(name: str):
    value = "last" if name == "hidden_states" else other_value(TEACHER[name])
    message = refused(CacheTeacherConfig, {**BASE, "generate": True, name: value})
    assert message.startswith(f"`{name}`: cannot be combined with `generate`: ") and message.endswith(". Leave it out.")


@pytest.mark.parametrize("name", sorted(ALSO_GENERATED))
def test_options_of_both(name: str):
    build(CacheTeacherConfig, {**BASE, "generate": True, name: other_value(TEACHER[name])})


@pytest.mark.parametrize("name", names(VLLM))
def test_options_of_vllm_without_it(name: str):
    value = {"tensor_parallel_size": 2} if name == "engine_args" else other_value(TEACHER[name])
    assert refused(CacheTeacherConfig, {**BASE, name: value}).startswith(f"`{name}`: only with `engine=vllm`.")


@pytest.mark.parametrize("name", sorted({*WITHOUT_VLLM, *names(MASKED)}))
def test_options_that_vllm_does_not_have(name: str):
    message = refused(CacheTeacherConfig, {**BASE, "engine": "vllm", name: other_value(TEACHER[name])})
    assert message.startswith(f"`{'engine` vllm' if name in names(MASKED) else name + '`'}")


SERVED = {**BASE, "teacher": "http://host:8000/v1", "tokenizer": "t", "top_k": 8}


@pytest.mark.parametrize("name", names(SERVER))
def test_options_of_a_server_without_one(name: str):
    message = refused(CacheTeacherConfig, {**BASE, name: other_value(TEACHER[name])})
    assert message.startswith(f"`{name}`: only if `teacher` is the URL of a server")


@pytest.mark.parametrize("name", sorted({*WITHOUT_SERVER, *names(MASKED), *names(VLLM)}))
def test_options_that_a_server_does_not_have(name: str):
    value = {"hidden_states": "last", "engine_args": {"tensor_parallel_size": 2}}.get(name, other_value(TEACHER[name]))
    message = refused(CacheTeacherConfig, {**SERVED, name: value})
    assert message.startswith("`teacher` http" if name in names(MASKED) else f"`{name}`: ")


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_engines_that_are_no_server(engine: str):
    assert refused(CacheTeacherConfig, {**SERVED, "engine": engine}).startswith(f"`engine` {engine}: `teacher` http")
    assert refused(CacheTeacherConfig, {**BASE, "engine": "server"}).startswith("`engine` server: found `teacher` t")


def test_hidden_targets_with_generation():
    message = refused(CacheTeacherConfig, {**BASE, "generate": True, "targets": "hidden"})
    assert message.startswith("`targets`: cannot be combined with `generate`: hidden states")


@pytest.mark.parametrize("name", ["hidden_dtype", "hidden_every"])
def test_options_of_hidden_states_without_layers(name: str):
    message = refused(CacheTeacherConfig, {**BASE, name: other_value(TEACHER[name])})
    assert message.startswith(f"`{name}`: only with `hidden_states`")


@pytest.mark.parametrize("name, other", [("num_workers", "worker_index"), ("worker_index", "num_workers")])
def test_one_of_two_options_of_workers(name: str, other: str):
    assert refused(CacheTeacherConfig, {**BASE, name: 2}).startswith(f"`{name}` 2: found no `{other}`, expected the ")


@pytest.mark.parametrize("name", names(MASKED))
def test_options_of_masking_with_a_causal_teacher(name: str, teacher_dir: Path, text_file: Path, tmp_path: Path):
    flag, value = TEACHER[name].flag, other_value(TEACHER[name])
    words = ["--teacher", teacher_dir, "--data", text_file, "--output", tmp_path / "cache", flag, value]
    line = run("cache-teacher", *words, status=1).stderr.splitlines()[-1]
    assert line.startswith(f"Error: {flag}: {teacher_dir} is a causal language model")


def test_an_option_at_its_default_is_named_with_the_others_of_its_part():
    assert "`mask_seed`" in refused(CacheTeacherConfig, {**BASE, "generate": True, "mask_seed": 0})


@pytest.mark.parametrize(
    "name", sorted(options_of(TeacherCheckConfig).keys() - {"cache", "against_teacher", "tokenizer"})
)
def test_options_of_a_comparison_without_a_teacher(name: str, tmp_path: Path):
    declared = options_of(TeacherCheckConfig)[name]
    words = [declared.flag] if declared.type is bool else [declared.flag, other_value(declared)]
    line = run("verify", tmp_path, *words, status=2).stderr.splitlines()[-1]
    assert line == f"Error: {declared.flag}: only with --against-teacher. Name the teacher."


@pytest.mark.parametrize("name", [name for name in names(LORA, options_of(TrainStudentConfig)) if name != "lora_rank"])
def test_options_of_adapters_without_a_rank(name: str):
    declared = options_of(TrainStudentConfig)[name]
    message = refused(TrainStudentConfig, {"cache": "c", "output": "o", name: other_value(declared)})
    assert message.startswith(f"`{name}`: there is no adapter without `lora_rank`")
